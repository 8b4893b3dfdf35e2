"""What is held out has no source and no siblings among what is trained on."""

import json
import random
from collections import Counter
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from headstart.configs.loader import load_config
from headstart.configs.schema import DataConfig, SourceConfig
from headstart.configs.settings import AdaptConfig
from headstart.data.contamination import shingles_of
from headstart.data.prepare import Prepared, plan_documents
from headstart.data.prompts import Prompt, load_prompts
from headstart.data.splits import EVERYWHERE, SIBLINGS, Joined, cluster, hold_out
from headstart.heads.loading import load_target
from headstart.train.adaptation import Adaptation, load_kinds, split_prompts
from headstart.train.run import train
from tests.helpers.runs import tiny_config


def prompt(text: str, name: str = "p", source: str | None = None) -> Prompt:
    message = [{"role": "user", "content": text}]
    return Prompt(name, "c", name if source is None else source, message, False)


def partition(numbers: list[int]) -> set[frozenset[int]]:
    places: dict[int, list[int]] = {}
    for place, number in enumerate(numbers):
        places.setdefault(number, []).append(place)
    return {frozenset(own) for own in places.values()}


def by_all_pairs(prompts: list[Prompt]) -> set[frozenset[int]]:
    """The clusters as they are defined: whole words, every pair."""
    found = [shingles_of(p) for p in prompts]
    distinct = {shingles for shingles in found if shingles}
    times = Counter(shingle for shingles in distinct for shingle in shingles)
    everywhere = {s for s, n in times.items() if n > EVERYWHERE * len(distinct)}
    clusters = [{i} for i in range(len(prompts))]
    for one, other in combinations(range(len(prompts)), 2):
        mine, theirs = found[one] - everywhere, found[other] - everywhere
        near = len(mine & theirs) >= SIBLINGS * min(len(mine), len(theirs)) > 0
        if near or (found[one] and found[one] == found[other]):
            joined = clusters[one] | clusters[other]
            for i in joined:
                clusters[i] = joined
    return {frozenset(own) for own in clusters}


TEXTS = st.lists(st.sampled_from("abcd"), max_size=14).map(" ".join)


@given(texts=st.lists(TEXTS, max_size=12), order=st.randoms(use_true_random=False))
@settings(max_examples=300, deadline=None)
def test_clusters_are_those_of_comparing_all_pairs_in_any_order(
    texts: list[str], order: random.Random
) -> None:
    prompts = [prompt(text) for text in texts]
    numbers = cluster(prompts)
    assert partition(numbers) == by_all_pairs(prompts)
    places = list(range(len(texts)))
    order.shuffle(places)
    moved = partition(cluster([prompts[i] for i in places]))
    assert {frozenset(places[i] for i in own) for own in moved} == partition(numbers)


def test_every_turn_of_the_user_is_compared_and_nothing_else() -> None:
    question = "What should a beginner know about the moon landing"
    answer = {"role": "assistant", "content": question}
    talk = [{"role": "user", "content": "Hello"}, answer, {"role": "user", "content": question}]
    numbers = cluster([
        Prompt("a", "c", "a", talk, False), prompt(question.upper().replace("moon", "Mars")),
        Prompt("b", "c", "b", [{"role": "system", "content": question}, talk[0], answer], False),
        prompt("How many legs does a spider have"),
    ])  # fmt: skip
    assert numbers[0] == numbers[1]
    assert len(set(numbers)) == 3


def of_templates(templates: int, each: int, seed: int = 0) -> list[tuple[int, str]]:
    """Texts made from templates of 14 words with a slot of one word, and which template."""
    rng = random.Random(seed)
    texts = []
    for template in range(templates):
        words = [f"t{template}w{i}" for i in range(14)]
        texts += [(template, " ".join([*words[:9], f"s{i}", *words[9:]])) for i in range(each)]
    return rng.sample(texts, len(texts))


def test_a_template_of_hundreds_of_prompts_is_one_cluster() -> None:
    """Many more than each is compared with."""
    texts = of_templates(4, 300)
    numbers = cluster([prompt(text) for _, text in texts])
    assert len(set(numbers)) == 4
    assert len({(template, n) for (template, _), n in zip(texts, numbers, strict=True)}) == 4


def test_what_nearly_all_prompts_say_makes_no_siblings() -> None:
    preamble = " ".join(f"p{i}" for i in range(40))
    texts = [f"{preamble} {' '.join(f'o{n}w{i}' for i in range(8))}" for n in range(20)]
    assert len(set(cluster([prompt(text) for text in texts]))) == 20


def test_ten_thousand_prompts_with_a_beginning_in_common_take_no_quadratic_time(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Twice the prompts, twice the comparisons: of siblings, and of those that share too little."""
    real, calls = Joined.leader, 0

    def counted(self: Joined, number: int) -> int:
        nonlocal calls
        calls += 1
        return real(self, number)

    monkeypatch.setattr(Joined, "leader", counted)
    taken = []
    for count in (5000, 10_000):
        rng, calls = random.Random(0), 0
        texts = []
        for i in range(count):
            own = [str(rng.randrange(10**6)) for _ in range((8, 60)[i % 2])]
            texts.append(" ".join(["a b c d e f g h"] * (i % 5 > 0) + own))
        cluster([prompt(text) for text in texts])
        taken.append(calls)
    assert taken[1] < 2.2 * taken[0]
    assert taken[1] < 100 * 10_000


@dataclass(frozen=True)
class Item:
    source: str
    category: str
    cluster: int
    candidate: bool = True


ITEMS = st.lists(
    st.builds(
        lambda source, cluster, candidate: Item(f"s{source}", f"c{source % 3}", cluster, candidate),
        st.integers(0, 30),
        st.integers(0, 30),
        st.booleans(),
    ),
    min_size=1,
    max_size=40,
)


@given(ITEMS, st.integers(1, 12), st.integers(0, 5), st.booleans())
@settings(max_examples=300, deadline=None)
def test_a_split_is_whole_and_what_straddles_it_is_told(
    items: list[Item], count: int, seed: int, all_may: bool
) -> None:
    clusters, among = [i.cluster for i in items], [all_may or i.candidate for i in items]

    def split() -> Any:
        return hold_out(items, clusters, count, seed, among=among)

    try:
        found = split()
    except ValueError:  # too few
        return
    assert split() == found
    assert len(found.held_out) == count
    assert all(among[i] for i in found.held_out)
    assert found.training
    sides = [*found.training, *found.held_out, *found.left_out]
    assert sorted(sides) == list(range(len(items)))
    assert {items[i].source for i in found.training}.isdisjoint(
        items[i].source for i in found.held_out
    )
    inside = {clusters[i] for i in found.held_out}
    assert found.straddling == [i for i in found.training if clusters[i] in inside]
    # Equal items but for their places: the same are held out in any order.
    order = random.Random(seed).sample(range(len(items)), len(items))
    moved = hold_out(
        [items[i] for i in order], [clusters[i] for i in order], count, seed,
        among=[among[i] for i in order],
    )  # fmt: skip
    assert sorted(order[i] for i in moved.held_out) == found.held_out


@given(st.integers(20, 60), st.integers(1, 12), st.integers(0, 9))
@settings(max_examples=50, deadline=None)
def test_without_siblings_the_seeded_choice_is_that_of_sources_alone(
    number: int, count: int, seed: int
) -> None:
    """What recipes have drawn so far."""
    items = [Item(f"s{i}", "c", i) for i in range(number)]
    found = hold_out(items, [item.cluster for item in items], count, seed)
    drawn = random.Random(seed).sample(sorted(item.source for item in items), number)
    assert {items[i].source for i in found.held_out} == set(drawn[:count])
    assert not found.left_out + found.straddling


def test_no_source_is_both_trained_and_validated_on() -> None:
    prompts = load_prompts("builtin:text_train")
    numbers = list(range(len(prompts)))
    split = hold_out(prompts, numbers, 32, seed=0)
    training, validation = ([prompts[i] for i in s] for s in (split.training, split.held_out))
    assert len(validation) == 32
    assert not {p.source for p in training} & {p.source for p in validation}
    categories = [p.category for p in validation]
    assert min(categories.count(c) for c in ("code", "docs", "speech")) >= 8
    assert len(training) + 32 == len(prompts)
    with pytest.raises(ValueError, match="cannot hold out 4 validation prompts of 4"):
        hold_out(prompts[:4], numbers[:4], 4, seed=0)
    with pytest.raises(ValueError, match="prompts of 0 from 0 sources"):
        hold_out([], [], 4, seed=0)  # all were copies of evaluation prompts


def test_whole_clusters_are_held_out_then_a_part_of_one_then_siblings_straddle() -> None:
    def split(sizes: list[int], count: int) -> Any:
        items = [Item(f"s{n}-{i}", "c", n) for n, size in enumerate(sizes) for i in range(size)]
        return hold_out(items, [item.cluster for item in items], count, seed=0)

    whole = split([2] * 30, 6)
    assert not whole.left_out + whole.straddling
    part = split([4] * 30, 6)  # one of four, and a half of another
    assert len(part.left_out) == 2
    assert not part.straddling
    neither = split([20, 20], 6)
    assert not neither.left_out
    assert neither.straddling == neither.training


def test_no_kind_of_text_is_held_out_whole_where_there_is_another_split() -> None:
    """As in a store of some of the recipe's conversations: one source wrote all of a kind, and is
    the smallest group that has enough, since the documents of all others are one cluster."""
    sums = [Item("generated", "math", i, candidate=i < 85) for i in range(150)]
    others = [Item(f"d{i}", "code" if i % 2 else "docs", 1000) for i in range(1300)]
    items = sums + others
    clusters, among = [i.cluster for i in items], [i.candidate for i in items]
    split = hold_out(items, clusters, 96, seed=0, among=among)
    assert Counter(items[i].category for i in split.training)["math"] == 150
    assert {items[i].category for i in split.held_out} == {"code", "docs"}
    assert split.straddling, "and it is told"
    # Nothing else will do: then a kind is.
    few = sums[:20] + [Item("d", "docs", 1000, candidate=False) for _ in range(500)]
    among = [i.candidate for i in few]
    split = hold_out(few, [i.cluster for i in few], 20, seed=0, among=among)
    assert {few[i].category for i in split.held_out} == {"math"}


def test_the_reference_recipe_holds_out_no_siblings_of_training_prompts() -> None:
    """Hundreds were of the first two sets, while the split was by source alone."""
    chat, text, passages = (
        load_prompts(f"builtin:{name}_train") for name in ("chat", "text", "passages")
    )
    for prompts in ([*chat, *text, *passages], [*chat, *text]):
        numbers = cluster(prompts)
        split = hold_out(prompts, numbers, 96, seed=0)
        assert not split.straddling + split.left_out
        assert {numbers[i] for i in split.training}.isdisjoint(numbers[i] for i in split.held_out)
    alone = hold_out(prompts, list(range(len(prompts))), 96, seed=0)
    held = {numbers[i] for i in alone.held_out}
    assert sum(numbers[i] in held for i in alone.training) > 400


def written(path: Path, texts: list[str]) -> SourceConfig:
    path.write_text("".join(json.dumps({"prompt": text}) + "\n" for text in texts))
    return SourceConfig(path=str(path))


def prepared(tmp_path: Path, texts: list[str], count: int) -> Prepared:
    target = load_target("tiny-gemma4", "float32")
    source = written(tmp_path / "prompts.jsonl", texts)
    data = DataConfig(
        cache_dir=tmp_path / "cache", prompts=[source], max_new_tokens=2, temperatures=[0.0],
        teacher_top_k=4, validation_conversations=count,
    )  # fmt: skip
    return plan_documents(target, data, 0, None).prepare()


def test_a_run_holds_out_whole_templates(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    texts = of_templates(10, 4)
    found = prepared(tmp_path, [text for _, text in texts], 8)
    template = {f"prompts-{i:05}": n for i, (n, _) in enumerate(texts, 1)}
    held, trained = ({template[e.id] for e in side.entries} for side in found[:2][::-1])
    assert len(found.validation.entries) == 8
    assert not held & trained
    assert found.left_out.siblings_straddling == 0
    assert "siblings" not in capsys.readouterr().out


def test_a_set_of_one_template_is_split_and_says_so(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    texts = [text for _, text in of_templates(2, 12)]
    found = prepared(tmp_path, texts, 4)
    assert len(found.validation.entries) == 4
    assert found.left_out.siblings_straddling == len(found.training.entries) == 20
    assert "20 of 20 prompts to train on are siblings" in capsys.readouterr().out


def test_a_run_tells_and_keeps_how_many_siblings_it_left_out(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Of templates of four, six are held out: all of one, and two of another."""
    source = written(tmp_path / "prompts.jsonl", [text for _, text in of_templates(30, 4)])
    train(tiny_config(
        tmp_path / "run", f"data.prompts=[{source.path}]", "data.validation_conversations=6",
        "data.num_conversations=8", "data.max_new_tokens=8", "train.max_steps=6",
        "train.eval_steps=6", "train.save_steps=6", "eval=null",
        "head.use_ordered_embeddings=false", "head.num_centroids=null",
    ))  # fmt: skip
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["data"]["siblings_left_out"] == 2
    assert summary["data"]["siblings_straddling"] == 0
    assert "Held out: 2 prompts more are not trained on" in capsys.readouterr().out


def test_adapt_leaves_siblings_of_one_kind_out_of_the_other(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Each template has one prompt in the domain and two among the general prompts."""
    texts = of_templates(12, 3)
    seen: set[int] = set()
    domain: list[str] = []
    general: list[str] = []
    for template, text in texts:
        (general if template in seen else domain).append(text)
        seen.add(template)
    asked = {"data.prompts": domain, "adapt.general_prompts": general}
    paths = {key: written(tmp_path / f"{key}.jsonl", own).path for key, own in asked.items()}
    config = load_config(
        None, ["target.name=tiny-gemma4", f"data.prompts=[{paths['data.prompts']}]"]
    )
    options = AdaptConfig(
        general_prompts=SourceConfig(path=paths["adapt.general_prompts"]), held_out_prompts=2
    )
    a = Adaptation("head", config, options, 4, tmp_path / "out")
    found, _ = split_prompts(a, load_kinds(a))
    made = {text: n for n, text in texts}
    held = {made[p.text] for _, own in found.values() for p in own}
    assert held.isdisjoint(made[p.text] for training, _ in found.values() for p in training)
    assert [len(own) for _, own in found.values()] == [2, 2]
    assert "siblings" in capsys.readouterr().out

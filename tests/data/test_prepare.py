"""The ways to a run's activations: prompts, conversations, a store, or none stored at all."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from headstart.configs.schema import Config, DataConfig, FilterConfig
from headstart.configs.settings import ServerConfig
from headstart.data import prepare
from headstart.data.contamination import stored_prompts, without_contaminated
from headstart.data.conversations import MANIFEST, answered, finished_parts, read_part
from headstart.data.extraction import OnlineActivations
from headstart.data.prepare import (
    inputs_read,
    prepare_documents,
    run_extract,
    run_regenerate,
    stream_folder,
)
from headstart.data.prompts import Prompt
from headstart.data.store import ActivationStore
from headstart.data.templates import encode_prompt
from headstart.heads.kinds import head_kinds
from headstart.heads.loading import load_target
from headstart.heads.target import KEYS_AND_VALUES, Inputs
from headstart.train.run import train
from tests.helpers.prompts import conversations
from tests.helpers.runs import metrics, tiny_config, weights


def small(folder: Path, *overrides: str) -> Config:
    return tiny_config(folder, "train.max_steps=6", "train.eval_steps=3", *overrides)


@pytest.fixture
def stored(tmp_path: Path) -> Path:
    """What `headstart extract` leaves: conversations and their store."""
    run_regenerate(small(tmp_path / "stored"), ServerConfig(), extracting=True, device="cpu")
    return tmp_path / "stored"


@pytest.mark.parametrize(
    ("kind", "completion_only"), [*((kind, True) for kind in head_kinds()), ("assistant", False)]
)
def test_training_reads_prompts_conversations_and_stores_alike(
    kind: str, completion_only: bool, tmp_path: Path
) -> None:
    """A store made while generating, one extracted afterwards, and none: the same losses, with the
    prompts trained on and without. Stored is what heads of the kind read."""
    stored = tmp_path / "stored"
    of_kind = [
        f"head.kind={kind}",
        "train.num_speculative_steps=4",  # as the evaluation has
        f"data.completion_only_loss={completion_only}",
    ]
    run_regenerate(small(stored, *of_kind), ServerConfig(), extracting=True, device="cpu")
    run_extract(small(tmp_path / "extracted", *of_kind), str(stored), "cpu")
    (document,) = ActivationStore(tmp_path / "extracted").read([0])
    inputs = inputs_read(small(tmp_path, *of_kind), load_target("tiny-gemma4", "float32"))
    states = {"hidden", *(f"layer.{i}" for i in inputs.layers)}
    kv = {f"{t}.{what}" for t in document.layer_types for what in ("keys", "values")}
    assert bool(kv) == inputs.kv
    assert document.activations.keys() == states | kv
    ways = {
        "recorded": f"data.store={stored}",
        "extracted": f"data.store={tmp_path / 'extracted'}",
        "conversations": f"data.conversations={stored}",
    }
    losses = {}
    for name, way in ways.items():
        train(small(tmp_path / name, way, *of_kind))
        losses[name] = [row["loss"] for row in metrics(tmp_path / name)]
    online = [f"data.conversations={stored}", "data.online=true", *of_kind]
    train(small(tmp_path / "online", *online))
    losses["online"] = [row["loss"] for row in metrics(tmp_path / "online")]
    assert losses["extracted"] == losses["conversations"]
    assert losses["online"] == pytest.approx(losses["extracted"], abs=1e-5)
    assert losses["recorded"] == pytest.approx(losses["extracted"], abs=1e-3)


def test_prompts_are_trained_on_where_asked_and_never_validated_on(tmp_path: Path) -> None:
    """Of each row what the target itself says there; a store of answers alone is refused."""
    target = load_target("tiny-gemma4", "float32")
    few = ["data.num_conversations=6", "data.validation_conversations=2", "data.max_new_tokens=9"]
    cache = f"data.cache_dir={tmp_path / 'cache'}"
    config = small(tmp_path / "run", cache, *few, "data.completion_only_loss=false")
    training, validation = prepare_documents(target, config.data, 0, None)
    answers, same = prepare_documents(
        target, config.data.model_copy(update={"completion_only_loss": True}), 0, None
    )
    both = zip(training.read(range(6)), answers.read(range(6)), training.entries, strict=True)
    for document, without, entry in both:
        assert torch.equal(document.ids, without.ids)
        assert document.loss_mask.tolist() == [False] + [True] * (len(document.ids) - 1)
        assert entry.trained == len(document.ids) - 1 > without.loss_mask.sum()
        said = target.logits(document.hidden[:-1]).log_softmax(-1)
        expected = said.topk(document.teacher_ids.shape[1]).values
        assert torch.allclose(document.teacher_logprobs[:-1], expected, atol=1e-4)
        stored = said.gather(-1, document.teacher_ids[:-1].long())
        assert torch.allclose(document.teacher_logprobs[:-1], stored, atol=1e-4)
    for held_out, without in zip(validation.read([0, 1]), same.read([0, 1]), strict=True):
        assert torch.equal(held_out.loss_mask, without.loss_mask)
        assert not held_out.loss_mask.all()
    rows, long = conversations(2), config.data.model_copy(update={"max_tokens": 13})
    with pytest.raises(ValueError, match=r"c1 has 15 tokens.*data\.max_tokens=13"):
        OnlineActivations(target, rows, long, KEYS_AND_VALUES._replace(prompts=True))
    run_regenerate(small(tmp_path / "stored"), ServerConfig(), extracting=True, device="cpu")
    whole = [f"data.store={tmp_path / 'stored'}", "data.completion_only_loss=false"]
    with pytest.raises(ValueError, match="within prompts: extract one with"):
        prepare_documents(target, small(tmp_path / "run", *whole).data, 0, None)


def test_the_online_mode_trains_on_prompts_and_stores_no_activations(tmp_path: Path) -> None:
    cache = [f"data.cache_dir={tmp_path / 'cache'}"]
    train(small(tmp_path / "online", "data.online=true", *cache))
    assert not list((tmp_path / "cache").rglob("*.safetensors"))
    train(small(tmp_path / "stored", *cache))
    assert list((tmp_path / "cache").rglob("*.safetensors"))
    pairs = zip(metrics(tmp_path / "online"), metrics(tmp_path / "stored"), strict=True)
    for online, on_disk in pairs:
        assert online["loss"] == pytest.approx(on_disk["loss"], abs=1e-3)


def test_answers_are_found_again_whatever_is_noted_of_loading_their_target(tmp_path: Path) -> None:
    """Those of earlier versions too, which noted nothing: a run that goes on asks nothing again."""
    target, cache = load_target("tiny-gemma4", "float32"), tmp_path / "cache"
    few = ["data.num_conversations=4", "data.validation_conversations=1", "data.max_new_tokens=4"]
    config = small(tmp_path / "none", f"data.cache_dir={cache}", *few)
    found = []
    for target.settings in ({"name": "tiny-gemma4"}, None):
        prepare_documents(target, config.data, config.seed, None)
        found.append(sorted(path.name for path in (cache / "conversations").iterdir()))
    assert found[0] == found[1] != []


@pytest.mark.parametrize("texts", ["answered", "given"])
def test_a_head_that_reads_less_takes_what_is_stored_for_one_that_reads_more(
    texts: str, stored: Path, tmp_path: Path
) -> None:
    """And, where there is nothing, stores what it reads alone, which does for no other."""
    target, states = load_target("tiny-gemma4", "float32"), Inputs(kv=False)

    def stores(cache: Path, *asked: Inputs) -> list[list[str]]:
        """What training texts hold, and how many stores there are."""
        of_texts = [f"data.conversations={stored}"] if texts == "given" else []
        data = small(tmp_path, f"data.cache_dir={cache}", *of_texts).data
        found = [prepare_documents(target, data, 0, None, one)[0].read([0])[0] for one in asked]
        assert len({document.id for document in found}) == 1
        count = len(list(cache.rglob("index.json")))
        return [[str(count)], *(document.layer_types for document in found)]

    both = ["full_attention", "sliding_attention"]
    once, twice = ("1", "2") if texts == "given" else ("2", "4")
    assert stores(tmp_path / "a", KEYS_AND_VALUES, states) == [[once], both, both]
    assert stores(tmp_path / "b", states, KEYS_AND_VALUES, states) == [[twice], [], both, []]


def test_packing_changes_no_step(stored: Path, tmp_path: Path) -> None:
    """With the whole vocabulary as candidates nothing depends on the order of the rows."""
    everything = ["train.negatives=20000", f"data.store={stored}"]
    train(small(tmp_path / "rows", *everything))
    train(small(tmp_path / "packed", *everything, "train.max_packed_length=160"))
    losses = [[row["loss"] for row in metrics(tmp_path / name)] for name in ("rows", "packed")]
    assert losses[1] == pytest.approx(losses[0], rel=2e-2)
    ours, theirs = weights(tmp_path / "packed"), weights(tmp_path / "rows")
    assert all(torch.allclose(ours[name], theirs[name], atol=2e-2) for name in ours)


def test_a_part_of_a_store_is_chosen_by_temperature_category_and_number(stored: Path) -> None:
    target = load_target("tiny-gemma4", "float32")

    def chosen(**of: Any) -> list[str]:
        only = FilterConfig(**of)
        data = DataConfig(store=stored, validation_conversations=3, filter=only)
        training, validation = prepare_documents(target, data, 0, None)
        assert len(validation.entries) == 3, "what is held out stays the same"
        return [f"{e.id} {e.category} {e.temperature}" for e in training.entries]

    everything = chosen()
    greedy = chosen(temperatures=[0.0])
    assert greedy == [name for name in everything if name.endswith(" 0.0")]
    assert 0 < len(greedy) < len(everything)
    prose = chosen(categories=["docs", "novel"])
    assert prose == [name for name in everything if " docs " in name or " novel " in name]
    assert 0 < len(prose) < len(everything)
    few = chosen(num_conversations=4)
    assert len(few) == 4
    assert set(few) < set(everything)
    assert few == chosen(num_conversations=4)
    with pytest.raises(ValueError, match=r"0 of \d+ documents are left"):
        chosen(temperatures=[3.0])
    with pytest.raises(ValueError, match=r"0 of \d+ documents are left"):
        chosen(categories=["poem"])
    with pytest.raises(ValueError, match="asks for 400"):
        chosen(num_conversations=400)
    with pytest.raises(ValueError, match=r"chooses from data\.store"):
        DataConfig(filter=FilterConfig(num_conversations=4))


def test_held_out_documents_of_a_store_are_greedy_and_of_other_sources(stored: Path) -> None:
    target = load_target("tiny-gemma4", "float32")
    data = DataConfig(store=stored, validation_conversations=3)
    training, validation = prepare_documents(target, data, 0, None)
    assert len(validation.entries) == 3
    assert all(entry.temperature == 0 for entry in validation.entries)
    assert not {e.source for e in training.entries} & {e.source for e in validation.entries}
    everything = ActivationStore(stored).entries
    kept = [e for e in everything if e.source not in {v.source for v in validation.entries}]
    assert list(training.entries) == kept
    (document,) = validation.read([1])
    assert document.id == validation.entries[1].id


def test_a_store_without_greedy_text_is_validated_on_prompts(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A store of anybody's conversations, whose text is not the target's greedy one."""
    rows = [{"prompt": f"one {i}", "response": " two three"} for i in range(9)]
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    run_extract(small(tmp_path / "store"), str(path), "cpu")
    train(small(tmp_path / "run", f"data.store={tmp_path / 'store'}"))
    assert "acceptance_length" in metrics(tmp_path / "run")[-1]
    assert "data.prompts are answered for it" in capsys.readouterr().out


def test_text_of_another_model_is_not_walked_as_the_targets_own(
    stored: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A fine-tune has the vocabulary of its base model, and other greedy text."""
    tuned = load_target("tiny-gemma4", "float32")
    with torch.no_grad():
        tuned.layers[0].mlp.up_proj.weight[0, 0] += 1
    own = list(stream_folder(stored, load_target("tiny-gemma4", "float32")))
    assert {row.temperature for row in own} == {0.0, 1.0}
    assert {row.temperature for row in stream_folder(stored, tuned)} == {None}
    assert "which is not this tiny-gemma4" in capsys.readouterr().out


def test_a_servers_answers_at_another_revision_are_another_models(
    stored: Path, tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(stored, tmp_path / "served"))
    made = json.loads((folder / MANIFEST).read_text())
    target = load_target("tiny-gemma4", "float32")
    for revision, temperatures in ((None, {0.0, 1.0}), ("commit", {None})):
        told = made | {"fingerprint": None, "revision": revision}
        (folder / MANIFEST).write_text(json.dumps(told))
        assert {row.temperature for row in stream_folder(folder, target)} == temperatures


def test_prompts_that_are_too_long_are_told_before_any_is_answered(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Held-out ones too, which are answered last."""
    answered: list[object] = []
    monkeypatch.setattr(prepare, "regenerate", lambda *args, **kwargs: answered.append(args))
    lengths = {"data.max_prompt_tokens": 24, "data.max_new_tokens": 40, "data.max_tokens": 60}
    settings = [f"{name}={value}" for name, value in lengths.items()]
    with pytest.raises(ValueError, match=r"longer than data.max_tokens=60"):
        train(small(tmp_path / "run", *settings))
    assert not answered


def test_a_store_of_another_target_is_named(stored: Path, tmp_path: Path) -> None:
    with pytest.raises(
        ValueError, match=r"was made for tiny-gemma4 with fingerprint .*tiny-gemma3"
    ):
        train(small(tmp_path / "run", f"data.store={stored}", "target.name=tiny-gemma3"))


def test_copies_of_evaluation_prompts_are_not_answered(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    texts = [f"Question {i}: what do {i} whales and {i + 1} ships weigh?" for i in range(9)]
    for name, rows in (("train", texts), ("eval", [texts[4].upper()])):
        lines = [json.dumps({"prompt": text}) + "\n" for text in rows]
        (tmp_path / f"{name}.jsonl").write_text("".join(lines))
    config = small(
        tmp_path / "out", f"data.prompts=[{tmp_path / 'train.jsonl'}]",
        "data.num_conversations=null", f"eval.prompts={tmp_path / 'eval.jsonl'}",
    )  # fmt: skip
    run_regenerate(config, ServerConfig(), extracting=False, device="cpu")
    assert "1 exact and 0 near duplicates" in capsys.readouterr().out
    answers = [row for part in finished_parts(tmp_path / "out") for row in read_part(part)]
    assert sorted(answer.id for answer in answers) == [
        f"train-0000{i + 1}" for i in range(9) if i != 4
    ]


def test_copies_of_short_chat_prompts_are_found_behind_the_template(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    target = load_target("tiny-gemma4", "float32")
    target.tokenizer.chat_template = (
        "{{ bos_token }}{% for m in messages %}[{{ m.role }}] {{ m.content }} [end]\n{% endfor %}"
        "{% if add_generation_prompt %}[assistant] {% endif %}"
    )
    texts = ["What is love?", "What is war, and why?"]
    rows = [
        Prompt(str(i), "", "", [{"role": "user", "content": t}], False) for i, t in enumerate(texts)
    ]
    ids = [encode_prompt(row, target.tokenizer) for row in rows]
    stored = OnlineActivations(
        target,
        [answered(x, [5, 6, 7], id=str(i), category="", source="") for i, x in enumerate(ids)],
        DataConfig(teacher_top_k=4),
    )
    (tmp_path / "eval.jsonl").write_text('{"prompt": "what is LOVE"}\n')
    asked = stored_prompts(stored, target)
    kept = without_contaminated(stored, asked, target, DataConfig(), str(tmp_path / "eval.jsonl"))
    assert [entry.id for entry in kept.entries] == ["1"]
    assert "1 exact" in capsys.readouterr().out
    without_contaminated(stored, asked, target, DataConfig(), None)
    assert "not checked" in capsys.readouterr().out


@pytest.mark.parametrize("way", ["store", "conversations"])
def test_copies_of_evaluation_prompts_are_not_trained_on_from_stored_work_either(
    way: str, stored: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    target = load_target("tiny-gemma4", "float32")
    everything = ActivationStore(stored)
    tokens = everything.read([2])[0]
    copy = target.tokenizer.decode(tokens.ids[~tokens.loss_mask], skip_special_tokens=True)
    (tmp_path / "eval.jsonl").write_text(json.dumps({"prompt": copy.upper()}) + "\n")
    data = DataConfig(**{way: stored}, validation_conversations=2, teacher_top_k=16)  # type: ignore[arg-type]
    training, validation = prepare_documents(target, data, 0, str(tmp_path / "eval.jsonl"))
    ids = {entry.id for part in (training, validation) for entry in part.entries}
    assert everything.entries[2].id not in ids
    assert "exact and 0 near duplicates" in capsys.readouterr().out
    (document,) = training.read([1])
    assert document.id == training.entries[1].id


def test_texts_without_a_prompt_and_later_pieces_are_compared_too(tmp_path: Path) -> None:
    """A corpus has no prompts: its texts are compared themselves. What follows in a conversation
    whose prompt is a copy leaves with it."""
    question = "how many legs does a spider have"
    rows = [
        {"id": "corpus", "text": f"{question} and why"},
        {"id": "other", "text": "nothing of the kind"},
        {"id": "long", "prompt": question, "response": "many " * 40},
        # Not a piece: its own id has the mark of one.
        {"id": "thread@1", "prompt": question, "response": "eight"},
        {"id": "thread@2", "prompt": "name a planet of the sun", "response": "Mars"},
    ]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "eval.jsonl").write_text(json.dumps({"prompt": question}) + "\n")
    config = small(tmp_path / "store", "data.max_tokens=64")
    run_extract(config, str(tmp_path / "rows.jsonl"), "cpu")
    target = load_target("tiny-gemma4", "float32")
    store = ActivationStore(tmp_path / "store", target)
    assert sum(entry.id.startswith("long") for entry in store.entries) > 2
    asked = stored_prompts(store, target)
    kept = without_contaminated(store, asked, target, DataConfig(), str(tmp_path / "eval.jsonl"))
    assert [entry.id for entry in kept.entries] == ["other", "thread@2"]


def test_prompts_that_were_asked_many_times_are_held_out_once_each(tmp_path: Path) -> None:
    rows = [{"id": f"p{n}", "prompt": f"{n} " * 3} for n in range(12)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    many = [f"data.prompts={tmp_path / 'rows.jsonl'}", "data.num_conversations=96"]
    config = small(tmp_path / "store", *many, "data.max_new_tokens=4")
    run_regenerate(config, ServerConfig(), extracting=True, device="cpu")
    target = load_target("tiny-gemma4", "float32")
    for count in (3, 5, 7):
        of_store = [f"data.store={tmp_path / 'store'}", f"data.validation_conversations={count}"]
        data = small(tmp_path / "run", *of_store).data
        training, validation = prepare_documents(target, data, 0, None)
        held_out = [entry.source for entry in validation.entries]
        assert len(set(held_out)) == len(held_out) == count
        assert not set(held_out) & {entry.source for entry in training.entries}


def test_whole_conversations_of_any_source_are_extracted_with_their_masks(tmp_path: Path) -> None:
    rows = [
        {"prompt": "one two", "response": " three", "id": "a"},
        {"text": "a whole document", "id": "b"},
    ]
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    run_extract(small(tmp_path / "store"), str(path), "cpu")
    store = ActivationStore(tmp_path / "store")
    tokenizer = load_target("tiny-gemma4").tokenizer
    texts = {}
    assert {entry.temperature for entry in store.entries} == {None}
    for document in store.read([0, 1]):
        texts[document.id] = tokenizer.decode(document.ids[document.loss_mask])
    assert texts["a"] == " three<eos>"
    assert texts["b"] == "a whole document"


def test_a_server_hands_out_no_activations(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"leave out server\.url, or .*to `headstart extract`"):
        run_regenerate(small(tmp_path), ServerConfig(url="http://127.0.0.1:1"), True, "cpu")


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["data.store=a", "data.conversations=b"], "name data.conversations or data.store"),
        (["data.online=true", "data.store=a"], "data.online stores nothing"),
        (["data.online=true", "data.storage=int8"], "data.online stores nothing"),
        (["data.prompts=[{path: a, weight: 1}, b]"], "give every source a weight, or none"),
    ],
)
def test_settings_that_cannot_go_together_are_refused(
    overrides: list[str], message: str, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=message):
        small(tmp_path, *overrides)

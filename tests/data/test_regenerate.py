"""Regeneration in process: what the target says, batched, resumed, and recorded on the way."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import torch
from transformers import (
    DynamicCache,
    Gemma4Config,
    Gemma4ForConditionalGeneration,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)
from transformers.cache_utils import DynamicSlidingWindowLayer
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from headstart.configs.schema import DataConfig, TargetConfig
from headstart.data import regenerate as module
from headstart.data.conversations import (
    Conversation,
    finished_parts,
    part_path,
    read_part,
)
from headstart.data.extraction import Recorder, extract
from headstart.data.prepare import deal_sampling
from headstart.data.prompts import Prompt
from headstart.data.regenerate import (
    BLOCK,
    Job,
    SamplingMixture,
    _inverse_cdf,
    answer,
    make_jobs,
    regenerate,
)
from headstart.data.store import ActivationStore
from headstart.heads.loading import (
    byte_tokenizer,
    gemma4_text_config,
    load_target_tokens,
    random_model,
)
from headstart.heads.target import Inputs, Target
from headstart.heads.tokens import Sampling
from tests.helpers.models import FAMILIES, VISION, make_target
from tests.helpers.prompts import conversations, jobs, prompts
from tests.helpers.runs import interrupt_second_call

pytestmark = pytest.mark.contract

GREEDY = Sampling(0.0)
CONFIG = DataConfig(max_new_tokens=12, generation_batch_size=3, teacher_top_k=5)


def written(folder: Path) -> list[Conversation]:
    return [c for part in finished_parts(folder) for c in read_part(part)]


@pytest.fixture(params=[1, 5, None], ids=lambda n: f"{n or 'all'} at once")
def prefill_block(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tokens of each prompt that run at once."""
    if request.param is not None:
        monkeypatch.setattr(module, "prefill_block", lambda ids: request.param)


def test_a_greedy_response_is_what_the_target_says_one_token_at_a_time(
    tiny: Target, tmp_path: Path
) -> None:
    regenerate(tiny, jobs(tiny, [0.0] * 5, CONFIG), CONFIG, 0, tmp_path, extract=False)
    for conversation in written(tmp_path):
        ((start, _),) = conversation.spans
        ids = conversation.ids[:start]
        for token in conversation.ids[start:]:
            hidden = tiny.activations(torch.tensor([ids])).hidden[:, -1]
            assert token == int(tiny.logits(hidden).argmax())
            ids.append(token)


@pytest.mark.usefixtures("prefill_block")
def test_answers_are_those_of_generate(target: Target) -> None:
    """Of texts of several lengths, some beyond the sliding window and some that end early."""
    asked = jobs(target, [0.0] * 5, CONFIG)
    free = answer(target, asked, 24, 0, None)
    target.eos_ids[:] = sorted({*target.eos_ids, free[0][7], free[3][2]})
    found = answer(target, asked, 24, 0, None)
    assert len({len(ids) for ids in found}) > 1
    for job, ids in zip(asked, found, strict=True):
        alone = target.model.generate(
            torch.tensor([job.prompt_ids]), max_new_tokens=24, eos_token_id=target.eos_ids
        )
        assert ids == alone[0, len(job.prompt_ids) :].tolist()


@pytest.mark.parametrize("extract", [False, True])
def test_an_interrupted_generation_ends_as_an_uninterrupted_one(
    extract: bool, tiny: Target, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = jobs(tiny, [0.0, 1.0] * 4, CONFIG)
    regenerate(tiny, asked, CONFIG, 3, tmp_path / "whole", extract)
    calls = interrupt_second_call(monkeypatch, module, "answer")
    with pytest.raises(KeyboardInterrupt):
        regenerate(tiny, asked, CONFIG, 3, tmp_path / "cut", extract)
    with pytest.raises(ValueError, match="is unfinished: 2 of 3 parts are missing"):
        finished_parts(tmp_path / "cut")
    regenerate(tiny, asked, CONFIG, 3, tmp_path / "cut", extract)
    assert written(tmp_path / "cut") == written(tmp_path / "whole")
    assert len(calls) == 4, "the first batch was kept, the second and third were made anew"
    regenerate(tiny, asked, CONFIG, 3, tmp_path / "cut", extract)
    assert len(calls) == 4, "a finished folder is reused whole"
    if extract:
        names = sorted(path.name for path in (tmp_path / "whole").glob("*.safetensors"))
        for name in names:
            ours, theirs = (tmp_path / side / name for side in ("cut", "whole"))
            assert ours.read_bytes() == theirs.read_bytes()


def test_recording_changes_no_conversation(tiny: Target, tmp_path: Path) -> None:
    asked = jobs(tiny, [0.0, 1.0] * 4, CONFIG)
    for recording in (False, True):
        regenerate(tiny, asked, CONFIG, 3, tmp_path / str(recording), recording)
    assert written(tmp_path / "True") == written(tmp_path / "False")


@pytest.mark.parametrize("new_tokens", [3, 24])
def test_a_recorder_keeps_all_rows_of_two_layers_and_windows_of_the_others(
    new_tokens: int, target: Target
) -> None:
    """Texts and all that is recorded are to the bit those of a target that is not recorded, whose
    sliding layers see their window; and those of a cache that keeps all rows of all layers: to the
    bit as long as none has left a window, then to the rounding of sums over masked rows."""
    asked = jobs(target, [0.0, 1.0] * 2, CONFIG)
    window, layers = target.config.sliding_window, target.source_layers
    if new_tokens == 3:
        asked = [replace(job, prompt_ids=job.prompt_ids[: window - 3]) for job in asked]
    ours, windows, whole = (Recorder(target, 4, 64) for _ in range(3))
    windows.cache, whole.cache = DynamicCache(config=target.config), DynamicCache()
    texts = [answer(target, asked, new_tokens, 0, one) for one in (ours, windows, whole, None)]
    assert texts[0] == texts[1] == texts[2] == texts[3]
    for mine, its in zip(ours.hidden, windows.hidden, strict=True):
        assert torch.equal(mine, its)
    kept, full = layers["sliding_attention"], layers["full_attention"]
    assert (whole.cache.layers[kept].keys.shape[2] > 3 * window) == (new_tokens == 24)
    most = 0.0 if new_tokens == 3 else 1e-4
    keeps_all: Any = ours.cache.layers[kept]
    recorded = (*keeps_all.rows(), *_pair(ours.cache.layers[full]), torch.cat(ours.hidden, dim=1))
    all_rows = (*_pair(whole.cache.layers[kept]), *_pair(whole.cache.layers[full]))
    for one, other in zip(recorded, (*all_rows, torch.cat(whole.hidden, dim=1)), strict=True):
        torch.testing.assert_close(one, other, rtol=most, atol=most)
    sliding = [one for one in ours.cache.layers if isinstance(one, DynamicSlidingWindowLayer)]
    assert max(one.keys.shape[2] for one in sliding) < window


def _pair(layer: Any) -> tuple[torch.Tensor, torch.Tensor]:
    return layer.keys, layer.values


@pytest.mark.parametrize("kept", [slice(1, None), slice(-1, None), slice(0, -1)], ids=str)
def test_a_target_that_leaves_rows_of_the_prompt_out_is_not_recorded(
    kept: slice, target: Target, tmp_path: Path
) -> None:
    """As transformers >= 5.23 does in layers that share keys, where only the last logits are asked
    for: the text stays right, and what a head is trained on would be wrong without a word."""

    def cut(module: Any, args: Any) -> Any:
        states = args[0]
        return states[:, kept] if states.shape[1] > 1 else states

    asked = jobs(target, [0.0, 1.0], CONFIG)
    target.final_norm.register_forward_pre_hook(cut)
    with pytest.raises(RuntimeError, match=r"are of \d+ rows where it was given \d+ tokens"):
        regenerate(target, asked, CONFIG, 3, tmp_path, extract=True)
    assert not list(tmp_path.glob("*.safetensors")), "nothing of it is kept"
    with pytest.raises(RuntimeError, match=r"rows where it was given 6 tokens"):
        target.activations(torch.tensor([[2, 70, 71, 72, 73, 74]]))


@pytest.mark.parametrize("change", ["seed", "max_new_tokens", "prompts", "extract", "target"])
def test_a_folder_of_other_settings_is_not_gone_on_with(
    change: str, tiny: Target, tmp_path: Path
) -> None:
    heats, config, target = [0.0] * 3, CONFIG, tiny
    regenerate(tiny, jobs(tiny, heats, CONFIG), CONFIG, 0, tmp_path, extract=False)
    if change == "max_new_tokens":
        config = CONFIG.model_copy(update={"max_new_tokens": 13})
    if change == "prompts":
        heats = [0.0, 0.0, 1.0]
    if change == "target":
        target = make_target("gemma3")
    seed, extract = int(change == "seed"), change == "extract"
    before = sorted(path.name for path in tmp_path.iterdir())
    with pytest.raises(
        ValueError, match=r"made with \w+=.*, now .*: give it back, or name another"
    ):
        regenerate(target, jobs(target, heats, config), config, seed, tmp_path, extract)
    assert sorted(path.name for path in tmp_path.iterdir()) == before


def test_a_part_says_what_was_asked_and_how_it_was_answered(tiny: Target, tmp_path: Path) -> None:
    regenerate(tiny, jobs(tiny, [0.0, 0.7, 1.0], CONFIG), CONFIG, 0, tmp_path, extract=False)
    rows = pq.read_table(part_path(tmp_path, 0)).to_pylist()
    assert [row["temperature"] for row in rows] == [1.0, 0.7, 0.0], "longest prompt first"
    for row in rows:
        assert row["prompt"] == tiny.tokenizer.decode(row["prompt_ids"])
        assert row["response"] == tiny.tokenizer.decode(
            row["response_ids"], skip_special_tokens=True
        )
        stopped = row["response_ids"][-1] in tiny.eos_ids
        assert row["finish_reason"] == ("stop" if stopped else "length")
        assert stopped or len(row["response_ids"]) == 12
        assert row["target"] == "gemma4-kv-sharing"
    conversations = written(tmp_path)
    tokens = sum(len(row["prompt_ids"]) + len(row["response_ids"]) for row in rows)
    assert sum(len(c.ids) for c in conversations) == tokens


def test_a_damaged_part_is_named_with_its_cure(tiny: Target, tmp_path: Path) -> None:
    asked = jobs(tiny, [0.0] * 6, CONFIG)
    regenerate(tiny, asked, CONFIG, 0, tmp_path, extract=False)
    expected = written(tmp_path)
    path = part_path(tmp_path, 1)
    whole = path.read_bytes()
    for content in (whole[:100], whole[: len(whole) // 2], b"", b"no parquet"):
        path.write_bytes(content)
        with pytest.raises(ValueError, match=r"part-00001.*delete it, then run the command"):
            written(tmp_path)
    path.unlink()
    regenerate(tiny, asked, CONFIG, 0, tmp_path, extract=False)
    assert written(tmp_path) == expected


def test_one_flipped_bit_of_a_part_changes_no_conversation_unseen(
    tiny: Target, tmp_path: Path
) -> None:
    """Most are found; a few fall on bytes that hold nothing."""
    regenerate(tiny, jobs(tiny, [0.0] * 3, CONFIG), CONFIG, 0, tmp_path, extract=False)
    (expected,), path = [written(tmp_path)], part_path(tmp_path, 0)
    whole, found = path.read_bytes(), 0
    places = range(0, len(whole), 11)
    for at in places:
        path.write_bytes(whole[:at] + bytes([whole[at] ^ 16]) + whole[at + 1 :])
        try:
            assert read_part(path) == expected
        except ValueError as error:
            assert "part-00000.parquet is cut short or damaged" in str(error)  # noqa: PT017
            found += 1
    assert found > 0.5 * len(places)


def test_a_shard_or_part_that_was_deleted_is_made_anew(tiny: Target, tmp_path: Path) -> None:
    asked = jobs(tiny, [0.0, 1.0] * 3, CONFIG)
    regenerate(tiny, asked, CONFIG, 0, tmp_path, extract=True)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    for name in ("shard-00001.safetensors", "part-00000.parquet", "index.json"):
        (tmp_path / name).unlink()
        regenerate(tiny, asked, CONFIG, 0, tmp_path, extract=True)
        assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_a_store_is_not_overwritten_with_conversations_nor_the_reverse(
    tiny: Target, tmp_path: Path
) -> None:
    rows = conversations(3)
    extract(tiny, rows, 60, CONFIG, tmp_path / "store")
    before = sorted(path.read_bytes() for path in (tmp_path / "store").iterdir())
    asked = jobs(tiny, [0.0] * 3, CONFIG)
    with pytest.raises(ValueError, match="holds an activation store: name another folder"):
        regenerate(tiny, asked, CONFIG, 0, tmp_path / "store", extract=True)
    assert sorted(path.read_bytes() for path in (tmp_path / "store").iterdir()) == before
    regenerate(tiny, asked, CONFIG, 0, tmp_path / "text", extract=True)
    with pytest.raises(ValueError, match="holds conversations: name another folder"):
        extract(tiny, rows, 60, CONFIG, tmp_path / "text")


def test_recorded_activations_are_never_longer_than_stored_ones_may_be(
    tiny: Target, tmp_path: Path
) -> None:
    short = CONFIG.model_copy(update={"max_tokens": 20})
    with pytest.raises(ValueError, match=r"longer than data.max_tokens=20: raise it"):
        regenerate(tiny, jobs(tiny, [0.0] * 4, short), short, 0, tmp_path, extract=True)


def test_prompts_that_are_cut_short_are_counted(
    tiny: Target, capsys: pytest.CaptureFixture[str]
) -> None:
    short = CONFIG.model_copy(update={"max_prompt_tokens": 10})
    made = jobs(tiny, [0.0] * 4, short)
    assert max(len(job.prompt_ids) for job in made) == 10
    assert "1 of 4 prompts are longer than data.max_prompt_tokens=10" in capsys.readouterr().out


def test_a_prompt_that_is_asked_twice_has_two_ids(tiny: Target) -> None:
    twice = [prompts(2)[0], prompts(2)[1], prompts(2)[0]]
    made = make_jobs(twice, [GREEDY, GREEDY, Sampling(0.7)], tiny, CONFIG)
    assert sorted(job.id for job in made) == ["p0", "p0#2", "p1"]


def test_prompts_that_the_template_refuses_are_counted(
    tiny: Target, capsys: pytest.CaptureFixture[str]
) -> None:
    tiny.tokenizer.chat_template = (
        "{% for m in messages %}{% if m.role == 'system' %}"
        "{{ raise_exception('System role not supported') }}{% endif %}"
        "{{ m.role }}: {{ m.content }}\n{% endfor %}"
    )
    good = [Prompt(f"p{i}", "c", "s", [{"role": "user", "content": "a"}], False) for i in range(9)]
    bad = Prompt("odd", "c", "s", [{"role": "system", "content": "a"}, *good[0].messages], False)
    lenient = CONFIG.model_copy(update={"max_bad_rows": 0.1})
    assert len(make_jobs([*good, bad], [GREEDY] * 10, tiny, lenient)) == 9
    assert "1 of 10 rows cannot be used" in capsys.readouterr().err
    with pytest.raises(
        ValueError, match=r"System role not supported, first odd.*data.max_bad_rows"
    ):
        make_jobs([*good, bad], [GREEDY] * 10, tiny, CONFIG)


def test_what_a_server_needs_is_known_without_weights() -> None:
    tokens = load_target_tokens(TargetConfig(name="tiny-gemma4"))
    target = make_target("gemma4-kv-sharing")
    assert tokens.tokenizer_hash == target.tokenizer_hash
    assert tokens.eos_ids == target.eos_ids
    assert tokens.fingerprint is None


@pytest.mark.usefixtures("prefill_block")
@pytest.mark.parametrize("family", FAMILIES)
def test_what_is_recorded_while_generating_is_what_a_clean_forward_gives(
    family: str, tmp_path: Path
) -> None:
    """Mixed prompt lengths (left padding), texts beyond the sliding window, early ends."""
    target = make_target(family)
    config = CONFIG.model_copy(update={"max_new_tokens": 14})
    heats = [0.0, 1.0, 0.0, 1.0, 1.0]
    inputs = Inputs(layers=(0, 2))
    regenerate(target, jobs(target, heats, config), config, 0, tmp_path, True, inputs=inputs)
    store = ActivationStore(tmp_path, target, inputs)
    assert len(store) == 5
    for entry, document in zip(store.entries, store.read(range(5)), strict=True):
        seen = target.activations(document.ids[None], layers=inputs.layers)
        last = len(document.ids) - 1  # the target never ran on the last token
        close: dict[str, Any] = {"atol": 1e-4, "rtol": 1e-4}
        torch.testing.assert_close(document.hidden[:last], seen.hidden[0, :last], **close)
        for i, outputs in seen.layers.items():
            stored = document.activations[f"layer.{i}"].rows()
            torch.testing.assert_close(stored[:last], outputs[0, :last], **close)
        assert document.layer_types == ["full_attention", "sliding_attention"]
        for layer_type, (keys, values) in document.shared_kv.items():
            wanted = [kv[0, :, :last].transpose(0, 1) for kv in seen.shared_kv[layer_type]]
            torch.testing.assert_close(keys[:last], wanted[0], **close)
            torch.testing.assert_close(values[:last], wanted[1], **close)
        taught = document.loss_mask.nonzero()[:, 0] - 1
        assert len(taught) == entry.trained
        best = target.logits(seen.hidden[0]).log_softmax(-1).topk(5)
        torch.testing.assert_close(document.teacher_logprobs[taught], best.values[taught], **close)
        assert torch.equal(document.teacher_ids[taught].long(), best.indices[taught])
        mass = best.values[taught].exp().sum(-1).mean()
        assert entry.top_k_mass == pytest.approx(float(mass), abs=1e-4)


@pytest.mark.parametrize(
    "sampling",
    [Sampling(0.7), Sampling(1.0, top_k=5), Sampling(1.3, top_p=0.8), Sampling(0.9, 6, 0.9)],
)
def test_the_mixture_draws_from_the_distribution_of_each_row(sampling: Sampling) -> None:
    """Chi-square over 20,000 draws of 8 tokens, below its 99.9% quantile for 7 degrees (24.3)."""
    torch.manual_seed(0)
    logits = torch.randn(8)
    draws = 20_000
    ways = [GREEDY] + [sampling] * draws
    mixture = SamplingMixture(ways, seed=1, steps=1, device=torch.device("cpu"))
    chosen = mixture(logits.repeat(draws + 1, 1), 0)
    assert int(chosen[0]) == int(logits.argmax())
    warpers = [TemperatureLogitsWarper(sampling.temperature)]
    warpers += [TopKLogitsWarper(sampling.top_k)] if sampling.top_k else []
    warpers += [TopPLogitsWarper(sampling.top_p)]
    warped = logits[None]
    for warper in warpers:  # those of `generate`, in its order
        warped = warper(torch.zeros(1, 1, dtype=torch.long), warped)
    expected = warped[0].softmax(-1) * draws
    observed = torch.bincount(chosen[1:], minlength=8)
    assert not observed[expected == 0].any()
    kept = expected > 0
    assert float(((observed - expected)[kept] ** 2 / expected[kept]).sum()) < 24.3


def test_the_place_among_many_weights_is_that_of_one_running_sum() -> None:
    """Over several blocks and a broken last one, tokens without weight, and both ends."""
    torch.manual_seed(0)
    p = torch.rand(300, 3 * BLOCK + 7) ** 6 * (torch.rand(300, 3 * BLOCK + 7) > 0.5)
    p[0, BLOCK:] = 0  # what rounding leads past lands on the last token with weight
    uniform = torch.rand(300, 1)
    uniform[:3] = torch.tensor([[1 - 2**-24], [0.0], [1 - 2**-24]])
    exact = p.double().cumsum(-1)
    wanted = torch.searchsorted(exact, uniform * exact[:, -1:], right=True)
    assert torch.equal(_inverse_cdf(p, uniform), wanted)


def test_a_target_has_sampling_settings_of_its_own(tiny: Target) -> None:
    assert tiny.own_sampling == Sampling(1.0)
    tiny.generation.update(temperature=0.9, top_k=64, top_p=0.95)
    config = CONFIG.model_copy(update={"temperatures": [0.0, "model"]})
    own = Sampling(0.9, 64, 0.95)
    a, b, c = prompts(3)
    assert deal_sampling(config, tiny, [a, b, c]) == [GREEDY, own, GREEDY]
    # A prompt that is answered again is answered in the next way, wherever it comes.
    assert deal_sampling(config, tiny, [a, b, b, a]) == [GREEDY, own, GREEDY, own]


def test_nothing_of_ours_stays_in_a_target_whose_generation_fails(
    tiny: Target, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*args: Any, **kwargs: Any) -> None:
        raise RuntimeError("out of memory")

    failing = tiny.model.get_decoder()
    monkeypatch.setattr(failing, "forward", fail)
    with pytest.raises(RuntimeError, match="out of memory"):
        regenerate(tiny, jobs(tiny, [0.0], CONFIG), CONFIG, 0, tmp_path, extract=True)
    assert not [m for m in tiny.model.modules() if "forward" in m.__dict__ and m is not failing]
    assert ALL_ATTENTION_FUNCTIONS["sdpa"] is sdpa_attention_forward
    assert not tiny.model.get_output_embeddings()._forward_pre_hooks
    assert json.loads((tmp_path / "conversations.json").read_text())["parts"] == 1


def test_a_target_of_images_answers_as_generate_does_where_it_writes_their_tokens() -> None:
    """Its forward puts the embedding of padding in the place of such tokens; so does extraction."""
    model = random_model(
        lambda: Gemma4ForConditionalGeneration(
            Gemma4Config(text_config=gemma4_text_config().to_dict(), image_token_id=77, **VISION)
        )
    )
    target = Target(model, byte_tokenizer(), "with images")
    target.eos_ids.clear()
    prompt = [5, 6, 77, 8, 9, 10, 11]
    asked = [Job("0", Prompt("0", "", "", [], raw=True), prompt, Sampling(0.0))]
    ids = torch.tensor([prompt])
    generated = model.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=12, do_sample=False,
        eos_token_id=None, pad_token_id=0,
    )  # fmt: skip
    assert answer(target, asked, 12, 0, None) == generated[:, len(prompt) :].tolist()

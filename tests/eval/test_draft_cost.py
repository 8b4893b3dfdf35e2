"""What is measured is what the stock decoder runs, and the figures follow from the times."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import GenerationConfig

from headstart.cli.main import main
from headstart.configs.schema import EvalConfig, HeadConfig
from headstart.eval.draft_cost import (
    MAX_DRAFT_TOKENS,
    WARM_UP,
    DecodeState,
    cost_ratios,
    dense_lm_head,
    longest_draft,
    measure,
    prepare,
    run_draft_benchmark,
)
from headstart.heads.drafting import Drafter
from headstart.heads.loading import load_target
from headstart.heads.pairing import build_assistant
from headstart.heads.target import Target
from tests.helpers.heads import noisy_head, ordered_head
from tests.helpers.models import make_target
from tests.helpers.stock import K, prefill, stock_drafts

pytestmark = pytest.mark.usefixtures("quick")

CONTEXTS = (5, 20)  # within the sliding window of 8 and beyond it


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Two turns, and one thread: on a busy machine two wait for one another at each tiny matrix."""
    monkeypatch.setattr("headstart.eval.draft_cost.TURNS", 2)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@torch.inference_mode()
@pytest.mark.parametrize("context", CONTEXTS)
def test_the_drafts_measured_are_those_of_the_stock_generator(target: Target, context: int) -> None:
    state = prepare(target, context)
    assistant = noisy_head(target).assistant
    outputs = prefill(target, state.ids[:, :context])
    outputs.past_key_values.crop(0)
    verified = target.model(
        input_ids=state.ids[:, context : context + 1],
        past_key_values=outputs.past_key_values,
        output_hidden_states=True,
        return_shared_kv_states=True,
    )
    ids = state.ids[:, : context + 2]
    wanted, _ = stock_drafts(target, assistant, ids, verified, is_prefill=False)
    assert state.draft(assistant, K).tolist() == [wanted.tolist()]
    drafter = Drafter(assistant, target.model.get_input_embeddings())
    if context < CONTEXTS[1]:  # beyond the window the stock generator shows one row less
        assert state.draft_exact(drafter, state.begin(drafter), K) == wanted.tolist()


@torch.inference_mode()
@pytest.mark.parametrize("context", CONTEXTS)
def test_steps_and_verifications_start_from_the_same_context_each_time(
    target: Target, context: int
) -> None:
    """They give the tokens of one clean forward, in any order, since the cache is put back."""
    state = prepare(target, context)
    clean = target.model(input_ids=state.ids).logits.argmax(dim=-1)
    for k in (0, 8, 1, 3, 0, 2):
        found = state.verify(k) if k else state.step()
        assert torch.equal(found, clean[:, context : context + k + 1])
        state.restore()
        assert state.cache.get_seq_length() == context


@torch.inference_mode()
def test_an_ordered_draft_over_all_clusters_is_the_dense_draft(tiny: Target) -> None:
    state = prepare(tiny, 12)
    drafts = {}
    for top_k in (20, 1):
        assistant = ordered_head(tiny.config, top_k)
        drafts[top_k] = state.draft(assistant, 6)
        with dense_lm_head(assistant):
            drafts[0] = state.draft(assistant, 6)
        assert assistant.config.use_ordered_embeddings
    assert torch.equal(drafts[20], drafts[0])
    assert not torch.equal(drafts[1], drafts[0])


def test_every_side_takes_each_turn_once(tiny: Target, monkeypatch: pytest.MonkeyPatch) -> None:
    assistant = ordered_head(tiny.config)
    calls: list[object] = []

    def note(name: str) -> None:
        real: Any = getattr(DecodeState, name)

        def noted(state: DecodeState, *args: Any) -> Any:
            drafter = args[0] if name == "draft_exact" else assistant
            ordered = name.startswith("draft") and is_ordered(drafter)
            calls.append((name, args[-1] if args else None, ordered))
            return real(state, *args)

        monkeypatch.setattr(DecodeState, name, noted)

    def is_ordered(drafter: Any) -> bool:
        if isinstance(drafter, Drafter):
            return drafter.embedder is not None
        return bool(drafter.config.use_ordered_embeddings)

    for name in ("step", "verify", "draft", "draft_exact"):
        note(name)
    seconds = measure(prepare(tiny, 6), assistant)
    variants = 1 + MAX_DRAFT_TOKENS + 4
    assert len(calls) == (WARM_UP + 2) * variants
    turns = [calls[i : i + variants] for i in range(0, len(calls), variants)]
    assert all(len(turn) == variants for turn in turns)
    assert all(len(set(turn)) == variants for turn in turns)
    assert turns[1] == turns[0][::-1]
    assert len(seconds["verification"]) == MAX_DRAFT_TOKENS


@pytest.mark.usefixtures("other_forms")
def test_all_that_is_measured_runs_on_the_same_kernels(
    tiny: Target, monkeypatch: pytest.MonkeyPatch
) -> None:
    assistant = ordered_head(tiny.config)
    seen: dict[str, bool] = {}
    fused = [
        module
        for model in (tiny.model, assistant)
        for module in model.modules()
        if type(module) is torch.nn.Linear or type(module).__name__.endswith("RMSNorm")
    ]

    def note(name: str) -> None:
        real = getattr(DecodeState, name)

        def noted(state: DecodeState, *args: Any) -> Any:
            seen[name] = all("forward" in module.__dict__ for module in fused)
            return real(state, *args)

        monkeypatch.setattr(DecodeState, name, noted)

    names = ("step", "verify", "draft", "draft_exact")
    for name in names:
        note(name)
    measure(prepare(tiny, 6), assistant, turns=1)
    assert seen == dict.fromkeys(names, True)
    assert not any("forward" in module.__dict__ for module in fused)


def test_a_round_breaks_even_where_its_drafts_and_its_verification_do() -> None:
    seconds = {
        "target_step": 2.0,
        "verification": [2.2, 2.5, 3.0],
        "draft_step_dense": 0.5,
        "draft_step_ordered": 0.2,
        "draft_step_exact_dense": 0.4,
        "draft_step_exact_ordered": 0.1,
    }
    ratios = cost_ratios(seconds)
    assert ratios["c_dense"] == 0.25
    assert ratios["c_ordered"] == 0.1
    assert ratios["ordered_over_dense"] == pytest.approx(0.4)
    assert ratios["v"] == [1.1, 1.25, 1.5]
    assert ratios["break_even_dense"] == pytest.approx([1.35, 1.75, 2.25])
    assert ratios["break_even_ordered"] == pytest.approx([1.2, 1.45, 1.8])
    assert ratios["exact_ordered_over_exact_dense"] == pytest.approx(0.25)
    assert ratios["break_even_exact_ordered"] == pytest.approx([1.15, 1.35, 1.65])
    del seconds["draft_step_ordered"], seconds["draft_step_exact_ordered"]
    assert cost_ratios(seconds).keys() == {
        "c_dense", "c_exact_dense", "v", "break_even_dense", "break_even_exact_dense"
    }  # fmt: skip


def test_a_head_without_ordered_embeddings_is_measured_dense(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    target = make_target("gemma3")
    assistant = build_assistant(target, HeadConfig()).eval()
    content = run_draft_benchmark(target, assistant, "head", 4, tmp_path / "a" / "b.json")
    assert json.loads((tmp_path / "a" / "b.json").read_text()) == content
    kinds = {"draft_step_dense", "draft_step_exact_dense"}
    assert content["seconds"].keys() == {"target_step", "verification"} | kinds
    assert content["repeats"] == 2
    assert "draft step, ordered" not in capsys.readouterr().out


def test_bench_draft_prints_and_writes_its_ratios(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    target = load_target("tiny-gemma4", "float32")
    assistant = ordered_head(target.config)
    assistant.generation_config = GenerationConfig(num_assistant_tokens=3)
    assistant.save_pretrained(tmp_path / "head")
    argv = ["bench", "draft", str(tmp_path / "head"), "target.dtype=float32"]
    argv += ["bench.context=12", "--json", str(tmp_path / "draft.json")]
    assert main([*argv, "target.name=tiny-gemma4"]) == 0
    content = json.loads((tmp_path / "draft.json").read_text())
    assert content["benchmark"] == "draft"
    named = {"target": "tiny-gemma4", "dtype": "float32", "context": 12}
    assert named.items() <= content["environment"].items()
    ratios = content["ratios"]
    assert ratios == cost_ratios(content["seconds"])
    assert {"c_dense", "c_ordered", "ordered_over_dense", "v"} < ratios.keys()
    assert len(ratios["v"]) == len(ratios["break_even_ordered"]) == MAX_DRAFT_TOKENS
    printed = capsys.readouterr().out
    assert f"c = {ratios['c_ordered']:.3f}" in printed
    assert f"{ratios['break_even_dense'][7]:.2f}" in printed

    (tmp_path / "empty").mkdir()
    assert main(["bench", "draft", str(tmp_path / "empty"), "target.name=tiny-gemma4"]) == 1
    assert "no draft head at" in capsys.readouterr().err


def test_a_head_of_another_target_is_refused() -> None:
    target = make_target("gemma4")
    assistant = build_assistant(target, HeadConfig())
    assistant.config.backbone_hidden_size = 64
    with pytest.raises(ValueError, match="backbone_hidden_size is 64"):
        run_draft_benchmark(target, assistant, "head", 4, None)


def test_costs_are_measured_as_far_as_a_decoder_drafts() -> None:
    kept = EvalConfig(num_assistant_tokens=[2, 4], decoders=["transformers", "exact", "lookup"])
    assert longest_draft(kept) == 4
    assert longest_draft(kept.model_copy(update={"decoders": ["exact", "cost"]})) == 8
    assert longest_draft(kept.model_copy(update={"num_assistant_tokens": []})) == 8
    assert longest_draft(kept.model_copy(update={"num_assistant_tokens": [12]})) == 8

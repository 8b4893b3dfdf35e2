"""Decoding with the stock `generate`, on tiny targets and a head that accepts sometimes."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel
from transformers.generation.candidate_generator import (
    SinglePositionMultiTokenCandidateGenerator,
)

from headstart.configs.schema import DataConfig, Decoder, EvalConfig
from headstart.data.conversations import answered
from headstart.data.extraction import OnlineActivations
from headstart.data.prompts import load_prompts
from headstart.data.templates import encode_prompt
from headstart.eval.decoding import Decoded, greedy
from headstart.eval.report import run_evaluation
from headstart.eval.simulate import simulate_acceptance
from headstart.eval.verdict import ends_in_loop, verdict
from headstart.heads.targets import Target
from headstart.heads.unroll import DraftHead
from headstart.train.ordering import with_clusters
from tests.conftest import make_target
from tests.heads.test_ordered import order_by_target
from tests.overfit import greedy_document, overfit

FAMILIES = ["gemma3", "gemma4-kv-sharing", "gemma4-multimodal", "gemma4-unified"]


def half_trained_head(target: Target) -> PreTrainedModel:
    """A head that is accepted now and then on the text that it was trained on."""
    return overfit(target, greedy_document(target)[1], steps=25, rounds=3).eval().assistant


@pytest.mark.parametrize("family", FAMILIES)
def test_assisted_greedy_text_equals_plain_greedy_text_in_float32(family: str) -> None:
    target = make_target(family)
    assistant = half_trained_head(target)
    accepted = 0
    for ids in [greedy_document(target)[0], *([5 + i] * (4 + 9 * i) for i in range(3))]:
        plain = greedy(target, ids, 40)
        assisted = greedy(target, ids, 40, assistant, 3)
        assert assisted.tokens == plain.tokens
        assert len(plain.forwards) == len(plain.tokens)
        accepted += sum(assisted.counts(len(ids), 3).accepted)
    assert accepted > 0, "a head that is never accepted makes this test empty"


def test_accepted_drafts_are_those_that_transformers_reports(
    tiny: Target, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The counts come from target forwards; transformers tells its generator the same."""
    told: list[int] = []

    def note(self: Any, input_ids: Any, scores: Any, num_matches: int) -> None:
        told.append(int(num_matches))

    monkeypatch.setattr(
        SinglePositionMultiTokenCandidateGenerator, "update_candidate_strategy", note
    )
    assistant, accepted = half_trained_head(tiny), 0
    for ids in [greedy_document(tiny)[0], [5, 6, 7], [100] * 12]:
        told.clear()
        decoded = greedy(tiny, ids, 30, assistant, 3)
        counts = decoded.counts(len(ids), 3)
        assert sum(counts.accepted) == sum(told[1:])  # the first call is the prefill's
        assert counts.rounds == len(told) - 1 == len(decoded.forwards) - 1
        accepted += sum(counts.accepted)
    assert accepted > 0, "a head that is never accepted makes this test empty"


@pytest.mark.parametrize("top_k", [None, 1, 20])
@torch.no_grad()
def test_simulated_acceptance_is_that_of_a_decoder_that_recomputes_everything(
    tiny: Target, top_k: int | None
) -> None:
    """Walked rounds on stored activations against a plain loop: no cache, clean KV, own drafts.
    With clusters the loop drafts through transformers' own masked embedder."""
    rounds = 3
    with torch.enable_grad():
        assistant = half_trained_head(tiny)
    head = DraftHead(assistant)
    if top_k:
        head = DraftHead(with_clusters(assistant, 20, top_k))
        order_by_target(head.assistant, tiny, tiny.table)
    prompt, document = greedy_document(tiny)
    text = document.ids.tolist()
    conversation = answered(prompt, text[len(prompt) :], id="c", category="c", source="c")
    seen_text = OnlineActivations(tiny, [conversation], DataConfig(teacher_top_k=16))
    simulated = simulate_acceptance(head, tiny, seen_text, rounds, [0])

    accepted, walked, length = [0] * rounds, 0, len(prompt) + 1  # one token from the prefill
    while length < len(text):
        ids = torch.tensor([text[:length]])
        seen = tiny.activations(ids[:, :-1])
        row = torch.tensor([[length - 2]])
        fed, drafts = ids[:, -1:], []
        for _ in range(rounds):
            said = head(seen.hidden[:, -1:], tiny.embed(fed)[:, None], row, seen.shared_kv)
            logits = said[-1] @ tiny.table.T
            if (embedder := head.assistant.masked_embedding) is not None:
                logits = embedder(said[-1], tiny.table)
            drafts.append(int(logits[0, 0].argmax()))
            fed = torch.cat([fed, torch.tensor([[drafts[-1]]])], dim=1)
        n = 0
        while n < rounds and length + n < len(text) and drafts[n] == text[length + n]:
            accepted[n] += 1
            n += 1
        walked, length = walked + 1, length + n + 1
    assert simulated.acceptance.accepted == tuple(accepted)
    assert simulated.acceptance.rounds == walked
    dense = simulate_acceptance(DraftHead(assistant), tiny, seen_text, rounds, [0]).acceptance
    assert simulated.dense == dense
    if top_k == 20:
        assert simulated.acceptance == dense, "all clusters are the whole vocabulary"
        assert simulated.recall.argmax[2:] == (simulated.recall.drafts,) * 2, "20 is below 32"
    if top_k == 1:
        assert simulated.acceptance != dense, "clusters that cost nothing make this test empty"
    assert 0 < sum(accepted) < walked * rounds


def prompt_file(folder: Path, count: int) -> Path:
    path = folder / "p.jsonl"
    rows = [{"prompt": "xyz" * (i + 1), "category": "ab"[i % 2]} for i in range(count)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_the_report_holds_the_schema_that_others_read(tiny: Target, tmp_path: Path) -> None:
    chosen = EvalConfig(
        prompts=prompt_file(tmp_path, 5), limit=4, num_assistant_tokens=[2, 3], max_new_tokens=20
    )
    run_evaluation(tiny, half_trained_head(tiny), "heads/x", chosen, tmp_path / "out")
    content = json.loads((tmp_path / "out" / "report.json").read_text())
    assert content["schema"] == 1
    assert content["environment"]["dtype"] == "float32"
    assert content["verdict"]
    names = ("decoder", "num_assistant_tokens", "category", "prompts")
    found = [r for r in content["results"] if r["category"] != "no loops"]
    assert {tuple(r[name] for name in names) for r in found} == {
        (decoder, k, category, n)
        for decoder in ("transformers", "exact")
        for k in (2, 3)
        for category, n in (("all", 4), ("a", 2), ("b", 2))
    }
    for r in content["results"]:
        assert r["head"] == "heads/x"
        assert r["equal_to_plain"] is True
        assert len(r["conditional_acceptance_rate"]) == r["num_assistant_tokens"]
        assert r["acceptance_length"] == 1 + sum(r["accepted"]) / r["rounds"]
        assert r["acceptance_rate"] == sum(r["accepted"]) / r["drafted"]
        assert r["target_forwards"] == r["rounds"] + r["prompts"]
        assert r["new_tokens"] == sum(r["accepted"]) + r["rounds"] + r["prompts"]
        assert r["baseline_target_forwards"] == r["new_tokens"]
        low, high = r["speedup_interval"]
        assert low <= r["speedup"] <= high
        assert r["time_to_first_token"] > 0
        assert r["decode_tokens_per_second"] > r["tokens_per_second"] * 0.9
        assert (r["drafting_share"] is None) == (r["decoder"] == "transformers")
        assert r["drafting_share"] is None or 0 < r["drafting_share"] < 1


def test_texts_that_part_are_counted_with_their_logit_gap(
    tiny: Target, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A decoder that changes the target's mind must not go unnoticed."""

    def meddle(target: Target, ids: list[int], *args: Any) -> Decoded:
        decoded = greedy(target, ids, *args)
        if len(ids) == shortest and len(decoded.tokens) > 5:
            decoded.tokens[5] += 1
        return decoded

    prompts = load_prompts(prompt_file(tmp_path, 2))
    shortest = len(encode_prompt(prompts[0], tiny.tokenizer))
    monkeypatch.setattr("headstart.eval.sides.greedy", meddle)
    chosen = EvalConfig(
        prompts=prompt_file(tmp_path, 2), num_assistant_tokens=[2], max_new_tokens=12,
        decoders=["transformers"],
    )  # fmt: skip
    content = run_evaluation(tiny, half_trained_head(tiny), "h", chosen, tmp_path / "out")
    whole = content["results"][0]
    assert whole["equal_to_plain"] is False
    assert whole["parted_share"] == 0.5
    (parted,) = whole["parted"]
    ids = encode_prompt(prompts[0], tiny.tokenizer)
    ids += greedy(tiny, ids, 12).tokens[:5]
    logits = tiny.model(torch.tensor([ids])).logits[0, -1].sort(descending=True).values
    gap = float(logits[0] - logits[1])
    wanted = {"id": prompts[0].id, "token": 5, "top2_logit_gap": pytest.approx(gap, abs=1e-5)}
    assert parted == wanted


def test_all_decoders_are_compared_in_one_run(
    tiny: Target, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Those that choose K themselves too; every text is that of plain decoding."""
    monkeypatch.setattr("headstart.eval.draft_cost.COST_TURNS", 2)
    names: list[Decoder] = ["transformers", "exact", "cost", "hybrid", "lookup"]
    chosen = EvalConfig(
        prompts=prompt_file(tmp_path, 3), num_assistant_tokens=[2, 3], max_new_tokens=24,
        decoders=names,
    )  # fmt: skip
    content = run_evaluation(tiny, half_trained_head(tiny), "h", chosen, tmp_path / "out")
    whole = [r for r in content["results"] if r["category"] == "all"]
    both = [(name, k) for name in ("transformers", "exact") for k in (2, 3)]
    wanted = [*both, ("cost", 8), ("hybrid", 8), ("lookup", 2), ("lookup", 3)]
    assert [(r["decoder"], r["num_assistant_tokens"]) for r in whole] == wanted
    assert all(r["equal_to_plain"] for r in whole)
    assert all(r["new_tokens"] == whole[0]["new_tokens"] for r in whole)


def test_a_killed_evaluation_goes_on_with_what_is_missing(
    tiny: Target, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Finished prompts are kept, a line that the kill cut short is not; other settings are refused
    with both values."""
    chosen = EvalConfig(
        prompts=prompt_file(tmp_path, 4), num_assistant_tokens=[2], max_new_tokens=10
    )
    head, out = half_trained_head(tiny), tmp_path / "out"
    whole = run_evaluation(tiny, head, "h", chosen, out)
    file = out / "measurements.jsonl"
    lines = file.read_text().splitlines()
    assert len(lines) == 5, "the settings and four prompts"
    file.write_text("\n".join([*lines[:3], lines[3][:40]]))
    decoded: list[int] = []

    def note(target: Target, ids: list[int], *args: Any) -> Decoded:
        decoded.append(len(ids))
        return greedy(target, ids, *args)

    monkeypatch.setattr("headstart.eval.measurements.greedy", note)  # plain decoding
    again = run_evaluation(tiny, head, "h", chosen, out, resume=True)
    assert len(decoded) == 1 + 2, "a warm-up and the two prompts that were missing"
    counts = ("prompts", "category", "acceptance_length", "new_tokens", "rounds")
    assert [[r[c] for c in counts] for r in again["results"]] == [
        [r[c] for c in counts] for r in whole["results"]
    ]
    assert file.read_text().splitlines()[:3] == lines[:3]

    other = chosen.model_copy(update={"max_new_tokens": 12})
    with pytest.raises(ValueError, match="with max_new_tokens=10, not 12"):
        run_evaluation(tiny, head, "h", other, out, resume=True)
    file.write_text("\n".join([lines[0], lines[1][:40], *lines[2:]]))
    with pytest.raises(ValueError, match="line 2 is damaged"):
        run_evaluation(tiny, head, "h", chosen, out, resume=True)


def test_a_text_that_ends_in_a_loop_is_told_from_one_that_does_not() -> None:
    assert ends_in_loop([1, 2, 3, 4, *[7, 8] * 4])
    assert ends_in_loop([5] * 8)
    assert not ends_in_loop([1, 2, 3, 4, 1, 2, 3, 4]), "a period of half the text is no loop yet"
    assert not ends_in_loop([*[7, 8] * 5, 1])
    assert not ends_in_loop([])


@pytest.mark.parametrize(
    ("interval", "says"),
    [((1.2, 1.6), "Use the exact decoder with K = 4"), ((0.9, 1.3), "Within the noise"),
     ((0.5, 0.8), "Decode plainly")],
)  # fmt: skip
def test_the_verdict_follows_from_the_interval(interval: tuple[float, float], says: str) -> None:
    result = {
        "decoder": "exact", "num_assistant_tokens": 4, "category": "all", "prompts": 9, "loops": 2,
        "speedup": sum(interval) / 2, "speedup_interval": list(interval),
    }  # fmt: skip
    slower = result | {"decoder": "transformers", "speedup": 0.1}
    others = result | {"category": "no loops", "speedup": 0.77}
    text = verdict([slower, result, others])
    assert text.startswith(says)
    assert "2 of the texts end in loops" in text
    assert "without them it is 0.77" in text

"""Decoding with the stock `generate`, on tiny targets and a head that accepts sometimes."""

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers.generation.candidate_generator import (
    SinglePositionMultiTokenCandidateGenerator,
)

from headstart.configs.schema import DataConfig
from headstart.data.conversations import answered
from headstart.data.extraction import OnlineActivations
from headstart.eval.decoding import decode
from headstart.eval.measurements import Text
from headstart.eval.replay import simulate_acceptance
from headstart.eval.report import _kinds
from headstart.heads.decoder import ExactDecoding
from headstart.heads.kinds import Texts, all_rows
from headstart.heads.ordered import with_clusters
from headstart.heads.saving import load_assistant, save_assistant
from headstart.heads.target import Target
from headstart.heads.unroll import DraftHead
from tests.helpers.heads import greedy_document, half_trained_head, noisy_head, order_by_target
from tests.helpers.models import make_target

FAMILIES = ["gemma3", "gemma4-kv-sharing", "gemma4-multimodal", "gemma4-unified"]


@pytest.mark.parametrize("family", FAMILIES)
def test_assisted_greedy_text_equals_plain_greedy_text_in_float32(family: str) -> None:
    target = make_target(family)
    assistant = half_trained_head(target)
    accepted = 0
    for ids in [greedy_document(target)[0], *([5 + i] * (4 + 9 * i) for i in range(3))]:
        plain = decode(target, ids, 40)
        assisted = decode(target, ids, 40, assistant, 3)
        assert assisted.tokens == plain.tokens
        assert len(plain.forwards) == len(plain.tokens)
        accepted += sum(assisted.counts(len(ids), 3).accepted)
    assert accepted > 0, "a head that is never accepted makes this test empty"


@pytest.mark.parametrize("layers", [1, 3])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_head_of_any_depth_is_decoded(family: str, layers: int, tmp_path: Path) -> None:
    """One layer has no sliding attention, where the target has."""
    target = make_target(family)
    head = noisy_head(target, num_hidden_layers=layers).assistant
    save_assistant(head, target.table, tmp_path, 3, torch.float32)
    prompt, assistant = [5, 6, 7] * 20, load_assistant(tmp_path, torch.float32)
    found = decode(target, prompt, 24, assistant, 3, ExactDecoding())
    assert found.tokens == decode(target, prompt, 24).tokens
    assert any(found.drafts)


def test_the_first_forward_of_a_lookup_brings_what_it_accepted() -> None:
    """It drafts before the prompt has run: those tokens come in the time of the prefill, and an
    example shows each token of the text once."""
    target = make_target("gemma3")
    looping, length = [5, 6, 7, *decode(target, [5, 6, 7], 80).tokens], 0
    for end in range(60, 80, 2):  # a prompt that repeats itself, and the target goes on so
        ids = looping[:end]
        found = decode(target, ids, 12, num_assistant_tokens=3)
        first = found.first_tokens(len(ids))
        assert first + sum(1 + a for _, a in found.rounds(len(ids))) == len(found.tokens)
        text = Text("a", 0, "c", len(ids), found, found, None, None, None, [])
        kept = [token for token, kind in _kinds(text) if kind != "rejected"]
        assert kept == found.tokens
        length = max(length, first)
    assert length > 1, "no draft was accepted in a prefill: this test is empty"


@pytest.mark.parametrize("family", FAMILIES)
def test_lookup_and_a_small_model_draft_plain_text_from_the_prompt_on(family: str) -> None:
    """Both draft before the target has run: its prefill has several rows to keep, which is where a
    model may leave rows and masks out."""
    target, small = make_target(family), make_target("gemma3").model
    generator, drafted = torch.Generator().manual_seed(0), 0
    for length in (5, 14, 29, 34, 44, 59):
        ids = torch.randint(4, 260, (length,), generator=generator).tolist()
        ids[-3:] = ids[:3]  # for the lookup to find
        plain = decode(target, ids, 12).tokens
        for assistant in (None, small):
            found = decode(target, ids, 12, assistant, 2)
            assert found.tokens == plain
            drafted += len(found.forwards) and found.forwards[0][1] > length
    assert drafted > 6


@pytest.mark.parametrize("decoding_config", [None, ExactDecoding()], ids=["stock", "exact"])
def test_a_draft_length_is_of_one_call_and_changes_nothing_of_the_head(
    decoding_config: ExactDecoding | None, tiny: Target
) -> None:
    assistant, ids = half_trained_head(tiny), greedy_document(tiny)[0]
    before = assistant.generation_config.to_dict()
    longest = {}
    for k in (1, 3):
        decoded = decode(tiny, ids, 20, assistant, k, decoding_config)
        longest[k] = max(len(drafts) for drafts in decoded.drafts)
    assert longest == {1: 1, 3: 3}
    assert assistant.generation_config.to_dict() == before
    assert decoding_config is None or decoding_config.length is None


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
        decoded = decode(tiny, ids, 30, assistant, 3)
        counts = decoded.counts(len(ids), 3)
        assert sum(counts.accepted) == sum(told[1:])  # the first call is the prefill's
        assert counts.rounds == len(told) - 1 == len(decoded.forwards) - 1
        accepted += sum(counts.accepted)
    assert accepted > 0, "a head that is never accepted makes this test empty"


def test_a_right_draft_that_ends_a_text_is_neither_accepted_nor_rejected(
    tiny: Target, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever token ends it, decoding and replaying count alike, and of the places that rounds
    reached all were accepted but those of wrong drafts."""
    assistant, (prompt, document) = half_trained_head(tiny), greedy_document(tiny)
    answer, k, last = document.ids[len(prompt) :].tolist(), 3, 0
    for end in {token for token in answer[2:] if answer.index(token) > 1}:
        monkeypatch.setattr(tiny, "eos_ids", [end])
        ids = answer[: answer.index(end) + 1]
        decoded = decode(tiny, prompt, 40, assistant, k, ExactDecoding())
        assert decoded.tokens == ids
        counts, judged = decoded.counts(len(prompt), k), decoded.judged_rounds(len(prompt))
        begins = [seen - len(prompt) + 1 for seen, _ in decoded.forwards[1:]]
        wrong = sum(
            accepted < proposed and drafts[accepted] != ids[begin + accepted]
            for drafts, begin, (proposed, accepted) in zip(
                decoded.drafts, begins, judged, strict=True
            )
        )
        assert sum(counts.reached) == sum(counts.accepted) + wrong
        last += judged[-1] != decoded.rounds(len(prompt))[-1]
        conversation = answered(prompt, ids, id="c", category="c", source="c")
        seen_text = OnlineActivations(tiny, [conversation], DataConfig(teacher_top_k=16))
        replayed = simulate_acceptance(DraftHead(assistant), tiny, seen_text, k, [0]).acceptance
        assert (replayed.rounds, replayed.accepted) == (counts.rounds, counts.accepted)
        assert replayed.reached == counts.reached
    assert last, "no end was drafted"


@pytest.mark.parametrize("top_k", [None, 1, 20])
@torch.no_grad()
def test_simulated_acceptance_is_that_of_a_decoder_that_recomputes_everything(
    tiny: Target, top_k: int | None
) -> None:
    """Replayed rounds on stored activations against a plain loop: no cache, clean KV, own drafts.
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

    accepted, replayed, length = [0] * rounds, 0, len(prompt) + 1  # one token from the prefill
    while length < len(text):
        ids = torch.tensor([text[:length]])
        seen = tiny.activations(ids[:, :-1])
        row = torch.tensor([[length - 2]])
        fed, drafts = ids[:, -1:], []
        for _ in range(rounds):
            texts, rows = Texts(seen.hidden, seen.shared_kv), all_rows(row, fed[:, None])
            said = head(texts, rows, tiny.embed, 0)
            logits = said[-1] @ tiny.table.T
            if (embedder := head.assistant.masked_embedding) is not None:
                logits = embedder(said[-1], tiny.table)
            drafts.append(int(logits[0, 0].argmax()))
            fed = torch.cat([fed, torch.tensor([[drafts[-1]]])], dim=1)
        n = 0
        # The text was cut, not ended: its last token is the target's own.
        while n < rounds and length + n < len(text) - 1 and drafts[n] == text[length + n]:
            accepted[n] += 1
            n += 1
        replayed, length = replayed + 1, length + n + 1
    assert simulated.acceptance.accepted == tuple(accepted)
    assert simulated.acceptance.rounds == replayed
    dense = simulate_acceptance(DraftHead(assistant), tiny, seen_text, rounds, [0]).acceptance
    assert simulated.dense == dense
    if top_k == 20:
        assert simulated.acceptance == dense, "all clusters are the whole vocabulary"
        assert simulated.recall.argmax[2:] == (simulated.recall.drafts,) * 2, "20 is below 32"
    if top_k == 1:
        assert simulated.acceptance != dense, "clusters that cost nothing make this test empty"
    assert 0 < sum(accepted) < replayed * rounds

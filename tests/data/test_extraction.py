"""Extraction: what is stored is what a clean forward gives, and what the online mode gives."""

import resource
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from headstart.configs.schema import DataConfig
from headstart.data import extraction
from headstart.data.conversations import Conversation, answered, tokens_when_cut
from headstart.data.extraction import OnlineActivations, extract
from headstart.data.loader import AnchorLoader
from headstart.data.store import ActivationStore, bytes_per_token
from headstart.heads.loading import load_target, noted_target
from headstart.heads.target import Target
from headstart.train.start import build_head, sample_teacher_rows
from headstart.train.step import batch_sums
from tests.helpers.checkpoints import make_adapter
from tests.helpers.heads import candidates_of
from tests.helpers.models import make_target
from tests.helpers.prompts import conversations
from tests.helpers.runs import interrupt_second_call, tiny_config

pytestmark = pytest.mark.contract

CONFIG = DataConfig(teacher_top_k=5)


def extract_all(
    target: Target, rows: list[Conversation], folder: Path, config: DataConfig = CONFIG
) -> ActivationStore:
    return extract(target, rows, tokens_when_cut(rows, config.max_tokens), config, folder)


@pytest.fixture(autouse=True)
def small_shards(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(extraction, "SHARD", 4)


def test_what_is_stored_is_what_one_clean_forward_gives(target: Target, tmp_path: Path) -> None:
    rows = conversations(11)
    store = extract_all(target, rows, tmp_path)
    assert len(store) == 11
    for conversation, document in zip(rows, store.read(range(11)), strict=True):
        seen = target.activations(torch.tensor([conversation.ids]))
        assert document.ids.tolist() == conversation.ids
        assert document.loss_mask.nonzero()[:, 0].tolist() == list(range(5, len(conversation.ids)))
        close: dict[str, Any] = {"atol": 1e-5, "rtol": 1e-4}
        torch.testing.assert_close(document.hidden, seen.hidden[0], **close)
        for layer_type, (keys, values) in document.shared_kv.items():
            wanted = seen.shared_kv[layer_type]
            torch.testing.assert_close(keys.transpose(0, 1), wanted[0][0], **close)
            torch.testing.assert_close(values.transpose(0, 1), wanted[1][0], **close)
        best = target.logits(seen.hidden[0]).log_softmax(-1).topk(5)
        taught = slice(4, -1)
        torch.testing.assert_close(
            document.teacher_logprobs[taught], best.values[taught], atol=1e-4, rtol=1e-4
        )
        assert torch.equal(document.teacher_ids[taught].long(), best.indices[taught])
        untaught = document.teacher_logprobs[[0, 1, 2, 3, -1]]
        assert not untaught.any(), "the LM head does not run where nothing is to be learnt"


def test_a_store_notes_what_loads_its_target_again(tmp_path: Path) -> None:
    """Its name alone does not tell an adapter from a folder that has a plus in its name."""
    adapter = make_adapter(tmp_path / "adapter")
    target = load_target("tiny-gemma4", "float32", adapters=[adapter])
    store = extract_all(target, conversations(1), tmp_path / "store")
    assert noted_target(store.settings, "target").adapters == [adapter]


def test_the_index_says_what_mass_the_top_k_hold(tiny: Target, tmp_path: Path) -> None:
    store = extract_all(tiny, conversations(3), tmp_path)
    for entry, document in zip(store.entries, store.read(range(3)), strict=True):
        logprobs = tiny.logits(document.hidden).log_softmax(-1)[4:-1]
        assert entry.top_k_mass == pytest.approx(
            float(logprobs.topk(5).values.exp().sum(-1).mean()), abs=1e-5
        )


def test_an_interrupted_extraction_keeps_its_shards(
    tiny: Target, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = interrupt_second_call(monkeypatch, extraction, "extract_tensors")
    with pytest.raises(KeyboardInterrupt):
        extract_all(tiny, conversations(11), tmp_path)
    with pytest.raises(ValueError, match="is unfinished: run the command that makes it again"):
        ActivationStore(tmp_path)
    assert len(extract_all(tiny, conversations(11), tmp_path)) == 11
    assert len(calls) == 4, "the first shard was kept, the second and third were made"


@pytest.mark.parametrize("change", ["ids", "spans", "source", "temperature", "fewer"])
def test_a_store_of_other_conversations_is_not_gone_on_with(
    change: str, tiny: Target, tmp_path: Path
) -> None:
    rows = conversations(9)
    extract_all(tiny, rows, tmp_path)
    if change == "fewer":
        rows = rows[:4]
    else:
        c = rows[5]
        ids, spans = [*c.ids[:-1], c.ids[-1] ^ 1], [(c.spans[0][0] + 1, c.spans[0][1])]
        other: dict[str, Any] = {"ids": ids, "spans": spans, "source": "x", "temperature": 1.0}
        rows[5] = replace(c, **{change: other[change]})
    with pytest.raises(ValueError, match=r"of other conversations|holds other conversations"):
        extract_all(tiny, rows, tmp_path)


def test_nobody_elses_files_are_touched(tiny: Target, tmp_path: Path) -> None:
    for name in ("film.mkv.part", ".tmpstuff", "notes.json"):
        (tmp_path / name).write_text("mine")
    extract_all(tiny, conversations(2), tmp_path)
    for name in ("film.mkv.part", ".tmpstuff", "notes.json"):
        assert (tmp_path / name).read_text() == "mine"


def test_conversations_with_nothing_to_draft_are_left_out(tiny: Target, tmp_path: Path) -> None:
    rows = conversations(6)
    rows[2] = replace(rows[2], spans=[(5, 6)])
    assert [e.id for e in extract_all(tiny, rows, tmp_path / "a").entries] == [
        "c0", "c1", "c3", "c4", "c5",
    ]  # fmt: skip
    with pytest.raises(ValueError, match="no conversation has an answer of two tokens"):
        extract_all(tiny, [rows[2]], tmp_path / "b")


def test_pieces_of_long_conversations_have_the_predicted_size(tiny: Target, tmp_path: Path) -> None:
    rows = conversations(30)
    for max_tokens in (9, 16, 40):
        config = CONFIG.model_copy(update={"max_tokens": max_tokens})
        predicted = tokens_when_cut(rows, max_tokens)
        store = extract_all(tiny, rows, tmp_path / str(max_tokens), config)
        assert sum(entry.length for entry in store.entries) == predicted


def test_the_online_mode_gives_the_loss_of_the_stored_one(target: Target, tmp_path: Path) -> None:
    """Over several batches, with conversations cut to pieces."""
    config = DataConfig(teacher_top_k=16, max_tokens=24)
    rows = conversations(9)
    stored = extract_all(target, rows, tmp_path, config)
    online = OnlineActivations(target, rows, config)
    assert len(stored) == len(online.entries) > 9
    run = tiny_config(tmp_path, "head.init_from=random")
    taught = sample_teacher_rows(stored, target.device)
    head = build_head(target, run, taught, stored, resumed=False)
    loaders = [AnchorLoader(documents, 4, 8, 3, seed=1) for documents in (stored, online)]
    for number in range(4):
        batches = [loader.batch(number) for loader in loaders]
        sums = [
            batch_sums(head, target, batch, run.train, candidates_of(batch, run.train, number))
            for batch in batches
        ]
        per_row = [float(s["loss_sum"].detach() / s["rows"]) for s in sums]
        assert per_row[0] == pytest.approx(per_row[1], abs=1e-5)


def test_memory_does_not_grow_with_the_number_of_conversations(tmp_path: Path) -> None:
    """Peak resident memory against the bytes that went through; no two conversations are equal."""
    target = make_target("gemma4")
    config = DataConfig(teacher_top_k=256)
    per_conversation = 12 * bytes_per_token(target.config, 4, 256, "target")

    def peak_after(count: int, name: str) -> int:
        stream = (
            answered(
                [2, i % 256 + 4, i // 256 + 4], [5 + i % 7] * 9, id=str(i), category="", source=""
            )
            for i in range(count)
        )
        extract(target, stream, 12 * count, config, tmp_path / name)
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024

    first = peak_after(100, "warm")
    grown = peak_after(3000, "many") - first
    assert grown < 0.2 * 2900 * per_conversation, "a fifth of what was written"

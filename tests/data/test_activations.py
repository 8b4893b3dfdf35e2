from pathlib import Path
from typing import Any

import pytest
import torch

from headstart.configs.schema import DataConfig
from headstart.data import activations
from headstart.data.activations import ActivationStore, extract_activations, open_recorded
from headstart.data.conversations import Conversation, generate_batches
from headstart.data.loader import AnchorLoader, candidate_rows, gather_rows
from headstart.data.prompts import Prompt
from headstart.heads.targets import Target
from tests.conftest import make_target

CONFIG = DataConfig(teacher_top_k=5)


def _conversations(count: int) -> list[Conversation]:
    generator = torch.Generator().manual_seed(0)
    rows = []
    for i in range(count):
        ids = torch.randint(4, 260, (12 + 3 * i,), generator=generator).tolist()
        rows.append(Conversation(f"c{i}", "c", ids[:5], ids[5:], 0.0, "length"))
    return rows


@pytest.fixture
def store(tiny: Target) -> ActivationStore:
    return extract_activations(tiny, _conversations(11), CONFIG, "x")


def test_what_is_stored_is_what_one_clean_forward_gives(
    tiny: Target, store: ActivationStore
) -> None:
    for conversation, document in zip(_conversations(11), store, strict=True):
        ids = torch.tensor([conversation.prompt_ids + conversation.response_ids])
        seen = tiny.activations(ids)
        assert torch.equal(document.ids, ids[0])
        torch.testing.assert_close(document.hidden, seen.hidden[0], atol=1e-5, rtol=1e-4)
        for layer_type, (keys, values) in document.shared_kv.items():
            wanted = seen.shared_kv[layer_type]
            torch.testing.assert_close(keys.transpose(0, 1), wanted[0][0], atol=1e-5, rtol=1e-4)
            torch.testing.assert_close(values.transpose(0, 1), wanted[1][0], atol=1e-5, rtol=1e-4)
        best = tiny.logits(seen.hidden[0]).log_softmax(-1).topk(5)
        torch.testing.assert_close(
            document.teacher_logprobs[4:], best.values[4:], atol=1e-4, rtol=1e-4
        )
        assert torch.equal(document.teacher_ids[4:].long(), best.indices[4:])


def test_an_interrupted_extraction_keeps_its_shards(
    tiny: Target, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = CONFIG.model_copy(update={"cache_dir": tmp_path})
    extract, calls = activations._extract, []

    def count(*args: Any) -> object:
        calls.append(args)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return extract(*args)

    monkeypatch.setattr(activations, "_extract", count)
    with pytest.raises(KeyboardInterrupt):
        extract_activations(tiny, _conversations(11), config, "x")
    assert len(extract_activations(tiny, _conversations(11), config, "x")) == 11
    assert len(calls) == 3


def test_rows_pair_each_token_with_the_hidden_state_before_it(store: ActivationStore) -> None:
    """By hand, for one document: row t reads h_t and x_{t+1}, round k is taught at t + k."""
    document = store[2]  # 5 prompt tokens, 18 in all
    rows = candidate_rows(document)
    assert rows.tolist() == list(range(4, 16)), "x_5 is the first token that the target wrote"
    batch = gather_rows([document], [rows], rounds=3)
    for r, t in enumerate(rows.tolist()):
        assert torch.equal(batch.hidden[0, r], document.hidden[t])
        for k in (1, 2, 3):
            if t + k + 1 >= 18:
                assert batch.weights[0, r, k - 1] == 0, "nothing follows to be predicted"
                continue
            assert batch.weights[0, r, k - 1] == 1
            assert batch.tokens[0, r, k - 1] == document.ids[t + k]
            assert torch.equal(batch.teacher_ids[0, r, k - 1], document.teacher_ids[t + k].long())


def test_an_epoch_reads_every_conversation_once_over_all_processes(store: ActivationStore) -> None:
    seen: list[str] = []
    for rank in range(2):
        loader = AnchorLoader(store, 1, 4, 2, seed=5, rank=rank, world_size=2)
        seen += [d for n in range(5) for d in loader.batch(n).document_ids]
    assert len(seen) == len(set(seen)) == 10
    halves = [AnchorLoader(store, 2, 4, 2, 5, r, 2).batch(1).document_ids for r in (0, 1)]
    assert [*halves[0], *halves[1]] == AnchorLoader(store, 4, 4, 2, seed=5).batch(1).document_ids


def test_a_batch_depends_on_its_number_alone(store: ActivationStore) -> None:
    first = AnchorLoader(store, 3, 4, 2, seed=5)
    for n in range(3):
        first.batch(n)
    again, other = AnchorLoader(store, 3, 4, 2, seed=5).batch(3), first.batch(4)
    assert torch.equal(first.batch(3).rows, again.rows)
    assert torch.equal(first.batch(3).hidden, again.hidden)
    assert not torch.equal(other.tokens, again.tokens)


@pytest.mark.parametrize("family", ["gemma3", "gemma4-kv-sharing", "gemma4-moe"])
def test_what_is_recorded_while_generating_is_what_a_clean_forward_gives(
    family: str, tmp_path: Path
) -> None:
    """Mixed prompt lengths (left padding), texts beyond the sliding window, early ends."""
    target = make_target(family)
    prompts = [
        Prompt(f"p{i}", "c", f"s{i}", [{"role": "user", "content": "abc" * (i + 1)}], raw=True)
        for i in range(5)
    ]
    config = CONFIG.model_copy(update={"max_new_tokens": 14, "generation_batch_size": 3})
    heats = [0.0, 1.0, 0.0, 1.0, 1.0]
    store = open_recorded(generate_batches(target, prompts, heats, config, 0, "x")[0])
    assert len(store) == 5
    for document in store:
        seen = target.activations(document.ids[None])
        last = len(document.ids) - 1  # the target never ran on the last token
        close: dict[str, Any] = {"atol": 1e-4, "rtol": 1e-4}
        torch.testing.assert_close(document.hidden[:last], seen.hidden[0, :last], **close)
        for layer_type, (keys, values) in document.shared_kv.items():
            wanted = [kv[0, :, :last].transpose(0, 1) for kv in seen.shared_kv[layer_type]]
            torch.testing.assert_close(keys[:last], wanted[0], **close)
            torch.testing.assert_close(values[:last], wanted[1], **close)
        taught = slice(document.prompt_len - 1, last)
        best = target.logits(seen.hidden[0]).log_softmax(-1).topk(5)
        torch.testing.assert_close(document.teacher_logprobs[taught], best.values[taught], **close)
        assert torch.equal(document.teacher_ids[taught].long(), best.indices[taught])

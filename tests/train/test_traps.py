"""Each trap is the mistake that it is named for, and nothing else."""

from dataclasses import fields, replace

import pytest
import torch

from headstart.common.versions import ALL_ROWS
from headstart.configs.schema import DataConfig, HeadConfig, TrainConfig
from headstart.data.extraction import OnlineActivations
from headstart.data.loader import Batch, candidate_rows, gather_rows
from headstart.data.store import Document
from headstart.heads.ordered import Taught
from headstart.heads.target import Target
from headstart.train.losses import Teacher, draw_candidates, forward_kl, sparse_losses
from headstart.train.traps import in_top_clusters, trapped, uncapped, with_top_clusters
from tests.helpers.heads import noisy_head
from tests.helpers.models import make_target
from tests.helpers.prompts import conversations

K = 3


@pytest.fixture
def batch(target: Target) -> Batch:
    """Two conversations of 12 and 15 tokens, all their rows."""
    documents = OnlineActivations(target, conversations(2), DataConfig(teacher_top_k=5)).read(
        [0, 1]
    )
    return gather_rows(documents, [candidate_rows(d) for d in documents], K)


def changed(before: Batch, after: Batch) -> set[str]:
    names = {field.name for field in fields(Batch)}
    return {name for name in names if getattr(before, name) is not getattr(after, name)}


def states(target: Target, batch: Batch) -> list[torch.Tensor]:
    head = noisy_head(target)
    with torch.no_grad():
        return head(
            batch.hidden, target.embed(batch.tokens), batch.rows, batch.shared_kv, batch.starts,
            batch.later, batch.seen,
        )  # fmt: skip


def test_the_state_of_the_same_token_tells_what_the_teacher_says(
    target: Target, batch: Batch
) -> None:
    wrong = trapped("same_token", batch, target)
    assert changed(batch, wrong) == {"hidden"}
    counted = batch.weights[..., 0] > 0
    says = target.logits(wrong.hidden[counted]).argmax(-1)
    assert torch.equal(says, batch.teacher_ids[..., 0, 0][counted])


def test_states_before_the_norm_are_the_right_ones_after_it(target: Target, batch: Batch) -> None:
    wrong = trapped("pre_norm", batch, target)
    assert changed(batch, wrong) == {"hidden"}
    counted = batch.weights[..., 0] > 0
    assert not torch.allclose(wrong.hidden[counted], batch.hidden[counted], atol=0.1)
    with torch.no_grad():
        normed = target.final_norm(wrong.hidden)
    torch.testing.assert_close(normed[counted], batch.hidden[counted], atol=1e-4, rtol=1e-4)


def test_one_key_too_many_is_that_of_the_next_row(target: Target, batch: Batch) -> None:
    """What row t sees then is what row t + 1 sees."""
    wrong = trapped("own_key", batch, target)
    assert changed(batch, wrong) == {"seen"}
    counted = batch.weights[..., 0] > 0
    assert torch.equal(wrong.seen[counted], batch.rows[counted] + 1)
    assert not torch.allclose(states(target, wrong)[0], states(target, batch)[0], atol=1e-4)


def test_future_keys_are_those_of_the_stock_forward_over_several_rows(tiny: Target) -> None:
    """In a batch with padding and within the sliding window: beyond it the stock forward mirrors
    the window too, and without padding it takes the first rows of keys for a causal square."""
    both = OnlineActivations(tiny, conversations(2), DataConfig(teacher_top_k=5)).read([0, 1])
    documents = [cut_to(document, rows) for document, rows in zip(both, (6, 7), strict=True)]
    batch = gather_rows(documents, [torch.arange(1, 5)] * 2, 2)
    wrong = trapped("future_keys", batch, tiny)
    assert changed(batch, wrong) == {"seen"}
    assert wrong.seen.tolist() == [[5] * 4, [6] * 4]
    assistant = noisy_head(tiny).assistant
    with torch.no_grad():
        stock = assistant(
            inputs_embeds=torch.cat([tiny.embed(batch.tokens)[:, :, 0], batch.hidden], dim=-1),
            attention_mask=torch.tensor([[1] * 6 + [0], [1] * 7]),
            position_ids=batch.rows + 1,
            shared_kv_states=batch.shared_kv,
            use_cache=False,
            **ALL_ROWS,
        )
    logits = states(tiny, wrong)[0] @ tiny.table.T
    torch.testing.assert_close(logits, stock.logits, atol=1e-4, rtol=1e-4)
    right = states(tiny, batch)[0] @ tiny.table.T
    assert not torch.allclose(right, stock.logits, atol=1e-3)


def test_without_its_soft_cap_the_teacher_is_surer() -> None:
    """What it says is the softmax of the logits before the cap, at every draft that counts."""
    target = make_target("gemma4")
    documents = OnlineActivations(target, conversations(2), DataConfig(teacher_top_k=5)).read(
        [0, 1]
    )
    batch = gather_rows(documents, [candidate_rows(d) for d in documents], K)
    wrong = trapped("no_soft_cap", batch, target)
    assert changed(batch, wrong) == {"teacher_logprobs"}
    cap = target.config.final_logit_softcapping
    for b, r, k in (batch.weights > 0).nonzero().tolist():
        hidden = batch.text_hidden[b, batch.rows[b, r] + k + 1]
        capped = target.logits(hidden)
        before = (capped / cap).atanh() * cap
        wanted = before.log_softmax(-1)[batch.teacher_ids[b, r, k]]
        torch.testing.assert_close(wrong.teacher_logprobs[b, r, k], wanted, atol=1e-3, rtol=1e-3)
    assert not torch.allclose(wrong.teacher_logprobs, batch.teacher_logprobs, atol=1e-3)
    with pytest.raises(ValueError, match="gemma3 caps no logits"):
        uncapped(make_target("gemma3"))


def test_training_through_the_clusters_has_the_logits_of_the_stock_embedder() -> None:
    """Of the tokens that a draft reads; all others lie below them."""
    target = make_target("gemma3")
    ids = torch.arange(4, 44)
    hidden = target.activations(ids[None]).hidden[0]
    best = target.logits(hidden).log_softmax(-1).topk(5)
    taught = Taught(hidden, best.indices, best.values)
    clusters = HeadConfig(
        use_ordered_embeddings=True, num_centroids=20, centroid_intermediate_top_k=4
    )
    assistant = with_top_clusters(noisy_head(target).assistant, target, taught, clusters)
    assert assistant.lm_head.weight is target.table
    everything = torch.arange(len(target.table))
    read = in_top_clusters(assistant, everything)
    with torch.no_grad():
        stock = assistant.masked_embedding(hidden[:, None], target.table)[:, 0]
        seen = read(hidden)
        assert (seen.sum(1) == 4 * len(everything) / 20).all()
        logits = hidden @ target.table.T
        torch.testing.assert_close(stock[seen], logits[seen], atol=1e-5, rtol=1e-5)
        assert (stock.argmax(-1) == logits.masked_fill(~seen, -torch.inf).argmax(-1)).all()
    candidates = draw_candidates(
        torch.ones(len(everything), dtype=torch.bool), 1, torch.Generator()
    )
    teacher = Teacher(hidden, torch.arange(len(hidden)), best.indices, best.values)
    common = (forward_kl, 1.0, torch.float32, target.table)
    found = sparse_losses(hidden, target, teacher, candidates, *common, read)
    assert torch.equal(found.drafts, stock.argmax(-1))
    whole = sparse_losses(hidden, target, teacher, candidates, *common)
    assert (found.losses > whole.losses).all(), "the target's own states, their tail cut off"


def cut_to(document: Document, rows: int) -> Document:
    """The first rows of a document, all of them written by the target."""
    return replace(
        document, ids=document.ids[:rows], hidden=document.hidden[:rows],
        shared_kv={t: (k[:rows], v[:rows]) for t, (k, v) in document.shared_kv.items()},
        loss_mask=torch.ones(rows, dtype=torch.bool),
    )  # fmt: skip


def test_packed_rows_have_no_trap() -> None:
    with pytest.raises(ValueError, match="unpacked rows"):
        TrainConfig(trap="own_key", pack_tokens=64)

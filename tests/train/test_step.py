"""What the rounds beyond the first read, and which of their drafts count."""

from typing import Any

import pytest
import torch

from headstart.configs.schema import DataConfig, TrainConfig, Unroll
from headstart.data.extraction import OnlineActivations
from headstart.data.loader import Batch, candidate_rows, gather_rows
from headstart.heads.target import Target
from headstart.heads.unroll import DraftHead
from headstart.train.losses import exact_losses, forward_kl
from headstart.train.step import batch_sums, draft_batch
from tests.helpers.heads import noisy_head
from tests.helpers.prompts import conversations

K = 3


def batch_of(target: Target) -> Batch:
    """Two conversations, all their rows; half of them go on beyond the first round."""
    data = DataConfig(teacher_top_k=5)
    documents = OnlineActivations(target, conversations(2), data).read([0, 1])
    rows = [candidate_rows(d) for d in documents]
    later = [torch.arange(0, len(r), 2) for r in rows]
    return gather_rows(documents, rows, K, later=later)


def loss_of(head: DraftHead, target: Target, batch: Batch, unroll: Unroll) -> float:
    c = TrainConfig(
        unroll=unroll, num_speculative_steps=K, vocabulary="exact", mixed_precision="no"
    )
    return float(batch_sums(head, target, batch, c, None)["loss_sum"])


def fed_as_text(batch: Batch, drafts: torch.Tensor) -> None:
    """Make drafts [B x R, K] of the first rounds the tokens that the text goes on with."""
    batch.rows.tokens[..., 1:] = drafts.view(*batch.rows.at.shape, K)[..., : K - 1]


def by_anchor(head: DraftHead, target: Target, batch: Batch) -> tuple[Any, torch.Tensor]:
    """All drafts of a batch with their losses, and their tokens as [B x R, K]."""
    drafts = draft_batch(head, target, batch, torch.float32, TrainConfig().draft_position_offset)
    found = exact_losses(
        drafts.states, target, drafts.teacher, forward_kl, 1.0, torch.float32, target.table
    )
    tokens = torch.zeros(batch.rows.at.numel(), K, dtype=torch.long)
    tokens[batch.drafts.anchor, batch.drafts.round] = found.drafts
    return (drafts, found), tokens


@torch.no_grad()
def test_a_draft_is_reached_where_all_before_it_are_the_texts_tokens(target: Target) -> None:
    head, batch = noisy_head(target), batch_of(target)
    _, tokens = by_anchor(head, target, batch)
    tokens[::3, 0] += 1  # every third anchor misses at its first draft
    fed_as_text(batch, tokens)
    (_, found), tokens = by_anchor(head, target, batch)
    wanted, unreached = 0.0, 0
    for loss, anchor, k in zip(found.losses, batch.drafts.anchor, batch.drafts.round, strict=True):
        text = batch.rows.tokens.flatten(0, 1)[anchor]
        if all(int(tokens[anchor, i]) == int(text[i + 1]) for i in range(k)):
            wanted += float(loss) * 0.8 ** int(k)
        else:
            unreached += 1
    assert unreached > 3
    assert loss_of(head, target, batch, "reached") == pytest.approx(wanted, rel=1e-5)
    assert loss_of(head, target, batch, "teacher_forced") > wanted


@torch.no_grad()
def test_hits_after_a_miss_are_not_accepted(target: Target) -> None:
    """The teacher agrees with every draft but the second, of every other anchor the first too."""
    head, batch = noisy_head(target), batch_of(target)
    _, tokens = by_anchor(head, target, batch)
    best = tokens.clone()
    best[:, 1] += 1
    best[::2, 0] += 1
    batch.teacher_ids[..., 0] = best.view(*batch.rows.at.shape, K)
    c = TrainConfig(num_speculative_steps=K, vocabulary="exact", mixed_precision="no")
    sums = batch_sums(head, target, batch, c, None)
    drafts = batch.drafts
    beyond = drafts.anchor[drafts.round == 1]
    assert (drafts.round == 2).any(), "some anchors have a hit after their miss"
    assert float(sums["accepted"]) == int((beyond % 2 == 1).sum()) > 0
    assert float(sums["beyond"]) == len(beyond)

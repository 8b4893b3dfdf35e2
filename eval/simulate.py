"""Greedy acceptance from stored activations, without decoding.

Exact for greedy drafts on greedy text: a draft is right when it is the text's next token, and draft
k counts only when drafts 1..k-1 were right, so that the tokens fed to it are the text's own.

Letters: B documents, R rows of each, K rounds, N drafts, C clusters, V vocabulary.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from itertools import pairwise

import torch

from headstart.data.loader import Batch, candidate_rows, gather_rows
from headstart.data.store import Documents
from headstart.eval.acceptance import AcceptanceCounts, walk_rounds, zero_counts
from headstart.eval.recall import RecallCounts, zero_recall
from headstart.heads.processes import in_step
from headstart.heads.targets import Target
from headstart.heads.unroll import DraftHead

LOGIT_ROWS = 256  # rows of V logits held at once
DOCUMENTS = 8  # run through the head together


@dataclass(frozen=True)
class Simulated:
    """What a walk over held-out documents found."""

    acceptance: AcceptanceCounts
    """Of the head as it drafts: through its clusters where it has ordered embeddings."""
    dense: AcceptanceCounts
    """Of the same head with the LM head over the whole vocabulary."""
    recall: RecallCounts
    """Over the drafts that a decoder meets from any row: those whose earlier ones in the round were
    right. Zero where the head has no ordered embeddings."""


@torch.no_grad()
def simulate_acceptance(
    head: DraftHead,
    target: Target,
    stored: Documents,
    rounds: int,
    which: Iterable[int],
    ahead: int = 1,
) -> Simulated:
    """Acceptance counts of `head` on the documents `which`, by walking rounds.

    Args:
        head: in any mode.
        target: for its embeddings and table.
        stored: activations of greedy conversations.
        rounds: K.
        which: their indices (a process passes its share).
        ahead: where drafts stand (`DraftHead.forward`).
    """
    drafted, dense, recall = zero_counts(rounds), zero_counts(rounds), zero_recall()
    cluster_of = head.cluster_of
    chosen = [i for i in which if stored.entries[i].trained >= 2]
    chunks = (chosen[start : start + DOCUMENTS] for start in range(0, len(chosen), DOCUMENTS))
    for chunk in in_step(chunks, target.sharded):
        documents = stored.read(chunk or [])
        if not documents:
            continue
        rows = [candidate_rows(d) for d in documents]
        batch = gather_rows(documents, rows, rounds).to(target.device)
        wanted = torch.zeros_like(batch.tokens)
        judged = batch.weights.bool()
        for b, (document, r) in enumerate(zip(documents, rows, strict=True)):
            following, last = r[:, None] + torch.arange(2, rounds + 2), len(document.ids) - 1
            wanted[b, : len(r)] = document.ids[following.clamp_max(last)]
            # The last token before a text is cut is the target's own: nobody drafts it.
            if int(document.ids[last]) not in target.eos_ids:
                judged[b, : len(r)] &= (following != last).to(judged.device)
        states = _unrolled(head, target, batch, ahead)
        matches = _matches(head, target, states, wanted, judged)
        if cluster_of is not None:
            met = judged.clone()
            met[..., 1:] &= matches[0][..., :-1].long().cumprod(-1).bool()
            scores = head.assistant.masked_embedding.centroids(states[met])
            clusters = cluster_of[batch.teacher_ids[met]]
            recall += RecallCounts.of(scores, clusters, batch.teacher_logprobs[met])
        for b, r in enumerate(rows):
            for answer in _answers(r):
                drafted += walk_rounds(matches[0][b, answer], judged[b, answer])
                dense += walk_rounds(matches[1][b, answer], judged[b, answer])
    return Simulated(drafted, dense, recall)


def _answers(rows: torch.Tensor) -> list[slice]:
    """Where rows follow one another: each answer of a conversation is walked by itself."""
    breaks = ((rows[1:] - rows[:-1]) != 1).nonzero()[:, 0] + 1
    edges = [0, *breaks.tolist(), len(rows)]
    return [slice(a, b) for a, b in pairwise(edges) if a < b]


def _unrolled(head: DraftHead, target: Target, batch: Batch, ahead: int) -> torch.Tensor:
    """States [B, R, K, width of `draft_table`]."""
    dtype = head.assistant.pre_projection.weight.dtype
    states = head(
        batch.hidden.to(dtype),
        target.embed(batch.tokens).to(dtype),
        batch.rows,
        {t: (k.to(dtype), v.to(dtype)) for t, (k, v) in batch.shared_kv.items()},
        batch.starts,
        ahead=ahead,
    )
    return torch.stack(states, dim=2)


def _matches(
    head: DraftHead,
    target: Target,
    states: torch.Tensor,
    wanted: torch.Tensor,
    judged: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Whether each draft is the token `wanted` there, given that the earlier ones are.

    Returns:
        [B, R, K] bool as the head drafts, and [B, R, K] with the dense LM head.
    """
    drafted, dense = (torch.zeros_like(wanted, dtype=torch.bool) for _ in range(2))
    alive_drafted = alive_dense = judged[..., 0]
    for k in range(wanted.shape[-1]):
        # A draft after a miss is never looked at: no need for its logits over the vocabulary.
        at = ((alive_drafted | alive_dense) & judged[..., k]).nonzero(as_tuple=True)
        pair = _drafts(head, target, states[..., k, :][at])
        drafted[..., k][at], dense[..., k][at] = (ids == wanted[..., k][at] for ids in pair)
        alive_drafted = alive_drafted & drafted[..., k]
        alive_dense = alive_dense & dense[..., k]
    return drafted, dense


def _drafts(
    head: DraftHead, target: Target, states: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """[N] tokens through the clusters and [N] over the whole vocabulary, of states [N, width]."""
    dense = torch.zeros(len(states), dtype=torch.long, device=states.device)
    drafted = dense.clone()
    embedder, cluster_of = head.assistant.masked_embedding, head.cluster_of
    table = head.draft_table(target.table)
    for start in range(0, len(states), LOGIT_ROWS):
        rows = slice(start, start + LOGIT_ROWS)
        logits = states[rows].to(table.dtype) @ table.T
        dense[rows] = drafted[rows] = logits.argmax(-1)
        if embedder is None or cluster_of is None:
            continue
        scores = embedder.centroids(states[rows])
        top = scores.topk(embedder.centroid_intermediate_top_k, dim=1).indices
        chosen = torch.zeros_like(scores, dtype=torch.bool).scatter(1, top, True)
        # Where the best token is in a chosen cluster it is the draft too; the rest look again.
        missed = ~chosen.gather(1, cluster_of[dense[rows]][:, None])[:, 0]
        hidden = ~chosen[missed][:, cluster_of]
        drafted[rows][missed] = logits[missed].masked_fill(hidden, -torch.inf).argmax(-1)
    return drafted, dense

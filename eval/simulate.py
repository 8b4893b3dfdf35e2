"""Greedy acceptance from stored activations, without decoding.

Exact for greedy drafts on greedy text: a draft is right when it is the text's next token, and draft
k counts only when drafts 1..k-1 were right, so that the tokens fed to it are the text's own.
"""

from collections.abc import Iterable
from itertools import pairwise

import torch

from headstart.data.loader import Batch, candidate_rows, gather_rows
from headstart.data.store import Documents
from headstart.eval.acceptance import AcceptanceCounts, walk_rounds, zero_counts
from headstart.heads.targets import Target
from headstart.heads.unroll import DraftHead

LOGIT_ROWS = 256  # rows of V logits held at once
DOCUMENTS = 8  # run through the head together


@torch.no_grad()
def simulate_acceptance(
    head: DraftHead, target: Target, stored: Documents, rounds: int, which: Iterable[int]
) -> AcceptanceCounts:
    """Acceptance counts of `head` on the documents `which`, by walking rounds.

    Args:
        head: in any mode; its drafts are compared over the whole vocabulary.
        target: for its embeddings and table.
        stored: activations of greedy conversations.
        rounds: K.
        which: their indices (a process passes its share).
    """
    total = zero_counts(rounds)
    chosen = [i for i in which if stored.entries[i].trained >= 2]
    for start in range(0, len(chosen), DOCUMENTS):
        documents = stored.read(chosen[start : start + DOCUMENTS])
        rows = [candidate_rows(d) for d in documents]
        batch = gather_rows(documents, rows, rounds).to(target.device)
        wanted = torch.zeros_like(batch.tokens)
        for b, (document, r) in enumerate(zip(documents, rows, strict=True)):
            following = r[:, None] + torch.arange(2, rounds + 2)
            wanted[b, : len(r)] = document.ids[following.clamp_max(len(document.ids) - 1)]
        matches, judged = _matches(head, target, batch, wanted), batch.weights.bool()
        for b, r in enumerate(rows):
            for answer in _answers(r):
                total += walk_rounds(matches[b, answer], judged[b, answer])
    return total


def _answers(rows: torch.Tensor) -> list[slice]:
    """Where rows follow one another: each answer of a conversation is walked by itself."""
    breaks = ((rows[1:] - rows[:-1]) != 1).nonzero()[:, 0] + 1
    edges = [0, *breaks.tolist(), len(rows)]
    return [slice(a, b) for a, b in pairwise(edges) if a < b]


def _matches(head: DraftHead, target: Target, batch: Batch, wanted: torch.Tensor) -> torch.Tensor:
    """[B, R, K] whether each draft is the token `wanted` there, given that the earlier ones are."""
    dtype = head.assistant.pre_projection.weight.dtype
    states = head(
        batch.hidden.to(dtype),
        target.embed(batch.tokens).to(dtype),
        batch.rows,
        {t: (k.to(dtype), v.to(dtype)) for t, (k, v) in batch.shared_kv.items()},
        batch.starts,
    )
    matches = torch.zeros_like(wanted, dtype=torch.bool)
    alive = batch.weights[..., 0].bool()
    for k in range(wanted.shape[-1]):
        # A draft after a miss is never looked at: no need for its logits over the vocabulary.
        at = (alive & batch.weights[..., k].bool()).nonzero(as_tuple=True)
        rows = states[k][at].to(target.table.dtype)
        drafts = [(chunk @ target.table.T).argmax(-1) for chunk in rows.split(LOGIT_ROWS)]
        hit = torch.cat(drafts) == wanted[..., k][at] if drafts else alive[at]
        matches[..., k][at] = hit
        alive = matches[..., k]
    return matches

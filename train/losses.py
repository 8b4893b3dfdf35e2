"""Objectives as pure functions of tensors, over the whole vocabulary or over a fair sample of it.

Letters: N drafts (one anchor in one round each), P positions of the target, C candidates (tokens
that the softmax runs over), k stored teacher tokens, D target width, V vocabulary.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeAlias

import torch

from headstart.heads.target import Target

Objective: TypeAlias = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]
"""(log_q [N, C] of the draft, log_p [N, C] of the teacher, weights [C]) -> [N] losses.

Log-probabilities are of the full softmax. A weight says how many tokens of the vocabulary its
candidate stands for, so that sums over candidates estimate sums over V; all are 1 where C is V.
"""


def forward_kl(log_q: torch.Tensor, log_p: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """KL(teacher || draft) in nats."""
    return (weights * log_p.exp() * (log_p - log_q)).sum(-1)


def cross_entropy(log_q: torch.Tensor, log_p: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """-log q of the teacher's best token: what greedy acceptance asks for, and no more."""
    return -log_q.gather(-1, log_p.argmax(-1, keepdim=True))[..., 0]


def acceptance(log_q: torch.Tensor, log_p: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """Sum of min(p, q): the chance that a sampled draft is accepted (Leviathan et al. 2023)."""
    return (weights * torch.minimum(log_p, log_q).exp()).sum(-1)


def total_variation(
    log_q: torch.Tensor, log_p: torch.Tensor, weights: torch.Tensor
) -> torch.Tensor:
    """Half the sum of |p - q|, which is 1 - `acceptance`: no objective alone, since its gradient
    vanishes where the two share no mass, and it does not train a head from a random start."""
    return 0.5 * (weights * (log_p.exp() - log_q.exp()).abs()).sum(-1)


def lk_hybrid(log_q: torch.Tensor, log_p: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """lambda KL + (1 - lambda) TV with lambda = exp(-3 acceptance), row by row: KL warms up what
    TV then finishes (LK losses, arXiv 2602.23881)."""
    mix = torch.exp(-3 * acceptance(log_q, log_p, weights).detach())
    kl, tv = forward_kl(log_q, log_p, weights), total_variation(log_q, log_p, weights)
    return mix * kl + (1 - mix) * tv


OBJECTIVES: dict[str, Objective] = {
    "forward_kl": forward_kl,
    "cross_entropy": cross_entropy,
    "lk_hybrid": lk_hybrid,
}

SPARSE_ROWS = 128  # drafts whose candidates are held at once: they stay in the cache of a CPU
EXACT_ROWS = 64  # the same over the whole vocabulary


@dataclass(frozen=True)
class Candidates:
    """The tokens that the softmax of a step runs over, shared by all its drafts."""

    ids: torch.Tensor
    """[C] tokens that stand for themselves (some draft's teacher ranks them high, or they are
    likely anywhere), then random negatives."""
    weights: torch.Tensor
    """[C] 1 for the former; for each of n negatives, the tokens it was drawn from / n."""
    slot_of: torch.Tensor
    """[V] where each token stands in `ids`; -1: not among them."""


def draw_candidates(kept: torch.Tensor, negatives: int, seed: int) -> Candidates:
    """The tokens kept, plus uniform negatives that stand in for the rest of V.

    Sums over the candidates, weighted, are unbiased for sums over all V tokens; with as many
    negatives as there are other tokens they are those sums. What is kept decides the variance
    alone: a likely token that is drawn once in thirty times, then to stand for thirty, would make
    most of it.

    Args:
        kept: [V] bool; the stored top tokens of every teacher must be among them.
        negatives: n, drawn without replacement from all other tokens.
        seed: of the draw, which is the same on every device and process.
    """
    own = kept.nonzero()[:, 0]  # the one place where a step waits for its device
    rest = len(kept) - len(own)
    count = min(negatives, rest)
    keys = _random_keys(len(kept), seed, kept.device).masked_fill(kept, torch.iinfo(torch.long).max)
    ids = torch.cat([own, keys.topk(count, largest=False).indices])
    weights = torch.ones(len(ids), device=kept.device)
    weights[len(own) :] = rest / max(count, 1)
    slot_of = torch.full_like(kept, -1, dtype=torch.long)
    slot_of[ids] = torch.arange(len(ids), device=kept.device)
    return Candidates(ids, weights, slot_of)


def _random_keys(count: int, seed: int, device: torch.device) -> torch.Tensor:
    """[count] int64, all different, whose order is random: SplitMix64 (Steele et al. 2014,
    doi:10.1145/2714064.2660195) of the numbers from 0. Whole numbers are the same on every device,
    which torch's generators are not."""
    first = seed * count % (1 << 63)
    z = (torch.arange(count, device=device) + first) * -7046029254386353131
    for shift, factor in ((30, -4658895280553007687), (27, -7723592293110705685)):
        z = (z ^ _shifted(z, shift)) * factor
    return z ^ _shifted(z, 31)


def _shifted(z: torch.Tensor, bits: int) -> torch.Tensor:
    """Int64 as if without a sign, shifted to the right."""
    return (z >> bits) & ((1 << (64 - bits)) - 1)


@dataclass(frozen=True)
class Teacher:
    """What the target says where N drafts are made."""

    hidden: torch.Tensor
    """[P, D] post-norm hidden states; several drafts may learn from one position."""
    at: torch.Tensor
    """[N] which of the P positions each draft learns from."""
    ids: torch.Tensor
    """[N, k] its best tokens there, best first."""
    logprobs: torch.Tensor
    """[N, k] of its full softmax at temperature 1."""


class RowResults(NamedTuple):
    """What an objective says of N drafts."""

    losses: torch.Tensor
    """[N] float32, with a gradient."""
    drafts: torch.Tensor
    """[N] the draft's best token among those that the softmax runs over."""


RowLoss: TypeAlias = Callable[[torch.Tensor, slice], RowResults]


def sparse_losses(
    states: torch.Tensor,
    target: Target,
    teacher: Teacher,
    candidates: Candidates,
    objective: Objective,
    temperature: float,
    dtype: torch.dtype,
    draft_table: torch.Tensor,
) -> RowResults:
    """The objective over candidates: exact on each teacher's stored top k, and its gradient that
    of the full softmax in expectation over the negatives.

    Args:
        states: [N, width] whose product with `draft_table` is the draft's logits.
        target: for its table and soft cap.
        teacher: of the N drafts.
        candidates: those of the step; `teacher.ids` are among them.
        objective: any of `OBJECTIVES`.
        temperature: of both distributions.
        dtype: in which the states meet the table.
        draft_table: [V, width], of `DraftHead.draft_table`; mostly the target's own.
    """
    # Not `table[ids]`: this copies whole rows, in a third of the time on a CPU.
    target_rows = target.table.index_select(0, candidates.ids)
    tied = draft_table is target.table
    draft_rows = target_rows if tied else draft_table.index_select(0, candidates.ids)
    table, log_weights = draft_rows.to(dtype), candidates.weights.log()
    # Once a position, not once a draft: the rounds of neighboring anchors learn from the same.
    said = target.logits(teacher.hidden, target_rows)  # [P, C]

    def loss_of(states: torch.Tensor, rows: slice) -> RowResults:
        slots, stored = candidates.slot_of[teacher.ids[rows]], teacher.logprobs[rows]
        log_p = teacher_log_p(said[teacher.at[rows]], slots, stored)
        log_p = tempered(log_p, log_weights, temperature)
        logits = torch.nn.functional.linear(states, table).float() / temperature
        log_q = logits - torch.logsumexp(logits + log_weights, dim=-1, keepdim=True)
        return RowResults(
            objective(log_q, log_p, candidates.weights),
            candidates.ids[log_q.detach().argmax(-1)],
        )

    return chunked(states, loss_of, SPARSE_ROWS, dtype)


def teacher_log_p(
    logits: torch.Tensor, slots: torch.Tensor, logprobs: torch.Tensor
) -> torch.Tensor:
    """Log-probabilities of the full softmax for candidates, from logits of the candidates alone.

    The normalizer over V follows from the stored top tokens, which came from it; they are put in
    as they are.

    Args:
        logits: [n, C] the target's logits of the candidates.
        slots: [n, k] where the stored tokens stand among them.
        logprobs: [n, k] stored.
    """
    normalizer = (logits.gather(-1, slots) - logprobs).mean(-1, keepdim=True)
    return (logits - normalizer).scatter(-1, slots, logprobs)


def tempered(log_p: torch.Tensor, log_weights: torch.Tensor, temperature: float) -> torch.Tensor:
    """softmax(logits / temperature) from log-probabilities [n, C] at temperature 1."""
    if temperature == 1:
        return log_p
    scaled = log_p / temperature
    return scaled - torch.logsumexp(scaled + log_weights, dim=-1, keepdim=True)


def exact_losses(
    states: torch.Tensor,
    target: Target,
    teacher: Teacher,
    objective: Objective,
    temperature: float,
    dtype: torch.dtype,
    draft_table: torch.Tensor,
) -> RowResults:
    """The objective over all of V, some rows at a time: the reference, at V / C times the cost.

    Arguments and returns as `sparse_losses`; of the teacher its hidden states are read.
    """
    table = draft_table.to(dtype)
    weights = torch.ones(len(table), device=states.device)

    def loss_of(states: torch.Tensor, rows: slice) -> RowResults:
        said = target.logits(teacher.hidden[teacher.at[rows]])
        log_p = (said / temperature).log_softmax(-1)
        logits = torch.nn.functional.linear(states, table).float() / temperature
        log_q = logits.log_softmax(-1)
        return RowResults(
            objective(log_q, log_p, weights),
            log_q.detach().argmax(-1),
        )

    return chunked(states, loss_of, EXACT_ROWS, dtype)


def chunked(states: torch.Tensor, loss_of: RowLoss, rows: int, dtype: torch.dtype) -> RowResults:
    """`loss_of` over some rows of `states` at a time, forward and backward at once.

    The tables are frozen, so the only gradient is that of the states: [N, D] are kept for the
    backward pass in place of [N, C] logits, and nothing is computed twice.

    Args:
        states: [N, D].
        loss_of: (states of some rows in `dtype`, which rows) -> results of those.
        rows: of a chunk.
        dtype: in which the states meet the table.
    """
    return RowResults(*_Chunked.apply(states, loss_of, rows, dtype))


class _Chunked(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, states: torch.Tensor, loss_of: RowLoss, rows: int, dtype: torch.dtype
    ) -> tuple[torch.Tensor, ...]:
        gradient = torch.empty_like(states)
        parts: list[RowResults] = []
        for start in range(0, len(states), rows):
            chunk = slice(start, start + rows)
            # The products are of the dtype in which the decoder computes them, not of autocast's.
            part = states[chunk].detach().to(dtype).requires_grad_()
            with torch.enable_grad(), torch.autocast(part.device.type, enabled=False):
                result = loss_of(part, chunk)
                # Each row's loss depends on its own state alone: the sum's gradient has them all.
                (gradient[chunk],) = torch.autograd.grad(result.losses.sum(), part)
            parts.append(result._replace(losses=result.losses.detach()))
        ctx.save_for_backward(gradient)
        losses, drafts = (torch.cat(results) for results in zip(*parts, strict=True))
        ctx.mark_non_differentiable(drafts)
        return losses, drafts

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        (gradient,) = ctx.saved_tensors
        return grads[0][:, None] * gradient, None, None, None

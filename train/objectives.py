"""Objectives as pure functions of tensors.

Letters: N rows, C candidates, k teacher tokens, V vocabulary.
"""

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Candidates:
    """The tokens over which a batch's softmax runs, shared by all its rows."""

    ids: torch.Tensor
    """[C] every token that some row's teacher ranks high, then random negatives."""
    log_weights: torch.Tensor
    """[C] added to the logits inside the normaliser: 0 for the former, log(V / n) for n
    negatives drawn from all V, -inf for negatives that are among the former."""
    slots: torch.Tensor
    """Shape of the teacher ids given: where each stands in `ids`."""


def draw_candidates(
    teacher_ids: torch.Tensor, vocab_size: int, negatives: int, generator: torch.Generator
) -> Candidates:
    """All teachers' top tokens, plus uniform negatives that stand in for the rest of V.

    With these weights the normaliser sum(exp(logit + log_weight)) is unbiased for the one over
    all V tokens (importance sampling, Bengio & Senecal 2008).

    Args:
        teacher_ids: [..., k] int64.
        vocab_size: V.
        negatives: n, drawn with replacement.
        generator: on the CPU, so that the draw is the same on every device.
    """
    top, slots = torch.unique(teacher_ids, return_inverse=True)
    drawn = torch.randint(vocab_size, (negatives,), generator=generator).to(top.device)
    weight = torch.tensor(vocab_size / negatives, device=top.device).log()
    clashes = torch.isin(drawn, top)
    return Candidates(
        ids=torch.cat([top, drawn]),
        log_weights=torch.cat(
            [torch.zeros(len(top), device=top.device), weight.masked_fill(clashes, -torch.inf)]
        ),
        slots=slots,
    )


def sparse_forward_kl(
    logits: torch.Tensor,
    log_weights: torch.Tensor,
    slots: torch.Tensor,
    teacher_logprobs: torch.Tensor,
) -> torch.Tensor:
    """KL(teacher || draft) over the teacher's top k tokens and one bucket for all others.

    Args:
        logits: [N, C] the draft's logits of the candidates.
        log_weights: [C] from `draw_candidates`.
        slots: [N, k] where each row's teacher tokens stand among the candidates.
        teacher_logprobs: [N, k] of the full softmax; what is missing to 1 is the tail bucket.

    Returns:
        [N] float32, in nats.
    """
    logits = logits.float()
    log_normaliser = torch.logsumexp(logits + log_weights, dim=-1, keepdim=True)
    log_q = logits.gather(-1, slots) - log_normaliser
    p = teacher_logprobs.exp()
    tail_p = (1 - p.sum(-1)).clamp_min(1e-6)
    # The sampled normaliser can fall below the mass of the top tokens by its noise alone.
    tail_q = (1 - log_q.exp().sum(-1)).clamp_min(1e-6)
    return (p * (teacher_logprobs - log_q)).sum(-1) + tail_p * (tail_p / tail_q).log()

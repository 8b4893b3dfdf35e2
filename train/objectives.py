"""Objectives as pure functions of tensors.

Letters: N drafts, C candidates (tokens that the softmax runs over), V vocabulary.
"""

from collections.abc import Callable
from typing import Literal, TypeAlias

import torch

Objective: TypeAlias = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]
"""(log_q [N, C] of the draft, log_p [N, C] of the teacher, weights [C]) -> [N] losses.

Log-probabilities are of the full softmax. A weight says how many tokens of the vocabulary its
candidate stands for, so that sums over candidates estimate sums over V; all are 1 where C is V.
"""
ObjectiveName = Literal["forward_kl", "cross_entropy", "total_variation", "lk_hybrid"]


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
    """Half the sum of |p - q|, which is 1 - `acceptance`. Its gradient vanishes where the two
    share no mass, so that it does not train a head from a random start."""
    return 0.5 * (weights * (log_p.exp() - log_q.exp()).abs()).sum(-1)


def lk_hybrid(log_q: torch.Tensor, log_p: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """lambda KL + (1 - lambda) TV with lambda = exp(-3 acceptance), row by row: KL warms up what
    TV then finishes (LK losses, arXiv 2602.23881)."""
    mix = torch.exp(-3 * acceptance(log_q, log_p, weights).detach())
    kl, tv = forward_kl(log_q, log_p, weights), total_variation(log_q, log_p, weights)
    return mix * kl + (1 - mix) * tv


OBJECTIVES: dict[ObjectiveName, Objective] = {
    "forward_kl": forward_kl,
    "cross_entropy": cross_entropy,
    "total_variation": total_variation,
    "lk_hybrid": lk_hybrid,
}

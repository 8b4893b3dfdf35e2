"""Acceptance as counts that add up over rounds, prompts and processes, divided once, at the end;
and the recall of ordered embeddings.

Acceptance through the clusters cannot exceed the recall of the teacher's best token.

Letters: K draft tokens a round, N drafts, C clusters, k teacher tokens.
"""

from dataclasses import dataclass
from itertools import pairwise
from operator import add
from typing import Any

import torch


@dataclass(frozen=True)
class AcceptanceCounts:
    """Counts over rounds; terms as in Leviathan et al. 2023 (arXiv 2211.17192)."""

    rounds: int
    """Rounds: one draft and one verification each."""
    drafted: int
    """Draft tokens proposed."""
    reached: tuple[int, ...]
    """[K] rounds that proposed a k-th draft and accepted drafts 1..k-1."""
    accepted: tuple[int, ...]
    """[K] rounds that accepted draft k (and so 1..k-1)."""

    @classmethod
    def of_rounds(
        cls, rounds: list[tuple[int, int]], num_assistant_tokens: int
    ) -> "AcceptanceCounts":
        """From one (proposed, accepted) pair a round; a round without drafts counts as a round."""
        ks = range(1, num_assistant_tokens + 1)
        return cls(
            rounds=len(rounds),
            drafted=sum(proposed for proposed, _ in rounds),
            reached=tuple(sum(p >= k and n >= k - 1 for p, n in rounds) for k in ks),
            accepted=tuple(sum(n >= k for _, n in rounds) for k in ks),
        )

    def __add__(self, other: "AcceptanceCounts") -> "AcceptanceCounts":
        return AcceptanceCounts(
            self.rounds + other.rounds,
            self.drafted + other.drafted,
            tuple(a + b for a, b in zip(self.reached, other.reached, strict=True)),
            tuple(a + b for a, b in zip(self.accepted, other.accepted, strict=True)),
        )

    @property
    def acceptance_length(self) -> float:
        """Mean tokens emitted a round, bonus token included: 1 + mean accepted."""
        return 1 + sum(self.accepted) / max(self.rounds, 1)

    @property
    def acceptance_rate(self) -> float:
        """Accepted draft tokens / proposed draft tokens."""
        return sum(self.accepted) / max(self.drafted, 1)

    @property
    def conditional_acceptance_rate(self) -> list[float]:
        """[K] a_k: P(draft k accepted, given that drafts 1..k-1 were)."""
        return [a / max(r, 1) for a, r in zip(self.accepted, self.reached, strict=True)]

    @property
    def cumulative_acceptance_rate(self) -> list[float]:
        """[K] share of all rounds that accepted draft k; vLLM's per-position acceptance rate."""
        return [a / max(self.rounds, 1) for a in self.accepted]

    @property
    def accepted_histogram(self) -> list[int]:
        """[K + 1] rounds that accepted exactly 0 .. K drafts."""
        at_least = [self.rounds, *self.accepted, 0]
        return [a - b for a, b in pairwise(at_least)]


def zero_counts(num_assistant_tokens: int) -> AcceptanceCounts:
    """The neutral element of the sum."""
    return AcceptanceCounts.of_rounds([], num_assistant_tokens)


def replay_rounds(matches: torch.Tensor, judged: torch.Tensor) -> AcceptanceCounts:
    """Replay one text as the decoder would: start, accept n drafts, jump n + 1 rows.

    Averaging over all rows instead overstates acceptance: rounds begin where drafts failed.

    Args:
        matches: [R, K] bool, whether draft k from row r is what the target says, rows in order.
        judged: [R, K] bool, False where the text ends before draft k.

    Returns:
        Counts over the rounds replayed.
    """
    leading = (matches & judged).long().cumprod(dim=1).sum(dim=1).tolist()
    proposed = judged.sum(dim=1).tolist()
    rounds, row = [], 0
    while row < len(leading):
        rounds.append((proposed[row], leading[row]))
        row += leading[row] + 1
    return AcceptanceCounts.of_rounds(rounds, matches.shape[1])


TOP = (8, 16, 32, 64)
"""Numbers of clusters at which recall is reported."""


@dataclass(frozen=True)
class RecallCounts:
    """Sums over drafts; divided once, at the end."""

    drafts: float = 0.0
    """Drafts counted."""
    argmax: tuple[float, ...] = (0.0,) * len(TOP)
    """For each of `TOP`: drafts whose teacher's best token is in that many best clusters."""
    mass: tuple[float, ...] = (0.0,) * len(TOP)
    """For each of `TOP`: the teacher's probability in them, over its stored top tokens."""
    all_mass: float = 0.0
    """That of all its stored top tokens."""

    @classmethod
    def of(
        cls, cluster_logits: torch.Tensor, clusters: torch.Tensor, logprobs: torch.Tensor
    ) -> "RecallCounts":
        """Counts of N drafts.

        Args:
            cluster_logits: [N, C] centroid scores.
            clusters: [N, k] of the teacher's top tokens, best first.
            logprobs: [N, k] of those.
        """
        best = min(max(TOP), cluster_logits.shape[1])
        ranks = torch.full(cluster_logits.shape, best, device=cluster_logits.device)
        top = cluster_logits.topk(best, dim=1).indices
        ranks.scatter_(1, top, torch.arange(best, device=ranks.device).expand_as(top))
        found, mass = ranks.gather(1, clusters), logprobs.float().exp()
        return cls(
            drafts=float(len(clusters)),
            argmax=tuple(float((found[:, 0] < n).sum()) for n in TOP),
            mass=tuple(float((mass * (found < n)).sum()) for n in TOP),
            all_mass=float(mass.sum()),
        )

    def __add__(self, other: "RecallCounts") -> "RecallCounts":
        return RecallCounts(
            self.drafts + other.drafts,
            tuple(map(add, self.argmax, other.argmax)),
            tuple(map(add, self.mass, other.mass)),
            self.all_mass + other.all_mass,
        )

    @staticmethod
    def tops() -> list[str]:
        """Names of the shares in `describe`."""
        return [str(n) for n in TOP]

    def describe(self) -> dict[str, Any]:
        """`argmax` and `mass`, each number of clusters -> share."""
        drafts, all_mass = max(self.drafts, 1), max(self.all_mass, 1e-9)
        return {
            "argmax": dict(zip(self.tops(), [n / drafts for n in self.argmax], strict=True)),
            "mass": dict(zip(self.tops(), [mass / all_mass for mass in self.mass], strict=True)),
        }

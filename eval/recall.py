"""What ordered embeddings keep: recall of the teacher's tokens in the best clusters.

Acceptance through the clusters cannot exceed the recall of the teacher's best token.

Letters: N drafts, C clusters, k teacher tokens.
"""

from dataclasses import dataclass
from typing import Any

import torch

TOP = (8, 16, 32, 64)
"""Numbers of clusters at which recall is reported."""


@dataclass(frozen=True)
class RecallCounts:
    """Sums over drafts; divided once, at the end."""

    drafts: float
    """Drafts counted."""
    argmax: tuple[float, ...]
    """For each of `TOP`: drafts whose teacher's best token is in that many best clusters."""
    mass: tuple[float, ...]
    """For each of `TOP`: the teacher's probability in them, over its stored top tokens."""
    all_mass: float
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
        return RecallCounts.of_sums([a + b for a, b in zip(self.sums(), other.sums(), strict=True)])

    def sums(self) -> list[float]:
        """All counts in one list, to be added up over processes."""
        return [self.drafts, self.all_mass, *self.argmax, *self.mass]

    @classmethod
    def of_sums(cls, sums: list[float]) -> "RecallCounts":
        """The inverse of `sums`."""
        drafts, all_mass, *rest = sums
        return cls(drafts, tuple(rest[: len(TOP)]), tuple(rest[len(TOP) :]), all_mass)

    @staticmethod
    def tops() -> list[str]:
        """Names of the shares in `describe`."""
        return [str(n) for n in TOP]

    def describe(self) -> dict[str, Any]:
        """`argmax` and `mass`, each number of clusters -> share."""
        return {
            "argmax": {
                str(n): a / max(self.drafts, 1) for n, a in zip(TOP, self.argmax, strict=True)
            },
            "mass": {
                str(n): m / max(self.all_mass, 1e-9) for n, m in zip(TOP, self.mass, strict=True)
            },
        }


def zero_recall() -> RecallCounts:
    """The neutral element of the sum."""
    return RecallCounts.of_sums([0.0] * (2 + 2 * len(TOP)))

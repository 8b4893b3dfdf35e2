"""How many tokens to draft in a round.

Speedup at K draft tokens is tau / (K*c + v(K)), in steps of the target (c a draft step, v(K)
the verification of K draft tokens, tau the tokens emitted). A longer draft pays while what it adds
to tau is worth more than what it costs.

Letters: K draft tokens of a round, k of them drafted so far.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from math import prod
from typing import ClassVar, Protocol

BINS = 8  # of confidence, each with an acceptance rate of its own
HOPED = 0.8  # acceptance rate of a place not tried yet: high, so that it is tried
PRIOR = 4.0  # drafts that a rate is assumed to have seen
FORGETTING = 0.98  # a draft's weight beside the next one's


class DraftLength(Protocol):
    """A rule that ends drafts."""

    reads_confidence: ClassVar[bool]
    """Whether `goes_on` has to be asked after each draft."""

    def limit(self) -> int:
        """Draft tokens of this round at most; 0: none, the target decodes one step plainly."""
        ...

    def goes_on(self, confidences: list[float]) -> bool:
        """Whether to draft another token, after those with these confidences."""
        ...

    def learn(self, confidences: list[float], drafted: int, accepted: int) -> None:
        """What became of a round's drafts."""
        ...


@dataclass
class Constant:
    """Always K, as the stock decoder does."""

    num_assistant_tokens: int
    reads_confidence: ClassVar[bool] = False

    def limit(self) -> int:
        return self.num_assistant_tokens

    def goes_on(self, confidences: list[float]) -> bool:
        return True

    def learn(self, confidences: list[float], drafted: int, accepted: int) -> None:
        pass


@dataclass
class Heuristic(Constant):
    """Two more after a round that accepted all, one less after any other.

    Mirrors `AssistedCandidateGenerator.update_candidate_strategy` of transformers 5.20 to 5.24,
    which knows no `most`.
    """

    most: int | None = None
    """Drafts of a round that are never exceeded."""

    def learn(self, confidences: list[float], drafted: int, accepted: int) -> None:
        change = 2 if accepted == drafted else -1
        self.num_assistant_tokens = max(1, self.num_assistant_tokens + change)
        if self.most is not None:
            self.num_assistant_tokens = min(self.num_assistant_tokens, self.most)


@dataclass
class Confident(Constant):
    """Up to K, while the head is sure of its drafts."""

    threshold: float
    """Least confidence of the last draft for another one."""
    reads_confidence: ClassVar[bool] = True

    def goes_on(self, confidences: list[float]) -> bool:
        return confidences[-1] >= self.threshold


@dataclass
class Rate:
    """A share that forgets what was long ago and starts from an assumption."""

    assumed: float
    hits: float = 0.0
    tries: float = 0.0

    def count(self, hit: bool) -> None:
        self.fade()
        self.hits, self.tries = self.hits + hit, self.tries + 1

    def fade(self) -> None:
        """Forget a little, so that what has not been tried for long is tried again."""
        self.hits, self.tries = self.hits * FORGETTING, self.tries * FORGETTING

    @property
    def value(self) -> float:
        return (self.hits + PRIOR * self.assumed) / (self.tries + PRIOR)


@dataclass
class CostRule:
    """As many drafts as pay on this machine, told from the head's confidence.

    A round goes on as long as some longer draft promises more tokens than its cost would earn
    otherwise, at the rate (tokens a target step) of the rounds so far: optimal for a renewal
    process whose probabilities are right. The probability of a draft is learned while decoding:
    the acceptance rate of drafts of like confidence, and for drafts not made yet that of their
    place in the round. Where no draft pays it decodes plainly, and tries again now and then.
    """

    c: float
    """A draft step, in target steps."""
    v: Sequence[float]
    """v(0) = 1, v(1) .. v(K): verification of so many draft tokens, in target steps."""
    reads_confidence: ClassVar[bool] = True
    tokens: float = field(default=1.0, init=False)
    cost: float = field(default=1.0, init=False)

    def __post_init__(self) -> None:
        if len(self.v) < 2 or self.v[0] != 1:
            raise ValueError(f"v has to begin with v(0) = 1 and go on, not {list(self.v)}")
        self.of_confidence = [Rate((i + 0.5) / BINS) for i in range(BINS)]
        self.of_place = [Rate(HOPED) for _ in self.v[1:]]

    @property
    def rate(self) -> float:
        """Tokens a target step, of the rounds so far; plain decoding makes 1."""
        return max(1.0, self.tokens / self.cost)

    def limit(self) -> int:
        return len(self.v) - 1 if self.goes_on([]) else 0

    def goes_on(self, confidences: list[float]) -> bool:
        k, gain = len(confidences), 0.0
        reached = prod(self._of(confidence).value for confidence in confidences)
        for longer in range(k + 1, len(self.v)):
            reached *= self.of_place[longer - 1].value
            gain += reached
            if gain > self.rate * ((longer - k) * self.c + self.v[longer] - self.v[k]):
                return True
        return False

    def promise(self) -> float:
        """Tokens a target step that the best length promises before a round; plain decoding: 1."""
        best, reached, tokens = 1.0, 1.0, 1.0
        for k in range(1, len(self.v)):
            reached *= self.of_place[k - 1].value
            tokens += reached
            best = max(best, tokens / (k * self.c + self.v[k]))
        return best

    def learn(self, confidences: list[float], drafted: int, accepted: int) -> None:
        if not drafted:
            for rate in self.of_place:
                rate.fade()
        for i, confidence in enumerate(confidences[: accepted + 1]):
            self._of(confidence).count(i < accepted)
            self.of_place[i].count(i < accepted)
        self.tokens = self.tokens * FORGETTING + 1 + accepted
        self.cost = self.cost * FORGETTING + drafted * self.c + self.v[drafted]

    def _of(self, confidence: float) -> Rate:
        return self.of_confidence[min(BINS - 1, int(confidence * BINS))]

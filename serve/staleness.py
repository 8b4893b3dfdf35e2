"""Whether a served head accepts less than its report says: a test that may be looked at any time.

Each round either accepts draft k or does not. A bettor holds against the head: it says that draft k
is accepted with a share c of the rate that the head is held to, and its money is multiplied by the
likelihood of what came under its rate over that under the head's. While the head accepts at least
as much as it is held to, whatever came before, no bettor's money grows in expectation, and so
neither does that of many who share one unit: the chance that it ever reaches 1 / alpha is at most
alpha (Ville's inequality), however often and however long anybody looks (Ramdas et al. 2023, "Game-
theoretic statistics and safe anytime-valid inference", arXiv 2210.01948).

- Some bet on single drafts, some on the tokens that a round accepts, which needs no positions.
- A head may go stale late, when the first bettors are poor: others begin later, with shares of the
  unit that add up to one over all time (Shin et al. 2023, "E-detectors", arXiv 2203.03532).
- Rounds of one text are alike. Money is multiplied by the d-th root, where the report's own texts
  say that sums over rounds vary d times as much as if rounds were independent (the design effect of
  samples of clusters, in which long texts weigh more). A root of a fair bet is never better than
  fair, so the bound holds where rounds are independent. Where they are not it is an approximation:
  two moments of the report's texts stand for all that they have in common.

Letters: K draft tokens a round, B bettors, S beginnings.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

SHARES = np.array([0.9, 0.75, 0.6, 0.4, 0.2])
"""Of the rate that a head is held to, what bettors say it accepts."""
GAP = 50  # rounds between two beginnings, at least
POOR = -60.0  # log of money that will not come back: such beginnings are forgotten


@dataclass(frozen=True)
class Rounds:
    """What a server counted over some rounds."""

    rounds: int
    """With drafts."""
    accepted: int
    """Tokens of drafts 1 .. K."""
    by_position: tuple[int, ...] | None = None
    """[K] rounds that accepted draft k; None: it does not tell."""
    lacking: tuple[float, ...] = ()
    """[K] at most so many rounds had no draft k, since their text was about to end; empty: none."""
    uncounted: float = 0.0
    """At most so many tokens would have been accepted beside, had all rounds had K drafts that are
    counted."""

    @property
    def is_possible(self) -> bool:
        """Whether rounds can come out so: none accepts draft k without draft k - 1."""
        falling = (self.rounds, *(self.by_position or ()), 0)
        return list(falling) == sorted(falling, reverse=True) and self.accepted >= 0

    def __add__(self, other: "Rounds") -> "Rounds":
        by_position = None
        if self.by_position is not None and other.by_position is not None:
            pairs = zip(self.by_position, other.by_position, strict=True)
            by_position = tuple(a + b for a, b in pairs)
        return Rounds(self.rounds + other.rounds, self.accepted + other.accepted, by_position)

    @property
    def acceptance_length(self) -> float:
        """Mean tokens of a round, with the target's own."""
        return 1 + self.accepted / max(self.rounds, 1)

    @property
    def acceptance_by_position(self) -> list[float] | None:
        """[K] share of all rounds that accepted draft k; None: not known."""
        return (
            None
            if self.by_position is None
            else [n / max(self.rounds, 1) for n in self.by_position]
        )


class StaleTest:
    """The bettors and their money.

    Args:
        rates: [K] conditional acceptance that the head is held to: of the rounds that accepted
            drafts 1 .. k-1, the share that accepts draft k.
        false_alarms: alpha, the chance of calling a head stale, ever, that is not.
    """

    def __init__(self, rates: Sequence[float], false_alarms: float):
        held = np.clip(np.array(rates, dtype=float), 1e-6, 1 - 1e-6)
        self.rates, self.false_alarms = held, false_alarms
        self._accepted = np.log(SHARES)  # [5], of each accepted draft
        self._rejected = np.log((1 - np.outer(held, SHARES)) / (1 - held[:, None]))  # [K, 5]
        # P(exactly n accepted) at these rates, n = 0 .. K; a head that accepts more at each draft
        # accepts stochastically more tokens, and so E[c ^ accepted] is no larger there.
        reached = np.cumprod([1.0, *held])
        exactly = reached * np.append(1 - held, 1.0)
        self._round = np.log(SHARES[:, None] ** np.arange(len(held) + 1) @ exactly)  # [5]
        bettors = (1 + len(held)) * len(SHARES)
        half = np.full(bettors, 0.5 / (bettors - len(SHARES)))
        half[: len(SHARES)] = 0.5 / len(SHARES)
        self._unit = np.log(half)  # [B] of one beginning
        self._money = np.empty((0, bettors))  # [S, B] logs
        self._began: list[int] = []
        self.rounds = 0
        """Seen so far."""
        self._restarts = self._beginnings = 0
        self.restart()

    def restart(self) -> None:
        """The server was started again, perhaps with another head: beginnings of their own."""
        self._restarts, self._beginnings = self._restarts + 1, 0
        self._begin()

    def _begin(self) -> None:
        self._beginnings += 1
        # 1/2 + 1/6 + 1/12 + ... = 1, over restarts and within each.
        shares = [n * (n + 1) for n in (self._restarts, self._beginnings)]
        self._money = np.vstack([self._money, self._unit - np.log(shares).sum()])
        self._began.append(self.rounds)

    def observe(self, seen: Rounds, design_effect: float) -> None:
        """Take in the rounds since the last call.

        Args:
            seen: of K drafts.
            design_effect: d of them, 1 or more.
        """
        self._money += self._gains(seen) / design_effect
        self.rounds += seen.rounds
        best = self._money.max(axis=1)
        if (best < POOR).any():
            kept = best >= POOR
            self._money = self._money[kept]
            self._began = [b for b, keep in zip(self._began, kept, strict=True) if keep]
        if not self._began or self.rounds - self._began[-1] >= GAP:
            self._begin()

    def _gains(self, seen: Rounds) -> np.ndarray:
        """[B] logs; what may not have been drafted is never held against the head."""
        tokens = seen.accepted + seen.uncounted
        gains = [tokens * self._accepted - seen.rounds * self._round]
        for k, rejected in enumerate(self._rejected):
            if seen.by_position is None:
                gains.append(np.zeros(len(SHARES)))
                continue
            reached = seen.by_position[k - 1] if k else seen.rounds
            lacking = seen.lacking[k] if seen.lacking else 0.0
            failed = max(0.0, reached - seen.by_position[k] - lacking)
            gains.append(seen.by_position[k] * self._accepted + failed * rejected)
        return np.concatenate(gains)

    @property
    def evidence(self) -> float:
        """The money of all bettors, of one unit in the beginning; the log of it."""
        return float(np.logaddexp.reduce(self._money, axis=None))

    @property
    def evidence_factor(self) -> float:
        """The money itself, as far as floats go."""
        return float(np.exp(min(self.evidence, 700.0)))

    @property
    def is_stale(self) -> bool:
        """Whether it has reached 1 / alpha."""
        return self.evidence >= -np.log(self.false_alarms)

    @property
    def strongest(self) -> tuple[int, int]:
        """The richest bettor: the rounds seen when it began, and the draft that it bets on, 0 for
        all of them."""
        row, bettor = np.unravel_index(int(self._money.argmax()), self._money.shape)
        return self._began[row], int(bettor) // len(SHARES)

    def rounds_to_tell(self, share: float, design_effect: float) -> int:
        """About how many rounds tell, from now on, that a head accepts `share` of what it is held
        to at each draft."""
        rates = self.rates * share
        reached = np.cumprod([1.0, *rates])
        mean = float(reached[1:].sum())
        gains = [mean * self._accepted - self._round]
        for k, rejected in enumerate(self._rejected):
            failed = reached[k] - reached[k + 1]
            gains.append(reached[k + 1] * self._accepted + failed * rejected)
        needed = -np.log(self.false_alarms) - self._unit + np.log(2 * (self._beginnings + 1) ** 2)
        gained = np.concatenate(gains) / design_effect
        return int(np.ceil((needed / np.maximum(gained, 1e-9)).min()))

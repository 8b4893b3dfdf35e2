"""Rounds walked over stored texts, text by text, so that heads can be compared on the same ones.

Letters: K draft tokens a round, S resamples.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from headstart.data.store import ActivationStore
from headstart.eval.acceptance import AcceptanceCounts, zero_counts
from headstart.eval.simulate import simulate_acceptance
from headstart.eval.statistics import interval, resampled
from headstart.eval.verdict import ends_in_loop
from headstart.heads.progress import progress_bar
from headstart.heads.targets import Target
from headstart.heads.unroll import DraftHead


@dataclass(frozen=True)
class Walked:
    """One text."""

    id: str
    category: str
    counts: AcceptanceCounts
    loops: bool | None
    """Whether what the target wrote ends in a loop, which flatters drafts of any kind. None: not
    known, of a text that an earlier version walked."""

    @classmethod
    def read(cls, row: dict[str, Any]) -> "Walked":
        """Of what `row` gave."""
        reached, accepted = tuple(row["reached"]), tuple(row["accepted"])
        counts = AcceptanceCounts(row["rounds"], row["drafted"], reached, accepted)
        return cls(row["id"], row["category"], counts, row.get("loops"))

    def row(self) -> dict[str, Any]:
        """For JSON."""
        own = {"id": self.id, "category": self.category, "loops": self.loops}
        return own | asdict(self.counts)


def walk_texts(
    head: DraftHead,
    target: Target,
    stores: dict[str, ActivationStore],
    k: int,
    doing: str,
    ahead: Mapping[str, int] | None = None,
    greedy: bool = False,
) -> dict[str, list[Walked]]:
    """Walk rounds over every text of some stores.

    Args:
        head: in any mode.
        target: that wrote the texts.
        stores: name -> texts.
        k: K.
        doing: label of the progress bar.
        ahead: name -> where drafts stand there (`DraftHead.forward`); None: as in transformers.
        greedy: leave out the texts that were sampled.

    Returns:
        Name -> the texts in which there was a round.
    """
    found: dict[str, list[Walked]] = {}
    which = {
        name: [i for i, entry in enumerate(store.entries) if not (greedy and entry.temperature)]
        for name, store in stores.items()
    }
    with progress_bar() as bar:
        total = sum(map(len, which.values()))
        task = bar.add_task(f"{doing} (texts)", total=total, status="")
        for name, store in stores.items():
            found[name] = []
            for i in which[name]:
                entry = store.entries[i]
                at = 1 if ahead is None else ahead[name]
                counts = simulate_acceptance(head, target, store, k, [i], at).acceptance
                if counts.rounds:
                    [text] = store.read([i])
                    loops = ends_in_loop(text.ids[text.loss_mask].tolist())
                    found[name].append(Walked(entry.id, entry.category, counts, loops))
                bar.update(task, advance=1)
    return found


def length_draws(texts: Sequence[Walked]) -> np.ndarray:
    """[1 + S] acceptance length: as it is, then over texts drawn anew; texts with the same ids in
    the same order are drawn alike."""
    ids = [text.id for text in texts]
    values = [[text.counts.rounds, sum(text.counts.accepted)] for text in texts]
    sums = resampled(ids, values)
    lengths: np.ndarray = 1 + sums[:, 1] / np.maximum(sums[:, 0], 1)
    return lengths


def total_counts(texts: Sequence[Walked]) -> AcceptanceCounts:
    """Of all texts together."""
    k = len(texts[0].counts.accepted)
    return sum((text.counts for text in texts), zero_counts(k))


def describe_walked(texts: Sequence[Walked]) -> dict[str, Any]:
    """Acceptance length with its 95% interval, without looping texts (None: all loop), conditional
    acceptance, and each category's."""
    straight = [text for text in texts if not text.loops]
    categories = sorted({text.category for text in texts})
    of_category = {c: [text for text in texts if text.category == c] for c in categories}
    draws = length_draws(texts)
    return {
        "acceptance_length": float(draws[0]),
        "acceptance_length_interval": interval(draws),
        "looping_share": 1 - len(straight) / len(texts),
        "acceptance_length_without_loops": total_counts(straight).acceptance_length
        if straight
        else None,
        "conditional_acceptance_rate": total_counts(texts).conditional_acceptance_rate,
        "texts": len(texts),
        "rounds": total_counts(texts).rounds,
        "categories": {
            c: {"acceptance_length": total_counts(own).acceptance_length, "texts": len(own)}
            for c, own in of_category.items()
        },
    }

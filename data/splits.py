"""Prompts held out of training, such that no source and no cluster of siblings is on both sides.

Siblings are made from one template, or cut from overlapping passages: they share much of their
text, so a head that was trained on one of them shows on the other what it has learned by heart. A
cluster is what siblings, their siblings and so on come to.
"""

import random
from collections import Counter, defaultdict
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol
from zlib import crc32

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view

from headstart.common.console import print_once
from headstart.data.contamination import WORDS, turn_words
from headstart.data.prompts import Prompt, round_robin

SIBLINGS = 0.3
"""Of the shingles of the shorter one of two prompts, in the other too: they are siblings."""
EVERYWHERE = 0.9
"""A shingle in more of the prompts than this, as of a system prompt that all share, parts nobody
from anybody and is not looked at."""
COMPARED = 16
"""Prompts, the shortest first, with which all that share a shingle are compared: every pair where
no more share it; where thousands share a template, each of them with its shortest. On
`builtin:chat_train` this finds the clusters that comparing all pairs finds."""
LEFT_OUT = 0.1
"""Most of the prompts that may be left out of training for being siblings of held-out ones."""

# Odd 64-bit numbers without a pattern: what a shingle's words are multiplied by, modulo 2**64.
FACTORS = np.random.default_rng(0).integers(2**63, size=WORDS, dtype=np.uint64) * 2 + 1
BYTES = 8  # of a shingle


class Sourced(Protocol):
    """What can be split: prompts, and conversations alike."""

    @property
    def source(self) -> str: ...
    @property
    def category(self) -> str: ...


@dataclass(frozen=True)
class LeftOut:
    """What a split did to what it could have trained on, as `data` of summary.json has it."""

    siblings_left_out: int
    """Not trained on: siblings or copies of what is held out, or of its sources."""
    siblings_straddling: int
    """Trained on though a sibling is held out, where there was no other way."""


@dataclass(frozen=True)
class Split:
    """Indices of what was split, in order."""

    training: list[int]
    held_out: list[int]
    left_out: list[int]
    """On neither side: of a source or a cluster of which a part is held out."""
    straddling: list[int]
    """Of `training`: siblings of held-out ones, where there is no split without."""

    def of_rest(self, first: int) -> "Split":
        """The split of what comes after the first so many items, numbered from 0."""
        parts = (self.training, self.held_out, self.left_out, self.straddling)
        return Split(*([i - first for i in part if i >= first] for part in parts))

    def without(self, others: Collection[int]) -> "Split":
        """The split with these left out of training too."""
        apart = {i for i in self.training if i in others}
        return Split(
            [i for i in self.training if i not in apart],
            self.held_out,
            sorted({*self.left_out, *apart}),
            [i for i in self.straddling if i not in apart],
        )

    def tell(self, what: str, copies: int = 0) -> LeftOut:
        """Print in a line what siblings changed, if anything; `copies` of what is held out are not
        trained on either."""
        if self.left_out:
            print_once(
                f"Held out: {len(self.left_out):,} {what} more are not trained on, since they are "
                "siblings of those (from one source, or one template)"
            )
        if self.straddling:
            print_once(
                f"Held out: {len(self.straddling):,} of {len(self.training):,} {what} to train on "
                "are siblings of those, from templates too large to be held out whole: held-out "
                "figures say what a head does on more of the same"
            )
        return LeftOut(len(self.left_out) + copies, len(self.straddling))


def cluster(prompts: Sequence[Prompt]) -> list[int]:
    """The number of each prompt's cluster; two have one number where they are siblings, or linked
    by a chain of siblings.

    What users write is compared, as in `remove_contaminated`. A prompt of fewer than `WORDS` words
    is alone. The order of the prompts changes nothing; time and memory are linear in their text.
    """
    found = [_hashed_shingles(prompt) for prompt in prompts]
    # Equal prompts count once: copies make no template.
    distinct = sorted({s for s in found if s}, key=lambda s: (len(s), s))
    sizes = [len(shingles) // BYTES for shingles in distinct]
    shared: list[set[int]] = [set() for _ in distinct]
    groups = set()  # a template's shingles have the same holders
    for number, holders in enumerate(_holders(distinct)):
        if len(holders) > EVERYWHERE * len(distinct):
            for holder in holders:
                sizes[holder] -= 1
        else:
            groups.add(holders)
            for holder in holders:
                shared[holder].add(number)
    joined = Joined(len(distinct))
    for holders in groups:
        for place, shorter in enumerate(holders[:COMPARED]):
            for longer in holders[place + 1 :]:
                if joined.leader(shorter) != joined.leader(longer) and (
                    len(shared[shorter] & shared[longer])
                    >= SIBLINGS * min(sizes[shorter], sizes[longer])
                ):
                    joined.join(shorter, longer)
    numbers = {shingles: joined.leader(number) for number, shingles in enumerate(distinct)}
    alone = len(distinct)
    return [numbers[s] if s else alone + i for i, s in enumerate(found)]


def _hashed_shingles(prompt: Prompt) -> bytes:
    """The distinct shingles of a prompt, sorted, 64 bits each: words would take twenty times the
    memory."""
    hashes = [np.empty(0, np.uint64)]
    for words in turn_words(prompt):
        if len(words) >= WORDS:
            numbers = np.array([crc32(word.encode()) for word in words], np.uint64)
            hashes.append(sliding_window_view(numbers, WORDS) @ FACTORS)
    return np.unique(np.concatenate(hashes)).tobytes()


def _holders(distinct: Sequence[bytes]) -> Iterator[tuple[int, ...]]:
    """Which prompts hold a shingle, for each that several hold."""
    sizes = [len(shingles) // BYTES for shingles in distinct]
    everything = np.frombuffer(b"".join(distinct), np.uint64)
    order = np.argsort(everything, kind="stable")
    owners = np.repeat(np.arange(len(distinct)), sizes)[order]
    _, starts, times = np.unique(everything[order], return_index=True, return_counts=True)
    for start, end in zip(starts[times > 1], (starts + times)[times > 1], strict=True):
        yield tuple(owners[start:end].tolist())


class Joined:
    """Numbers, each in a set of its own until sets are joined."""

    def __init__(self, count: int):
        self._leaders = list(range(count))

    def leader(self, number: int) -> int:
        """One of the set, the same for all of it."""
        leaders = self._leaders
        while leaders[number] != number:
            leaders[number] = number = leaders[leaders[number]]
        return number

    def join(self, one: int, other: int) -> None:
        self._leaders[self.leader(other)] = self.leader(one)


def hold_out(
    items: Sequence[Sourced],
    clusters: Sequence[int],
    count: int,
    seed: int,
    key: str = "data.validation_conversations",
    among: Sequence[bool] | None = None,
) -> Split:
    """Hold `count` items out such that no source and no cluster is on both sides.

    Whole sources, with those that share a cluster with them, are drawn with `seed` and dealt over
    the categories; what has more items than are still wanted stays in training. Where these do not
    come to `count`, the smallest such group that has enough is held out in part, and the rest of it
    left out, as long as that is not more than `LEFT_OUT` of all. A group that has most of a
    category of `count` items or more is not held out while others will do: a head that never saw a
    kind of text would be judged on little else. Where no group will do, as in a set made from a few
    templates, the split is by source alone and siblings straddle it: whoever tunes for one template
    is served on it too, and has no other prompts to be judged on.

    Args:
        items: what to split.
        clusters: of each item.
        count: of items to hold out.
        seed: of the draw.
        key: what the user gives `count` by.
        among: whether an item may be held out; None: all may.

    Raises:
        ValueError: too few items or sources to hold that many out.
    """
    among = [True] * len(items) if among is None else among
    by_source: dict[str, list[int]] = defaultdict(list)
    for i, item in enumerate(items):
        by_source[item.source].append(i)
    candidates = {s: [i for i in own if among[i]] for s, own in by_source.items()}
    candidates = {source: own for source, own in candidates.items() if own}
    by_category: dict[str, list[str]] = defaultdict(list)
    for source in random.Random(seed).sample(sorted(candidates), len(candidates)):
        by_category[items[candidates[source][0]].category].append(source)
    drawn = round_robin(list(by_category.values()))
    # Source -> number of its group; where groups do not do, each source is one.
    alone = {source: number for number, source in enumerate(by_source)}
    groupings = (_join(by_source, clusters), alone)
    ways = [(group_of, _whole_kinds(items, group_of, count)) for group_of in groupings]
    ways += [(group_of, set()) for group_of in groupings]
    for group_of, whole_kinds in ways:
        chosen = _choose(drawn, candidates, group_of, by_source, count, whole_kinds)
        groups = {group_of[source] for source in chosen or ()}
        training = [i for i, item in enumerate(items) if group_of[item.source] not in groups]
        if chosen is not None and training:
            held = sorted(i for source in chosen for i in candidates[source])
            inside = {clusters[i] for i in held}
            apart = {*training, *held}
            return Split(
                training,
                held,
                [i for i in range(len(items)) if i not in apart],
                [i for i in training if clusters[i] in inside],
            )
    raise ValueError(
        f"cannot hold out {count} validation prompts of {sum(among)} from "
        f"{len(candidates)} sources: whole sources are held out, so add prompts or sources, lower "
        f"{key}, or name as the source a column that tells prompts apart (columns: {{source: id}})"
    )


def _join(by_source: dict[str, list[int]], clusters: Sequence[int]) -> dict[str, int]:
    """Source -> the number of its group: of the sources that it is joined with by clusters."""
    joined, first = Joined(len(by_source)), dict[int, int]()
    for number, own in enumerate(by_source.values()):
        for i in own:
            joined.join(number, first.setdefault(clusters[i], number))
    return {source: joined.leader(number) for number, source in enumerate(by_source)}


def _whole_kinds(items: Sequence[Sourced], group_of: dict[str, int], count: int) -> set[int]:
    """The groups that hold most of a category of `count` items or more."""
    large = {name: n for name, n in Counter(i.category for i in items).items() if n >= count}
    own = Counter((group_of[item.source], item.category) for item in items)
    return {group for (group, name), n in own.items() if name in large and 2 * n > large[name]}


def _choose(
    drawn: Sequence[str],
    candidates: dict[str, list[int]],
    group_of: dict[str, int],
    by_source: dict[str, list[int]],
    count: int,
    whole_kinds: Collection[int],
) -> list[str] | None:
    """Sources that come to `count` candidates, as `hold_out` says, none of them of the groups
    `whole_kinds`; None: there are none."""
    groups: dict[int, list[str]] = defaultdict(list)
    for source in drawn:
        if group_of[source] not in whole_kinds:
            groups[group_of[source]].append(source)
    chosen, larger = [], []
    for group, sources in groups.items():
        size = sum(len(candidates[source]) for source in sources)
        if size <= count:
            chosen += sources
            count -= size
        else:
            larger.append(group)
    if not count:
        return chosen
    sizes = Counter(group_of[source] for source, own in by_source.items() for _ in own)
    for group in sorted(larger, key=lambda name: sizes[name]):
        part: list[str] = []
        left = count
        for source in groups[group]:
            if len(candidates[source]) <= left:
                part.append(source)
                left -= len(candidates[source])
        if not left and sizes[group] - count <= LEFT_OUT * sum(sizes.values()):
            return chosen + part
    return None

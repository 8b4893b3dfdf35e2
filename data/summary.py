"""What a data set holds, counted and printed: for a look before a run."""

import hashlib
import math
import random
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from itertools import chain, count, pairwise
from typing import Any

from rich.columns import Columns
from rich.console import Console, Group
from rich.table import Table
from rich.text import Text

from headstart.data.conversations import Conversation
from headstart.heads.text import visible

EXAMPLE_LENGTH = 300  # tokens or words shown of an example, about
MOST = 20  # groups and reasons listed of one kind

Seen = tuple[Conversation, str | None, float | None]
"""A document, the layout of its row, and its `Entry.top_k_mass`."""


@dataclass(frozen=True)
class Count:
    """Documents, and their tokens or words."""

    documents: int = 0
    length: int = 0
    trained: int = 0


@dataclass(frozen=True)
class Example:
    """One document as text."""

    heading: str
    pieces: list[tuple[str, bool]]
    """Text in order, and whether the head is trained on it."""


@dataclass(frozen=True)
class Summary:
    """What a data set holds."""

    unit: str
    """`tokens` or `words`."""
    groups: dict[str, dict[str, Count]]
    """`all`, `category`, `temperature`, `finish`, `layout` -> value -> count, where it is known."""
    sources: int
    lengths: dict[str, list[int]]
    """`all`, `prompt` (before the first answer) and `trained` -> units of each document."""
    masses: list[float]
    """Of each document where it is known: the share of mass that the teacher's top k hold."""
    repeats: dict[str, tuple[int, int]]
    """`whole` and `prompt` -> documents equal in it to an earlier one, and greedy ones equal in it
    to an earlier greedy one."""
    examples: list[Example]
    title: str = ""
    facts: dict[str, str] = field(default_factory=dict)
    """With what it was made and how it is stored."""
    notes: list[str] = field(default_factory=list)
    """What the user should know or do."""
    bad: dict[str, tuple[int, str]] = field(default_factory=dict)
    """Reason -> how many rows are unusable for it, and the first of them."""

    @property
    def total(self) -> Count:
        """Of all documents."""
        return self.groups["all"][""] if "all" in self.groups else Count()


def summarise(
    documents: Iterable[Seen],
    examples: int,
    decode: Callable[[list[Any]], str],
    unit: str = "tokens",
) -> Summary:
    """Count documents in one pass; only the examples are kept whole.

    Args:
        documents: with tokens, or the words themselves, as their `ids`.
        examples: how many to keep, each document as likely as any other.
        decode: of ids to text.
        unit: `tokens` or `words`.
    """
    groups: dict[str, dict[str, Count]] = defaultdict(lambda: defaultdict(Count))
    lengths: dict[str, list[int]] = {"all": [], "prompt": [], "trained": []}
    hashes: dict[str, list[tuple[bytes, bool]]] = {"whole": [], "prompt": []}
    masses, sources = list[float](), set[str]()
    kept: list[tuple[int, Conversation]] = []
    rng = random.Random(0)
    for number, (c, layout, mass) in enumerate(documents):
        for kind, name in _groups_of(c, layout).items():
            n = groups[kind][name]
            groups[kind][name] = Count(
                n.documents + 1, n.length + len(c.ids), n.trained + c.trained
            )  # fmt: skip
        first = c.spans[0][0] if c.spans else len(c.ids)
        for what, value in zip(lengths, (len(c.ids), first, c.trained), strict=True):
            lengths[what].append(value)
        hashes["whole"].append((_hash(c.ids), c.temperature == 0))
        if first > (unit == "tokens"):  # <bos> alone is no prompt
            hashes["prompt"].append((_hash(c.ids[:first]), c.temperature == 0))
        masses += [] if mass is None else [mass]
        sources.add(c.source)
        if len(kept) < examples:
            kept.append((number, c))
        elif (place := rng.randrange(number + 1)) < examples:
            kept[place] = (number, c)
    return Summary(
        unit,
        {kind: dict(counts) for kind, counts in groups.items()},
        len(sources),
        lengths,
        masses,
        {part: _repeats(pairs) for part, pairs in hashes.items()},
        [_example(c, decode, unit) for _, c in sorted(kept, key=lambda pair: pair[0])],
    )


def _groups_of(c: Conversation, layout: str | None) -> dict[str, str]:
    names = {"all": "", "category": c.category}
    if c.temperature is not None:
        names["temperature"] = f"{c.temperature:g}" if c.temperature else "0 (greedy)"
    names |= {"finish": c.finish_reason} if c.finish_reason else {}
    return names | ({"layout": layout} if layout else {})


def _hash(ids: list[Any]) -> bytes:
    return hashlib.blake2b(repr(ids).encode(), digest_size=8).digest()


def _repeats(pairs: list[tuple[bytes, bool]]) -> tuple[int, int]:
    greedy = [key for key, is_greedy in pairs if is_greedy]
    return len(pairs) - len({key for key, _ in pairs}), len(greedy) - len(set(greedy))


def _example(c: Conversation, decode: Callable[[list[Any]], str], unit: str) -> Example:
    cuts = pairwise([0, *chain(*c.spans), len(c.ids)])
    parts = [(c.ids[a:b], i % 2 == 1) for i, (a, b) in enumerate(cuts) if a < b]
    limit = max(20, EXAMPLE_LENGTH // max(len(parts), 1))
    pieces = []
    for ids, trained in parts:
        ends = [ids] if len(ids) <= limit else [ids[: limit // 2], ids[-(limit // 2) :]]
        left_out = f" … {len(ids) - sum(map(len, ends)):,} {unit} … "
        pieces.append((left_out.join(map(decode, ends)), trained))
    heading = f"{c.id}: {c.category}, {len(c.ids):,} {unit}, {c.trained:,} trained"
    heading += "" if c.temperature is None else f", temperature {c.temperature:g}"
    heading += f", finish {c.finish_reason}" if c.finish_reason else ""
    return Example(heading, pieces)


def print_summary(summary: Summary, console: Console) -> None:
    """Print a summary. No text of the data is taken for markup or sent as a control character."""
    facts = [f"  {name:13} {fact}" for name, fact in summary.facts.items()]
    lines = [(summary.title, "bold"), *((fact, "") for fact in facts)]
    for line, style in [*lines, *((f"  {note}", "yellow") for note in summary.notes)]:
        console.print(Text(_marked(line), style), soft_wrap=True)
    if summary.bad:
        table = Table("rows", "unusable because", "first")
        worst = sorted(summary.bad.items(), key=lambda item: -item[1][0])
        for reason, (times, first) in worst[:MOST]:
            table.add_row(f"{times:,}", Text(_marked(reason)), Text(_marked(first)))
        console.print(table)
    if not summary.total.documents:
        return
    console.print(_counts(summary))
    console.print(_histograms(summary))
    if summary.masses:
        m = sorted(summary.masses)
        spread = f"5th percentile {_quantile(m, 0.05):.2%}, minimum {m[0]:.2%}"
        mean = f"{sum(m) / len(m):.2%} of the probability, mean over documents"
        console.print(f"The teacher's top k: {mean} ({spread})", highlight=False, soft_wrap=True)
    for part, text in (("whole", "equal to an earlier one"), ("prompt", "with an earlier prompt")):
        repeated, greedy = summary.repeats[part]
        greedily = f" ({greedy:,} of them greedy both times)" if greedy else ""
        console.print(f"Documents {text}: {repeated:,}{greedily}", highlight=False)
    if summary.repeats["prompt"][1]:
        console.print("Greedy text of one prompt is the same each time: it teaches no more.")
    styled = console.is_terminal and console.color_system is not None and not console.no_color
    for example in summary.examples:
        console.print(example_text(example, styled), soft_wrap=True)
    console.print()


def _marked(text: str) -> str:
    """The text with its line breaks marked, and without control characters."""
    return visible(text).replace("\n", "↵\n")


def example_text(example: Example, styled: bool) -> Text:
    """Heading and text, in which the trained tokens are reversed, or stand in ⟦ ⟧."""
    text = Text.assemble("\n", (_marked(example.heading), "bold"), "\n")
    for piece, trained in example.pieces:
        if trained and styled:
            text.append(_marked(piece), "reverse green")
        else:
            text.append(f"⟦{_marked(piece)}⟧" if trained else _marked(piece))
    return text


def _counts(summary: Summary) -> Table:
    table = Table()
    table.add_column()
    table.add_column(overflow="fold")
    for name in ("documents", summary.unit, f"trained {summary.unit}", "coverage"):
        table.add_column(name, justify="right", no_wrap=True)
    for kind, counts in summary.groups.items():
        largest = sorted(counts.items(), key=lambda item: (-item[1].documents, item[0]))
        for i, (name, n) in enumerate(largest[:MOST]):
            table.add_row(
                kind if i == 0 else "", Text(_marked(name)), f"{n.documents:,}", f"{n.length:,}",
                f"{n.trained:,}", f"{n.trained / max(n.length, 1):.1%}",
            )  # fmt: skip
        if len(counts) > MOST:
            table.add_row("", f"… {len(counts) - MOST:,} more")
        table.add_section()
    return table


def histogram(values: Sequence[int], bars: int = 10) -> list[tuple[str, int]]:
    """Buckets of a round width (1, 2 or 5 times a power of ten) and how many values are in each.

    The largest fiftieth may share an open last bucket, so that one long text does not flatten all.
    """
    ordered = sorted(values)
    low, high = ordered[0], int(_quantile(ordered, 0.98))
    widths = (step * 10**power for power in count() for step in (1, 2, 5))
    width = next(w for w in widths if high // w - low // w < bars)
    first, last = low // width, high // width
    counts = Counter(min(value // width, last + 1) for value in ordered)
    buckets = []
    for i in range(first, last + 1):
        edges = f"{i * width:,}" + (f"-{(i + 1) * width - 1:,}" if width > 1 else "")
        buckets.append((edges, counts[i]))
    return buckets + ([(f"≥ {(last + 1) * width:,}", counts[last + 1])] if counts[last + 1] else [])


def _quantile(ordered: Sequence[float], share: float) -> float:
    """The nearest rank."""
    return ordered[max(0, math.ceil(share * len(ordered)) - 1)]


def _histograms(summary: Summary) -> Columns:
    """As many beside one another as fit, each of the documents that have any of what it counts."""
    cells = []
    for what, lengths in summary.lengths.items():
        ordered = sorted(filter(None, lengths))
        if not ordered:
            continue
        buckets = histogram(ordered)
        most = max(n for _, n in buckets)
        table = Table.grid("", "", "", padding=(0, 1))
        for edges, n in buckets:
            bar = "█" * math.ceil(16 * n / most)
            table.add_row(Text(edges, justify="right"), f"{bar:16}", f"{n:,}")
        title = f"{what} {summary.unit}, n = {len(ordered):,}"
        middle = f"median {_quantile(ordered, 0.5):,}, longest {ordered[-1]:,}"
        cells.append(Group(title, middle, table))
    return Columns(cells, padding=(1, 4))

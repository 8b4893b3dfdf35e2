"""What is at a path, counted and printed for a look before a run: `headstart data inspect`."""

import hashlib
import json
import math
import random
import re
import sys
import textwrap
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import chain, count, pairwise
from pathlib import Path
from typing import Any, TypeVar

import torch
from rich.columns import Columns
from rich.console import Console, Group
from rich.table import Table
from rich.text import Text

from headstart.common.console import plain_console, progress_bar, visible
from headstart.configs.schema import DataConfig, SourceConfig
from headstart.data.conversations import (
    MANIFEST,
    Conversation,
    part_paths,
    read_manifest,
    read_part,
)
from headstart.data.prompts import Prompt, describe_unused, prompt_of
from headstart.data.rows import layout_of, renamed, turn_text, unused_columns
from headstart.data.sources import read_rows
from headstart.data.store import ActivationStore, Shard, shard_paths
from headstart.data.templates import encode_conversation, encode_prompt
from headstart.heads.loading import load_target_tokens, served_config
from headstart.heads.tokens import TargetTokens

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


VERIFIED_BELOW = 2 * 2**30  # bytes: a few seconds of hashing
INSPECTABLE = (
    "`headstart data inspect` reads a folder of `headstart regenerate`, an activation store of "
    "`headstart extract`, prompts or conversations (a JSONL, Parquet, Arrow, CSV or text file, or "
    "a folder of them), and the id of a Hugging Face dataset"
)

T = TypeVar("T")


def inspect_path(
    path: Path | str,
    examples: int = 3,
    tokenizer_of: str | None = None,
    config: DataConfig | None = None,
    console: Console | None = None,
) -> None:
    """Print what a data set holds.

    Args:
        path: a folder of `headstart regenerate`, an activation store (one folder may be both, and
            either unfinished), or any source of prompts or conversations.
        examples: documents shown, drawn evenly.
        tokenizer_of: target whose tokenizer is used. None: that of the folder's own target; of
            prompts the words are counted.
        config: for the settings of the source (the entry of `prompts` with this path).
        console: where to print. None: stdout.

    Raises:
        ValueError: nothing that can be inspected, a damaged file, or an unknown `tokenizer_of`.
    """
    folder, config = Path(path), config or DataConfig()
    # Outside a terminal rich assumes 80 columns and would fold every cell.
    console = console or plain_console(None if sys.stdout.isatty() else 132)
    regenerated = (folder / MANIFEST).is_file()
    if regenerated:
        print_summary(inspect_conversations(folder, examples, tokenizer_of), console)
    if (folder / "index.json").is_file() or shard_paths(folder):
        examples = 0 if regenerated else examples  # the texts are those that were just shown
        print_summary(inspect_store(folder, examples, tokenizer_of), console)
    elif not regenerated:
        source = next((s for s in config.prompts if s.path == str(path)), None)
        source = source or SourceConfig(path=str(path))
        tokens = load_target_tokens(served_config(tokenizer_of)) if tokenizer_of else None
        try:
            summary = inspect_source(source, examples, tokens, config)
        except ValueError as error:
            if folder.is_file():
                raise
            raise ValueError(f"{error}. {INSPECTABLE}") from error
        print_summary(summary, console)


def inspect_conversations(folder: Path, examples: int, tokenizer_of: str | None = None) -> Summary:
    """Summarise a folder of `headstart regenerate`; an unfinished one as far as it goes.

    Raises:
        ValueError: the manifest or a part is damaged, or `tokenizer_of` cannot be loaded.
    """
    made = read_manifest(folder)
    parts = part_paths(folder, made["parts"])
    decode, notes = _decoder(made, examples, tokenizer_of)
    if len(parts) < made["parts"]:
        notes.append(
            f"Unfinished: {len(parts)} of {made['parts']} parts are there; the `headstart "
            "regenerate` command that began it goes on where it stopped."
        )
    read = (
        (c, None, None) for path in _counted(parts, "Reading", len(parts)) for c in read_part(path)
    )
    summary = summarise(read, examples, decode)
    done = summary.total.documents
    facts = {
        **_made_with(made, summary),
        "conversations": f"{done:,} of {made['conversations']:,}",
        "generation": f"at most {made['max_new_tokens']:,} new tokens, seed {made['seed']}",
    }
    return replace(summary, title=f"Conversations in {folder}", facts=facts, notes=notes)


def inspect_store(folder: Path, examples: int, tokenizer_of: str | None = None) -> Summary:
    """Summarise an activation store, verified unless it is large; an unfinished one likewise.

    Raises:
        ValueError: index or shards are damaged or missing, or `tokenizer_of` cannot be loaded.
    """
    finished = (folder / "index.json").is_file()
    store = ActivationStore(folder) if finished else None
    paths = [folder / s["file"] for s in store.index["shards"]] if store else shard_paths(folder)
    if missing := [path for path in paths if not path.is_file()]:
        raise ValueError(f"{missing[0]} is missing: run the command that made the store again")
    made = store.settings if store else Shard(paths[0]).settings
    size = sum(path.stat().st_size for path in paths)
    small = size < VERIFIED_BELOW
    decode, notes = _decoder(made, examples, tokenizer_of)
    if not finished:
        notes.append(
            f"Unfinished: no index.json, {len(paths)} shards so far; the command that began the "
            "store goes on where it stopped."
        )
    label = "Verifying" if small else "Reading"
    read = (
        seen
        for number in _counted(range(len(paths)), label, len(paths))
        for seen in _documents(_shard(store, number, paths[number], made, small))
    )
    summary = summarise(read, examples, decode)
    tokens = summary.total.length
    facts = {
        **_made_with(made, summary),
        "stored": f"{made['dtype']}, storage={made['storage']}, top k {made['teacher_top_k']}",
        "on disk": f"{size / 2**20:,.1f} MiB, {size / max(tokens, 1):,.0f} bytes a token, "
        f"{len(paths):,} shards",
        "checksums": "verified" if small else "not verified: too large; reading verifies each",
    }
    return replace(summary, title=f"Activation store in {folder}", facts=facts, notes=notes)


def inspect_source(
    source: SourceConfig, examples: int, tokens: TargetTokens | None, config: DataConfig
) -> Summary:
    """Summarise prompts or whole conversations: in words, or in tokens where `tokens` is given.

    Raises:
        ValueError: the source is missing, unreadable or empty. Bad rows are counted instead.
    """
    bad: dict[str, tuple[int, str]] = {}
    unused: set[str] = set()
    read = _read_source(source, tokens, config.chat_template_kwargs, bad, unused)
    unit = "tokens" if tokens else "words"
    decode = tokens.tokenizer.decode if tokens else "".join
    summary = summarise(read, examples, decode, unit)
    unusable = sum(n for n, _ in bad.values())
    rows = summary.total.documents + unusable
    if not rows:
        raise ValueError(f"{source.path} holds no prompts")
    notes = []
    if unusable:
        verdict = "more" if unusable > config.max_bad_rows * rows else "no more"
        notes.append(
            f"{unusable:,} of {rows:,} rows are unusable, {verdict} than data.max_bad_rows="
            f"{config.max_bad_rows:g} allows."
        )
    if unused:
        notes.append(f"{describe_unused(unused)}.")
    facts = {"sources": _sources(summary)}
    return replace(summary, title=f"Rows of {source.path}", facts=facts, notes=notes, bad=bad)


def _made_with(made: dict[str, Any], summary: Summary) -> dict[str, str]:
    revision = f" at revision {made['revision']}" if made.get("revision") else ""
    fingerprint = made["fingerprint"]  # a server tells none
    return {
        "target": f"{made['target']}{revision}",
        "fingerprint": fingerprint[:12] if fingerprint else "not known (a server answered)",
        "sources": _sources(summary),
    }


def _sources(summary: Summary) -> str:
    return f"{summary.sources:,} (whole ones are held out for validation)"


def _decoder(
    made: dict[str, Any], examples: int, tokenizer_of: str | None
) -> tuple[Callable[[list[Any]], str], list[str]]:
    """What makes text of token ids, or else a note that says why nothing does."""
    why = None
    if examples:
        try:
            revision = None if tokenizer_of else made.get("revision")
            served = served_config(tokenizer_of or made["target"], revision)
            tokens = load_target_tokens(served)
        except (OSError, ValueError, ImportError) as error:
            if tokenizer_of:
                raise
            why = textwrap.shorten(str(error), 160)
        else:
            if tokens.tokenizer_hash == made["tokenizer"]:
                return tokens.tokenizer.decode, []
            why = f"the tokenizer of {tokens.name} is another than they were made with"
    notes = [f"Examples show token ids in place of text: {why}"] if why else []
    return lambda ids: "".join(f"{i} " for i in ids), notes


def _counted(items: Iterable[T], description: str, total: int | None = None) -> Iterator[T]:
    """The items, behind a progress bar."""
    with progress_bar() as bar:
        task = bar.add_task(description, total=total, status="")
        number = 0
        for number, item in enumerate(items, start=1):
            yield item
            bar.update(task, completed=number)
        bar.update(task, total=number)


def _shard(
    store: ActivationStore | None, number: int, path: Path, made: dict[str, Any], verify: bool
) -> Shard:
    if store is not None and verify:
        return store.shard(number)  # verified, also against the index
    shard = Shard(path, made)
    if verify:
        shard.verify()
    return shard


def _documents(shard: Shard) -> Iterator[Seen]:
    ids, start = shard.read_ids(), 0
    mask: torch.Tensor = shard.read_mask()
    for e in shard.entries:
        end = start + e.length
        edges = torch.nn.functional.pad(mask[start:end].int(), (1, 1)).diff().nonzero()[:, 0]
        spans = list(zip(edges[::2].tolist(), edges[1::2].tolist(), strict=True))
        c = Conversation(e.id, e.category, e.source, ids[start:end], spans, e.temperature)
        yield c, None, e.top_k_mass
        start = end


def _read_source(
    source: SourceConfig,
    tokens: TargetTokens | None,
    kwargs: dict[str, Any],
    bad: dict[str, tuple[int, str]],
    unused: set[str],
) -> Iterator[Seen]:
    """Usable rows; others are counted in `bad`, columns that nothing reads put into `unused`."""
    usable = 0
    for place, row in _counted(read_rows(source), "Reading"):
        try:
            prompt = prompt_of(row, place, source.columns)
            assert isinstance(row, dict), "a string is the reason of a bad row"
            layout = layout_of(renamed(row, source.columns))
            ids, spans = _encoded(prompt, layout, tokens, kwargs)
        except ValueError as error:
            reason, *detail = re.split(r" \(|: ", str(error).removesuffix(")"), maxsplit=1)
            times, first = bad.get(reason, (0, ": ".join([str(place), *detail])))
            bad[reason] = times + 1, first
            continue
        unused |= unused_columns(row, source.columns)
        yield Conversation(prompt.id, prompt.category, prompt.source, ids, spans), layout, None
        usable += 1
        if usable == source.limit:
            return


def _encoded(
    prompt: Prompt, layout: str, tokens: TargetTokens | None, kwargs: dict[str, Any]
) -> tuple[list[Any], list[tuple[int, int]]]:
    """Tokens (or words) and what the assistant wrote: nothing of a prompt without an answer, all of
    a text."""
    if tokens is None:
        return _words(prompt, layout)
    if layout == "text" or prompt.messages[-1]["role"] == "assistant":
        return encode_conversation(prompt, tokens.tokenizer, tokens.eos_ids, kwargs)
    return encode_prompt(prompt, tokens.tokenizer, None, kwargs), []


def _words(prompt: Prompt, layout: str) -> tuple[list[Any], list[tuple[int, int]]]:
    """Words with the white space around them, so that joined they are the text again."""
    ids, spans = list[Any](), []
    for turn in prompt.messages:
        words = _split(turn_text(turn)) or [json.dumps(turn.get("tool_calls"))]
        if turn["role"] == "assistant" or layout == "text":
            spans.append((len(ids), len(ids) + len(words)))
        elif not prompt.raw:
            words[0] = f"{chr(10) if ids else ''}{turn['role']}: {words[0]}"
            words[-1] += "\n"
        ids += words
    return ids, spans


def _split(text: str) -> list[str]:
    """The words of a text, each with the white space after it, the first with that before it too;
    none of a blank text."""
    # Not `\s*\S+\s*`, which looks at a blank text from each of its places anew.
    words = re.findall(r"\S+\s*", text)
    return [text[: len(text) - len(text.lstrip())] + words[0], *words[1:]] if words else []

"""What is at a path, counted and printed for a look before a run: `headstart data inspect`."""

import hashlib
import json
import math
import random
import re
import sys
import textwrap
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from itertools import chain, pairwise
from pathlib import Path
from typing import Any, TypeVar

import torch
from rich.console import Console
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
from headstart.data.templates import NoAnswer, encode_conversation, encode_prompt
from headstart.heads.loading import load_target_tokens, served_config
from headstart.heads.tokens import TargetTokens

EXAMPLE_LENGTH = 300  # tokens or words shown of an example, about
MOST = 20  # groups and reasons listed of one kind
SHARES = (5, 25, 50, 75, 95)  # percentiles of lengths
VERIFIED_BELOW = 2 * 2**30  # bytes: a few seconds of hashing

T = TypeVar("T")
Seen = tuple[Conversation, str, float | None]
"""A document, the layout of its row, and its `Entry.top_k_mass`."""
Decode = Callable[[list[Any]], str]


@dataclass
class Summary:
    """What a data set holds, counted document by document."""

    title: str
    facts: dict[str, str] = field(default_factory=dict)
    """With what it was made and how it is stored."""
    notes: list[str] = field(default_factory=list)
    """What the user should know or do."""
    unit: str = "tokens"
    """Or `words`."""
    groups: dict[str, dict[str, list[int]]] = field(default_factory=dict)
    """`all`, `category`, `finish`, `layout`, `temperature` -> value -> documents, their units, and
    those of them that are trained on."""
    lengths: dict[str, list[int]] = field(
        default_factory=lambda: {"all": [], "prompt": [], "trained": []}
    )
    """Units of each document; `prompt`: before the first answer."""
    repeats: dict[str, int] = field(default_factory=lambda: {"whole": 0, "prompt": 0})
    """Documents that are equal to an earlier one, and that have an earlier one's prompt."""
    masses: list[float] = field(default_factory=list)
    """Of each document where it is known: the share of mass that the teacher's top k hold."""
    examples: list[Conversation] = field(default_factory=list)

    def count(self, documents: Iterable[Seen], examples: int) -> None:
        """Count documents, whose `ids` may be words; as many `examples` are kept, each document as
        likely as any other."""
        rng, sources, seen = random.Random(0), set[str](), set[tuple[str, bytes]]()
        kept: list[tuple[int, Conversation]] = []
        for number, (c, layout, mass) in enumerate(documents):
            names = {"all": "", "category": c.category, "finish": c.finish_reason, "layout": layout}
            names["temperature"] = None if c.temperature is None else f"{c.temperature:g}"
            for kind, name in names.items():
                if name or kind == "all":
                    counts = self.groups.setdefault(kind, {}).setdefault(name or "", [0, 0, 0])
                    counts[:] = counts[0] + 1, counts[1] + len(c.ids), counts[2] + c.trained
            first = c.spans[0][0] if c.spans else len(c.ids)
            for what, length in zip(self.lengths, (len(c.ids), first, c.trained), strict=True):
                self.lengths[what].append(length)
            for part, ids in (("whole", c.ids), ("prompt", c.ids[:first])):
                key = part, hashlib.blake2b(repr(ids).encode(), digest_size=8).digest()
                # <bos> alone is no prompt.
                self.repeats[part] += key in seen and len(ids) > (self.unit == "tokens")
                seen.add(key)
            self.masses += [] if mass is None else [mass]
            sources.add(c.source)
            if len(kept) < examples:
                kept.append((number, c))
            elif (place := rng.randrange(number + 1)) < examples:
                kept[place] = (number, c)
        self.examples = [c for _, c in sorted(kept, key=lambda pair: pair[0])]
        self.facts["sources"] = f"{len(sources):,} (whole ones are held out for validation)"


def pieces_of(c: Conversation, unit: str, decode: Decode) -> list[tuple[str, bool]]:
    """The text of a document in order, long pieces cut, and whether the head is trained on each."""
    cuts = pairwise([0, *chain(*c.spans), len(c.ids)])
    parts = [(c.ids[a:b], i % 2 == 1) for i, (a, b) in enumerate(cuts) if a < b]
    limit = max(20, EXAMPLE_LENGTH // max(len(parts), 1))
    pieces = []
    for ids, trained in parts:
        ends = [ids] if len(ids) <= limit else [ids[: limit // 2], ids[-(limit // 2) :]]
        left_out = f" … {len(ids) - sum(map(len, ends)):,} {unit} … "
        pieces.append((left_out.join(map(decode, ends)), trained))
    return pieces


def print_summary(summary: Summary, decode: Decode, console: Console) -> None:
    """Print a summary. No text of the data is taken for markup or sent as a control character."""
    console.print(Text(_marked(summary.title), "bold"), soft_wrap=True)
    for name, fact in summary.facts.items():
        console.print(Text(_marked(f"  {name:13} {fact}")), soft_wrap=True)
    for note in summary.notes:
        console.print(Text(_marked(f"  {note}"), "yellow"), soft_wrap=True)
    if not summary.lengths["all"]:
        return
    console.print(_counts(summary), _lengths(summary), sep="")
    if m := sorted(summary.masses):
        spread = f"5th percentile {_quantile(m, 0.05):.2%}, minimum {m[0]:.2%}"
        mean = f"{sum(m) / len(m):.2%} of the probability, mean over documents"
        console.print(f"The teacher's top k: {mean} ({spread})", highlight=False, soft_wrap=True)
    for part, text in (("whole", "equal to an earlier one"), ("prompt", "with an earlier prompt")):
        console.print(f"Documents {text}: {summary.repeats[part]:,}", highlight=False)
    for c in summary.examples:
        heading = f"{c.id}: {c.category}, {len(c.ids):,} {summary.unit}, {c.trained:,} trained"
        heading += "" if c.temperature is None else f", temperature {c.temperature:g}"
        heading += f", finish {c.finish_reason}" if c.finish_reason else ""
        example = Text.assemble("\n", (_marked(heading), "bold"), "\n")
        for piece, trained in pieces_of(c, summary.unit, decode):
            example.append(f"⟦{_marked(piece)}⟧" if trained else _marked(piece), "green" * trained)
        console.print(example, soft_wrap=True)
    console.print()


def _marked(text: str) -> str:
    """The text with its line breaks marked, and without control characters."""
    return visible(text).replace("\n", "↵\n")


def _counts(summary: Summary) -> Table:
    table = Table()
    table.add_column()
    table.add_column(overflow="fold")
    for name in ("documents", summary.unit, f"trained {summary.unit}", "coverage"):
        table.add_column(name, justify="right", no_wrap=True)
    for kind, counts in summary.groups.items():
        largest = sorted(counts.items(), key=lambda item: (-item[1][0], item[0]))
        for i, (name, (documents, length, trained)) in enumerate(largest[:MOST]):
            table.add_row(
                "" if i else kind, Text(_marked(name)), f"{documents:,}", f"{length:,}",
                f"{trained:,}", f"{trained / max(length, 1):.1%}",
            )  # fmt: skip
        if len(counts) > MOST:
            table.add_row("", f"… {len(counts) - MOST:,} more")
        table.add_section()
    return table


def _lengths(summary: Summary) -> Table:
    """Each row of the documents that have any of what it counts."""
    table = Table(summary.unit, *(f"{share}%" for share in SHARES), "longest", "documents")
    for what, lengths in summary.lengths.items():
        if ordered := sorted(filter(None, lengths)):
            quantiles = [_quantile(ordered, share / 100) for share in SHARES]
            table.add_row(what, *(f"{n:,}" for n in [*quantiles, ordered[-1], len(ordered)]))
    return table


def _quantile(ordered: Sequence[float], share: float) -> float:
    """The nearest rank."""
    return ordered[max(0, math.ceil(share * len(ordered)) - 1)]


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
        tokenizer_of: a target; None: a folder's own, and of a source the words are counted.
        config: for the settings of the source (the entry of `prompts` with this path).
        console: where to print; None: stdout.

    Raises:
        ValueError: nothing that can be inspected, a damaged file, or an unknown `tokenizer_of`.
    """
    folder, config = Path(path), config or DataConfig()
    # Outside a terminal rich assumes 80 columns and would fold every cell.
    console = console or plain_console(None if sys.stdout.isatty() else 132)
    tokens = load_target_tokens(served_config(tokenizer_of)) if tokenizer_of else None
    regenerated = (folder / MANIFEST).is_file()
    if regenerated:
        summary, made = inspect_conversations(folder, examples)
        print_summary(summary, _decoder(summary, made, tokens), console)
    if (folder / "index.json").is_file() or shard_paths(folder):
        # The texts of a folder that is both are those that were just shown.
        summary, made = inspect_store(folder, 0 if regenerated else examples)
        print_summary(summary, _decoder(summary, made, tokens), console)
    elif not regenerated:
        source = next((s for s in config.prompts if s.path == str(path)), None)
        summary = inspect_source(source or SourceConfig(path=str(path)), examples, tokens, config)
        print_summary(summary, tokens.tokenizer.decode if tokens else "".join, console)


def inspect_conversations(folder: Path, examples: int) -> tuple[Summary, dict[str, Any]]:
    """Count a folder of `headstart regenerate`, as far as it goes; also what it was made with."""
    made = read_manifest(folder)
    parts = part_paths(folder, made["parts"])
    summary = Summary(f"Conversations in {folder}", _made_with(made))
    if len(parts) < made["parts"]:
        summary.notes.append(
            f"Unfinished: {len(parts)} of {made['parts']} parts are there; the `headstart "
            "regenerate` command that began it goes on where it stopped."
        )
    read = chain.from_iterable(map(read_part, _counted(parts, "Reading", len(parts))))
    summary.count(((c, "", None) for c in read), examples)
    summary.facts |= {
        "conversations": f"{len(summary.lengths['all']):,} of {made['conversations']:,}",
        "generation": f"at most {made['max_new_tokens']:,} new tokens, seed {made['seed']}",
    }
    return summary, made


def inspect_store(folder: Path, examples: int) -> tuple[Summary, dict[str, Any]]:
    """Count an activation store likewise, verified unless it is large."""
    store = ActivationStore(folder) if (folder / "index.json").is_file() else None
    paths = [folder / s["file"] for s in store.index["shards"]] if store else shard_paths(folder)
    if missing := [path for path in paths if not path.is_file()]:
        raise ValueError(f"{missing[0]} is missing: run the command that made the store again")
    made = store.settings if store else Shard(paths[0]).settings
    size = sum(path.stat().st_size for path in paths)
    small = size < VERIFIED_BELOW
    summary = Summary(f"Activation store in {folder}", _made_with(made))
    if store is None:
        summary.notes.append(
            f"Unfinished: no index.json, {len(paths)} shards so far; the command that began the "
            "store goes on where it stopped."
        )

    def read() -> Iterator[Seen]:
        for number, path in enumerate(_counted(paths, "Reading", len(paths))):
            # Those of `store` are verified, against the index too.
            shard = store.shard(number) if store and small else Shard(path, made)
            if small and not store:
                shard.verify()
            yield from _documents(shard)

    summary.count(read(), examples)
    tokens = sum(summary.lengths["all"])
    summary.facts |= {
        "stored": f"{made['dtype']}, storage={made['storage']}, top k {made['teacher_top_k']}",
        "on disk": f"{size / 2**20:,.1f} MiB, {size / max(tokens, 1):,.0f} bytes a token, "
        f"{len(paths):,} shards",
        "checksums": "verified" if small else "not verified: too large; reading verifies each",
    }
    return summary, made


def inspect_source(
    source: SourceConfig, examples: int, tokens: TargetTokens | None, config: DataConfig
) -> Summary:
    """Count prompts or whole conversations, in words without `tokens`; bad rows go into `notes`."""
    summary = Summary(f"Rows of {source.path}", unit="tokens" if tokens else "words")
    unused = set[str]()
    bad: dict[str, tuple[int, str]] = {}  # reason -> rows, the first of them

    def read() -> Iterator[Seen]:
        usable = 0
        for place, row in _counted(read_rows(source), "Reading"):
            try:
                prompt = prompt_of(row, place, source.columns)
                assert isinstance(row, dict), "a string is the reason of a bad row"
                layout = layout_of(renamed(row, source.columns))
                ids, spans = _encoded(prompt, layout, tokens, config.chat_template_kwargs)
            except ValueError as error:
                reason, *detail = re.split(r" \(|: ", str(error).removesuffix(")"), maxsplit=1)
                times, first = bad.get(reason, (0, ": ".join([str(place), *detail])))
                bad[reason] = times + 1, first
                continue
            unused.update(unused_columns(row, source.columns))
            yield Conversation(prompt.id, prompt.category, prompt.source, ids, spans), layout, None
            usable += 1
            if usable == source.limit:
                return

    summary.count(read(), examples)
    unusable = sum(times for times, _ in bad.values())
    rows = len(summary.lengths["all"]) + unusable
    if not rows:
        raise ValueError(f"{source.path} holds no prompts")
    if unusable:
        summary.notes.append(
            f"{unusable:,} of {rows:,} rows are unusable; data.max_bad_rows="
            f"{config.max_bad_rows:g} allows {int(config.max_bad_rows * rows):,}"
        )
    for reason, (times, first) in sorted(bad.items(), key=lambda item: -item[1][0])[:MOST]:
        summary.notes.append(f"{times:,} unusable: {reason}, first {first}")
    if unused:
        summary.notes.append(f"{describe_unused(unused)}.")
    return summary


def _made_with(made: dict[str, Any]) -> dict[str, str]:
    revision = f" at revision {made['revision']}" if made.get("revision") else ""
    fingerprint = made["fingerprint"]
    return {
        "target": f"{made['target']}{revision}",
        "fingerprint": fingerprint[:12] if fingerprint else "not known (a server answered)",
    }


def _decoder(summary: Summary, made: dict[str, Any], tokens: TargetTokens | None) -> Decode:
    """What makes text of token ids; where nothing does, a note says why."""
    if summary.examples:
        try:
            tokens = tokens or load_target_tokens(
                served_config(made["target"], made.get("revision"))
            )
            if tokens.tokenizer_hash == made["tokenizer"]:
                return tokens.tokenizer.decode
            why = f"the tokenizer of {tokens.name} is another than they were made with"
        except (OSError, ValueError, ImportError) as error:
            why = textwrap.shorten(str(error), 160)
        summary.notes.append(f"Examples show token ids in place of text: {why}")
    return lambda ids: "".join(f"{i} " for i in ids)


def _counted(items: Iterable[T], description: str, total: int | None = None) -> Iterator[T]:
    """The items, behind a progress bar."""
    with progress_bar() as bar:
        task = bar.add_task(description, total=total, status="")
        number = 0
        for number, item in enumerate(items, start=1):
            yield item
            bar.update(task, completed=number)
        bar.update(task, total=number)


def _documents(shard: Shard) -> Iterator[Seen]:
    ids, mask, start = shard.read_ids(), shard.read_mask(), 0
    for e in shard.entries:
        end = start + e.length
        edges = torch.nn.functional.pad(mask[start:end].int(), (1, 1)).diff().nonzero()[:, 0]
        spans = list(zip(edges[::2].tolist(), edges[1::2].tolist(), strict=True))
        c = Conversation(e.id, e.category, e.source, ids[start:end], spans, e.temperature)
        yield c, "", e.top_k_mass
        start = end


def _encoded(
    prompt: Prompt, layout: str, tokens: TargetTokens | None, kwargs: dict[str, Any]
) -> tuple[list[Any], list[tuple[int, int]]]:
    """Tokens (or words) and what the assistant wrote: nothing of a prompt without an answer, all of
    a plain text."""
    if tokens is None:
        return _words(prompt, layout)
    if layout == "text" or prompt.messages[-1]["role"] == "assistant":
        with suppress(NoAnswer):  # a rendered text may be a prompt
            return encode_conversation(prompt, tokens.tokenizer, tokens.eos_ids, kwargs)
    return encode_prompt(prompt, tokens.tokenizer, kwargs), []


def _words(prompt: Prompt, layout: str) -> tuple[list[Any], list[tuple[int, int]]]:
    """Words with the white space around them, so that joined they are the text again."""
    ids, spans = list[Any](), []
    for turn in prompt.messages:
        text = turn_text(turn)
        # Not `\s*\S+\s*`, which looks at a blank text from each of its places anew.
        words = re.findall(r"\S+\s*", text) or [json.dumps(turn.get("tool_calls"))]
        words[0] = text[: len(text) - len(text.lstrip())] * bool(text.strip()) + words[0]
        if turn["role"] == "assistant" or layout == "text":
            spans.append((len(ids), len(ids) + len(words)))
        elif not prompt.raw:
            words[0] = f"{chr(10) if ids else ''}{turn['role']}: {words[0]}"
            words[-1] += "\n"
        ids += words
    return ids, spans

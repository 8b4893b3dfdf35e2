"""What is at a path, counted and printed for a look before a run: `headstart inspect`."""

import heapq
import json
import random
import re
import textwrap
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from itertools import chain, pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.table import Table

from headstart.common.console import counted, visible, wide_console
from headstart.configs.schema import DataConfig, SourceConfig, TargetConfig
from headstart.data.conversations import (
    MANIFEST,
    Conversation,
    find_answers,
    part_paths,
    read_manifest,
    read_part,
)
from headstart.data.prompts import Prompt, encode_usable, load_prompts
from headstart.data.rows import turn_text
from headstart.data.store import ActivationStore, Shard, describe_kept, shard_paths
from headstart.data.templates import NoAnswer, Spans, encode_conversation, encode_prompt
from headstart.heads.loading import load_target_tokens, noted_target
from headstart.heads.tokens import TargetTokens

EXAMPLE_LENGTH = 300  # tokens or words shown of an example, about
MOST = 20  # groups listed of one kind
SHARES = (0.05, 0.25, 0.5, 0.75, 0.95)  # quantiles of lengths
VERIFIED_BELOW = 2 * 2**30  # bytes: a few seconds of hashing

Seen = tuple[Conversation, float | None]
"""A document and its `Entry.top_k_mass`."""


@dataclass
class Summary:
    """What a data set holds, counted document by document."""

    title: str
    facts: dict[str, str] = field(default_factory=dict)
    """With what it was made, how it is stored, what it repeats."""
    unit: str = "tokens"
    """Or `words`."""
    decode: Callable[[list[Any]], str] = "".join
    """Makes text of units."""
    groups: dict[str, dict[str, list[int]]] = field(default_factory=dict)
    """`all`, `category`, `finish`, `temperature` -> value -> documents, their units, and
    those of them that are trained on."""
    lengths: dict[str, list[int]] = field(
        default_factory=lambda: {"all": [], "prompt": [], "trained": []}
    )
    """Units of each document; `prompt`: before the first answer."""
    examples: list[Conversation] = field(default_factory=list)

    def count(self, documents: Iterable[Seen], examples: int) -> None:
        """Count documents, whose `ids` may be words; as many `examples` are kept, each document as
        likely as any other."""
        rng, sources, seen = random.Random(0), set[str](), set[tuple[str, int]]()
        masses, repeats = list[float](), {"whole": 0, "prompt": 0}
        kept: list[tuple[float, int, Conversation]] = []
        for number, (c, mass) in enumerate(documents):
            heat = None if c.temperature is None else f"{c.temperature:g}"
            names = {"category": c.category, "finish": c.finish_reason, "temperature": heat}
            for kind, name in {"all": "", **names}.items():
                if name is not None:
                    counts = self.groups.setdefault(kind, {}).setdefault(name, [0, 0, 0])
                    counts[:] = counts[0] + 1, counts[1] + len(c.ids), counts[2] + c.trained
            first = c.spans[0][0] if c.spans else len(c.ids)
            for what, length in zip(self.lengths, (len(c.ids), first, c.trained), strict=True):
                self.lengths[what].append(length)
            for part, ids in (("whole", c.ids), ("prompt", c.ids[:first])):
                key = part, hash(tuple(ids))
                # <bos> alone is no prompt.
                repeats[part] += key in seen and len(ids) > (self.unit == "tokens")
                seen.add(key)
            masses += [] if mass is None else [mass]
            sources.add(c.source)
            kept = heapq.nlargest(examples, [*kept, (rng.random(), number, c)])
        self.examples = [c for _, _, c in sorted(kept, key=lambda drawn: drawn[1])]
        self.facts["sources"] = f"{len(sources):,} (whole ones are held out for validation)"
        self.facts["repeats"] = (
            f"{repeats['whole']:,} documents equal an earlier one, {repeats['prompt']:,} have the "
            "prompt of one"
        )
        if masses:
            low, mean = _quantiles(masses, [0.05])[0], sum(masses) / len(masses)
            self.facts["top k"] = (
                f"hold {mean:.2%} of the teacher's mass, mean over documents (5th percentile "
                f"{low:.2%}, minimum {min(masses):.2%})"
            )

    def pieces(self, c: Conversation) -> list[tuple[str, bool]]:
        """The text of a document in order, long pieces cut, and whether the head is trained on
        each."""
        cuts = pairwise([0, *chain(*c.spans), len(c.ids)])
        parts = [(c.ids[a:b], i % 2 == 1) for i, (a, b) in enumerate(cuts) if a < b]
        half = max(20, EXAMPLE_LENGTH // max(len(parts), 1)) // 2
        pieces = []
        for ids, trained in parts:
            ends = [ids] if len(ids) <= 2 * half else [ids[:half], ids[-half:]]
            left_out = f" … {len(ids) - sum(map(len, ends)):,} {self.unit} … "
            pieces.append((left_out.join(map(self.decode, ends)), trained))
        return pieces


def print_summary(summary: Summary) -> None:
    """Print a summary. No text of the data is taken for markup or sent as a control character."""
    print(_marked(summary.title))
    for name, fact in summary.facts.items():
        print(_marked(f"  {name:13} {fact}"))
    if not summary.lengths["all"]:
        return
    wide_console().print(_counts(summary), _lengths(summary), sep="")
    for c in summary.examples:
        heading = f"{c.id}: {c.category}, {len(c.ids):,} {summary.unit}"
        heading += f", {c.trained:,} trained" if c.trained else ""
        heading += "" if c.temperature is None else f", temperature {c.temperature:g}"
        heading += f", finish {c.finish_reason}" if c.finish_reason else ""
        pieces = (f"⟦{piece}⟧" if trained else piece for piece, trained in summary.pieces(c))
        print(f"\n{_marked(heading)}\n{_marked(''.join(pieces))}")
    print()


def _marked(text: str) -> str:
    """The text with its line breaks marked, and without control characters."""
    return visible(text).replace("\n", "↵\n")


def _counts(summary: Summary) -> Table:
    table = Table("", "")
    answered = any(summary.lengths["trained"])  # of prompts alone there is nothing to train on
    names = ["documents", summary.unit]
    for name in [*names, *([f"trained {summary.unit}", "coverage"] if answered else [])]:
        table.add_column(name, justify="right", no_wrap=True)
    for kind, counts in summary.groups.items():
        largest = sorted(counts.items(), key=lambda item: (-item[1][0], item[0]))
        for i, (name, (documents, length, trained)) in enumerate(largest[:MOST]):
            numbers = [f"{documents:,}", f"{length:,}"]
            if answered:
                numbers += [f"{trained:,}", f"{trained / max(length, 1):.1%}"]
            table.add_row("" if i else kind, name, *numbers)
        if len(counts) > MOST:
            table.add_row("", f"… {len(counts) - MOST:,} more")
        table.add_section()
    return table


def _lengths(summary: Summary) -> Table:
    """Each row of the documents that have any of what it counts."""
    table = Table(summary.unit, *(f"{share:.0%}" for share in SHARES), "longest", "documents")
    for what, lengths in summary.lengths.items():
        if some := list(filter(None, lengths)):
            numbers = [*_quantiles(some, SHARES), max(some), len(some)]
            table.add_row(what, *(f"{n:,}" for n in numbers))
    return table


def _quantiles(values: Sequence[float], shares: Sequence[float]) -> Any:
    """By nearest rank."""
    return np.quantile(values, shares, method="inverted_cdf")


def inspect_path(
    path: Path | str,
    examples: int = 3,
    tokenizer_of: str | None = None,
    config: DataConfig | None = None,
) -> None:
    """Print what a folder of `headstart regenerate`, an activation store (one folder may be both,
    and either unfinished) or any source of prompts or conversations holds.

    `tokenizer_of` is a target; without one a folder's own is taken, and of a source the words are
    counted. `config` has the settings of the source: those of the entry of `prompts` at `path`.

    Raises:
        ValueError: nothing that can be inspected, a damaged file, or an unknown `tokenizer_of`.
    """
    folder, config = find_answers(path), config or DataConfig()
    tokens = load_target_tokens(TargetConfig(name=tokenizer_of)) if tokenizer_of else None
    regenerated = (folder / MANIFEST).is_file()
    if regenerated:
        print_summary(inspect_conversations(folder, examples, tokens))
    if (folder / "index.json").is_file() or shard_paths(folder):
        # The texts of a folder that is both are those that were just shown.
        print_summary(inspect_store(folder, 0 if regenerated else examples, tokens))
    elif not regenerated:
        source = next((s for s in config.prompts if s.path == str(path)), None)
        source = source or SourceConfig(path=str(path))
        print_summary(inspect_source(source, examples, tokens, config))


def inspect_conversations(
    folder: Path, examples: int, tokens: TargetTokens | None = None
) -> Summary:
    """Count a folder of `headstart regenerate`, as far as it goes."""
    made = read_manifest(folder)
    parts = part_paths(folder, made["parts"])
    summary = _summary_of(f"Conversations in {folder}", made, examples, tokens)
    read = chain.from_iterable(map(read_part, counted(parts, "Reading")))
    summary.count(((c, None) for c in read), examples)
    summary.facts |= {
        "conversations": f"{len(summary.lengths['all']):,} of {made['conversations']:,}, in "
        f"{len(parts)} of {made['parts']} parts",
        "generation": f"at most {made['max_new_tokens']:,} new tokens, seed {made['seed']}",
    }
    return summary


def inspect_store(folder: Path, examples: int, tokens: TargetTokens | None = None) -> Summary:
    """Count an activation store likewise, verified unless it is large."""
    store = ActivationStore(folder) if (folder / "index.json").is_file() else None
    paths = [folder / s["file"] for s in store.index["shards"]] if store else shard_paths(folder)
    if missing := [path for path in paths if not path.is_file()]:
        raise ValueError(f"{missing[0]} is missing: run the command that made the store again")
    made = store.settings if store else Shard(paths[0]).settings
    size = sum(path.stat().st_size for path in paths)
    small = size < VERIFIED_BELOW
    summary = _summary_of(f"Activation store in {folder}", made, examples, tokens)

    def read() -> Iterator[Seen]:
        for number, path in enumerate(counted(paths, "Reading")):
            # Those of `store` are held against the index too.
            shard = store.shard(number) if store and small else Shard(path, made)
            if small:
                shard.verify()
            for e, ids, mask in shard.texts():
                edges = torch.nn.functional.pad(mask.int(), (1, 1)).diff().nonzero()[:, 0].tolist()
                spans = list(zip(edges[::2], edges[1::2], strict=True))
                c = Conversation(e.id, e.category, e.source, ids.tolist(), spans, e.temperature)
                yield c, e.top_k_mass

    summary.count(read(), examples)
    each = size / max(sum(summary.lengths["all"]), 1)
    summary.facts |= {
        "stored": f"{made['dtype']}, storage={made['storage']}, top k {made['teacher_top_k']}, "
        + describe_kept(made),
        "on disk": f"{size / 2**20:,.1f} MiB, {each:,.0f} bytes a token, {len(paths):,} shards"
        f"{'' if store else ' so far: unfinished, without index.json'}",
        "checksums": "verified" if small else "not verified: too large; reading verifies each",
    }
    return summary


def inspect_source(
    source: SourceConfig, examples: int, tokens: TargetTokens | None, config: DataConfig
) -> Summary:
    """Count prompts or whole conversations, in words without `tokens`; what a run would print of
    rows and columns that it does not use is printed too."""
    decode, unit = (tokens.tokenizer.decode, "tokens") if tokens else ("".join, "words")
    summary = Summary(f"Rows of {source.path}", unit=unit, decode=decode)
    prompts = load_prompts(source, max_bad_rows=1.0)

    def encode(prompt: Prompt) -> tuple[list[Any], Spans]:
        if tokens is None:
            return _words(prompt)
        kwargs = config.chat_template_kwargs
        if prompt.raw or prompt.messages[-1]["role"] == "assistant":
            with suppress(NoAnswer):  # a rendered text may be a prompt
                return encode_conversation(prompt, tokens.tokenizer, tokens.eos_ids, kwargs)
        return encode_prompt(prompt, tokens.tokenizer, kwargs), []

    encoded = encode_usable(prompts, encode, max_bad_rows=1.0)
    documents = (
        (Conversation(prompt.id, prompt.category, prompt.source, *made), None)
        for prompt, made in zip(prompts, encoded, strict=True)
        if made is not None
    )
    summary.count(documents, examples)
    return summary


def _summary_of(
    title: str, made: dict[str, Any], examples: int, tokens: TargetTokens | None
) -> Summary:
    """Of a folder with such settings, with what makes text of its token ids; where examples are to
    be shown and nothing does, a fact says why."""
    revision = f" at revision {made['revision']}" if made.get("revision") else ""
    fingerprint = made["fingerprint"] or "not known (a server answered)"
    summary = Summary(title, {"target": f"{made['target']}{revision}", "fingerprint": fingerprint})
    summary.decode = lambda ids: "".join(f"{i} " for i in ids)
    if not examples:
        return summary
    try:
        tokens = tokens or load_target_tokens(noted_target(made, "target"))
        if tokens.tokenizer_hash != made["tokenizer"]:
            raise ValueError(f"the tokenizer of {tokens.name} is another than they were made with")
        summary.decode = tokens.tokenizer.decode
    except (OSError, ValueError, ImportError) as error:
        why = textwrap.shorten(str(error), 160)
        summary.facts["examples"] = f"token ids in place of text: {why}"
    return summary


def _words(prompt: Prompt) -> tuple[list[Any], Spans]:
    """Words with the white space around them, so that joined they are the text again."""
    words, spans = list[str](), []
    for turn in prompt.messages:
        # `^`: not `\s*` before each word, which looks at a blank text from each of its places anew.
        said = re.findall(r"^\s*\S+\s*|\S+\s*", turn_text(turn))
        said = said or [json.dumps(turn.get("tool_calls"))]
        if turn["role"] == "assistant" or prompt.raw:
            spans.append((len(words), len(words) + len(said)))
        else:
            said[0] = f"{chr(10) if words else ''}{turn['role']}: {said[0]}"
            said[-1] += "\n"
        words += said
    return words, spans

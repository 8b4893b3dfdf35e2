"""What is at a path, read for `headstart data inspect`: conversations, activations or prompts."""

import json
import re
import sys
import textwrap
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

import torch
from rich.console import Console

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
from headstart.data.shards import Shard, shard_paths
from headstart.data.sources import read_rows
from headstart.data.store import ActivationStore
from headstart.data.summary import Seen, Summary, print_summary, summarise
from headstart.data.templates import encode_conversation, encode_prompt
from headstart.heads.loading import load_target_tokens
from headstart.heads.progress import plain_console, progress_bar
from headstart.heads.served import served_config
from headstart.heads.tokens import TargetTokens

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

"""Prompts from JSONL files."""

import json
import random
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

T = TypeVar("T")


@dataclass(frozen=True)
class Prompt:
    """One line of a prompt file."""

    id: str
    category: str
    source: str
    """Where the text comes from; prompts of one source never straddle training and validation."""
    messages: list[dict[str, Any]]
    """Chat turns; a plain prompt is one user turn. Where the source has an answer, the last turn
    is the assistant's."""
    raw: bool
    """True: plain text that no chat template may wrap."""
    tools: list[dict[str, Any]] | None = None
    """JSON schemas of the functions that the assistant may call."""

    @property
    def text(self) -> str:
        """The prompt as plain text, turns on lines of their own."""
        return "\n".join(str(turn["content"]) for turn in self.messages)


def load_prompts(path: str | Path) -> list[Prompt]:
    """Read a JSONL file of `{"prompt": ...}` or `{"messages": [...]}` objects.

    Optional keys: `id`, `category`, `source`, `raw`. Other keys are ignored.

    Raises:
        ValueError: the file is missing or empty, or a line is malformed (file and line named).
    """
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"no prompt file {path}")
    prompts = []
    with path.open(encoding="utf-8") as file:
        for number, line in enumerate(file, start=1):
            if line.strip():
                prompts.append(_parse(line, f"{path}:{number}", f"{path.stem}-{number:05d}"))
    if not prompts:
        raise ValueError(f"{path} holds no prompts")
    return prompts


def _parse(line: str, where: str, default_id: str) -> Prompt:
    try:
        row = json.loads(line)
    except json.JSONDecodeError as error:
        raise ValueError(f"{where}: not JSON ({error.msg} at column {error.colno})") from error
    if not isinstance(row, dict):
        raise ValueError(f'{where}: expected an object such as {{"prompt": ...}}')
    messages = row.get("messages")
    if messages is None:
        if not isinstance(row.get("prompt"), str) or not row["prompt"]:
            raise ValueError(f"{where}: needs a non-empty string `prompt` or a list `messages`")
        messages = [{"role": "user", "content": row["prompt"]}]
    elif not _are_turns(messages):
        raise ValueError(f"{where}: `messages` must be a list of objects with role and content")
    prompt_id = str(row.get("id", default_id))
    return Prompt(
        id=prompt_id,
        category=str(row.get("category", "uncategorised")),
        source=str(row.get("source", prompt_id)),
        messages=messages,
        raw=bool(row.get("raw", False)),
    )


def _are_turns(messages: Any) -> bool:
    return (
        isinstance(messages, list)
        and bool(messages)
        and all(isinstance(turn, dict) and {"role", "content"} <= turn.keys() for turn in messages)
    )


def limit_evenly(prompts: list[Prompt], limit: int | None) -> list[Prompt]:
    """The first `limit` prompts, dealt round robin over the categories, in file order."""
    if limit is None or limit >= len(prompts):
        return prompts
    by_category: dict[str, list[Prompt]] = {}
    for prompt in prompts:
        by_category.setdefault(prompt.category, []).append(prompt)
    kept = {id(p) for p in _round_robin(list(by_category.values()))[:limit]}
    return [p for p in prompts if id(p) in kept]


def split_by_source(
    prompts: list[Prompt], held_out: int, seed: int
) -> tuple[list[Prompt], list[Prompt]]:
    """Split into (training, validation) such that no source is in both.

    Whole sources are held out, drawn with `seed` and dealt over the categories; one with more
    prompts than are still wanted stays in training.

    Raises:
        ValueError: too few prompts or sources to hold that many out.
    """
    groups: dict[str, list[Prompt]] = {}
    for prompt in prompts:
        groups.setdefault(prompt.source, []).append(prompt)
    by_category: dict[str, list[str]] = {}
    for source in random.Random(seed).sample(sorted(groups), len(groups)):
        by_category.setdefault(groups[source][0].category, []).append(source)
    chosen: set[str] = set()
    missing = held_out
    for source in _round_robin(list(by_category.values())):
        if len(groups[source]) <= missing:
            chosen.add(source)
            missing -= len(groups[source])
    if missing or len(chosen) == len(groups):
        raise ValueError(
            f"cannot hold out {held_out} validation prompts of {len(prompts)} from "
            f"{len(groups)} sources: whole sources are held out, so add prompts or sources, or "
            "lower data.validation_conversations"
        )
    training = [p for p in prompts if p.source not in chosen]
    return training, [p for p in prompts if p.source in chosen]


def _round_robin(columns: list[list[T]]) -> list[T]:
    """The first of each column, then the second of each, and so on."""
    longest = max(map(len, columns))
    return [column[i] for i in range(longest) for column in columns if i < len(column)]

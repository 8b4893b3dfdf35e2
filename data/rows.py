"""Rows recognized: the layouts of common data sets, brought into chat turns.

A row that cannot be used raises `BadRow` with a reason that can be counted.
"""

import json
import re
from typing import Any

LAYOUTS = ("messages", "conversations", "prompt", "instruction", "text", "turns")
"""Columns that a row is recognized by; the first one present decides."""
COLUMNS = (
    "messages",
    "prompt",
    "response",
    "text",
    "id",
    "category",
    "source",
    "tools",
    "json_schema",
    "raw",
)
"""What the `columns` of a source can map."""
IDS = ("id", "question_id", "prompt_id", "task_id")
"""Columns that may hold the id of a row; the first one present is taken."""
SYSTEM = ("system", "system_prompt", "system_message")
"""Columns that may hold the system turn; the first one present is taken."""
BESIDE = {
    "prompt": ("response", "completion", "history"),
    "instruction": ("input", "output", "response", "history"),
}
"""Layout -> the other columns that it reads; `unused_columns` names those that none reads."""
MEDIA = {name + plural: name for name in ("image", "audio", "video") for plural in ("", "s")}
"""Columns, and keys of a turn, of what a text cannot stand for -> its kind."""
PLACEHOLDER = re.compile(
    r"<(image)[ _]?\d*>|<\|(image|audio|video)(?:_\w+)?\|>|^<(audio|video)>|<(audio|video)>$",
    re.MULTILINE,
)
"""Where a text refers to an image, a sound or a film, unless its tag is closed: HTML and SVG have
tags of these names too, and `<video>` within a line is a word about them."""
ROLES = {
    "system": "system", "developer": "system",
    "user": "user", "human": "user",
    "assistant": "assistant", "model": "assistant", "gpt": "assistant", "bot": "assistant",
    "tool": "tool", "function": "tool", "observation": "tool",
}  # fmt: skip
"""Roles of OpenAI, Gemma and ShareGPT -> the four that templates know."""
FLAGS = dict.fromkeys(("true", "yes", "y", "t", "on", "1", "1.0"), True) | dict.fromkeys(
    ("false", "no", "n", "f", "off", "0", "0.0"), False
)
"""Words and numbers of tables -> what they say."""
TURN_KEYS = ("name", "tool_call_id", "tool_responses", "reasoning", "reasoning_content")
"""Kept of a turn beside role, content and tool calls: what templates may read."""


class BadRow(ValueError):
    """The reason; what stands in parentheses is not counted apart."""


def flag(row: dict[str, Any], column: str, default: bool) -> bool:
    """A column that says yes or no, in whatever way a table writes it."""
    value = row.get(column, default)
    word = str(value).strip().lower()
    if word not in FLAGS:
        raise BadRow(f"{column} is neither true nor false ({value!r})")
    return FLAGS[word]


def turn_text(turn: dict[str, Any]) -> str:
    """The text of a turn; none where it only calls tools."""
    content = turn.get("content", "")
    return content if isinstance(content, str) else "".join(part["text"] for part in content)


def renamed(row: dict[str, Any], columns: dict[str, str]) -> dict[str, Any]:
    """The row under our names, without empty cells.

    A layout that `columns` maps is the only one looked at.
    """
    chosen = [ours for ours in columns if ours in LAYOUTS]
    for ours in chosen:
        if columns[ours] not in row:
            raise BadRow(f"no column {columns[ours]} (columns: {', '.join(sorted(row))})")
    kept = {k: v for k, v in row.items() if k not in columns and not (chosen and k in LAYOUTS)}
    kept |= {ours: row[theirs] for ours, theirs in columns.items() if theirs in row}
    return {k: v for k, v in kept.items() if k in LAYOUTS or v not in (None, "")}


def layout_of(row: dict[str, Any]) -> str:
    """The first of `LAYOUTS` that the row has."""
    for name in LAYOUTS:
        if row.get(name) is not None:
            return name
    if row.keys().isdisjoint(LAYOUTS):
        raise BadRow(f"no recognized column (columns: {', '.join(sorted(row))})")
    raise BadRow("empty prompt")


def messages_of(row: dict[str, Any], layout: str) -> list[dict[str, Any]]:
    """The turns of a row, its answer last if there is one; at least one is the user's."""
    _check_media(row)
    messages = _with_system(row, layout, _messages(row, layout))
    for turn in messages:
        if turn["role"] != "assistant":
            _check_placeholders(turn_text(turn))
    asked = [turn_text(turn) for turn in messages if turn["role"] == "user"]
    if not asked:
        raise BadRow("no user turn")
    if not all(text.strip() for text in asked):
        raise BadRow("empty prompt")
    return messages


def _messages(row: dict[str, Any], layout: str) -> list[dict[str, Any]]:
    if layout in ("messages", "conversations"):
        return [_turn(turn) for turn in objects(row[layout], layout)]
    if asked := user_turns(row, layout):
        return [{"role": "user", "content": asked[0]}]
    turns = _turns(row, layout, "user")
    if layout == "prompt":
        turns += _turns(row, "response", "assistant") or _turns(row, "completion", "assistant")
    if layout == "instruction":
        both = [turn_text(turn) for turn in turns + _turns(row, "input", "user")]
        turns = [{"role": "user", "content": "\n\n".join(t for t in both if t.strip())}]
        turns += _turns(row, "output", "assistant") or _turns(row, "response", "assistant")
    return _history(row, layout) + turns


def _history(row: dict[str, Any], layout: str) -> list[dict[str, Any]]:
    """Earlier rounds: turns, or pairs of texts, as LLaMA-Factory keeps them."""
    pairs = row.get("history") if "history" in BESIDE.get(layout, ()) else None
    if not isinstance(pairs, list):
        return []
    if all(isinstance(turn, dict) for turn in pairs):
        return [_turn(turn) for turn in pairs]
    turns = []
    for pair in pairs:
        if not (isinstance(pair, list) and len(pair) == 2 and all(type(t) is str for t in pair)):
            raise BadRow("`history` is not a list of pairs of texts")
        turns += [
            {"role": role, "content": text}
            for role, text in zip(("user", "assistant"), pair, strict=True)
        ]
    return turns


def _with_system(
    row: dict[str, Any], layout: str, messages: list[dict[str, Any]]
) -> list[dict[str, Any]]:
    """The turns behind the system turn that a column of its own holds."""
    name = next((name for name in SYSTEM if name in row), None)
    if name is None or layout == "text":
        return messages
    system = row[name]
    if not isinstance(system, str):
        raise BadRow(f"`{name}` is not text")
    first = messages[0] if messages else {"role": ""}
    if not system.strip() or (first["role"] == "system" and turn_text(first) == system):
        return messages
    if first["role"] == "system":
        raise BadRow(f"a system turn and another one (in the column {name})")
    return [{"role": "system", "content": system}, *messages]


def _check_media(row: dict[str, Any]) -> None:
    """Raises `BadRow` for a row, or a turn, that holds more than text."""
    for name in MEDIA.keys() & row.keys():
        if row[name] not in (None, "", [], {}):
            raise BadRow(f"with {MEDIA[name]} (column {name})")


def _check_placeholders(text: str) -> None:
    closed = {kind for kind in set(MEDIA.values()) if f"</{kind}>" in text}
    for found in PLACEHOLDER.finditer(text):
        if (kind := found[found.lastindex or 0]) not in closed:
            raise BadRow(f"with {kind} (placeholder {found[0]})")


def unused_columns(row: dict[str, Any], columns: dict[str, str]) -> set[str]:
    """Columns of a usable row that nothing reads, and as `messages.KEY` keys of its turns."""
    kept = renamed(row, columns)
    layout = layout_of(kept)
    ours = {layout, *BESIDE.get(layout, ()), *IDS, *MEDIA}
    ours |= {"category", "source", "tools", "json_schema", "raw"}
    if layout != "text":
        ours.update(SYSTEM)
    used = {columns.get(name, name) for name in ours}
    unused = {name for name in row if name not in used and row[name] not in (None, "")}
    if "history" in ours and not isinstance(row.get("history"), list | None):
        unused.add("history")
    if layout in ("messages", "conversations"):
        keys = set().union(*objects(kept[layout], layout))
        known = {"role", "from", "content", "value", "tool_calls", *TURN_KEYS, *MEDIA}
        unused |= {f"{columns.get(layout, layout)}.{key}" for key in keys - known}
    return unused


def user_turns(row: dict[str, Any], layout: str) -> list[str]:
    """What the user says in turn, of a row that lists texts; none of a row of another kind.

    In MT-bench's own file the list is `turns`, in its copy on the Hugging Face Hub `prompt`.
    """
    turns = row[layout]
    texts = isinstance(turns, list) and all(isinstance(turn, str) for turn in turns)
    if layout != "turns" and not (layout == "prompt" and turns and texts):
        return []
    if not texts:
        raise BadRow(f"`{layout}` is not a list of texts")
    if not turns:
        raise BadRow("no user turn")
    if not all(turn.strip() for turn in turns):
        raise BadRow("empty prompt")
    return turns


def _turns(row: dict[str, Any], name: str, role: str) -> list[dict[str, Any]]:
    """A column as turns: a text is one of `role`, a list is turns already (as in TRL)."""
    value = row.get(name)
    if isinstance(value, str):
        return [{"role": role, "content": value}]
    if value is None or isinstance(value, list):
        return [_turn(turn) for turn in objects(value or [], name)]
    raise BadRow(f"`{name}` is not text")


def objects(value: Any, name: str) -> list[dict[str, Any]]:
    """A list of objects, or the JSON of one; `name` is its column."""
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except (ValueError, RecursionError):
            raise BadRow(f"`{name}` is not JSON") from None
    if not isinstance(value, list) or not all(isinstance(item, dict) for item in value):
        raise BadRow(f"`{name}` is not a list of objects")
    return value


def json_object(value: Any, name: str) -> dict[str, Any]:
    """An object, or the JSON of one; `name` is its column."""
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except (ValueError, RecursionError):
            raise BadRow(f"`{name}` is not JSON") from None
    if not isinstance(value, dict):
        raise BadRow(f"`{name}` is not an object")
    return value


def _turn(turn: dict[str, Any]) -> dict[str, Any]:
    """A turn of OpenAI's or ShareGPT's kind in OpenAI's."""
    _check_media(turn)
    turn = {key: value for key, value in turn.items() if value is not None}
    name = turn.get("role", turn.get("from"))
    if name is None:
        raise BadRow("turn without a role")
    role = ROLES.get(str(name).lower())
    if role is None:
        raise BadRow(f"unknown role {str(name)[:40]!r}")
    kept = {key: turn[key] for key in TURN_KEYS if key in turn}
    if turn.get("tool_calls"):
        kept["tool_calls"] = objects(turn["tool_calls"], "tool_calls")
    content = turn.get("content", turn.get("value"))
    if content is None:
        if role != "assistant" or "tool_calls" not in kept:
            raise BadRow("turn without content")
        return {"role": role, **kept}
    if not isinstance(content, str):
        content = _text_parts(content)
    return {"role": role, "content": content, **kept}


def _text_parts(content: Any) -> list[dict[str, Any]]:
    parts = objects(content, "content")
    for part in parts:
        if not isinstance(part.get("text"), str):
            raise BadRow(f"content that is not text (a part of type {part.get('type')!r})")
    return [{"type": "text", "text": part["text"]} for part in parts]

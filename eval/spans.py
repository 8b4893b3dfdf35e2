"""What each token of an answer belongs to: a thought, code, JSON, a tool call, or prose.

Told by the target's own marks (of turns, thoughts and tool calls) and by a small parser: code is
what stands in fences, JSON a value that begins a line or the answer, until it ends or breaks its
grammar. Thoughts are thoughts whatever they hold. The prompt is read too, since it may leave a
thought, a fence or a value open; a turn closes all of them.
"""

import re
from bisect import bisect
from collections.abc import Collection, Sequence

from transformers import PreTrainedTokenizerBase

from headstart.data.marks import MARKS, TURNS

THINKING, CODE, JSON, TOOL_CALL, PROSE = "thinking", "code", "json", "tool call", "prose"
SPANS = (THINKING, CODE, JSON, TOOL_CALL, PROSE)

CALLS = {"<|tool_call>": "<tool_call|>", "<tool_call>": "</tool_call>"}
"""What opens a tool call -> what closes it."""
FENCED = {"json": JSON, "jsonl": JSON, "json5": JSON, "jsonc": JSON, "tool_code": TOOL_CALL}
"""Fences that do not hold code, by the first word after them; `tool_code` is Gemma 3's."""
_MARK = "|".join(map(re.escape, {**MARKS, **CALLS}))
_FENCE = (
    r"(?P<fence>(?:(?:[-*+>]|\d{1,9}[.)])[ \t]+)*"  # in a list or a quotation too
    r"(?P<ticks>`{3,}(?=[^`\n]*(?:\n|\Z))|~{3,})[ \t]*(?P<info>\w*)[^\n]*)"
)
_OPENS = rf"[ \t]*(?:{_FENCE}|(?P<json>[\[{{]))"
_AT_ONCE = re.compile(rf"\s*{_OPENS}")
_NEXT = re.compile(rf"(?P<turn>{TURNS.pattern})|(?P<mark>{_MARK})|^{_OPENS}", re.MULTILINE)


def spans_of_tokens(
    tokenizer: PreTrainedTokenizerBase,
    prompt_ids: Sequence[int],
    tokens: Sequence[int],
    ends: Collection[int],
) -> list[str]:
    """`spans_of` an answer's tokens; one of those that end a text belongs to what it ends."""
    pieces = [tokenizer.decode([token]) for token in tokens]
    found = spans_of(tokenizer.decode(prompt_ids), pieces)
    if len(tokens) > 1 and tokens[-1] in ends:
        found[-1] = found[-2]
    return found


def spans_of(prompt: str, pieces: Sequence[str]) -> list[str]:
    """To which of `SPANS` each token of an answer belongs.

    Args:
        prompt: the text before the answer, with its marks.
        pieces: texts of the answer's tokens, marks included. One that holds several spans belongs
            to that of its first character which is no white space.
    """
    starts, names = zip(*_edges(prompt + "".join(pieces), len(prompt)), strict=True)
    found, at = [], len(prompt)
    for piece in pieces:
        first = at + len(piece) - len(piece.lstrip()) if piece.strip() else at
        found.append(names[bisect(starts, first) - 1])
        at += len(piece)
    return found


def _edges(text: str, answer: int) -> list[tuple[int, str]]:
    """Where a span begins, and which; ascending. The answer begins at `answer`."""
    edges, at, after_mark = [(0, PROSE)], 0, True
    while opening := _next_opening(text, at, answer, after_mark):
        span, end = _block(text, opening)
        if span != PROSE:
            indent = len(opening[0]) - len(opening[0].lstrip())
            fenced = opening["fence"] is not None
            start = opening.start("ticks") if fenced else opening.start() + indent
            edges += [(start, span), (end, PROSE)]
        after_mark = opening.re is _NEXT and bool(opening["turn"] or opening["mark"])
        at = end
    return edges


def _next_opening(text: str, at: int, answer: int, after_mark: bool) -> re.Match[str] | None:
    """What opens the next block. After a mark and at the answer's first character a fence or a
    value need not begin a line: a prompt may end in `JSON:`."""
    opening = (after_mark and _AT_ONCE.match(text, at)) or _NEXT.search(text, at)
    if at <= answer and (opening is None or opening.start() > answer):
        return _AT_ONCE.match(text, answer) or opening
    return opening


def _block(text: str, opening: re.Match[str]) -> tuple[str, int]:
    """Which span an opening begins, and where that ends."""
    groups = opening.groupdict()
    if groups.get("turn"):
        return PROSE, opening.end()
    if groups["json"]:
        return _json(text, opening.start("json"))
    turn = TURNS.search(text, opening.end())
    limit = len(text) if turn is None else turn.start()
    if groups["fence"]:
        ticks = groups["ticks"]
        closing = re.compile(
            rf"^[ \t>]*{re.escape(ticks[0])}{{{len(ticks)},}}[ \t\r]*(?:$|(?=<))", re.MULTILINE
        ).search(text, opening.end(), limit)
        return FENCED.get(groups["info"].lower(), CODE), closing.end() if closing else limit
    mark = groups["mark"]
    close = {**MARKS, **CALLS}[mark]
    place = text.find(close, opening.end(), limit)
    return TOOL_CALL if mark in CALLS else THINKING, limit if place < 0 else place + len(close)


_LEXEME = re.compile(
    r'\s*(?:(?P<string>"(?:[^"\\\n]|\\.)*(?P<closed>"|\\\Z|))'
    r"|(?P<word>[-+.\w]+)|(?P<sign>[{}\[\],:]))"
)
_REST = re.compile(r"\s*\Z")
_REST_OF_LINE = re.compile(r"[ \t]*$", re.MULTILINE)
_WORD = re.compile(r"true|false|null|-?(?:0|[1-9]\d*)(?:\.\d+)?(?:[eE][-+]?\d+)?")


def _json(text: str, start: int) -> tuple[str, int]:
    """JSON or prose, and how far, from a bracket that begins a line on: to the value's end, to what
    breaks its grammar, or to the text's end. Prose is what broke before the first key, such as a
    reference in brackets, or an array of no objects with something behind it."""
    open_brackets: list[str] = []
    awaited, keys, at = "value", 0, start
    while True:
        lexeme = _LEXEME.match(text, at)
        following = None if lexeme is None else _following(lexeme, awaited, open_brackets)
        if lexeme is None or following is None:
            cut = text[start] == "{" and at > start + 1 and _REST.match(text, at)
            return (JSON if keys or cut else PROSE), at
        keys += awaited == "colon"
        at, awaited = lexeme.end(), following
        if not open_brackets:
            return (JSON if keys or _REST_OF_LINE.match(text, at) else PROSE), at


def _following(lexeme: re.Match[str], awaited: str, open_brackets: list[str]) -> str | None:
    """What comes after a lexeme where `awaited` may stand: a value, a key, a colon, or a comma or
    bracket; None: it may not stand there. Brackets are opened and closed in `open_brackets`."""
    sign, cut = lexeme["sign"], lexeme.end() == len(lexeme.string)
    if awaited == "colon":
        return "value" if sign == ":" else None
    inside = open_brackets[-1] if open_brackets else ""
    if sign in ("}", "]") and {"}": "{", "]": "["}[sign] == inside:
        first = lexeme.string[: lexeme.start("sign")].rstrip()[-1:] == inside
        if awaited == "comma" or first:
            open_brackets.pop()
            return "comma"
        return None
    if awaited == "comma":
        return {"{": "key", "[": "value"}[inside] if sign == "," else None
    if lexeme["string"] is not None and (lexeme["closed"] or cut):
        return "colon" if awaited == "key" else "comma"
    if awaited == "value" and sign in ("{", "["):
        open_brackets.append(sign)
        return "key" if sign == "{" else "value"
    if awaited == "value" and lexeme["word"] and (cut or _WORD.fullmatch(lexeme["word"])):
        return "comma"
    return None

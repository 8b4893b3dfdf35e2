"""Text that others wrote, such that it is only read: by a terminal, and in Markdown."""

import re

# What could move the cursor, color, rename or fill a terminal is shown, not sent; nor is what turns
# the order of characters around, so that a name reads as another.
_CONTROLS = {c: chr(0x2400 + c) for c in range(32) if chr(c) not in "\n\t"} | {127: "\u2421"}
_CONTROLS |= dict.fromkeys([*range(128, 160), 0x2028, 0x2029], "\ufffd")
_BIDI = [0x061C, 0x200E, 0x200F, *range(0x202A, 0x202F), *range(0x2066, 0x206A)]
_CONTROLS |= dict.fromkeys(_BIDI, "\ufffd")
# An underscore within a word does nothing.
_MARKS = re.compile(r"([\\`*\[\]<>|~&$]|(?<![^\W_])_|_(?![^\W_]))")
_BLOCK = re.compile(r"^(?:([#+-])(?=[#\s-]|$)|(\d+)([.)])(?=\s|$))")


def visible(text: str) -> str:
    """The text with signs in the place of control characters other than line breaks and tabs."""
    return text.translate(_CONTROLS)


def one_line(text: str) -> str:
    """The text in one line, without control characters."""
    return visible(text.replace("\r\n", "\n")).replace("\n", "\u21b5")


def in_markdown(text: str) -> str:
    """Markdown of one line that shows the text as it is, in a paragraph, a heading or a table."""
    escaped = _MARKS.sub(r"\\\1", one_line(text).replace("\t", " ").strip())
    return _BLOCK.sub(lambda m: f"\\{m[1]}" if m[1] else f"{m[2]}\\{m[3]}", escaped)


def code_in_markdown(text: str) -> str:
    """The text as code within a line of Markdown, whatever backticks it holds."""
    line = one_line(text)
    longest = max(map(len, re.findall("`+", line)), default=0)
    fence = "`" * (longest + 1)
    return f"{fence} {line} {fence}" if longest else f"{fence}{line}{fence}"


def markdown_row(cells: list[str]) -> str:
    """A row of a table, each cell as `in_markdown` has it."""
    return f"| {' | '.join(map(in_markdown, cells))} |"

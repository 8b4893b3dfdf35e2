"""Spans of texts made by hand, token by token."""

import re

import pytest

from headstart.eval.spans import CODE, JSON, PROSE, SPANS, THINKING, TOOL_CALL, spans_of

T, C, J, F, P = THINKING, CODE, JSON, TOOL_CALL, PROSE
Parts = list[tuple[str, str]]
"""Pieces of an answer, and what each is."""

TEXTS: dict[str, tuple[str, Parts]] = {
    "prose": ("", [("Hello, world.\nA second line.", P)]),
    "nothing": ("", []),
    "one fence": ("", [("Look:\n", P), ("```python\nx = 1\n```", C), ("\nDone.", P)]),
    "a fence without a language": ("", [("```\nls\n```", C), ("\n", P)]),
    "a fence of tildes": ("", [("~~~sh\nls\n~~~", C), ("\nso", P)]),
    "an indented fence": ("", [("1. Run\n   ", P), ("```sh\n   ls\n   ```", C), ("\n2. Look", P)]),
    "a fence cut off": ("", [("So:\n", P), ("```c\nint main(", C)]),
    "a fence cut off in its ticks": ("", [("So:\n", P), ("```", C)]),
    "fences in a longer fence": (
        "",
        [("````md\n```python\nx\n```\nmore\n````", C), ("\nafter", P)],
    ),
    "tildes in ticks": ("", [("```\n~~~\nx\n~~~\n```", C), ("\nafter", P)]),
    "a longer closing fence": ("", [("```\nx\n`````", C), ("\nafter", P)]),
    "a fence with a language does not close": ("", [("```\nx\n```python\ny\n```", C), ("\nz", P)]),
    "two fences": ("", [("```\na\n```", C), ("\nand\n", P), ("```\nb\n```", C)]),
    "ticks within a line": ("", [("Use ```x``` here.", P)]),
    "ticks that open and close on the first line": ("", [("```print(1)``` prints one.\n\nSo", P)]),
    "JSON in ticks on one line": ("", [('```json {"a": 1}```\nThen', P)]),
    "a fence in a list": (
        "",
        [
            ("- ", P),
            ("```js\n  x\n  ```", C),
            ("\nprose\n1. ", P),
            ("```\n   y\n   ```", C),
            ("\nz", P),
        ],
    ),
    "a fence in a quotation": ("", [("> ", P), ("```\n> x\n> ```", C), ("\nprose", P)]),
    "a fence with carriage returns": ("", [("```python\r\nx\r\n```\r", C), ("\nprose", P)]),
    "JSON in code": ("", [('```python\nx = {\n"a": 1}\n```', C), ("\n", P)]),
    "a fence of JSON": ("", [('```json\n{"a": [1, 2]}\n```', J), ("\nok", P)]),
    "a fence of JSON with code after": (
        "",
        [("```JSON\n[]\n```", J), ("\n", P), ("```\nx\n```", C)],
    ),
    "a fence opened by the prompt": ("Code:\n```python\n", [("x = 1\n```", C), ("\nDone", P)]),
    "a fence that the prompt closed": ("```\nx\n```\n", [("prose", P)]),
    "a fence that a turn closes": (
        "<start_of_turn>user\n```\nx<end_of_turn>\n<start_of_turn>model\n",
        [("No.", P)],
    ),
    "a fence at the end of a turn": ("", [("```\nx\n```", C), ("<end_of_turn>", P)]),
    "an object": ("", [('{"a": 1, "b": [true, null, -1.5e3], "c": {"d": "e"}}', J)]),
    "an object over lines": (
        "",
        [("Here:\n", P), ('{\n  "a": 1,\n  "b": {}\n}', J), ("\nDone.", P)],
    ),
    "an array of objects": ("", [('[{"a": 1}, {"a": 2}]', J), ("\n", P)]),
    "an array alone": ("", [("[1, 2, 3]", J), ("\nNumbers.", P)]),
    "an empty object": ("", [("{}", J)]),
    "text that looks like brackets": ("", [("{name} is here", P)]),
    "a reference": ("", [("[1] Smith, 2020.", P)]),
    "a link": ("", [("[here](http://x)", P)]),
    "a box to tick": ("", [("[ ] buy milk", P)]),
    "brackets in a line": ("", [('Say {"a": 1} now', P)]),
    "a value that begins the answer": (
        "Text: x\n\nJSON:",
        [(" ", P), ('{"a": 1}', J), ("\nDone.", P)],
    ),
    "a fence that begins the answer": ("Code: ", [("```python\nx = 1\n```", C), ("\nDone.", P)]),
    "a value within the answer's line": ("JSON:", [(' so {"a": 1}', P)]),
    "a value that begins the answer in code": ("```python\nx = ", [('{"a": 1}', C)]),
    "a value that begins the answer in a value": ('{"a": ', [('{"b": 1}}', J), ("\nDone.", P)]),
    "escapes": ("", [(r'{"a": "say \"}\" \\"}', J), (" so", P)]),
    "fences in a string": ("", [('{"a": "```"}', J), ("\n", P), ("```\nx", C)]),
    "two objects": ("", [('{"a": 1}', J), ("\n", P), ('{"a": 2}', J)]),
    "an object cut off in a value": ("", [('{"a": "unfin', J)]),
    "an object cut off in a word": ("", [('{"a": tr', J)]),
    "an object cut off in a number": ("", [('{"a": -', J)]),
    "an object cut off in a key": ("", [('{"ab', J)]),
    "an object cut off behind a backslash": ("", [('{"a": "b\\', J)]),
    "an object that breaks": ("", [('{"a": 1,', J), (" b: 2}", P)]),
    "an object whose string has no end": ("", [('{"a":', J), (' "b\n}', P)]),
    "an object that closes wrongly": ("", [('{"a": 1', J), ("]", P)]),
    "a comma too many": ("", [('{"a": 1,', J), ("}", P)]),
    "a number with a leading zero": ("", [('{"a":', J), (" 01}", P)]),
    "C's braces": ("", [('{"a", "b"};', P)]),
    "an object opened by the prompt": ('{"a": [1,', [(" 2], ", J), ('"b": 3}', J), ("\nend", P)]),
    "a thought": ("", [("<|channel>thought\nHm.\n<channel|>", T), ("Four.", P)]),
    "a thought with code": ("", [("<think>```\nx\n</think>", T), ("\nfour", P)]),
    "a thought cut off": ("", [("<|channel>thought\nLet me think", T)]),
    "a thought opened by the prompt": (
        "<|turn>model\n<|channel>thought\n",
        [("Hm.<channel|>", T), ("Four", P)],
    ),
    "an empty thought of the prompt": (
        "<|turn>model\n<|channel>thought\n<channel|>",
        [("Four", P)],
    ),
    "JSON right after a thought": ("", [("<think>x</think>", T), ('{"a": 1}', J)]),
    "a fence after a thought": ("", [("<think>x</think>", T), ("```\nx\n```", C), ("\n", P)]),
    "a thought, code and an end": (
        "<|turn>user\nHi<turn|>\n<|turn>model\n",
        [("<|channel>thought\nx<channel|>", T), ("So:\n", P), ("```\ny\n```", C), ("<turn|>", P)],
    ),
    "a tool call": ("", [("Wait. ", P), ("<|tool_call>call:add{a:1}<tool_call|>", F), ("ok", P)]),
    "a tool call cut off": ("", [('<|tool_call>call:f{x:<|"|>```', F)]),
    "a tool call after a thought": (
        "",
        [("<think>x</think>", T), ("<|tool_call>call:f{}<tool_call|>", F)],
    ),
    "a tool call of Gemma 3": ("", [("```tool_code\nf(1)\n```", F), ("\n", P)]),
    "JSON at the beginning of a turn": (
        "<start_of_turn>model\n",
        [('{"a": 1}', J), ("<end_of_turn>", P)],
    ),
}


def tokens(text: str) -> list[str]:
    """Marks whole, words with the space before them, signs one by one."""
    return re.findall(r"<\|?\w+\|?>|<end_of_turn>| ?\w+|\s|[^\w\s]", text)


@pytest.mark.parametrize("name", TEXTS)
def test_each_token_is_of_the_span_that_a_reader_sees(name: str) -> None:
    prompt, parts = TEXTS[name]
    pieces = [(token, span) for text, span in parts for token in tokens(text)]
    assert "".join(token for token, _ in pieces) == "".join(text for text, _ in parts)
    found = spans_of(prompt, [token for token, _ in pieces])
    assert list(zip([token for token, _ in pieces], found, strict=True)) == pieces


def test_the_texts_are_enough_and_of_every_span() -> None:
    assert len(TEXTS) >= 50
    assert {span for _, parts in TEXTS.values() for _, span in parts} == set(SPANS)


def test_a_text_of_many_brackets_takes_no_time_that_grows_faster_than_it() -> None:
    """Each opening is looked at once: half a million of them end."""
    assert spans_of("", ["[\n"] * 20_000)[0] == PROSE

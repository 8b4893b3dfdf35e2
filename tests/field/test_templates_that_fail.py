"""Chat templates that leave something out, fail, or make nothing."""

from typing import Any

import pytest

from headstart.data.prompts import Prompt
from headstart.data.templates import encode_conversation, encode_prompt
from tests.data.chat_templates import GEMMA3, chat_tokenizer

USER = {"role": "user", "content": "abc"}
ANSWER = {"role": "assistant", "content": "yes"}
SYSTEM = {"role": "system", "content": "French"}
TURNS = (
    "{{ bos_token }}{% for m in messages %}{% if SOME %}<start_of_turn>{{ m.role }}\n"
    "{{ TEXT }}<end_of_turn>\n{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<start_of_turn>assistant\n{% endif %}"
)


def template(some: str = "true", text: str = "m.content") -> str:
    return TURNS.replace("SOME", some).replace("TEXT", text)


@pytest.mark.parametrize(
    ("jinja", "messages", "tools"),
    [
        (template("m.role != 'system'"), [SYSTEM, USER, ANSWER], None),
        (template("loop.index > 2"), [USER, ANSWER, {**USER, "content": "more"}, ANSWER], None),
        (template(text="m.content[:2]"), [USER, ANSWER], None),
        (template(), [USER, ANSWER], [{"type": "function", "function": {"name": "weather"}}]),
        (GEMMA3, [USER, ANSWER], [{"type": "function", "function": {"name": "weather"}}]),
        ("{{ 1 / 0 }}", [USER, ANSWER], None),
        ("{{ messages[9].content[0].x.y }}", [USER, ANSWER], None),
        ("{# nothing #}", [USER, ANSWER], None),
    ],
)
def test_a_row_of_which_a_template_makes_less_than_it_says_is_refused_by_both_ways_in(
    jinja: str, messages: list[dict[str, Any]], tools: list[dict[str, Any]] | None
) -> None:
    tokenizer = chat_tokenizer(jinja)
    row = Prompt("p", "c", "s", messages, raw=False, tools=tools)
    with pytest.raises(ValueError, match="template"):
        encode_prompt(row, tokenizer)
    with pytest.raises(ValueError, match="template"):
        encode_conversation(row, tokenizer, [1])


def test_a_template_that_trims_or_folds_white_space_leaves_nothing_out() -> None:
    tokenizer = chat_tokenizer(template(text="m.content | trim | replace('\n', ' ')"))
    row = Prompt("p", "c", "s", [{"role": "user", "content": " a\nb  c \n"}], raw=False)
    assert "a b  c<end_of_turn>" in tokenizer.decode(encode_prompt(row, tokenizer))


@pytest.mark.parametrize(
    "turn",
    [
        {"role": "tool", "content": "x", "tool_responses": [{"response": {"v": "a<bos>b"}}]},
        {"role": "assistant", "content": "", "tool_calls": [
            {"function": {"name": "f", "arguments": {"a<eos>": "b"}}}
        ]},
        {"role": "user", "content": [
            {"type": "text", "text": "a<end_of"}, {"type": "text", "text": "_turn>b"}
        ]},
    ],
)  # fmt: skip
def test_marks_in_calls_in_responses_and_across_parts_are_found(turn: dict[str, Any]) -> None:
    row = Prompt("p", "c", "s", [USER, turn, USER], raw=False)
    with pytest.raises(ValueError, match="may write"):
        encode_prompt(row, chat_tokenizer(GEMMA3))

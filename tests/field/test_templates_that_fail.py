"""Chat templates that leave something out, fail, or make nothing."""

import json
from pathlib import Path
from typing import Any

import pytest

from headstart.configs.schema import Config
from headstart.data.prepare import encode_source
from headstart.data.prompts import Prompt
from headstart.data.templates import encode_conversation, encode_prompt
from headstart.heads.loading import tiny_target
from headstart.heads.target import Target
from tests.helpers.chat_templates import CHATML, GEMMA3, GEMMA4, chat_tokenizer

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


CALL = {"type": "function", "function": {"name": "add", "arguments": {"a": 1}}}
CALLED = {"role": "assistant", "content": "", "tool_calls": [CALL]}
RETURNED = {"role": "tool", "name": "add", "content": '{"sum": "three"}'}
NO_TOOLS = template("m.role != 'tool'")


@pytest.mark.parametrize(
    ("jinja", "messages"),
    [
        (GEMMA3, [USER, CALLED]),
        (GEMMA3, [USER, {**CALLED, "content": "I add."}, USER, ANSWER]),
        (CHATML, [USER, CALLED, RETURNED, ANSWER]),
        (CHATML, [USER, {**ANSWER, "tool_calls": [{"function": "add"}]}, USER, ANSWER]),
        (NO_TOOLS, [USER, {**ANSWER, "content": "add()"}, RETURNED, ANSWER]),
        (GEMMA4, [USER, {**ANSWER, "content": "add()"}, RETURNED, ANSWER]),
        (template(text="m.content[:14]"), [USER, {**ANSWER, "content": "yes, it is so, I say"}]),
        (GEMMA4, [USER, {**ANSWER, "content": "<|channel>thought\nhm"}, USER, ANSWER]),
    ],
)
def test_calls_results_and_answers_that_a_template_leaves_out_are_refused_by_both_ways_in(
    jinja: str, messages: list[dict[str, Any]]
) -> None:
    tokenizer = chat_tokenizer(jinja)
    with pytest.raises(ValueError, match="leaves out"):
        encode_conversation(Prompt("p", "c", "s", messages, raw=False), tokenizer, [1])
    with pytest.raises(ValueError, match="leaves out"):
        encode_prompt(Prompt("p", "c", "s", [*messages, USER], raw=False), tokenizer)


def test_a_tools_result_that_a_template_renders_anew_is_not_left_out() -> None:
    jinja = template(text="m.content | tojson | replace('u', 'u')")
    turns = [
        USER,
        ANSWER,
        {**RETURNED, "content": '{"v": "a\\nbcd \u00e9t\u00e9", "n": 3}\nx'},
        ANSWER,
    ]
    ids, _ = encode_conversation(
        Prompt("p", "c", "s", turns, raw=False), chat_tokenizer(jinja), [1]
    )
    assert "bcd" in chat_tokenizer(jinja).decode(ids)


def test_a_system_turn_that_is_not_first_is_refused_where_the_template_drops_it_alone() -> None:
    row = Prompt("p", "c", "s", [USER, ANSWER, SYSTEM, USER, ANSWER], raw=False)
    with pytest.raises(ValueError, match="leaves out what a system turn says"):
        encode_conversation(row, chat_tokenizer(GEMMA4), [1])
    tokenizer = chat_tokenizer(CHATML)
    ids, spans = encode_conversation(row, tokenizer, [1])
    assert "<|im_start|>system\nFrench<|im_end|>" in tokenizer.decode(ids)
    assert [tokenizer.decode(ids[a:b]) for a, b in spans] == ["yes<|im_end|>"] * 2


DROPS = CHATML.replace(
    "+ message.content +",
    "+ (message.content.split('</think>')[-1].lstrip('\\n') if message.role == 'assistant' "
    "else message.content) +",
)
"""The history without thoughts, as QwQ and DeepSeek R1 have it."""
OPENS = DROPS.replace("assistant\\n' if", "assistant\\n<think>\\n' if")
"""And a generation prompt that opens one."""
KEEPS = CHATML.replace("assistant\\n' if", "assistant\\n<think>\\n' if")
MEDGEMMA = GEMMA3.replace("message.content | trim", "message.content.split('<unused95>')[-1]")
MEDGEMMA = MEDGEMMA.replace("model\\n' if add", "model\\n<unused94>thought\\n' if add")
GEMMA4_OFFICIAL = GEMMA4.replace("if old else message.content)", "if model else message.content)")
"""Google's drops the thought of the last turn too."""


@pytest.mark.parametrize(
    ("jinja", "answer", "written"),
    [
        (OPENS, "<think>\nhm\n</think>\n\nyes", "hm\n</think>\n\nyes<|im_end|>"),
        (OPENS, "<think>hm</think>yes", "hm</think>yes<|im_end|>"),
        (OPENS, "hm\n</think>\n\nyes", "hm\n</think>\n\nyes<|im_end|>"),
        (OPENS, "<think>\n\n</think>\n\nyes", "\n</think>\n\nyes<|im_end|>"),
        (KEEPS, "<think>hm</think>yes", "hm</think>yes<|im_end|>"),
        (KEEPS, "<think>\nhm\n</think>\nyes", "hm\n</think>\nyes<|im_end|>"),
        (DROPS, "<think>\nhm\n</think>\n\nyes", "<think>\nhm\n</think>\n\nyes<|im_end|>"),
        (MEDGEMMA, "<unused94>thought\nhm<unused95>yes", "hm<unused95>yes<end_of_turn>"),
    ],
)
def test_an_answer_is_trained_on_with_its_thought_where_the_target_would_write_one(
    jinja: str, answer: str, written: str
) -> None:
    tokenizer = chat_tokenizer(jinja)
    row = Prompt("p", "c", "s", [USER, {**ANSWER, "content": answer}], raw=False)
    ids, [(start, end)] = encode_conversation(row, tokenizer, [1])
    assert tokenizer.decode(ids[start:end]) == written
    assert ids[:start] == encode_prompt(row, tokenizer)


@pytest.mark.parametrize("thinking", [True, False])
def test_a_thought_that_gemma_4_drops_is_trained_on_with_thinking_alone(thinking: bool) -> None:
    tokenizer = chat_tokenizer(GEMMA4_OFFICIAL)
    thought = "<|channel>thought\nhm\n<channel|>"
    row = Prompt("p", "c", "s", [USER, {**ANSWER, "content": thought + "yes"}], raw=False)
    kwargs = {"enable_thinking": thinking}
    ids, [(start, end)] = encode_conversation(row, tokenizer, [1], kwargs)
    assert tokenizer.decode(ids[start:end]) == (thought if thinking else "") + "yes<turn|>"
    assert ids[:start] == encode_prompt(row, tokenizer, kwargs)


@pytest.mark.parametrize(
    "answer",
    [
        ANSWER,
        {**ANSWER, "reasoning_content": "hm"},
        {**CALLED, "content": "<think>hm</think>"},
    ],
)
def test_an_answer_without_a_thought_is_refused_where_the_generation_prompt_opens_one(
    answer: dict[str, Any],
) -> None:
    row = Prompt("p", "c", "s", [USER, answer], raw=False)
    with pytest.raises(ValueError, match=r"<think>|leaves out calls"):
        encode_conversation(row, chat_tokenizer(OPENS), [1])


def test_a_rendered_text_without_the_thought_that_its_generation_prompt_opens_is_refused() -> None:
    turns = "<|im_start|>user\nabc<|im_end|>\n<|im_start|>assistant\n{}yes<|im_end|>\n"
    tokenizer = chat_tokenizer(OPENS)
    text, thought = (
        Prompt("p", "c", "s", [{"role": "user", "content": turns.format(more)}], raw=True)
        for more in ("", "<think>\nhm\n</think>\n\n")
    )
    with pytest.raises(ValueError, match=r"<think>.*headstart regenerate"):
        encode_conversation(text, tokenizer, [1])
    ids, [(start, end)] = encode_conversation(thought, tokenizer, [1])
    assert tokenizer.decode(ids[start:end]) == "hm\n</think>\n\nyes<|im_end|>"
    assert ids[:start] == encode_prompt(thought, tokenizer)


@pytest.mark.parametrize(
    ("jinja", "answer", "lost"),
    [
        (GEMMA3, {**ANSWER, "reasoning_content": "hm"}, True),
        (GEMMA3, {**ANSWER, "reasoning": "hm"}, True),
        (GEMMA4_OFFICIAL, {**ANSWER, "content": "<|channel>thought\nhm<channel|>yes"}, True),
        (GEMMA3, {**ANSWER, "content": "<think>hm</think>yes"}, False),
        (DROPS, {**ANSWER, "content": "<think>hm</think>yes"}, False),
        (GEMMA3, ANSWER, False),
    ],
)
def test_thoughts_that_a_template_leaves_out_of_a_data_set_are_counted(
    jinja: str,
    answer: dict[str, Any],
    lost: bool,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    path = tmp_path / "thinking.jsonl"
    rows = [{"id": "r1", "messages": [USER, ANSWER]}, {"id": "r2", "messages": [USER, answer]}]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    target = Target(tiny_target("tiny-gemma3"), chat_tokenizer(jinja), "tiny")
    assert len(encode_source(str(path), target, Config())) == 2
    told = capsys.readouterr().err
    assert ("1 of 2" in told and "r2" in told and "thinking.jsonl" in told) is lost

"""Columns that carry meaning: used, counted as bad by name, or listed as not used."""

import json
from pathlib import Path
from typing import Any

import pytest

from headstart.configs.schema import SourceConfig
from headstart.data.inspection import inspect_path
from headstart.data.prompts import load_prompts
from headstart.data.templates import encode_conversation, encode_prompt
from tests.helpers.chat_templates import CHATML, GEMMA3, chat_tokenizer

Turns = list[tuple[str, str]]


def written(path: Path, *rows: dict[str, Any]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def turns_of(tmp_path: Path, row: dict[str, Any]) -> Turns:
    [prompt] = load_prompts(written(tmp_path / "rows.jsonl", row))
    return [(turn["role"], turn["content"]) for turn in prompt.messages]


USER, ANSWER = ("user", "hi"), ("assistant", "yo")
SYSTEM = ("system", "Be brief.")


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        (
            {
                "conversations": [
                    {"from": "human", "value": "hi"},
                    {"from": "gpt", "value": "yo"},
                ],
                "system": "Be brief.",
            },
            [SYSTEM, USER, ANSWER],
        ),
        ({"instruction": "hi", "output": "yo", "system": "Be brief."}, [SYSTEM, USER, ANSWER]),
        ({"prompt": "hi", "response": "yo", "system_prompt": "Be brief."}, [SYSTEM, USER, ANSWER]),
        (
            {"messages": [{"role": "user", "content": "hi"}], "system_message": "Be brief."},
            [SYSTEM, USER],
        ),
        (
            {
                "messages": [
                    {"role": "system", "content": "Be brief."},
                    {"role": "user", "content": "hi"},
                ],
                "system": "Be brief.",
            },
            [SYSTEM, USER],
        ),
        ({"prompt": "hi", "system": ""}, [USER]),
        (
            {"instruction": "hi", "output": "yo", "history": [["a", "b"], ["c", "d"]]},
            [("user", "a"), ("assistant", "b"), ("user", "c"), ("assistant", "d"), USER, ANSWER],
        ),
        (
            {"instruction": "hi", "input": "", "history": [["a", "b"]], "system": "Be brief."},
            [SYSTEM, ("user", "a"), ("assistant", "b"), USER],
        ),
    ],
)
def test_a_column_beside_the_turns_is_part_of_the_conversation(
    row: dict[str, Any], expected: Turns, tmp_path: Path
) -> None:
    assert turns_of(tmp_path, row) == expected


def test_a_system_column_reaches_the_template_on_both_ways_in(tmp_path: Path) -> None:
    row = {"instruction": "hi", "output": "yo", "system": "Be brief."}
    [prompt] = load_prompts(written(tmp_path / "rows.jsonl", row))
    for template, begun in (
        (GEMMA3, "<bos><start_of_turn>user\nBe brief.\n\nhi<end_of_turn>\n<start_of_turn>model\n"),
        (
            CHATML,
            "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nhi<|im_end|>\n"
            "<|im_start|>assistant\n",
        ),
    ):
        tokenizer = chat_tokenizer(template)
        assert tokenizer.decode(encode_prompt(prompt, tokenizer)) == begun
        ids, [(start, _)] = encode_conversation(prompt, tokenizer, [])
        assert tokenizer.decode(ids[:start]) == begun


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"prompt": "What is this?", "images": ["a.png"]}, "with image"),
        ({"prompt": "What is this?", "image": {"bytes": "x"}}, "with image"),
        ({"conversations": [{"from": "human", "value": "<image>\nWhat?"}]}, "with image"),
        ({"instruction": "Compare <image 1> with <image 2>."}, "with image"),
        ({"prompt": "<|image_1|>\nWhat?"}, "with image"),
        ({"prompt": "<video>\nWhat?"}, "with video"),
        ({"prompt": "Write down what is said.", "audio": {"path": "a.wav"}}, "with audio"),
        ({"messages": [{"role": "user", "content": "What?", "images": ["a"]}]}, "with image"),
        ({"prompt": "hi", "system": ["Be brief."]}, "`system` is not text"),
        (
            {"messages": [{"role": "system", "content": "a"}, {"role": "user", "content": "b"}],
             "system": "c"},
            "a system turn and another one",
        ),
        ({"instruction": "hi", "history": [["a"]]}, "`history`"),
    ],
)  # fmt: skip
def test_a_row_that_text_cannot_stand_for_is_counted_by_that_name(
    row: dict[str, Any], reason: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = written(tmp_path / "rows.jsonl", row, {"prompt": "fine"})
    with pytest.raises(ValueError, match=f"rows.jsonl:1: {reason}"):
        load_prompts(path)
    [prompt] = load_prompts(path, max_bad_rows=0.5)
    assert prompt.messages[0]["content"] == "fine"
    assert f"1 {reason}" in capsys.readouterr().err


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": "What is this?", "images": []},
        {"prompt": "Is <video> the right element, or <audio>?"},
        {"prompt": "<rss><image><url>x</url></image></rss>: what is wrong?"},
        {"prompt": "Draw a square.", "response": "<image>"},
    ],
)
def test_a_text_about_images_or_an_empty_column_of_them_is_used(
    row: dict[str, Any], tmp_path: Path
) -> None:
    assert turns_of(tmp_path, row)[0] == ("user", row["prompt"])


@pytest.mark.parametrize(
    ("row", "columns", "unused"),
    [
        ({"prompt": "hi", "license": "MIT", "score": 3, "id": "a", "empty": None}, {},
         "license, score"),
        ({"prompt": "hi", "chosen": "yo", "rejected": "no"}, {}, "chosen, rejected"),
        ({"text": "a document", "system": "Be brief."}, {}, "system"),
        ({"messages": [{"role": "user", "content": "hi", "weight": 0}], "prompt": "hi"}, {},
         "messages.weight, prompt"),
        ({"question": "hi", "prompt": "other", "id": "a"}, {"prompt": "question"}, "prompt"),
        ({"prompt": "hi", "output": "yo"}, {}, "output"),
        ({"prompt": "hi", "history": "none"}, {}, "history"),
    ],
)  # fmt: skip
def test_columns_that_are_not_used_are_listed_in_the_log_and_by_inspect(
    row: dict[str, Any], columns: dict[str, str], unused: str, tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    path = written(tmp_path / "rows.jsonl", row, row | {"id": "b"})
    load_prompts(SourceConfig(path=str(path), columns=columns))
    log = capsys.readouterr()
    assert [line for line in log.out.splitlines() if unused in line] == [
        f"{path}: Columns not used: {unused}"
    ]
    if not columns:
        inspect_path(path)
        assert capsys.readouterr().out.count(f"Columns not used: {unused}\n") == 1


def test_rows_whose_every_column_is_used_are_no_reason_for_a_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    row = {"instruction": "a", "input": "b", "output": "c", "id": 1, "category": "x", "source": "y"}
    load_prompts(written(tmp_path / "rows.jsonl", row))
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize(
    ("written", "raw"),
    [
        ("yes", True), ("Y", True), ("T", True), (1.0, True), ("on", True), (True, True),
        ("no", False), (0, False), ("F", False), (0.0, False),
    ],
)  # fmt: skip
def test_a_row_that_says_raw_in_the_way_of_its_table_is_raw(
    tmp_path: Path, written: object, raw: bool
) -> None:
    (tmp_path / "rows.jsonl").write_text(json.dumps({"prompt": "a", "raw": written}) + "\n")
    [prompt] = load_prompts(tmp_path / "rows.jsonl")
    assert prompt.raw is raw


@pytest.mark.parametrize("written", ["maybe", 2, "raw", [True]])
def test_a_row_whose_raw_says_neither_is_named(tmp_path: Path, written: object) -> None:
    (tmp_path / "rows.jsonl").write_text(json.dumps({"prompt": "a", "raw": written}) + "\n")
    with pytest.raises(ValueError, match=r"rows\.jsonl.*raw"):
        load_prompts(tmp_path / "rows.jsonl")

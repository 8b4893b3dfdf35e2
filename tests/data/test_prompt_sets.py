"""Prompt sets from files in their published shape; what the rows say is invented."""

import gzip
import json
from pathlib import Path
from typing import Any

import datasets
import pytest

from headstart.data.prompts import PLACEHOLDER, SETS, Prompt, load_prompt_set, load_prompts


def chat(prompt_id: str, category: str, *turns: str, source: str | None = None) -> Prompt:
    messages = [{"role": "user", "content": turns[0]}]
    source = source or prompt_id
    return Prompt(prompt_id, category, source, messages, False, later_turns=list(turns[1:]))


def write(path: Path, *rows: dict[str, Any]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def question(number: int, category: str, *turns: str) -> dict[str, Any]:
    return {"question_id": number, "category": category, "turns": list(turns)}


def speed(turns: list[str]) -> dict[str, Any]:
    return {
        "question_id": "q1", "category": "rag", "sub_category": "s", "turns": turns,
        "source": "org/texts", "src_id": "7", "difficulty": "easy", "multiturn": True,
    }  # fmt: skip


HUMANEVAL = {
    "task_id": "Own/0", "prompt": 'def twice(x):\n    """2x"""\n', "entry_point": "twice",
    "canonical_solution": "    return 2 * x\n", "test": "def check(f):\n    assert f(1) == 2\n",
}  # fmt: skip
GSM8K = {"question": "Two and two?", "answer": "2+2=<<2+2=4>>4\n#### 4"}
MBPP = {"code": "def f(): pass", "test_list": ["assert f(1)", "assert f(2)"]}
MBPP_FULL = MBPP | {"text": "Do f.", "test_setup_code": "", "challenge_test_list": []}
MBPP_PROMPT = (
    "You are an expert Python programmer, and here is your task: Do f. Your code should pass "
    "these tests:\n\nassert f(1)\nassert f(2)\n"
)


def test_spec_bench_has_its_categories_and_those_of_mt_bench_as_one(tmp_path: Path) -> None:
    rows = [
        question(1, "writing", "Tell.", "Again."),
        question(2, "humanities", "Why?", "Why not?"),
        question(3, "math_reasoning", "1+1?") | {"reference": ["2"]},
        question(4, "rag", "Read."),
    ]
    assert load_prompt_set(f"spec-bench={write(tmp_path / 'question.jsonl', *rows)}") == [
        chat("1", "mt_bench", "Tell.", "Again."),
        chat("2", "mt_bench", "Why?", "Why not?"),
        chat("3", "math_reasoning", "1+1?"),
        chat("4", "rag", "Read."),
    ]


def test_mt_bench_keeps_its_categories_and_second_turns(tmp_path: Path) -> None:
    row = question(101, "reasoning", "Who?", "And then?") | {"reference": ["Me", "You"]}
    path = write(tmp_path / "question.jsonl", row)
    assert load_prompt_set(f"mt-bench={path}") == [chat("101", "reasoning", "Who?", "And then?")]


@pytest.mark.parametrize("name", ["HumanEval.jsonl", "HumanEval.jsonl.gz"])
def test_humaneval_is_raw_text_as_it_stands(name: str, tmp_path: Path) -> None:
    line = json.dumps(HUMANEVAL).encode() + b"\n"
    (tmp_path / name).write_bytes(gzip.compress(line) if name.endswith("gz") else line)
    messages = [{"role": "user", "content": HUMANEVAL["prompt"]}]
    expected = Prompt("Own/0", "humaneval", "Own/0", messages, raw=True)
    assert load_prompt_set(f"humaneval={tmp_path / name}") == [expected]


def test_gsm8k_asks_the_question_without_its_answer(tmp_path: Path) -> None:
    path = write(tmp_path / "test.jsonl", GSM8K)
    assert load_prompt_set(f"gsm8k={path}") == [chat("test-00001", "gsm8k", "Two and two?")]


def test_mbpp_asks_the_tasks_of_its_test_split_with_their_tests(tmp_path: Path) -> None:
    full = write(tmp_path / "mbpp.jsonl", *(MBPP_FULL | {"task_id": i} for i in (10, 11, 510, 511)))
    expected = [chat(str(i), "mbpp", MBPP_PROMPT) for i in (11, 510)]
    assert load_prompt_set(f"mbpp={full}") == expected
    row = MBPP | {"source_file": "x.ipynb", "prompt": "Do f.", "test_imports": []}
    sanitized = tmp_path / "sanitized-mbpp.json"
    sanitized.write_text(json.dumps([row | {"task_id": i} for i in (2, 11, 510)]))
    assert load_prompt_set(f"mbpp={sanitized}") == expected


def test_speed_bench_is_the_same_from_turns_and_as_its_script_writes_it(tmp_path: Path) -> None:
    row = speed(["Read.", "Now answer."])
    expected = [chat("q1", "rag", "Read.", "Now answer.", source="org/texts")]
    assert load_prompt_set(f"speed-bench={write(tmp_path / 'turns.jsonl', row)}") == expected
    messages = [{"role": "user", "content": turn} for turn in row.pop("turns")]
    prepared = write(tmp_path / "qualitative.jsonl", row | {"messages": messages})
    assert load_prompt_set(f"speed-bench={prepared}") == expected


def test_a_placeholder_of_speed_bench_is_an_error_that_says_how_to_fill_it(tmp_path: Path) -> None:
    path = write(tmp_path / "q.jsonl", speed(["a"]), speed([f"{PLACEHOLDER} USING IT\n\n{{x}}"]))
    with pytest.raises(ValueError, match=r"q\.jsonl:2: a placeholder .*prepare\.py.*=PATH"):
        load_prompt_set(f"speed-bench={path}")


@pytest.mark.parametrize(
    ("name", "asked", "row", "expected"),
    [
        (
            "mt-bench",
            ("HuggingFaceH4/mt_bench_prompts", None, "train"),
            {"prompt": ["a", "b"], "prompt_id": 5, "category": "stem", "reference": []},
            chat("5", "stem", "a", "b"),
        ),
        (
            "humaneval",
            ("openai/openai_humaneval", "openai_humaneval", "test"),
            HUMANEVAL,
            Prompt(
                "Own/0",
                "humaneval",
                "Own/0",
                [{"role": "user", "content": HUMANEVAL["prompt"]}],
                raw=True,
            ),
        ),
        (
            "gsm8k",
            ("openai/gsm8k", "main", "test"),
            GSM8K,
            chat("gsm8k-00000", "gsm8k", "Two and two?"),
        ),
        (
            "mbpp",
            ("google-research-datasets/mbpp", "full", "test"),
            MBPP_FULL | {"task_id": 11},
            chat("11", "mbpp", MBPP_PROMPT),
        ),
        (
            "speed-bench",
            ("nvidia/SPEED-Bench", "qualitative", "test"),
            speed(["a"]),
            chat("q1", "rag", "a", source="org/texts"),
        ),
    ],
)
def test_a_name_alone_asks_the_hub_for_its_test_split(
    name: str,
    asked: tuple[str, str | None, str],
    row: dict[str, Any],
    expected: Prompt,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    calls = []

    def load_dataset(path: str, config: str | None, **kwargs: Any) -> list[dict[str, Any]]:
        calls.append((path, config, kwargs["split"]))
        return [row]

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    assert load_prompt_set(name) == [expected]
    assert calls == [asked]


def test_a_source_that_is_no_set_is_read_as_ever(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("gsm8k").mkdir()
    path = write(Path("gsm8k/a=b.jsonl"), {"prompt": "a"})
    for name in (str(path), str(path.absolute()), "./gsm8k", "gsm8k/*.jsonl"):
        assert load_prompt_set(name) == load_prompts(name)
    monkeypatch.setattr(datasets, "load_dataset", lambda path, *_, **__: [{"prompt": path}])
    assert [p.text for p in load_prompt_set("org/own")] == ["org/own"]


@pytest.mark.parametrize("name", ["humanevl", "absent.jsonl", "humanevl=a.jsonl", "a/b/absent"])
def test_an_unknown_name_lists_the_sets(name: str) -> None:
    with pytest.raises(ValueError, match=f"no prompt file {name}, and no prompt set: ") as error:
        load_prompt_set(name)
    assert all(known in str(error.value) for known in SETS)


@pytest.mark.parametrize("name", list(SETS))
@pytest.mark.parametrize("path", ["", "org/none", "absent/*.jsonl"])
def test_a_file_that_is_not_there_says_where_the_set_is_published(name: str, path: str) -> None:
    with pytest.raises(ValueError, match=f"{name} is published as .*: give {name}=PATH") as error:
        load_prompt_set(f"{name}={path}")
    assert str(error.value).startswith(f"no prompt file {path};")
    assert SETS[name].published in str(error.value)


def test_what_the_hub_does_not_have_is_named_with_its_file(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with pytest.raises(ValueError, match=r"not on the Hugging Face Hub; .*spec_bench/question"):
        load_prompt_set("spec-bench")
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(ValueError, match=r"cannot load .*; gsm8k is published as .*test\.jsonl"):
        load_prompt_set("gsm8k")


@pytest.mark.parametrize(
    ("name", "row", "reason"),
    [
        ("spec-bench", {"question_id": 1, "category": "qa"}, "no recognized column"),
        ("humaneval", {"task_id": "a"}, "no column prompt"),
        ("gsm8k", {"prompt": "a"}, "no column question"),
        ("mbpp", {"text": "a", "task_id": 11}, "no task with a test_list"),
        ("speed-bench", {"messages": ["a"]}, "`messages` is not a list of objects"),
    ],
)
def test_a_row_of_another_shape_is_named(
    name: str, row: dict[str, Any], reason: str, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=rf"a\.jsonl:1: {reason}"):
        load_prompt_set(f"{name}={write(tmp_path / 'a.jsonl', row)}")


def test_every_set_is_in_the_documentation() -> None:
    page = (Path(__file__).resolve().parents[2] / "docs/how-to/evaluate-and-compare.md").read_text()
    for name, chosen in SETS.items():
        [line] = [line for line in page.splitlines() if line.startswith(f"| `{name}` |")]
        assert f"`{chosen.source.get('path', name)}`" in line

"""Published benchmarks as prompt sets of an evaluation, by their names.

No set is part of Headstart: it is read from the Hugging Face Hub, or from the file that its authors
publish. Published test splits are for evaluation only and are never trained on.
"""

import glob
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from headstart.configs.schema import SourceConfig
from headstart.data.prompts import Prompt, load_prompts
from headstart.data.rows import BadRow, objects
from headstart.data.sources import HUB_ID

Columns = dict[str, Any]

MT_BENCH = (
    "writing", "roleplay", "reasoning", "math", "coding", "extraction", "stem", "humanities",
)  # fmt: skip
"""Categories of MT-bench, which Spec-Bench reports as one (its evaluation/speed.py)."""
MBPP_TEST = range(11, 511)
"""Task ids that MBPP evaluates on; its README gives the others to training and few-shot prompts."""
MBPP_PROMPT = (
    "You are an expert Python programmer, and here is your task: {task} "
    "Your code should pass these tests:\n\n{tests}\n"
)
"""How MBPP's README asks, without its worked examples and the markers around their code."""
PLACEHOLDER = "FULL BENCHMARK DATA SHOULD BE FETCHED FROM THE SOURCE"
"""Begins a prompt that SPEED-Bench may not pass on (TURNS_PLACEHOLDER of its prepare.py)."""


def _as_it_is(row: Columns) -> Columns | None:
    return row


@dataclass(frozen=True)
class PromptSet:
    """Where a benchmark is found, and how a row of it becomes a prompt."""

    published: str
    """Its own file, as an error names it."""
    hub: str | None = None
    """Id on the Hugging Face Hub. None: only the file is published."""
    config: str | None = None
    split: str = "test"
    columns: dict[str, str] = field(default_factory=dict)
    """As in `SourceConfig`. Mapped to `text` the prompt is raw."""
    adapt: Callable[[Columns], Columns | None] = _as_it_is
    """As in `load_prompts`. Where a row has no category, it is the name of the set."""


def _spec_bench(row: Columns) -> Columns:
    return row | {"category": "mt_bench"} if row["category"] in MT_BENCH else row


def _mbpp(row: Columns) -> Columns | None:
    """The full set calls the task `text`, the sanitized one `prompt`; other columns are alike."""
    task, tests = row.get("text", row.get("prompt")), row.get("test_list")
    if not isinstance(task, str) or not isinstance(tests, list):
        raise BadRow(f"no task with a test_list (columns: {', '.join(sorted(row))})")
    if row.get("task_id") not in MBPP_TEST:
        return None
    prompt = MBPP_PROMPT.format(task=task, tests="\n".join(map(str, tests)))
    return {"prompt": prompt, "task_id": row["task_id"], "category": row["category"]}


def _speed_bench(row: Columns) -> Columns:
    """The Hub has `turns`; prepare.py writes `messages`, all of them the user's."""
    if "messages" in row:
        turns = [turn.get("content") for turn in objects(row["messages"], "messages")]
        row = {k: v for k, v in row.items() if k != "messages"} | {"turns": turns}
    if PLACEHOLDER in str(row.get("turns")):
        raise BadRow("a placeholder stands for this prompt")
    return row


SETS = {
    # Rows {question_id, category, turns, reference?}: 480, of MT-bench with two turns.
    "spec-bench": PromptSet(
        published="data/spec_bench/question.jsonl of github.com/hemingkx/Spec-Bench",
        adapt=_spec_bench,
    ),
    # The file has {question_id, category, turns, reference?}, the Hub {prompt, prompt_id, category,
    # reference} (its card shows how one was made of the other).
    "mt-bench": PromptSet(
        published="fastchat/llm_judge/data/mt_bench/question.jsonl of github.com/lm-sys/FastChat",
        hub="HuggingFaceH4/mt_bench_prompts",
        split="train",
    ),
    # Rows {task_id, prompt, canonical_solution, test, entry_point}; a prompt is the beginning of a
    # file, up to the end of the docstring.
    "humaneval": PromptSet(
        published="data/HumanEval.jsonl.gz of github.com/openai/human-eval",
        hub="openai/openai_humaneval",
        config="openai_humaneval",
        columns={"text": "prompt"},
    ),
    # Rows {question, answer}, without an id.
    "gsm8k": PromptSet(
        published="grade_school_math/data/test.jsonl of github.com/openai/grade-school-math",
        hub="openai/gsm8k",
        config="main",
        columns={"prompt": "question"},
    ),
    # Rows {task_id, text or prompt, code, test_list, ...}. The files hold all splits.
    "mbpp": PromptSet(
        published=(
            "mbpp/mbpp.jsonl and sanitized-mbpp.json of github.com/google-research/google-research"
        ),
        hub="google-research-datasets/mbpp",
        config="full",
        adapt=_mbpp,
    ),
    # Rows {question_id, category, sub_category, turns, source, src_id, difficulty, multiturn}, as
    # the card of the dataset lists them.
    "speed-bench": PromptSet(
        published=(
            "nvidia/SPEED-Bench on the Hugging Face Hub, with placeholders that "
            "nemo_skills/dataset/speed-bench/prepare.py of github.com/NVIDIA-NeMo/Skills fills in "
            "(it writes qualitative.jsonl)"
        ),
        hub="nvidia/SPEED-Bench",
        config="qualitative",
        adapt=_speed_bench,
    ),
}
"""The sets by name. Their rows were read in the files and dataset cards that are named here."""


def load_prompt_set(name: str) -> list[Prompt]:
    """The prompts of an evaluation.

    Args:
        name: one of `SETS`, read from the Hub; `SET=PATH`, the same from its published file, a
            folder or a glob; or any source that `load_prompts` takes. A folder here that has the
            name of a set is `./NAME`.

    Raises:
        ValueError: there is no such set or source, or it has an unusable row.
    """
    key, given, path = name.partition("=")
    if key not in SETS:
        if not _is_there(name) and ("/" not in name or not HUB_ID.fullmatch(name)):
            raise ValueError(f"no prompt file {name}, and no prompt set: {', '.join(SETS)}")
        return load_prompts(name)
    try:
        return _load(key, path if given else None)
    except ValueError as error:
        raise ValueError(
            f"{error}; {key} is published as {SETS[key].published}: give {key}=PATH"
        ) from error


def _load(key: str, path: str | None) -> list[Prompt]:
    chosen = SETS[key]
    if path is not None and not _is_there(path):
        raise ValueError(f"no prompt file {path}")
    place = chosen.hub if path is None else path
    if place is None:
        raise ValueError(f"{key} is not on the Hugging Face Hub")
    source = SourceConfig(
        path=place, name=chosen.config, split=chosen.split, columns=chosen.columns
    )
    return load_prompts(source, adapt=lambda row: chosen.adapt({"category": key} | row))


def _is_there(path: str) -> bool:
    file = Path(path)
    return path != "" and (file.exists() or bool(glob.glob(str(file), recursive=True)))

"""Prompts: rows recognized, bad ones counted, sources mixed, sets kept apart."""

import glob
import random
import sys
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, TypeVar

from headstart.common.console import one_line, print_once
from headstart.configs.schema import DataConfig, SourceConfig
from headstart.configs.section import BUILTIN
from headstart.data.rows import (
    COLUMNS,
    IDS,
    BadRow,
    flag,
    json_object,
    layout_of,
    messages_of,
    objects,
    renamed,
    turn_text,
    unused_columns,
    user_turns,
)
from headstart.data.sources import HUB_ID, Place, Row, builtin_sets, check_there, read_rows

HOPELESS = 1000
"""Bad rows without a single usable one after which nothing more is read."""


@dataclass(frozen=True)
class Prompt:
    """One row of a prompt source."""

    id: str
    """Unique within its source."""
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
    later_turns: list[str] = field(default_factory=list)
    """What the user says next, each after the target's own answer to the turn before. Only
    evaluation asks them: regeneration and training take `messages`, which end with the first."""
    json_schema: dict[str, Any] | None = None
    """What the answer is held to, in an evaluation; regeneration and training do without."""

    @property
    def question(self) -> list[dict[str, Any]]:
        """The turns without the answer: what a target is asked."""
        return self.messages[:-1] if self.messages[-1]["role"] == "assistant" else self.messages

    @property
    def text(self) -> str:
        """The question as plain text, turns on lines of their own."""
        return "\n".join(turn_text(turn) for turn in self.question if "content" in turn)


T = TypeVar("T")
Reasons = defaultdict[str, list[str]]
"""Why rows cannot be used -> where such rows stand."""


def load_prompts(
    source: str | Path | SourceConfig,
    max_bad_rows: float = 0.0,
    adapt: Callable[[dict[str, Any]], dict[str, Any] | None] | None = None,
) -> list[Prompt]:
    """Read the prompts of a source (`SourceConfig` says what can be one).

    `docs/how-to/data.md` lists the columns by which a row is recognised (`LAYOUTS` and those beside
    them). Columns that are not used are listed in one line.

    Args:
        source: a path, a Hub id, or either with its settings.
        max_bad_rows: share of the rows read that may be unusable. They are skipped, and counted
            in one line on stderr. 0: the first one is an error.
        adapt: makes a row one that is recognised, raises `BadRow`, or leaves it out (None).

    Raises:
        ValueError: the source is missing or empty, has too many bad rows (the first of each kind
            is named with file and line), or lacks a column that `source.columns` names.
    """
    if not isinstance(source, SourceConfig):
        source = SourceConfig(path=str(source))
    if unknown := source.columns.keys() - set(COLUMNS):
        raise ValueError(f"{source.path}: columns maps {min(unknown)}; known: {', '.join(COLUMNS)}")
    prompts: list[Prompt] = []
    skipped: Reasons = defaultdict(list)
    seen: set[str] = set()  # columns
    unused: set[str] = set()
    for place, row in read_rows(source):
        try:
            seen.update(row if isinstance(row, dict) else ())
            adapted = adapt(row) if adapt and isinstance(row, dict) else row
            if adapted is not None:
                prompts.append(prompt_of(adapted, place, source.columns))
                if not adapt and isinstance(row, dict):  # whoever adapts rows knows their columns
                    unused |= unused_columns(row, source.columns)
        except BadRow as error:
            if not max_bad_rows:
                raise ValueError(f"{place}: {error}") from None
            reason, _, detail = str(error).partition(" (")
            skipped[reason].append(f"{place} ({detail}" if detail else str(place))
            if not prompts and _number(skipped) >= HOPELESS:
                break
        if len(prompts) == source.limit:
            break
    _check(source, len(prompts), skipped, seen, max_bad_rows)
    if unused:
        print_once(f"{source.path}: Columns not used: {', '.join(sorted(unused))}")
    # Later stages key on ids.
    ids = unique_ids([prompt.id for prompt in prompts], "~")
    return [replace(prompt, id=unique) for prompt, unique in zip(prompts, ids, strict=True)]


def _check(
    source: SourceConfig,
    usable: int,
    skipped: Reasons,
    seen: set[str],
    max_bad_rows: float,
) -> None:
    bad = _number(skipped)
    if not usable and not bad:
        raise ValueError(f"{source.path} holds no prompts")
    if absent := sorted(set(source.columns.values()) - seen):
        raise ValueError(
            f"{source.path}: no row has the column {absent[0]} that columns names "
            f"(columns: {', '.join(sorted(seen))})"
        )
    reasons = _worst_first(skipped)
    if bad > max_bad_rows * (usable + bad):
        raise ValueError(
            f"{source.path}: {bad} of {usable + bad} rows are unusable ({reasons}); mend them, or "
            f"raise data.max_bad_rows, now {max_bad_rows:g}"
        )
    if bad:
        line = f"{source.path}: {usable} rows, {bad} skipped ({reasons})"
        print(one_line(line), file=sys.stderr)


def _number(reasons: Reasons) -> int:
    return sum(map(len, reasons.values()))


def _worst_first(reasons: Reasons, most: int | None = None) -> str:
    """Reasons with how often, and where first, each was met."""
    ordered = sorted(reasons.items(), key=lambda item: -len(item[1]))[:most]
    return "; ".join(f"{len(places)} {reason}, first {places[0]}" for reason, places in ordered)


def encode_usable(
    prompts: Sequence[Prompt], encode: Callable[[Prompt], T], max_bad_rows: float
) -> list[T | None]:
    """What `encode` makes of each prompt; None: it raised `ValueError`, as of one that the target's
    template refuses. Those are counted in one line on stderr.

    Raises:
        ValueError: they are more than a share of `max_bad_rows` of all, good and bad.
    """
    encoded: list[T | None] = []
    reasons: Reasons = defaultdict(list)
    for prompt in prompts:
        try:
            encoded.append(encode(prompt))
        except ValueError as error:
            encoded.append(None)
            reasons[str(error)].append(prompt.id)
    if reasons:
        refused, total = _number(reasons), len(prompts)
        listed = _worst_first(reasons, 5)
        line = f"{refused} of {total} rows cannot be used with this target ({listed})"
        if refused > max_bad_rows * total:
            raise ValueError(f"{line}; mend them, or raise data.max_bad_rows, now {max_bad_rows:g}")
        print(one_line(f"{line}: skipped"), file=sys.stderr)
    return encoded


def unique_ids(ids: list[str], mark: str) -> list[str]:
    """The ids, of which one that comes again becomes `idM2`, `idM3` and so on, M being `mark`."""
    taken = set(ids)
    times: dict[str, int] = {}
    unique = []
    for name in ids:
        times[name] = number = times.get(name, 0) + 1
        if number > 1:
            while (new := f"{name}{mark}{number}") in taken:
                number += 1
            times[name] = number
            taken.add(new)
            name = new
        unique.append(name)
    return unique


def prompt_of(row: Row, place: Place, columns: dict[str, str]) -> Prompt:
    """The prompt that a row holds; raises `BadRow` with the reason where it holds none."""
    if isinstance(row, str):
        raise BadRow(row)
    row = renamed(row, columns)
    layout = layout_of(row)
    prompt_id = str(next((row[column] for column in IDS if column in row), place.id))
    return Prompt(
        id=prompt_id,
        category=str(row.get("category", "uncategorised")),
        source=str(row.get("source", prompt_id)),
        messages=messages_of(row, layout),
        raw=flag(row, "raw", layout == "text"),
        tools=(objects(row["tools"], "tools") or None) if "tools" in row else None,
        later_turns=user_turns(row, layout)[1:],
        json_schema=json_object(row["json_schema"], "json_schema")
        if "json_schema" in row
        else None,
    )


def schemas_of(prompts: Sequence[Prompt]) -> dict[str, dict[str, Any]]:
    """The JSON schemas of those that have one, by their ids."""
    return {p.id: p.json_schema for p in prompts if p.json_schema is not None}


def tell_schemas(prompts: Sequence[Prompt], what: str) -> None:
    """Say that the prompts' JSON schemas are left out by `what`, if they have any."""
    if number := len(schemas_of(prompts)):
        print_once(
            f"{number} of {len(prompts)} prompts have a JSON schema, to which {what} does not hold "
            "the answers: headstart eval alone does"
        )


def deal(sources: list[tuple[list[Prompt], float | None]], count: int, seed: int) -> list[Prompt]:
    """`count` prompts of several sources, in a shuffled order, starting over where they run out.

    All sources or none have a weight: of their share of `count`, exact to a prompt (largest
    remainder). Without weights all are one pool.

    Raises:
        ValueError: a source that is to be dealt from is empty.
    """
    rng = random.Random(seed)
    weights = [weight for _, weight in sources if weight is not None]
    if not weights:
        return _deal([p for prompts, _ in sources for p in prompts], count, rng)
    assert len(weights) == len(sources), "the configuration gives all sources a weight, or none"
    shares = [count * weight / sum(weights) for weight in weights]
    counts = [int(share) for share in shares]
    by_remainder = sorted(range(len(shares)), key=lambda i: counts[i] - shares[i])
    for i in by_remainder[: count - sum(counts)]:
        counts[i] += 1
    dealt = [
        p for (prompts, _), n in zip(sources, counts, strict=True) for p in _deal(prompts, n, rng)
    ]
    return rng.sample(dealt, len(dealt))


def _deal(prompts: list[Prompt], count: int, rng: random.Random) -> list[Prompt]:
    if count and not prompts:
        raise ValueError("a source of prompts has none left to train on")
    dealt: list[Prompt] = []
    while len(dealt) < count:
        dealt += rng.sample(prompts, len(prompts))
    return dealt[:count]


def limit_evenly(prompts: list[Prompt], limit: int | None) -> list[Prompt]:
    """The first `limit` prompts, dealt round robin over the categories, in file order."""
    if limit is None or limit >= len(prompts):
        return prompts
    by_category: dict[str, list[Prompt]] = {}
    for prompt in prompts:
        by_category.setdefault(prompt.category, []).append(prompt)
    kept = {id(p) for p in round_robin(list(by_category.values()))[:limit]}
    return [p for p in prompts if id(p) in kept]


def round_robin(columns: list[list[T]]) -> list[T]:
    """The first of each column, then the second of each, and so on."""
    longest = max(map(len, columns), default=0)
    return [column[i] for i in range(longest) for column in columns if i < len(column)]


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


@dataclass(frozen=True)
class PromptSet:
    """Where a benchmark is found, and how a row of it becomes a prompt."""

    published: str
    """Its own file, as an error names it."""
    source: dict[str, Any] = field(default_factory=dict)
    """Of `SourceConfig`: its place on the Hugging Face Hub, or no `path`: only the file is
    published. A column that is mapped to `text` makes raw prompts."""
    adapt: Callable[[Columns], Columns | None] = lambda row: row
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


# fmt: off
SETS = {
    # Rows {question_id, category, turns, reference?}: 480, of MT-bench with two turns.
    "spec-bench": PromptSet(
        published="data/spec_bench/question.jsonl of github.com/hemingkx/Spec-Bench",
        source={"split": "test"},
        adapt=_spec_bench,
    ),
    # The file has {question_id, category, turns, reference?}, the Hub {prompt, prompt_id, category,
    # reference} (its card shows how one was made of the other).
    "mt-bench": PromptSet(
        published="fastchat/llm_judge/data/mt_bench/question.jsonl of github.com/lm-sys/FastChat",
        source={"path": "HuggingFaceH4/mt_bench_prompts"},
    ),
    # Rows {task_id, prompt, canonical_solution, test, entry_point}; a prompt is the beginning of a
    # file, up to the end of the docstring.
    "humaneval": PromptSet(
        published="data/HumanEval.jsonl.gz of github.com/openai/human-eval",
        source={
            "path": "openai/openai_humaneval", "name": "openai_humaneval", "split": "test",
            "columns": {"text": "prompt"},
        },
    ),
    # Rows {question, answer}, without an id.
    "gsm8k": PromptSet(
        published="grade_school_math/data/test.jsonl of github.com/openai/grade-school-math",
        source={
            "path": "openai/gsm8k", "name": "main", "split": "test",
            "columns": {"prompt": "question"},
        },
    ),
    # Rows {task_id, text or prompt, code, test_list, ...}. The files hold all splits.
    "mbpp": PromptSet(
        published=(
            "mbpp/mbpp.jsonl and sanitized-mbpp.json of github.com/google-research/google-research"
        ),
        source={"path": "google-research-datasets/mbpp", "name": "full", "split": "test"},
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
        source={"path": "nvidia/SPEED-Bench", "name": "qualitative", "split": "test"},
        adapt=_speed_bench,
    ),
}
# fmt: on
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
    check_prompt_set(name)
    if key not in SETS:
        return load_prompts(name)
    chosen = SETS[key]
    settings = chosen.source
    if given:  # the published file is no part of what is on the Hub
        of_the_hub = ("name", "split", "revision", "streaming")
        settings = {k: v for k, v in settings.items() if k not in of_the_hub} | {"path": path}
    source = SourceConfig(**settings)
    try:
        return load_prompts(source, adapt=lambda row: chosen.adapt({"category": key} | row))
    except ValueError as error:
        raise ValueError(_published(key, error)) from error


def check_prompt_set(name: str) -> None:
    """Raise `ValueError` where `load_prompt_set` would find nothing of that name; the Hub is not
    asked, and nothing is read."""
    key, given, path = name.partition("=")
    if key in SETS:
        if given and not _is_there(path):
            raise ValueError(_published(key, f"no prompt file {path}"))
        if not given and "path" not in SETS[key].source:
            raise ValueError(_published(key, f"{key} is not on the Hugging Face Hub"))
    elif name.startswith(BUILTIN):
        check_there(name)
    elif not _is_there(name) and ("/" not in name or not HUB_ID.fullmatch(name)):
        sets = ", ".join([*SETS, *builtin_sets()])
        raise ValueError(f"no prompt file {name}, and no prompt set: {sets}")


def check_prompts(data: DataConfig, held_out: str | None) -> None:
    """Raise `ValueError` where prompts of a run are missing, before its target is loaded; nothing
    is read."""
    if data.store is None and (data.conversations is None or data.shipped):
        for source in data.prompts:
            check_there(source.path)
    if held_out is not None:
        check_prompt_set(held_out)


def _published(key: str, fault: object) -> str:
    return f"{fault}; {key} is published as {SETS[key].published}: give {key}=PATH"


def _is_there(path: str) -> bool:
    file = Path(path)
    return path != "" and (file.exists() or bool(glob.glob(str(file), recursive=True)))

"""Two reports laid side by side, text by text: what changed, and whether chance explains it."""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
from rich.table import Table

from headstart.common.console import one_line, wide_console
from headstart.eval.page import READ, decoder_name
from headstart.eval.recorded import describe_set, recorded_set
from headstart.eval.statistics import (
    ENOUGH,
    NO_HEAD,
    OWN_LENGTH,
    interval,
    resampled,
    with_interval,
)
from headstart.heads.admission import reading

MEASURES = {
    "acceptance length": lambda t: 1 + t["accepted"] / np.maximum(t["rounds"], 1),
    "speedup": lambda t: (t["plain_seconds"] / t["plain_tokens"]) / (t["seconds"] / t["tokens"]),
    "tokens a second": lambda t: t["tokens"] / t["seconds"],
}
"""Of sums over texts, by column of `per_text`."""


@dataclass(frozen=True)
class Change:
    """One measure of one variant and category in both reports."""

    variant: str
    category: str
    measure: str
    before: float
    after: float
    interval: tuple[float, float]
    """95%, of after - before; over the same prompts drawn with replacement."""
    texts: int
    prompts: int
    """Of which they are, one or more of each: turns and seeds."""
    paired: bool
    """Whether both reports measured these texts; else each was drawn by itself."""

    @property
    def says(self) -> str:
        """Whether the interval leaves out 0; of fewer than `ENOUGH` prompts it says nothing."""
        if self.prompts < ENOUGH:
            return "too few prompts"
        low, high = self.interval
        return "significant" if low > 0 or high < 0 else "within chance"


def read_report(path: Path) -> dict[str, Any]:
    """A report.json of this schema, or the folder of one, or of the run that it is of.

    Raises:
        ValueError: there is none, or it is of another schema.
    """
    if (path / "eval" / "report.json").is_file():  # of a run folder
        path = path / "eval"
    path = path / "report.json" if path.is_dir() else path
    if not path.is_file():
        raise ValueError(
            f"no report at {path}: `headstart eval output_dir=DIR` writes DIR/report.json"
        )
    with reading(str(path), "is damaged"):
        content: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(content, dict):
            raise TypeError("it holds no report")
    if content.get("schema") not in READ:
        raise ValueError(
            f"{path} has schema {content.get('schema')}, this version reads "
            f"{' and '.join(map(str, READ))}: measure again with it"
        )
    return content


def compare(
    before: dict[str, Any], after: dict[str, Any], decoders: tuple[str, str] | None = None
) -> list[Change]:
    """What changed from one report to another, or in the same one, for each variant that both have.

    Sides are the same by decoder, K and sampling (temperature, top-k, top-p): a greedy one is never
    laid beside a sampled one. By their head's name too, unless each report has one head.

    Args:
        before, after: of a report.json.
        decoders: that of `before` and that of `after` to compare, K by K where both keep to one.

    Raises:
        ValueError: they have no variant in common.
    """
    changes = []
    for result, other in _pairs(before, after, decoders):
        names = [f"{decoder_name(r)} K={r['num_assistant_tokens']}" for r in (result, other)]
        variant = " -> ".join(dict.fromkeys(names))
        same_set = _same_prompts(before, after)
        tables = [_table(before, result, same_set), _table(after, other, same_set)]
        if shared := tables[0].keys() & tables[1].keys():
            tables = [{key: table[key] for key in sorted(shared)} for table in tables]
        categories = sorted({row["category"] for table in tables for row in table.values()})
        for category in ["all", *(categories if len(categories) > 1 else [])]:
            few = [
                [row for row in table.values() if category in ("all", row["category"])]
                for table in tables
            ]
            if all(few):
                changes += _changes(variant, category, few[0], few[1], bool(shared))
    if not changes:
        raise ValueError(
            "the reports have no variant (decoder, K, temperature, top-k, top-p, head) in common"
        )
    return changes


def _pairs(
    before: dict[str, Any], after: dict[str, Any], decoders: tuple[str, str] | None
) -> Iterator[tuple[dict[str, Any], dict[str, Any]]]:
    whole = [[r for r in c["results"] if "per_text" in r] for c in (before, after)]
    # Small models and lookup are no heads, though the first have their names there.
    heads = [{r["head"] for r in results if r["decoder"] not in NO_HEAD} for results in whole]
    one_head = all(len(names) <= 1 for names in heads)
    for result, other in product(*whole):
        if decoders is None:
            same = ["decoder", "num_assistant_tokens"]
        elif (result["decoder"], other["decoder"]) == decoders:
            own = any(name in OWN_LENGTH for name in decoders)
            same = [] if own else ["num_assistant_tokens"]
        else:
            continue
        by_name = not one_head or result["decoder"] == other["decoder"] == "draft-model"
        same += ["head"] if by_name and None not in (result["head"], other["head"]) else []
        alike = _sampling(before, result) == _sampling(after, other)
        if alike and all(result[name] == other[name] for name in same):
            yield result, other


def _sampling(content: dict[str, Any], result: dict[str, Any]) -> tuple[Any, ...] | None:
    """Temperature, top-k and top-p; None: greedy."""
    if not result["temperature"]:
        return None
    # Reports of before have the last two among their settings.
    where = result if "top_k" in result else content["environment"]
    return result["temperature"], where["top_k"], where["top_p"]


def _same_prompts(before: dict[str, Any], after: dict[str, Any]) -> bool:
    """Whether both reports are of one prompt set, by what they say of it."""
    sets = [recorded_set(content["environment"]) for content in (before, after)]
    known = all(one["sha256"] for one in sets)  # else their names have to do
    return len({one["sha256" if known else "name"] for one in sets}) == 1


def _table(
    content: dict[str, Any], result: dict[str, Any], same_set: bool
) -> dict[tuple[Any, ...], Any]:
    """(prompt id, turn, seed) -> its row of `per_text` by column. Sets that are not the same may
    call other prompts alike, such as by their numbers: there its tokens belong to the name."""
    rows = [dict(zip(content["per_text_columns"], row, strict=True)) for row in result["per_text"]]
    # Greedy rows have no seed; reports of before sampled with one, and have no column of seeds.
    return {
        (row["id"], row["turn"], row.get("seed") or 0, same_set or row.get("prompt_tokens")): row
        for row in rows
    }


def _changes(
    variant: str, category: str, before: list[Any], after: list[Any], paired: bool
) -> list[Change]:
    sums = _sums(before, 0), _sums(after, 0 if paired else 1)
    prompts = min(len({row["id"] for row in rows}) for rows in (before, after))
    found = []
    timed = all("seconds" in sums_of for sums_of in sums)
    for measure, of in MEASURES.items():
        if not timed and measure != "acceptance length":
            continue
        old, new = of(sums[0]), of(sums[1])
        found.append(Change(
            variant, category, measure, float(old[0]), float(new[0]), interval(new - old),
            texts=len(after), prompts=prompts, paired=paired,
        ))  # fmt: skip
    return found


def _sums(rows: list[Any], seed: int) -> dict[str, np.ndarray]:
    """Sums of each column over the rows' prompts, and over prompts drawn with replacement."""
    ids = [row["id"] for row in rows]
    names = ("id", "turn", "seed", "category")
    # Where nothing was timed, rows have no seconds.
    columns = [c for c in rows[0] if c not in names and all(row[c] is not None for row in rows)]
    return {c: resampled(ids, [row[c] for row in rows], seed) for c in columns}


def differences(before: dict[str, Any], after: dict[str, Any]) -> list[str]:
    """What else is not the same in the two reports: prompts, settings, machine, versions."""
    pair = before["environment"], after["environment"]
    sets = [recorded_set(env) for env in pair]
    lines = []
    if not _same_prompts(before, after):
        lines.append(f"prompts: {describe_set(sets[0])} -> {describe_set(sets[1])}")
    keys = [k for k in pair[0] if k in pair[1] and not k.startswith(("peak", "prompts", "prompt_"))]
    return lines + [f"{k}: {pair[0][k]} -> {pair[1][k]}" for k in keys if pair[0][k] != pair[1][k]]


def print_changes(
    before: dict[str, Any], after: dict[str, Any], decoders: tuple[str, str] | None
) -> None:
    """Print what changed as a table, what else is not the same, and how to read it."""
    console = wide_console()
    changes = compare(before, after, decoders)
    table = Table(title="What changed")
    for name in ("variant", "category", "texts", "measure", "before", "after", "change (95%)", ""):
        table.add_column(name, justify="right" if name in ("before", "after", "texts") else "left")
    for c in changes:
        change = with_interval(c.after - c.before, c.interval, "+.3f")
        figures = str(c.texts), c.measure, f"{c.before:.3f}", f"{c.after:.3f}"
        table.add_row(c.variant, c.category, *figures, change, c.says)
    console.print(table)
    for line in differences(before, after):
        console.print(one_line(f"Not the same: {line}"))
    if not all(c.paired for c in changes):
        console.print("The reports share no prompts: their texts were drawn apart.")
    console.print(
        f"Of {len(changes)} intervals one in twenty leaves out 0 by chance. Tokens a second "
        "compare two runs; a speedup is measured within each."
    )

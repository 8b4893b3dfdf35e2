"""The tables of figures: each from the result files that the program wrote (docs/results/)."""

import json
import os
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

from headstart.common.machine import machine_name

Results: TypeAlias = dict[str, Any]
"""Name of a result file without its ending -> its content."""

RESULTS = Path("docs") / "results"


class Table(NamedTuple):
    make: Callable[[Results], str]
    files: tuple[str, ...]
    """Patterns of the result files that it is made of."""


TABLES: dict[str, Table] = {}


def made_of(*files: str) -> Callable[[Callable[[Results], str]], Callable[[Results], str]]:
    """Keep a function as the maker of the block that has its name, with `-` for `_`."""

    def keep(make: Callable[[Results], str]) -> Callable[[Results], str]:
        TABLES[make.__name__.replace("_", "-")] = Table(make, files)
        return make

    return keep


def make_table(name: str, root: Path, page: Path) -> str:
    """The text of one block, and below it where its figures are from.

    Args:
        root: of the repository.
        page: that the block stands on, from the root on: links are written as seen from there.

    Raises:
        ValueError: there is no such result file.
    """
    table = TABLES[name]
    found: Results = {}
    for pattern in table.files:
        paths = sorted((root / RESULTS).glob(f"{pattern}.json"))
        if not paths:
            raise ValueError(f"{page}: the block {name} needs {RESULTS}/{pattern}.json")
        found |= {path.stem: json.loads(path.read_text(encoding="utf-8")) for path in paths}
    folder = os.path.relpath(RESULTS, page.parent).replace(os.sep, "/")
    where = ", ".join(f"[{name}.json]({folder}/{name}.json)" for name in found)
    return f"{table.make(found)}\n\n*{machine_of(found)}{where}*"


def machine_of(found: Results) -> str:
    """On what a table was measured, in words."""
    where = [c["environment"] for c in found.values() if isinstance(c, dict) and "environment" in c]
    dtypes = {e["dtype"] for e in where if "dtype" in e}
    parts = [*dtypes] if len(dtypes) == 1 else []
    parts += dict.fromkeys(
        f"{machine_name(e)}, torch {e['torch']}, transformers {e['transformers']}" for e in where
    )
    return f"{', '.join(parts)}: " if parts else ""


def rows_of(header: str, rows: Iterable[Sequence[object]]) -> str:
    """A table in Markdown; `header` has its names between bars."""
    names = header.split(" | ")
    lines = [names, ["---"] * len(names), *rows]
    return "\n".join(f"| {' | '.join(map(str, cells))} |" for cells in lines)


def interval(value: float, ends: Sequence[float], form: str = ".2f") -> str:
    return f"{value:{form}} ({ends[0]:{form}} to {ends[1]:{form}})"


def length(r: dict[str, Any]) -> str:
    """Acceptance length with its interval."""
    low, high = r["acceptance_length_interval"]
    return f"{r['acceptance_length']:.3f} ({low:.2f} to {high:.2f})"

"""docs/results/overlap.json: what examples/overlap.py counts in the prompts that come along."""

import json
from types import ModuleType
from typing import Any

import pytest

from docs.tables_decoding import measured, whole
from headstart.data.prompts import Prompt, load_prompts
from tests.helpers.runs import ROOT, load_script

RESULTS = ROOT / "docs" / "results"


@pytest.fixture(scope="module")
def script() -> ModuleType:
    return load_script(ROOT / "examples" / "overlap.py")


@pytest.fixture(scope="module")
def written() -> Any:
    return json.loads((RESULTS / "overlap.json").read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def report() -> Any:
    return json.loads((RESULTS / "eval-64.json").read_text(encoding="utf-8"))


def test_the_file_is_what_the_program_counts_in_these_prompts(
    script: ModuleType, written: Any, report: Any
) -> None:
    assert script.overlap(report) == written


def test_a_share_is_the_most_words_in_a_row_that_one_training_prompt_has_too(
    script: ModuleType, written: Any
) -> None:
    """By the definition, pair by pair, for a few of the prompts and of every kind of share."""

    def text(prompt: Prompt) -> str:
        return (
            f" {' '.join(''.join(c if c.isalnum() else ' ' for c in prompt.text.lower()).split())} "
        )

    shares = written["report"]["shares"]
    few = sorted(shares, key=lambda name: (-shares[name], name))[:: len(shares) // 6]
    asked = {p.id: p for name in ("chat", "text") for p in load_prompts(f"builtin:{name}_eval")}
    names = ("chat", "text", "passages")
    trained = [text(p) for name in names for p in load_prompts(f"builtin:{name}_train")]
    assert {share >= 0.7 for share in map(shares.get, few)} == {True, False}
    for name in few:
        words = text(asked[name]).split()
        runs = {f" {' '.join(words[i : i + 5])} " for i in range(len(words) - 4)}
        most = max(sum(run in other for run in runs) for other in trained)
        assert shares[name] == pytest.approx(most / len(runs))
    assert written["report"]["from_70"] == sum(share >= 0.7 for share in shares.values())


def test_over_all_prompts_the_table_has_the_figures_of_the_report(report: Any) -> None:
    for result in whole(report):
        found = measured(report, result, [row[0] for row in result["per_text"]])
        for key in ("acceptance_length", "speedup"):
            assert found[key] == pytest.approx(result[key], rel=1e-4)
            ends = result[f"{key}_interval"]
            assert found[f"{key}_interval"] == pytest.approx(ends, rel=1e-4)

"""Figures in README and docs are those of the result files, which the program wrote."""

import json
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]


def row(r: dict[str, Any]) -> str:
    rates = ", ".join(f"{a:.2f}" for a in r["conditional_acceptance_rate"])
    low, high = r["speedup_interval"]
    cells = [
        str(r["num_assistant_tokens"]),
        r["category"],
        str(r["prompts"]),
        f"{r['acceptance_length']:.2f}",
        rates,
        f"{r['speedup']:.2f} ({low:.2f} to {high:.2f})",
        "yes" if r["equal_to_plain"] else f"{r['parted_share']:.0%} part",
    ]
    return f"| {' | '.join(cells)} |"


def test_the_table_in_the_readme_is_that_of_the_result_files() -> None:
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    for name in ("quickstart.json", "quickstart-float32.json"):
        report = json.loads((ROOT / "docs" / "results" / name).read_text(encoding="utf-8"))
        for result in report["results"]:
            if name == "quickstart.json" or result["category"] == "all":
                assert row(result) in readme, f"{name} holds: {row(result)}"
        assert name in readme


def test_the_tables_of_the_data_page_are_those_of_the_benchmarks() -> None:
    page = (ROOT / "docs" / "data.md").read_text(encoding="utf-8")
    for name in ("bench-extract.json", "bench-regenerate.json"):
        figures = json.loads((ROOT / "docs" / "results" / name).read_text(encoding="utf-8"))
        assert name in page
        for ratio, value in figures["ratios"].items():
            assert f"(`{ratio}`) | {value:.2f} |" in page
        for what, value in figures.get("stepwise", {}).items():
            assert f"| {what} | {value:.3g} |" in page
    for storage in ("target", "int8"):
        name = f"storage-{storage}.json"
        report = json.loads((ROOT / "docs" / "results" / name).read_text(encoding="utf-8"))
        assert (
            f"{report['results'][0]['acceptance_length']:.2f} ([results](results/{name}))" in page
        )

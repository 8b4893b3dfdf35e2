"""The README's figures are those of the result files, which `headstart eval` wrote."""

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

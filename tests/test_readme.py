"""Figures in README and docs are those of the result files, which the program wrote."""

import json
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]


def row(r: dict[str, Any]) -> str:
    rates = ", ".join(f"{a:.2f}" for a in r["conditional_acceptance_rate"])
    low, high = r["speedup_interval"]
    cells = [
        r["decoder"],
        str(r["num_assistant_tokens"]),
        r["category"],
        str(r["prompts"]),
        f"{r['acceptance_length']:.2f}",
        rates,
        f"{r['speedup']:.2f} ({low:.2f} to {high:.2f})",
        "yes" if r["equal_to_plain"] else f"{r['parted_share']:.0%} part",
    ]
    return f"| {' | '.join(cells)} |"


def results(name: str) -> Any:
    return json.loads((ROOT / "docs" / "results" / name).read_text(encoding="utf-8"))


def test_the_table_in_the_readme_is_that_of_the_result_file() -> None:
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    for result in results("quickstart.json")["results"]:
        if result["category"] in ("all", "no loops"):
            assert row(result) in readme, f"the file holds: {row(result)}"
    assert "quickstart.json" in readme
    draft = results("bench-draft.json")["ratios"]
    assert f"above {draft['break_even_exact_ordered'][3]:.2f} at K = 4" in readme


def test_the_tables_of_the_training_page_are_those_of_the_result_files() -> None:
    page = (ROOT / "docs" / "training.md").read_text(encoding="utf-8")
    tie = results("bench-tie.json")["same_best_token"]
    for width, kept in tie["data"].items():
        assert f"| {width} | {kept:.1%} | {tie['svd'][width]:.1%} |" in page
    for name in ("objective-sparse", "objective-exact"):
        best = results(f"{name}.json")["best"]
        length = f"{best['acceptance_length']:.3f} ([results](results/{name}.json))"
        assert length in page, f"{name} holds {length}"
    for name in ("narrow-data", "narrow-svd"):
        assert f"{results(f'{name}.json')['best']['acceptance_length']:.3f}" in page
    shapes = [results(name)["after"] for name in ("ordered.json", "ordered-256.json")]
    for top in ("8", "16", "32", "64"):
        cells = [
            f"{after['recall'][kind][top]:.3f}" for after in shapes for kind in ("argmax", "mass")
        ]
        assert f"| {top} | {' | '.join(cells)} |" in page
    lengths = (shapes[0]["acceptance_length"], shapes[0]["dense_acceptance_length"])
    assert "{:.3f} through the clusters and {:.3f} dense".format(*lengths) in page
    bench = results("bench-train.json")
    for name, ratio in bench["ratios"].items():
        assert f"(`{name}`) | {ratio:.2f} |" in page
    draft = results("bench-draft.json")
    larger = results("bench-draft-256.json")
    names = [f"c_{loop}{kind}" for loop in ("", "exact_") for kind in ("dense", "ordered")]
    for name in [*names, "ordered_over_dense", "exact_ordered_over_exact_dense"]:
        ratios = f"{draft['ratios'][name]:.3f} | {larger['ratios'][name]:.3f}"
        assert f"(`{name}`) | {ratios} |" in page
    costs = " | ".join(f"{v:.2f}" for v in draft["ratios"]["v"])
    assert f"| v(K) | {costs} |" in page


def test_the_table_of_the_decoding_page_is_that_of_the_result_file() -> None:
    page = (ROOT / "docs" / "decoding.md").read_text(encoding="utf-8")
    for r in results("decoders.json")["results"]:
        if r["category"] in ("all", "no loops"):
            low, high = r["speedup_interval"]
            cells = [r["decoder"], r["category"], f"{r['acceptance_length']:.2f}"]
            assert f"| {' | '.join(cells)} | {r['speedup']:.2f} ({low:.2f} to {high:.2f}) |" in page


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

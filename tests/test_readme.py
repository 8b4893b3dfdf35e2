"""Figures in README and docs are those of the result files, which the program wrote, and commands
there are of the grammar that the command line has."""

import json
import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from headstart.cli.arguments import missing
from headstart.cli.main import _parse
from headstart.configs.loader import load_settings
from headstart.configs.recipes import recipe_names

ROOT = Path(__file__).resolve().parents[1]
GROUPS = {"with": "all", "without": "no loops"}


def speedup(r: dict[str, Any]) -> str:
    low, high = r["speedup_interval"]
    return f"{r['speedup']:.2f} ({low:.2f} to {high:.2f})"


def side(r: dict[str, Any]) -> list[str]:
    group = GROUPS[r["looping_texts"]]
    return [r["decoder"], str(r["num_assistant_tokens"]), group, str(r["prompts"])]


def row(r: dict[str, Any]) -> str:
    rates = ", ".join(f"{a:.2f}" for a in r["conditional_acceptance_rate"])
    equal = "yes" if r["equal_to_plain"] else f"{r['diverged_share']:.0%} diverge"
    speedups = [speedup(r), f"{r['decode_speedup']:.2f}"]
    cells = [*side(r), f"{r['acceptance_length']:.2f}", rates, *speedups, equal]
    return f"| {' | '.join(cells)} |"


def decoder_row(r: dict[str, Any]) -> str:
    short, long = r["acceptance_length_interval"]
    length = f"{r['acceptance_length']:.3f} ({short:.2f} to {long:.2f})"
    of_rounds = [f"{r[name]:.2f}" for name in ("decode_speedup", "predicted_decode_speedup")]
    return f"| {' | '.join([*side(r), length, speedup(r), *of_rounds])} |"


def category_row(report: dict[str, Any], category: str) -> str:
    of = {r["decoder"]: r for r in whole(report, category)}
    lengths = [f"{of[name]['acceptance_length']:.3f}" for name in ("transformers", "exact")]
    speedups = [f"{r['speedup']:.2f}" for r in of.values()]
    return f"| {category} | {' | '.join(lengths + speedups)} |"


def longer_category_row(report: dict[str, Any], category: str) -> str:
    of = {r["decoder"]: r for r in whole(report, category)}
    shown = ("transformers", "exact", "hybrid", "lookup")
    lengths = [f"{of[name]['acceptance_length']:.2f}" for name in shown]
    speedups = [f"{r['speedup']:.2f}" for r in of.values()]
    return f"| {category} | {' | '.join(lengths + speedups)} |"


def whole(report: dict[str, Any], category: str = "all") -> list[dict[str, Any]]:
    return [
        r for r in report["results"] if r["category"] == category and r["looping_texts"] == "with"
    ]


def cost_row(decoder: str, v: list[float]) -> str:
    return f"| v(K), {decoder} | {' | '.join(f'{value:.2f}' for value in v)} |"


def results(name: str) -> Any:
    return json.loads((ROOT / "docs" / "results" / name).read_text(encoding="utf-8"))


def test_the_table_in_the_readme_is_that_of_the_result_file() -> None:
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    for result in results("eval-64.json")["results"]:
        if result["category"] == "all":
            assert row(result) in readme, f"the file holds: {row(result)}"
    assert "eval-64.json" in readme


def test_the_quickstart_on_the_decoding_page_is_that_of_the_result_file() -> None:
    page = (ROOT / "docs" / "decoding.md").read_text(encoding="utf-8")
    for result in results("quickstart.json")["results"]:
        if result["category"] == "all":
            assert row(result) in page, f"the file holds: {row(result)}"
    draft = results("bench-draft.json")["ratios"]
    for name in ("v", "v_exact"):
        assert f"{draft[name][3]:.2f} steps" in page
    assert f"above {draft['break_even_ordered'][3]:.2f} at K = 4" in page
    assert f"pays from {draft['break_even_exact_ordered'][3]:.2f} on" in page


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


def test_the_tables_of_the_decoding_page_are_those_of_the_result_files() -> None:
    page = (ROOT / "docs" / "decoding.md").read_text(encoding="utf-8")
    report = results("eval-300.json")
    for r in report["results"]:
        wanted = decoder_row(r) if r["category"] == "all" else category_row(report, r["category"])
        assert wanted in page
    for name in ("eval-64.json", "eval-k.json"):
        assert name in page
        for r in whole(results(name)):
            assert decoder_row(r) in page
    report = results("eval-64.json")
    for category in {r["category"] for r in report["results"]} - {"all"}:
        assert longer_category_row(report, category) in page
    costs = results("bench-draft-bf16.json")["ratios"]
    for name in ("c_exact_ordered", "c_ordered"):
        assert f"{costs[name]:.3f}" in page
    for name in ("break_even_exact_ordered", "break_even_ordered"):
        assert f"{costs[name][3]:.2f}" in page
    draft = results("bench-draft.json")["ratios"]
    for decoder, name in (("stock", "v"), ("exact", "v_exact")):
        assert cost_row(decoder, draft[name]) in page
    for name in ("eval-long.json", "eval-300.json"):
        stock, exact = (r["acceptance_length"] for r in whole(results(name))[:2])
        assert f"{stock:.3f} against {exact:.3f}" in page
    long = results("eval-long.json")
    place = long["per_text_columns"].index("prompt_tokens")
    lengths = [text[place] for text in whole(long)[0]["per_text"]]
    assert f"{len(lengths)} prompts of {min(lengths)} to {max(lengths):,}\ntokens" in page
    assert f"{whole_estimate():.3f} ([estimate-300.json]" in page


def whole_estimate() -> float:
    found = results("estimate-300.json")["results"]
    return next(float(r["acceptance_length"]) for r in found if r["category"] == "all")


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


def test_the_table_of_sampled_decoding_is_that_of_the_result_file() -> None:
    page = (ROOT / "docs" / "decoding.md").read_text(encoding="utf-8")
    for r in whole(results("eval-t1.json")):
        short, long = r["acceptance_length_interval"]
        length = f"{r['acceptance_length']:.3f} ({short:.2f} to {long:.2f})"
        cells = [r["decoder"], str(r["num_assistant_tokens"]), length, speedup(r)]
        assert f"| {' | '.join(cells)} |" in page


def test_the_figures_of_the_recipe_page_are_those_of_the_result_files() -> None:
    page = (ROOT / "docs" / "recipe.md").read_text(encoding="utf-8")
    for name, told in (
        ("", "this one {:.3f}"),
        ("-newest", "  {:.3f}, and"),
        ("-1200-steps", "{:.2f}"),
    ):
        exact = whole(results(f"eval-64{name}.json"))[1]
        assert told.format(exact["acceptance_length"]) in page
    run = results("reference.json")
    replayed = ", ".join(f"{v['acceptance_length']:.2f}" for v in run["validations"])
    assert replayed in page
    assert f"through the clusters\n{run['best']['acceptance_length']:.2f} ([reference.json]" in page
    for name in ("sweep-traps.json", "sweep-traps-clusters.json", "sweep-soft-cap.json"):
        for trap in results(name)["results"]:
            assert f"| {trap['loss'][0]:.2f} | {beside_the_first(trap)} |" in page
    base, *others = results("sweep-recipe.json")["results"]
    greedy, sampled = (f"{one['acceptance_length']:.3f}" for one in base["eval_sets"].values())
    assert f"| {greedy} | | {sampled} | |" in page
    for run in others:
        assert f"| `{run['run']}` |" in page
        assert f" | {beside_the_first(run)} |" in page
    for run in results("sweep-rope.json")["results"]:
        assert f"| `{run['run']}` | {beside_the_first(run)} |" in page
    _, own = results("sweep-prose.json")["results"]
    one = own["eval_sets"]["greedy"]
    low, high = one["difference_interval"]
    assert f"{one['difference']:+.3f} ({low:+.3f} to {high:+.3f}) greedy" in page
    mean, learned = (results(f"ordered-{kind}.json")["after"] for kind in ("mean", "learned"))
    assert f"dense {mean['dense_acceptance_length']:.3f}; through the best 32" in page
    assert f"clusters {mean['acceptance_length']:.3f} with the clusters' means" in page
    assert f"head in {1 - mean['recall']['argmax']['32']:.1%} of drafts" in page
    assert (
        f"and {learned['acceptance_length']:.3f} after 500 steps of learning, which miss " in page
    )
    assert f"miss {1 - learned['recall']['argmax']['32']:.1%} ([ordered-learned.json]" in page


def beside_the_first(run: dict[str, Any]) -> str:
    cells = []
    for one in run["eval_sets"].values():
        low, high = one["difference_interval"]
        cells += [f"{one['acceptance_length']:.3f}"]
        cells += [f"{one['difference']:+.3f} ({low:+.3f} to {high:+.3f})"]
    return " | ".join(cells)


def test_the_figures_of_the_page_on_serving_are_those_of_the_result_files() -> None:
    page = (ROOT / "docs" / "serving.md").read_text(encoding="utf-8")
    files = sorted((ROOT / "docs" / "results").glob("serve-*.json"))
    assert files
    for path in files:
        r = json.loads(path.read_text(encoding="utf-8"))
        length, speed = r["acceptance_length"], r["tokens_per_second"]
        figures = f"{length['transformers']:.3f} | {length['engine']:.3f}"
        figures += f" | {speed['engine_plain']:.0f} | {speed['engine_assisted']:.0f} |"
        assert f"(results/{path.name}) | {r['environment']['engine']} | {figures}" in page
        assert set(r["equal_texts"].values()) == {1.0}
    rates = results("serve-gemma3-270m-vllm.json")["cumulative_acceptance_rate"]
    told = {side: ", ".join(f"{rate:.3f}" for rate in rates[side]) for side in rates}
    assert f"draft 1 to 4 in {told['engine']},\ntransformers in {told['transformers']}." in page


def adapted_row(name: str, r: dict[str, Any]) -> str:
    found = r["acceptance"]["domain"]
    cells = [f"[{name}](results/adapt-{name}.json)"]
    for stage in ("reference", "unadapted", "adapted"):
        whole, straight = (
            found[stage][f"acceptance_length{end}"] for end in ("", "_without_loops")
        )
        cells.append(f"{whole:.2f} ({straight:.2f})")
    recovered, straight = r["recovered_share"], r["recovered_share_without_loops"]
    cells.append("" if recovered is None else f"{recovered:.0%} ({straight:.0%})")
    change = r["general_change_share"]
    cells.append("" if change is None else f"{change:+.0%}")
    speeds = r["speedup"]["domain"]
    cells += [f"{speeds[s]['speedup']:.2f}" for s in ("unadapted", "adapted")]
    return f"| {' | '.join(cells)} |"


def test_the_figures_of_the_page_on_tuned_targets_are_those_of_the_result_files() -> None:
    page = (ROOT / "docs" / "fine-tuned-targets.md").read_text(encoding="utf-8")
    files = sorted((ROOT / "docs" / "results").glob("adapt-*.json"))
    assert files
    sums = results("adapt-math-100.json")
    lengths = [
        sums[f"{stage}_acceptance_length"] for stage in ("reference", "unadapted", "adapted")
    ]
    told = (
        "from {:.2f} tokens a round to {:.2f}; a quarter of an hour on two CPU cores brought it to "
    )
    told += "{:.2f}, {:.0%} of what was lost"
    readme = " ".join((ROOT / "README.md").read_text(encoding="utf-8").split())
    assert told.format(*lengths, sums["recovered_share"]) in readme
    for path in files:
        name, r = path.stem.removeprefix("adapt-"), json.loads(path.read_text(encoding="utf-8"))
        if r["adapted_acceptance_length"] is None:
            lost = [r[f"{s}_acceptance_length"] for s in ("reference", "unadapted")]
            wanted = "{:.2f} | {:.2f} |".format(*lost)
        else:
            wanted = adapted_row(name, r)
        assert wanted in page, f"{path.name} holds: {wanted}"


def versions_row(run: dict[str, Any]) -> str:
    names = ("transformers", "python", "torch", "selected", "order", "passed", "failed")
    return f"| {' | '.join(str(run[name]) for name in names)} |"


def test_the_page_of_versions_tells_of_every_run() -> None:
    page = (ROOT / "docs" / "versions.md").read_text(encoding="utf-8")
    runs = results("versions.json")
    assert page.count("| random, seed") == len(runs)
    for run in runs:
        assert versions_row(run) in page, f"the file holds: {versions_row(run)}"
        for failure in run["failures"]:
            assert failure.partition("::")[2].partition("[")[0] in page


PAGES = ("README.md", "CONTRIBUTING.md", "SECURITY.md", "docs/*.md")


def commands_of(page: str) -> Iterator[tuple[str, bool]]:
    """What follows `headstart` in each command line of a page, and whether it is one of a block,
    which is to be whole. Code of one word names a command and calls none."""
    text = re.sub(r"\\\n\s*", " ", page)
    for block in re.findall(r"```sh\n(.*?)```", text, re.DOTALL):
        for line in re.findall(r"^(?:.* -m )?headstart(?:\.cli)? (.*)$", block, re.MULTILINE):
            yield line.partition(" > ")[0].strip(), True
    for code in re.findall(r"`([^`]+)`", re.sub(r"```.*?```", "", text, flags=re.DOTALL)):
        command, _, line = " ".join(code.split()).partition(" ")
        if command == "headstart" and " " in line and not line.startswith("COMMAND"):
            yield line.partition(" > ")[0], False


@pytest.mark.parametrize("path", [path for page in PAGES for path in sorted(ROOT.glob(page))])
def test_every_command_line_of_the_documents_is_one_that_the_parser_takes(path: Path) -> None:
    for line, in_block in commands_of(path.read_text(encoding="utf-8")):
        words = shlex.split(line, comments=True)
        args = _parse([word for word in words if word != "..."])
        if not args.of.settings:
            continue
        # A file of the reader's own is not there.
        recipe = args.config if args.config in recipe_names() else None
        if in_block:
            assert missing(args.of, args.config, args.settings) is None, line
        if args.of.name == "order":
            args.settings += [f"head.init_from={args.head}", "head.use_ordered_embeddings=true"]
        load_settings(recipe, args.settings)


def test_command_lines_are_found_in_blocks_and_in_sentences() -> None:
    block = "```sh\nx -m headstart.cli \\\n  train --plan > a\n```\n"
    page = block + "`headstart eval` or `headstart\neval H`"
    assert list(commands_of(page)) == [("train --plan", True), ("eval H", False)]

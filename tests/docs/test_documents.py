"""The check of the documents finds what is wrong with them: on a copy with one fault each."""

import json
import shutil
from pathlib import Path

import pytest

from docs.checks import OF_ROOT, bad_command, dead_pages, loose_figures, problems_of, slug
from docs.make import check, main, stale_blocks, write
from docs.tables_decoding import category_table, decoder_table, difference, headline

ROOT = Path(__file__).resolve().parents[2]
QUICKSTART = "docs/tutorials/quickstart.md"
MODEL = "docs/tutorials/your-model.md"
RESULTS = "docs/results.md"
HEADLINE = "| clean-KV (`exact`), K = 4 | "  # of its table; a figure follows


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    """The repository with documents of its own; all else are links."""
    root = tmp_path / "copy"
    root.mkdir()
    for path in ROOT.iterdir():
        if path.name not in (*OF_ROOT, "docs", ".git"):
            (root / path.name).symlink_to(path)
    shutil.copytree(ROOT / "docs", root / "docs", ignore=shutil.ignore_patterns("__pycache__"))
    for name in OF_ROOT:
        shutil.copyfile(ROOT / name, root / name)
    return root


def break_page(root: Path, page: str, old: str, new: str) -> list[str]:
    """What is found of a page in which `old` became `new`."""
    path = root / page
    text = path.read_text(encoding="utf-8")
    assert old in text
    path.write_text(text.replace(old, new, 1), encoding="utf-8")
    return [*stale_blocks(root, path), *problems_of(root, path)]


def test_the_documents_are_as_they_should_be() -> None:
    assert check(ROOT) == []


@pytest.mark.parametrize(
    ("page", "old", "new", "found"),
    [
        (RESULTS, HEADLINE, f"{HEADLINE}9", "block headline is stale"),
        ("README.md", HEADLINE, f"{HEADLINE}9", "block headline is stale"),
        (RESULTS, "<!-- END -->", "", "needs its <!-- END -->"),
        (RESULTS, "BEGIN: headline", "BEGIN: headlines", "nothing makes the block headlines"),
        (RESULTS, "One seed each.", "One seed each: 9.87.", "9.87 stands in no table"),
        ("README.md", "problems at 1.58", "problems at 9.87", "9.87 stands in no table"),
        (QUICKSTART, "(your-model.md)", "(my-model.md)", "my-model.md leads nowhere"),
        (QUICKSTART, "results.md#quickstart", "results.md#slowstart", "leads to no heading"),
        (MODEL, "gemma4-e4b --plan", "gemma4-e4b --sketch", "--sketch"),
        (MODEL, "headstart configs show", "headstart configs print", "does not parse"),
        (MODEL, "headstart check target.name=", "headstart check target.nam=", "target.nam"),
        (MODEL, "`head.init_from=PATH`", "`head.start_from=PATH`", "no setting head.start_from"),
        (MODEL, "  init_from:", "  start_from:", "is no configuration"),
        (MODEL, "output_dir=runs/mine\n", "output_dir='runs/mine\n", "no shell takes"),
        (QUICKSTART, "import exact_decoding", "import exact_decoder", "exact_decoder"),
        (QUICKSTART, "with exact_decoding(target):", "with exact_decoding(target)", "python does"),
        ("docs/reference/versions.md", "make test-dtypes", "make test-types", "no test-types"),
        ("docs/reference/commands.md", "`output_dir=runs/NAME`", "`output_dir=runs`", "commands"),
        ("docs/reference/configuration.md", "Optimizer steps.", "Steps.", "configuration"),
    ],
)
def test_a_fault_is_found(copy: Path, page: str, old: str, new: str, found: str) -> None:
    assert any(found in problem for problem in break_page(copy, page, old, new))


def test_a_changed_result_makes_its_tables_stale_until_they_are_written(copy: Path) -> None:
    file, page = copy / "docs" / "results" / "eval-t1.json", copy / RESULTS
    file.write_text(
        file.read_text().replace('"acceptance_length": 2.101', '"acceptance_length": 2.9')
    )
    assert [*stale_blocks(copy, page)] == [
        f"{RESULTS}: the block eval-t1 is stale: run `make docs`"
    ]
    assert write(copy) == [RESULTS]
    assert [*stale_blocks(copy, page)] == []


def test_sampled_rows_stand_beside_greedy_ones_and_in_no_figure_of_theirs() -> None:
    """Below plain decoding that samples alike."""
    report = json.loads((ROOT / "docs" / "results" / "eval-64.json").read_text(encoding="utf-8"))
    both = report | {"results": []}
    for result in report["results"]:
        both["results"].append(result)
        if result["decoder"] == "exact":
            both["results"].append(result | {
                "temperature": 1.0, "top_k": 64, "top_p": 0.95, "seeds": [0, 1], "speedup": 1.234,
                "acceptance_length": 1.234, "baseline_tokens_per_second": 11.4,
                "tokens_per_second": 14.1, "equal_to_plain": None, "diverged_share": None,
            })  # fmt: skip
    sampled = "sampled: temperature 1, top-k 64, top-p 0.95"
    greedy, rows = (
        headline({"eval-64": report, "eval-64-sampled": r}).splitlines() for r in (report, both)
    )
    assert rows[: len(greedy)] == greedy
    plain, drawn = (row.split(" | ") for row in rows[len(greedy) :])
    assert (plain[0], plain[2]) == (f"| plain decoding, {sampled}", "11")
    assert drawn[0] == f"| clean-KV (`exact`), {sampled}, K = 4"
    assert (drawn[1][:5], drawn[2], drawn[3][:4]) == ("1.234", "14", "1.23")
    rows = decoder_table(both).splitlines()
    of_exact = [row.split(" | ") for row in rows if "`exact`" in row]
    assert [sampled in row[0] for row in of_exact] == [False, True] * (len(of_exact) // 2)
    assert all(row[-1] == " |" for row in of_exact if sampled in row[0]), "equal to nothing"
    lengths = ("transformers", "exact", "hybrid", "lookup")
    assert category_table(both, lengths) == category_table(report, lengths)
    pair = ("transformers", "exact")
    assert difference(both, both, pair) == difference(report, report, pair)


def test_a_page_that_code_or_a_message_names_has_to_be_there(copy: Path) -> None:
    assert [*dead_pages(copy)] == []
    (copy / "docs" / "upstream.md").unlink()
    found = [*dead_pages(copy)]
    assert "heads/target.py: there is no docs/upstream.md" in found
    (copy / "SECURITY.md").write_text(f"{RESULTS}#gone, and https://host/{RESULTS}/gone.md")
    assert "SECURITY.md: docs/results.md has no heading gone" in [*dead_pages(copy)]


def test_commands_of_sentences_may_be_parts_and_those_of_blocks_are_whole() -> None:
    assert [*bad_command("eval runs/mine/head ...", whole=False)] == []
    assert [*bad_command("eval runs/mine/head", whole=True)] != []


def test_figures_in_sentences_are_those_of_the_tables() -> None:
    page = "Of 1.25 and 5.24.0, not 2.5 or `3.14`; Python 3.10 to 3.19.\n"
    page += "<!-- BEGIN: a -->\n\n| 1.25 |\n\n<!-- END -->\n"
    assert [*loose_figures(page, page)] == []
    assert [*loose_figures(page.replace("Of 1.25", "Of 1.26"), page)] != []


def test_anchors_are_those_of_github() -> None:
    assert (
        slug("How `headstart eval` measures, in [short](a.md)")
        == "how-headstart-eval-measures-in-short"
    )


def test_another_word_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["wirte"]) == 2
    assert "write" in capsys.readouterr().err

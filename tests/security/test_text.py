"""What others wrote is read, and does nothing: not in a terminal, in Markdown or in a picture."""

import json
import logging
import re
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
from accelerate import PartialState
from rich.progress import Progress

from headstart.cli.main import main
from headstart.common.console import in_markdown, phase, plain_console, print_once, progress_bar
from headstart.data.inspection import inspect_path
from headstart.data.prompts import Prompt, encode_usable
from headstart.eval.check import Finding, print_findings
from headstart.eval.page import markdown, page, print_report
from headstart.train.adapt_report import adaptation_markdown
from tests.helpers.reports import one_result, report
from tests.helpers.runs import ROOT

ESCAPES = (
    "\x1b[2J\x1b]8;;http://a.example\x07\x9b31m\r\u202e\u2066",
    "[/INST]",
    "[link=http://a.example]here[/link]",
)
ACTING = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]")
MARKDOWN = "`|\n\n# x ![i](http://a.example/i.png) <img src=x onerror=alert(1)> [a](b) *c*"


def about(name: str) -> dict[str, Any]:
    """A report whose target, head and category have the name."""
    results = [one_result("exact", 4, 1.2), one_result("exact", 4, 1.3, category=name)]
    content = report([result | {"head": name} for result in results], verdict=f"Use {name}.")
    content["environment"]["target"] = name
    costs = {name: {"exact": {"c": 0.1, "v": [1.0, 1.1, 1.2]}}}
    return content | {"costs": costs}


@pytest.mark.parametrize("name", ESCAPES)
def test_names_in_the_tables_of_a_report_are_shown_as_they_are(
    name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    print_report(about(name))
    shown = capsys.readouterr().out
    assert not ACTING.search(shown)
    assert name.replace("\x1b", "\u241b")[:3] in shown


@pytest.mark.parametrize("name", ESCAPES)
def test_names_among_findings_titles_and_lines_do_not_act(
    name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    print_findings([Finding("prompts", name, "noted", [f"category {name}"])])
    plain_console().print(name)
    print_once(name)

    def refuse(prompt: Prompt) -> None:
        raise ValueError(prompt.id)

    encode_usable([Prompt(name, "", "", [], raw=True)], refuse, 1.0)
    shown = "".join(capsys.readouterr())
    assert not ACTING.search(shown)
    assert shown.count(name.replace("\x1b", "\u241b")[:3]) >= 4


def test_a_name_of_two_lines_fakes_no_line(capsys: pytest.CaptureFixture[str]) -> None:
    print_once("reading a\nheadstart: all is well")
    with phase("reading b\nheadstart: all is well"):
        pass
    assert not re.search("^headstart", capsys.readouterr().out, re.MULTILINE)


@pytest.mark.parametrize("name", ESCAPES)
def test_a_bar_in_a_terminal_shows_its_category(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True, raising=False)
    bar = progress_bar()
    assert type(bar) is Progress
    bar.add_task(f"Answering ({name})", status=name)
    console = plain_console(200)
    with console.capture() as captured:
        console.print(bar.get_renderable())
    shown = re.sub(r"\x1b\[[\d;]*m", "", captured.get())  # without the colors of the bar itself
    assert not ACTING.search(shown)
    assert shown.count(name.replace("\x1b", "\u241b")[:3]) >= 2


def test_an_error_names_a_file_without_its_escapes(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    name = str(tmp_path / f"{ESCAPES[0].replace('/', '')}.jsonl")
    for more in ([], ["--debug"]):
        assert main(["inspect", name, *more]) == 1
        shown = capsys.readouterr().err
        assert not ACTING.search(shown)
        assert "\u241b" in shown


def test_warnings_of_transformers_about_a_config_do_not_act(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    main(["inspect", str(tmp_path / "none")])
    record = logging.makeLogRecord({"msg": "a model of type %s", "args": (ESCAPES[0],)})
    handlers = logging.getLogger("transformers").handlers
    assert handlers
    assert not any(ACTING.search(handler.format(record)) for handler in handlers)


def test_a_file_of_prompts_shows_its_ids_and_reasons(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "prompts.jsonl"
    rows = [{"id": text, "category": text, "prompt": text * 2} for text in ESCAPES]
    path.write_text("".join(json.dumps(row) + "\n" for row in [*rows, {"id": ESCAPES[0]}]))
    inspect_path(path)
    shown = capsys.readouterr().out
    assert not ACTING.search(shown)
    assert "[/INST][/INST]" in shown


def test_a_name_in_report_md_makes_no_row_heading_picture_or_element() -> None:
    text = markdown(about(MARKDOWN))
    assert len(re.findall(r"^\|", text, re.MULTILINE)) == 4  # columns, alignment, two results
    assert re.findall(r"^#+ \w+", text, re.MULTILINE) == ["# Evaluation"]
    for row in re.findall(r"^\|.*", text, re.MULTILINE):
        assert len(re.findall(r"(?<!\\)\|", row)) == 12
    assert not re.search(r"(?<!\\)[<`]|(?<!\\)\]\(", text)


def test_no_part_of_a_whole_report_md_is_made_of_a_name() -> None:
    """Its breakdowns and warnings too."""
    path = ROOT / "docs" / "results" / "eval-64.json"
    name = json.dumps(MARKDOWN)[1:-1]
    content = json.loads(path.read_text().replace("runs/gemma3-270m/head", name))
    assert content["concurrency"]
    content["warnings"] = {MARKDOWN: f"trained for {MARKDOWN}"}
    text = markdown(content)
    assert not re.search(r"(?<!\\)[<`]|(?<!\\)\]\(|^# x", text, re.MULTILINE)
    assert "trained for" in text
    assert "trained for" in page(content)


def test_a_plain_name_in_report_md_stays_as_it_was() -> None:
    text = markdown(about("google/gemma-3-270m_it"))
    assert text.count("google/gemma-3-270m_it") >= 5
    assert "\\" not in text


@pytest.mark.parametrize("start", ["# x", "- x", "+ x", "1. x", "12) x", "---"])
def test_a_name_that_begins_as_a_block_stays_a_paragraph(start: str) -> None:
    assert in_markdown(start) in (f"\\{start}", start.replace(".", "\\.").replace(")", "\\)"))
    assert in_markdown(start) != start


def test_a_category_in_adapt_md_makes_no_row_or_element() -> None:
    one = {"acceptance_length": 2.0, "acceptance_length_interval": [1.5, 2.5]}
    found = {"unadapted": one | {"categories": {MARKDOWN: one}}}
    text = adaptation_markdown({
        "verdict": f"Of {MARKDOWN}.", "advice": MARKDOWN, "target": {"name": MARKDOWN},
        "head": MARKDOWN, "chat_template_kwargs": {"a": MARKDOWN}, "num_assistant_tokens": 4,
        "acceptance": {"domain": found}, "seconds": {}, "commands": ["headstart eval"],
    })  # fmt: skip
    assert len(re.findall(r"^\|", text, re.MULTILINE)) == 4
    body = text.partition("```sh")[0]
    assert not re.search(r"(?<!\\)[<`]|(?<!\\)\]\(", body)
    assert not re.search(r"^# x", body, re.MULTILINE)


def test_no_table_is_printed_by_a_console_that_reads_markup() -> None:
    """`plain_console` alone makes them."""
    package = Path(__file__).parents[2]
    made = {
        str(path.relative_to(package))
        for folder in ("cli", "data", "eval", "heads", "train")
        for path in (package / folder).glob("*.py")
        if re.search(r"\bConsole\((?!Console\))|rich\.print|rich import print", path.read_text())
    }
    assert not made


def test_a_target_named_as_markup_makes_nothing_of_a_model_card(
    finished_run: Path, tmp_path: Path
) -> None:
    run = Path(shutil.copytree(finished_run, tmp_path / "run"))
    path = run / "eval" / "report.json"
    content = json.loads(path.read_text())
    for name in ("target", "prompts", "processor", "instructions"):
        content["environment"][name] = MARKDOWN
    content["environment"]["accelerator"] = None
    path.write_text(json.dumps(content))
    words = ["publish", str(run), "org/head", "publish.base_models=org/tiny", "--plan"]
    out = tmp_path / "folder"
    assert main([*words, "publish.languages='[en](b)'", f"output_dir={out}"]) != 0
    assert main([*words, f"output_dir={out}"]) == 0
    text = (out / "README.md").read_text().split("---\n", 2)[2]
    code = re.compile(r"```.*?```|``+ .*? ``+|`[^`\n]*`", re.DOTALL)
    prose = code.sub("", text)
    assert "img" in prose
    assert not re.search(r"(?<!\\)<|!\[|(?<!\\)\]\((?!evaluation|training)", prose)
    assert not re.search(r"^# x", text, re.MULTILINE)


def test_a_line_before_the_processes_join_settles_nothing(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Asked then, each of them would take itself for the only one."""
    monkeypatch.setattr(PartialState, "_shared_state", {})
    for rank, printed in (("0", "x\n"), ("1", "")):
        monkeypatch.setenv("RANK", rank)
        print_once("x")
        assert capsys.readouterr().out == printed
    assert not PartialState._shared_state

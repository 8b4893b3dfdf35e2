"""No terminal, pipe or log ends a run: commands in processes of their own."""

import json
import os
import subprocess
import sys
from pathlib import Path

from tests.helpers.runs import ROOT

TRAIN = [
    "train", "--config", "configs/tiny.yaml", "train.max_steps=4", "train.warmup_steps=1",
    "train.eval_steps=4", "data.num_conversations=6", "data.validation_conversations=2",
    "data.max_new_tokens=8", "head.use_ordered_embeddings=false", "head.num_centroids=null",
    "eval=null",
]  # fmt: skip


def started(*arguments: object, **environment: str) -> subprocess.Popen[bytes]:
    return subprocess.Popen(
        [sys.executable, "-m", "headstart.cli", *map(str, arguments)],
        cwd=ROOT, env=os.environ | environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip


def test_a_name_that_the_terminal_cannot_show_ends_no_run(tmp_path: Path) -> None:
    run, prompts = tmp_path / "größe", tmp_path / "held–out.jsonl"
    prompts.write_text('{"text": "abc"}\n')
    decoding = ["eval.limit=1", "eval.decoders=[exact]", "eval.max_new_tokens=4"]
    settings = [
        *TRAIN[:-1],
        *decoding,
        "eval.num_assistant_tokens=[2]",
        "eval.fp32_check_prompts=0",
    ]
    process = started(
        *settings, f"output_dir={run}", f"eval.prompts={prompts}", PYTHONIOENCODING="ascii"
    )
    output, errors = process.communicate(timeout=280)
    assert process.returncode == 0, errors
    assert json.loads((run / "status.json").read_text())["state"] == "finished"
    assert b"held\\u2013out.jsonl" in output
    assert (run / "eval" / "report.json").is_file()


def test_a_plan_and_an_error_in_latin_1(tmp_path: Path) -> None:
    settings = [*TRAIN, "--plan", f"output_dir={tmp_path / '日本'}"]
    output, errors = started(*settings, PYTHONIOENCODING="latin-1", COLUMNS="300").communicate()
    assert b"\\u65e5\\u672c" in output, errors
    bad = started("train", "--config", tmp_path / "日本.yaml", PYTHONIOENCODING="latin-1:strict")
    errors = bad.communicate()[1]
    assert bad.returncode == 1
    assert b"no configuration file" in errors


def test_a_reader_that_goes_away_ends_no_run(tmp_path: Path) -> None:
    """As `headstart train | head -1`, and as a terminal that is hung up."""
    process = started(*TRAIN, f"output_dir={tmp_path / 'run'}")
    assert process.stdout is not None
    assert process.stdout.readline()
    process.stdout.close()
    assert process.wait(timeout=280) == 0
    status = json.loads((tmp_path / "run" / "status.json").read_text())
    assert status["state"] == "finished"


def test_closed_output_ends_no_command(tmp_path: Path) -> None:
    """As `headstart ... >&-`."""
    command = [sys.executable, "-m", "headstart.cli", *TRAIN, f"output_dir={tmp_path / 'run'}"]
    done = subprocess.run(["sh", "-c", 'exec "$@" >&- 2>&-', "sh", *command], cwd=ROOT, check=False)
    assert done.returncode == 0
    assert (tmp_path / "run" / "head" / "config.json").is_file()


def test_names_in_tables_are_no_markup(tmp_path: Path) -> None:
    """`[/x]` is the end of a style to a terminal library."""
    run = tmp_path / "a[bold]b" / "[" / "x]"
    output, errors = started(*TRAIN, f"output_dir={run}", "--plan", COLUMNS="300").communicate()
    assert f"Plan of {run}".encode() in output, errors
    run.mkdir(parents=True)
    (run / "status.json").write_text(json.dumps({
        "state": "failed", "doing": "training", "started": "2026-01-01", "why": "no file [/INST]",
    }))  # fmt: skip
    output, errors = started("runs", "list", tmp_path, COLUMNS="300").communicate()
    assert b"no file [/INST]" in output, errors
    assert str(run.relative_to(tmp_path)).encode() in output

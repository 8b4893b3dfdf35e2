"""The command as a user runs it: in processes of its own."""

import json
import subprocess
import sys
import time
from pathlib import Path

import pytest

from headstart.cli.arguments import Command
from headstart.cli.main import COMMANDS, main
from headstart.configs.loader import load_config
from headstart.heads import loading
from headstart.heads.loading import load_target
from headstart.heads.pairing import build_assistant
from headstart.heads.unroll import DraftHead
from headstart.train.plan import plan

ROOT = Path(__file__).resolve().parents[2]
BIN = Path(sys.executable).parent


def run(*command: object) -> subprocess.CompletedProcess[str]:
    """A command that went well has nothing to say on stderr: no library's warning either."""
    result = subprocess.run(
        [str(part) for part in command], cwd=ROOT, capture_output=True, text=True, timeout=600
    )
    assert result.returncode or not result.stderr, result.stderr
    return result


def test_version_from_the_console_command_and_the_module() -> None:
    for command in ([BIN / "headstart"], [sys.executable, "-m", "headstart.cli"]):
        result = run(*command, "--version")
        assert result.returncode == 0, result.stderr
        assert result.stdout.startswith("headstart 0.")


@pytest.mark.parametrize("debug", [True, False])
def test_debug_shows_the_traceback_before_and_after_the_name_of_a_command(
    debug: bool, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command, flag = ["compare", str(tmp_path), str(tmp_path)], ["--debug"] if debug else []
    for argv in ([*flag, *command], [*command, *flag]):
        assert main(argv) == 1
        err = capsys.readouterr().err
        assert "no report at" in err
        assert ("Traceback" in err) == debug


ANSWER_WITHOUT_TORCH = """
import argparse, contextlib, io, sys
from headstart.cli.main import _parser, main

def leaves(parser, path):
    below = [a for a in parser._actions if isinstance(a, argparse._SubParsersAction)]
    if not below:
        yield path
    for action in below:
        for name, child in action.choices.items():
            yield from leaves(child, [*path, name])

found = list(leaves(_parser(), []))
cases = [([], 2), (["nope"], 2), (["--version"], 0), (["--help"], 0)]
cases += [([*leaf, word], code) for leaf in found for word, code in (("--help", 0), ("--nope", 2))]
for argv, code in cases:
    output = io.StringIO()
    with contextlib.redirect_stdout(output), contextlib.redirect_stderr(output):
        try:
            main(argv)
        except SystemExit as stop:
            assert stop.code == code, (argv, stop.code)
    assert output.getvalue(), argv
    loaded = {"torch", "transformers", "accelerate"} & set(sys.modules)
    assert not loaded, f"{argv} loads {loaded}"
print(len(found))
"""


def test_help_and_usage_errors_answer_without_torch() -> None:
    """Of every command: torch alone takes seconds to load."""
    result = run(sys.executable, "-c", ANSWER_WITHOUT_TORCH)
    assert result.returncode == 0, result.stderr
    assert int(result.stdout) > 15, "all leaves were found"


def test_wrong_names_are_told_without_torch() -> None:
    """Those that are checked while arguments are parsed."""
    for argv in (
        ["install", "nope"],
        ["export", "h", "nope", "target.name=t", "output_dir=o"],
        ["serve-check", "h", "nope", "target.name=t", "output_dir=o"],
        ["bench", "nope", "h"],
        ["runs", "nope"],
        ["configs", "nope"],
    ):
        code = (
            "import sys; from headstart.cli.main import main\n"
            f"try: main({argv})\n"
            "except SystemExit as stop: sys.exit(stop.code + 10 * ('torch' in sys.modules))"
        )
        result = run(sys.executable, "-c", code)
        assert result.returncode == 2, (argv, result.stderr)
        assert "'nope'" in result.stderr


@pytest.mark.slow
def test_accelerate_launch_and_the_console_command_run_the_same_code(tmp_path: Path) -> None:
    """Train a tiny head both ways: the same losses, a head, and reports."""
    shared = [
        "train.max_steps=6",
        "eval.limit=2",
        "eval.max_new_tokens=8",
        "eval.fp32_check_prompts=1",
    ]
    shared += [f"data.cache_dir={tmp_path / 'cache'}"]
    launch = ["launch", "--num_processes", "1", "--num_cpu_threads_per_process", "2"]
    launch += [
        "--num_machines",
        "1",
        "--mixed_precision",
        "no",
        "--dynamo_backend",
        "no",
        "train.py",
    ]
    ways = {
        "launch": [BIN / "accelerate", *launch],
        "console": [BIN / "headstart", "train"],
    }
    losses = {}
    for name, command in ways.items():
        folder = tmp_path / name
        result = run(*command, "--config", "configs/tiny.yaml", f"output_dir={folder}", *shared)
        assert result.returncode == 0, result.stderr
        rows = (folder / "metrics.jsonl").read_text().splitlines()
        losses[name] = [json.loads(row)["loss"] for row in rows]
        assert (folder / "head" / "model.safetensors").is_file()
        assert (folder / "config.yaml").is_file()
        report = json.loads((folder / "eval" / "report.json").read_text())
        assert all(r["equal_to_plain"] for r in report["results"])
        assert "speedup (95%)" in result.stdout
    assert losses["launch"] == losses["console"]

    head = tmp_path / "console" / "head"
    out = tmp_path / "out"
    prompts = "data/prompts/text_eval.jsonl"
    settings = ["target.name=tiny-gemma4", "target.dtype=float32", f"eval.prompts={prompts}"]
    settings += ["eval.limit=1", "eval.num_assistant_tokens=2,4", "eval.max_new_tokens=6"]
    result = run(BIN / "headstart", "eval", head, *settings, f"output_dir={out}")
    assert result.returncode == 0, result.stderr
    assert json.loads((out / "report.json").read_text())["schema"] == 4


def test_the_pieces_of_the_data_pipeline_from_the_command_line(tmp_path: Path) -> None:
    """regenerate, extract, inspect, train on the store: each in a process of its own."""
    settings = ["--config", "configs/tiny.yaml", "data.max_new_tokens=12"]
    conversations, store = tmp_path / "conversations", tmp_path / "store"
    steps: list[list[object]] = [
        ["regenerate", *settings, f"output_dir={conversations}"],
        ["extract", conversations, *settings, f"output_dir={store}"],
        ["inspect", conversations, "1"],
        ["inspect", store],
        [
            "train", *settings, f"data.store={store}", "data.validation_conversations=2",
            f"output_dir={tmp_path / 'run'}", "train.max_steps=6", "eval=null",
        ],
    ]  # fmt: skip
    output = []
    for step in steps:
        result = run(BIN / "headstart", *step)
        assert result.returncode == 0, result.stderr
        output.append(result.stdout)
    assert "Contamination: 0 exact and 0 near" in output[0]
    assert "keep" in output[1]
    assert "of the mass" in output[1]
    assert "⟦" in output[2]
    assert "16 of 16" in output[2]
    assert "checksums" in output[3]
    assert (tmp_path / "run" / "head" / "model.safetensors").is_file()


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["train", "--config", "absent.yaml"], "no configuration file absent.yaml"),
        (
            ["train", "--config", "configs/tiny.yaml", "train.stepz=1"],
            "no key train.stepz; the nearest valid key is train.max_steps",
        ),
        (
            ["train", "--config", "configs/tiny.yaml", "data.prompts=[absent.jsonl]"],
            "no prompt file absent.jsonl",
        ),
    ],
)
def test_a_failure_is_one_line_on_stderr_and_exit_code_1(
    argv: list[str], message: str, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    monkeypatch.chdir(ROOT)
    assert main([*argv, f"output_dir={tmp_path / 'run'}"]) == 1
    error = capsys.readouterr().err.strip().splitlines()
    assert message in error[-1]
    assert "Traceback" not in "".join(error)


@pytest.mark.parametrize(
    "argv",
    [
        ["train", "--config", "tiny", "data.prompts=absent.jsonl"],
        ["train", "--config", "tiny", "eval.prompts=absent.jsonl"],
        ["eval", "google/gemma-4-E2B-it-assistant", "eval.prompts=absent.jsonl"],
        ["eval", "google/gemma-4-E2B-it-assistant", "eval.prompts=gsm8k=absent.jsonl"],
        ["extract", "absent.jsonl"],
        ["bench", "extract", "data.prompts=absent.jsonl"],
    ],
    ids=lambda argv: f"{argv[0]}: {argv[-1]}",
)
def test_missing_prompts_are_told_before_any_weights_are_loaded(
    argv: list[str], tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    def loaded(*_: object) -> None:
        raise AssertionError("weights were loaded")

    monkeypatch.setattr(loading, "_load", loaded)
    out = [] if argv[0] == "bench" else [f"output_dir={tmp_path / 'out'}"]
    assert main([*argv, *out]) == 1
    assert "no prompt file absent.jsonl" in capsys.readouterr().err.strip().splitlines()[-1]


def test_overrides_may_stand_between_options(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(ROOT)
    argv = [
        "train",
        "train.max_steps=7",
        "--config",
        "configs/tiny.yaml",
        "--plan",
        "train.max_anchors=5",
    ]
    assert main([*argv, f"output_dir={tmp_path}"]) == 0
    text = capsys.readouterr().out
    assert "7 (140 rows in all)" in text


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["extract", "absent.jsonl", "output_dir=x"], "absent.jsonl"),
        (
            ["extract", "x", "data.store=x", "data.filter.num_conversations=1", "output_dir=x"],
            "extract stores everything",
        ),
        (["inspect", "absent.jsonl"], "no prompt file absent.jsonl"),
        (
            ["regenerate", "output_dir=x", "data.prompts=absent.jsonl"],
            "no prompt file absent.jsonl",
        ),
        (["regenerate", "output_dir=x", "server.model=m"], "give url too"),
        (
            ["regenerate", "output_dir=x", "server.url=http://127.0.0.1:9"],
            "no OpenAI-compatible server answers at http://127.0.0.1:9",
        ),
    ],
)
def test_data_commands_explain_what_is_missing(
    argv: list[str], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    monkeypatch.chdir(ROOT)
    argv = [f"output_dir={tmp_path / 'x'}" if part == "output_dir=x" else part for part in argv]
    if argv[0] != "inspect":
        argv = [*argv, "target.name=tiny-gemma4", "target.dtype=float32"]
    assert main(argv) == 1
    error = capsys.readouterr().err.strip().splitlines()
    assert message in error[-1]
    assert "Traceback" not in "".join(error)


def test_wrong_usage_is_exit_code_2(capsys: pytest.CaptureFixture[str]) -> None:
    for argv in (
        ["export", "head"],
        ["export", "head", "vllm", "another", "target.name=x", "output_dir=y"],
        ["inspect"],
        ["train", "word", "--config", "x"],
        ["eval", "head", "train.max_steps=3"],
        ["no-such-command"],
        [],
        ["train", "--config", "x", "--nope"],
    ):
        with pytest.raises(SystemExit) as stop:
            main(argv)
        assert stop.value.code == 2
    capsys.readouterr()


def named_arguments(command: Command) -> list[str]:
    """One of each that has to be given."""
    return [a.choices[0] if a.choices else "x" for a in command.arguments if a.many == "1"]


@pytest.mark.parametrize(
    ("command", "missing"), [(command, key) for command in COMMANDS for key in command.required]
)
def test_a_setting_that_has_to_be_given_is_asked_for_by_its_name(
    command: Command, missing: str, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    """Before anything is loaded or written."""
    monkeypatch.chdir(tmp_path)
    given = [f"{key}=x" for key in command.required if key != missing]
    with pytest.raises(SystemExit) as stop:
        main([command.name, *named_arguments(command), *given])
    assert stop.value.code == 2
    assert f"{command.name} needs {missing}" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_ctrl_c_is_exit_code_130_and_everything_is_saved(tmp_path: Path) -> None:
    command = [str(BIN / "headstart"), "train", "--config", "configs/tiny.yaml"]
    command += [
        f"output_dir={tmp_path / 'run'}",
        "train.max_steps=100000",
        "train.eval_steps=99999",
    ]
    process = subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, text=True)
    log = tmp_path / "run" / "metrics.jsonl"
    while process.poll() is None and not (log.is_file() and log.read_text().count("\n") >= 3):
        time.sleep(0.1)
    process.send_signal(2)
    _, error = process.communicate(timeout=120)
    assert process.returncode == 130, error
    assert "--resume" in error
    (checkpoint,) = (tmp_path / "run" / "checkpoints").iterdir()
    assert json.loads((checkpoint / "state.json").read_text())["step"] >= 3


def test_the_plan_counts_what_is_then_trained(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    config = load_config("configs/tiny.yaml")
    lines = plan(config)
    dense = config.head.model_copy(update={"use_ordered_embeddings": False})  # clusters come after
    head = DraftHead(build_assistant(load_target("tiny-gemma4", "float32"), dense))
    trained = sum(p.numel() for p in head.trainable().values())
    assert lines["parameters trained"] == f"{trained:,}"
    assert lines["rows a step"].startswith("64 a process")

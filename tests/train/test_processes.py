"""One process, two by DDP and two by FSDP2: the same head. Launched as a user would."""

import json
import os
import platform
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from headstart.eval.report import SPEEDS
from headstart.train.checkpoints import checkpoints
from tests.helpers.runs import ROOT, metrics, weights

pytestmark = pytest.mark.slow

TINY = ["--config", "configs/tiny.yaml", "eval=null", "target.dtype=float32"]
STEPS = [
    "train.max_steps=12", "train.eval_steps=6", "train.save_steps=6",
    "train.mixed_precision=no", "train.ema_decay=0.9",
    # Where a gradient is next to nothing AdamW divides rounding by rounding: steps of its own size.
    "train.learning_rate=3e-4",
]  # fmt: skip
PORTS = iter(range(29_600, 29_700))


def launch(
    kind: str, *arguments: str, script: tuple[str, ...] = ("train.py",)
) -> subprocess.CompletedProcess[str]:
    """`accelerate launch` of two processes with a shipped configuration."""
    command = [
        sys.executable, "-m", "accelerate.commands.accelerate_cli", "launch",
        "--config_file", f"configs/accelerate-{kind}.yaml", "--num_processes", "2",
        "--main_process_port", str(next(PORTS)), *script, *arguments,
    ]  # fmt: skip
    return subprocess.run(
        command, cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=300
    )


def environment() -> dict[str, str]:
    # The checkout's own modules; two processes of one thread each leave one another room.
    return {**os.environ, "OMP_NUM_THREADS": "1"}


def run(*arguments: str) -> None:
    command = [sys.executable, "-m", "headstart.cli", *arguments]
    done = subprocess.run(command, cwd=ROOT, env=environment(), capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run of one process, which the others must equal."""
    folder = tmp_path_factory.mktemp("alone")
    run(
        "train", *TINY, *STEPS, f"output_dir={folder / 'run'}", f"data.cache_dir={folder / 'cache'}"
    )
    return folder


def farthest(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> float:
    assert ours.keys() == theirs.keys()
    return max(float((ours[k].float() - theirs[k].float()).abs().max()) for k in ours)


def same_run(ours: Path, theirs: Path) -> None:
    """Weights, their average and the exported head to 1e-6; the metrics of every step."""
    assert farthest(weights(ours), weights(theirs)) < 1e-6
    name = "average.safetensors"
    averages = [load_file(checkpoints(run / "checkpoints")[-1] / name) for run in (ours, theirs)]
    assert farthest(*averages) < 1e-6
    heads = [load_file(run / "head" / "model.safetensors") for run in (ours, theirs)]
    assert farthest(*heads) < 1e-6
    assert len(metrics(ours)) == len(metrics(theirs)) == 12
    same_metrics(metrics(ours), metrics(theirs))


def same_metrics(ours: list[dict[str, Any]], theirs: list[dict[str, Any]]) -> None:
    for a, b in zip(ours, theirs, strict=True):
        assert a == pytest.approx(b, abs=1e-4)


def test_two_processes_with_half_the_batch_each_train_the_same_head(
    alone: Path, tmp_path: Path
) -> None:
    arguments = [*TINY, *STEPS, f"data.cache_dir={alone / 'cache'}", "train.batch_size=2"]
    done = launch("ddp", *arguments, f"output_dir={tmp_path / 'run'}")
    assert done.returncode == 0, done.stdout + done.stderr
    same_run(tmp_path / "run", alone / "run")
    assert done.stdout.count("Best head") == 1, "the main process alone speaks"
    state = json.loads((tmp_path / "run/checkpoints/step-000012/state.json").read_text())
    assert state["processes"] == 2


def test_a_split_head_over_a_split_target_trains_the_same_head(alone: Path, tmp_path: Path) -> None:
    """FSDP2 for the head, for the target as well, and no stored activations: every forward of the
    target takes both processes. Then one process goes on where the two stopped."""
    shared = [*TINY, *STEPS, "data.online=true", "target.sharded=true"]
    shared += [f"data.cache_dir={tmp_path / 'cache'}", f"output_dir={tmp_path / 'run'}"]
    script = ("tests/train/fsdp_on_cpu.py",)
    done = launch("fsdp2", *shared, "train.batch_size=2", script=script)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "split over 2" in done.stdout
    # Online activations come from whole forwards, the others were recorded token by token.
    found = metrics(tmp_path / "run")
    for a, b in zip(found, metrics(alone / "run"), strict=True):
        assert a["loss"] == pytest.approx(b["loss"], abs=1e-3)
    whole = weights(tmp_path / "run")

    last = tmp_path / "run" / "checkpoints" / "step-000012"
    for path in last.iterdir():
        path.unlink()
    last.rmdir()
    refused = launch("fsdp2", *shared, "train.batch_size=1", "--resume", script=script)
    assert refused.returncode != 0
    assert "x processes=4, now 2" in refused.stderr
    halves = ["train.batch_size=2", "train.gradient_accumulation_steps=2", "--resume"]
    run("train", *shared, *halves)
    assert farthest(weights(tmp_path / "run"), whole) < 1e-6
    same_metrics(metrics(tmp_path / "run"), found)


def test_a_whole_run_in_bfloat16_of_a_split_head_over_a_split_target(tmp_path: Path) -> None:
    """A narrow one, whose table is a product. It answers, trains, validates, saves, orders,
    exports, evaluates and checks in float32; from the checkpoint in its midst it goes on to the
    same head."""
    settings = [
        "--config", "configs/tiny.yaml", *STEPS, "target.dtype=bfloat16", "target.sharded=true",
        "train.mixed_precision=bf16", "train.batch_size=2", "eval.limit=3", "head.hidden_size=32",
        "eval.max_new_tokens=12", "eval.num_assistant_tokens=2", f"output_dir={tmp_path / 'run'}",
        f"data.cache_dir={tmp_path / 'cache'}",
    ]  # fmt: skip
    script = ("tests/train/fsdp_on_cpu.py",)
    done = launch("fsdp2", *settings, script=script)
    assert done.returncode == 0, done.stdout + done.stderr
    folder = tmp_path / "run"
    whole, rows = weights(folder), metrics(folder)
    assert rows[-1]["loss"] < rows[0]["loss"]
    assert [row["step"] for row in rows if "acceptance_length" in row] == [6, 12]
    report = json.loads((folder / "eval" / "report.json").read_text())
    assert report["environment"]["dtype"] == "bfloat16"
    assert {result["texts"] for result in report["results"] if result["category"] == "all"} == {3}
    summary = json.loads((folder / "summary.json").read_text())
    assert summary["fp32_check"] == "every text equals plain decoding's"

    last = folder / "checkpoints" / "step-000012"
    for path in last.iterdir():
        path.unlink()
    last.rmdir()
    done = launch("fsdp2", *settings, "--resume", script=script)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "after step 6" in done.stdout
    assert farthest(weights(folder), whole) == 0
    same_metrics(metrics(folder), rows)


def test_an_evaluation_dealt_over_processes_says_what_one_process_says(
    alone: Path, tmp_path: Path
) -> None:
    """Texts, drafts and acceptance prompt by prompt, and every figure but the speeds, which two
    processes on one CPU do not measure."""
    settings = [
        "eval", str(alone / "run" / "head"), "target.name=tiny-gemma4", "target.dtype=float32",
        "eval.prompts=builtin:text_eval", "eval.limit=5", "eval.max_new_tokens=12",
        "eval.num_assistant_tokens=2,3", "eval.temperatures=0,1", "eval.decoders=exact,lookup",
    ]  # fmt: skip
    run(*settings, f"output_dir={tmp_path / 'one'}")
    both = [*settings, f"output_dir={tmp_path / 'two'}"]
    done = launch("ddp", *both, script=("-m", "headstart.cli"))
    assert done.returncode == 0, done.stdout + done.stderr
    assert "several processes shared a device" in " ".join(done.stdout.split())
    assert done.stdout.count("Evaluation: ") == 1, "the main process alone speaks"

    kept = [f"{tmp_path / name}/measurements.jsonl" for name in ("one", "two")]
    ours, theirs = ([json.loads(x) for x in Path(p).read_text().splitlines()[1:]] for p in kept)
    assert len(theirs) == 5
    for one, other in zip(ours, theirs, strict=True):
        assert without_times(one) == without_times(other)
    assert {path.name for path in (tmp_path / "two").glob("*.jsonl")} == {"measurements.jsonl"}

    timed = {"predicted_decode_speedup", "saved_share", *SPEEDS}

    def without(value: Any) -> Any:
        """A value, where it is a list of groups without their times."""
        if not (isinstance(value, list) and value and isinstance(value[0], dict)):
            return value
        return [{key: group[key] for key in group.keys() - timed} for group in value]

    one, two = (json.loads((tmp_path / n / "report.json").read_text()) for n in ("one", "two"))
    assert two["environment"]["processes"] == 2
    assert two["noise"] is None
    for a, b in zip(one["results"], two["results"], strict=True):
        assert all(
            a[key] is not None and b[key] is None for key in ("speedup", "tokens_per_second")
        )
        measured = a.keys() - {"per_text", *timed}
        assert {key: without(a[key]) for key in measured} == {k: without(b[k]) for k in measured}


def without_times(value: Any) -> Any:
    """What decoding gave, but for how long it took and what it ran beside."""
    if isinstance(value, dict):
        told = {k: v for k, v in value.items() if "seconds" not in k and k != "untimed"}
        return {k: without_times(v) for k, v in told.items()}
    return [without_times(item) for item in value] if isinstance(value, list) else value


WAITS = """
import sys, time
from headstart.common.processes import join_processes
join_processes()
print("joined", flush=True)
time.sleep(300)
"""
"""A process that is busy with something of its own, of which an exchange tells nothing."""


@pytest.mark.parametrize("busy", ["alone", "training"])
def test_a_killed_process_ends_the_other_which_names_it(busy: str, tmp_path: Path) -> None:
    """On two nodes there is no launcher that would see it; here two processes without one."""
    command = [sys.executable, "-c", WAITS]
    if busy == "training":
        command = [
            sys.executable, "-m", "headstart.cli", "train", *TINY, "train.max_steps=100000",
            "train.mixed_precision=no", f"data.cache_dir={tmp_path / 'cache'}",
            f"output_dir={tmp_path / 'run'}",
        ]  # fmt: skip
    shared = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(next(PORTS))}
    both = []
    for rank in ("0", "1"):
        of_rank = shared | {"RANK": rank, "LOCAL_RANK": rank, "LOCAL_WORLD_SIZE": "2"}
        both.append(subprocess.Popen(
            command, cwd=ROOT, env=environment() | of_rank, text=True,
            stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        ))  # fmt: skip
    first, second = both
    try:
        assert second.stdout is not None
        if busy == "alone":
            assert second.stdout.readline() == "joined\n"
        until = time.monotonic() + 120
        while busy == "training" and not (tmp_path / "run" / "metrics.jsonl").is_file():
            assert time.monotonic() < until
            time.sleep(0.5)
        time.sleep(2)
        second.kill()
        _, said = first.communicate(timeout=60)
    finally:
        for process in both:
            process.kill()
    assert first.returncode == 1
    assert f"process 1, on {platform.node()}, gives no sign of life any more" in said


@pytest.mark.parametrize("sharded", ["false", "true"])
def test_regeneration_and_extraction_are_dealt_over_processes(sharded: str, tmp_path: Path) -> None:
    """Three batches over two processes, so that one of them has to lend a hand at the end; the
    folders are byte-identical to those of one process."""
    settings = [*TINY, "data.num_conversations=12", "data.generation_batch_size=4"]
    settings.append("data.max_tokens=64")
    module = ("-m", "headstart.cli")

    def work(call: Any, name: str, *more: str) -> None:
        out, store = tmp_path / name, tmp_path / f"{name}-store"
        call("extract", f"output_dir={out}", *settings, *more)
        call("extract", str(out), f"output_dir={store}", *settings, *more)

    def both(*arguments: str) -> None:
        done = launch("ddp", *arguments, script=module)
        assert done.returncode == 0, done.stdout + done.stderr

    work(run, "one")
    work(both, "two", f"target.sharded={sharded}")
    for name in ("", "-store"):
        ours, theirs = tmp_path / f"two{name}", tmp_path / f"one{name}"
        names = {path.name for path in theirs.iterdir()}
        assert {path.name for path in ours.iterdir()} == names
        assert all((ours / n).read_bytes() == (theirs / n).read_bytes() for n in names)

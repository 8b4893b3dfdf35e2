"""What `headstart runs` says of runs that run, finished, failed, stopped or were killed; and what
Weights & Biases gets of them."""

import json
import os
import shlex
import shutil
import signal
import time
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from headstart.cli.main import main
from headstart.common.signals import Interrupted
from headstart.eval.acceptance import RecallCounts
from headstart.eval.page import decoder_name
from headstart.eval.plots import figures
from headstart.train import loop
from headstart.train import step as step_module
from headstart.train.run import train
from headstart.train.run_folder import _facts, read_run, read_status, run_folder, summary_text
from headstart.train.tracking import log_report
from tests.helpers.reports import usual
from tests.helpers.runs import metrics, tiny_config

SHORT = ["train.max_steps=8", "train.eval_steps=4", "train.save_steps=4"]


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that finished, one that stopped, one that failed and one that was killed."""
    folder = tmp_path_factory.mktemp("runs")
    cache = f"data.cache_dir={folder.parent / 'cache'}"
    train(tiny_config(folder / "good", *SHORT, cache))
    with pytest.MonkeyPatch.context() as patch:
        rate = step_module.learning_rate

        def stop_in_step_6(now: int, *args: Any) -> float:
            if now == 5:
                os.kill(os.getpid(), signal.SIGTERM)
            return rate(now, *args)

        patch.setattr(step_module, "learning_rate", stop_in_step_6)
        with pytest.raises(Interrupted):
            train(tiny_config(folder / "stopped", *SHORT, cache))
    with pytest.raises(ValueError, match="no prompt file"):
        train(tiny_config(folder / "failed", *SHORT, cache, "data.prompts=[typo.jsonl]"))
    if (child := os.fork()) == 0:
        with run_folder(folder / "killed", "training"):
            os.kill(os.getpid(), signal.SIGKILL)
    os.waitpid(child, 0)
    return folder


def test_the_list_says_how_each_run_stands(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with run_folder(root / "busy", "training"):
        assert main(["runs", "list", str(root)]) == 0
    (root / "busy" / "status.json").unlink()
    text = capsys.readouterr().out
    lines = {name: next(row for row in text.splitlines() if f" {name} " in row) for name in NAMES}
    best = max(m["acceptance_length"] for m in metrics(root / "good") if "acceptance_length" in m)
    assert "finished" in lines["good"]
    assert "8 / 8" in lines["good"]
    assert f"{best:.3f}" in lines["good"]
    assert "stopped" in lines["stopped"]
    assert "7 / 8" in lines["stopped"]
    assert "failed" in lines["failed"]
    assert "killed" in lines["killed"]
    assert "training" in lines["busy"]
    assert main(["runs", "list", str(root / "good" / "head")]) == 1
    assert "headstart train` makes one" in capsys.readouterr().err


NAMES = ("good", "stopped", "failed", "killed", "busy")


def test_a_start_that_is_refused_does_not_change_how_a_run_stands(root: Path) -> None:
    cache = f"data.cache_dir={root.parent / 'cache'}"
    for resume, changed, why in ((False, [], "holds a run"), (True, ["seed=5"], "seed=0")):
        with pytest.raises(ValueError, match=why):
            train(tiny_config(root / "good", *SHORT, cache, *changed), resume=resume)
        assert read_status(root / "good")["state"] == "finished"


def test_one_run_is_shown_with_a_picture_and_a_way_to_go_on(
    root: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (root / "stopped" / "progress.png").unlink(missing_ok=True)
    assert main(["runs", "show", str(root / "stopped")]) == 0
    text = " ".join(capsys.readouterr().out.split())
    assert "7 of 8" in text
    assert "step-000004, step-000007" in text
    assert "--resume" in text
    command = shlex.split(_facts(read_run(root / "stopped"))["to go on"])
    assert f"output_dir={root / 'stopped'}" in command, "wherever the folder is now"
    picture = Image.open(root / "stopped" / "progress.png")
    assert len(set(picture.convert("RGB").getdata())) > 50, "something is drawn"
    why = read_status(root / "failed")["why"]
    assert "no prompt file" in why
    assert main(["runs", "show", str(root / "failed")]) == 0
    assert main(["runs", "show", str(root / "missing")]) == 1
    assert "holds no run" in capsys.readouterr().err


def test_a_row_that_is_just_being_written_is_no_harm(root: Path) -> None:
    before = read_run(root / "good")
    with (root / "good" / "metrics.jsonl").open("a") as file:
        file.write('{"step": 9, "lo')
    assert read_run(root / "good").metrics == before.metrics
    lines = (root / "good" / "metrics.jsonl").read_text().splitlines()[:-1]
    (root / "good" / "metrics.jsonl").write_text("\n".join(lines) + "\n")


def logged(run: Path, *wanted: str) -> bytes:
    """What wandb keeps to send, once all of `wanted` is there: a process of its own writes it."""
    for _ in range(300):
        files = sorted(run.glob("wandb/offline-run-*/*.wandb"))
        sent = b"".join(path.read_bytes() for path in files)
        if all(one.encode() in sent for one in wanted):
            return sent
        time.sleep(0.2)
    raise AssertionError(f"not logged: {[one for one in wanted if one.encode() not in sent]}")


def test_wandb_gets_the_metrics_and_nothing_else(tmp_path: Path) -> None:
    """Offline, so that what would go out lies in a file. A resumed run has the same id."""
    cache = f"data.cache_dir={tmp_path / 'cache'}"
    offline = [*SHORT, cache, "wandb.mode=offline"]
    train(tiny_config(tmp_path / "run", *offline))
    run_id = (tmp_path / "run" / "wandb-id.txt").read_text()
    sent = logged(tmp_path / "run", "batch_acceptance_length", run_id)
    secret = ["weight_decay", str(tmp_path), "text_train", "hidden_size", "tiny-gemma4"]
    assert not [word for word in secret if word.encode() in sent]
    files = [p for p in (tmp_path / "run" / "wandb").rglob("files/*") if p.is_file()]
    assert not files, "no requirements, no metadata, no console output"

    for checkpoint in (tmp_path / "run" / "checkpoints").glob("step-000008/*"):
        checkpoint.unlink()
    (tmp_path / "run" / "checkpoints" / "step-000008").rmdir()
    train(tiny_config(tmp_path / "run", *offline), resume=True)
    assert (tmp_path / "run" / "wandb-id.txt").read_text() == run_id
    assert len(list((tmp_path / "run" / "wandb").glob(f"offline-run-*-{run_id}"))) >= 1

    train(tiny_config(tmp_path / "asked", *offline, "wandb.upload=[config]"))
    logged(tmp_path / "asked", "weight_decay")


def test_wandb_gets_the_figures_and_pictures_of_an_evaluation(tmp_path: Path) -> None:
    config, content = tiny_config(tmp_path / "run", *SHORT, "wandb.mode=offline"), usual()
    config.output_dir.mkdir()
    log_report(config, content)
    speedups = [
        f"eval/{decoder_name(r)} K={r['num_assistant_tokens']}/speedup" for r in content["results"]
    ]
    logged(config.output_dir, content["verdict"], *speedups)
    pictures = list((config.output_dir / "wandb").rglob("media/images/eval/*.png"))
    assert len(pictures) == len(figures(content)) > 3
    log_report(tiny_config(tmp_path / "none", *SHORT), content)
    assert not (tmp_path / "none").exists()


def test_summary_and_status_agree_with_the_metrics(root: Path) -> None:
    summary = json.loads((root / "good" / "summary.json").read_text())
    view = read_run(root / "good")
    assert view.best is not None
    assert summary["best"]["step"] == view.best["step"]
    assert view.status["doing"] == "training"
    assert view.status["started"] <= view.status["ended"]


def test_the_best_of_a_run_is_the_head_that_is_kept(root: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(root / "good", run)
    content = json.loads((run / "summary.json").read_text())
    kept = {"step": 0, "acceptance_length": 3.5}  # a finished head that no step was better than
    (run / "summary.json").write_text(json.dumps(content | {"best": kept}))
    assert read_run(run).best == kept
    (run / "summary.json").write_text("{}")
    with pytest.raises(ValueError, match=r"summary\.json is damaged"):
        read_run(run)


def test_the_bar_and_a_validation_say_the_figures_of_their_row() -> None:
    row = {"loss": 1.25, "batch_acceptance_length": 1.5, "rows": 64}
    assert loop.status_text(row, 0.0, None) == "loss 1.250 accept 1.50 0 anchors/s"
    assert loop.status_text(row, 1.75, 2.5) == "loss 1.250 accept 1.50 held out 1.75 160 anchors/s"
    tops = RecallCounts.tops()
    recall = {kind: {top: i / 8 for i, top in enumerate(tops)} for kind in ("argmax", "mass")}
    found = {"acceptance_length": 1.5, "dense_acceptance_length": 1.625, "recall": recall}
    shares = " / ".join(f"{i / 8:.3f}" for i in range(len(tops)))
    assert summary_text({"acceptance_length": 1.5}) == "acceptance length 1.500"
    assert summary_text(found) == (
        f"acceptance length 1.500 (dense 1.625); in the top {' / '.join(tops)} clusters: the "
        f"teacher's best token {shares}, its mass {shares}"
    )

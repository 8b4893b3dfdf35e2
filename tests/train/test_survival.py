"""Runs that are killed, interrupted, damaged, poisoned or out of disk: what is left, and what is
said."""

import errno
import json
import multiprocessing
import os
import random
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from headstart.common.children import HOST
from headstart.common.signals import Interrupted, stop_signals
from headstart.configs.schema import Config
from headstart.configs.settings import ServerConfig
from headstart.data.loader import AnchorLoader
from headstart.data.prepare import run_regenerate
from headstart.train import run as run_module
from headstart.train import step as step_module
from headstart.train.checkpoints import checkpoints
from headstart.train.run import train
from headstart.train.run_folder import RunRefused, read_status
from headstart.train.step import Diverged
from tests.helpers.runs import fill, metrics, tiny_config

KILLS = 20
SHORT = ["train.max_steps=24", "train.eval_steps=6", "train.save_steps=4"]
SHORT += ["train.ema_decay=0.9"]


def config_of(folder: Path, *overrides: str) -> Config:
    cache = f"data.cache_dir={folder.parent / 'cache'}"
    return tiny_config(folder, *SHORT, cache, *overrides)


def child(folder: Path, ready: Path) -> None:
    """What is killed; it begins to train when it has told so."""
    torch.set_num_threads(1)
    sys.stdout = sys.stderr = open(os.devnull, "w")  # noqa: SIM115
    begin = run_module.open_target

    def tell(*args: Any) -> Any:
        target = begin(*args)
        ready.touch()
        return target

    run_module.open_target = tell  # type: ignore[assignment]
    train(config_of(folder), resume=True)


def content(run: Path) -> dict[str, bytes]:
    """What a run comes to: its last checkpoint, its head, its metrics and its summary."""
    last = checkpoints(run / "checkpoints")[-1]
    files = [*last.glob("*.safetensors"), *(run / "head").iterdir(), run / "metrics.jsonl"]
    found = {str(path.relative_to(run)): path.read_bytes() for path in files}
    summary = json.loads((run / "summary.json").read_text())
    state = json.loads((last / "state.json").read_text())
    kept = {"best": summary["best"], "step": state["step"], "score": state["best"]}
    return {**found, "rest": json.dumps(kept).encode()}


@pytest.mark.slow
def test_kills_at_random_moments_change_nothing_of_what_a_run_comes_to(tmp_path: Path) -> None:
    """SIGKILL twenty times, at moments drawn over the length of a run, and at drawn steps, which a
    busy machine does not crowd together; each time the next process goes on. Weights, their
    average, moments, metrics and the best head end bit-identical."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__])
    ready = tmp_path / "ready"

    def start(folder: Path) -> tuple[Any, float]:
        ready.unlink(missing_ok=True)
        process = context.Process(target=child, args=(folder, ready))
        process.start()
        while process.is_alive() and not ready.exists():
            time.sleep(0.002)
        return process, time.monotonic()

    process, _ = start(tmp_path / "whole")  # it makes the activations too
    process.join()
    shutil.rmtree(tmp_path / "whole")
    process, begun = start(tmp_path / "whole")
    process.join()
    assert process.exitcode == 0
    length = time.monotonic() - begun
    expected = content(tmp_path / "whole")
    assert read_status(tmp_path / "whole")["state"] == "finished"

    def steps_done(folder: Path) -> int:
        path = folder / "metrics.jsonl"
        return path.read_bytes().count(b"\n") if path.exists() else 0

    rng = random.Random(0)
    kills, number, cut_at = 0, 0, set()
    while kills < KILLS:
        folder = tmp_path / f"cut-{number}"
        process, _ = start(folder)
        if kills % 4 == 3:
            process.join(timeout=rng.uniform(0, 0.8 * length))
        else:
            step = steps_done(folder) + rng.randint(1, 6)
            while process.is_alive() and steps_done(folder) < step:
                time.sleep(0.002)
            process.join(timeout=rng.uniform(0, length / 24))
        process.kill()
        process.join()
        if process.exitcode == -signal.SIGKILL:
            kills += 1
            assert read_status(folder)["state"] == "killed"
            cut_at.add(steps_done(folder))
        else:  # it came through between two kills: begin another
            assert content(folder) == expected
            number += 1
    process, _ = start(folder)
    process.join()
    assert process.exitcode == 0
    assert content(folder) == expected
    assert len(cut_at) > 5, "the kills fell at different steps"


@pytest.mark.parametrize("kind", [signal.SIGTERM, signal.SIGINT])
def test_a_request_to_stop_saves_the_step_in_hand(
    kind: signal.Signals, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rate = step_module.learning_rate

    def stop_in_step_6(now: int, *args: Any) -> float:
        if now == 5:
            os.kill(os.getpid(), kind)
        return rate(now, *args)

    monkeypatch.setattr(step_module, "learning_rate", stop_in_step_6)
    with pytest.raises(Interrupted, match="stopped after step 6, saved; go on with --resume"):
        train(config_of(tmp_path / "run"))
    assert checkpoints(tmp_path / "run" / "checkpoints")[-1].name == "step-000006"
    status = read_status(tmp_path / "run")
    assert status["state"] == "stopped"
    assert "stopped after step 6" in status["why"]


@pytest.fixture(scope="module")
def cut(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of 8 steps with checkpoints of steps 6 and 8, to be gone on with."""
    folder = tmp_path_factory.mktemp("cut") / "run"
    with pytest.MonkeyPatch.context() as patch:
        rate = step_module.learning_rate

        def stop_in_step_8(now: int, *args: Any) -> float:
            if now == 7:
                os.kill(os.getpid(), signal.SIGTERM)
            return rate(now, *args)

        patch.setattr(step_module, "learning_rate", stop_in_step_8)
        with pytest.raises(Interrupted):
            train(config_of(folder))
    return folder


@pytest.fixture
def damaged(cut: Path, tmp_path: Path) -> Path:
    """A copy of it, to be damaged."""
    shutil.copytree(cut.parent, tmp_path / "copy")
    return tmp_path / "copy" / "run"


FILES = ["head.safetensors", "optimizer.safetensors", "average.safetensors"]
FILES += ["config.yaml", "state.json"]


def test_a_thread_that_gets_no_signals_trains_too() -> None:
    received: list[list[float]] = []

    def enter() -> None:
        with stop_signals() as stop:
            received.append(stop)

    thread = threading.Thread(target=enter)
    thread.start()
    thread.join()
    assert received == [[]]


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("how", ["flipped", "missing", "cut short"])
def test_a_damaged_checkpoint_is_refused_by_name_and_the_one_before_it_offered(
    name: str, how: str, damaged: Path
) -> None:
    last, before = (damaged / "checkpoints" / f"step-00000{n}" for n in (8, 6))
    whole = (last / name).read_bytes()
    places = [len(whole) * n // 7 for n in range(7)] if how == "flipped" else [len(whole) // 2]
    for place in places:
        if how == "flipped":
            broken = whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :]
            (last / name).write_bytes(broken)
        elif how == "missing":
            (last / name).unlink(missing_ok=True)
        else:
            (last / name).write_bytes(whole[:place])
        with pytest.raises(ValueError, match=f"{last / name} is") as refusal:
            train(config_of(damaged), resume=True)
        assert f"delete the folder {last}, and --resume goes on from {before}" in str(refusal.value)
    shutil.rmtree(last)  # as it says
    train(config_of(damaged), resume=True)
    assert len(metrics(damaged)) == 24


def test_a_run_without_a_whole_checkpoint_is_refused(damaged: Path) -> None:
    for checkpoint in checkpoints(damaged / "checkpoints"):
        (checkpoint / "head.safetensors").unlink()
    with pytest.raises(ValueError, match="no earlier checkpoint is whole: name another folder"):
        train(config_of(damaged), resume=True)


def test_a_checkpoint_of_another_configuration_is_refused_by_name(damaged: Path) -> None:
    last = damaged / "checkpoints" / "step-000008"
    for change, words in (
        ("train.learning_rate=0.1", "train.learning_rate=0.003, now 0.1"),
        ("train.batch_size=2", "train.batch_size x .* x processes=4, now 2"),
    ):
        with pytest.raises(ValueError, match=f"{last} was written with {words}: give it back"):
            train(config_of(damaged, change), resume=True)
    allowed = ["train.batch_size=2", "train.gradient_accumulation_steps=2"]
    allowed += ["train.activation_checkpointing=true", "train.save_total_limit=1"]
    train(config_of(damaged, *allowed), resume=True)
    assert len(metrics(damaged)) == 24
    assert len(checkpoints(damaged / "checkpoints")) == 1


def test_a_run_does_not_go_on_over_other_texts(tmp_path: Path) -> None:
    """What was trained on would be held out, and the best head judged by what it never was."""
    prompts = tmp_path / "prompts.jsonl"

    def write(first: int) -> None:
        rows = [json.dumps({"prompt": f"number {i}"}) for i in range(first, first + 40)]
        prompts.write_text("\n".join(rows))

    def settings() -> Config:
        return config_of(tmp_path / "run", f"data.prompts={prompts}", "train.save_total_limit=9")

    write(0)
    train(settings())
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "step-000024")
    write(1)
    before = read_status(tmp_path / "run")
    with pytest.raises(RunRefused, match="with other prompts, which have changed since"):
        train(settings(), resume=True)
    assert read_status(tmp_path / "run") == before
    write(0)
    train(settings(), resume=True)
    assert len(metrics(tmp_path / "run")) == 24


def test_a_store_of_other_documents_is_not_gone_on_with(tmp_path: Path) -> None:
    stores = []
    for name in ("a", "b"):
        rows = [json.dumps({"prompt": f"{name} {i}"}) for i in range(40)]
        (tmp_path / f"{name}.jsonl").write_text("\n".join(rows))
        stores.append(tmp_path / name)
        own = (f"data.prompts={tmp_path / name}.jsonl", f"output_dir={stores[-1]}")
        config = config_of(tmp_path / "x", *own)
        run_regenerate(config, ServerConfig(), extracting=True, device="cpu")
    settings = [f"data.store={tmp_path / 'store'}", "train.save_total_limit=9"]
    shutil.copytree(stores[0], tmp_path / "store")
    train(config_of(tmp_path / "run", *settings))
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "step-000024")
    shutil.rmtree(tmp_path / "store")
    shutil.copytree(stores[1], tmp_path / "store")
    with pytest.raises(ValueError, match="with other texts, which have changed since"):
        train(config_of(tmp_path / "run", *settings), resume=True)


def test_what_is_not_trained_of_a_new_head_is_what_it_was(tmp_path: Path) -> None:
    """The projection of a narrow head, and its first layers."""
    settings = ["head.hidden_size=24", "head.trainable_modules=[mlp]", "train.save_total_limit=9"]
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    train(config_of(whole, *settings))
    shutil.copytree(whole, cut)
    shutil.rmtree(cut / "checkpoints" / "step-000024")
    train(config_of(cut, *settings), resume=True)
    saved = [load_file(run / "checkpoints/step-000024/head.safetensors") for run in (whole, cut)]
    assert saved[0].keys() == saved[1].keys()
    assert all(torch.equal(saved[0][name], saved[1][name]) for name in saved[0])
    assert saved[0]["projection"].abs().max() > 0


def test_checkpoints_are_in_the_order_of_their_steps(tmp_path: Path) -> None:
    for step in (999_900, 1_000_000, 150):
        (tmp_path / f"step-{step:06d}").mkdir()
    assert [path.name for path in checkpoints(tmp_path)] == [
        "step-000150", "step-999900", "step-1000000",
    ]  # fmt: skip


def test_a_half_written_checkpoint_is_never_picked_up(damaged: Path) -> None:
    folder = damaged / "checkpoints"
    half = folder / f"step-000009.{HOST}.4194399.0123abcd.part"
    shutil.copytree(folder / "step-000008", half)
    (half / "state.json").unlink()
    assert [path.name for path in checkpoints(folder)] == ["step-000006", "step-000008"]
    train(config_of(damaged), resume=True)
    assert not half.exists()


def test_a_nan_in_one_batch_stops_the_run_and_names_its_documents(
    damaged: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = json.loads((damaged / "checkpoints/step-000008/state.json").read_text())
    batches: dict[int, list[str]] = {}
    draw = AnchorLoader.batch

    def noted(self: Any, number: int) -> Any:
        batch = draw(self, number)
        batches[number] = [name for row in batch.document_ids for name in row]
        if number == 10:
            batch.texts.hidden.values[1] = torch.nan
        return batch

    monkeypatch.setattr(AnchorLoader, "batch", noted)
    with pytest.raises(Diverged) as stop:
        train(config_of(damaged), resume=True)
    words = str(stop.value)
    assert "step 11 was not kept" in words
    assert f"over the documents {', '.join(batches[10])}" in words
    assert f"activations of {batches[10][1]} are not finite" in words
    assert f"the last good checkpoint is {damaged / 'checkpoints' / 'step-000008'}" in words
    assert read_status(damaged)["state"] == "failed"
    assert "step 11 was not kept" in read_status(damaged)["why"]
    after = json.loads((damaged / "checkpoints/step-000008/state.json").read_text())
    assert before == after
    monkeypatch.undo()
    monkeypatch.setenv("HEADSTART_CACHE", str(damaged.parent / "cache"))
    train(config_of(damaged), resume=True)
    assert len(metrics(damaged)) == 24


def test_a_loss_that_explodes_stops_the_run_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = step_module.batch_sums

    def exploding(*args: Any) -> dict[str, torch.Tensor]:
        sums = real(*args)
        return {**sums, "loss_sum": sums["loss_sum"] * torch.inf}

    monkeypatch.setattr(step_module, "batch_sums", exploding)
    with pytest.raises(Diverged, match=r"loss_sum is (inf|nan).*there is no checkpoint yet; lower"):
        train(config_of(tmp_path / "run"))


def test_a_disk_that_fills_up_during_a_checkpoint_leaves_the_earlier_one_usable(
    damaged: Path,
    small_disk: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A real file system without room, then one with room again."""
    expected = damaged.parent / "expected"
    shutil.copytree(damaged, expected)
    train(config_of(expected), resume=True)
    subprocess.run(["mount", "-o", "remount,size=16m", str(small_disk)], check=True)
    run = small_disk / "run"
    shutil.copytree(damaged, run)
    fill(small_disk, leave=200 * 1024)
    cache = f"data.cache_dir={damaged.parent / 'cache'}"
    with pytest.raises(OSError, match=r"could not be written .* kept: make room, then run the"):
        train(config_of(run, cache), resume=True)
    assert not list(run.rglob("*.part"))
    assert checkpoints(run / "checkpoints")[-1].name == "step-000008"
    (small_disk / "filler").unlink()
    train(config_of(run, cache), resume=True)
    assert content(run) == content(expected)


def test_an_error_of_the_disk_at_any_file_of_a_checkpoint_keeps_the_earlier_one(
    damaged: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, calls = os.fsync, [0]

    def full(failing: int) -> Callable[[int], None]:
        def fsync(descriptor: int) -> None:
            calls[0] += 1
            if calls[0] == failing:
                raise OSError(errno.ENOSPC, "No space left on device")
            real(descriptor)

        return fsync

    for failing in range(1, 6):
        calls[0] = 0
        monkeypatch.setattr(os, "fsync", full(failing))
        with pytest.raises(OSError, match="make room"):
            train(config_of(damaged), resume=True)
    monkeypatch.setattr(os, "fsync", real)
    train(config_of(damaged), resume=True)
    assert len(metrics(damaged)) == 24


def test_a_second_process_in_the_same_folder_is_refused(damaged: Path) -> None:
    from headstart.common.files import lock_folder

    with lock_folder(damaged), pytest.raises(ValueError, match="another process works in"):
        train(config_of(damaged), resume=True)

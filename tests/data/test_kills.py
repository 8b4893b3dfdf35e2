"""SIGKILL at random moments, and disks that fill up: a resumed call ends with the same content."""

import errno
import multiprocessing
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from headstart.configs.schema import DataConfig
from headstart.data import extraction
from headstart.data.conversations import finished_parts, read_part
from headstart.data.extraction import extract
from headstart.data.regenerate import regenerate
from headstart.data.store import ActivationStore
from headstart.heads.loading import load_target
from headstart.heads.target import Target
from tests.helpers.prompts import conversations, jobs
from tests.helpers.runs import fill

KILLS = 20
CONFIG = DataConfig(max_new_tokens=6, generation_batch_size=2, teacher_top_k=4)


def run_regenerate(target: Target, folder: Path) -> None:
    asked = jobs(target, [0.0, 1.0] * 12, CONFIG)
    regenerate(target, asked, CONFIG, 7, folder, extract=True)


def run_extract(target: Target, folder: Path) -> None:
    extraction.SHARD = 2  # in a process of its own
    rows = conversations(40)
    extract(target, rows, sum(len(row.ids) for row in rows), CONFIG, folder)


def child(work: Callable[[Target, Path], None], folder: Path, ready: Path) -> None:
    """What is killed: begins when the target is there, so that kills fall into the work."""
    torch.set_num_threads(1)
    sys.stdout = sys.stderr = open(os.devnull, "w")  # noqa: SIM115
    target = load_target("tiny-gemma4", "float32")
    ready.touch()
    work(target, folder)


def content(folder: Path) -> dict[str, bytes]:
    """Every file: what a killed process left behind is to be cleared away too."""
    names = {path.name for path in folder.iterdir()} - {".lock"}
    return {name: (folder / name).read_bytes() for name in sorted(names)}


@pytest.mark.slow
@pytest.mark.parametrize("work", [run_regenerate, run_extract])
def test_kills_at_random_moments_lose_only_the_batch_in_flight(
    work: Callable[[Target, Path], None], tmp_path: Path
) -> None:
    """Each resumed process is killed again, at a moment drawn over the length of a whole run."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__])
    ready = tmp_path / "ready"

    def start(folder: Path) -> tuple[multiprocessing.process.BaseProcess, float]:
        ready.unlink(missing_ok=True)
        process = context.Process(target=child, args=(work, folder, ready))
        process.start()
        while process.is_alive() and not ready.exists():
            time.sleep(0.002)
        return process, time.monotonic()

    process, begun = start(tmp_path / "whole")
    process.join()
    assert process.exitcode == 0
    length = time.monotonic() - begun
    expected = content(tmp_path / "whole")

    rng = random.Random(0)
    kills, round_number = 0, 0
    finished: set[str] = set()
    while kills < KILLS:
        folder = tmp_path / f"cut-{round_number}"
        process, _ = start(folder)
        process.join(timeout=rng.uniform(0, 0.7 * length))
        process.kill()  # SIGKILL; nothing where it has just come through
        process.join()
        kills += process.exitcode == -signal.SIGKILL
        now = {path.name for path in folder.glob("[ps]*-*")}
        assert finished <= now, "nothing that was finished is lost"
        finished = now
        if process.exitcode == 0:  # it came through between kills: begin another
            assert content(folder) == expected
            round_number, finished = round_number + 1, set()
    process, _ = start(folder)
    process.join()
    assert process.exitcode == 0
    assert content(folder) == expected


@pytest.mark.parametrize("work", [run_regenerate, run_extract])
def test_a_disk_that_fills_up_stops_the_run_and_loses_nothing(
    work: Callable[[Target, Path], None],
    small_disk: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Something else takes the room that the check found; then the room is given back."""
    monkeypatch.setattr(extraction, "SHARD", 2)
    target = load_target("tiny-gemma4", "float32")
    work(target, tmp_path / "whole")
    out = small_disk / "out"
    out.mkdir()
    fill(small_disk, 150 * 1024)
    with pytest.raises(ValueError, match="its disk has 0 MiB free: make room"):
        work(target, out)
    monkeypatch.setattr("headstart.data.extraction.check_space", lambda *args: None)
    monkeypatch.setattr("headstart.data.regenerate.check_space", lambda *args: None)
    with pytest.raises(OSError, match=r"could not be written .*: make room, then run the same"):
        work(target, out)
    assert (
        1
        <= len(list(out.glob("shard-*.safetensors")))
        < len(list((tmp_path / "whole").glob("shard-*.safetensors")))
    )
    (small_disk / "filler").unlink()
    subprocess.run(["mount", "-o", "remount,size=8m", str(small_disk)], check=True)
    work(target, out)
    assert content(out) == content(tmp_path / "whole")


@pytest.mark.parametrize("work", [run_regenerate, run_extract])
def test_an_error_of_the_disk_in_any_file_is_told_with_its_cure(
    work: Callable[[Target, Path], None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At each file that is written, the manifest, shards, parts and the index: no room."""
    monkeypatch.setattr(extraction, "SHARD", 20)
    target, real, calls = load_target("tiny-gemma4", "float32"), os.fsync, [0]
    work(target, tmp_path / "whole")

    def full(failing: int) -> Callable[[int], None]:
        def fsync(descriptor: int) -> None:
            calls[0] += 1
            if calls[0] == failing:
                raise OSError(errno.ENOSPC, "No space left on device")
            real(descriptor)

        return fsync

    stops = 0
    for failing in range(1, 100):
        calls[0] = 0
        monkeypatch.setattr(os, "fsync", full(failing))
        try:
            work(target, tmp_path / "cut")
        except OSError as error:
            assert "make room, then run the same command again" in str(error)  # noqa: PT017
            stops += 1
        else:
            break
    assert stops >= 3
    monkeypatch.setattr(os, "fsync", real)
    work(target, tmp_path / "cut")
    assert content(tmp_path / "cut") == content(tmp_path / "whole")


def test_two_processes_in_one_folder_do_the_work_once(tmp_path: Path) -> None:
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__])
    folders = [tmp_path / name for name in ("both", "both", "both", "one")]
    processes = [
        context.Process(target=child, args=(run_regenerate, folder, tmp_path / f"ready-{i}"))
        for i, folder in enumerate(folders)
    ]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
        assert process.exitcode == 0
    assert content(tmp_path / "both") == content(tmp_path / "one")


def test_a_finished_run_is_read_back(tmp_path: Path) -> None:
    target = load_target("tiny-gemma4", "float32")
    run_regenerate(target, tmp_path)
    rows = [c for part in finished_parts(tmp_path) for c in read_part(part)]
    assert len({c.id for c in rows}) == len(rows) == 24
    assert len(ActivationStore(tmp_path, target)) == 24

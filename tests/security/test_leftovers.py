"""Nothing outlives a command that is ended from outside: no engine, no copy of a target."""

import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from headstart.common.children import temporary_folder

# A command that serves, with an engine that starts a process of its own and heeds no SIGTERM.
SERVING = """
import argparse, signal, sys
from pathlib import Path
signal.signal(signal.SIGHUP, signal.SIG_DFL)  # under nohup it is ignored by all that are started
from headstart.cli import main as cli
from headstart.cli.arguments import Command
from headstart.serve import engine_server
from headstart.common.children import temporary_folder
engine_server.engine_python = lambda engine: Path(sys.executable)
out = Path(sys.argv[1])
ENGINE = '''
import os, signal, subprocess, sys, time
signal.signal(signal.SIGTERM, signal.SIG_IGN)
p = subprocess.Popen(["sleep", "600"])
open(sys.argv[1] + "/pids.tmp", "w").write(f"{os.getpid()} {p.pid}")
os.rename(sys.argv[1] + "/pids.tmp", sys.argv[1] + "/pids")
time.sleep(600)
'''
def serve(args):
    with temporary_folder() as copy:
        (copy / "target").write_text("a copy")
        server = engine_server.EngineServer(
            "vllm", out, None, 4, 64, [1], out / "log", "float32", 1
        )
        server.command = [sys.executable, "-c", ENGINE, str(out)]
        with server:
            pass
command = Command("serve", "", "", "", serve)
cli._parse = lambda argv: argparse.Namespace(of=command, config=None, settings=[], debug=False)
sys.exit(cli.main([]))
"""


def comes(true: Callable[[], bool], seconds: float) -> bool:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if true():
            return True
        time.sleep(0.1)
    return true()


def runs(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return False
    return state != "Z"


@pytest.fixture
def serving(tmp_path: Path) -> subprocess.Popen[bytes]:
    (tmp_path / "tmp").mkdir()
    environment = os.environ | {"TMPDIR": str(tmp_path / "tmp")}
    process = subprocess.Popen(
        [sys.executable, "-c", SERVING, str(tmp_path)], env=environment, stderr=subprocess.PIPE
    )
    assert comes(lambda: (tmp_path / "pids").is_file() or process.poll() is not None, 100)
    assert process.poll() is None, process.communicate()[1]
    return process


def engines(folder: Path) -> list[int]:
    return [int(pid) for pid in (folder / "pids").read_text().split()]


@pytest.mark.slow
@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGHUP, 129)])
def test_a_signal_ends_the_engine_and_removes_the_copy(
    number: int, code: int, serving: subprocess.Popen[bytes], tmp_path: Path
) -> None:
    assert len(list((tmp_path / "tmp").iterdir())) == 1
    serving.send_signal(number)
    _, said = serving.communicate(timeout=60)
    assert serving.returncode == code
    assert signal.Signals(number).name.encode() in said
    assert not any(map(runs, engines(tmp_path)))
    assert list((tmp_path / "tmp").iterdir()) == []


@pytest.mark.slow
def test_an_impatient_launcher_does_not_break_off_the_tidying(
    serving: subprocess.Popen[bytes], tmp_path: Path
) -> None:
    for _ in range(3):
        serving.send_signal(signal.SIGTERM)
        time.sleep(0.3)
    assert serving.wait(timeout=60) == 143
    assert not any(map(runs, engines(tmp_path)))
    assert list((tmp_path / "tmp").iterdir()) == []


@pytest.mark.slow
def test_a_kill_ends_the_engine_too_and_the_next_run_removes_the_copy(
    serving: subprocess.Popen[bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    serving.kill()
    serving.communicate()
    assert comes(lambda: not any(map(runs, engines(tmp_path))), 30)
    (left,) = (tmp_path / "tmp").iterdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "tmp"))
    with temporary_folder():
        assert not left.exists()


def test_a_copy_of_a_living_process_or_of_somebody_else_stays(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    (tmp_path / "report.copy").mkdir()
    with temporary_folder() as first, temporary_folder() as second:
        assert first != second
        assert first.stat().st_mode & 0o777 == 0o700
        assert first.is_dir()
        assert (tmp_path / "report.copy").is_dir()


def test_a_command_under_nohup_goes_on_when_the_terminal_hangs_up() -> None:
    script = (
        "import os, signal; from headstart.common.signals import tidy_ends\n"
        "signal.signal(signal.SIGHUP, signal.SIG_IGN)\n"
        "with tidy_ends(): os.kill(os.getpid(), signal.SIGHUP)"
    )
    assert subprocess.run([sys.executable, "-c", script]).returncode == 0

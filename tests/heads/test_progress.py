"""Progress in a log: a line at the start of each task, at intervals, and at its end."""

import subprocess
import sys
import time

import pytest

from headstart.common.console import LOG_SECONDS, LogProgress, counted, phase, progress_bar


def test_a_log_says_what_is_done_how_fast_and_what_is_left(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(LOG_SECONDS, "0.2")
    with progress_bar() as bar:
        assert isinstance(bar, LogProgress)
        task = bar.add_task("Training", total=2000, completed=500, status="")
        for step in range(501, 601):
            bar.update(task, completed=step, status=f"loss {step / 100:.2f} accept 1.50")
            time.sleep(0.02)
        bar.update(task, completed=2000, status="loss 1.00 accept 2.00")
        time.sleep(0.5)
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "Training: started, 500 of 2,000"
    assert len(lines) > 4
    for line in lines[2:-1]:
        assert " so far, " in line
        assert " of 2,000, " in line
        assert " per second, " in line
        assert " left, loss " in line
        assert line.endswith("accept 1.50")
    assert lines[-1].startswith("Training: ended after 0:0")
    assert lines[-1].endswith("2,000 of 2,000, loss 1.00 accept 2.00")


def test_work_done_before_is_no_speed_and_a_total_may_grow(
    capsys: pytest.CaptureFixture[str],
) -> None:
    with progress_bar() as bar:
        bar.add_task("Decoding", total=3, completed=3, status="")
        task = bar.add_task("Counting", total=None, status="")
        bar.update(task, completed=5)
        bar.update(task, total=5)
        bar.update(task, total=7)
        bar.update(task, completed=7)
    lines = capsys.readouterr().out.splitlines()
    assert lines == [
        "Decoding: started, 3 of 3", "Decoding: ended after 0:00:00, 3 of 3", "Counting: started",
        "Counting: ended after 0:00:00, 5 of 5", "Counting: ended after 0:00:00, 7 of 7",
    ]  # fmt: skip


def test_items_are_counted_beside_those_done_before_and_a_failure_ends_their_line(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert list(counted("ab", "Reading", done=1)) == ["a", "b"]
    lines = capsys.readouterr().out.splitlines()
    assert lines == ["Reading: started, 1 of 3", "Reading: ended after 0:00:00, 3 of 3"]

    def fail() -> None:
        for letter in counted("ab", "Reading"):
            raise KeyError(letter)

    with pytest.raises(KeyError):
        fail()
    assert "stopped after" in capsys.readouterr().out


def test_colors_that_are_forced_make_no_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("FORCE_COLOR", "TTY_COMPATIBLE"):
        monkeypatch.setenv(name, "1")
    assert isinstance(progress_bar(), LogProgress)


def test_one_long_piece_of_work_shows_that_it_goes_on(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Lines come by the clock, not by the updates: a batch may take minutes."""
    monkeypatch.setenv(LOG_SECONDS, "0.05")
    with phase("Loading x"):
        time.sleep(1)
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "Loading x: started"
    assert lines[1] == "Loading x: 0:00:00 so far"
    assert len(lines) > 4
    assert lines[-1].startswith("Loading x: ended after 0:00:0")


def test_work_that_fails_ends_its_line_and_no_thread_stays(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(LOG_SECONDS, "0.05")

    def fail() -> None:
        with progress_bar() as bar:
            bar.update(bar.add_task("Decoding", total=3, status=""), advance=1)
            raise KeyError("x")

    with pytest.raises(KeyError):
        fail()
    time.sleep(0.2)
    lines = capsys.readouterr().out.splitlines()
    assert lines == ["Decoding: started, 0 of 3", "Decoding: stopped after 0:00:00, 1 of 3"]


@pytest.mark.parametrize("seconds", ["0", "-1", "soon", "nan", "inf"])
def test_an_interval_that_is_none_is_refused(seconds: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(LOG_SECONDS, seconds)
    with pytest.raises(ValueError, match=f"{LOG_SECONDS}='{seconds}' is no number of seconds"):
        progress_bar()


def test_a_log_is_filled_while_the_work_goes_on() -> None:
    """Through a pipe, where Python would hold lines back."""
    code = (
        "import time; from headstart.common.console import phase\n"
        "with phase('Loading x'): time.sleep(60)"
    )
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "Loading x: started\n"
    assert process.poll() is None
    process.kill()
    process.communicate()

"""What a terminal or a log is told: bars, plain lines, the text of strangers made harmless."""

import io
import os
import re
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from datetime import timedelta
from typing import Any, TextIO, TypeVar

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    Task,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Column
from rich.text import Text

T = TypeVar("T")
LOG_SECONDS = "HEADSTART_LOG_SECONDS"  # in the environment: between two lines in a log
SPEED_PERIOD = 300.0  # seconds that a rate is taken over: a batch may take a minute


_hidden: list[bool] = []  # of the calls of `hidden_progress` that are under way


@contextmanager
def hidden_progress() -> Iterator[None]:
    """Within, no bar and no line of progress is shown."""
    _hidden.append(True)
    try:
        yield
    finally:
        _hidden.pop()


def progress_bar() -> Progress:
    """A bar with a count, the elapsed and the remaining time, and a free `status` field.

    Only the main process shows it. Where the output is no terminal (nohup, Slurm, CI) it is lines:
    one at the start of each task, one every 30 s (`HEADSTART_LOG_SECONDS`), one at its end.

    Raises:
        ValueError: the environment names an interval that is not above 0.
    """
    if _hidden:
        return Progress(disable=True)
    # Not rich's own word: it takes FORCE_COLOR, which CI systems set, for a terminal.
    if _is_main_process() and not sys.stdout.isatty():
        return LogProgress(_log_seconds())
    return Progress(
        _Words("{task.description}", markup=False),
        BarColumn(bar_width=8),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("eta"),
        TimeRemainingColumn(),
        _RunLeft(),
        # It takes what the others leave: in a narrow terminal its end is cut, and none of theirs.
        _Words(
            "{task.fields[status]}",
            markup=False,
            table_column=Column(ratio=1, no_wrap=True, overflow="ellipsis"),
        ),
        expand=True,
        speed_estimate_period=SPEED_PERIOD,
        disable=not _is_main_process(),
    )


def _log_seconds() -> float:
    text = os.environ.get(LOG_SECONDS, "30")
    with suppress(ValueError):
        if 0 < (seconds := float(text)) < threading.TIMEOUT_MAX:
            return seconds
    raise ValueError(f"{LOG_SECONDS}={text!r} is no number of seconds above 0")


class _Words(TextColumn):
    """Words in which nothing acts: a category or a path may be among them."""

    def render(self, task: Task) -> Text:
        return Text(one_line(super().render(task).plain))


_run_left: list[Callable[[str, float | None], str]] = []
"""Of the calls of `within_run` that are under way."""


@contextmanager
def within_run(left: Callable[[str, float | None], str]) -> Iterator[None]:
    """Within, progress says what is left of a whole run too.

    Args:
        left: the description of a task and the seconds that it has left, None where that is not
            known -> what the run has left, in words.
    """
    _run_left.append(left)
    try:
        yield
    finally:
        _run_left.remove(left)


def _left_of_run(task: Task) -> str:
    """Empty where nobody knows."""
    return _run_left[-1](task.description, task.time_remaining) if _run_left else ""


class _RunLeft(ProgressColumn):
    def render(self, task: Task) -> Text:
        return Text("" if task.finished else _left_of_run(task))


class LogProgress(Progress):
    """The same tasks as lines of text on stdout.

    Args:
        seconds: between two lines of a task that goes on.
    """

    def __init__(self, seconds: float):
        super().__init__(speed_estimate_period=SPEED_PERIOD, disable=True)
        self.seconds = seconds
        self.running: set[TaskID] = set()
        """Tasks that have begun and not ended."""
        self.stopped = threading.Event()

    def start(self) -> None:
        # A thread, so that one batch of minutes shows that it is still under way.
        self.stopped.clear()
        threading.Thread(target=self._tick, daemon=True).start()

    def stop(self) -> None:
        self.stopped.set()
        with self._lock:
            for task_id in sorted(self.running):
                self._close(task_id, "stopped")

    def add_task(self, *args: Any, **kwargs: Any) -> TaskID:
        task_id = super().add_task(*args, **kwargs)
        with self._lock:
            self.running.add(task_id)
            self._print(task_id, "started")
        self.update(task_id)  # it may be done already
        return task_id

    def update(self, task_id: TaskID, **kwargs: Any) -> None:
        super().update(task_id, **kwargs)
        with self._lock:
            finished = self._tasks[task_id].finished
            if finished and task_id in self.running:
                self._close(task_id)
            elif not finished:  # again, where its total has grown
                self.running.add(task_id)

    def advance(self, task_id: TaskID, advance: float = 1) -> None:
        self.update(task_id, advance=advance)

    def _tick(self) -> None:
        while not self.stopped.wait(self.seconds):
            with self._lock:
                for task_id in sorted(self.running):
                    self._print(task_id)

    def _close(self, task_id: TaskID, how: str = "ended") -> None:
        self.running.discard(task_id)
        self._print(task_id, f"{how} after {duration(self._tasks[task_id].elapsed)}")

    def _print(self, task_id: TaskID, what: str = "") -> None:
        """What is done of what, how fast, the time left, and the task's status; `what` happens to
        it, or nothing: it goes on."""
        task = self._tasks[task_id]
        parts = [what or f"{duration(task.elapsed)} so far"]
        if task.total is not None and task.total != 1:
            parts.append(f"{task.completed:,.0f} of {task.total:,.0f}")
        elif task.completed > 1:
            parts.append(f"{task.completed:,.0f}")
        if not what and (speed := task.speed):
            parts.append(f"{speed:,.0f} per second" if speed >= 100 else f"{speed:.3g} per second")
            if (left := task.time_remaining) is not None:
                parts.append(f"{duration(left)} left")
        if not what:
            parts.append(_left_of_run(task))
        parts.append(str(task.fields.get("status", "")))
        line = one_line(f"{task.description}: {', '.join(filter(None, parts))}")
        print(line, flush=True)


def duration(seconds: float | None) -> str:
    """Hours, minutes and seconds, as `0:02:10`."""
    return str(timedelta(seconds=round(seconds or 0)))


def counted(items: Sequence[T], description: str, done: int = 0) -> Iterator[T]:
    """The items, under a bar of how many are done of them and of those that were `done` before."""
    with progress_bar() as bar:
        task = bar.add_task(description, total=done + len(items), completed=done, status="")
        for item in items:
            yield item
            bar.update(task, advance=1)


@contextmanager
def phase(description: str) -> Iterator[None]:
    """Show that something of unknown length is under way, such as weights that are loaded."""
    with progress_bar() as bar:
        task = bar.add_task(description, total=None, status="")
        yield
        bar.update(task, total=1, completed=1)


_kept: list[list[str]] = []  # of the calls of `kept_lines` that are under way


def _is_main_process() -> bool:
    from accelerate import PartialState  # loads torch, for which `--help` should not wait

    if not PartialState._shared_state:  # they have not joined: to ask it would settle how they do
        return os.environ.get("RANK", "0") == "0"
    return bool(PartialState().is_main_process)


def print_once(line: str) -> None:
    """Print a line, once for all processes of a run, without the control characters of names or
    texts in it."""
    line = one_line(line)
    if _kept:
        _kept[-1].append(line)
    elif _is_main_process():
        print(line, flush=True)


@contextmanager
def kept_lines() -> Iterator[list[str]]:
    """Within, what `print_once` would print goes into a list instead, for a table or a report."""
    lines: list[str] = []
    _kept.append(lines)
    try:
        yield lines
    finally:
        _kept.remove(lines)


class _PlainConsole(Console):
    def render_str(self, text: str, **kwargs: Any) -> Text:
        # Every title, cell and line that is no `Text` yet comes by here.
        return super().render_str(visible(text), **kwargs)


def plain_console(width: int | None = None) -> Console:
    """For tables: no path, category or text in them is taken for markup, or moves the cursor.

    Args:
        width: in characters; None: that of the terminal.
    """
    return _PlainConsole(width=width, markup=False, emoji=False)


def wide_console() -> Console:
    """For wide tables: outside a terminal rich assumes 80 columns and would fold every cell."""
    return plain_console(None if sys.stdout.isatty() else 165)


# What could move the cursor, color, rename or fill a terminal is shown, not sent; nor is what turns
# the order of characters around, so that a name reads as another.
_CONTROLS = {c: chr(0x2400 + c) for c in range(32) if chr(c) not in "\n\t"} | {127: "\u2421"}
_CONTROLS |= dict.fromkeys([*range(128, 160), 0x2028, 0x2029], "\ufffd")
_BIDI = [0x061C, 0x200E, 0x200F, *range(0x202A, 0x202F), *range(0x2066, 0x206A)]
_CONTROLS |= dict.fromkeys(_BIDI, "\ufffd")
# An underscore within a word does nothing.
_MARKS = re.compile(r"([\\`*\[\]<>|~&$]|(?<![^\W_])_|_(?![^\W_]))")
_BLOCK = re.compile(r"^(?:([#+-])(?=[#\s-]|$)|(\d+)([.)])(?=\s|$))")


def visible(text: str) -> str:
    """The text with signs in the place of control characters other than line breaks and tabs."""
    return text.translate(_CONTROLS)


def one_line(text: str) -> str:
    """The text in one line, without control characters."""
    return visible(text.replace("\r\n", "\n")).replace("\n", "\u21b5")


def in_markdown(text: str) -> str:
    """Markdown of one line that shows the text as it is, in a paragraph, a heading or a table."""
    escaped = _MARKS.sub(r"\\\1", one_line(text).replace("\t", " ").strip())
    return _BLOCK.sub(lambda m: f"\\{m[1]}" if m[1] else f"{m[2]}\\{m[3]}", escaped)


def code_in_markdown(text: str) -> str:
    """The text as code within a line of Markdown, whatever backticks it holds."""
    line = one_line(text)
    longest = max(map(len, re.findall("`+", line)), default=0)
    fence = "`" * (longest + 1)
    return f"{fence} {line} {fence}" if longest else f"{fence}{line}{fence}"


def markdown_row(cells: list[str]) -> str:
    """A row of a table, each cell as `in_markdown` has it."""
    return f"| {' | '.join(map(in_markdown, cells))} |"


class _Lasting(io.FileIO):
    """An open file whose reader may go away: a pipe that is closed, a terminal that is hung up, a
    full disk under a log. What cannot be written is dropped."""

    def write(self, data: Any) -> int:
        try:
            return super().write(data)
        except OSError:
            return len(memoryview(data).cast("B"))


def keep_output() -> None:
    """Let standard output and errors of this process take every line: characters that their
    encoding does not have are written as `\\u2026`, and a reader that is gone is no failure."""
    sys.stdout = _lasting(sys.stdout, sys.__stdout__)
    sys.stderr = _lasting(sys.stderr, sys.__stderr__)


def _lasting(stream: TextIO | None, original: TextIO | None) -> TextIO:
    if stream is None:  # closed by whoever started this process
        return open(os.devnull, "w", encoding="utf-8")
    if not isinstance(stream, io.TextIOWrapper):
        return stream
    stream.reconfigure(errors="backslashreplace")
    if stream is not original:  # somebody else's, such as a test's
        return stream
    stream.flush()
    return io.TextIOWrapper(
        io.BufferedWriter(_Lasting(stream.fileno(), "w", closefd=False)),
        encoding=stream.encoding,
        errors=stream.errors,
        line_buffering=stream.line_buffering,
    )

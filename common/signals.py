"""Signals: a command that is ended from outside tidies up first, a run ends after its step, and a
call has a time limit.
"""

import faulthandler
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from types import FrameType

ENDING = (signal.SIGTERM, signal.SIGHUP)


class Ended(KeyboardInterrupt):
    """The process was asked to end by the signal `number`."""

    def __init__(self, number: int):
        name = signal.Signals(number).name
        super().__init__(f"ended by {name}; finished work is kept (train: go on with --resume)")
        self.number = number


@contextmanager
def _handled(
    numbers: Iterable[int], handler: Callable[[int, FrameType | None], None]
) -> Iterator[None]:
    """Within, these signals have another handler."""
    earlier = {number: signal.signal(number, handler) for number in numbers}
    try:
        yield
    finally:
        for number, before in earlier.items():
            signal.signal(number, before)


@contextmanager
def tidy_ends() -> Iterator[None]:
    """Within, SIGTERM and SIGHUP raise `Ended`, the first of them alone; what was ignored before
    (`nohup`) stays so."""
    if threading.current_thread() is not threading.main_thread():
        yield  # signals are not its affair
        return
    ours = [number for number in ENDING if signal.getsignal(number) is signal.SIG_DFL]

    def end(number: int, frame: FrameType | None) -> None:
        for each in ours:
            signal.signal(each, lambda *_: None)  # not SIG_IGN, which children would inherit
        raise Ended(number)

    with _handled(ours, end):
        yield


class TooSlow(RuntimeError):
    """Somebody's template or pattern did not come to its end in time."""


GRACE = 10.0  # seconds after which what heeds no signal is ended


@contextmanager
def time_limit(seconds: float, what: str) -> Iterator[None]:
    """Within, work that takes longer is broken off by `TooSlow`, a regular expression in its midst
    too; the message says `what` takes too long, and the fix.

    Some steps of Python heed no signal, as comparing lists of lists of lists: `GRACE` later they
    end the process, with a traceback. Signals reach the main thread alone: in another one there is
    no limit.

    Args:
        seconds: of wall time.
        what: takes too long, and the fix, for the message.

    Raises:
        TooSlow: it does.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def stop(number: int, frame: FrameType | None) -> None:
        raise TooSlow(f"{what}: it was stopped after {seconds:g} seconds")

    before = signal.signal(signal.SIGALRM, stop)
    outer = signal.setitimer(signal.ITIMER_REAL, seconds)
    if sys.__stderr__ is not None:
        faulthandler.dump_traceback_later(seconds + GRACE, exit=True, file=sys.__stderr__)
    try:
        yield
    finally:
        faulthandler.cancel_dump_traceback_later()
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
        signal.setitimer(signal.ITIMER_REAL, *outer)


IMPATIENCE = 2.0  # seconds


class Interrupted(KeyboardInterrupt):
    """The run was asked to stop; everything is saved. The message says how to go on."""


@contextmanager
def stop_signals() -> Iterator[list[float]]:
    """A list that fills when the process is asked to stop.

    A second signal that comes later than `IMPATIENCE` stops at once, nothing saved. One that
    comes sooner is the same request: launchers pass on what the terminal sent to all. Signals reach
    the main thread alone: in another one the list stays empty.
    """
    received: list[float] = []
    if threading.current_thread() is not threading.main_thread():
        yield received
        return

    def note(number: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        if received and now - received[0] > IMPATIENCE:
            raise KeyboardInterrupt
        received.append(now)

    with _handled((signal.SIGINT, signal.SIGTERM), note):
        yield received

"""A limit on the time of what strangers wrote and this program runs: templates and patterns."""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType


class TooSlow(RuntimeError):
    """Somebody's template or pattern did not come to its end in time."""


@contextmanager
def time_limit(seconds: float, what: str) -> Iterator[None]:
    """Within, work that takes longer is broken off, a regular expression in its midst too.

    Signals reach the main thread alone: in another one there is no limit.

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
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
        signal.setitimer(signal.ITIMER_REAL, *outer)

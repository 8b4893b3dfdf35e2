"""SIGINT and SIGTERM end a run after the step in hand."""

import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

IMPATIENCE = 2.0  # seconds


class Interrupted(KeyboardInterrupt):
    """The run was asked to stop; everything is saved. The message says how to go on."""


@contextmanager
def stop_signals() -> Iterator[list[float]]:
    """A list that fills when the process is asked to stop.

    A second signal that comes later than `IMPATIENCE` stops at once, nothing saved. One that
    comes sooner is the same request: launchers pass on what the terminal sent to all.
    """
    received: list[float] = []

    def note(number: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        if received and now - received[0] > IMPATIENCE:
            raise KeyboardInterrupt
        received.append(now)

    earlier: dict[int, Any] = {}
    each: int
    for each in (signal.SIGINT, signal.SIGTERM):
        earlier[each] = signal.signal(each, note)
    try:
        yield received
    finally:
        for each, handler in earlier.items():
            signal.signal(each, handler)

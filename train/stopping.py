"""What ends a run early: SIGINT and SIGTERM, after the step in hand, and numbers that are none."""

import math
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

from accelerate.utils import gather_object

from headstart.data.loader import Batch, broken_documents
from headstart.train.checkpoints import checkpoints

IMPATIENCE = 2.0  # seconds
NAMED = 16  # documents named in an error


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


class Diverged(RuntimeError):
    """A loss or a gradient is not finite; the message names the documents and a way on."""


def diverged(
    step: int, norm: float, reduced: dict[str, float], batches: list[Batch], run: Path
) -> Diverged:
    """What to raise in place of taking `step`; all processes must call it.

    Args:
        step: that was not taken.
        norm: of the gradient.
        reduced: the step's sums.
        batches: of this process.
        run: the run folder.
    """
    names = gather_object([name for b in batches for row in b.document_ids for name in row])
    broken = gather_object([name for batch in batches for name in broken_documents(batch)])
    odd = {"gradient norm": norm, **reduced}
    what = ", ".join(f"{k} is {v}" for k, v in odd.items() if not math.isfinite(v))
    cure = "lower train.learning_rate, or look at these documents"
    if broken:
        cure = f"activations of {_listed(broken)} are not finite: make their store again"
    saved = checkpoints(run / "checkpoints")
    last = f"the last good checkpoint is {saved[-1]}" if saved else "there is no checkpoint yet"
    return Diverged(
        f"step {step} was not taken, {what}, over the documents {_listed(names)}; {last}; {cure}"
    )


def _listed(names: list[str]) -> str:
    more = f" and {len(names) - NAMED} more" if len(names) > NAMED else ""
    return ", ".join(names[:NAMED]) + more

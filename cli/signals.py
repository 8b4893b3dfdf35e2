"""What ends a command from outside lets it tidy up first: its engines end, its copies go."""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

ENDING = (signal.SIGTERM, signal.SIGHUP)


class Ended(KeyboardInterrupt):
    """The process was asked to end by the signal `number`."""

    def __init__(self, number: int):
        name = signal.Signals(number).name
        super().__init__(f"ended by {name}; finished work is kept (train: go on with --resume)")
        self.number = number


@contextmanager
def tidy_ends() -> Iterator[None]:
    """Within, SIGTERM and SIGHUP raise `Ended`, the first of them alone; what was ignored before
    (`nohup`) stays so."""
    if threading.current_thread() is not threading.main_thread():
        yield  # signals are not its affair
        return
    earlier: dict[signal.Signals, Any] = {each: signal.getsignal(each) for each in ENDING}
    ours = [each for each in ENDING if earlier[each] is signal.SIG_DFL]

    def end(number: int, frame: FrameType | None) -> None:
        for each in ours:
            signal.signal(each, lambda *_: None)  # not SIG_IGN, which children would inherit
        raise Ended(number)

    for each in ours:
        signal.signal(each, end)
    try:
        yield
    finally:
        for each in ours:
            signal.signal(each, signal.SIG_DFL)

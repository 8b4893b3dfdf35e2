"""Files written in a thread, while the next ones are computed."""

import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor


class BackgroundWriter:
    """Writes what a batch gave while the next one is computed: in a thread, in order, one batch at
    a time. Use it as a context manager: when it ends, all that was put is on disk, also where the
    caller fails or is interrupted.

    Raises:
        Exception: (in `put`, or at the end) the one that writing raised; nothing that was put later
            is written.
    """

    def __init__(self) -> None:
        self.waited = 0.0
        """Seconds for which the caller waited."""
        self._thread = ThreadPoolExecutor(1, "headstart-writer")
        self._under_way: Future[None] | None = None

    def put(self, write: Callable[[], None]) -> None:
        """Have `write` called; waits for the call before."""
        self._wait()
        self._under_way = self._thread.submit(write)

    def _wait(self) -> None:
        began, under_way = time.monotonic(), self._under_way
        self._under_way = None
        if under_way is not None:
            under_way.result()
            self.waited += time.monotonic() - began

    def __enter__(self) -> "BackgroundWriter":
        return self

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        self._thread.shutdown()
        if error is None:
            self._wait()

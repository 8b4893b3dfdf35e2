"""Signs of life of the processes of a launch: one that dies silently ends the others, which would
otherwise wait for it as long as the longest of their work may take.

On one node the launcher sees to that. On another node nobody does, and NCCL waits.
"""

import os
import platform
import sys
import threading
import time
from datetime import timedelta

from torch.distributed import DistError, TCPStore

BEAT = 5.0  # seconds between two signs of life
SILENCE = 40.0  # seconds without one, after which a process is taken for dead


class Heartbeat(threading.Thread):
    """Tells the other processes of the launch that this one is alive, and ends it, with a line that
    names the other and its host, when one of them falls silent that has not left.

    Clocks of hosts differ: each process counts its signs of life, and the others time by their own
    clock how long the count stands still.

    Args:
        process: number of this one.
        processes: how many there are.
    """

    def __init__(self, process: int, processes: int):
        super().__init__(name="heartbeat", daemon=True)
        self.process = process
        # A connection of its own: what the main thread waits for in its own would stop the beat.
        self.store = TCPStore(
            os.environ["MASTER_ADDR"],
            int(os.environ["MASTER_PORT"]),
            is_master=False,
            timeout=timedelta(seconds=SILENCE),
            wait_for_workers=False,
        )
        self.store.set(f"headstart/host/{process}", platform.node())
        self.reached = time.monotonic()
        """When the store answered last."""
        self.heard = {other: (0, self.reached) for other in range(processes) if other != process}
        """Of each other process, its count and when it last rose."""
        self.left = threading.Event()

    def run(self) -> None:
        while not self.left.is_set():
            if (line := self.silent()) is not None and not self.left.is_set():
                print(f"headstart: {line}", file=sys.stderr, flush=True)
                os._exit(1)  # the main thread may wait in a call that nothing else ends
            self.left.wait(BEAT)

    def silent(self) -> str | None:
        """Give a sign of life and look for those of the others: what to say of one that has been
        silent for too long, or None."""
        try:
            self.store.add(f"headstart/beat/{self.process}", 1)
            for other, (count, heard) in self.heard.items():
                now = self.store.add(f"headstart/beat/{other}", 0)
                self.reached = time.monotonic()
                if now != count:
                    self.heard[other] = now, self.reached
                elif self.reached - heard > SILENCE and not self._has_left(other):
                    return f"{self._named(other)} gives no sign of life any more: {ENDS}"
        except DistError:  # the store is of the main process, or of its launcher
            if time.monotonic() - self.reached > SILENCE:
                address = os.environ["MASTER_ADDR"]
                return f"the main process, on {address}, cannot be reached any more: {ENDS}"
        return None

    def _has_left(self, other: int) -> bool:
        return self.store.add(f"headstart/left/{other}", 0) > 0

    def _named(self, other: int) -> str:
        return f"process {other}, on {self.store.get(f'headstart/host/{other}').decode()},"

    def ended(self) -> str | None:
        """What to say of a process that has left; None: none has."""
        try:
            for other in self.heard:
                if self._has_left(other):
                    return f"{self._named(other)} has ended: its own message says why"
        except DistError:
            return None
        return None

    def leave(self) -> None:
        """Part from the others, which take silence for no death then."""
        self.left.set()
        try:
            self.store.add(f"headstart/left/{self.process}", 1)
        except DistError:  # so did the process that has the store
            return


ENDS = "it was killed, or its machine is gone. This process ends too; --resume goes on"


def is_lost_connection(error: BaseException) -> bool:
    """Whether it says that another process went away in the midst of an exchange. Which one, the
    heartbeat tells."""
    return isinstance(error, DistError) or (
        isinstance(error, RuntimeError) and "gloo" in str(error)
    )

"""What threads do while the device computes: make the next batches, write the last results."""

import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType
from typing import TypeAlias, TypeVar, cast

import torch
from accelerate.utils import recursively_apply, send_to_device

from headstart.data.loader import Batch

THREADS = 1
"""One makes a batch of E4B in the time that a step of its head takes on an H100 by calculation
(docs/explanation/performance.md). Three threads wait for one another at Python's lock: with them a
training step of Gemma 3 270M took 6 to 10% longer on two cores."""

T = TypeVar("T")
Made: TypeAlias = tuple[Batch, torch.cuda.Event | None]


def to_device(values: T, device: torch.device) -> T:
    """A nest of tensors of the CPU on a device; to a CUDA GPU by way of pinned memory, so that
    nobody waits for the copy."""
    if device.type != "cuda":
        return cast(T, send_to_device(values, device))
    pinned = recursively_apply(lambda tensor: tensor.pin_memory(), values)
    return cast(T, send_to_device(pinned, device, non_blocking=True))


class Prefetch:
    """Batches in the order of their numbers; a context manager, which ends the threads.

    Args:
        make: batch of a number, on the CPU; a function of the number alone, since several are made
            at once.
        first: number of the first batch.
        device: that the batches are for.
        threads: that make batches; 0: each is made when it is asked for, as it has to be where
            making one runs the target itself.
    """

    def __init__(
        self,
        make: Callable[[int], Batch],
        first: int,
        device: torch.device,
        threads: int = THREADS,
    ):
        self.make, self.number, self.device, self.threads = make, first, device, threads
        self.stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self.ahead: deque[Future[Made]] = deque()

    def __enter__(self) -> "Prefetch":
        if self.threads:
            # One OpenMP thread in each, or they would take the cores from the step.
            self.pool = ThreadPoolExecutor(
                self.threads, "batches", initializer=torch.set_num_threads, initargs=(1,)
            )
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self.threads:
            self.pool.shutdown(wait=True, cancel_futures=True)
            # Threads that are begun later take the number that was set last, by whichever thread.
            torch.set_num_threads(torch.get_num_threads())

    def take(self) -> Batch:
        """The next batch, on the device.

        Raises:
            Exception: whatever went wrong in making it.
        """
        if not self.threads:
            batch, copied = self._made(self.number)
        else:
            while len(self.ahead) <= self.threads:
                self.ahead.append(self.pool.submit(self._made, self.number + len(self.ahead)))
            batch, copied = self.ahead.popleft().result()
        self.number += 1
        if copied is not None:
            current = torch.cuda.current_stream(self.device)
            current.wait_event(copied)
            # Else its memory could be given away while a step still reads it.
            recursively_apply(lambda tensor: tensor.record_stream(current), batch)
        return batch

    def _made(self, number: int) -> Made:
        batch = self.make(number)
        if self.stream is None:
            return to_device(batch, self.device), None
        with torch.cuda.stream(self.stream):
            there = to_device(batch, self.device)
            copied = torch.cuda.Event()
            copied.record(self.stream)
        return there, copied


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

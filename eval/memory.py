"""Peak memory of a call."""

import gc
import os
import threading
from collections.abc import Callable
from pathlib import Path

import torch

STATM = Path("/proc/self/statm")
PAGE = os.sysconf("SC_PAGE_SIZE")
EVERY = 0.002  # seconds between two looks


def peak_memory(device: torch.device, call: Callable[[], object]) -> int | None:
    """Bytes that `call` held at most, beyond what was held before it.

    Of an accelerator what torch allocated there; of a CPU the resident memory of the process, which
    a thread looks at every two milliseconds, and which Linux alone tells: elsewhere None.
    """
    gc.collect()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        call()
        torch.cuda.synchronize(device)
        return int(torch.cuda.max_memory_allocated(device) - before)
    if not STATM.is_file():
        return None
    before, peak, done = _resident(), [0], threading.Event()

    def watch() -> None:
        while not done.wait(EVERY):
            peak[0] = max(peak[0], _resident())

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        call()
    finally:
        done.set()
        watcher.join()
    return max(peak[0] - before, 0)


def _resident() -> int:
    return int(STATM.read_text().split()[1]) * PAGE

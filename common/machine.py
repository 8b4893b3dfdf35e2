"""This machine: the dtype that pays for `auto`, its description for reports, its peak memory."""

import gc
import os
import platform
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers

BFLOAT16_INSTRUCTIONS = ("avx512_bf16", "amx_bf16", "bf16", "sve_bf16")
"""As `torch.cpu.get_capabilities` names them, on x86 and ARM."""


def natural_dtype() -> str:
    """`bfloat16` on a GPU or CPU with instructions for it, else `float32`: elsewhere torch's
    bfloat16 products take many times as long as those in float32."""
    if torch.cuda.is_available():
        # Torch's own default counts GPUs that emulate it (Turing, Volta).
        native = torch.cuda.is_bf16_supported(including_emulation=False)
        return "bfloat16" if native else "float32"
    # An older torch does not say; float32 is never many times slower than the other.
    able = torch.cpu.get_capabilities() if hasattr(torch.cpu, "get_capabilities") else {}
    return "bfloat16" if any(able.get(name) for name in BFLOAT16_INSTRUCTIONS) else "float32"


def environment(device: torch.device) -> dict[str, Any]:
    """Versions, processor, threads and accelerator, for a report."""
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "platform": f"{platform.system()} {platform.machine()}",
        "processor": _processor(),
        "cpu_count": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "accelerator": torch.cuda.get_device_name(device) if device.type == "cuda" else None,
    }


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    if info.is_file():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


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


def synchronize(device: torch.device) -> None:
    """Wait for what an accelerator has under way, so that a clock says what it took."""
    if device.type != "cpu":
        torch.accelerator.synchronize(device)

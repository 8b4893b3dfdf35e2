"""This machine: the dtype that pays for `auto`, its description for reports, its peak memory."""

import gc
import os
import platform
import random
import re
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
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
    return "bfloat16" if _has_bfloat16() else "float32"


def _has_bfloat16() -> bool:
    # An older torch does not say; float32 is never many times slower than the other.
    able = torch.cpu.get_capabilities() if hasattr(torch.cpu, "get_capabilities") else {}
    return any(able.get(name) for name in BFLOAT16_INSTRUCTIONS)


def environment(device: torch.device) -> dict[str, Any]:
    """Versions, processor, its vector instructions (processors of one name may differ there),
    threads, accelerator and whether its attention may be cuDNN's, for a report."""
    vectors = torch.backends.cpu.get_cpu_capability()
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "platform": f"{platform.system()} {platform.machine()}",
        "processor": _processor(),
        "instructions": f"{vectors}, bfloat16" if _has_bfloat16() else vectors,
        "cpu_count": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "accelerator": torch.cuda.get_device_name(device) if device.type == "cuda" else None,
        "cudnn_attention": torch.backends.cuda.cudnn_sdp_enabled()
        if device.type == "cuda"
        else None,
    }


def machine_name(where: Mapping[str, Any]) -> str:
    """What a report ran on, in words; `where` is its `environment`."""
    if where["accelerator"]:
        return str(where["accelerator"])
    threads = where["threads"]
    name = f"{threads} thread{'' if threads == 1 else 's'} of {where['processor']}"
    # Reports of before do not say.
    return f"{name} ({where['instructions']})" if where.get("instructions") else name


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    named = re.search(r"^model name\s*: (.*)", info.read_text(), re.M) if info.is_file() else None
    return named[1].strip() if named else platform.processor() or platform.machine()


def release_memory(device: torch.device) -> None:
    """Give back what nothing refers to any more, cycles of references included."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def peak_memory(device: torch.device, call: Callable[[], object]) -> int | None:
    """Bytes that `call` held at most, beyond what was held before it.

    Of an accelerator what torch allocated there; of a CPU the resident memory of the process, which
    Linux alone tells: elsewhere None, and nothing is called.
    """
    gc.collect()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        call()
        torch.cuda.synchronize(device)
        return int(torch.cuda.max_memory_allocated(device) - before)
    try:
        Path("/proc/self/clear_refs").write_text("5")  # the kernel's peak begins anew
    except OSError:
        return None
    before = _peak_resident()
    call()
    return _peak_resident() - before


def free_memory(device: torch.device) -> int | None:
    """Bytes that this process can still take on a device: of a GPU what nobody holds; of the CPU
    what the kernel and the limits of its control groups (containers, Slurm) leave. None: this
    platform does not tell."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    info = Path("/proc/meminfo")
    if device.type != "cpu" or not info.is_file():
        return None
    found = re.search(r"^MemAvailable:\s+(\d+) kB", info.read_text(), re.M)
    return None if found is None else min([int(found[1]) * 1024, *_left_in_groups()])


GROUP_FILES = {
    "": ("", "memory.max", "memory.current", "inactive_file"),
    "memory": ("memory", "memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
}
"""Controller, as /proc/self/cgroup names it in version 2 and 1 -> where it is mounted, and what
tells its limit, its use, and how much of that are cached files, which the kernel can drop."""


def _left_in_groups(
    told: Path = Path("/proc/self/cgroup"), mount: Path = Path("/sys/fs/cgroup")
) -> list[int]:
    """Bytes that are left in each control group that has a limit and this process in it."""
    left = []
    for line in told.read_text().splitlines() if told.is_file() else ():
        _, controller, path = line.split(":", 2)
        if controller not in GROUP_FILES:
            continue
        folder, limit, used, cached = GROUP_FILES[controller]
        top = mount / folder
        group = top / path.lstrip("/")
        # A limit of a group above holds too. Within a container its own group is the mount.
        for place in {top, group, *(p for p in group.parents if top in p.parents)}:
            allowed = (place / limit).read_text().strip() if (place / limit).is_file() else "max"
            if not allowed.isdigit():
                continue
            dropped = re.search(rf"^{cached} (\d+)", (place / "memory.stat").read_text(), re.M)
            held = int((place / used).read_text()) - (int(dropped[1]) if dropped else 0)
            left.append(max(int(allowed) - held, 0))
    return left


def is_out_of_memory(error: BaseException) -> bool:
    """Whether it says that there was no memory left, of a GPU or of the CPU."""
    # Of the CPU torch raises a RuntimeError like any other.
    on_cpu = isinstance(error, RuntimeError) and "DefaultCPUAllocator" in str(error)
    return on_cpu or isinstance(error, (torch.OutOfMemoryError, MemoryError))


def _peak_resident() -> int:
    found = re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert found is not None
    return int(found[1]) * 1024


@contextmanager
def random_numbers_kept(device: torch.device) -> Iterator[None]:
    """Whatever is drawn or seeded within, the generators of Python, numpy and torch, of the CPU and
    of `device`, go on afterwards as if nothing had been."""
    of_python, of_numpy = random.getstate(), np.random.get_state()
    accelerators = [device] if device.type == "cuda" else []
    try:
        with torch.random.fork_rng(accelerators):
            yield
    finally:
        random.setstate(of_python)
        np.random.set_state(of_numpy)


@contextmanager
def deterministic_algorithms(wanted: bool) -> Iterator[Callable[[], None]]:
    """Within, cuBLAS can give the same bits each time, which it settles when it is first used; what
    this yields lets all of torch do so from then on, or raise where it has no algorithm for that.
    Afterwards all is as before.

    Args:
        wanted: False: nothing happens, and the call does nothing.
    """
    if not wanted:
        yield lambda: None
        return
    before, workspace = torch.are_deterministic_algorithms_enabled(), os.environ.get(CUBLAS)
    warned = torch.is_deterministic_algorithms_warn_only_enabled()
    os.environ.setdefault(CUBLAS, ":4096:8")  # one of the two values that make it so
    try:
        yield lambda: torch.use_deterministic_algorithms(True)
    finally:
        torch.use_deterministic_algorithms(before, warn_only=warned)
        if workspace is None:
            del os.environ[CUBLAS]


CUBLAS = "CUBLAS_WORKSPACE_CONFIG"


def busy_seconds(device: torch.device, call: Callable[[], object]) -> float | None:
    """Seconds that the kernels of a call work on a GPU, as CUDA notes their beginnings and ends;
    None: no GPU, or the driver lets nobody look.

    The span between two events on a stream would not do: it has the gaps in it in which the GPU
    waits for the host.
    """
    if device.type != "cuda":
        return None
    kinds = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=kinds) as profile:
        call()
        torch.cuda.synchronize(device)
    kernels = [e for e in profile.events() if e.device_type == torch.autograd.DeviceType.CUDA]
    return sum(e.time_range.elapsed_us() for e in kernels) / 1e6 if kernels else None


def synchronize(device: torch.device) -> None:
    """Wait for what an accelerator has under way, so that a clock says what it took."""
    if device.type != "cpu":
        torch.accelerator.synchronize(device)


def timed(device: torch.device, call: Callable[[], object]) -> float:
    """Seconds that a call takes, with what it has the device do."""
    synchronize(device)
    began = time.perf_counter()
    call()
    synchronize(device)
    return time.perf_counter() - began


class Readback:
    """Values on their way from a device to the host, while a CUDA GPU goes on computing."""

    def __init__(self, values: torch.Tensor):
        overlaps = values.device.type == "cuda"
        self._copied = torch.cuda.Event() if overlaps else None
        self._values = values.to("cpu", non_blocking=overlaps)
        if self._copied is not None:
            self._copied.record()

    def tolist(self) -> list[float]:
        """The values, once they are there."""
        if self._copied is not None:
            self._copied.synchronize()
        return list(self._values.tolist())

"""A GPU that is not there: tensors over CPU memory that call themselves cuda:0.

Within `pretended_gpu` the program takes its usual way onto a GPU. What no GPU would do, or do only
by waiting, is found: a tensor of the CPU that meets one of the GPU, an index or a generator of the
wrong device, `.numpy()`. Operations and waits are counted; the first of them stand for kernels, and
a wait is what makes the host stand still until the device is done: a copy either way, `.item()`,
and whatever has a shape that only the device knows. Numbers come from the CPU's kernels, so that
they have to be those of a run on the CPU.

What it cannot find: memory, time, kernels that a GPU lacks, the rounding of a GPU's own.
"""

import os
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import cache
from importlib import import_module
from types import FrameType
from typing import Any
from unittest.mock import patch

import torch
from accelerate import PartialState
from accelerate.state import AcceleratorState, GradientState
from torch.overrides import TorchFunctionMode
from torch.utils import _foreach_utils
from torch.utils._pytree import tree_map
from transformers import modeling_utils

from headstart.common.processes import join_processes

CUDA = torch.device("cuda", 0)
WAITS = {
    "aten::_local_scalar_dense": 1, "aten::nonzero": 1, "aten::masked_select": 1,
    "aten::_unique2": 1, "aten::unique_dim": 1, "aten::unique_consecutive": 1,
    "aten::bincount": 1, "aten::equal": 1, "aten::repeat_interleave": 1,
    "aten::multinomial": 2,  # are all finite, does any count
}  # fmt: skip
"""Operations that wait for the device, as CUDA's own kernels do, and how often."""
INDEXING = (
    "aten::index", "aten::_unsafe_index", "aten::index_put", "aten::index_put_",
    "aten::_index_put_impl_",
)  # fmt: skip
FREE = (
    "aten::_unsafe_view", "aten::_reshape_alias", "aten::_local_scalar_dense", "aten::empty",
    "aten::new_empty", "aten::_fused_sdp_choice", "aten::lift_fresh",
)  # fmt: skip
"""Operations beside views that start no kernel; names that begin so."""
IN_ONE_PIECE = ("rms_norm",)
"""Functions of torch that a GPU has one kernel for, where a CPU's are made of others. What their
gradients take there is not known here: those count by the CPU's operations."""
TYPES = "_foreach_supported_types"
LIBRARIES = ("transformers.", "accelerate.")
COPIES = ("aten::copy_", "aten::_to_copy")


class DeviceFault(RuntimeError):
    """What a GPU would refuse, or do in silence at the cost of a copy."""


@dataclass
class Tally:
    """What was done on the device in a stretch of the program."""

    operations: int = 0
    """ATen operations that are no views."""
    waits: Counter[str] = field(default_factory=Counter)
    """Place in the program and what made it wait -> how often."""

    def since(self, before: "Tally") -> "Tally":
        return Tally(self.operations - before.operations, self.waits - before.waits)

    def copy(self) -> "Tally":
        return Tally(self.operations, self.waits.copy())


class PretendedGpu:
    """Counts of a pretended GPU, in all and by unit of work."""

    def __init__(self) -> None:
        self.all = Tally()
        self.faults: list[str] = []
        self.units: dict[str, list[Tally]] = {}
        self._begun: dict[str, Tally] = {}

    def add(self, unit: str, before: Tally) -> None:
        """Count all since then as one unit of work."""
        self.units.setdefault(unit, []).append(self.all.since(before))

    def counted(self, unit: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """The function, each call of which counts as one unit."""

        def call(*args: Any, **kwargs: Any) -> Any:
            before = self.all.copy()
            result = function(*args, **kwargs)
            self.add(unit, before)
            return result

        return call

    def marked(self, unit: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """The function, from one call of which to the next one counts as one unit."""

        def call(*args: Any, **kwargs: Any) -> Any:
            if (before := self._begun.get(unit)) is not None:
                self.add(unit, before)
            self._begun[unit] = self.all.copy()
            return function(*args, **kwargs)

        return call

    def from_here(self) -> None:
        """Forget where units began: what comes is of another text."""
        self._begun.clear()

    def wait(self, what: str, times: int = 1) -> None:
        self.all.waits[f"{place()} {what}"] += times

    def fault(self, what: str) -> None:
        self.faults.append(f"{place()}: {what}")
        raise DeviceFault(self.faults[-1])


def place() -> str:
    """The line of the program that is being run, and that of a library which it called."""
    library = ""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        module = frame.f_globals.get("__name__", "")
        line = f"{module.partition('.')[2].replace('.', '/')}.py:{frame.f_lineno}"
        if module.startswith("headstart."):
            return line + library
        if module.startswith(LIBRARIES) and not library:
            library = f" ({module.partition('.')[0]}/{line})"
        frame = frame.f_back
    return "outside the program" + library


def in_library() -> bool:
    """Whether it is a library that does what is done now, not the program."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        module = frame.f_globals.get("__name__", "")
        if not (module == __name__ or module.startswith("torch")):
            return bool(module.startswith(LIBRARIES))
        frame = frame.f_back
    return False


_here: PretendedGpu | None = None  # there is one at a time, as there is one cuda:0


class OnGpu(torch.Tensor):
    """A tensor of the pretended GPU: the memory is the CPU's, in Python its device is cuda:0."""

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]
    device = property(lambda self: CUDA)
    is_cuda = property(lambda self: True)
    is_cpu = property(lambda self: False)

    def get_device(self) -> int:
        return 0

    def record_stream(self, stream: Any) -> None:
        """For an allocator, which is not there."""

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if torch.is_inference_mode_enabled() and _is_composed(func):
            return func.decompose(*args, **kwargs)  # by autograd elsewhere
        if _here is not None:
            _watch(_here, func, args, kwargs)
        with torch._C._DisableTorchDispatch():
            if func is torch.ops.aten.histc.default:  # the CPU's kernel takes no integers
                return on_gpu(func(args[0].float(), *args[1:], **kwargs).to(args[0].dtype))
            result = func(*args, **kwargs)
            return on_gpu(result) if isinstance(result, torch.Tensor) else tree_map(on_gpu, result)


class _Pinned(torch.Tensor):
    """A tensor in memory of the CPU that a GPU copies from by itself."""


class _Stream:
    """Order of work that is not there: all is done when it is asked for."""

    def __init__(self, *args: Any, **kwargs: Any):
        pass

    def record(self, *args: Any) -> None:
        """As an event."""

    def synchronize(self) -> None:
        """Of an event that was recorded long before: no wait."""

    def wait_event(self, event: Any) -> None:
        """As a stream."""


@cache
def _is_composed(func: Any) -> bool:
    """Whether an operation is made of others."""
    key = torch._C.DispatchKey.CompositeImplicitAutograd
    return bool(torch._C._dispatch_has_kernel_for_dispatch_key(func.name(), key))


@cache
def _starts_kernel(func: Any) -> bool:
    return not (func.is_view or func._schema.name.startswith(FREE))


def on_gpu(value: Any) -> Any:
    """A tensor as one of the pretended GPU; other values as they are."""
    if isinstance(value, torch.Tensor) and not isinstance(value, OnGpu):
        return torch.Tensor._make_subclass(OnGpu, value, value.requires_grad)
    return value


def on_cpu(tensor: torch.Tensor) -> torch.Tensor:
    """A copy as a tensor of the CPU."""
    with torch._C._DisableTorchDispatch():
        return tensor.detach().clone()


def _watch(gpu: PretendedGpu, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Count an operation with tensors of the device, and raise for what it may not do."""
    name = func._schema.name
    gpu.all.operations += _starts_kernel(func)
    leaves = list(_leaves((*args, *kwargs.values())))
    strangers = [
        tuple(x.shape)
        for x in leaves
        if isinstance(x, torch.Tensor) and not isinstance(x, OnGpu) and x.ndim > 0
    ]
    if strangers and name in COPIES:
        gpu.wait("copy")
    elif strangers and name in INDEXING and isinstance(args[0], OnGpu):
        if in_library():  # not ours to mend: CUDA copies the index, which is a wait
            gpu.wait("index of the CPU")
            return
        gpu.fault(f"an index of the CPU on a tensor of the GPU: {name}, shapes {strangers}")
    elif strangers:
        gpu.fault(f"a tensor of the CPU meets one of the GPU: {name}, shapes {strangers}")
    for leaf in leaves:
        if isinstance(leaf, torch.Generator):
            gpu.fault(f"a generator of the CPU for a tensor of the GPU: {name}")
    if name in WAITS:
        gpu.wait(name.removeprefix("aten::"), WAITS[name])
    if name in INDEXING and any(_is_mask(x) for x in args[1]):
        scalar = len(args) > 2 and args[2].numel() == 1  # is filled in without counting
        if not scalar:
            gpu.wait("boolean index")


def _leaves(values: Iterable[Any]) -> Iterator[Any]:
    """All that stands in arguments, those in lists too."""
    for value in values:
        if isinstance(value, list | tuple):
            yield from _leaves(value)
        else:
            yield value


def _is_mask(x: Any) -> bool:
    return isinstance(x, torch.Tensor) and x.dtype in (torch.bool, torch.uint8)


def _is_cuda(x: Any) -> bool:
    if isinstance(x, torch.device):
        return x.type == "cuda"
    return isinstance(x, str) and x.startswith("cuda")


def _is_cpu(x: Any) -> bool:
    return x == torch.device("cpu") if isinstance(x, torch.device) else x == "cpu"


class _Factories(TorchFunctionMode):
    """Makes tensors that are asked of cuda:0, and carries tensors there and back."""

    def __init__(self, gpu: PretendedGpu):
        super().__init__()
        self.gpu = gpu

    def __torch_function__(
        self,
        func: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        name = getattr(func, "__name__", "")
        first = args[0] if args else None
        asked = [*args[1:], kwargs.get("device")]
        if isinstance(first, OnGpu):
            if name in ("numpy", "__array__"):
                self.gpu.fault("numpy() of a tensor of the GPU")
            if name == "cpu" or (name == "to" and any(map(_is_cpu, asked))):
                if not kwargs.get("non_blocking"):  # then into pinned memory
                    self.gpu.wait("copy to the CPU")
                there = on_cpu(first)
                if name == "cpu":
                    return there
                return there.to(*args[1:], **kwargs)
            if name == "tolist":
                self.gpu.wait("tolist")
                return on_cpu(first).tolist()
            if name in IN_ONE_PIECE:
                before = self.gpu.all.operations
                result = func(*args, **kwargs)
                self.gpu.all.operations = before + 1
                return result
        if name == "pin_memory" and isinstance(first, torch.Tensor):
            return _Pinned(first.clone())
        if name == "cuda" and isinstance(first, torch.Tensor):
            func, args, asked, name = torch.Tensor.to, (first, CUDA), [CUDA], "to"
        names_it = any(map(_is_cuda, (*args, kwargs.get("device"))))
        if not names_it or func in (torch.device, torch._C._nn._parse_to):
            return func(*args, **kwargs)
        if isinstance(kwargs.get("generator"), torch.Generator):
            self.gpu.fault(f"a generator of the CPU for a tensor of the GPU: {name}")
        moved = tuple(torch.device("cpu") if _is_cuda(x) else x for x in args)
        kept = {k: torch.device("cpu") if k == "device" else v for k, v in kwargs.items()}
        if name == "to" and isinstance(first, torch.Tensor):
            return self._carried(first, moved[1:], kept)
        result = func(*moved, **kept)
        if name in ("tensor", "as_tensor"):
            if result.numel() and not isinstance(result, OnGpu):
                self.gpu.wait("copy to the GPU")
        elif not name.startswith("empty"):
            self.gpu.all.operations += 1
        return tree_map(on_gpu, result)

    def _carried(self, tensor: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """`tensor.to(*args, **kwargs)` for arguments that name the CPU in the GPU's place."""
        if isinstance(tensor, OnGpu):
            return tensor.to(*args, **kwargs)
        if tensor.numel() and not (isinstance(tensor, _Pinned) and kwargs.get("non_blocking")):
            self.gpu.wait("copy to the GPU")
        with torch._C._DisableTorchDispatch():
            there = tensor.to(*args, **kwargs)
            return on_gpu(there.clone() if there is tensor else there)


@contextmanager
def pretended_gpu() -> Iterator[PretendedGpu]:
    """Within, this process has a GPU: accelerate says so, and tensors asked of it are there.

    Raises:
        DeviceFault: at the place of a fault; also at the end, where somebody caught it.
    """
    global _here
    gpu = PretendedGpu()
    forget_processes()
    join_processes()
    PartialState._shared_state["device"] = CUDA
    swaps = torch.__future__.get_swap_module_params_on_conversion()
    torch.__future__.set_swap_module_params_on_conversion(True)
    _here = gpu
    try:
        with _replaced(gpu), _Factories(gpu):
            yield gpu
    except Exception as error:
        if gpu.faults and not isinstance(error, DeviceFault):
            raise DeviceFault(gpu.faults[0]) from error
        raise
    finally:
        _here = None
        torch.__future__.set_swap_module_params_on_conversion(swaps)
        forget_processes()
    if gpu.faults:
        raise DeviceFault(gpu.faults[0])


def forget_processes() -> None:
    """Let accelerate settle device and precision anew: all of its objects share one state."""
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()


@contextmanager
def _replaced(gpu: PretendedGpu) -> Iterator[None]:
    """What a build of torch without CUDA cannot say or do of a GPU."""
    began = torch.autocast.__init__
    optimizer = import_module("torch.optim.optimizer")  # torch.optim takes the name away
    clipping = import_module("torch.nn.utils.clip_grad")
    grouped = clipping._group_tensors_by_device_and_dtype

    def autocast(self: Any, device_type: str, *args: Any, **kwargs: Any) -> None:
        began(self, "cpu" if device_type == "cuda" else device_type, *args, **kwargs)

    def synchronize(*args: Any) -> None:
        gpu.wait("synchronize")

    def by_device(*args: Any, **kwargs: Any) -> Any:
        """Torch's own code in C++ takes the tensors for those of the CPU that they are."""
        return {(CUDA, dtype): lists for (_, dtype), lists in grouped(*args, **kwargs).items()}

    with (
        patch.object(torch.autocast, "__init__", autocast),
        patch.object(clipping, "_group_tensors_by_device_and_dtype", by_device),
        # Else every parameter would be updated by itself, as those of no known class are.
        patch.object(optimizer, TYPES, [torch.Tensor, torch.nn.Parameter, OnGpu]),
        patch.object(_foreach_utils, TYPES, [torch.Tensor, OnGpu]),
        patch.object(torch.accelerator, "synchronize", synchronize),
        patch.object(torch.cuda, "synchronize", synchronize),
        patch.object(torch.cuda, "Event", _Stream),
        patch.object(torch.cuda, "Stream", _Stream),
        patch.object(torch.cuda, "current_stream", _Stream),
        patch.object(torch.cuda, "stream", lambda _: nullcontext()),
        patch.object(torch.cuda, "reset_peak_memory_stats", lambda *_: None),
        patch.object(torch.cuda, "max_memory_allocated", lambda *_: 0),
        patch.object(torch.cuda, "memory_allocated", lambda *_: 0),
        patch.object(torch.cuda, "get_device_name", lambda *_: "pretended"),
        patch.object(torch.cuda, "get_device_capability", lambda *_: (9, 0)),
        # Weights come onto the GPU in this thread: in another nobody pretends.
        patch.dict(os.environ, HF_DEACTIVATE_ASYNC_LOAD="1"),
        patch.object(modeling_utils, "caching_allocator_warmup", lambda *_: None),
    ):
        yield

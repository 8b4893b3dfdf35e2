"""Work dealt over the processes of one launch, and a target whose layers are split over them.

One process is the special case in which none of this does anything.
"""

import gc
import os
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from datetime import timedelta
from itertools import pairwise
from pathlib import Path
from typing import TypeVar, cast

import torch
from accelerate import Accelerator, PartialState
from accelerate.state import AcceleratorState, GradientState
from accelerate.utils import (
    broadcast_object_list,
    gather_object,
    parse_flag_from_env,
    reduce,
)
from packaging.version import Version
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor, distribute_tensor

from headstart.common.files import lock_folder
from headstart.common.heartbeat import SILENCE, Heartbeat, is_lost_connection

PATIENCE = timedelta(days=2)
"""One process may generate for hours while others wait; of one that dies the heartbeat tells."""
T = TypeVar("T")


def join_processes() -> PartialState:
    """The processes of this launch; the first call makes them known to one another.

    Where there is no accelerator they work on the CPU, which accelerate does only when told:
    otherwise each would take itself for the only one.
    """
    several = int(os.environ.get("WORLD_SIZE", "1")) > 1
    on_cpu = parse_flag_from_env("ACCELERATE_USE_CPU") or (
        several and not torch.accelerator.is_available()
    )
    state = PartialState(cpu=on_cpu, timeout=PATIENCE)
    if state.num_processes > 1 and not _heartbeats:
        _heartbeats.append(Heartbeat(state.process_index, state.num_processes))
        _heartbeats[0].start()
    return state


_heartbeats: list[Heartbeat] = []  # that of this process, once it has joined others


def wait_for_name(error: BaseException) -> None:
    """Where an error says that another process went away, wait until it is known which: one that
    has left is named here, and of one that died the heartbeat tells, which ends this process."""
    if not _heartbeats or not is_lost_connection(error):
        return
    until = time.monotonic() + 2 * SILENCE  # long after the heartbeat would have told
    while time.monotonic() < until:
        if (line := _heartbeats[0].ended()) is not None:
            print(f"headstart: {line}", file=sys.stderr)
            return
        time.sleep(1)


@contextmanager
def launch_kept() -> Iterator[None]:
    """Within, accelerate knows of no settings that an earlier part of this process gave it, such as
    the mixed precision of a trainer, which it would hold a second part to; afterwards it knows what
    it knew before."""
    states = [state._shared_state for state in (PartialState, AcceleratorState, GradientState)]
    before = [dict(state) for state in states]
    AcceleratorState._reset_state()
    GradientState._reset_state()
    try:
        yield
    finally:
        for state, was in zip(states, before, strict=True):
            state.clear()
            state.update(was)


def leave_processes() -> None:
    """Part from the other processes, when nothing of the work is left but garbage.

    A model that DDP or FSDP wrapped has to be gone first. Had it the last reference to the group,
    its end would wait for the group's threads without letting go of the interpreter, which they may
    need to end: a deadlock, every few runs (https://github.com/pytorch/pytorch/issues/56297).
    """
    while _heartbeats:
        _heartbeats.pop().leave()
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        gc.collect()
        torch.distributed.destroy_process_group()


def is_mine(number: int) -> bool:
    """Whether this process does piece `number` of the work: they are dealt round robin."""
    state = PartialState()
    return number % state.num_processes == state.process_index


def has_own_device() -> bool:
    """Whether no other process of this launch computes on the device of this one, so that it may
    be timed."""
    state = PartialState()
    if state.num_processes == 1:
        return True
    here = int(os.environ.get("LOCAL_WORLD_SIZE", state.num_processes))
    return state.device.type != "cpu" and here <= torch.accelerator.device_count()


def told_by_main(compute: Callable[[], T]) -> T:
    """What the main process computes, in all processes; all must call it."""
    state = PartialState()
    told = [compute() if state.is_main_process else None]
    return cast(T, broadcast_object_list(told)[0])


def check_same_everywhere(what: str, value: str, fix: str) -> None:
    """Raise `ValueError` in all processes, naming those that differ, unless all have the same
    `value`; all must call it. The message calls it `what` and ends with `fix`."""
    values = gather_object([value])
    others = [str(rank) for rank, its in enumerate(values) if its != values[0]]
    if others:
        raise ValueError(
            f"{what} is not the same in all processes: that of {', '.join(others)} differs from "
            f"that of 0. {fix}"
        )


@contextmanager
def processes_in(folder: Path, other: str | None = None) -> Iterator[None]:
    """All processes of this launch work in a folder, while other launches wait, or are told to name
    another folder as `other` has it.

    All begin when the main process holds the folder, and the main process goes on when all are
    done. One that fails ends the launch: its launcher stops the others.
    """
    state = PartialState()
    with lock_folder(folder, other) if state.is_main_process else nullcontext():
        state.wait_for_everyone()
        yield
        state.wait_for_everyone()


def in_step(items: Iterable[T], together: bool) -> Iterator[T | None]:
    """The items of this process, and, where it has to wait for the others (`together`), None for as
    long as another process has some left: a target that is split over the processes needs them all
    for each forward, so whoever has nothing to run lends a hand by `Target.idle`."""
    iterator = iter(items)
    while True:
        item = next(iterator, None)
        if together:
            left = torch.tensor(item is not None, dtype=torch.int32, device=PartialState().device)
            if not reduce(left, "sum"):
                return
        elif item is None:
            return
        yield item


def split_layers(model: torch.nn.Module, layers: Iterable[torch.nn.Module]) -> None:
    """Keep a share of each layer's weights of a frozen model, the same in all processes, in each
    process (FSDP2); they meet for its forward, while the layer before it computes. All else of
    `model` stays whole.

    Raises:
        RuntimeError: torch is too old for it.
    """
    from torch.distributed.fsdp import fully_shard

    if Version(torch.__version__).release < (2, 7):
        raise RuntimeError(
            f"target.sharded needs torch 2.7 or newer, and this is {torch.__version__}"
        )
    whole = list(layers)
    units = [fully_shard(layer, reshard_after_forward=True) for layer in whole]
    for unit, following in pairwise(units):
        unit.set_modules_to_forward_prefetch([following])
    # One root over them. Without it each layer is one: it gathers in streams of its own, after all
    # that came before it, and torch's allocator keeps a gathered layer for each of these streams.
    split = {parameter for layer in whole for parameter in layer.parameters()}
    fully_shard(model, ignored_params={p for p in model.parameters() if p not in split})


def reduce_in_float32(accelerator: Accelerator) -> None:
    """Let FSDP2 add up gradients in float32, as DDP does: accelerate sets the dtype of
    `mixed_precision` for that too, whose roundings grow with the processes."""
    plugin = accelerator.state.fsdp_plugin if accelerator.is_fsdp2 else None
    if plugin is not None and plugin.mixed_precision_policy is not None:
        policy = replace(plugin.mixed_precision_policy, reduce_dtype=torch.float32)
        plugin.mixed_precision_policy = policy


def full_tensor(tensor: torch.Tensor) -> torch.Tensor:
    """All of a tensor of which each process may hold a part; all processes must call it."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def placed_like(values: torch.Tensor, tensor: torch.Tensor) -> torch.Tensor:
    """Values that all processes have, on the device of `tensor` and split as it is."""
    values = values.to(tensor.device)
    if isinstance(tensor, DTensor):
        return distribute_tensor(values, tensor.device_mesh, tensor.placements)
    return values


@contextmanager
def full_weights(model: torch.nn.Module) -> Iterator[None]:
    """Within, each process has all weights of `model`, so that it can run it or save it alone."""
    split = [module for module in model.modules() if isinstance(module, FSDPModule)]
    try:
        for module in split:
            module.set_reshard_after_forward(False, recurse=False)
            module.unshard()
        yield
    finally:
        for module in split:
            module.reshard()
            module.set_reshard_after_forward(module is not model, recurse=False)

"""A head whose weights are split over processes (FSDP2): whole tensors where they are needed.

For a head in one process, or one that every process holds (DDP), nothing here does anything.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor, distribute_tensor


def whole(tensor: torch.Tensor) -> torch.Tensor:
    """All of a tensor of which each process may hold a part; all processes must call it."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def placed_like(values: torch.Tensor, tensor: torch.Tensor) -> torch.Tensor:
    """Values that all processes have, on the device of `tensor` and split as it is."""
    values = values.to(tensor.device)
    if isinstance(tensor, DTensor):
        return distribute_tensor(values, tensor.device_mesh, tensor.placements)
    return values


@contextmanager
def whole_weights(model: torch.nn.Module) -> Iterator[None]:
    """Within, each process has all weights of `model`, so that it can run it or save it alone."""
    split = [module for module in model.modules() if isinstance(module, FSDPModule)]
    for module in split:
        module.set_reshard_after_forward(False, recurse=False)
        module.unshard()
    yield
    for module in split:
        module.reshard()
        module.set_reshard_after_forward(module is not model, recurse=False)

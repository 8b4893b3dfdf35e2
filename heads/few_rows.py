"""Linear layers over a few rows on a CPU, with the weights as the left factor.

A verification runs the target over K + 1 rows. `x @ W.T` with so few rows is a shape for which some
CPU libraries have no kernel of their own: MKL in float32 on an AMD EPYC takes three times as long
for four rows as for one, most of it the LM head, though both read the same weights once. `W @ x.T`
is the same product in another order of loops. docs/decoding.md has what it is worth.
"""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import lru_cache, partial

import torch
import torch.nn.functional as F
from torch import nn
from transformers import PreTrainedModel

FEW = range(2, 10)  # rows: a token and 1 to 8 drafts
TRIAL = (16384, 640)  # of weights: more than a cache holds, as the table of a target is
TRIAL_ROWS, TRIAL_TURNS = 4, 5
WORTH = 0.8  # share of the time that it has to take at most, or the stock order stays


def weights_first(weight: torch.Tensor, bias: torch.Tensor | None, x: torch.Tensor) -> torch.Tensor:
    """`F.linear(x, weight, bias)`; over a few rows by way of `weight @ x.T`.

    Args:
        weight: [out, in].
        bias: [out] or None.
        x: [..., in].

    Returns:
        [..., out], contiguous.
    """
    rows = x.numel() // x.shape[-1]
    if rows not in FEW:
        return F.linear(x, weight, bias)
    product = torch.mm(weight, x.reshape(rows, -1).T).T.contiguous()
    product = product if bias is None else product + bias
    return product.view(*x.shape[:-1], -1)


@lru_cache
def is_quicker(dtype: torch.dtype) -> bool:
    """Whether this machine's CPU is quicker that way; tried once, in a tenth of a second."""
    weight, x = torch.ones(TRIAL, dtype=dtype), torch.ones(TRIAL_ROWS, TRIAL[1], dtype=dtype)
    sides: list[Callable[[], torch.Tensor]] = [
        partial(F.linear, x, weight),
        partial(weights_first, weight, None, x),
    ]
    seconds: list[list[float]] = [[], []]
    for _ in range(TRIAL_TURNS):
        for taken, side in zip(seconds, sides, strict=True):
            start = time.perf_counter()
            side()
            taken.append(time.perf_counter() - start)
    stock, ours = map(min, seconds)
    return ours < WORTH * stock


@contextmanager
def quick_few_rows(model: nn.Module) -> Iterator[None]:
    """Within, the linear layers of a model on a CPU take a few rows the quicker way.

    The values are those of `nn.Linear` up to the rounding of another order of sums. Layers of other
    classes, such as quantised ones, and layers whose forward somebody replaced stay as they are.
    """
    layers = [
        module
        for module in model.modules()
        if type(module) is nn.Linear
        and type(module.weight) is nn.Parameter  # torchao keeps the layer and changes the weight
        and module.weight.device.type == "cpu"
        and "forward" not in module.__dict__
        and is_quicker(module.weight.dtype)
    ]
    for layer in layers:
        layer.forward = partial(weights_first, layer.weight, layer.bias)  # type: ignore[method-assign]
    try:
        yield
    finally:
        for layer in layers:
            del layer.forward


@contextmanager
def plain_strides(model: PreTrainedModel) -> Iterator[None]:
    """Within, the LM head is given its rows without gaps between them.

    A prefill cuts the last row out of each sequence. Over rows that lie apart torch's linear runs
    one product a sequence on a CPU, a minute for 64 prompts of Gemma 3 270M; and over a single one
    that remembers its sequence's stride it takes 40 times as long in bfloat16, half a second. Such
    a row passes for contiguous, so that `contiguous()` would leave it as it is.
    """
    hook = model.get_output_embeddings().register_forward_pre_hook(
        lambda module, args: (args[0].clone(memory_format=torch.contiguous_format),)
    )
    try:
        yield
    finally:
        hook.remove()

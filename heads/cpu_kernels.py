"""Kernels for a CPU: linear layers over a few rows, and attention of one new token.

A verification runs the target over K + 1 rows. `x @ W.T` with so few rows is a shape for which some
CPU libraries have no kernel of their own: MKL in float32 on an AMD EPYC takes three times as long
for four rows as for one, most of it the LM head, though both read the same weights once. `W @ x.T`
is the same product in another order of loops. docs/results.md has what it is worth.

Query heads that share a key head are given to torch's attention as so many heads with a copy of the
keys each, one row a head. In bfloat16 its CPU kernel packs the keys for every such row: nine times
the time of the same rows given as one block (docs/upstream.md). The scores are the same numbers.

From transformers 5.23 on it is done there too, under a mask. Without one, as in drafts and in the
decoding of one text, torch is told to share the keys, and its kernel packs them all the same.

Letters: B batch, H query heads, G key heads, T rows of keys, D head width.
"""

import timeit
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache, partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

FEW = range(2, 10)  # rows: a token and 1 to 8 drafts
TRIAL = (16384, 640)  # of weights: more than a cache holds, as the table of a target is
TRIAL_ROWS, TRIAL_TURNS = 4, 5
WORTH = 0.8  # share of the time that it has to take at most, or the stock order stays


def linear_weights_first(
    weight: torch.Tensor, bias: torch.Tensor | None, x: torch.Tensor
) -> torch.Tensor:
    """`F.linear(x, weight, bias)`, x [..., in] and weight [out, in]; over a few rows by way of
    `weight @ x.T`. Returns [..., out], contiguous."""
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
    sides = (lambda: F.linear(x, weight), lambda: linear_weights_first(weight, None, x))
    stock, ours = (min(timeit.repeat(side, number=1, repeat=TRIAL_TURNS)) for side in sides)
    return ours < WORTH * stock


@contextmanager
def fast_small_batch_linear(model: nn.Module) -> Iterator[None]:
    """Within, the linear layers of a model on a CPU take a few rows the quicker way.

    The values are those of `nn.Linear` up to the rounding of another order of sums. Layers of other
    classes, such as quantized ones, and layers whose forward somebody replaced stay as they are.
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
        layer.forward = partial(linear_weights_first, layer.weight, layer.bias)  # type: ignore[method-assign]
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


NAME = "headstart_single_query"


def grouped_query_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """transformers' `sdpa_attention_forward`; for one query [B, H, 1, D] on a CPU, a group's heads
    as rows, over keys and values [B, G, T, D] and a mask [B or 1, 1, 1, T] or None. Returns
    [B, 1, H, D] and no weights."""
    b, heads, rows, width = query.shape
    if rows > 1 or query.device.type != "cpu":
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, scaling=scaling, **kwargs
        )
    groups = key.shape[1]
    grouped = query.reshape(b, groups, heads // groups, width)
    mask = attention_mask
    mask = None if mask is None else mask.expand(-1, -1, heads // groups, -1)
    seen = torch.nn.functional.scaled_dot_product_attention(
        grouped, key, value, attn_mask=mask, scale=scaling
    )
    return seen.reshape(b, 1, heads, width), None


AttentionInterface.register(NAME, grouped_query_attention)
AttentionMaskInterface.register(NAME, sdpa_mask)


@contextmanager
def fast_grouped_query_attention(config: Any) -> Iterator[None]:
    """Within, a model whose layers read this text configuration attends that way.

    Models that run another attention than transformers' `sdpa` are left alone.
    """
    stock = config._attn_implementation
    if stock != "sdpa":
        yield
        return
    config._attn_implementation = NAME
    try:
        yield
    finally:
        config._attn_implementation = stock

"""Attention of one new token on a CPU, with the query heads of a group as rows of one product.

Query heads that share a key head are given to torch's attention as so many heads with a copy of the
keys each, one row a head. In bfloat16 its CPU kernel packs the keys for every such row: nine times
the time of the same rows given as one block (docs/data.md). The scores are the same numbers.

From transformers 5.23 on it is done there too, under a mask. Without one, as in drafts and in the
decoding of one text, torch is told to share the keys, and its kernel packs them all the same.

Letters: B batch, H query heads, G key heads, T rows of keys, D head width.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

NAME = "headstart_single_query"


def single_query_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """transformers' `sdpa_attention_forward`; for one query on a CPU, a group's heads as rows.

    Args:
        module: the attention layer.
        query: [B, H, 1, D]; with another number of rows the stock function runs.
        key, value: [B, G, T, D].
        attention_mask: [B or 1, 1, 1, T]; None: every row is seen.
        scaling: of the scores.

    Returns:
        [B, 1, H, D], and None for the weights, which are not kept.
    """
    b, heads, rows, width = query.shape
    if rows > 1 or query.device.type != "cpu":
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, scaling=scaling, **kwargs
        )
    groups = key.shape[1]
    grouped = query.reshape(b, groups, heads // groups, width)
    mask = attention_mask
    if mask is not None:
        mask = mask.expand(-1, -1, heads // groups, -1)
    seen = torch.nn.functional.scaled_dot_product_attention(
        grouped, key, value, attn_mask=mask, scale=scaling
    )
    return seen.reshape(b, 1, heads, width), None


AttentionInterface.register(NAME, single_query_attention)
AttentionMaskInterface.register(NAME, sdpa_mask)


@contextmanager
def quick_single_queries(config: Any) -> Iterator[None]:
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

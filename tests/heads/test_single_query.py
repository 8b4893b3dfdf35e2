"""Attention of one query over grouped heads gives the same numbers, wherever it is switched on."""

from typing import Any

import pytest
import torch
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from headstart.common.versions import INSTALLED
from headstart.heads import cpu_kernels
from headstart.heads.cpu_kernels import fast_grouped_query_attention, grouped_query_attention
from headstart.heads.target import Target


@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("masked", [False, True])
def test_attention_of_a_single_query_equals_the_stock_attention(rows: int, masked: bool) -> None:
    torch.manual_seed(0)
    layer: Any = torch.nn.Module()
    layer.num_key_value_groups = 4
    # As a layer hands them over: heads and rows swapped in place.
    query = torch.randn(2, rows, 8, 16).transpose(1, 2)
    key, value = torch.randn(2, 2, 7, 16), torch.randn(2, 2, 7, 16)
    mask = torch.rand(2, 1, rows, 7) > 0.3 if masked else None
    if mask is not None:
        mask[..., 0] = True
    wanted, _ = sdpa_attention_forward(layer, query, key, value, mask, scaling=0.3)
    found, _ = grouped_query_attention(layer, query, key, value, mask, scaling=0.3)
    assert found.shape == wanted.shape
    torch.testing.assert_close(found, wanted, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("padded", [False, True])
def test_a_target_generates_the_same_text_within(
    padded: bool, target: Target, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = [0, 0, 5, 6, 7, 8] if padded else [3, 4, 5, 6, 7, 8]
    ids = torch.tensor([first, [9, 8, 7, 6, 5, 4]])
    mask = (ids > 0).long()
    calls = []
    stock = torch.nn.functional.scaled_dot_product_attention

    def noted(query: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        calls.append(query.shape[1])
        return stock(query, *args, **kwargs)

    monkeypatch.setattr(cpu_kernels.torch.nn.functional, "scaled_dot_product_attention", noted)

    def text() -> list[list[int]]:
        calls.clear()
        output = target.model.generate(
            ids, attention_mask=mask, max_new_tokens=20, do_sample=False, eos_token_id=None
        )
        return output.tolist()

    plain, heads = text(), list(calls)
    with fast_grouped_query_attention(target.config):
        assert text() == plain
    if padded and INSTALLED.release >= (5, 23):
        return  # transformers does the same
    # Steps ran with one block a group of heads, where the layers do share keys and see all of them.
    layers = [m for m in target.model.modules() if hasattr(m, "num_key_value_groups")]
    grouped = any(layer.num_key_value_groups > 1 for layer in layers)
    assert (sum(calls) < sum(heads)) == grouped
    assert target.config._attn_implementation == "sdpa"

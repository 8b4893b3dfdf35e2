"""The same product by another order of loops, and only where it is asked for."""

from contextlib import suppress
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from headstart.common.versions import CUTS_ROWS
from headstart.heads.cpu_kernels import (
    FEW,
    fast_small_batch_linear,
    is_quicker,
    linear_weights_first,
    plain_strides,
)
from headstart.heads.target import Target


@pytest.fixture
def quicker(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a machine where it pays."""
    monkeypatch.setattr("headstart.heads.cpu_kernels.is_quicker", lambda dtype: True)


@pytest.mark.parametrize("shape", [(1, 1), (1, 2), (1, 5), (5,), (2, 4), (1, 9), (3, 7)])
@pytest.mark.parametrize("bias", [True, False])
def test_the_product_is_that_of_linear(shape: tuple[int, ...], bias: bool) -> None:
    torch.manual_seed(0)
    weight, x = torch.randn(33, 17), torch.randn(*shape, 17)
    extra = torch.randn(33) if bias else None
    found = linear_weights_first(weight, extra, x)
    torch.testing.assert_close(found, F.linear(x, weight, extra))
    assert found.is_contiguous()


@pytest.mark.usefixtures("quicker")
def test_layers_take_it_within_and_are_put_back() -> None:
    """Not those of other classes, nor one whose forward somebody else replaced."""

    class Other(nn.Linear):
        pass

    plain, other, hooked = nn.Linear(4, 3), Other(4, 3), nn.Linear(4, 3)
    hooked.forward = lambda x: x  # type: ignore[method-assign, assignment]
    model = nn.ModuleList([plain, nn.Sequential(other, hooked)])
    x = torch.randn(3, 4)
    wanted = plain(x)

    def replaced(layer: nn.Module) -> Any:
        return layer.__dict__.get("forward")

    theirs = replaced(hooked)
    with suppress(RuntimeError), fast_small_batch_linear(model):
        assert replaced(plain) is not None
        assert replaced(other) is None
        assert replaced(hooked) is theirs
        torch.testing.assert_close(plain(x), wanted)
        with fast_small_batch_linear(model):  # one text within another
            torch.testing.assert_close(plain(x), wanted)
        assert replaced(plain) is not None
        raise RuntimeError("as when generate fails")
    assert replaced(plain) is None
    assert replaced(hooked) is theirs


def test_the_quick_product_is_timed_once_for_each_dtype() -> None:
    is_quicker.cache_clear()
    first = is_quicker(torch.float32)
    assert is_quicker(torch.float32) == first
    assert is_quicker.cache_info().misses == 1
    assert 1 not in FEW, "plain decoding stays as it is"


def test_the_lm_head_is_given_rows_without_gaps(target: Target) -> None:
    """A prefill's last row has the stride of its sequence, though it passes for contiguous."""
    seen: list[tuple[int, ...]] = []
    head = target.model.get_output_embeddings()
    ids = torch.tensor([[5, 6, 7, 8]])

    def run() -> torch.Tensor:
        with torch.no_grad():
            return target.model(ids, logits_to_keep=1).logits

    width = target.config.hidden_size
    with plain_strides(target.model):
        # After the hook of `plain_strides`: it sees what the layer is given.
        note = head.register_forward_pre_hook(lambda module, args: seen.append(args[0].stride()))
        lean = run()
        note.remove()
    assert seen == [(width, width, 1)]
    note = head.register_forward_pre_hook(lambda module, args: seen.append(args[0].stride()))
    stock = run()
    note.remove()
    # Where layers share keys the row was cut out before them.
    alone = CUTS_ROWS and getattr(target.config, "num_kv_shared_layers", 0) > 0
    gap = width if alone else 4 * width
    assert seen[1] == (gap, width, 1), "transformers mends it: plain_strides can go"
    assert torch.equal(lean, stock)

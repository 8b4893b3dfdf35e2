"""Each form of a linear layer gives the product of torch's own, and follows its weights."""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from headstart.heads import cpu_linear
from headstart.heads.cpu_linear import (
    FEW,
    Packed,
    by_columns,
    forms_for,
    forms_of,
    is_packed,
    linear_by,
    made,
    quickest,
    without_onednn,
)
from headstart.heads.kernels import fast_kernels
from headstart.heads.target import Target
from tests.helpers.packing import packs_here

FORMS = [(form, rows) for form in forms_for(1) for rows in [(1,), (1, 1)]] + [
    (form, rows)
    for rows in [(1, 2), (1, 3), (2, 2), (5,), (2, 4), (3, 3)]
    for form in forms_for(math.prod(rows))
]


@pytest.mark.parametrize(("form", "rows"), FORMS)
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("out", [33, 32])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_product_is_that_of_linear(
    form: Any, rows: tuple[int, ...], bias: bool, out: int, dtype: torch.dtype
) -> None:
    if is_packed(form) and not packs_here(dtype):
        pytest.skip("oneDNN packs no such weights on this processor")
    torch.manual_seed(0)
    weight, x = torch.randn(out, 17, dtype=dtype), torch.randn(*rows, 17, dtype=dtype)
    extra = torch.randn(out, dtype=dtype) if bias else None
    with torch.no_grad():
        found = linear_by(dict.fromkeys(FEW, made(form, Packed())), weight, extra, x)
    wanted = F.linear(x.float(), weight.float(), None if extra is None else extra.float())
    off = 1e-5 if dtype == torch.float32 else 0.02
    torch.testing.assert_close(found.float(), wanted, atol=off, rtol=off)
    assert found.dtype == dtype
    assert found.is_contiguous()


def test_gradients_go_by_torchs_own_form() -> None:
    weight, x = torch.randn(4, 3, requires_grad=True), torch.randn(2, 3)
    found = linear_by(dict.fromkeys(FEW, Packed()), weight, None, x)
    assert torch.equal(found, F.linear(x, weight))
    assert found.requires_grad


@pytest.fixture
def packs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every number of rows runs over packed weights, for which there is memory."""
    packed = lambda dtype, rows, packs: Packed if packs else None  # noqa: E731
    monkeypatch.setattr(cpu_linear, "quickest", packed)
    monkeypatch.setattr(cpu_linear, "free_memory", lambda device: 1 << 40)


def packed_form(layer: nn.Linear, rows: int = 3) -> Packed:
    forward: Any = layer.forward
    found = forward.args[0][rows]
    assert isinstance(found, Packed)
    return found


@pytest.mark.usefixtures("packs")
def test_packed_weights_last_as_long_as_the_context(tiny: Target) -> None:
    """Somebody may change the weights in between, by ways that no tensor counts."""
    layer, x = nn.Linear(40, 24, bias=False), torch.randn(3, 40)
    tiny.model.extra = layer
    for change in (0.0, 1.0):
        layer.weight.data += change
        with fast_kernels(tiny.model), torch.no_grad():
            found = layer(x)
            with fast_kernels(tiny.model):  # one text of several
                assert torch.equal(layer(x), found)
            assert packed_form(layer).ready is not None
        torch.testing.assert_close(found, F.linear(x, layer.weight))


@pytest.mark.usefixtures("packs")
def test_weights_that_change_within_are_used_as_they_are(tiny: Target) -> None:
    layer, x = nn.Linear(40, 24, bias=False), torch.randn(3, 40)
    tiny.model.extra = layer
    with fast_kernels(tiny.model), torch.no_grad():
        layer(x)
        assert packed_form(layer).ready is not None
        layer.weight.add_(1.0)  # as an optimizer does it
        assert torch.equal(layer(x), F.linear(x, layer.weight))
    with fast_kernels(tiny.model), torch.no_grad():
        layer(x)
        layer.weight = nn.Parameter(torch.randn(24, 40))
        assert torch.equal(layer(x), F.linear(x, layer.weight))
    with fast_kernels(tiny.model, packs=False), torch.no_grad():
        layer.weight.data += 1.0
        assert torch.equal(layer(x), F.linear(x, layer.weight))
        assert "forward" not in layer.__dict__


@pytest.mark.usefixtures("packs")
def test_nothing_is_packed_where_there_is_no_memory_for_all(
    tiny: Target, monkeypatch: pytest.MonkeyPatch
) -> None:
    linear = [m.weight for m in tiny.model.modules() if type(m) is nn.Linear]
    size = sum(weight.nbytes for weight in linear)
    for free, packs in ((None, False), (2 * size, False), (2 * size + 1, True)):
        monkeypatch.setattr(cpu_linear, "free_memory", lambda device, free=free: free)
        with fast_kernels(tiny.model):
            forms = tiny.model.lm_head.__dict__.get("forward")
            assert bool(forms is not None and forms.args[0]) == packs


def test_onednn_is_on_again_afterwards(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(RuntimeError):
        without_onednn(torch.ones(3, 4), torch.ones(1, 5))
    assert torch.backends.mkldnn.enabled
    monkeypatch.setattr(torch._C, "_get_mkldnn_enabled", lambda: False)
    assert without_onednn not in forms_for(1), "somebody has switched it off"


@pytest.mark.parametrize("shape", [(11,), (2, 7), (16,)])
@pytest.mark.parametrize("bias", [True, False])
def test_an_lm_head_goes_by_columns_over_some_rows(
    shape: tuple[int, ...], bias: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In float32 alone, where it is quicker; with the same bits whatever a process has timed."""
    monkeypatch.setattr(cpu_linear, "WIDE", 50)
    monkeypatch.setattr(cpu_linear, "COLUMNS", 20)
    monkeypatch.setattr(cpu_linear, "SEVERAL", range(10, 17))
    torch.manual_seed(0)
    layer, x = nn.Linear(17, 50, bias=bias), torch.randn(*shape, 17)
    fast = cpu_linear.linear_forward(layer, small_batch=False)
    assert fast is not None
    with torch.no_grad():
        found = fast(x)
        torch.testing.assert_close(found, layer(x))
        columns = dict.fromkeys(range(99), by_columns)
        assert torch.equal(found, linear_by(columns, layer.weight, layer.bias, x))
        assert found.is_contiguous()
        many = x.repeat(20, *[1] * (x.ndim - 1))
        for rows in (many, many[:0], x.reshape(-1, 17)[:9]):
            assert torch.equal(fast(rows), layer(rows))
    assert cpu_linear.linear_forward(layer.bfloat16(), small_batch=False) is None
    assert cpu_linear.linear_forward(nn.Linear(17, 49), small_batch=False) is None


@pytest.mark.usefixtures("packs")
def test_a_batch_runs_over_packed_weights_where_their_bits_are_the_same(
    tiny: Target, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is stored has the bits of torch's own form, whether there was memory to pack or not."""
    model, ids = tiny.model.to(torch.bfloat16), torch.randint(5, 90, (3, 20))
    here = cpu_linear.packs_alike(torch.bfloat16)
    with torch.no_grad():
        stock = model(ids).logits
        for alike in (False, True):
            monkeypatch.setattr(cpu_linear, "packs_alike", lambda dtype, alike=alike: alike)
            with fast_kernels(model, small_batch=False):
                assert ("forward" in model.lm_head.__dict__) == alike
                if alike and not packs_here(torch.bfloat16):
                    continue
                found = model(ids).logits
                if alike:
                    assert packed_form(model.lm_head, 60).ready is not None
            if here or not alike:
                assert torch.equal(found, stock)


def test_forms_are_timed_once_for_each_dtype_and_number_of_rows() -> None:
    cpu_linear._trial.cache_clear()
    for packs in (False, True):
        first = forms_of(torch.ones(2, 2), packs=packs).keys()
        assert forms_of(torch.ones(3, 3), packs=packs).keys() == first
    assert cpu_linear._trial.cache_info().misses == len(FEW)
    assert 1 in FEW, "plain decoding takes the quickest too"
    assert forms_of(torch.ones(2, 2, dtype=torch.int8)) == {}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rows", [1, 5])
def test_without_packed_weights_the_next_quickest_form_runs(
    rows: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    others = [form for form in forms_for(rows) if not is_packed(form)]
    seconds: dict[Any, float] = {None: 9.0, **dict.fromkeys(others, 5.0), Packed: 1.0}
    monkeypatch.setattr(cpu_linear, "_trial", lambda dtype, rows: seconds)
    assert quickest(dtype, rows, packs=True) is Packed
    assert quickest(dtype, rows, packs=False) in others
    seconds |= dict.fromkeys(others, 8.5)  # not worth other bits
    assert quickest(dtype, rows, packs=False) is None


def test_what_disturbs_the_machine_for_a_while_does_not_choose_the_form(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    now = 0.0

    def taking(seconds: float) -> Callable[[], None]:
        def call() -> None:
            nonlocal now
            now += seconds * (10 if now < 90 else 1)

        return call

    monkeypatch.setattr(cpu_linear.time, "perf_counter", lambda: now)
    # Of a form whose turns all came at first, each would take 20.
    assert cpu_linear._seconds([[taking(2)], [taking(1), taking(2)]]) == [2, 3]

"""Linear layers on a CPU by the quickest of several forms, which depends on the number of rows.

A step of decoding and the verification of some drafts run every layer over one to nine rows, and
what they cost is the reading of the weights. CPU libraries are made for more rows. Two threads of
an EPYC read them (`headstart bench limits`; docs/explanation/clean-kv-decoder.md):

- in float32 over one row several times as fast by blocks of the weights as by `x @ W.T`, and over
  more as `W @ x.T`; twice as fast again over several rows where oneDNN packs the weights once;
- in bfloat16, where oneDNN runs the processor's own instructions and packs the weights anew each
  time, twice as fast over one row by torch's own kernel, and over more where the weights are packed
  once.

Packed weights are a second copy: they are made where they are first used, and last as long as the
`fast_kernels` around them, within which the weights have to stay as they are.

Over tens of rows, as a batch that generates has, `W @ x.T` is quicker in float32 too: there an LM
head goes by blocks of its columns, and each is turned around while it is in the cache.
"""

import time
from collections.abc import Callable, Collection, Mapping, Sequence
from functools import lru_cache, partial
from math import gcd
from typing import TypeAlias

import torch
import torch.nn.functional as F
from torch import nn

from headstart.common.machine import free_memory

Form: TypeAlias = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
"""Weights [out, in] and rows x [n, in] on a CPU -> `x @ W.T` [n, out], contiguous."""

FEW = range(1, 10)  # rows: a token and up to 8 drafts
TRIAL_COLUMNS, TRIAL_WIDTH = 2048, 640  # of a layer: what a call costs counts too
TRIAL_BYTES = 64 << 20  # of layers that take turns: several times what a cache holds
TRIAL_TURNS = 3
ALIKE_BYTES = 40 << 20  # of the layer whose bits are compared
WORTH = 0.9  # share of the time that a form has to take at most, or the stock one stays
BLOCKS = 16


class Packed:
    """A form by oneDNN over weights that it packs when it is first called, and that have to stay as
    they are from then on. Weights that were exchanged, or changed where a tensor counts it, are no
    longer used packed."""

    def __init__(self) -> None:
        self.ready: torch.Tensor | None = None
        self.of: tuple[int, int] | None = None

    def __call__(self, weight: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        now = weight.data_ptr(), 0 if weight.is_inference() else weight._version
        if self.of is None:
            self.ready = torch.ops.mkldnn._reorder_linear_weight(weight.detach(), None)
            self.of = now  # last: another thread may ask meanwhile
        if self.of != now:
            return F.linear(x, weight)
        product: torch.Tensor = torch.ops.mkldnn._linear_pointwise(
            x, self.ready, None, "none", [], ""
        )
        return product


Choice: TypeAlias = Form | type[Packed] | int | None
"""A form, packed weights, those over so many rows, or torch's own form."""


def linear_forward(
    module: nn.Linear, small_batch: bool = True, packs: bool = False
) -> Callable[..., torch.Tensor] | None:
    """What a linear layer on a CPU is to run in place of its own forward; None: it keeps that.
    `small_batch` and `packs` as of `forms_of`."""
    forms = forms_of(module.weight, small_batch, packs)
    return partial(_forward, forms, module) if forms else None


def _forward(forms: Mapping[int, Form], module: nn.Linear, x: torch.Tensor) -> torch.Tensor:
    return linear_by(forms, module.weight, module.bias, x)


def linear_by(
    forms: Mapping[int, Form], weight: torch.Tensor, bias: torch.Tensor | None, x: torch.Tensor
) -> torch.Tensor:
    """`F.linear(x, weight, bias)` over x [..., in], by the form of its number of rows where there
    is one, no gradients are kept, and no autocast has to make one dtype of two."""
    rows = x.numel() // x.shape[-1]
    form = forms.get(rows)
    if form is None or torch.is_grad_enabled() or x.dtype != weight.dtype:
        return F.linear(x, weight, bias)
    product = form(weight, x.reshape(rows, -1))
    product = product if bias is None else product + bias
    return product.view(*x.shape[:-1], -1)


def has_room_to_pack(weights: Collection[torch.Tensor]) -> bool:
    """Whether a second copy of all of them on the CPU leaves as much memory free again."""
    size = sum(weight.nbytes for weight in weights if weight.device.type == "cpu")
    return 2 * size < (free_memory(torch.device("cpu")) or 0)


def forms_of(
    weight: torch.Tensor, small_batch: bool = True, packs: bool = False
) -> dict[int, Form]:
    """For one weight: number of rows -> the form that is quicker than torch's own; none off the
    CPU, or for what is no floating dtype.

    Args:
        weight: [out, in].
        small_batch: over few rows too, where each process tries which form is the quickest, and
            bits may differ from those of torch's own.
        packs: over packed weights too.
    """
    if weight.device.type != "cpu" or not weight.dtype.is_floating_point:
        return {}
    packed, found = Packed(), dict[int, Form]()
    for rows in FEW if small_batch else ():
        form = quickest(weight.dtype, rows, packs)
        if form is not None:
            found[rows] = made(form, packed)
    if weight.dtype == torch.float32 and len(weight) >= WIDE:
        found |= dict.fromkeys(SEVERAL, by_columns)
    elif packs and packs_alike(weight.dtype):
        found |= dict.fromkeys(SEVERAL, packed)
    return found


@lru_cache
def packs_alike(dtype: torch.dtype) -> bool:
    """Whether a batch's product over packed weights has the same bits as torch's own here, and is
    quicker; tried once."""
    generator = torch.Generator().manual_seed(0)
    columns = ALIKE_BYTES // dtype.itemsize // TRIAL_WIDTH
    weight = torch.randn(columns, TRIAL_WIDTH, generator=generator).to(dtype)
    packed = Packed()
    with torch.no_grad():
        for rows in (SEVERAL.start, 64):
            x = torch.randn(rows, TRIAL_WIDTH, generator=generator).to(dtype)
            stock, ours = _seconds([[partial(F.linear, x, weight)], [partial(packed, weight, x)]])
            if ours > stock:
                return False
            if not torch.equal(packed(weight, x), F.linear(x, weight)):
                return False
    return True


def quickest(dtype: torch.dtype, rows: int, packs: bool) -> Choice:
    """The form that is quickest on this machine, `packs`: over packed weights perhaps; None:
    torch's own."""
    seconds = {f: s for f, s in _trial(dtype, rows).items() if packs or not is_packed(f)}
    best = min(seconds, key=lambda form: seconds[form])
    return best if seconds[best] < WORTH * seconds[None] else None


def is_packed(choice: Choice) -> bool:
    return choice is Packed or isinstance(choice, int)


def made(choice: Form | type[Packed] | int, packed: Packed) -> Form:
    """The form that was chosen, over these packed weights if over any."""
    if isinstance(choice, int):
        return partial(filled_up, packed, choice)
    return packed if isinstance(choice, type) else choice


def filled_up(form: Form, rows: int, weight: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """The product of x [n, in] by a form over `rows` rows, those beyond n zeros."""
    return form(weight, F.pad(x, (0, 0, 0, rows - len(x))))[: len(x)]


@lru_cache
def _trial(dtype: torch.dtype, rows: int) -> dict[Choice, float]:
    """What each form takes here, tried once in a process."""
    return seconds_of_forms(dtype, rows, TRIAL_BYTES)


@torch.no_grad()
def seconds_of_forms(dtype: torch.dtype, rows: int, size: int) -> dict[Choice, float]:
    """What the products with layers of `size` bytes in all take by torch's own form, None, and by
    others; infinite where this build of torch has no such kernel."""
    weights = list(
        torch.ones(size // dtype.itemsize // TRIAL_WIDTH, TRIAL_WIDTH, dtype=dtype).split(
            TRIAL_COLUMNS
        )
    )
    x = torch.ones(rows, TRIAL_WIDTH, dtype=dtype)
    forms = (None, *forms_for(rows))
    products = [[_product(form, weight, x) for weight in weights] for form in forms]
    return dict(zip(forms, _seconds(products), strict=True))


def _product(form: Choice, weight: torch.Tensor, x: torch.Tensor) -> Callable[[], torch.Tensor]:
    if form is None:
        return partial(F.linear, x, weight)
    return partial(made(form, Packed()), weight, x)


def _seconds(variants: Sequence[Sequence[Callable[[], object]]]) -> list[float]:
    """The least that the calls of each variant take one after another. The variants take turns:
    what disturbs the machine for a while meets them all."""
    found = [float("inf")] * len(variants)
    for _ in range(1 + TRIAL_TURNS):  # packed weights are made in the first one
        for i, calls in enumerate(variants):
            start = time.perf_counter()
            try:
                for call in calls:
                    call()
            except (AttributeError, RuntimeError):  # no such kernel, or none for this processor
                continue
            found[i] = min(found[i], time.perf_counter() - start)
    return found


def forms_for(rows: int) -> tuple[Form | type[Packed] | int, ...]:
    """What is tried beside torch's own; a number: packed weights over so many rows, which oneDNN
    may have a quicker kernel for than for fewer."""
    if rows > 1:
        return (other_order, *(n for n in (3, 5) if n > rows), Packed)
    # Where somebody has switched oneDNN off, torch's own kernel is what runs anyway.
    on = torch._C._get_mkldnn_enabled()
    return (by_blocks, without_onednn, Packed) if on else (by_blocks, Packed)


def other_order(weight: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """The same product in another order of loops."""
    return torch.mm(weight, x.T).T.contiguous()


def by_blocks(weight: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """One row, by a batch of products with blocks of the weights."""
    blocks = weight.unflatten(0, (gcd(len(weight), BLOCKS), -1))
    return torch.bmm(blocks, x.T.expand(len(blocks), -1, 1)).view(1, -1)


def without_onednn(weight: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """By a kernel of torch's own. oneDNN is off for the whole process meanwhile."""
    # `torch.backends.mkldnn.flags` takes 8 microseconds, as long as a small product.
    enabled = torch._C._set_mkldnn_enabled
    enabled(False)
    try:
        return F.linear(x, weight)
    finally:
        enabled(True)  # not what it was before: another thread may be within this function


WIDE = 65_536  # columns of what is no other layer than an LM head
SEVERAL = range(FEW.stop, 513)  # rows: a batch that generates, a chunk that teaches
COLUMNS = 2048  # of it at once: a block of logits stays in the cache until it is turned around


def by_columns(weight: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """Over tens of rows, by blocks of `weight @ x.T`."""
    given = x.T.contiguous()
    product = x.new_empty(len(x), len(weight))
    for columns, part in zip(product.split(COLUMNS, 1), weight.split(COLUMNS), strict=True):
        columns.copy_((part @ given).T)
    return product

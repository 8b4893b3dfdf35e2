"""What this machine can do: its measured rates, and the matrix products of a target alone.

A share of these is a figure that another machine can be compared by, where tokens a second are not.

Letters: m rows, k columns in, n columns out.
"""

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from rich.table import Table
from torch import nn

from headstart.common.console import plain_console, print_once
from headstart.common.files import write_figures
from headstart.common.machine import environment, machine_name, timed
from headstart.heads.cpu_linear import Packed, packs_alike, seconds_of_forms
from headstart.heads.target import Target

TURNS = 3  # of which the quickest counts
PRODUCT_TURNS = 2  # of all products of a forward, in each order
SIDE = 2048  # m, k and n of the product whose rate is told
COPIED = 1 << 28  # bytes: more than any cache holds
DTYPES = (torch.float32, torch.bfloat16)
ROWS = (1, 2, 5, 9)  # of a linear layer: a plain step, and verifications of 1, 4 and 8 drafts


def gemm_rate(device: torch.device, dtype: torch.dtype) -> float:
    """Operations a second, 2mkn of each product, of a linear layer of m = k = n = `SIDE`."""
    x, weight = (torch.randn(SIDE, SIDE, device=device).to(dtype) for _ in range(2))
    return 2 * SIDE**3 / quickest(device, lambda: F.linear(x, weight))


def memory_rate(device: torch.device, dtype: torch.dtype) -> float:
    """Bytes a second that a copy reads and writes, both counted."""
    source = torch.ones(COPIED // dtype.itemsize, device=device, dtype=dtype)
    place = torch.zeros_like(source)
    return 2 * COPIED / quickest(device, lambda: place.copy_(source))


def small_batch_rates(dtype: torch.dtype) -> dict[str, dict[str, float]]:
    """Rows -> form of a linear layer that this CPU has -> bytes a second at which it reads its
    weights."""
    return {
        str(rows): {
            "linear" if form is None else form.__name__: COPIED / seconds
            for form, seconds in seconds_of_forms(dtype, rows, COPIED).items()
            # Infinite: none for this processor.
            if seconds < float("inf") and not isinstance(form, int)
        }
        for rows in ROWS
    }


def quickest(device: torch.device, call: Callable[[], object]) -> float:
    """Seconds of the quickest of `TURNS` calls, after one more."""
    call()
    return min(timed(device, call) for _ in range(TURNS))


@torch.no_grad()
def products_alone(target: Target, rows: int, lm_head_rows: int) -> float:
    """Seconds of the matrix products of one forward of the target, and of nothing else.

    They are those of every linear layer of the decoder with its own weights, over `rows` rows, and
    of the LM head over `lm_head_rows`; each by the quickest of `x @ W.T`, `W @ x.T` and, on a CPU,
    `x @ W.T` over packed weights. Experts of a mixture, which are no linear layers, are left out.
    The target must not be split over processes.
    """
    device, dtype = target.device, target.table.dtype
    layers = [m for m in target.model.get_decoder().modules() if isinstance(m, nn.Linear)]
    sized = [(layer, rows) for layer in layers if rows]
    if lm_head_rows:
        sized.append((target.model.get_output_embeddings(), lm_head_rows))
    shapes = {(m, layer.in_features) for layer, m in sized}
    x = {shape: torch.randn(shape, device=device).to(dtype) for shape in shapes}
    products = [_orders(layer, x[m, layer.in_features]) for layer, m in sized]
    best = [float("inf")] * len(products)
    # All in a row, as in a forward, so that no layer finds its weights in a cache.
    for _ in range(PRODUCT_TURNS):
        for order in range(max(map(len, products))):
            for i, orders in enumerate(products):
                best[i] = min(best[i], timed(device, orders[order % len(orders)]))
    return sum(best)


def _orders(layer: nn.Linear, x: torch.Tensor) -> list[Callable[[], object]]:
    """The product of a layer and `x` [m, k], in each order of loops that it can be taken in, and
    over packed weights."""
    if type(layer) is not nn.Linear:  # a quantized layer knows its own product alone
        return [partial(layer, x)]
    plain: list[Callable[[], object]] = [partial(F.linear, x, layer.weight)]
    if type(layer.weight) is nn.Parameter:  # torchao keeps the layer and changes the weight
        plain.append(partial(torch.mm, layer.weight, x.T))
        if x.device.type == "cpu" and packs_alike(x.dtype):
            plain.append(partial(Packed(), layer.weight, x))
    return plain


@contextmanager
def products_counted(target: Target) -> Iterator[Counter[tuple[int, int]]]:
    """Within, the forwards of the target are counted: (rows of the decoder, 0) or (0, rows of the
    LM head) -> how many, as `products_alone` takes them."""
    seen: Counter[tuple[int, int]] = Counter()

    def forward(module: nn.Module, args: Any, output: torch.Tensor) -> None:
        seen[output.shape[:-1].numel(), 0] += 1

    def head(module: nn.Module, args: Any, output: torch.Tensor) -> None:
        seen[0, output.shape[:-1].numel()] += 1

    hooks = [
        target.model.get_input_embeddings().register_forward_hook(forward),
        target.model.get_output_embeddings().register_forward_hook(head),
    ]
    try:
        yield seen
    finally:
        for hook in hooks:
            hook.remove()


def seconds_of(target: Target, counted: Counter[tuple[int, int]]) -> float:
    """Seconds of the products of forwards that `products_counted` has counted."""
    return sum(n * products_alone(target, *rows) for rows, n in counted.items())


def run_limits(device: torch.device, out: Path | None) -> None:
    """Measure the machine's rates, print them, and write them to `out`."""
    names = {dtype: str(dtype).removeprefix("torch.") for dtype in DTYPES}
    content: dict[str, Any] = {
        "benchmark": "limits",
        "environment": environment(device),
        "gemm_flops_per_second": {n: gemm_rate(device, d) for d, n in names.items()},
        "memory_bytes_per_second": {n: memory_rate(device, d) for d, n in names.items()},
    }
    if device.type == "cpu":
        content["small_batch_bytes_per_second"] = {
            n: small_batch_rates(d) for d, n in names.items()
        }
    table = Table(
        "dtype", "matrix products", "copies, read and written",
        title=f"limits: {machine_name(content['environment'])}",
    )  # fmt: skip
    for name in names.values():
        flops = content["gemm_flops_per_second"][name] / 1e9
        moved = content["memory_bytes_per_second"][name] / 1e9
        table.add_row(name, f"{flops:,.0f} GFLOP/s", f"{moved:,.1f} GB/s")
    plain_console().print(table)
    for name, by_rows in content.get("small_batch_bytes_per_second", {}).items():
        for rows, forms in by_rows.items():
            each = ", ".join(f"{form} {rate / 1e9:.1f}" for form, rate in forms.items())
            print_once(f"{name}, a linear layer over {rows} rows, GB/s of weights: {each}")
    write_figures(content, out)

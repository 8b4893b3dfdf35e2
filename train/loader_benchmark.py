"""How long a training step waits for its batch, and how fast a store is written: `headstart bench
loader`.

The store is made here, of random activations with the shapes of a target, whose weights are not
read: `--config gemma4-e4b` needs none.
"""

import itertools
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from rich.table import Table

from headstart.common.children import temporary_folder
from headstart.common.console import plain_console
from headstart.common.files import write_figures
from headstart.common.machine import environment, machine_name
from headstart.configs.schema import Config
from headstart.data.background import THREADS, Prefetch
from headstart.data.documents import PLAIN, Entry
from headstart.data.loader import AnchorLoader, run_loader
from headstart.data.store import (
    FORMAT,
    ActivationStore,
    kept_settings,
    on_cpu,
    shard_path,
    shard_paths,
    write_index,
    write_shard,
)
from headstart.heads.kinds import inputs_of
from headstart.heads.target import Inputs, source_layers
from headstart.train.plan import run_shapes

STEP = 0.012
"""Seconds of a training step of E4B's head on an H100, calculated from some 2,800 operations at 4
to 5 microseconds each (docs/explanation/performance.md): what a loader has to keep up with."""
STEPS = 100
SHARDS, DOCUMENTS = 4, 16  # documents a shard


def run_loader_benchmark(config: Config, out: Path | None) -> None:
    """Run it for a recipe, print its figures and write them to `out`, a JSON file."""
    figures = bench_loader(config)
    where = environment(torch.device("cpu")) | {"target": config.target.name}
    table = Table(title=f"loader: {config.target.name}, {machine_name(where)}", show_header=False)
    forms = {
        "loader_wait_share": "waiting for a batch",
        "loader_share": "waiting, and slowed down by the threads",
        "loader_share_without_threads": "making the batch in the step itself",
    }
    for name, form in forms.items():
        table.add_row(f"{form}, of a step", f"{figures['ratios'][name]:.1%}")
    table.add_row("a step without any", f"{STEP * 1000:.0f} ms")
    table.add_row("a batch, by one thread", f"{figures['seconds_per_batch'] * 1000:.1f} ms")
    table.add_row("its activations", f"{figures['bytes_per_batch'] / 2**20:.1f} MiB")
    table.add_row("shards, by one thread", f"{figures['write_bytes_per_second'] / 1e6:,.0f} MB/s")
    plain_console().print(table)
    write_figures({"benchmark": "loader", "environment": where, **figures}, out)


@contextmanager
def one_thread() -> Iterator[None]:
    """Within, torch computes in one thread."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def bench_loader(config: Config) -> dict[str, Any]:
    """Time batches of the recipe over a store that the page cache holds.

    Returns:
        `ratios`, of a step that launches small operations for `STEP` seconds: `loader_wait_share`,
        the share of it that it waits for its batch; `loader_share`, that and what the threads slow
        it down; `loader_share_without_threads`, where it makes its batch itself.
        `seconds_per_batch`, made in the step; `bytes_per_batch` as they go to the device;
        `bytes_per_token` of the store, and `write_bytes_per_second` of one thread, checksums
        included.
    """
    with one_thread(), temporary_folder() as work:  # as in a launch of several processes
        length = (config.data.max_prompt_tokens + config.data.max_new_tokens) // 2
        shapes = run_shapes(config)
        inputs = inputs_of(shapes.head)
        seconds = make_store(shapes.text, config, length, work, inputs)
        written = sum(path.stat().st_size for path in shard_paths(work))
        store = ActivationStore(work)
        store.read(range(len(store)))  # verified, and in the page cache
        loader = run_loader(store, config, inputs)
        batch = loader.batch(0)
        stored = [batch.texts.hidden, *itertools.chain(*batch.texts.kv.values())]
        stored += batch.texts.layers.values()
        size = sum(t.nbytes for one in stored for t in (one.values, one.scale) if t is not None)
        alone, _ = _step_seconds(loader, 0)
        waited, whole = _step_seconds(loader, THREADS)
    return {
        "ratios": {
            "loader_wait_share": waited / whole,
            "loader_share": max(0.0, 1 - STEP / whole),
            "loader_share_without_threads": alone / (alone + STEP),
        },
        "seconds_per_batch": alone,
        "bytes_per_batch": size,
        "bytes_per_token": written / (SHARDS * DOCUMENTS * length),
        "write_bytes_per_second": written / seconds,
        "seconds_per_step": STEP,
        "loader_threads": THREADS,
        "tokens_per_batch": config.train.batch_size * length,
        "storage": config.data.storage,
    }


def _step_seconds(loader: AnchorLoader, threads: int) -> tuple[float, float]:
    """Mean seconds that a step waits for its batch, and that it takes in all."""
    small, count = torch.zeros(8), 0
    end = time.perf_counter() + 20 * STEP
    while time.perf_counter() < end:
        small.add_(1)
        count += 1
    waited, began = 0.0, time.perf_counter()
    with Prefetch(loader.batch, 0, torch.device("cpu"), threads) as ahead:
        for _ in range(STEPS):
            asked = time.perf_counter()
            batch = ahead.take()
            waited += time.perf_counter() - asked
            del batch  # its memory is given back, as in a step: nobody waits for a batch then
            # As the host of a GPU does, which takes turns with the threads at Python's lock.
            for _ in range(count // 20):
                small.add_(1)
                time.perf_counter()
    return waited / STEPS, (time.perf_counter() - began) / STEPS


def make_store(source: Any, config: Config, length: int, folder: Path, inputs: Inputs) -> float:
    """A store of random activations; returns the seconds that its shards took to write.

    Args:
        source: the target's text configuration.
        config: of the recipe: teacher's top k, storage.
        length: tokens of each document; the second half of them is its answer.
        folder: where to.
        inputs: what the head reads.
    """
    top_k, generator = config.data.teacher_top_k, torch.Generator().manual_seed(0)
    settings = {
        "format": FORMAT, "target": config.target.name, "config": {}, "fingerprint": "random",
        "tokenizer": "none", "dtype": "bfloat16", "storage": config.data.storage,
        "teacher_top_k": top_k, **kept_settings(inputs),
    }  # fmt: skip
    tokens, seconds = DOCUMENTS * length, 0.0
    for number in range(SHARDS):
        states = ["hidden", *(f"layer.{i}" for i in inputs.layers)]
        width = source.hidden_size
        tensors = {name: torch.randn(tokens, width, generator=generator) for name in states}
        for kind, i in source_layers(source).items() if inputs.kv else ():
            layer = source.per_layer_config[i]
            shape = (tokens, layer.num_key_value_heads, layer.head_dim)
            for what in ("keys", "values"):
                tensors[f"{kind}.{what}"] = torch.randn(shape, generator=generator)
        tensors = {name: tensor.bfloat16() for name, tensor in tensors.items()}
        ids = torch.randint(source.vocab_size, (tokens, top_k + 1), generator=generator)
        plain = (
            ids[:, 0].int(),
            (torch.arange(tokens) % length) >= length // 2,
            ids[:, 1:].int(),
            torch.zeros(tokens, top_k),
        )
        entries = [
            Entry(f"{number}-{i}", "", "", length, length - length // 2, 0.0, None)
            for i in range(DOCUMENTS)
        ]
        tensors |= dict(zip(PLAIN, plain, strict=True))
        stored = dict[str, torch.Tensor]()  # quantized where the target runs
        for name, tensor in tensors.items():
            stored |= on_cpu(name, tensor, config.data.storage)
        began = time.perf_counter()
        write_shard(shard_path(folder, number), stored, entries, settings)
        seconds += time.perf_counter() - began
    write_index(folder, [shard_path(folder, number) for number in range(SHARDS)], settings)
    return seconds

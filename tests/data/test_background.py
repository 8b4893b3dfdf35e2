"""Batches made ahead: the same ones in the same order, and what goes wrong comes out."""

import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.utils import recursively_apply

from headstart.configs.schema import DataConfig
from headstart.data.background import Prefetch
from headstart.data.extraction import extract
from headstart.data.loader import AnchorLoader, Batch
from headstart.data.store import ActivationStore, shard_path
from tests.helpers.models import make_target
from tests.helpers.prompts import conversations

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("store")
    rows = conversations(11)
    tokens = sum(len(row.ids) for row in rows)
    extract(make_target("gemma4-kv-sharing"), rows, tokens, DataConfig(storage="int8"), folder)
    return folder


def loader_of(folder: Path) -> AnchorLoader:
    return AnchorLoader(ActivationStore(folder), 3, 8, 3, seed=5, multi_step_anchors=4)


def tensors_of(batch: Batch) -> list[torch.Tensor]:
    found: list[torch.Tensor] = []
    recursively_apply(found.append, batch)
    return found


@pytest.mark.parametrize("threads", [0, 1, 4])
def test_batches_made_ahead_are_those_that_are_asked_for(folder: Path, threads: int) -> None:
    """Over several epochs, from the middle on, whatever thread is the quicker one."""
    alone, delays = loader_of(folder), torch.rand(40, generator=torch.Generator().manual_seed(0))

    def late(number: int) -> Batch:
        time.sleep(float(delays[number]) / 100)
        return loader.batch(number)

    loader = loader_of(folder)
    with Prefetch(late, first=5, device=CPU, threads=threads) as ahead:
        for number in range(5, 25):
            ours, theirs = ahead.take(), alone.batch(number)
            assert ours.document_ids == theirs.document_ids
            pairs = list(zip(tensors_of(ours), tensors_of(theirs), strict=True))
            assert len(pairs) > 15
            assert all(torch.equal(a, b) for a, b in pairs)
    names = [thread.name for thread in threading.enumerate()]
    assert not [name for name in names if name.startswith("batches")]


def test_threads_that_begin_later_have_as_many_of_torch_as_before(folder: Path) -> None:
    own = torch.get_num_threads()
    torch.set_num_threads(3)
    with Prefetch(loader_of(folder).batch, first=0, device=CPU) as ahead:
        ahead.take()
    with ThreadPoolExecutor(1) as pool:
        found = pool.submit(torch.get_num_threads).result()
    torch.set_num_threads(own)
    assert found == 3


def test_no_more_batches_are_in_memory_than_the_plan_counts(folder: Path) -> None:
    loader, made = loader_of(folder), list[int]()

    def noted(number: int) -> Batch:
        made.append(number)
        return loader.batch(number)

    with Prefetch(noted, first=0, device=CPU, threads=2) as ahead:
        ahead.take()
        time.sleep(0.3)
        assert sorted(made) == [0, 1, 2], "that of the step, and as many ahead as there are threads"


def test_an_error_in_a_thread_names_file_and_document_in_the_loop(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loader = loader_of(folder)
    names = [name for row in loader.batch(2).document_ids for name in row]
    read = type(ActivationStore(folder).shard(0)).read

    def failing(self: Any, start: int, entry: Any) -> Any:
        if entry.id == names[1]:
            raise OSError("Input/output error")
        return read(self, start, entry)

    monkeypatch.setattr("headstart.data.store.Shard.read", failing)
    with (
        Prefetch(loader_of(folder).batch, first=2, device=CPU, threads=2) as ahead,
        pytest.raises(ValueError, match=f"{shard_path(folder, 0)}.*{names[1]}.*delete it"),
    ):
        ahead.take()

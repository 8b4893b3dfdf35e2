"""A target whose layers are split over processes, here over one: tests/train/test_processes.py has
two."""

from collections.abc import Iterator
from itertools import pairwise
from unittest.mock import patch

import pytest
import torch
from torch.distributed import HashStore, destroy_process_group, init_process_group
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from headstart.heads.target import Target


@pytest.fixture
def one_process() -> Iterator[None]:
    init_process_group("gloo", store=HashStore(), rank=0, world_size=1)
    yield
    destroy_process_group()


def test_a_split_target_is_one_root_and_says_what_it_said(
    target: Target, one_process: None
) -> None:
    """One communication context for all layers, each of which gathers the next while it computes;
    what is no layer stays whole."""
    ids = torch.randint(4, 200, (2, 16))
    with torch.no_grad():
        wanted, before = target.model(ids).logits, target.activations(ids)
    layers = list(target.layers)
    target.shard()
    with target.full_source_layers(), torch.no_grad():  # before a forward and after one
        found = target.model(ids).logits
    after = target.activations(ids)
    assert torch.equal(found, wanted)
    assert torch.equal(after.hidden, before.hidden)
    states = [m._get_fsdp_state() for m in target.model.modules() if isinstance(m, FSDPModule)]
    assert [state._is_root for state in states].count(True) == 1
    assert len({id(state._comm_ctx) for state in states}) == 1
    assert len(states) == 1 + len(layers)
    for layer, following in pairwise(layers):
        ahead = layer._get_fsdp_state()._states_to_forward_prefetch
        assert ahead == [following._get_fsdp_state()]
    of_layers = {id(parameter) for layer in layers for parameter in layer.parameters()}
    for parameter in target.model.parameters():
        assert isinstance(parameter, DTensor) == (id(parameter) in of_layers)


def test_a_torch_that_cannot_leave_parameters_whole_is_refused(tiny: Target) -> None:
    refused = pytest.raises(RuntimeError, match=r"target\.sharded needs torch 2\.7")
    with patch.object(torch, "__version__", "2.6.0+cu124"), refused:
        tiny.shard()

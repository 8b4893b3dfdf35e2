"""The products that a share is taken of are those of the target's own forwards, and no others."""

import json
from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from headstart.cli.main import main
from headstart.configs.schema import DataConfig
from headstart.data.regenerate import answer
from headstart.eval.limits import PRODUCT_TURNS, products_alone, products_counted
from headstart.heads.cpu_linear import packs_alike
from headstart.heads.target import Target
from tests.helpers.models import FAMILIES, make_target
from tests.helpers.prompts import jobs

aten = torch.ops.aten


@pytest.mark.parametrize("family", [f for f in FAMILIES if "moe" not in f])
def test_the_products_alone_are_those_of_a_forward(family: str) -> None:
    target = make_target(family)
    ids = torch.ones(3, 7, dtype=torch.long)
    with FlopCounterMode(display=False) as forward, torch.no_grad():
        target.model(ids, use_cache=False)
    packs_alike(target.table.dtype)  # a trial, once in a process
    with FlopCounterMode(display=False) as alone:
        assert products_alone(target, 21, 21) > 0
    wanted, found = (mode.get_flop_counts()["Global"] for mode in (forward, alone))
    assert found[aten.mm] == 2 * PRODUCT_TURNS * wanted[aten.mm]
    assert set(found) == {aten.mm}


def test_what_a_generation_ran_is_counted(target: Target) -> None:
    target.eos_ids.clear()
    asked = jobs(target, [0.0, 1.0, 0.0], DataConfig())
    width = max(len(job.prompt_ids) for job in asked)
    with products_counted(target) as counted:
        answer(target, asked, 6, 0, None)
    assert counted == {(3 * width, 0): 1, (3, 0): 5, (0, 3): 6}


def test_bench_limits_writes_what_it_measured(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "a new folder" / "limits.json"
    assert main(["bench", "limits", "--json", str(out)]) == 0
    content = json.loads(out.read_text())
    for rates in ("gemm_flops_per_second", "memory_bytes_per_second"):
        assert content[rates].keys() == {"float32", "bfloat16"}
        assert all(1e8 < rate < 1e17 for rate in content[rates].values())
    assert "GFLOP/s" in capsys.readouterr().out

"""The training benchmarks: the same rows on both sides, and figures in the file."""

import json
from pathlib import Path

import pytest
import torch

from headstart.cli.main import main
from headstart.common.machine import peak_memory
from headstart.configs.schema import DataConfig, TrainConfig
from headstart.data.extraction import OnlineActivations
from headstart.data.loader import AnchorLoader
from headstart.heads.target import Target
from headstart.train import benchmark
from headstart.train.benchmark import plain_loss
from headstart.train.start import build_head, sample_teacher_rows
from headstart.train.step import batch_sums
from tests.helpers.prompts import conversations
from tests.helpers.runs import ROOT, tiny_config

CONFIG = DataConfig(teacher_top_k=5)

PROMPTS = ROOT / "data" / "prompts" / "text_train.jsonl"


def test_the_plain_step_has_the_loss_of_the_exact_one(target: Target, tmp_path: Path) -> None:
    documents = OnlineActivations(target, conversations(4), CONFIG)
    head = build_head(
        target,
        tiny_config(tmp_path),
        sample_teacher_rows(documents, target.device),
        documents,
        resumed=False,
    )
    batch = AnchorLoader(documents, 4, 8, 3, seed=0, multi_step_anchors=3).batch(0)
    c = TrainConfig(num_speculative_steps=3, mixed_precision="no", vocabulary="exact")
    wanted = batch_sums(head, target, batch, c, None)["loss_sum"].detach()
    found = plain_loss(head, target, batch, c).detach()
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)


def test_bench_train_writes_its_ratios(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    argv = ["bench", "train", "--config", str(ROOT / "configs" / "tiny.yaml"), "bench.prompts=4"]
    argv += ["--json", str(tmp_path / "train.json"), f"data.prompts=[{PROMPTS}]"]
    assert main(argv) == 0
    content = json.loads((tmp_path / "train.json").read_text())
    assert content["ratios"].keys() >= {"step_over_forward", "plain_over_step"}
    assert content["tokens"] == 4 * 24
    assert content["anchors"] == 4 * 15, "24 tokens, 8 given: 15 rows have two to predict"
    assert "step_over_forward" in capsys.readouterr().out


def test_a_step_that_takes_no_memory_anew_has_no_ratio_of_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As where earlier work of the process left enough of it."""
    monkeypatch.setattr(benchmark, "peak_memory", lambda device, call: 0)
    argv = ["bench", "train", "--config", str(ROOT / "configs" / "tiny.yaml"), "bench.prompts=4"]
    argv += ["--json", str(tmp_path / "train.json"), f"data.prompts=[{PROMPTS}]"]
    assert main(argv) == 0
    content = json.loads((tmp_path / "train.json").read_text())
    assert "plain_over_step_memory" not in content["ratios"]
    assert "peak_bytes" not in content


def test_peak_memory_sees_what_a_call_holds_for_a_while() -> None:
    size = 50 << 20
    peak = peak_memory(torch.device("cpu"), lambda: torch.ones(size, dtype=torch.uint8).sort())
    if peak is not None:  # Linux alone tells
        assert size < peak < 20 * size, "sorting adds indices of eight bytes"

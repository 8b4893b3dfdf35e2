"""What a plan says of memory, beside what the program's own functions hold over the real shapes."""

import json
from pathlib import Path

import pytest
import torch

from headstart.configs.loader import load_config
from headstart.configs.schema import DataConfig
from headstart.heads.describe import SHAPES
from headstart.train.memory import (
    HeadSize,
    Launch,
    TargetSize,
    checkpoint_bytes,
    extraction_bytes,
    generation_bytes,
    head_step_bytes,
    held_target,
    peaks,
)
from headstart.train.plan import run_shapes
from tests.helpers.fake_memory import PHASES, SETTINGS, fake_peaks, fake_tensors

ALONE, DDP, FSDP2 = Launch(), Launch(8), Launch(8, fsdp=True)
QUICK = ("gemma-4-E4B", "gemma-4-26B-A4B")  # inputs per layer and shared keys; experts


@pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=() if name in QUICK else pytest.mark.slow) for name in SHAPES],
)
def test_a_plan_says_what_the_functions_of_a_run_hold_at_their_fullest(name: str) -> None:
    """Beside the weights, which are most of it and of which nobody doubts the size."""
    config = load_config(None, [f"target.name=google/{name}-it", *SETTINGS])
    shapes, found = run_shapes(config), fake_peaks(config)
    said = dict(peaks(config, shapes, ALONE))
    weights = held_target(shapes.target, 2, ALONE, sharded=False)
    said["extracting"] = weights + extraction_bytes(shapes.text, config.data, 2)
    assert weights == pytest.approx(found["weights"], rel=1e-4)
    for phase in PHASES:
        beside = found[phase] - found["weights"]
        assert said[phase] - weights == pytest.approx(beside, rel=0.1), phase


@pytest.mark.parametrize(
    "setting",
    [
        "train.activation_checkpointing=true",
        "train.ema_decay=0.99",
        "train.mixed_precision=no",
        "train.max_anchors=256",
    ],
)
def test_a_plan_says_what_settings_of_the_training_are_worth(setting: str) -> None:
    config = load_config(None, ["target.name=google/gemma-4-E2B-it", *SETTINGS, setting])
    said, found = dict(peaks(config, run_shapes(config), ALONE)), fake_peaks(config, "training")
    assert said["training"] == pytest.approx(found["training"], rel=0.05)


def test_a_plan_says_what_a_gpu_was_seen_to_hold() -> None:
    """Shapes of E4B on an H100 (tests/gpu_proof.py), measured when its cache grew by a row a step
    and had no room for all of them: 1% less."""
    file = Path(__file__).parents[2] / "docs" / "results" / "gpu-generation.json"
    found = json.loads(file.read_text())["found"]
    shapes = run_shapes(load_config(None, ["target.name=google/gemma-4-E4B-it"]))
    d = DataConfig(
        max_prompt_tokens=found["prompt_tokens"],
        max_new_tokens=found["new_tokens"],
        generation_batch_size=found["batch"],
    )
    said = held_target(shapes.target, 2, ALONE, sharded=False)
    said += generation_bytes(shapes.text, d, 2, recorded=False)
    assert said == pytest.approx(found["cudnn off"]["peak_bytes"], rel=0.015)


def test_processes_share_what_they_split_and_nothing_else() -> None:
    target = TargetSize(layers=80, rest=10, largest_layer=4)
    whole = held_target(target, 2, DDP, sharded=False)
    assert whole == held_target(target, 2, ALONE, sharded=True) == 180
    assert held_target(target, 2, FSDP2, sharded=True) == (80 // 8 + 10 + 2 * 4) * 2
    config = load_config(None, ["target.name=google/gemma-4-31B-it", *SETTINGS])
    shapes = run_shapes(config)
    p = shapes.size.trained
    alone, ddp, fsdp = (
        head_step_bytes(config, shapes.text, shapes.head, shapes.size, launch, 2)
        for launch in (ALONE, DDP, FSDP2)
    )
    assert ddp - alone == 4 * p, "DDP keeps gradients in buckets too"
    assert fsdp < alone - 8 * p, "FSDP2 divides weights, gradients and moments"
    assert checkpoint_bytes(config, HeadSize(p), ALONE) == 12 * p
    assert checkpoint_bytes(config, HeadSize(p), FSDP2) == 12 * p + 12 * p // 8


def test_bytes_are_counted_while_a_storage_lives_and_once_for_its_views() -> None:
    with fake_tensors() as live, live.measured():
        before = live.now
        kept = torch.empty(1024, dtype=torch.float32)
        views = [kept.view(32, 32), kept[:3]]
        assert live.now - before == 4096
        again = kept + 1
        del again
        assert live.now - before == 4096
        assert live.peak - before == 8192
        del kept, views
        assert live.now == before

"""Plans of the recipes for the real Gemma 4, without a network and without weights."""

from pathlib import Path
from unittest.mock import Mock

import pytest
import torch

from headstart.configs.loader import load_config
from headstart.configs.schema import TrainConfig
from headstart.heads.describe import SHAPES, published_config
from headstart.heads.target import SUPPORTED, source_layers
from headstart.train.plan import _plan_step, plan

RECIPES = sorted((Path(__file__).resolve().parents[2] / "configs").glob("gemma4-*.yaml"))
GPU = ["target.dtype=bfloat16", "train.mixed_precision=bf16"]  # what `auto` comes to there
BILLIONS = {"E2B": 2, "E4B": 4, "12B": 12, "26B-A4B": 26, "31B": 31}
"""What the names say; for E2B and E4B that is without the tables of per-layer embeddings."""


def test_there_is_a_recipe_for_each_published_checkpoint() -> None:
    named = {load_config(path, GPU).target.name for path in RECIPES}
    assert named == {f"google/{name}-it" for name in SHAPES}


@pytest.mark.parametrize("name", SHAPES)
def test_a_published_shape_has_the_size_that_its_checkpoint_has(name: str) -> None:
    config = published_config(f"google/{name}")
    assert config is not None
    with torch.device("meta"):
        model = SUPPORTED[config.model_type](config)
    parameters = model.named_parameters()
    size = sum(p.numel() for n, p in parameters if "embed_tokens_per_layer" not in n) / 1e9
    assert size == pytest.approx(BILLIONS[name.removeprefix("gemma-4-")], rel=0.17)
    assert set(source_layers(config)) == {"sliding_attention", "full_attention"}


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_a_recipe_has_a_plan_of_each_phase(path: Path) -> None:
    config = load_config(path, GPU)
    lines = plan(config)
    assert "GiB" in lines["a GPU holds at most"]
    assert {"in answering", "in training", "in a checkpoint"} <= set(lines)
    assert "as published" in lines["shapes"]
    assert "PFLOP" in lines["a step computes"]


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_a_warm_start_from_the_published_assistant_has_a_plan(path: Path) -> None:
    name = load_config(path, GPU).target.name
    config = load_config(path, [*GPU, f"head.init_from={name}-assistant"])
    lines = plan(config)
    assert lines["head"].startswith("assistant: 4 layers (sliding, sliding, sliding, full)")
    small = "E2B" in name or "E4B" in name
    assert lines["head"].endswith("width 256, MLP 2048" if small else "width 1024, MLP 8192")
    assert lines["LM head"].startswith("ordered" if small else "dense")
    assert lines["parameters shared with the target"] == "none: a table of its own, frozen"


def test_a_checkpoint_of_somebody_else_is_not_taken_for_a_published_one() -> None:
    assert published_config("ORG/gemma-4-E2B-it") is None
    assert published_config("google/gemma-4-E2B-it-assistant") is None


def test_an_adapter_is_what_a_plan_says_is_trained() -> None:
    """Rank times the sum of both sides of each layer; the frozen rest is held all the same."""
    start = [*GPU, "head.init_from=google/gemma-4-E4B-it-assistant"]
    (path,) = (one for one in RECIPES if one.stem == "gemma4-e4b")
    whole = plan(load_config(path, start))
    one, two, wide = (
        plan(load_config(path, [*start, f"head.lora={{r: {r}}}"])) for r in (8, 16, 128)
    )
    small, large = (int(p["parameters trained"].replace(",", "")) for p in (one, two))
    assert large == 2 * small
    assert small < int(whole["parameters trained"].replace(",", "")) / 10
    assert one["in training"] != wide["in training"]
    parts = plan(load_config(path, [*start, "head.trainable_modules=[pre_projection]"]))
    assert int(parts["parameters trained"].replace(",", "")) == 2 * 2560 * 256


def test_operations_of_a_step_are_those_of_its_products() -> None:
    """Of a trained weight: forward and two gradients. Of the table, 10^6 by 10^3: forward
    and the gradient of the state for each draft, and the teacher of each position."""
    c, source = TrainConfig(vocabulary="exact", num_speculative_steps=3, max_steps=50), Mock()
    source.hidden_size, source.vocab_size = 1000, 10**6
    trained = 2 * 10**9
    said = _plan_step(c, source, trained, rows=4, drafts=1000, run=1000)["a step computes"]
    assert said.startswith("16.01 TFLOP a process: 12.00 in the head, 4.01 in the objective")
    assert "over 1,000,000 candidates" in said
    assert said.endswith("; 0.8 PFLOP in all steps")
    few = c.model_copy(update={"vocabulary": "sparse", "likely_tokens": 30, "negatives": 20})
    assert "over 50 candidates" in _plan_step(few, source, 1, 4, 10, 10)["a step computes"]
    more = _plan_step(c, source, trained, rows=4, drafts=1000, run=3000)["a step computes"]
    assert "36.00 in the head, 4.01 in the objective" in more

"""Plans of the recipes for the real Gemma 4, without a network and without weights."""

from pathlib import Path

import pytest
import torch

from headstart.configs.loader import load_config
from headstart.heads.describe import SHAPES, published_config
from headstart.heads.target import SUPPORTED, source_layers
from headstart.train.plan import plan

RECIPES = sorted((Path(__file__).resolve().parents[2] / "configs").glob("gemma4-*.yaml"))
GPU = ["target.dtype=bfloat16", "train.precision=bfloat16"]  # what `auto` comes to there
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
def test_a_recipe_has_a_plan_that_fits_its_machine(path: Path) -> None:
    config = load_config(path, GPU)
    lines = plan(config)
    shared = lines["a process holds"]
    split = shared.split("target.sharded=true ")[1] if config.target.sharded else shared
    gigabytes, unit = split.split()[:2]
    assert unit.rstrip(";") == "GiB"
    assert float(gigabytes) < 0.6 * (22 if path.stem == "gemma4-e2b" else 74)
    assert "as published" in lines["shapes"]
    assert "PFLOP" in lines["a step computes"]


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_so_has_its_warm_start_from_the_published_assistant(path: Path) -> None:
    name = load_config(path, GPU).target.name
    config = load_config(path, [*GPU, f"head.start={name}-assistant"])
    lines = plan(config)
    assert lines["head"].startswith("4 layers (sliding_attention, sliding_attention, sliding_att")
    small = "E2B" in name or "E4B" in name
    assert lines["head"].endswith("width 256, MLP 2048" if small else "width 1024, MLP 8192")
    assert lines["LM head"].startswith("ordered" if small else "dense")
    assert lines["parameters shared with the target"] == "none: a table of its own, frozen"


def test_a_checkpoint_of_somebody_else_is_not_taken_for_a_published_one() -> None:
    assert published_config("ORG/gemma-4-E2B-it") is None
    assert published_config("google/gemma-4-E2B-it-assistant") is None


def test_an_adapter_is_what_a_plan_says_is_trained() -> None:
    """Rank times the sum of both sides of each layer; the frozen rest is held all the same."""
    start = [*GPU, "head.start=google/gemma-4-E4B-it-assistant"]
    (path,) = (one for one in RECIPES if one.stem == "gemma4-e4b")
    whole = plan(load_config(path, start))
    one, two = (plan(load_config(path, [*start, f"head.lora={{rank: {r}}}"])) for r in (8, 16))
    small, large = (int(p["parameters trained"].replace(",", "")) for p in (one, two))
    assert large == 2 * small
    assert small < int(whole["parameters trained"].replace(",", "")) / 10
    assert one["head in training"] != two["head in training"]
    parts = plan(load_config(path, [*start, "head.trains=[pre_projection]"]))
    assert int(parts["parameters trained"].replace(",", "")) == 2 * 2560 * 256

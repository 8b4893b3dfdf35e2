"""Weights and activations that are no numbers."""

import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from headstart.configs.schema import DataConfig
from headstart.data.extraction import entries_of, extract_tensors
from headstart.data.store import Storage, shard_path, shard_settings, write_shard
from headstart.heads.loading import load_target
from headstart.heads.saving import load_assistant
from tests.helpers.checkpoints import saved_target
from tests.helpers.heads import noisy_head
from tests.helpers.models import make_target
from tests.helpers.prompts import conversations


def spoil(file: Path, name: str, value: float) -> None:
    """Put a value into one place of a tensor."""
    tensors = load_file(file)
    tensors[name].view(-1)[7] = value
    save_file(tensors, file, metadata={"format": "pt"})


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize(
    "name",
    ["model.layers.1.mlp.up_proj.weight", "model.norm.weight", "model.embed_tokens.weight"],
)
def test_a_target_with_a_weight_that_is_no_number_is_refused(
    name: str, value: float, tmp_path: Path
) -> None:
    folder = saved_target(tmp_path)
    spoil(tmp_path / "model.safetensors", name, value)
    with pytest.raises(ValueError, match=name) as error:
        load_target(folder, "float32")
    assert folder in str(error.value)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_head_with_a_weight_that_is_no_number_is_refused(value: float, tmp_path: Path) -> None:
    noisy_head(make_target("gemma3")).assistant.save_pretrained(tmp_path)
    spoil(tmp_path / "model.safetensors", "model.layers.0.self_attn.q_proj.weight", value)
    with pytest.raises(ValueError, match=r"layers\.0\.self_attn\.q_proj\.weight") as error:
        load_assistant(tmp_path, torch.float32)
    assert str(tmp_path) in str(error.value)


def test_a_target_whose_logits_overflow_is_refused(tmp_path: Path) -> None:
    """All weights are numbers; their products are not, in the dtype of the target."""
    folder = saved_target(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    tensors["model.embed_tokens.weight"] *= 1e15
    tensors["model.norm.weight"] *= 1e30
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match="logits"):
        load_target(folder, "float32")


def test_a_target_whose_weights_are_all_zero_is_refused(tmp_path: Path) -> None:
    folder = saved_target(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    zeros = {name: tensor * 0 for name, tensor in tensors.items()}
    save_file(zeros, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match="say nothing"):
        load_target(folder, "float32")


def test_a_buffer_that_is_no_number_is_named(tmp_path: Path) -> None:
    folder = saved_target(tmp_path, "gemma4")
    tensors = load_file(tmp_path / "model.safetensors")
    tensors["model.layers.1.layer_scalar"] *= math.nan
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"layers\.1\.layer_scalar"):
        load_target(folder, "float32")


@pytest.mark.parametrize("storage", ["target", "int8"])
@pytest.mark.parametrize("name", ["hidden", "full_attention.keys", "teacher_logprobs"])
def test_no_shard_is_written_that_holds_what_is_no_number(
    name: str, storage: Storage, tmp_path: Path
) -> None:
    target, rows = make_target("gemma3"), conversations(2)
    tensors = extract_tensors(target, rows, DataConfig().teacher_top_k)
    settings = shard_settings(target, DataConfig().teacher_top_k, storage)
    tensors[name].view(-1)[3] = math.nan
    with pytest.raises(ValueError, match=name):
        write_shard(shard_path(tmp_path, 0), tensors, entries_of(rows, tensors), settings)
    assert not list(tmp_path.iterdir())

"""Weights of targets and heads that did not arrive: read under other names, or refused."""

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import Gemma4Config, Gemma4ForConditionalGeneration

from headstart.configs.schema import HeadConfig
from headstart.heads.loading import byte_tokenizer, load_target, tiny_target
from headstart.heads.pairing import build_assistant
from headstart.heads.saving import load_assistant, save_assistant
from headstart.heads.target import Target
from tests.helpers.checkpoints import checkpoint, configure, family, logits, rename, rewrite

MULTIMODAL = "gemma4-multimodal"


def loaded(folder: str) -> torch.Tensor:
    return logits(load_target(folder, "float32").model)


@pytest.fixture
def tiny_folder(tmp_path: Path) -> str:
    return checkpoint(tmp_path / "target", tiny_target("tiny-gemma4"))


@pytest.fixture
def head_folder(tmp_path: Path) -> str:
    target = Target(tiny_target("tiny-gemma4"), byte_tokenizer(), "tiny-gemma4")
    head: Any = build_assistant(target, HeadConfig())
    save_assistant(head, target.table, tmp_path / "head", 4, torch.float32)
    return str(tmp_path / "head")


@pytest.mark.parametrize(
    "saved_by",
    [
        lambda key: f"_orig_mod.{key}",
        lambda key: key.replace("model.layers.1.", "model.layers.1._orig_mod."),
        lambda key: f"_orig_mod.{key.replace('layers.1.', 'layers.1._orig_mod.')}",
        lambda key: f"module.{key}",
        lambda key: f"module._orig_mod.{key}",
        lambda key: f"base_model.model.{key}",
        lambda key: key.replace("layers.2.", "layers.2._checkpoint_wrapped_module."),
        lambda key: f"_fsdp_wrapped_module.{key}",
        lambda key: f"model.{key}",
        lambda key: key.removeprefix("model."),
        lambda key: key.replace("model.", "model.language_model."),
        lambda key: key.replace("model.", "language_model.model."),
    ],
    ids=[
        "torch.compile",
        "torch.compile-of-a-layer",
        "torch.compile-twice",
        "DataParallel",
        "DataParallel-of-torch.compile",
        "peft-not-unloaded",
        "checkpointed-layer",
        "FSDP",
        "Lightning",
        "no-lm-head",
        "multimodal",
        "multimodal-of-earlier-releases",
    ],
)
def test_a_checkpoint_saved_with_its_wrapper_has_the_logits_of_the_plain_one(
    tiny_folder: str, saved_by: Any
) -> None:
    wanted = logits(tiny_target("tiny-gemma4"))
    assert torch.equal(loaded(rename(tiny_folder, saved_by)), wanted)


@pytest.mark.parametrize("prefix", ["_orig_mod.", "module."])
def test_a_head_saved_with_its_wrapper_is_the_plain_one(head_folder: str, prefix: str) -> None:
    wanted = load_assistant(head_folder, torch.float32).state_dict()
    rename(head_folder, lambda key: prefix + key)
    found = load_assistant(head_folder, torch.float32).state_dict()
    for name, tensor in wanted.items():
        assert torch.equal(found[name], tensor), name


def test_the_prefix_that_was_taken_off_is_named(
    tiny_folder: str, capsys: pytest.CaptureFixture[str]
) -> None:
    loaded(rename(tiny_folder, lambda key: f"_orig_mod.{key}"))
    assert "_orig_mod.model." in capsys.readouterr().out


@pytest.mark.parametrize(
    "change",
    [
        lambda w: {k: v for k, v in w.items() if "layers.3.mlp" not in k},
        lambda w: {k: v for k, v in w.items() if "embed_tokens.weight" not in k},
        lambda w: {f"transformer.{k}": v for k, v in w.items()},
        lambda w: w | {"model.layers.0.self_attn.q_proj.lora_A.weight": torch.ones(2, 48)},
        lambda w: w | {"model.layers.6.mlp.up_proj.weight": torch.ones(64, 48)},
        lambda w: w | {"model.layers.1.mlp.up_proj.weight": torch.ones(32, 48)},
        lambda w: {k.replace("q_proj.w", "q_proj.base_layer.w"): v for k, v in w.items()},
    ],
    ids=[
        "a-shard-forgotten",
        "no-table",
        "another-trainer",
        "adapter-not-merged",
        "one-layer-more",
        "another-shape",
        "peft-half-unloaded",
    ],
)
def test_a_target_whose_weights_do_not_all_arrive_is_refused(tiny_folder: str, change: Any) -> None:
    with pytest.raises(ValueError, match=r"target: not all weights .* come from its files"):
        load_target(rewrite(tiny_folder, change), "float32")


@pytest.mark.parametrize(
    "change",
    [
        lambda w: {k: v for k, v in w.items() if "pre_projection" not in k},
        lambda w: {k.replace("layers.0", "layers.7"): v for k, v in w.items()},
        lambda w: {k: v[:, :-1] if "post_projection" in k else v for k, v in w.items()},
    ],
    ids=["no-projection", "other-layers", "another-width"],
)
def test_a_head_whose_weights_do_not_all_arrive_is_refused(head_folder: str, change: Any) -> None:
    with pytest.raises(ValueError, match=r"head: not all weights .* come from its files"):
        load_assistant(rewrite(head_folder, change), torch.float32)


def test_a_table_that_was_resized_after_config_json_names_vocab_size(tiny_folder: str) -> None:
    configure(tiny_folder, vocab_size=300)
    with pytest.raises(ValueError, match=r"embed_tokens.* \[320, 48\] .* vocab_size"):
        load_target(tiny_folder, "float32")


@pytest.mark.parametrize(
    "change",
    [
        lambda w: w | {"lm_head.weight": w["model.embed_tokens.weight"]},
        lambda w: w | {"model.layers.4.self_attn.k_proj.weight": torch.ones(32, 48)},
        lambda w: w | {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(8)},
        lambda w: w | {"model.vision_tower.patch_embedder.weight": torch.ones(4)},
    ],
    ids=["tied-table-twice", "keys-of-a-kv-shared-layer", "rotary-frequencies", "a-tower"],
)
def test_what_a_checkpoint_may_have_beside_its_model_changes_nothing(
    tiny_folder: str, change: Any
) -> None:
    assert torch.equal(loaded(rewrite(tiny_folder, change)), logits(tiny_target("tiny-gemma4")))


def test_the_text_part_of_a_multimodal_checkpoint_loads_as_the_text_class(tmp_path: Path) -> None:
    whole: Any = family(MULTIMODAL)
    folder = checkpoint(tmp_path / "text", whole)
    text = whole.config.get_text_config()
    (tmp_path / "text" / "config.json").unlink()
    text.architectures = ["Gemma4ForCausalLM"]
    text.save_pretrained(folder)
    torch.testing.assert_close(loaded(folder), logits(whole), atol=2e-5, rtol=0)


def test_text_weights_under_the_config_of_a_multimodal_class_are_refused(tmp_path: Path) -> None:
    folder = checkpoint(tmp_path / "target", family(MULTIMODAL))
    rewrite(folder, lambda w: {
        k.replace("language_model.", ""): v for k, v in w.items() if "language_model" in k
    })  # fmt: skip
    with pytest.raises(ValueError, match="not all weights of Gemma4ForConditionalGeneration"):
        load_target(folder, "float32")


def test_a_multimodal_checkpoint_with_a_tower_that_its_config_leaves_out_keeps_its_text(
    tmp_path: Path,
) -> None:
    whole: Any = family(MULTIMODAL)
    folder = checkpoint(tmp_path / "target", whole)
    config = Gemma4Config(text_config=whole.config.text_config.to_dict(), audio_config=None)
    config.vision_config = None
    Gemma4ForConditionalGeneration(config).config.save_pretrained(folder)
    assert torch.equal(loaded(folder), logits(whole))

"""Checkpoints whose weights are codes of a quantization, with and without what they mean."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import Gemma3ForCausalLM

from headstart.configs.schema import TargetConfig
from headstart.heads.loading import check_target, load_target
from headstart.heads.saving import load_assistant
from tests.helpers.checkpoints import checkpoint, configure, family, logits, rewrite, saved_head
from tests.helpers.models import gemma3_config, make_target, random_model

Weights = dict[str, torch.Tensor]
FP8 = {"quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": [128, 128]}


def coded(
    dtype: torch.dtype, scales: str | None = None, top: float = 0.0
) -> Callable[[Weights], Weights]:
    """The projections as codes up to `top` (0: as they are, cast), a scale each beside them."""

    def change(weights: Weights) -> Weights:
        found: Weights = {}
        for key, weight in weights.items():
            if not key.endswith("_proj.weight"):
                found[key] = weight
                continue
            scale = weight.abs().amax() / top if top else torch.ones(())
            codes = weight / scale
            found[key] = (codes if dtype.is_floating_point else codes.round()).to(dtype)
            if scales:
                found[key.removesuffix("weight") + scales] = scale.reshape(1, 1)
        return found

    return change


INT8, FLOAT8 = coded(torch.int8, top=127), coded(torch.float8_e4m3fn, top=448)


@pytest.mark.parametrize(
    ("change", "quantization"),
    [
        (INT8, None),
        (INT8, FP8),
        (INT8, {"quant_method": "of-another-program"}),
        (FLOAT8, None),
        (FLOAT8, FP8),
        (coded(torch.float8_e5m2), None),
        (coded(torch.int16, top=32767), None),
        (coded(torch.int8, "weight_scale", 127), None),
        (coded(torch.int8, "weight_scale", 127), {"quant_method": "of-another-program"}),
        (coded(torch.int8, "weight_scale", 127), FP8),
    ],
    ids=[
        "int8", "int8-called-fp8", "int8-of-another-program", "fp8", "fp8-without-scales",
        "cast-to-fp8", "int16", "config-forgotten", "scales-of-another-program",
        "scales-under-another-name",
    ],
)  # fmt: skip
def test_codes_whose_scales_nobody_reads_are_refused(
    tmp_path: Path, change: Any, quantization: dict[str, Any] | None
) -> None:
    folder = rewrite(checkpoint(tmp_path / "target", family("gemma4")), change)
    if quantization:
        configure(folder, quantization_config=quantization)
    with pytest.raises(ValueError, match=r"target: .*down_proj\.weight"):
        load_target(folder, "float32")


def test_codes_of_a_shard_are_known_before_weights_are_read(tmp_path: Path) -> None:
    folder = rewrite(checkpoint(tmp_path / "target", family("gemma4")), INT8)
    with pytest.raises(ValueError, match="I8"):
        check_target(TargetConfig(name=folder, dtype="float32"))


def test_fp8_with_its_scales_and_config_is_the_target_that_they_make(tmp_path: Path) -> None:
    folder = rewrite(
        checkpoint(tmp_path / "target", family("gemma4")),
        coded(torch.float8_e4m3fn, "weight_scale_inv", 448),
    )
    configure(folder, quantization_config=FP8)
    wanted = family("gemma4")
    with torch.no_grad():
        for name, weight in wanted.named_parameters():
            if name.endswith("_proj.weight"):
                scale = weight.abs().amax() / 448
                codes = (weight / scale).to(torch.float8_e4m3fn)
                weight.copy_(codes.float() * scale)
    torch.testing.assert_close(
        logits(load_target(folder, "float32").model), logits(wanted), atol=2e-5, rtol=0
    )


BNB4 = {
    "quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4",
    "bnb_4bit_compute_dtype": "float32",
}  # fmt: skip


@pytest.mark.parametrize(
    "quantization", [BNB4, {"quant_method": "bitsandbytes", "load_in_8bit": True}, FP8]
)
def test_a_quantization_that_a_merged_checkpoint_only_names_is_to_be_deleted(
    tmp_path: Path, quantization: dict[str, Any]
) -> None:
    folder = checkpoint(tmp_path / "target", family("gemma4"))
    configure(folder, quantization_config=quantization)
    with pytest.raises(ValueError, match=r"target: .*quantization_config.*target\.quantization"):
        check_target(TargetConfig(name=folder, dtype="float32"))


@pytest.mark.parametrize("bits", ["bnb-int8", "bnb-nf4"])
def test_a_target_that_bitsandbytes_saved_is_read_as_it_was(tmp_path: Path, bits: Any) -> None:
    # Weights are cut in blocks of 64, and processors with instructions for bfloat16 take no less.
    wide = gemma3_config(hidden_size=64, intermediate_size=128)
    plain = checkpoint(tmp_path / "plain", random_model(lambda: Gemma3ForCausalLM(wide)))
    target = load_target(plain, "float32", quantization=bits)
    target.model.save_pretrained(tmp_path / "saved")
    target.tokenizer.save_pretrained(tmp_path / "saved")
    found = load_target(str(tmp_path / "saved"), "float32").model
    assert torch.equal(logits(found), logits(target.model))


def test_a_head_of_codes_is_refused(tmp_path: Path) -> None:
    folder = rewrite(saved_head(tmp_path / "head", make_target("gemma4")), INT8)
    with pytest.raises(ValueError, match=r"head: .* I8"):
        load_assistant(folder, torch.float32)


def test_the_integers_of_an_ordered_head_are_no_codes(tmp_path: Path) -> None:
    shape: dict[str, Any] = {"num_centroids": 40, "centroid_intermediate_top_k": 8}
    target = make_target("gemma4")
    folder = saved_head(tmp_path / "head", target, use_ordered_embeddings=True, **shape)

    def ordered(weights: Weights) -> Weights:
        order = torch.arange(320)
        return {k: order if "ordering" in k else torch.ones_like(w) for k, w in weights.items()}

    assert load_assistant(rewrite(folder, ordered), torch.float32).masked_embedding is not None

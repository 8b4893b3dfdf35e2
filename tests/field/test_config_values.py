"""Numbers in config.json with which a model is built, and says something else or stops."""

from pathlib import Path
from typing import Any

import pytest
import torch

from headstart.configs.schema import TargetConfig
from headstart.heads.loading import check_target, load_target
from headstart.heads.saving import load_assistant
from tests.helpers.checkpoints import checkpoint, configure, family, logits, saved_head, text_part
from tests.helpers.models import make_target


def rope(**changes: Any) -> dict[str, Any]:
    return {
        "full_attention": {"rope_type": "linear", "rope_theta": 1e6, "factor": 8.0, **changes},
        "sliding_attention": {"rope_type": "default", "rope_theta": 10_000.0},
    }


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("gemma3", {"sliding_window": 0}),
        ("gemma3", {"sliding_window": -1}),
        ("gemma4", {"sliding_window": 0}),
        ("gemma4", {"max_position_embeddings": 0}),
        ("gemma4", {"rms_norm_eps": -1.0}),
        ("gemma4", {"rms_norm_eps": 100.0}),
        ("gemma4-moe", {"top_k_experts": 0}),
        ("gemma3", {"final_logit_softcapping": -30.0}),
        ("gemma3", {"query_pre_attn_scalar": 0}),
        ("gemma3", {"rope_parameters": rope(factor=-2.0)}),
        ("gemma3", {"rope_parameters": rope(factor=0.0)}),
        ("gemma3", {"rope_parameters": rope(rope_theta=-10.0)}),
    ],
)
def test_a_number_that_cannot_be_is_named_before_weights_are_read(
    tmp_path: Path, name: str, changes: dict[str, Any]
) -> None:
    folder = configure(checkpoint(tmp_path / "target", family(name)), **changes)
    key = "factor|rope_theta" if "rope_parameters" in changes else next(iter(changes))
    with pytest.raises(ValueError, match=f"config.json says .*({key})"):
        check_target(TargetConfig(name=folder, dtype="float32"))


@pytest.mark.parametrize(
    "changes", [{"top_k_experts": 0}, {"final_logit_softcapping": 30.0}, {"sliding_window": 8}]
)
def test_a_config_value_that_is_unused_or_right_is_taken(
    tmp_path: Path, changes: dict[str, Any]
) -> None:
    folder = configure(checkpoint(tmp_path / "target", family("gemma4")), **changes)
    assert torch.equal(logits(load_target(folder, "float32").model), logits(family("gemma4")))


@pytest.mark.parametrize("changes", [{"rms_norm_eps": -1.0}, {"sliding_window": 0}])
def test_a_head_with_a_number_that_cannot_be_is_refused(
    tmp_path: Path, changes: dict[str, Any]
) -> None:
    folder = text_part(saved_head(tmp_path / "head", make_target("gemma4")), **changes)
    with pytest.raises(ValueError, match=next(iter(changes))):
        load_assistant(folder, torch.float32)

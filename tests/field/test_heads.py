"""Heads that belong to another target, or to none: refused, or taken with a line."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch

from headstart.heads.pairing import check_pair, other_target
from headstart.heads.saving import MADE_FOR, load_assistant
from headstart.heads.target import Target
from tests.helpers.checkpoints import rewrite, saved_head, text_part
from tests.helpers.models import make_target


@pytest.mark.parametrize("family", ["gemma3", "gemma4", "gemma4-kv-sharing", "gemma4-unified"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_head_that_was_made_for_the_target_is_taken_without_a_word(
    tmp_path: Path, family: str, dtype: torch.dtype, capsys: pytest.CaptureFixture[str]
) -> None:
    target = make_target(family)
    head = load_assistant(saved_head(tmp_path / "head", target, dtype), torch.float32)
    check_pair(target, head)
    assert other_target(target, head) is None
    assert not capsys.readouterr().out


THETA = {"sliding_attention": {"rope_type": "default", "rope_theta": 1_000_000.0}}
STRETCHED = {"full_attention": {"rope_type": "linear", "rope_theta": 1_000_000.0, "factor": 8.0}}
WHOLE = {"full_attention": {"rope_type": "default", "rope_theta": 1_000_000.0}}


@pytest.mark.parametrize(
    ("rope", "family"),
    [
        (THETA, "gemma3"), (THETA, "gemma4"), (STRETCHED, "gemma3"), (STRETCHED, "gemma4"),
        (WHOLE, "gemma4"),
    ],
    ids=["theta-gemma3", "theta-gemma4", "stretched-gemma3", "stretched-gemma4", "rotated-whole"],
)  # fmt: skip
def test_a_head_whose_queries_are_rotated_otherwise_than_the_targets_keys_is_refused(
    tmp_path: Path, rope: dict[str, Any], family: str
) -> None:
    target = make_target(family)
    its = {kind: dict(part) for kind, part in target.config.rope_parameters.items()}
    head = load_assistant(
        text_part(saved_head(tmp_path / "head", target), rope_parameters=its | rope), torch.float32
    )
    with pytest.raises(ValueError, match="rope_parameters"):
        check_pair(target, head)


def test_a_head_that_spells_the_same_rotation_out_is_taken(tmp_path: Path) -> None:
    target = make_target("gemma4")
    rope = {kind: dict(part) for kind, part in target.config.rope_parameters.items()}
    rope["sliding_attention"] |= {"rope_theta": 10_000, "partial_rotary_factor": 1.0}
    head = load_assistant(
        text_part(saved_head(tmp_path / "head", target), rope_parameters=rope), torch.float32
    )
    check_pair(target, head)


@pytest.mark.parametrize("rows", [slice(None), slice(300, 301)], ids=["all-rows", "one-new-token"])
def test_a_head_as_wide_as_the_target_with_another_table_is_told(
    tmp_path: Path, rows: slice
) -> None:
    target = make_target("gemma4")
    folder = saved_head(tmp_path / "head", target)

    def other_rows(w: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        for key in w:
            if "embed_tokens" in key:
                w[key][rows] += 1
        return w

    head = load_assistant(rewrite(folder, other_rows), torch.float32)
    assert "table" in str(other_target(target, head))


def test_a_head_knows_its_target_in_another_dtype_by_the_weights(tmp_path: Path) -> None:
    """Under whatever name; and other weights under its name are others."""
    made = make_target("gemma4", torch.bfloat16)
    made.name, made.config.dtype = "runs/merged", torch.bfloat16
    head = load_assistant(saved_head(tmp_path / "head", made, hidden_size=32), torch.float32)
    setattr(head.config, MADE_FOR, made.identity)
    wide = copy.deepcopy(made.model).float()
    wide.config.dtype = torch.float32
    assert other_target(Target(wide, made.tokenizer, "elsewhere/merged"), head) is None
    tuned = copy.deepcopy(wide)
    with torch.no_grad():
        tuned.get_decoder().layers[0].mlp.up_proj.weight[0] += 1
    found = other_target(Target(tuned, made.tokenizer, made.name), head)
    assert "trained for runs/merged" in str(found)


def test_a_narrower_head_has_a_table_of_its_own(tmp_path: Path) -> None:
    target = make_target("gemma4")
    head = load_assistant(saved_head(tmp_path / "head", target, hidden_size=32), torch.float32)
    assert other_target(target, head) is None


@pytest.mark.parametrize(
    ("head_of", "family"), [("gemma4-unified", "gemma4"), ("gemma4", "gemma4-unified")]
)
def test_a_head_of_the_other_class_is_told(
    tmp_path: Path, head_of: str, family: str, capsys: pytest.CaptureFixture[str]
) -> None:
    target = make_target(family)
    folder = saved_head(tmp_path / "head", make_target(head_of), hidden_size=32)
    head = load_assistant(folder, torch.float32)
    check_pair(target, head)
    assert "gemma4_unified" in capsys.readouterr().out


@pytest.mark.parametrize(
    "part",
    ["", "embed_tokens", "pre_projection", "post_projection", "model.norm"],
    ids=["all", "table", "pre_projection", "post_projection", "norm"],
)
def test_a_head_whose_weights_are_zero_is_refused(tmp_path: Path, part: str) -> None:
    folder = saved_head(tmp_path / "head", make_target("gemma4"))
    rewrite(folder, lambda w: {k: v * 0 if part in k else v for k, v in w.items()})
    with pytest.raises(ValueError, match=r"head: .* zero"):
        load_assistant(folder, torch.float32)


def test_a_head_whose_layer_is_switched_off_is_refused(tmp_path: Path) -> None:
    folder = saved_head(tmp_path / "head", make_target("gemma4"))
    rewrite(folder, lambda w: {k: v * 0 if "layer_scalar" in k else v for k, v in w.items()})
    with pytest.raises(ValueError, match="layer_scalar"):
        load_assistant(folder, torch.float32)

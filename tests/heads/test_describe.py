"""What `headstart describe` counts is what the loaded models hold."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import Gemma4AssistantForCausalLM, GenerationConfig

from headstart.cli.main import main
from headstart.configs.schema import HeadConfig
from headstart.heads.describe import describe, target_step_weights
from headstart.heads.loading import gemma4_text_config, load_target_config, tiny_config
from headstart.heads.pairing import build_assistant
from headstart.heads.saving import save_assistant
from headstart.heads.target import Target
from headstart.heads.unroll import DraftHead
from tests.helpers.heads import ordered_head
from tests.helpers.models import make_target


def save(assistant: Any, folder: Path) -> Path:
    assistant.generation_config = GenerationConfig(num_assistant_tokens=3)
    assistant.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("width", [None, 32])
def test_parameters_are_those_of_the_loaded_model_and_those_that_train(
    width: int | None, tmp_path: Path
) -> None:
    config = tiny_config("tiny-gemma4")
    figures = describe(save(ordered_head(config, hidden_size=width), tmp_path / "head"))
    loaded = Gemma4AssistantForCausalLM.from_pretrained(tmp_path / "head")
    assert figures["parameters"] == sum(p.numel() for p in loaded.parameters())
    parts = figures["bytes_by_part"]
    state = loaded.state_dict()
    state.pop("lm_head.weight")  # tied: stored once
    stored = sum(tensor.nbytes for tensor in state.values())
    assert sum(n for dtypes in parts.values() for n in dtypes.values()) == stored
    assert parts["token_ordering"] == {"I64": 320 * 8}
    assert parts["centroids"] == {"F32": 20 * (width or 48) * 4}
    assert figures["bytes_on_disk"] == (tmp_path / "head" / "model.safetensors").stat().st_size
    assert figures["num_assistant_tokens"] == 3
    assert figures["architecture"] == "Gemma4AssistantForCausalLM"


@pytest.mark.parametrize("width", [None, 32])
def test_parameters_trained_are_those_of_the_head_in_training(
    width: int | None, tmp_path: Path
) -> None:
    target = make_target("gemma4")
    assistant = build_assistant(target, HeadConfig(hidden_size=width))
    head = DraftHead(assistant, None if width is None else torch.randn(48, width))
    save_assistant(assistant, head.table(target.table), tmp_path / "h", 4, torch.bfloat16)
    figures = describe(tmp_path / "h", target.config)
    assert figures["parameters_trained"] == sum(p.numel() for p in head.trainable().values())
    assert figures["parameters_shared"] == (320 * 48 if width is None else 0)
    assert figures["parameters_materialized"] == (0 if width is None else 320 * 32)
    assert figures["tie"] == ("full width" if width is None else "low-rank")
    assert figures["bytes_by_part"]["table"] == {"BF16": 320 * (width or 48) * 2}


def test_a_draft_step_reads_the_trunk_and_the_chosen_clusters(tmp_path: Path) -> None:
    assistant = ordered_head(tiny_config("tiny-gemma4"))
    step = describe(save(assistant, tmp_path / "head"))["draft_step"]
    assert step["lm_head_dense"] == 4 * 320 * 48
    assert step["lm_head_ordered"] == 4 * (20 + 4 * 16) * 48
    state = assistant.state_dict()
    left_out = ("embed_tokens.weight", "lm_head.weight", "centroids.weight", "token_ordering")
    trunk = sum(tensor.nbytes for name, tensor in state.items() if not name.endswith(left_out))
    assert step["trunk"] == trunk


def multiply_adds_of_one_token(target: Target) -> int:
    """Counted while the target runs, over its linear layers."""
    counted = []

    def note(module: nn.Module, args: tuple[torch.Tensor, ...], output: torch.Tensor) -> None:
        assert isinstance(module, nn.Linear)
        counted.append(module.weight.numel() * args[0].numel() // args[0].shape[-1])

    for module in target.model.modules():
        if isinstance(module, nn.Linear):
            module.register_forward_hook(note)
    with torch.no_grad():
        target.model(input_ids=torch.tensor([[5]]))
    return sum(counted)


def test_a_target_step_is_estimated_as_it_runs(target: Target) -> None:
    """All but the embedding lookups, of the experts those that a token goes to."""
    weights = target_step_weights(target.config)
    experts = 0
    if target.name == "gemma4-moe":
        used, width, inner = target.config.top_k_experts, 48, 16  # of 4 experts
        experts = target.config.num_hidden_layers * used * 3 * width * inner
    matrices = multiply_adds_of_one_token(target) + experts
    vectors = [p for p in target.model.get_decoder().parameters() if p.ndim == 1]
    assert weights == matrices + sum(p.numel() for p in vectors)


def test_c_is_a_ratio_of_bytes_in_one_dtype(tmp_path: Path) -> None:
    config = load_target_config("tiny-gemma4")
    assistant = ordered_head(config)
    ratios = []
    for dtype in (torch.float32, torch.bfloat16):
        figures = describe(save(assistant.to(dtype), tmp_path / str(dtype)), config)
        draft, target = figures["draft_step"], figures["target_step"]
        for kind in ("dense", "ordered"):
            read = draft["trunk"] + draft[f"lm_head_{kind}"]
            assert figures["c"][kind] == pytest.approx(read / target)
        assert target == target_step_weights(config) * dtype.itemsize
        ratios.append(figures["c"])
    assert ratios[0] == pytest.approx(ratios[1])
    assert ratios[0]["ordered"] < ratios[0]["dense"] < 1


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"hidden_size": 64}, "backbone_hidden_size is 48, and the target has 64"),
        ({"vocab_size": 512}, "vocab_size is 320, and the target has 512"),
    ],
)
def test_a_target_of_another_shape_is_refused_with_both_values(
    changes: dict[str, int], message: str, tmp_path: Path
) -> None:
    folder = save(ordered_head(tiny_config("tiny-gemma4")), tmp_path / "head")
    with pytest.raises(ValueError, match=message):
        describe(folder, gemma4_text_config(**changes))


def test_a_folder_without_a_head_is_refused_in_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no draft head at"):
        describe(tmp_path)
    make_target("gemma4").model.save_pretrained(tmp_path / "target")
    with pytest.raises(ValueError, match="is a gemma4_text model, not a Gemma 4 assistant"):
        describe(tmp_path / "target")
    folder = save(ordered_head(tiny_config("tiny-gemma4")), tmp_path / "head")
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(ValueError, match=r"head/model\.safetensors is damaged"):
        describe(folder)
    weights.unlink()
    with pytest.raises(ValueError, match=r"no readable model\.safetensors"):
        describe(folder)


def test_a_head_without_ordered_embeddings_or_k_says_so(tmp_path: Path) -> None:
    target = make_target("gemma3")
    assistant = build_assistant(target, HeadConfig())
    save_assistant(assistant, target.table, tmp_path / "head", 4, torch.float32)
    (tmp_path / "head" / "generation_config.json").unlink()
    figures = describe(tmp_path / "head", target.config)
    assert "ordered_embeddings" not in figures
    assert figures["num_assistant_tokens"] is None
    assert "lm_head_ordered" not in figures["draft_step"]
    assert figures["c"].keys() == {"dense"}


def test_describe_prints_and_fails_in_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = save(ordered_head(tiny_config("tiny-gemma4"), hidden_size=32), tmp_path / "head")
    assert main(["describe", str(folder), "target.name=tiny-gemma4"]) == 0
    printed = capsys.readouterr().out
    figures = describe(folder)
    assert f"{figures['parameters_trained']:,}" in printed
    assert "tokens per centroid" in printed
    assert "c: ordered" in printed
    assert "materialized" in printed
    assert main(["describe", str(tmp_path / "absent")]) == 1
    error = capsys.readouterr().err.strip().splitlines()
    assert "no draft head at" in error[-1]

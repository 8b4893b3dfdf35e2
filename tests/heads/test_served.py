"""Targets as people have them: with adapters, one after another, and with fewer bits."""

import json
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from headstart.configs.schema import TargetConfig
from headstart.eval.decoding import decode
from headstart.heads.adapters import split_revision
from headstart.heads.decoder import ExactDecoding
from headstart.heads.kernels import fast_kernels
from headstart.heads.loading import (
    byte_tokenizer,
    gemma3_config,
    load_served,
    load_target,
    load_target_tokens,
    noted_target,
    random_model,
    served_name,
)
from headstart.heads.target import Gemma3ForAssistedDecoding
from tests.helpers.checkpoints import make_adapter
from tests.helpers.heads import noisy_head

pytestmark = pytest.mark.contract

IDS = torch.tensor([[2, 70, 71, 72, 73, 74]])


def states(**served: Any) -> torch.Tensor:
    target = load_served(TargetConfig(name="tiny-gemma4", dtype="float32", **served))
    return target.activations(IDS).hidden


def test_adapters_change_the_target_merged_or_beside_it_alike(tmp_path: Path) -> None:
    one, two = make_adapter(tmp_path / "one"), make_adapter(tmp_path / "two", seed=1)
    plain = states()
    first, both = states(adapters=[one]), states(adapters=[one, two])
    assert not torch.allclose(plain, first, atol=1e-3)
    assert not torch.allclose(first, both, atol=1e-3)
    kept = states(adapters=[one, two], merge_adapters=False)
    torch.testing.assert_close(kept, both, atol=2e-5, rtol=1e-4)


def test_an_adapter_beside_the_weights_has_their_dtype(tmp_path: Path) -> None:
    adapter = make_adapter(tmp_path / "one")
    for dtype in (torch.bfloat16, torch.float32):
        target = load_target(
            "tiny-gemma4", str(dtype)[6:], adapters=[adapter], merge_adapters=False
        )
        own = {p.dtype for name, p in target.model.named_parameters() if ".lora_" in name}
        assert own == {dtype}


@pytest.mark.parametrize("merge", [True, False])
def test_an_adapter_of_other_layers_is_refused_and_a_fitting_one_says_nothing(
    merge: bool, tmp_path: Path
) -> None:
    """Its weights would stay random, and the target another one each time that it is loaded."""
    adapter = Path(make_adapter(tmp_path / "one"))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        load_target("tiny-gemma4", "float32", adapters=[str(adapter)], merge_adapters=merge)
    weights = load_file(adapter / "adapter_model.safetensors")
    moved = {k.replace("layers.", "encoder.layers."): v for k, v in weights.items()}
    save_file(moved, adapter / "adapter_model.safetensors", metadata={"format": "pt"})
    with pytest.raises(
        ValueError, match=r"does not go onto .* as a PEFT adapter: .*match no module"
    ):
        load_target("tiny-gemma4", "float32", adapters=[str(adapter)], merge_adapters=merge)
    config = json.loads((adapter / "adapter_config.json").read_text())
    prompt = config | {"peft_type": "PROMPT_TUNING", "num_virtual_tokens": 4}
    (adapter / "adapter_config.json").write_text(json.dumps(prompt))
    with pytest.raises(ValueError, match="it learns a prompt"):
        load_target("tiny-gemma4", "float32", adapters=[str(adapter)], merge_adapters=merge)


def test_each_way_to_serve_has_a_fingerprint_and_a_name(tmp_path: Path) -> None:
    adapter = make_adapter(tmp_path / "one")
    ways = [
        TargetConfig(name="tiny-gemma4", dtype="float32"),
        TargetConfig(name="tiny-gemma4", dtype="float32", adapters=[adapter]),
        TargetConfig(name="tiny-gemma4", dtype="float32", quantization="torchao-int8"),
    ]
    targets = [load_served(way) for way in ways]
    assert len({target.fingerprint for target in targets}) == 3
    assert targets[1].fingerprint == load_served(ways[1]).fingerprint
    for way, target in zip(ways, targets, strict=True):
        again = noted_target(target.identity)
        assert again.model_copy(update={"dtype": way.dtype}) == way
        assert load_target_tokens(way).settings == target.settings


def test_adapters_that_differ_in_their_factor_alone_make_other_targets(tmp_path: Path) -> None:
    """Beside the weights it stands in no tensor: answers and activations of the one would be taken
    for those of the other."""
    adapter = make_adapter(tmp_path / "one")
    config = Path(adapter) / "adapter_config.json"
    settings = json.loads(config.read_text())
    prints = set()
    for changed in ({}, {"lora_alpha": 32}, {"use_rslora": True}):
        config.write_text(json.dumps(settings | changed))
        for merges in (True, False):
            way = TargetConfig(
                name="tiny-gemma4", dtype="float32", adapters=[adapter], merge_adapters=merges
            )
            target = load_served(way)
            prints.add(target.fingerprint)
            assert target.fingerprint == load_served(way).fingerprint
    assert len(prints) == 6


def test_a_name_tells_adapters_and_quantization() -> None:
    kept: dict[str, Any] = {"adapters": ["a/b@main", "c"], "merge_adapters": False}
    name = served_name(TargetConfig(name="ORG/my (v2)", quantization="bnb-nf4", **kept))
    assert name == "ORG/my (v2) + a/b@main + c (bnb-nf4)"
    assert served_name(TargetConfig(name="ORG/my (v2)")) == "ORG/my (v2)"
    assert split_revision("a/b@main") == ("a/b", "main")
    assert split_revision("c") == ("c", None)


@pytest.mark.parametrize("name", ["tiny-gemma4", "tiny-gemma3"])
def test_a_target_in_int8_drafts_and_keeps_its_text(name: str) -> None:
    """Close to the target that it comes from, another one all the same, and decoded exactly."""
    whole = load_target(name, "float32")
    target = load_target(name, "float32", quantization="torchao-int8")
    assert target.table.dtype == torch.float32, "the head shares it"
    near, far = target.activations(IDS).hidden, whole.activations(IDS).hidden
    assert 1e-6 < float((near - far).norm() / far.norm()) < 0.2
    head = noisy_head(target)
    ids = IDS[0].tolist()
    plain = decode(target, ids, 12)
    assisted = decode(target, ids, 12, head.assistant, 3, ExactDecoding())
    assert assisted.tokens == plain.tokens
    with fast_kernels(target.model):
        torch.testing.assert_close(target.activations(IDS).hidden, near, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("bits", ["bnb-int8", "bnb-nf4"])
def test_bitsandbytes_weights_are_read_and_drafted_for(tmp_path: Path, bits: Any) -> None:
    wide = gemma3_config(hidden_size=64, intermediate_size=128)  # weights are cut in blocks of 64
    random_model(lambda: Gemma3ForAssistedDecoding(wide)).save_pretrained(tmp_path / "target")
    byte_tokenizer().save_pretrained(tmp_path / "target")
    way = TargetConfig(name=str(tmp_path / "target"), dtype="float32", quantization=bits)
    target, whole = load_served(way), load_target(way.name, "float32")
    near, far = target.activations(IDS).hidden, whole.activations(IDS).hidden
    assert 1e-6 < float((near - far).norm() / far.norm()) < 0.6
    assert target.fingerprint != whole.fingerprint
    head = noisy_head(target)
    ids = IDS[0].tolist()
    plain = decode(target, ids, 12).tokens
    assisted = decode(target, ids, 12, head.assistant, 3, ExactDecoding()).tokens
    # LLM.int8() takes the columns with outliers from all rows of a batch, so that a verification of
    # four rows says other things than four steps of one.
    assert assisted == plain if bits == "bnb-nf4" else len(assisted) == len(plain)


def test_adapters_stay_whole_beside_int8_weights(tmp_path: Path) -> None:
    adapter = make_adapter(tmp_path / "one")
    int8 = states(adapters=[adapter], merge_adapters=False, quantization="torchao-int8")
    wanted = states(adapters=[adapter])
    assert float((int8 - wanted).norm() / wanted.norm()) < 0.2
    assert not torch.allclose(int8, states(quantization="torchao-int8"), atol=1e-3)


def test_a_folder_that_is_no_adapter_is_refused_by_name(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=r"empty does not go onto .*no adapter_model\.safetensors"):
        states(adapters=[str(tmp_path / "empty")])
    other = make_adapter(tmp_path / "other", "tiny-gemma3")
    with pytest.raises(ValueError, match="other does not go onto Gemma4"):
        states(adapters=[other])


def test_combinations_that_cannot_be_raise() -> None:
    with pytest.raises(ValueError, match="merge_adapters=false"):
        TargetConfig(adapters=["a"], quantization="bnb-nf4")
    with pytest.raises(ValueError, match="leave out sharded or quantization"):
        TargetConfig(sharded=True, quantization="torchao-int8")
    with pytest.raises(ValueError, match="has none to read"):
        load_target("tiny-gemma4", "float32", quantization="bnb-nf4")


@pytest.mark.parametrize("note", [{}, {"name": 3}, {"name": "x", "config": ["y"]}, "x"])
def test_a_note_that_is_none_of_a_target_is_refused(note: Any) -> None:
    with pytest.raises(ValueError, match="note of a target"):
        noted_target(note)

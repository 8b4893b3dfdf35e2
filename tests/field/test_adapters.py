"""Adapters as people have them: peft's own logits, or a refusal; never the plain base untold."""

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PrefixTuningConfig, get_peft_model

from headstart.configs.schema import HeadConfig, TargetConfig
from headstart.heads.loading import byte_tokenizer, check_target, load_target, tiny_target
from headstart.heads.pairing import build_assistant
from headstart.heads.saving import load_assistant, save_assistant
from headstart.heads.target import Target
from tests.helpers.checkpoints import (
    TEXT_OF_MULTIMODAL,
    adapter,
    checkpoint,
    configure,
    family,
    logits,
    rename,
    rewrite,
)

CONFIG = "adapter_config.json"
MULTIMODAL, TEXT = "gemma4-multimodal", "gemma4-kv-sharing"
BOTH_WAYS = pytest.mark.parametrize("merge", [True, False], ids=["merged", "kept"])


def served(target: str, *adapters: str, merge: bool = True, dtype: str = "float32") -> torch.Tensor:
    return logits(load_target(target, dtype, adapters=adapters, merge_adapters=merge).model)


def close(found: torch.Tensor, wanted: torch.Tensor) -> None:
    torch.testing.assert_close(found, wanted, atol=2e-5, rtol=0)


@pytest.fixture
def pair(tmp_path: Path) -> dict[str, Any]:
    """A multimodal checkpoint and the same as a text class, with equal weights."""
    whole = family(MULTIMODAL)
    folders = {MULTIMODAL: checkpoint(tmp_path / "multimodal", whole)}
    text: Any = type(family("gemma4"))(whole.config.get_text_config())
    parts: Any = whole.model
    text.model.load_state_dict(parts.language_model.state_dict())
    folders[TEXT] = checkpoint(tmp_path / "text", text)
    return folders


@BOTH_WAYS
@pytest.mark.parametrize("dora", [False, True], ids=["LoRA", "DoRA"])
def test_an_adapter_saved_on_the_multimodal_class_changes_the_text_class(
    pair: dict[str, str], tmp_path: Path, dora: bool, merge: bool
) -> None:
    lora = {"target_modules": TEXT_OF_MULTIMODAL, "use_dora": dora}
    own, wanted = adapter(tmp_path / "a", family(MULTIMODAL), **lora)
    close(served(pair[TEXT], own, merge=merge), wanted)


@BOTH_WAYS
@pytest.mark.parametrize("dora", [False, True], ids=["LoRA", "DoRA"])
def test_an_adapter_saved_on_the_text_class_changes_the_multimodal_class(
    pair: dict[str, str], tmp_path: Path, dora: bool, merge: bool
) -> None:
    """Its target_modules name the layers of the vision tower too, for which it has no weights."""
    text = load_target(pair[TEXT], "float32").model
    own, wanted = adapter(tmp_path / "a", text, use_dora=dora)
    close(served(pair[MULTIMODAL], own, merge=merge), wanted)


@BOTH_WAYS
def test_ranks_of_single_layers_go_with_the_names_of_the_class(
    pair: dict[str, str], tmp_path: Path, merge: bool
) -> None:
    lora = {
        "target_modules": TEXT_OF_MULTIMODAL,
        "rank_pattern": {"model.language_model.layers.1.self_attn.q_proj": 4},
        "alpha_pattern": {r"language_model\.layers\.2\.mlp\.up_proj": 32},
    }
    own, wanted = adapter(tmp_path / "a", family(MULTIMODAL), **lora)
    close(served(pair[TEXT], own, merge=merge), wanted)


def test_an_adapter_of_tower_and_text_changes_the_text_class_as_far_as_text_goes(
    pair: dict[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    lora = {"target_modules": r".*(language_model\.layers\.\d+\.mlp\.up_proj|o_proj\.linear)"}
    own, wanted = adapter(tmp_path / "a", family(MULTIMODAL), **lora)
    close(served(pair[TEXT], own), wanted)
    assert "of images and sound" in capsys.readouterr().out
    rename(own, lambda key: key.replace("language_model.layers", "layers"))
    close(served(pair[TEXT], own), wanted)


def test_an_adapter_of_the_tower_alone_is_refused(pair: dict[str, str], tmp_path: Path) -> None:
    lora = {"target_modules": r".*vision_tower.*(q|v)_proj\.linear"}
    own, _ = adapter(tmp_path / "a", family(MULTIMODAL), **lora)
    for folder in pair.values():
        with pytest.raises(ValueError, match=r"a does not go onto .* only images or sound"):
            served(folder, own)


@BOTH_WAYS
@pytest.mark.parametrize(
    "saved_by",
    [
        lambda key: key.replace("layers.", "language_model.layers."),
        lambda key: key.replace("model.model.", "model._orig_mod.model."),
        lambda key: f"module.{key}",
        lambda key: key.removeprefix("base_model.model."),
        lambda key: key.replace(".lora_A.", ".lora_A.default.").replace("B.w", "B.default.w"),
    ],
    ids=["earlier-multimodal", "torch.compile", "DataParallel", "no-prefix", "raw-state-dict"],
)
def test_an_adapter_saved_under_other_names_has_its_effect(
    tmp_path: Path, saved_by: Any, merge: bool
) -> None:
    own, wanted = adapter(tmp_path / "a", tiny_target("tiny-gemma4"))
    close(served("tiny-gemma4", rename(own, saved_by), merge=merge), wanted)


@BOTH_WAYS
@pytest.mark.parametrize(
    "change",
    [
        lambda w: {k.replace("q_proj", "query"): v for k, v in w.items()},
        lambda w: {k.replace("layers.", "layers.9"): v for k, v in w.items()},
        lambda w: {k: v for k, v in w.items() if "layers.1" not in k},
        lambda w: w | {"base_model.model.score.weight": torch.ones(2, 48)},
        lambda w: {k: v * (".lora_A." in k) for k, v in w.items()},
        lambda w: {k: v * (".lora_B." in k) for k, v in w.items()},
    ],
    ids=["other-modules", "other-layers", "some-missing", "a-classifier", "B-zero", "A-zero"],
)
@pytest.mark.parametrize("place", ["alone", "second"])
def test_an_adapter_that_does_not_arrive_or_changes_nothing_is_refused(
    tmp_path: Path, change: Any, merge: bool, place: str
) -> None:
    """As a second one it went on untold: peft says nothing then."""
    own, _ = adapter(tmp_path / "own", tiny_target("tiny-gemma4"))
    first, _ = adapter(tmp_path / "first", tiny_target("tiny-gemma4"))
    adapters = [rewrite(own, change)] if place == "alone" else [first, rewrite(own, change)]
    with pytest.raises(ValueError, match="own does not go onto Gemma4ForCausalLM"):
        served("tiny-gemma4", *adapters, merge=merge)


@BOTH_WAYS
@pytest.mark.parametrize(
    "changes",
    [{"target_modules": ["q_proj"]}, {"lora_alpha": 0}, {"r": 3}],
    ids=["layers-not-named", "alpha-0", "another-rank"],
)
def test_a_config_that_keeps_an_adapter_from_its_effect_is_refused(
    tmp_path: Path, changes: dict[str, Any], merge: bool
) -> None:
    own, _ = adapter(tmp_path / "own", tiny_target("tiny-gemma4"))
    configure(own, CONFIG, **changes)
    with pytest.raises(ValueError, match="own does not go onto Gemma4ForCausalLM"):
        served("tiny-gemma4", own, merge=merge)


def test_an_untrained_adapter_is_refused_before_a_weight_of_its_target_is_loaded(
    tmp_path: Path,
) -> None:
    own, _ = adapter(tmp_path / "own", tiny_target("tiny-gemma4"))
    rewrite(own, lambda w: {k: v * (".lora_A." in k) for k, v in w.items()})
    with pytest.raises(ValueError, match=r"own .* changes nothing"):
        check_target(TargetConfig(name="tiny-gemma4", adapters=[own]))


def test_an_effect_that_merging_rounds_away_is_refused(tmp_path: Path) -> None:
    own, _ = adapter(tmp_path / "own", tiny_target("tiny-gemma4"))
    rewrite(own, lambda w: {k: v * (1e-12 if ".lora_B." in k else 1) for k, v in w.items()})
    with pytest.raises(ValueError, match=r"own .* changes nothing"):
        served("tiny-gemma4", own, dtype="bfloat16")


@BOTH_WAYS
def test_an_untrained_dora_is_refused(tmp_path: Path, merge: bool) -> None:
    config = LoraConfig(r=2, target_modules=["q_proj"], use_dora=True)
    get_peft_model(tiny_target("tiny-gemma4"), config).save_pretrained(str(tmp_path / "own"))
    with pytest.raises(ValueError, match=r"own .* changes nothing"):
        served("tiny-gemma4", str(tmp_path / "own"), merge=merge)


@BOTH_WAYS
@pytest.mark.parametrize("name", ["gemma3", "gemma4", "gemma4-moe", "gemma4-unified"])
def test_dora_has_the_logits_of_peft(tmp_path: Path, name: str, merge: bool) -> None:
    target = checkpoint(tmp_path / "target", family(name))
    own, wanted = adapter(tmp_path / "own", family(name), use_dora=True)
    close(served(target, own, merge=merge), wanted)


@pytest.mark.parametrize(
    "saved_by",
    [
        lambda key: key.replace("vector", "vector.weight"),
        lambda key: key.replace("vector", "vector.default"),
        lambda key: key.replace("vector", "vector.default.weight"),
    ],
)
@pytest.mark.parametrize("place", [0, 1])
def test_magnitudes_under_other_names_are_read_beside_another_adapter(
    tmp_path: Path, saved_by: Any, place: int
) -> None:
    """As a second one their magnitudes stayed those of the plain weights."""
    dora, _ = adapter(tmp_path / "dora", tiny_target("tiny-gemma4"), use_dora=True)
    adapters = [adapter(tmp_path / "lora", tiny_target("tiny-gemma4"))[0]]
    adapters.insert(place, dora)
    wanted = served("tiny-gemma4", *adapters, merge=False)
    rename(dora, saved_by)
    close(served("tiny-gemma4", *adapters, merge=False), wanted)


@pytest.mark.parametrize("place", ["alone", "second"])
def test_dora_without_its_magnitudes_is_refused(tmp_path: Path, place: str) -> None:
    dora, _ = adapter(tmp_path / "dora", tiny_target("tiny-gemma4"), use_dora=True)
    rewrite(dora, lambda w: {k: v for k, v in w.items() if "magnitude" not in k})
    lora, _ = adapter(tmp_path / "lora", tiny_target("tiny-gemma4"))
    with pytest.raises(ValueError, match="dora does not go onto"):
        served("tiny-gemma4", *([dora] if place == "alone" else [lora, dora]), merge=False)


def test_adapters_that_learn_a_prompt_are_refused(tmp_path: Path) -> None:
    config = PrefixTuningConfig(num_virtual_tokens=3, task_type="CAUSAL_LM")
    get_peft_model(tiny_target("tiny-gemma4"), config).save_pretrained(str(tmp_path / "own"))
    for kind in ("PREFIX_TUNING", "PROMPT_TUNING", "P_TUNING", "ADAPTION_PROMPT"):
        configure(tmp_path / "own", CONFIG, peft_type=kind)
        with pytest.raises(ValueError, match=r"own does not go onto .*prompt"):
            check_target(TargetConfig(name="tiny-gemma4", adapters=[str(tmp_path / "own")]))


@pytest.mark.parametrize("kind", ["XLORA", "CPT", "NOVEL", None, 3])
def test_an_adapter_of_another_kind_is_refused(tmp_path: Path, kind: Any) -> None:
    own, _ = adapter(tmp_path / "own", tiny_target("tiny-gemma4"))
    configure(own, CONFIG, peft_type=kind)
    with pytest.raises(ValueError, match="own does not go onto"):
        served("tiny-gemma4", own)


def test_an_activated_lora_is_refused(tmp_path: Path) -> None:
    own, _ = adapter(tmp_path / "own", tiny_target("tiny-gemma4"), alora_invocation_tokens=[71])
    with pytest.raises(ValueError, match=r"own does not go onto .* activated LoRA"):
        served("tiny-gemma4", own, merge=False)


def test_added_tokens_are_known_without_weights(tmp_path: Path) -> None:
    own, _ = adapter(tmp_path / "own", tiny_target("tiny-gemma4"))
    table = torch.ones(330, 48)  # that peft saves beside it after resize_token_embeddings
    names = ("model.embed_tokens.weight", "lm_head.weight")
    rewrite(own, lambda w: w | {f"base_model.model.{name}": table for name in names})
    target = TargetConfig(name="tiny-gemma4", adapters=[own])
    with pytest.raises(ValueError, match=r"own .* 330 rows, .* 320"):
        check_target(target)
    plain, _ = adapter(tmp_path / "plain", tiny_target("tiny-gemma4"))
    tokenizer = byte_tokenizer()
    tokenizer.add_tokens([f"<new{i}>" for i in range(80)])
    tokenizer.save_pretrained(plain)
    with pytest.raises(ValueError, match=r"plain has .* tokens .*320.*<new"):
        check_target(TargetConfig(name="tiny-gemma4", adapters=[plain]))


def test_added_tokens_for_which_the_table_has_room_go_on(tmp_path: Path) -> None:
    own, wanted = adapter(tmp_path / "own", tiny_target("tiny-gemma4"))
    tokenizer = byte_tokenizer()
    tokenizer.add_tokens(["<new>"])
    tokenizer.save_pretrained(own)
    close(served("tiny-gemma4", own), wanted)


def test_an_adapter_of_a_head_that_changes_nothing_is_refused(tmp_path: Path) -> None:
    target = Target(tiny_target("tiny-gemma4"), byte_tokenizer(), "tiny-gemma4")
    head: Any = build_assistant(target, HeadConfig())
    save_assistant(head, target.table, tmp_path / "head", 4, torch.float32)
    plain: Any = load_assistant(tmp_path / "head", torch.float32)
    torch.manual_seed(0)
    own = get_peft_model(plain, LoraConfig(r=2, lora_alpha=4, target_modules=["q_proj"]))
    own.save_pretrained(str(tmp_path / "own"))  # untrained
    name = f"{tmp_path / 'head'}+{tmp_path / 'own'}"
    with pytest.raises(ValueError, match=r"own does not go onto Gemma4Assistant.* changes nothing"):
        load_assistant(name, torch.float32)
    rewrite(tmp_path / "own", lambda w: {k: torch.ones_like(v) for k, v in w.items()})
    again: Any = load_assistant(name, torch.float32)
    changed, before = (
        m.model.layers[0].self_attn.q_proj.weight
        for m in (again, load_assistant(tmp_path / "head", torch.float32))
    )
    torch.testing.assert_close(changed, before + 4 * torch.ones_like(before))  # alpha / r * r


def test_an_adapter_with_more_files_than_its_own_is_read_from_safetensors(tmp_path: Path) -> None:
    own, wanted = adapter(tmp_path / "own", tiny_target("tiny-gemma4"))
    (tmp_path / "own" / "optimizer.pt").write_bytes(b"version https://git-lfs")
    (tmp_path / "own" / "trainer_state.json").write_text("{")
    close(served("tiny-gemma4", own), wanted)
    shutil.move(f"{own}/{CONFIG}", f"{own}/config.json")
    with pytest.raises(ValueError, match=f"own does not go onto .* no {CONFIG}"):
        served("tiny-gemma4", own)


def test_an_adapter_with_biases_of_its_own_is_kept_beside_the_weights(tmp_path: Path) -> None:
    target = checkpoint(tmp_path / "target", family("gemma4"))
    own, wanted = adapter(tmp_path / "own", family("gemma4"), lora_bias=True)
    with pytest.raises(ValueError, match=r"own .*target\.merge_adapters=false"):
        check_target(TargetConfig(name=target, adapters=[own]))
    kept = load_target(target, "float32", adapters=[own], merge_adapters=False)
    torch.testing.assert_close(logits(kept.model), wanted, atol=2e-5, rtol=0)

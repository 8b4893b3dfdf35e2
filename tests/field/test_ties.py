"""The tied pair: embedding table and LM head stay one table, or the target is refused."""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from headstart.cli.main import main
from headstart.configs.schema import TargetConfig
from headstart.heads.loading import check_target, load_target, tiny_target
from tests.helpers.checkpoints import (
    IDS,
    adapter,
    checkpoint,
    configure,
    logits,
    rewrite,
    saved_head,
)
from tests.helpers.models import make_target

TABLE, LM_HEAD = "model.embed_tokens.weight", "lm_head.weight"


def check_logits(target: Any, wanted: torch.Tensor) -> None:
    """The model's own logits, and those that the head is taught, are the wanted ones."""
    torch.testing.assert_close(logits(target.model), wanted, atol=2e-5, rtol=0)
    taught = target.logits(target.activations(IDS).hidden)
    torch.testing.assert_close(taught, wanted, atol=2e-5, rtol=0)


@pytest.mark.parametrize(
    ("module", "merge"),
    [("lm_head", True), ("lm_head", False), ("embed_tokens", True)],
)
def test_lora_on_one_side_of_the_tied_pair_is_refused(
    tmp_path: Path, module: str, merge: bool
) -> None:
    own, _ = adapter(
        tmp_path / "own", tiny_target("tiny-gemma4"), target_modules=["q_proj", module]
    )
    with pytest.raises(ValueError, match=rf"own .* {module}.*target_modules"):
        load_target("tiny-gemma4", "float32", adapters=[own], merge_adapters=merge)


def test_lora_on_both_sides_tied_by_peft_is_refused(tmp_path: Path) -> None:
    """Merged, each side's change was added to the one table."""
    lora: dict[str, Any] = {"target_modules": ["embed_tokens"], "ensure_weight_tying": True}
    own, _ = adapter(tmp_path / "own", tiny_target("tiny-gemma4"), **lora)
    for merge in (True, False):
        with pytest.raises(ValueError, match=r"own .*target_modules"):
            load_target("tiny-gemma4", "float32", adapters=[own], merge_adapters=merge)


def test_lora_on_the_embeddings_kept_beside_them_has_the_logits_of_peft(tmp_path: Path) -> None:
    modules = ["q_proj", "embed_tokens"]
    own, wanted = adapter(tmp_path / "own", tiny_target("tiny-gemma4"), target_modules=modules)
    check_logits(
        load_target("tiny-gemma4", "float32", adapters=[own], merge_adapters=False), wanted
    )


@pytest.mark.parametrize("modules", [["lm_head"], ["embed_tokens"], ["embed_tokens", "lm_head"]])
def test_tables_of_an_adapter_that_are_not_tied_are_refused(
    tmp_path: Path, modules: list[str]
) -> None:
    own, _ = adapter(tmp_path / "own", tiny_target("tiny-gemma4"), modules_to_save=modules)
    names = [f"base_model.model.{LM_HEAD}", f"base_model.model.{TABLE}"]
    rewrite(own, lambda w: w | {k: torch.randn(320, 48) for k in names if k in w})
    for merge in (True, False):
        with pytest.raises(ValueError, match=r"own .*ensure_weight_tying=True"):
            load_target("tiny-gemma4", "float32", adapters=[own], merge_adapters=merge)


def test_tables_of_an_adapter_that_peft_ties_are_the_table(tmp_path: Path) -> None:
    lora: dict[str, Any] = {"modules_to_save": ["embed_tokens"], "ensure_weight_tying": True}
    own, _ = adapter(tmp_path / "own", tiny_target("tiny-gemma4"), **lora)
    table = torch.randn(320, 48)
    rewrite(own, lambda w: {k: table if k.endswith((TABLE, LM_HEAD)) else v for k, v in w.items()})
    target = load_target("tiny-gemma4", "float32", adapters=[own])
    assert torch.equal(target.table, table)
    check_logits(target, logits_with(tiny_target("tiny-gemma4"), own))


def logits_with(model: Any, own: str) -> torch.Tensor:
    from peft import PeftModel

    wrapped: Any = PeftModel.from_pretrained(model, own)
    return logits(wrapped)


def test_trained_tokens_are_rows_of_the_table_merged_and_refused_beside_it(tmp_path: Path) -> None:
    lora = {"trainable_token_indices": [70, 71]}
    own, _ = adapter(tmp_path / "own", tiny_target("tiny-gemma4"), **lora)
    rewrite(own, lambda w: {k: v + 0.05 * ("trainable" in k) for k, v in w.items()})
    wanted = logits_with(tiny_target("tiny-gemma4"), own)
    check_logits(load_target("tiny-gemma4", "float32", adapters=[own]), wanted)
    with pytest.raises(ValueError, match=r"own .*target\.merge_adapters=true"):
        load_target("tiny-gemma4", "float32", adapters=[own], merge_adapters=False)


def untied(folder: Path, change: Any) -> str:
    own = checkpoint(folder, tiny_target("tiny-gemma4"))
    configure(own, tie_word_embeddings=False)
    return rewrite(own, lambda w: w | {LM_HEAD: change(w[TABLE].clone())})


def test_equal_tables_that_config_json_calls_untied_are_tied(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    target = load_target(untied(tmp_path / "target", lambda table: table), "float32")
    check_logits(target, logits(tiny_target("tiny-gemma4")))
    assert target.model.get_output_embeddings().weight is target.table
    assert target.config.tie_word_embeddings
    assert "tied" in capsys.readouterr().out


def test_an_adapter_goes_onto_equal_tables_that_config_json_calls_untied(tmp_path: Path) -> None:
    own, wanted = adapter(tmp_path / "own", tiny_target("tiny-gemma4"))
    base = untied(tmp_path / "target", lambda table: table)
    for merge in (True, False):
        check_logits(load_target(base, "float32", adapters=[own], merge_adapters=merge), wanted)


def test_another_lm_head_is_refused_whatever_config_json_says(tmp_path: Path) -> None:
    own = untied(tmp_path / "target", lambda table: table + 0.1)
    for said in (False, True):
        configure(own, tie_word_embeddings=said)
        with pytest.raises(ValueError, match=r"target: it lacks tied embeddings .*frozen"):
            load_target(own, "float32")


@pytest.mark.parametrize("tuned", [False, True], ids=["base", "tuned"])
def test_adapt_refuses_another_lm_head_before_anything_is_answered(
    tmp_path: Path, tuned: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    other, same = tmp_path / "other", tmp_path / "same"
    untied(other, lambda table: table + 0.1)
    untied(same, lambda table: table)
    head = saved_head(tmp_path / "head", make_target("gemma4-kv-sharing"))
    (tmp_path / "p.jsonl").write_text("".join(f'{{"prompt": "{n} {n}?"}}\n' for n in range(30)))
    target, base = (other, same) if tuned else (same, other)
    assert main([
        "adapt", head, f"target.name={target}", f"adapt.base={base}",
        f"data.prompts={tmp_path / 'p.jsonl'}", "adapt.held_out_prompts=2",
        f"output_dir={tmp_path / 'out'}",
    ]) == 1  # fmt: skip
    assert "other" in (said := capsys.readouterr().err)
    assert "tied embeddings" in said
    assert not (tmp_path / "out").exists()


def test_tables_in_two_files_are_compared_too(tmp_path: Path) -> None:
    own = Path(untied(tmp_path / "target", lambda table: table + 0.1))
    weights = load_file(own / "model.safetensors")
    parts = {"1": {LM_HEAD}, "2": weights.keys() - {LM_HEAD}}
    for part, keys in parts.items():
        save_file({k: weights[k] for k in keys}, own / f"model-0000{part}-of-00002.safetensors")
    (own / "model.safetensors").unlink()
    with pytest.raises(ValueError, match="tied embeddings"):
        check_target(TargetConfig(name=str(own)))


def test_a_tied_checkpoint_with_the_lm_head_alone_is_read(tmp_path: Path) -> None:
    own = checkpoint(tmp_path / "target", tiny_target("tiny-gemma4"))
    rewrite(own, lambda w: {LM_HEAD if k == TABLE else k: v for k, v in w.items()})
    check_logits(load_target(own, "float32"), logits(tiny_target("tiny-gemma4")))

"""`headstart check`: one table of what is let in, what is changed and what is refused."""

import json
from pathlib import Path

import pytest
import torch

from headstart.cli.main import main
from headstart.configs.schema import TargetConfig
from headstart.eval.check import check_inputs
from headstart.heads.loading import load_target
from headstart.heads.tiny import tiny_target
from tests.conftest import make_target
from tests.field.checkpoints import adapter, checkpoint, family, logits, rewrite, saved_target
from tests.heads.test_parity import noisy_head


def results(
    target: str, *adapters: str, heads: tuple[str, ...] = (), prompts: tuple[str, ...] = ()
) -> dict[str, tuple[str, str]]:
    t = TargetConfig(name=target, dtype="float32", adapters=list(adapters))
    return {f.kind: (f.result, " ".join(f.lines)) for f in check_inputs(t, heads, prompts, "cpu")}


def test_all_that_is_right_is_called_good(tmp_path: Path) -> None:
    noisy_head(make_target("gemma3")).assistant.save_pretrained(tmp_path / "head")
    (tmp_path / "rows.jsonl").write_text(json.dumps({"text": "raw"}) + "\n")
    found = results(
        saved_target(tmp_path / "target", generation={}),
        heads=(str(tmp_path / "head"),),
        prompts=(str(tmp_path / "rows.jsonl"),),
    )
    assert {kind: result for kind, (result, _) in found.items()} == {
        "target": "good", "tokenizer": "good", "head": "good", "prompts": "good",
    }  # fmt: skip


def test_a_text_adapter_on_a_multimodal_target_is_taken_and_its_new_names_are_told(
    tmp_path: Path,
) -> None:
    """With the logits that peft gives the text model that it was tuned on."""
    whole = checkpoint(tmp_path / "target", family("gemma4-multimodal"))
    target = load_target(whole, "float32")
    text = tiny_target("tiny-gemma4")
    text.load_state_dict(
        {
            key.replace("model.language_model.", "model."): weight
            for key, weight in target.model.state_dict().items()
            if key.startswith(("model.language_model.", "lm_head."))
        },
        strict=False,
    )
    folder, wanted = adapter(tmp_path / "adapter", text)
    result, lines = results(whole, folder)["target"]
    assert result == "noted", lines
    assert folder in lines
    tuned = load_target(whole, "float32", adapters=[folder])
    torch.testing.assert_close(logits(tuned.model), wanted, atol=2e-5, rtol=0)


def test_a_broken_checkpoint_is_refused_and_ends_the_command_with_a_failure(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = checkpoint(tmp_path / "target", family("gemma3"))
    rewrite(folder, lambda w: {k: v for k, v in w.items() if "layers.2.mlp" not in k})
    capsys.readouterr()
    assert main(["check", folder, "--prompts", "data/prompts/text_eval.jsonl"]) == 1
    out = capsys.readouterr()
    assert "refused" in out.out
    assert "layers.2.mlp" in "".join(out.out.split())
    assert out.err.count("\n") == 1


def test_the_adapter_at_fault_is_told_from_its_target(tmp_path: Path) -> None:
    good, _ = adapter(tmp_path / "good", family("gemma3"))
    zero, _ = adapter(tmp_path / "zero", family("gemma3"))
    rewrite(zero, lambda w: {k: v * 0 if "lora_B" in k else v for k, v in w.items()})
    t = TargetConfig(name="tiny-gemma3", dtype="float32", adapters=[good, zero])
    found = [(f.kind, f.name, f.result) for f in check_inputs(t, [], [], "cpu")]
    assert found == [
        ("target", "tiny-gemma3", "good"), ("adapter", good, "good"), ("adapter", zero, "refused"),
    ]  # fmt: skip


def test_prompts_that_cannot_be_used_are_refused_with_their_number(tmp_path: Path) -> None:
    rows = [{"prompt": "fine"}, {"prompt": "a<eos>b"}, {"prompt": "c<bos>"}]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    result, lines = results("tiny-gemma3", prompts=(str(tmp_path / "rows.jsonl"),))["prompts"]
    assert result == "refused"
    assert lines.startswith("2 of 3")
    assert "<eos>" in lines


@pytest.mark.real
def test_the_demo_target_is_good() -> None:
    found = results("gemma3-270m", prompts=("data/prompts/text_eval.jsonl",))
    assert [result for result, _ in found.values()] == ["good", "good", "noted"]

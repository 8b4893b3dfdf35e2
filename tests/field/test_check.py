"""`headstart check`: one table of what is let in, what is changed and what is refused."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from headstart.cli.main import main
from headstart.configs.schema import DataConfig, SourceConfig, TargetConfig
from headstart.eval.check import check_inputs
from headstart.heads.loading import load_target, tiny_target
from tests.helpers.chat_templates import GEMMA3, chat_tokenizer
from tests.helpers.checkpoints import adapter, checkpoint, family, logits, rewrite, saved_target
from tests.helpers.heads import noisy_head
from tests.helpers.models import make_target


def results(
    target: str, *adapters: str, heads: tuple[str, ...] = (), prompts: tuple[str, ...] = ()
) -> dict[str, tuple[str, str]]:
    t = TargetConfig(name=target, dtype="float32", adapters=list(adapters))
    sources = [SourceConfig(path=path) for path in prompts]
    data = DataConfig().model_copy(update={"prompts": sources})
    return {
        f.kind: (f.result, " ".join(f.lines)) for f in check_inputs(t, data, heads, None, "cpu")
    }


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
    assert main(["check", f"target.name={folder}", "data.prompts=builtin:text_eval"]) == 1
    out = capsys.readouterr()
    assert "refused" in out.out
    assert "layers.2.mlp" in "".join(out.out.split())
    [line] = [line for line in out.err.splitlines() if not line.startswith("Loading")]
    assert "refused" in line


def test_the_adapter_at_fault_is_told_from_its_target(tmp_path: Path) -> None:
    good, _ = adapter(tmp_path / "good", family("gemma3"))
    zero, _ = adapter(tmp_path / "zero", family("gemma3"))
    rewrite(zero, lambda w: {k: v * 0 if "lora_B" in k else v for k, v in w.items()})
    t = TargetConfig(name="tiny-gemma3", dtype="float32", adapters=[good, zero])
    data = DataConfig().model_copy(update={"prompts": []})
    found = [(f.kind, f.name, f.result) for f in check_inputs(t, data, [], None, "cpu")]
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


@pytest.mark.parametrize("bad", [{"other": 1}, {"prompt": "a<eos>b"}])
def test_a_bad_row_in_200_is_skipped_by_a_training_and_refused_by_an_evaluation(
    bad: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [*({"prompt": f"fine {i}"} for i in range(200)), bad]
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    code, table, _ = checked(capsys, "target.name=tiny-gemma3", f"data.prompts={path}")
    assert (code, "noted" in table, "prompts: 200" in table) == (0, True, True)
    code, table, _ = checked(capsys, "target.name=tiny-gemma3", f"eval.prompts={path}")
    assert (code, "refused" in table) == (1, True)


def checked(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    """Exit code, the table in one line, and what stands beside it."""
    code = main(["check", *arguments, "target.dtype=float32"])
    out = capsys.readouterr()
    return code, " ".join(out.out.replace("│", " ").split()), out.err


def test_the_table_alone_is_on_standard_output(capsys: pytest.CaptureFixture[str]) -> None:
    code = main(["check", "target.name=tiny-gemma3", "data.prompts=builtin:text_eval"])
    out = capsys.readouterr()
    assert code == 0
    assert out.out[0] in "┏╭+"
    assert "Loading" in out.err


def test_settings_of_a_run_are_those_of_the_check(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Columns, bad rows, and the template with its variables."""
    monkeypatch.setenv("COLUMNS", "600")  # no cell of the table is broken into lines
    rows = [{"question": "hi", "said": "yo"}, {"other": 1}]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "t.jinja").write_text("{{ raise_exception('no') if off }}" + GEMMA3)
    (tmp_path / "run.yaml").write_text(
        f"target: {{name: gemma3-270m, chat_template: {tmp_path / 't.jinja'}}}\n"
        f"data:\n  max_bad_rows: 0.6\n  prompts:\n    - path: {tmp_path / 'rows.jsonl'}\n"
        "      columns: {prompt: question, response: said}\n"
    )
    tokenizer = chat_tokenizer(None)
    folder = saved_target(tmp_path / "target", tokenizer=tokenizer, generation={})
    named = f"target.name={folder}"
    run = ["--config", str(tmp_path / "run.yaml")]
    code, table, err = checked(capsys, named, *run)
    assert code == 0, err
    assert "prompts: 1, of them with an answer: 1" in table
    assert "has a chat template" in table
    alone = f"data.prompts={tmp_path / 'rows.jsonl'}"
    assert checked(capsys, named, alone)[0] == 1, "without the run's settings"
    code, table, _ = checked(capsys, named, *run, "data.chat_template_kwargs={off: true}")
    assert code == 1
    assert "1 of 1 rows cannot be used" in table


def test_a_setting_comes_before_those_of_a_file(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    own, _ = adapter(tmp_path / "own", family("gemma3"))
    (tmp_path / "run.yaml").write_text("target: {name: tiny-gemma4, adapters: [nowhere]}\n")
    run = ["--config", str(tmp_path / "run.yaml")]
    code, table, _ = checked(capsys, "target.name=tiny-gemma3", f"target.adapters={own}", *run)
    assert code == 0
    assert "nowhere" not in table


@pytest.mark.parametrize(
    ("name", "nearest"),
    [("gemma3-27b", "gemma3-270m"), ("tiny-gema4", "tiny-gemma4"), ("Gemma3_270m", "gemma3-270m")],
)
def test_a_built_in_name_that_was_misspelled_is_not_looked_for_on_the_hub(
    name: str, nearest: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def asked(*_: object, **__: object) -> None:
        raise AssertionError("the Hub was asked")

    monkeypatch.setattr("transformers.AutoConfig.from_pretrained", asked)
    with pytest.raises(ValueError, match=f"nearest of these is {nearest}"):
        load_target(name)


@pytest.mark.real
def test_the_demo_target_is_good() -> None:
    found = results("gemma3-270m", prompts=("data/prompts/text_eval.jsonl",))
    assert [result for result, _ in found.values()] == ["good", "good", "noted"]

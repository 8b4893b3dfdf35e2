"""Code that comes with a checkpoint runs where it was asked for, by a setting, and nowhere else."""

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from headstart.cli.main import main
from headstart.configs.schema import TargetConfig
from headstart.heads import loading
from headstart.heads.adapters import add_adapters
from headstart.heads.loading import (
    byte_tokenizer,
    check_target,
    load_target,
    load_target_config,
    noted_target,
)
from headstart.heads.saving import load_assistant, load_assistant_config
from headstart.serve.engines import export_for_engine
from tests.helpers.checkpoints import adapter, checkpoint, configure, family, make_adapter
from tests.helpers.heads import NARROW, finished

CODE = """
from pathlib import Path
from transformers import PretrainedConfig, PreTrainedTokenizerFast
Path({mark!r}).touch()
class Evil(PreTrainedTokenizerFast): pass
class EvilConfig(PretrainedConfig): model_type = "evil"
"""


@pytest.fixture
def mark(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Is there once a stranger's code has run. The user would say yes to whatever is asked."""
    monkeypatch.setattr("builtins.input", lambda _: "yes")
    monkeypatch.setenv("HF_MODULES_CACHE", str(tmp_path / "modules"))
    return tmp_path / "has-run"


def spoil(folder: str | Path, name: str, mark: Path, **more: Any) -> str:
    """Let a file of a folder name code that lies beside it."""
    (Path(folder) / "evil.py").write_text(CODE.format(mark=str(mark)))
    return configure(folder, name, **more)


def test_an_adapters_tokenizer_runs_no_code(tmp_path: Path, mark: Path) -> None:
    adapter = make_adapter(tmp_path / "adapter")
    byte_tokenizer().save_pretrained(adapter)
    auto_map = {"AutoTokenizer": [None, "evil.Evil"]}
    spoil(adapter, "tokenizer_config.json", mark, auto_map=auto_map, tokenizer_class="Evil")
    with pytest.raises(ValueError, match="adapter"):
        check_target(TargetConfig(name="tiny-gemma4", adapters=[adapter]))
    assert not mark.exists()


def test_an_adapters_tokenizer_is_not_trusted_because_the_target_is(
    tmp_path: Path, mark: Path
) -> None:
    adapter = make_adapter(tmp_path / "adapter")
    byte_tokenizer().save_pretrained(adapter)
    auto_map = {"AutoTokenizer": [None, "evil.Evil"]}
    spoil(adapter, "tokenizer_config.json", mark, auto_map=auto_map)
    target = TargetConfig(name="tiny-gemma4", adapters=[adapter], trust_remote_code=True)
    check_target(target)  # its class is known, so that the code is not needed
    assert not mark.exists()


def test_a_heads_configuration_runs_no_code(tmp_path: Path, mark: Path) -> None:
    head = finished(load_target("tiny-gemma4", "float32"), tmp_path / "head", NARROW)
    auto_map = {"AutoConfig": "evil.EvilConfig"}
    spoil(head, "config.json", mark, auto_map=auto_map, model_type="evil")
    for name in (str(head), f"{head}+{tmp_path / 'adapter'}"):
        with pytest.raises(ValueError, match="head"):
            load_assistant_config(name)
    assert not mark.exists()


def test_what_is_exported_names_no_code_of_strangers(tmp_path: Path, mark: Path) -> None:
    """The user's name stands over it then."""
    head = finished(load_target("tiny-gemma4", "float32"), tmp_path / "head", NARROW)
    spoil(head, "config.json", mark, auto_map={"AutoModel": "some-org/evil--evil.Evil"})
    target = checkpoint(tmp_path / "target", family("gemma4"))
    auto_map = {"AutoTokenizer": [None, "some-org/evil--evil.Evil"]}
    spoil(target, "tokenizer_config.json", mark, auto_map=auto_map)
    out = tmp_path / "out"
    command = ["export", str(head), "transformers", f"target.name={target}", f"output_dir={out}"]
    assert main([*command, "export.dtype=float32"]) == 0
    assert [path for path in out.iterdir() if b"evil" in path.read_bytes()] == []
    mine, theirs = (load_assistant(path, torch.float32).state_dict() for path in (head, out))
    assert all(torch.equal(mine[key], theirs[key]) for key in mine)
    ids = [read("naive")["input_ids"] for read in (byte_tokenizer(), loading._read_tokenizer(out))]
    assert ids[0] == ids[1]
    assert not mark.exists()


def test_code_of_a_trusted_target_is_not_passed_on(
    tmp_path: Path, mark: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A class that transformers made of it would be saved with its module."""
    # Where transformers puts the code: below the home, which may be read-only.
    modules = str(tmp_path / "modules")
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", modules)
    monkeypatch.setattr("sys.path", [*sys.path])  # which transformers lengthens
    head = finished(load_target("tiny-gemma4", "float32"), tmp_path / "head", NARROW)
    target = checkpoint(tmp_path / "target", family("gemma4"))
    auto_map = {"AutoTokenizer": [None, "evil.Evil"]}
    spoil(target, "tokenizer_config.json", mark, auto_map=auto_map, tokenizer_class="Evil")
    trusted = TargetConfig(name=target, trust_remote_code=True)
    tokenizer = loading.load_target_tokens(trusted).tokenizer
    assert mark.exists()
    config = load_target_config(target, trust_remote_code=True)
    out = tmp_path / "out"
    export_for_engine(head, "transformers", config, tokenizer, out, False, torch.float32)
    assert sorted(path.name for path in out.glob("*.py")) == []
    assert "auto_map" not in json.loads((out / "tokenizer_config.json").read_text())


def test_a_run_file_that_turns_trust_on_is_told_once(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    target = checkpoint(tmp_path / "target", family("gemma4"))
    said = []
    for trust in ("false", "true"):
        (tmp_path / "run.yaml").write_text(
            f"target: {{name: {target}, trust_remote_code: {trust}}}\n"
        )
        assert main(["train", "--plan", "--config", str(tmp_path / "run.yaml")]) == 0
        said.append(capsys.readouterr().out.count("trust_remote_code"))
    assert said == [0, 1]


@pytest.mark.parametrize("where", ["target", "head"])
def test_a_checkpoint_brings_no_kernels_of_the_hub(where: str, tmp_path: Path) -> None:
    """Native code, which transformers takes without a word where `kernels` is installed."""
    if where == "target":
        folder: str | Path = checkpoint(tmp_path / "target", family("gemma4"))
        load: Any = load_target_config
    else:
        folder = finished(load_target("tiny-gemma4", "float32"), tmp_path / "head", NARROW)
        load = load_assistant_config
    load(folder)
    configure(folder, attn_implementation="some-org/evil-attention")
    with pytest.raises(ValueError, match="attn_implementation"):
        load(folder)


def test_an_adapter_that_names_others_brings_none_of_them(tmp_path: Path) -> None:
    """peft asked the Hub for them."""
    folder, _ = adapter(tmp_path / "adapter", family("gemma4"))
    mixed = {"peft_type": "XLORA", "hidden_size": 8, "adapters": {"0": "some-org/evil-adapter"}}
    (Path(folder) / "adapter_config.json").write_text(json.dumps(mixed))
    model = family("gemma4")
    model.config.use_cache = False  # as X-LoRA wants it
    with pytest.raises(ValueError, match="mixes other adapters"):
        add_adapters(model, [folder], merge=True)


def test_a_head_does_not_say_whose_code_runs(tmp_path: Path, mark: Path) -> None:
    """Nor do conversations: `headstart adapt` loads the target that a head names."""
    target = checkpoint(tmp_path / "target", family("gemma4"))
    auto_map = {"AutoConfig": "evil.EvilConfig"}
    spoil(target, "config.json", mark, auto_map=auto_map, model_type="evil")
    trusting = {"name": target, "trust_remote_code": True, "chat_template": "/etc/passwd"}
    noted = noted_target({"name": target, "config": trusting})
    assert noted == TargetConfig(name=target)
    with pytest.raises(ValueError, match="custom code"):
        check_target(noted)
    assert not mark.exists()

"""What engines would refuse is said before; what is exported reads back."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from headstart.cli.main import main
from headstart.configs.schema import HeadConfig
from headstart.configs.settings import ExportConfig
from headstart.heads.assistant import assistant_config
from headstart.heads.loading import load_target
from headstart.heads.pairing import build_assistant
from headstart.heads.saving import OFFSET, load_assistant, save_assistant
from headstart.heads.target import Target
from headstart.serve import litert
from headstart.serve.engines import (
    ENGINES,
    Engine,
    engine_warnings,
    export_for_engine,
    incompatibilities,
)
from headstart.serve.litert import export_for_litert
from tests.helpers.heads import FULL, NARROW, finished, noisy_head
from tests.helpers.models import make_target


def config_of(target: Target, **head: Any) -> Any:
    return assistant_config(target.config, HeadConfig(**head))


@pytest.mark.parametrize(
    ("engine", "family", "head", "says"),
    [
        ("llama.cpp", "gemma4", {}, "as wide as its target"),
        ("llama.cpp", "gemma3", {"hidden_size": 24}, "Gemma 4 targets alone"),
        ("mlx", "gemma4", {"hidden_size": 24}, "multimodal"),
        ("litert", "gemma4-moe", {}, "a mixture of experts is not exported"),
    ],
)  # fmt: skip
def test_a_head_that_an_engine_cannot_load_is_refused_by_name(
    engine: Engine, family: str, head: dict[str, Any], says: str
) -> None:
    target = make_target(family)
    found = incompatibilities(engine, config_of(target, **head), target.model.config)
    assert len(found) == 1
    assert says in found[0]


@pytest.mark.parametrize("engine", ENGINES)
def test_a_head_that_no_engine_can_load_is_refused_by_name(engine: Engine) -> None:
    target = make_target("gemma4-multimodal")
    config = config_of(target, hidden_size=24)
    assert incompatibilities(engine, config, target.model.config) == []
    config.text_config.layer_types = ["full_attention"] * 2
    config.text_config.num_kv_shared_layers = 1
    config.tie_word_embeddings = False
    found = " ".join(incompatibilities(engine, config, target.model.config))
    assert all(part in found for part in ("no sliding_attention", "num_kv_shared_layers", "tied"))


def test_a_kind_that_no_engine_serves_is_refused_before_one_is_installed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    target, place = make_target("gemma4"), tmp_path / "head"
    head = build_assistant(target, HeadConfig(kind="mtp"))
    save_assistant(head, target.table, place, 3, torch.float32)
    config, out = target.model.config, tmp_path / "out"
    with pytest.raises(ValueError, match=r"llama.cpp serves no mtp head"):
        export_for_engine(place, "llama.cpp", config, target.tokenizer, out, True, torch.float32)
    asked = ["target.name=tiny-gemma4", f"output_dir={out}"]
    assert main(["serve-check", str(place), "llama.cpp", *asked]) == 1
    assert "llama.cpp serves no mtp head" in capsys.readouterr().err


@pytest.mark.parametrize("width", [NARROW, FULL])
def test_an_exported_head_drafts_as_its_dense_self(
    tmp_path: Path, width: int | None, capsys: pytest.CaptureFixture[str]
) -> None:
    """bfloat16, without clusters, with both of the keys that engines read, and the tokenizer."""
    start = finished(load_target("tiny-gemma4", "float32"), tmp_path / "start", width)
    out = tmp_path / "out"
    command = ["export", str(start), "vllm", "target.name=tiny-gemma4", f"output_dir={out}"]
    if width is not None:  # it has clusters, which vLLM reads on a GPU alone
        assert main(command) == 0
        assert "for a CPU export with export.dense=true" in capsys.readouterr().out
        shutil.rmtree(out)
    assert main([*command, "export.dense=true"]) == 0
    assert "CPU" not in capsys.readouterr().out
    text = json.loads((out / "config.json").read_text())["text_config"]
    assert text["global_head_dim"] == 32
    assert "per_layer_config" in text
    assert (out / "tokenizer.json").is_file()
    theirs, ours = (load_assistant(path, torch.bfloat16) for path in (out, start))
    assert not theirs.config.use_ordered_embeddings
    there, here = theirs.state_dict(), ours.state_dict()
    assert all(torch.equal(there[name], here[name]) for name in there)
    assert {name for name in here if name not in there} == {
        name for name in here if name.startswith("masked_embedding.")
    }


def test_full_layers_with_kv_heads_of_their_own_say_so_as_engines_read_it(tmp_path: Path) -> None:
    """As those of 12B, 26B-A4B and 31B."""
    target = make_target("gemma4-moe")
    head = noisy_head(target).assistant
    save_assistant(head, target.table, tmp_path / "head", 4, torch.float32)
    text = json.loads((tmp_path / "head" / "config.json").read_text())["text_config"]
    assert (text["num_key_value_heads"], text["num_global_key_value_heads"]) == (2, 1)


def test_an_export_that_cannot_be_leaves_everything_as_it_was(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    start = finished(load_target("tiny-gemma4", "float32"), tmp_path / "start", FULL)
    command = ["export", str(start), "export.dense=true"]
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    wrong = {
        ("vllm", "target.name=tiny-gemma4"): (start, "is not empty"),
        ("vllm", "target.name=tiny-gemma3"): (tmp_path / "out", "does not fit"),
        ("vllm", "target.name=tiny-gemma4", "export.dtype=int8"): (tmp_path / "out", "of litert"),
        ("vllm", "target.name=tiny-gemma4", "export.num_assistant_tokens=2"): (
            tmp_path / "out", "of litert",
        ),
        ("vllm", "target.name=tiny-gemma4", "target.adapters=[a]"): (tmp_path / "out", "merge"),
        ("llama.cpp", "target.name=tiny-gemma4"): (tmp_path / "out", "headstart install"),
        ("litert", "target.name=tiny-gemma3"): (tmp_path / "out", "does not fit"),
        ("litert", "target.name=tiny-gemma4"): (tmp_path / "out", "1024 positions"),
        ("litert", "target.name=tiny-gemma4", "export.cache_length=64"): (
            tmp_path / "out", "headstart install",
        ),
        ("litert", "target.name=tiny-gemma4", "export.dtype=bfloat16"): (
            tmp_path / "out", "float32, or int8",
        ),
    }  # fmt: skip
    for options, (out, says) in wrong.items():
        assert main([*command, f"output_dir={out}", *options]) == 1
        assert says in capsys.readouterr().err
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before


@pytest.mark.parametrize(
    ("trained", "told"),
    [(0, {"vllm", "mlx", "litert"}), (-1, {"transformers", "llama.cpp"})],
)
def test_an_engine_that_puts_drafts_elsewhere_is_told(trained: int, told: set[str]) -> None:
    config = config_of(make_target("gemma4"))
    setattr(config, OFFSET, trained)
    found = {
        engine for engine in ENGINES if any("RoPE" in r for r in engine_warnings(engine, config))
    }
    assert found == told
    setattr(config, OFFSET, "mixed")
    assert not any("RoPE" in r for engine in ENGINES for r in engine_warnings(engine, config))


@pytest.mark.parametrize(
    ("drafts", "cache_length", "named"),
    [(200, 64, "num_assistant_tokens"), (None, 1, "cache_length"), (4, 5, "cache_length")],
)
def test_a_cache_that_holds_no_verification_is_refused_before_the_target_is_loaded(
    drafts: int | None, cache_length: int, named: str, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """In the engine one would be written over rows of the text."""
    monkeypatch.setattr(litert, "engine_python", lambda engine: Path())
    target = make_target("gemma3")
    path = finished(target, tmp_path / "start", None)

    def load() -> Target:
        raise AssertionError("the target is loaded")

    export = ExportConfig(num_assistant_tokens=drafts, cache_length=cache_length)
    with pytest.raises(ValueError, match=named):
        export_for_litert(path, target.model.config, load, tmp_path / "out", export)
    assert not (tmp_path / "out").exists()

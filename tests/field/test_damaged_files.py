"""Files that are damaged, cut short, missing or pointers: named with the fix, before any work."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from headstart.configs.loader import load_settings
from headstart.configs.schema import HeadConfig, TargetConfig
from headstart.heads.loading import (
    byte_tokenizer,
    check_target,
    load_target,
    load_target_config,
    tiny_target,
)
from headstart.heads.pairing import build_assistant
from headstart.heads.saving import load_assistant_config, save_assistant
from headstart.heads.target import Target
from headstart.train.adapt import adapt
from headstart.train.adaptation import adapt_defaults
from tests.helpers.checkpoints import LFS_POINTER, adapter, checkpoint, configure, rewrite

DAMAGE: dict[str, Callable[[bytes], bytes]] = {
    "LFS": lambda content: LFS_POINTER,
    "cut": lambda content: content[: int(0.6 * len(content))],
    "empty": lambda content: b"",
    "zeros": lambda content: bytes(len(content)),
    "HTML": lambda content: b"<!DOCTYPE html><html><body>404</body></html>",
}
DAMAGED = pytest.mark.parametrize("damage", DAMAGE.values(), ids=DAMAGE)


def spoil(path: Path, damage: Callable[[bytes], bytes]) -> None:
    path.write_bytes(damage(path.read_bytes()))


def head(folder: Path) -> str:
    target = Target(tiny_target("tiny-gemma4"), byte_tokenizer(), "tiny-gemma4")
    fresh: Any = build_assistant(target, HeadConfig())
    save_assistant(fresh, target.table, folder, 4, torch.float32)
    return str(folder)


@DAMAGED
@pytest.mark.parametrize(
    "name",
    [
        "config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json",
        "model.safetensors",
    ],
)  # fmt: skip
def test_a_damaged_file_of_a_target_is_named_before_its_weights_are_read(
    tmp_path: Path, name: str, damage: Any
) -> None:
    folder = checkpoint(tmp_path / "target", tiny_target("tiny-gemma4"))
    spoil(tmp_path / "target" / name, damage)
    with pytest.raises(ValueError, match=rf"{name} is .*(download|copy)"):
        load_target_config(folder)


@DAMAGED
@pytest.mark.parametrize("name", ["config.json", "generation_config.json", "model.safetensors"])
def test_a_damaged_file_of_a_head_is_named(tmp_path: Path, name: str, damage: Any) -> None:
    folder = head(tmp_path / "head")
    spoil(tmp_path / "head" / name, damage)
    with pytest.raises(ValueError, match=rf"head/{name} is .*(download|copy)"):
        load_assistant_config(folder)


@DAMAGED
@pytest.mark.parametrize("name", ["adapter_config.json", "adapter_model.safetensors"])
def test_a_damaged_file_of_an_adapter_is_named_before_the_weights_of_the_target(
    tmp_path: Path, name: str, damage: Any
) -> None:
    own, _ = adapter(tmp_path / "own", tiny_target("tiny-gemma4"))
    spoil(tmp_path / "own" / name, damage)
    with pytest.raises(ValueError, match=rf"own/{name} is .*(download|copy)"):
        check_target(TargetConfig(name="tiny-gemma4", adapters=[own]))


@DAMAGED
def test_a_damaged_tokenizer_beside_an_adapter_is_named(tmp_path: Path, damage: Any) -> None:
    own, _ = adapter(tmp_path / "own", tiny_target("tiny-gemma4"))
    byte_tokenizer().save_pretrained(own)
    spoil(tmp_path / "own" / "tokenizer.json", damage)
    with pytest.raises(ValueError, match=r"own/tokenizer.json is .*(download|copy)"):
        check_target(TargetConfig(name="tiny-gemma4", adapters=[own]))


def test_a_missing_tokenizer_is_named_with_the_files_to_copy(tmp_path: Path) -> None:
    folder = checkpoint(tmp_path / "target", tiny_target("tiny-gemma4"))
    (tmp_path / "target" / "tokenizer.json").unlink()
    with pytest.raises(ValueError, match=r"target has no tokenizer.*copy tokenizer\.json"):
        load_target(folder, "float32")
    own, _ = adapter(tmp_path / "own", tiny_target("tiny-gemma4"))
    byte_tokenizer().save_pretrained(own)
    (tmp_path / "own" / "tokenizer.json").unlink()
    with pytest.raises(ValueError, match=r"own has no tokenizer.*copy tokenizer\.json"):
        check_target(TargetConfig(name="tiny-gemma4", adapters=[own]))


def test_a_shard_that_is_damaged_or_missing_is_named(tmp_path: Path) -> None:
    folder = tmp_path / "target"
    checkpoint(folder, tiny_target("tiny-gemma4"))
    (folder / "model.safetensors").unlink()
    tiny_target("tiny-gemma4").save_pretrained(folder, max_shard_size="200KB")
    shards = sorted(folder.glob("model-*.safetensors"))
    assert len(shards) > 1
    whole = shards[1].read_bytes()
    spoil(shards[1], DAMAGE["LFS"])
    with pytest.raises(ValueError, match=f"{shards[1].name} is a Git LFS pointer"):
        load_target_config(str(folder))
    shards[1].unlink()
    with pytest.raises(ValueError, match=shards[1].name):
        load_target(str(folder), "float32")
    shards[1].write_bytes(whole)
    load_target(str(folder), "float32")


def test_pointers_of_files_that_are_not_read_do_no_harm(tmp_path: Path) -> None:
    folder = checkpoint(tmp_path / "target", tiny_target("tiny-gemma4"))
    for name in (
        "pytorch_model.bin",
        "tokenizer.model",
        "consolidated.safetensors",
        "._config.json",
    ):
        (tmp_path / "target" / name).write_bytes(LFS_POINTER)
    load_target(folder, "float32")


@pytest.mark.parametrize("content", [LFS_POINTER, b"", b"PK\x03\x04" + bytes(100)])
def test_a_gguf_that_is_none_is_named(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "model.gguf").write_bytes(content)
    with pytest.raises(ValueError, match=r"model.gguf is .*(download|copy)"):
        load_target(str(tmp_path / "model.gguf"), "float32")


def fails_at_once(tmp_path: Path, match: str, head: str, *overrides: str) -> None:
    """`adapt` refuses, and has written nothing."""
    prompts = tmp_path / "domain.jsonl"
    prompts.write_text('{"prompt": "Say A."}\n')
    asked = [f"data.prompts={prompts}", "target.dtype=float32", f"output_dir={tmp_path / 'out'}"]
    settings = load_settings(None, [*asked, *overrides], adapt_defaults(head))
    with pytest.raises(ValueError, match=match):
        adapt(settings, head, "cpu", [])
    assert not (tmp_path / "out").exists()


def test_adapt_knows_of_an_unfit_adapter_base_or_head_before_anything_is_answered(
    tmp_path: Path,
) -> None:
    own, _ = adapter(tmp_path / "own", tiny_target("tiny-gemma4"))
    good = head(tmp_path / "head")
    table = torch.ones(330, 48)
    names = ("model.embed_tokens.weight", "lm_head.weight")
    rewrite(own, lambda w: w | {f"base_model.model.{name}": table for name in names})
    plain, base = "target.name=tiny-gemma4", "adapt.base=tiny-gemma4"
    fails_at_once(tmp_path, r"own .* 330 rows", good, plain, f"target.adapters={own}")
    fails_at_once(tmp_path, r"nowhere.*adapt\.base", good, plain, "adapt.base=./nowhere")
    fails_at_once(tmp_path, "does not fit", good, "target.name=tiny-gemma3", base)
    configure(good, vocab_size=10)
    rewrite(good, lambda w: {k: v for k, v in w.items() if "pre_projection" not in k})
    fails_at_once(tmp_path, "head: not all weights", good, plain, base)

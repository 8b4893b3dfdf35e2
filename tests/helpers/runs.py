"""Tiny runs, what is read from their folders, and runs to publish."""

import importlib.util
import itertools
import json
import os
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from headstart.cli.main import main
from headstart.configs.loader import load_config
from headstart.configs.schema import Config
from headstart.heads.loading import load_target
from headstart.train import validation
from headstart.train.checkpoints import checkpoints
from headstart.train.run import run
from tests.helpers.checkpoints import make_adapter

ROOT = Path(__file__).resolve().parents[2]
REPO = "org/tiny-head"
PUBLISH = (REPO, "publish.base_models=org/tiny")
SHORT = (
    "train.max_steps=6", "train.eval_steps=6", "train.save_steps=6", "eval.limit=2",
    "eval.max_new_tokens=8", "eval.fp32_check_prompts=0",
)  # fmt: skip


def load_script(path: Path) -> ModuleType:
    """A script of the repository as a module, its names to be called."""
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def interrupt_second_call(
    monkeypatch: pytest.MonkeyPatch, module: ModuleType, name: str
) -> list[Any]:
    """Make the second call of `module.name` end as Ctrl-C does; returns the calls as they come."""
    real = getattr(module, name)
    calls: list[Any] = []

    def counted(*args: object) -> object:
        calls.append(args)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return real(*args)

    monkeypatch.setattr(module, name, counted)
    return calls


def take_every_head(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each validation is better than the one before, so that the head of a run is its last: what a
    head of noise comes to is chance."""
    rising = itertools.count(1.0)
    monkeypatch.setattr(validation, "validate", lambda *_: next(rising))


def tiny_config(tmp_path: Path, *overrides: str) -> Config:
    prompts = ROOT / "data" / "prompts" / "text_train.jsonl"
    return load_config(
        ROOT / "configs" / "tiny.yaml",
        [f"output_dir={tmp_path}", f"data.prompts=[{prompts}]", *overrides],
    )


def weights(run: Path) -> dict[str, torch.Tensor]:
    return load_file(checkpoints(run / "checkpoints")[-1] / "head.safetensors")


def metrics(run: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def publish(run_folder: Path, *more: object) -> int:
    return main(["publish", str(run_folder), *PUBLISH, *map(str, more)])


def write_tuned_run(folder: Path) -> None:
    """Fill a folder with a target, an adapter of it, prompts, and a finished run of them."""
    target = load_target("tiny-gemma4", "float32")
    target.model.save_pretrained(folder / "model")
    target.tokenizer.save_pretrained(folder / "model")
    make_adapter(folder / "lora")
    for name, words in (("train", "abcdefghijkl"), ("eval", "yz")):
        rows = "".join(json.dumps({"prompt": word * 9}) + "\n" for word in words)
        (folder / f"{name}.jsonl").write_text(rows)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("headstart.eval.draft_cost.COST_TURNS", 1)
        run(tiny_config(
            folder / "run", *SHORT, f"target.name={folder / 'model'}", "train.warmup_steps=1",
            f"target.adapters=[{folder / 'lora'}]", f"data.prompts=[{folder / 'train.jsonl'}]",
            f"eval.prompts={folder / 'eval.jsonl'}", f"data.cache_dir={folder / 'cache'}",
            "eval.decoders=[exact]", "eval.num_assistant_tokens=[2]", "data.max_new_tokens=8",
            "data.num_conversations=6", "data.validation_conversations=2",
            "head.use_ordered_embeddings=false", "head.num_centroids=null",
        ))  # fmt: skip


def fill(folder: Path, leave: int) -> None:
    """Fill a small disk but for so many bytes."""
    status = os.statvfs(folder)
    (folder / "filler").write_bytes(b"x" * max(0, status.f_bavail * status.f_frsize - leave))

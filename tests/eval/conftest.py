"""A finished run to publish, and a Hub to publish to."""

import json
from pathlib import Path
from typing import Any

import huggingface_hub.constants
import pytest

from headstart.cli.main import main
from headstart.heads.loading import load_target
from headstart.train.run import run
from tests.heads.test_served import make_adapter
from tests.hub import TOKEN, Hub
from tests.train.test_loop import ROOT, tiny_config

REPO = "org/tiny-head"
PUBLISH = ("--repo-id", REPO, "--base-model", "org/tiny")
SHORT = (
    "train.steps=6", "train.validate_every=6", "train.checkpoint_every=6", "eval.limit=2",
    "eval.max_new_tokens=8", "eval.exact_limit=0",
)  # fmt: skip


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


@pytest.fixture(scope="session")
def finished_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run folder as `headstart train` leaves it."""
    folder = tmp_path_factory.mktemp("run") / "tiny"
    prompts = ROOT / "data" / "prompts" / "text_eval.jsonl"
    cache = tmp_path_factory.mktemp("cache")
    run(tiny_config(folder, *SHORT, f"eval.prompts={prompts}", f"data.cache_dir={cache}"))
    return folder


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Any:
    with Hub() as up:
        monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", up.url)
        template = up.url + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(huggingface_hub.constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_DISABLE_XET", True)
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        yield up

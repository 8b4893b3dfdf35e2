"""A finished run to publish, and a Hub to publish to."""

from pathlib import Path
from typing import Any

import huggingface_hub.constants
import pytest

from headstart.cli.main import main
from headstart.train.run import run
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

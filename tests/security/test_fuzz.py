"""Files of a stranger's folder, changed at random: each is taken, or refused with the name of its
file. Parsers and admission alone: no weights are loaded.

`HEADSTART_FUZZ=100` tries a hundred times as many, others each time.
"""

import json
import os
import shutil
from argparse import Namespace
from collections.abc import Callable
from functools import partial
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console

from headstart.cli.eval import COMPARE
from headstart.common.children import temporary_folder
from headstart.common.files import content_sha256
from headstart.configs.loader import load_saved
from headstart.configs.schema import TargetConfig
from headstart.data.conversations import MANIFEST, read_manifest
from headstart.data.extraction import extract
from headstart.data.store import ActivationStore
from headstart.heads.adapters import fit_adapter
from headstart.heads.admission import check_files
from headstart.heads.describe import describe
from headstart.heads.loading import load_target_config, load_target_tokens
from headstart.train.checkpoints import check_checkpoint, checkpoints
from headstart.train.run import train
from headstart.train.run_folder import print_runs, read_run
from tests.helpers.checkpoints import saved_target
from tests.helpers.fuzzing import EACH, SHARES, VALUES, damaged, refused_with, replaced
from tests.helpers.models import make_target
from tests.helpers.prompts import conversations
from tests.helpers.runs import ROOT, tiny_config

pytestmark = pytest.mark.slow

TIMES = int(os.environ.get("HEADSTART_FUZZ", "1"))
QUIET = Console(file=StringIO())
PATHS = st.lists(st.integers(0, 99), max_size=4)
Change = tuple[list[tuple[list[int], Any]], tuple[float, float] | None, bytes]
CHANGE: st.SearchStrategy[Change] = st.tuples(
    st.lists(st.tuples(PATHS, VALUES), min_size=1, max_size=2),
    st.none() | st.none() | SHARES,
    st.binary(max_size=4),
)


def fuzz(examples: int) -> settings:
    return settings(EACH, max_examples=examples * TIMES, derandomize=TIMES == 1)


def changed(tree: Any, path: list[int], value: Any) -> Any:
    """The tree with the value at one of its places replaced; an empty path is the whole of it."""
    if not path or not isinstance(tree, dict | list) or not tree:
        return value
    key = sorted(tree)[path[0] % len(tree)] if isinstance(tree, dict) else path[0] % len(tree)
    copy = tree.copy()
    copy[key] = changed(copy[key], path[1:], value)
    return copy


def altered(file: Path, change: Change) -> bytes:
    """What a file holds after a change: of JSON, of lines of it, or of YAML."""
    places, cuts, put = change
    text = file.read_text(encoding="utf-8")
    tree: Any
    match file.suffix:
        case ".json":
            tree = json.loads(text)
        case ".jsonl":
            tree = [json.loads(line) for line in text.splitlines()]
        case _:
            tree = yaml.safe_load(text)
    for path, value in places:
        tree = changed(tree, path, value)
    match file.suffix:
        case ".json":
            if isinstance(tree, dict) and "sha256" in tree:  # as whoever means it would
                tree["sha256"] = content_sha256(tree)
            content = json.dumps(tree)
        case ".jsonl":
            rows = tree if isinstance(tree, list) else [tree]
            content = "".join(json.dumps(row) + "\n" for row in rows)
        case _:
            content = yaml.safe_dump(tree)
    raw = content.encode(errors="surrogatepass")
    return raw if cuts is None else damaged(raw, cuts, put)


def attempt(file: Path, change: Change, read: Callable[[], object], named: Path) -> None:
    with replaced(file, altered(file, change)), refused_with(str(named)):
        read()


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return Path(saved_target(tmp_path_factory.mktemp("target"), generation={"top_k": 64}))


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("store") / "store"
    texts = conversations(4)
    config = tiny_config(folder).data
    extract(make_target("gemma3"), texts, sum(len(t.ids) for t in texts), config, folder)
    return folder


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("run") / "tiny"
    cache = tmp_path_factory.mktemp("cache")
    train(tiny_config(folder, "train.max_steps=8", "train.eval_steps=4", "train.save_steps=4",
                      f"data.cache_dir={cache}"))  # fmt: skip
    return folder


TARGET_FILES = ("config.json", "generation_config.json", "tokenizer_config.json")


@fuzz(150)
@given(name=st.sampled_from(TARGET_FILES), change=CHANGE)
def test_configurations_and_tokenizers_of_targets(
    name: str, change: Change, checkpoint: Path
) -> None:
    def read() -> None:
        load_target_config(str(checkpoint))
        load_target_tokens(TargetConfig(name=str(checkpoint)))

    attempt(checkpoint / name, change, read, checkpoint)


@fuzz(100)
@given(reach=st.sampled_from([8, 64, 2048]), cuts=SHARES, put=st.binary(max_size=9))
def test_headers_of_weights(
    reach: int, cuts: tuple[float, float], put: bytes, checkpoint: Path
) -> None:
    file = checkpoint / "model.safetensors"
    content = file.read_bytes()
    with (
        replaced(file, damaged(content[:reach], cuts, put) + content[reach:]),
        refused_with(str(file)),
    ):
        check_files(checkpoint)


@pytest.fixture(scope="module")
def adapter(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from peft import LoraConfig, get_peft_model

    folder = tmp_path_factory.mktemp("adapter")
    model: Any = make_target("gemma3").model
    lora = LoraConfig(target_modules=["q_proj"], init_lora_weights=False)
    get_peft_model(model, lora).save_pretrained(str(folder))
    return folder


@pytest.fixture(scope="module")
def tuned() -> Any:
    return make_target("gemma3").model


@fuzz(50)
@given(change=CHANGE)
def test_adapters(change: Change, adapter: Path, tuned: Any) -> None:
    def read() -> None:
        with temporary_folder() as work:
            fit_adapter(str(adapter), tuned, True, work / "adapter")

    attempt(adapter / "adapter_config.json", change, read, adapter)


@fuzz(100)
@given(change=CHANGE)
def test_stores(change: Change, store: Path) -> None:
    attempt(store / "index.json", change, partial(ActivationStore, store), store)


@fuzz(50)
@given(change=CHANGE)
def test_manifests(change: Change, tmp_path_factory: pytest.TempPathFactory) -> None:
    folder = tmp_path_factory.mktemp("conversations")
    file = folder / MANIFEST
    file.write_text(json.dumps({"format": 1, "seed": 0, "chat_template_kwargs": {"a": True}}))
    attempt(file, change, partial(read_manifest, folder), folder)


RUN_FILES = ("status.json", "metrics.jsonl", "config.yaml")


@fuzz(150)
@given(name=st.sampled_from(RUN_FILES), change=CHANGE)
def test_run_folders(name: str, change: Change, run: Path) -> None:
    def read() -> None:
        print_runs(run, QUIET)
        read_run(run)  # which the list would show as damaged

    attempt(run / name, change, read, run)


@fuzz(100)
@given(name=st.sampled_from(["state.json", "config.yaml"]), change=CHANGE)
def test_checkpoints_of_runs(name: str, change: Change, run: Path) -> None:
    folder = checkpoints(run / "checkpoints")[-1]

    def read() -> None:
        check_checkpoint(folder)
        load_saved(folder / "config.yaml")

    attempt(folder / name, change, read, folder)


@fuzz(60)
@given(name=st.sampled_from(["config.json", "generation_config.json"]), change=CHANGE)
def test_heads(name: str, change: Change, run: Path) -> None:
    attempt(run / "head" / name, change, partial(describe, run / "head"), run / "head")


@fuzz(30)  # each a quarter of a second
@given(change=CHANGE)
def test_reports(change: Change, tmp_path_factory: pytest.TempPathFactory) -> None:
    file = tmp_path_factory.mktemp("report") / "report.json"
    shutil.copyfile(ROOT / "docs" / "results" / "eval-t1.json", file)
    other = ROOT / "docs" / "results" / "eval-t1.json"
    given = Namespace(of=COMPARE, config=None, settings=[], before=file, after=other)
    attempt(file, change, lambda: COMPARE.run(given), file)

"""What tests share: a tiny random target of each family, a finished run, a Hub, a small disk; and a
cache folder, random numbers and a dtype of `auto` that are each test's own."""

import json
import os
import random
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import huggingface_hub.constants
import numpy as np
import pytest
import torch

from headstart.common import machine
from headstart.common.machine import environment
from headstart.heads import cpu_linear
from headstart.heads.target import Target
from tests.helpers.hub import TOKEN, Hub
from tests.helpers.models import FAMILIES, make_target
from tests.helpers.packing import packs_here


@pytest.fixture(params=FAMILIES)
def target(request: pytest.FixtureRequest) -> Target:
    return make_target(request.param)


@pytest.fixture
def tiny() -> Target:
    return make_target("gemma4-kv-sharing")


@pytest.fixture(scope="session")
def finished_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run folder as `headstart train` leaves it."""
    # Imported here: a test of a single function should not wait for all of Headstart.
    from headstart.train.run import run
    from tests.helpers.runs import ROOT, SHORT, tiny_config

    folder = tmp_path_factory.mktemp("run") / "tiny"
    prompts = ROOT / "data" / "prompts" / "text_eval.jsonl"
    cache = tmp_path_factory.mktemp("cache")
    run(tiny_config(folder, *SHORT, f"eval.prompts={prompts}", f"data.cache_dir={cache}"))
    return folder


@pytest.fixture
def other_forms(monkeypatch: pytest.MonkeyPatch) -> None:
    """Linear layers over few rows run by another form than torch's, whatever pays here."""

    def other(dtype: torch.dtype, rows: int, packs: bool) -> Any:
        return cpu_linear.forms_for(rows)[-1 if packs and packs_here(dtype) else 0]

    monkeypatch.setattr(cpu_linear, "quickest", other)


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """A stand-in for the Hub, to which huggingface_hub talks."""
    with Hub() as up:
        monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", up.url)
        template = up.url + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(huggingface_hub.constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_DISABLE_XET", True)
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        yield up


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 300 KiB; skipped where mounting is not allowed."""
    folder = tmp_path / "disk"
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=300k", "none", str(folder)]
    if subprocess.run(command, capture_output=True).returncode:
        pytest.skip("needs the right to mount a tmpfs")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


@pytest.fixture(autouse=True)
def own_cache(
    request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No test reads or fills the user's cache, but for the converted weights of the real target and
    the environments of serving engines."""
    if not any(map(request.node.get_closest_marker, ("real", "engines"))):
        monkeypatch.setenv("HEADSTART_CACHE", str(tmp_path / "cache"))


@pytest.fixture(autouse=True)
def own_random_numbers() -> None:
    """The same in each test, whichever ran before it."""
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)


@pytest.fixture(scope="session", autouse=True)
def two_threads() -> None:
    """In all: workers of pytest-xdist have one each."""
    torch.set_num_threads(1 if "PYTEST_XDIST_WORKER" in os.environ else 2)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--machine-dtype",
        choices=("float32", "bfloat16"),
        help="the dtype that pays on this machine (default: what its processor says)",
    )
    parser.addoption(
        "--versions-json",
        type=Path,
        metavar="FILE",
        help="add what ran and how it ended to this file, as docs/reference/versions.md shows it",
    )


class MachineDtype:
    """What `auto` comes to in a test: float32, so that its outcome is the same on every machine. A
    test of what a machine chooses has the marker `auto_dtype` and gets the machine's own word, or
    that of `--machine-dtype`: `make test-dtypes` runs those once each way."""

    def __init__(self, chosen: str | None):
        self.chosen, self.ask = chosen, machine.natural_dtype
        self.item: pytest.Item | None = None

    def __call__(self) -> str:
        if self.item is None or self.item.get_closest_marker("auto_dtype") is None:
            return "float32"
        return self.chosen or self.ask()

    @pytest.hookimpl(tryfirst=True)
    def pytest_runtest_setup(self, item: pytest.Item) -> None:
        self.item = item  # before its fixtures, those of its module too


LONG = ("test_real.py", "test_lossless.py", "test_kinds.py", "test_structured.py")


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The longest files first: one of them would keep a process at the end while the others have
    nothing left to do. All else stays in its random order."""
    items.sort(key=lambda item: LONG.index(item.path.name) if item.path.name in LONG else len(LONG))


def pytest_configure(config: pytest.Config) -> None:
    chosen = MachineDtype(config.getoption("--machine-dtype"))
    machine.natural_dtype = chosen
    config.pluginmanager.register(chosen, "machine-dtype")


def pytest_terminal_summary(
    terminalreporter: pytest.TerminalReporter, config: pytest.Config
) -> None:
    path = config.getoption("--versions-json")
    if path is None or hasattr(config, "workerinput"):  # pytest-xdist's controller has them all
        return
    stats, chosen = terminalreporter.stats, config.pluginmanager.get_plugin("machine-dtype")
    assert isinstance(chosen, MachineDtype)
    seed = str(config.getoption("random_order_seed", "default:"))
    shuffled = config.getoption("random_order_enabled", False) or "default:" not in seed
    row = environment(torch.device("cpu")) | {
        "selected": config.getoption("markexpr"),
        "machine_dtype": chosen.chosen or chosen.ask(),
        "order": f"random, seed {seed.removeprefix('default:')}" if shuffled else "as written",
        **{how: len(stats.get(how, [])) for how in ("passed", "failed", "error", "skipped")},
        "failures": sorted(report.nodeid for report in stats.get("failed", [])),
    }
    rows = json.loads(path.read_text()) if path.is_file() else []
    path.write_text(json.dumps([*rows, row], indent=1) + "\n")

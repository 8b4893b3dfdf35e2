"""Tiny random targets of every supported family; a cache folder, random numbers and a dtype of
`auto` that are each test's own."""

import json
import os
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import (
    Gemma4Config,
    Gemma4ForCausalLM,
    Gemma4ForConditionalGeneration,
    Gemma4UnifiedConfig,
    Gemma4UnifiedForCausalLM,
    Gemma4UnifiedForConditionalGeneration,
    Gemma4UnifiedTextConfig,
    PreTrainedModel,
)

from headstart.common import machine
from headstart.common.machine import environment
from headstart.heads.loading import (
    VOCAB_SIZE,
    byte_tokenizer,
    gemma3_config,
    gemma4_text_config,
    random_model,
)
from headstart.heads.target import Gemma3ForAssistedDecoding, Target

PER_LAYER = {"hidden_size_per_layer_input": 8, "vocab_size_per_layer_input": VOCAB_SIZE}
MOE = {
    "enable_moe_block": True,
    "num_experts": 4,
    "top_k_experts": 2,
    "moe_intermediate_size": 16,
    # As in 26B-A4B: the full layers have KV heads of their own and values made of keys.
    "attention_k_eq_v": True,
    "num_global_key_value_heads": 1,
}
VISION = {
    "vision_config": {
        "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1,
        "num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 8,
    },
    "audio_config": None,
}  # fmt: skip


def _unified_text() -> Any:
    text = gemma4_text_config().to_dict()
    keys = Gemma4UnifiedTextConfig().to_dict().keys() & text.keys()
    return {k: text[k] for k in keys - {"model_type"}}


FAMILIES: dict[str, Callable[[], PreTrainedModel]] = {
    "gemma3": lambda: Gemma3ForAssistedDecoding(gemma3_config()),
    "gemma4": lambda: Gemma4ForCausalLM(gemma4_text_config()),
    "gemma4-kv-sharing": lambda: Gemma4ForCausalLM(
        gemma4_text_config(num_kv_shared_layers=3, use_double_wide_mlp=True, **PER_LAYER)
    ),
    "gemma4-moe": lambda: Gemma4ForCausalLM(gemma4_text_config(**MOE)),
    "gemma4-multimodal": lambda: Gemma4ForConditionalGeneration(
        Gemma4Config(
            text_config=gemma4_text_config(num_kv_shared_layers=3, **PER_LAYER).to_dict(), **VISION
        )
    ),
    "gemma4-unified": lambda: Gemma4UnifiedForCausalLM(Gemma4UnifiedTextConfig(**_unified_text())),
    "gemma4-unified-multimodal": lambda: Gemma4UnifiedForConditionalGeneration(
        Gemma4UnifiedConfig(text_config=_unified_text(), audio_config=None)
    ),
}


def make_target(family: str, dtype: torch.dtype = torch.float32) -> Target:
    """A tiny random target of a family, the same each time."""
    return Target(random_model(FAMILIES[family]).to(dtype), byte_tokenizer(), family)


@pytest.fixture(params=FAMILIES)
def target(request: pytest.FixtureRequest) -> Target:
    return make_target(request.param)


@pytest.fixture
def tiny() -> Target:
    return make_target("gemma4-kv-sharing")


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
        help="add what ran and how it ended to this file, which docs/versions.md tells of",
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
    seed = str(config.getoption("random_order_seed", "default"))
    row = environment(torch.device("cpu")) | {
        "selected": config.getoption("markexpr"),
        "machine_dtype": chosen.chosen or chosen.ask(),
        "order": "as written" if seed.startswith("default") else f"random, seed {seed}",
        **{how: len(stats.get(how, [])) for how in ("passed", "failed", "error", "skipped")},
        "failures": sorted(report.nodeid for report in stats.get("failed", [])),
    }
    rows = json.loads(path.read_text()) if path.is_file() else []
    path.write_text(json.dumps([*rows, row], indent=1) + "\n")

"""A thousand damaged inputs: each is taken, or refused with the name of its file; none ends in
another error, hangs, or leaves a file behind."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from headstart.configs.keys import known_keys
from headstart.configs.loader import load_settings
from headstart.configs.renamed import GONE, RENAMED
from headstart.configs.schema import SourceConfig
from headstart.configs.settings import Settings
from headstart.data.prompts import load_prompts
from headstart.heads.loading import load_target
from headstart.heads.saving import load_assistant
from tests.helpers.checkpoints import saved_target
from tests.helpers.fuzzing import EACH, SHARES, VALUES, damaged, refused_with, replaced
from tests.helpers.heads import noisy_head
from tests.helpers.models import make_target

pytestmark = pytest.mark.slow

COLUMNS = st.sampled_from(
    ["messages", "conversations", "prompt", "response", "text", "turns", "system", "images", "id",
     "instruction", "input", "output", "tools", "raw", "category", "source"]
)  # fmt: skip
ROWS = st.lists(st.dictionaries(COLUMNS, VALUES, max_size=4) | VALUES, min_size=1, max_size=5)


@EACH
@given(
    rows=ROWS,
    cuts=SHARES,
    put=st.binary(max_size=6),
    name=st.sampled_from([".jsonl", ".json", ".csv", ".txt"]),
)
def test_prompt_files(
    rows: list[Any],
    cuts: tuple[float, float],
    put: bytes,
    name: str,
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    file = tmp_path_factory.mktemp("rows") / f"rows{name}"
    text = "\n".join(json.dumps(row) for row in rows).encode()
    file.write_bytes(damaged(text, cuts, put) if put else text)
    for share in (0.0, 1.0):
        with refused_with(str(file)):
            for prompt in load_prompts(SourceConfig(path=str(file)), share):
                assert prompt.text.strip()


KEYS = sorted({*known_keys(), *RENAMED, *GONE})


@EACH
@given(
    key=st.sampled_from(KEYS) | st.text("ab- é", max_size=12),
    text=st.text(max_size=16) | VALUES.map(repr),
)
def test_overrides(key: str, text: str) -> None:
    with refused_with(key.partition(".")[0]):  # a combination is named by its section
        assert isinstance(load_settings(None, [f"{key}={text}"]), Settings)


@settings(EACH, max_examples=100)
@given(
    tree=st.dictionaries(
        st.sampled_from([*Settings.model_fields, "run"]) | st.text(max_size=6), VALUES, max_size=3
    ),
    cuts=SHARES,
    put=st.text(max_size=4),
)
def test_run_files(
    tree: dict[str, Any],
    cuts: tuple[float, float],
    put: str,
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    file = tmp_path_factory.mktemp("yaml") / "run.yaml"
    text = yaml.safe_dump(tree, allow_unicode=True).encode(errors="surrogatepass")
    file.write_bytes(damaged(text, cuts, put.encode(errors="surrogatepass")) if put else text)
    with refused_with(str(file)):
        assert isinstance(load_settings(file), Settings)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return Path(saved_target(tmp_path_factory.mktemp("target"), generation={}))


@pytest.fixture(scope="module")
def head(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("head")
    noisy_head(make_target("gemma3")).assistant.save_pretrained(folder)
    return folder


WEIGHTS = st.tuples(st.sampled_from([8, 64, 4096]), SHARES, st.binary(max_size=9))


def damaged_weights(file: Path, change: tuple[int, tuple[float, float], bytes]) -> bytes:
    """A file of weights with its first bytes changed, where its header is, or cut off."""
    reach, cuts, put = change
    content = file.read_bytes()
    if not put:
        return content[: int(cuts[0] * len(content))]
    left, right = sorted(int(cut * reach) for cut in cuts)
    return content[:left] + put + content[right:]


@settings(EACH, max_examples=100)
@given(change=WEIGHTS)
def test_weights_of_targets(
    change: tuple[int, tuple[float, float], bytes], checkpoint: Path
) -> None:
    file = checkpoint / "model.safetensors"
    with replaced(file, damaged_weights(file, change)), refused_with(str(checkpoint)):
        assert load_target(str(checkpoint), "float32").fingerprint


@settings(EACH, max_examples=50)
@given(change=WEIGHTS)
def test_weights_of_heads(change: tuple[int, tuple[float, float], bytes], head: Path) -> None:
    file = head / "model.safetensors"
    with replaced(file, damaged_weights(file, change)), refused_with(str(head)):
        assert load_assistant(head, torch.float32)


CHANGES = st.dictionaries(st.integers(0, 99), VALUES, min_size=1, max_size=2)


def changed_json(file: Path, changes: dict[int, Any], cuts: tuple[float, float] | None) -> bytes:
    """A file of JSON with some of its values replaced, or a piece of it cut out."""
    content = json.loads(file.read_text())
    names = sorted(content)
    for number, value in changes.items():
        content[names[number % len(names)]] = value
    text = json.dumps(content).encode()
    return text if cuts is None else damaged(text, cuts, b"")


@settings(EACH, max_examples=100)
@given(changes=CHANGES, cuts=st.none() | SHARES)
def test_configurations_of_targets(
    changes: dict[int, Any], cuts: tuple[float, float] | None, checkpoint: Path
) -> None:
    file = checkpoint / "config.json"
    with replaced(file, changed_json(file, changes, cuts)), refused_with(str(checkpoint)):
        assert load_target(str(checkpoint), "float32").fingerprint


@pytest.fixture(scope="module")
def adapter(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from peft import LoraConfig, get_peft_model

    folder = tmp_path_factory.mktemp("adapter")
    lora = LoraConfig(target_modules=["q_proj", "up_proj"], init_lora_weights=False)
    model: Any = make_target("gemma3").model
    get_peft_model(model, lora).save_pretrained(str(folder))
    return folder


@settings(EACH, max_examples=50)
@given(changes=CHANGES, cuts=st.none() | SHARES)
def test_configurations_of_adapters(
    changes: dict[int, Any], cuts: tuple[float, float] | None, adapter: Path
) -> None:
    file = adapter / "adapter_config.json"
    with replaced(file, changed_json(file, changes, cuts)), refused_with(str(adapter)):
        assert load_target("tiny-gemma3", "float32", adapters=[str(adapter)]).fingerprint

"""Real serving engines with tiny Gemma 4 pairs, trained from nothing: `make test-engines`."""

import json
from pathlib import Path

import pytest

from headstart.cli.main import main
from headstart.heads.engine_environments import install_engine
from headstart.heads.engines import Engine
from tests.tiny_pair import KINDS, write_multimodal, write_pair

pytestmark = pytest.mark.engines


@pytest.fixture(scope="module", params=KINDS)
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    folder = tmp_path_factory.getbasetemp() / "pairs"
    return list(map(str, write_pair(request.param, folder)))


@pytest.mark.parametrize("engine", ["llama.cpp", "vllm", "mlx"])
def test_an_engine_says_what_transformers_says_and_accepts_as_much(
    pair: list[str], engine: Engine, tmp_path: Path
) -> None:
    install_engine(engine)
    target, head = pair
    if engine == "mlx":
        target = str(write_multimodal(Path(target), tmp_path / "multimodal"))
    command = ["serve-check", "--engine", engine, "--target", target, "--head", head]
    command += ["--dtype", "float32", "--limit", "16", "--out", str(tmp_path)]
    assert main(command) == 0
    content = json.loads((tmp_path / "serve-check.json").read_text())
    assert set(content["equal_texts"].values()) == {1.0}
    ours, theirs = (content["acceptance_length"][name] for name in ("transformers", "engine"))
    assert ours > 2, "a head that is hardly accepted tells nothing"
    assert theirs == pytest.approx(ours, rel=0.03)


def test_heads_that_were_exported_hold_the_same_weights(pair: list[str], tmp_path: Path) -> None:
    """The converter's file has the tensors of the head, and says so itself."""
    install_engine("llama.cpp")
    target, head = pair
    command = [
        "export",
        head,
        "--to",
        "llama.cpp",
        "--target",
        target,
        "--out",
        str(tmp_path / "x"),
    ]
    assert main(command) == 0
    assert (tmp_path / "x" / "head.gguf").stat().st_size > 100_000

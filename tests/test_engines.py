"""Real serving engines with tiny pairs, trained from nothing: `make test-engines`."""

import hashlib
import json
import subprocess
from pathlib import Path

import pytest
from safetensors.torch import load_file

from headstart.cli.main import main
from headstart.serve.engines import GGUF, Engine, engine_python, install_engine
from tests.helpers.tiny_pair import GEMMA4, KINDS, write_multimodal, write_pair

pytestmark = pytest.mark.engines


def pair_of(kind: str, factory: pytest.TempPathFactory) -> list[str]:
    """Folders of a target and a head, made once."""
    return list(map(str, write_pair(kind, factory.getbasetemp() / "pairs")))


OF_KIND: dict[str, tuple[Engine, ...]] = {
    **dict.fromkeys(GEMMA4, ("llama.cpp", "vllm", "mlx", "litert")),
    "gemma3": ("litert",),
}


@pytest.mark.parametrize(
    ("kind", "engine"), [(kind, engine) for kind in KINDS for engine in OF_KIND[kind]]
)
def test_an_engine_says_what_transformers_says_and_accepts_as_much(
    kind: str, engine: Engine, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    install_engine(engine)
    target, head = pair_of(kind, tmp_path_factory)
    if engine == "mlx":
        target = str(write_multimodal(Path(target), tmp_path / "multimodal"))
    settings = [f"target.name={target}", "target.dtype=float32", "eval.limit=16"]
    assert main(["serve-check", head, engine, *settings, f"output_dir={tmp_path}"]) == 0
    content = json.loads((tmp_path / "serve-check.json").read_text())
    assert set(content["equal_texts"].values()) == {1.0}
    ours, theirs = (content["acceptance_length"][name] for name in ("transformers", "engine"))
    assert ours > 2, "a head that is hardly accepted tells nothing"
    assert theirs == pytest.approx(ours, rel=0.03)
    rates = content["cumulative_acceptance_rate"]
    assert rates["engine"] == pytest.approx(rates["transformers"], abs=0.04)


@pytest.mark.parametrize("kind", GEMMA4)
def test_an_exported_gguf_holds_the_heads_weights(
    kind: str, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """Every tensor of the file is one of the head's, bit for bit, and none is missing."""
    install_engine("llama.cpp")
    target, head = pair_of(kind, tmp_path_factory)
    out = tmp_path / "out"
    settings = [f"target.name={target}", "export.dtype=float32", f"output_dir={out}"]
    assert main(["export", head, "llama.cpp", *settings]) == 0
    script = (
        "import hashlib, sys; from gguf import GGUFReader; "
        "[print(hashlib.sha256(t.data.tobytes()).hexdigest()) "
        "for t in GGUFReader(sys.argv[1]).tensors]"
    )
    python = str(engine_python("llama.cpp"))
    read = [python, "-c", script, str(out / GGUF)]
    done = subprocess.run(read, capture_output=True, text=True, check=True)
    weights = load_file(out / "model.safetensors").values()
    ours = {hashlib.sha256(w.numpy().tobytes()).hexdigest() for w in weights}
    theirs = set(done.stdout.split())
    assert ours <= theirs
    assert len(theirs - ours) <= 1, "beside the weights, the frequencies of RoPE"

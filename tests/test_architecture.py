"""The shape of the code base.

Which folder may import which is a contract in pyproject.toml, and what could run code that hides in
a file is banned there: `make check` holds both.
"""

import ast
import os
import subprocess
import sys
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

from tests.helpers.import_graph import import_graph

ROOT = Path(__file__).resolve().parents[1]
FOLDERS = ("common", "configs", "heads", "data", "eval", "train", "serve", "api", "cli")
TESTS = ROOT / "tests"
MODULES = [path for path in TESTS.rglob("*.py") if TESTS / "helpers" not in path.parents]


def run(*command: str, text: str = "") -> subprocess.CompletedProcess[str]:
    # Through the links of `make links`: else train.py passes for the folder train/.
    return subprocess.run(
        [sys.executable, "-m", *command], cwd=ROOT, input=text, capture_output=True, text=True,
        env=os.environ | {"PYTHONPATH": str(ROOT / ".types")},
    )  # fmt: skip


def test_imports_point_one_way() -> None:
    linted = run("importlinter.cli", "--no-cache")
    assert linted.returncode == 0, linted.stdout


@pytest.mark.parametrize(
    ("folder", "source"),
    [
        ("train", "import pickle"),
        ("data", "from dill import loads"),
        ("heads", "import torch\n\ntorch.load('a')"),
        ("heads", "from torch import load"),
        ("data", "import numpy as np\n\nnp.load('a')"),
        ("cli", "from .main import main"),
        ("cli", "from train.loop import train"),
        ("tests", "import data"),
    ],
)
def test_an_unsafe_read_and_a_bare_import_are_found(folder: str, source: str) -> None:
    checked = run("ruff", "check", "--select", "TID", "--stdin-filename", f"{folder}/a.py", "-",
                  text=source + "\n")  # fmt: skip
    assert checked.returncode == 1, checked.stderr


def test_headstart_is_a_namespace_package() -> None:
    for shadow in ("__init__.py", "headstart", "headstart.py"):
        assert not (ROOT / shadow).exists(), f"{shadow} at the root shadows the package mapping"


@pytest.mark.parametrize("folder", FOLDERS)
def test_folder_is_a_flat_package_of_few_files(folder: str) -> None:
    assert (ROOT / folder / "__init__.py").is_file()
    assert (ROOT / folder / "py.typed").is_file()
    files = sorted((ROOT / folder).rglob("*.py"))
    nested = [str(path) for path in files if path.parent != ROOT / folder]
    assert nested == [], "a nested package would miss the wheel"
    most = {"heads": 24, "train": 19, "data": 19, "eval": 18}.get(folder, 15)
    assert len(files) <= 1 + most  # __init__.py and the rest


@pytest.mark.parametrize("path", MODULES, ids=lambda path: path.relative_to(TESTS).as_posix())
def test_modules_of_tests_share_through_helpers_alone(path: Path) -> None:
    """A test module, imported by another, would run twice under two names."""
    shared = {
        node.module
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "tests"
    }
    assert [name for name in shared if not str(name).startswith("tests.helpers.")] == []


def test_no_two_modules_need_each_other() -> None:
    """Imports within functions count too."""
    TopologicalSorter(import_graph()).prepare()

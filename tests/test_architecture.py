"""The shape of the code base, read from its syntax trees: nothing is imported here."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]

# A file imports from its own folder or from folders to the left of it.
FOLDERS = ("configs", "heads", "data", "eval", "train", "cli")

# Reading one of these formats can run code that a stranger put into the file.
UNSAFE_MODULES = {"pickle", "cPickle", "_pickle", "cloudpickle", "dill", "joblib", "shelve"}

SOURCES = [path for folder in FOLDERS for path in sorted((ROOT / folder).glob("*.py"))]
OTHERS = [*sorted(ROOT.glob("*.py")), *sorted((ROOT / "tests").rglob("*.py"))]


def import_faults(source: str, folder: str) -> list[str]:
    """What in `source`, a file of `folder`, is imported against the direction or relatively."""
    allowed = FOLDERS[: FOLDERS.index(folder) + 1]
    faults = []
    for node in _nodes(ast.parse(source)):
        if isinstance(node, ast.ImportFrom) and node.level > 0:
            faults.append(f"line {node.lineno}: relative import")
            continue
        for name in _imported(node):
            top, _, rest = name.partition(".")
            wanted = rest.partition(".")[0] if top == "headstart" else top
            if top == "headstart" and wanted not in allowed:
                faults.append(f"line {node.lineno}: {folder} imports headstart.{wanted}")
            if top in FOLDERS:
                faults.append(f"line {node.lineno}: bare import of {top}, not headstart.{top}")
    return faults


def loading_faults(source: str) -> list[str]:
    """Where `source` may run code that hides in a file it reads."""
    tree = ast.parse(source)
    faults = []
    names = _names(tree)
    for node in _nodes(tree):
        for name in _imported(node):
            if name.partition(".")[0] in UNSAFE_MODULES:
                faults.append(f"line {node.lineno}: imports {name.partition('.')[0]}")
        if not isinstance(node, ast.Call):
            continue
        called = _dotted(node.func, names)
        keywords = {k.arg: getattr(k.value, "value", None) for k in node.keywords}
        if called == "torch.load" and keywords.get("weights_only") is not True:
            faults.append(f"line {node.lineno}: torch.load without weights_only=True")
        if called == "numpy.load" and keywords.get("allow_pickle", False) is not False:
            faults.append(f"line {node.lineno}: numpy.load with allow_pickle")
    return faults


def _nodes(tree: ast.AST) -> list[ast.stmt | ast.expr]:
    """Statements and expressions: the nodes that have a line number."""
    return [node for node in ast.walk(tree) if isinstance(node, ast.stmt | ast.expr)]


def _imported(node: ast.AST) -> list[str]:
    """Dotted names of the modules that one statement imports."""
    match node:
        case ast.Import(names=aliases):
            return [alias.name for alias in aliases]
        case ast.ImportFrom(module="headstart", names=aliases, level=0):
            return [f"headstart.{alias.name}" for alias in aliases]
        case ast.ImportFrom(module=str(module), level=0):
            return [module]
        # importlib.import_module("headstart.train") is an import too
        case ast.Call(
            func=ast.Name(id="import_module" | "__import__") | ast.Attribute(attr="import_module"),
            args=[ast.Constant(value=str(module)), *_],
        ):
            return [module]
    return []


def _names(tree: ast.AST) -> dict[str, str]:
    """What each imported name stands for: `np` -> `numpy`, `load` -> `torch.load`."""
    names: dict[str, str] = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {a.asname: a.name for a in node.names if a.asname}
        if isinstance(node, ast.ImportFrom) and node.module:
            names |= {a.asname or a.name: f"{node.module}.{a.name}" for a in node.names}
    return names


def _dotted(node: ast.expr, names: dict[str, str]) -> str:
    match node:
        case ast.Name(id=name):
            return names.get(name, name)
        case ast.Attribute(value=value, attr=attribute):
            return f"{_dotted(value, names)}.{attribute}"
    return ""


def _id(path: Path) -> str:
    return str(path.relative_to(ROOT))


@pytest.mark.parametrize("path", SOURCES, ids=_id)
def test_imports_point_one_way(path: Path) -> None:
    assert import_faults(path.read_text(encoding="utf-8"), path.parent.name) == []


@pytest.mark.parametrize("path", OTHERS, ids=_id)
def test_scripts_and_tests_use_absolute_imports_of_headstart(path: Path) -> None:
    # They stand to the right of every folder, as cli does.
    assert import_faults(path.read_text(encoding="utf-8"), "cli") == []


@pytest.mark.parametrize("path", [*SOURCES, *OTHERS], ids=_id)
def test_no_file_is_read_that_could_run_code(path: Path) -> None:
    assert loading_faults(path.read_text(encoding="utf-8")) == []


def test_headstart_is_a_namespace_package() -> None:
    for shadow in ("__init__.py", "headstart", "headstart.py"):
        assert not (ROOT / shadow).exists(), f"{shadow} at the root shadows the package mapping"


@pytest.mark.parametrize("folder", FOLDERS)
def test_folder_is_a_flat_package(folder: str) -> None:
    assert (ROOT / folder / "__init__.py").is_file()
    assert (ROOT / folder / "py.typed").is_file()
    nested = [_id(p) for p in (ROOT / folder).rglob("*.py") if p.parent != ROOT / folder]
    assert nested == [], "a nested package would miss the wheel"


@pytest.mark.parametrize(
    ("folder", "source", "fault"),
    [
        ("configs", "from headstart.heads.assistant import Head", "configs imports headstart.hea"),
        ("eval", "import headstart.train.loop as loop", "eval imports headstart.train"),
        ("eval", "from headstart import data, train", "eval imports headstart.train"),
        ("heads", "def f():\n    from headstart.cli import main", "line 2: heads imports"),
        ("data", "import_module('headstart.eval.walk')", "data imports headstart.eval"),
        ("train", "import importlib as i; i.import_module('headstart.cli')", "headstart.cli"),
        ("train", "from headstart import __init__", "train imports headstart.__init__"),
        ("cli", "from .main import main", "relative import"),
        ("cli", "from . import main", "relative import"),
        ("cli", "from train.loop import train", "bare import of train"),
        ("cli", "import data", "bare import of data"),
    ],
)
def test_a_wrong_import_is_found(folder: str, source: str, fault: str) -> None:
    faults = import_faults(source, folder)
    assert len(faults) == 1
    assert fault in faults[0]


@pytest.mark.parametrize(
    ("source", "fault"),
    [
        ("import pickle", "imports pickle"),
        ("from dill import loads", "imports dill"),
        ("import torch\ntorch.load(path)", "line 2: torch.load"),
        ("import torch as t\nt.load(path, weights_only=False)", "torch.load"),
        ("from torch import load as read\nread(path)", "torch.load"),
        ("import torch\ntorch.load(path, weights_only=flag)", "torch.load"),
        ("import numpy as np\nnp.load(path, allow_pickle=True)", "numpy.load"),
    ],
)
def test_an_unsafe_read_is_found(source: str, fault: str) -> None:
    faults = loading_faults(source)
    assert len(faults) == 1
    assert fault in faults[0]


@pytest.mark.parametrize(
    ("folder", "source"),
    [
        ("configs", "import json\nfrom headstart.configs.schema import Config"),
        ("eval", "from headstart.heads.assistant import Head"),
        ("train", "from headstart import eval, heads"),
        ("cli", "import torch\ntorch.load(path, weights_only=True)"),
        ("data", "import numpy as np\nnp.load(path)\nsafe.load(path)"),
        ("data", "from datasets import load_dataset\nimport dataclasses"),
    ],
)
def test_good_source_has_no_fault(folder: str, source: str) -> None:
    assert import_faults(source, folder) + loading_faults(source) == []

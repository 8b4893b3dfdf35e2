"""Which module imports which, imports within functions too."""

import ast
from pathlib import Path

from tests.helpers.runs import ROOT

FOLDERS = ("common", "configs", "heads", "data", "eval", "train", "serve", "api", "cli")


def import_graph() -> dict[str, list[str]]:
    """Module, as `heads/target` -> the modules that it imports, sorted."""
    files = {
        f"{folder}/{path.stem}": path
        for folder in FOLDERS
        for path in sorted((ROOT / folder).glob("*.py"))
        if path.stem != "__init__"
    }
    return {name: sorted(_imports(path) & files.keys()) for name, path in files.items()}


def _imports(path: Path) -> set[str]:
    names = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.module and node.level == 0:
            module = node.module.removeprefix("headstart.").replace(".", "/")
            names |= {module, *(f"{module}/{alias.name}" for alias in node.names)}
    return names

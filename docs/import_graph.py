"""Draw which module imports which: `python docs/import_graph.py` writes docs/import-graph.svg.

A column is a folder, a line an import. Lines run from right to left between folders, and within a
folder from a module to one that stands higher: so no two modules need each other.
"""

import ast
from graphlib import TopologicalSorter
from pathlib import Path

import matplotlib.pyplot as plt

ROOT = Path(__file__).resolve().parents[1]
FOLDERS = ("common", "configs", "heads", "data", "eval", "train", "serve", "api", "cli")

Graph = dict[str, list[str]]
"""Module, as `heads/target` -> the modules that it imports, sorted: sets of text have no order that
lasts, and the same graph is to give the same file."""


def import_graph() -> Graph:
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


def draw(graph: Graph, out: Path) -> None:
    """Draw the graph.

    Raises:
        graphlib.CycleError: modules import one another in a circle.
    """
    order = list(TopologicalSorter(graph).static_order())
    columns = {folder: [m for m in order if m.startswith(f"{folder}/")] for folder in FOLDERS}
    place = {
        module: (3.0 * x, -float(y))
        for x, modules in enumerate(columns.values())
        for y, module in enumerate(modules)
    }
    plt.rcParams["svg.hashsalt"] = "headstart"  # in place of a random one
    figure, axes = plt.subplots(figsize=(20, 10))
    colors = plt.get_cmap("tab10")
    for module, imported in graph.items():
        color = colors(FOLDERS.index(module.partition("/")[0]))
        for other in imported:
            inside = other.partition("/")[0] == module.partition("/")[0]
            style = f"arc3,rad={-0.5 if inside else 0.0}"
            arrow = {"arrowstyle": "-", "color": color, "alpha": 0.25, "connectionstyle": style}
            axes.annotate("", xy=place[other], xytext=place[module], arrowprops=arrow)
    for module, (x, y) in place.items():
        axes.text(x, y, module.partition("/")[2], ha="center", va="center", fontsize=9,
                  bbox={"boxstyle": "round", "facecolor": "white", "edgecolor": "0.8"})  # fmt: skip
    for x, folder in enumerate(FOLDERS):
        axes.text(3.0 * x, 1.2, f"{folder}/", ha="center", weight="bold")
    axes.set_xlim(-1.5, 3.0 * len(FOLDERS) - 1.5)
    axes.set_ylim(-max(map(len, columns.values())), 2)
    axes.axis("off")
    figure.savefig(out, bbox_inches="tight", metadata={"Date": None})


if __name__ == "__main__":
    graph = import_graph()
    draw(graph, ROOT / "docs" / "import-graph.svg")
    print(f"{len(graph)} modules, {sum(map(len, graph.values()))} imports between them, no circle")

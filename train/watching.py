"""What run folders say: their state, how far they are, their best score, and a picture of it."""

import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from rich.console import Console
from rich.table import Table

from headstart.heads.files import whole_file
from headstart.heads.progress import plain_console
from headstart.train.checkpoints import checkpoints
from headstart.train.run_folder import STATUS, read_metrics, read_status, read_steps
from headstart.train.summary import summary_text

PLOT = "progress.png"


@dataclass(frozen=True)
class RunView:
    """One run folder, as it is now."""

    folder: Path
    status: dict[str, Any]
    """Of status.json: `state`, `doing`, `started`, and `why` and `ended` where there are any."""
    steps: int
    """Optimizer steps that the configuration asks for."""
    metrics: list[dict[str, Any]]

    @property
    def step(self) -> int:
        """The last step whose metrics are written."""
        return int(self.metrics[-1]["step"]) if self.metrics else 0

    @property
    def best(self) -> dict[str, Any] | None:
        """The validation with the greatest acceptance length."""
        validated = [row for row in self.metrics if "acceptance_length" in row]
        return max(validated, key=lambda row: row["acceptance_length"], default=None)

    @property
    def state(self) -> str:
        """In a word or two: what is going on, or how it ended."""
        state: str = self.status["state"]
        return self.status["doing"] if state == "running" else state


def read_run(folder: Path) -> RunView:
    """Read a run folder; one that is being written to as well.

    Raises:
        ValueError: it holds no run, or a file of it is damaged.
    """
    return RunView(folder, read_status(folder), read_steps(folder), read_metrics(folder))


def find_runs(root: Path) -> tuple[list[RunView], dict[Path, str]]:
    """The runs below a folder, those that began last first; and of those that cannot be read,
    which file is damaged.

    Raises:
        ValueError: there is none.
    """
    views, damaged = [], {}
    for path in sorted(root.rglob(STATUS)):
        try:
            views.append(read_run(path.parent))
        except ValueError as error:
            damaged[path.parent] = str(error)
    if not views and not damaged:
        raise ValueError(f"no run below {root}: `headstart train` makes one")
    return sorted(views, key=lambda view: view.status["started"], reverse=True), damaged


def print_runs(root: Path, console: Console | None = None) -> None:
    """Print a line for each run below a folder."""
    table = Table(title=f"Runs below {root}")
    for name in ("run", "state", "step", "best", "at step", "loss", "began", "why"):
        numeric = name in ("step", "best", "at step", "loss")
        table.add_column(name, justify="right" if numeric else "left", overflow="fold")
    views, damaged = find_runs(root)
    for view in views:
        best = view.best
        table.add_row(
            _name(view.folder, root),
            view.state,
            f"{view.step} / {view.steps}",
            f"{best['acceptance_length']:.3f}" if best else "",
            str(best["step"]) if best else "",
            f"{view.metrics[-1]['loss']:.3f}" if view.metrics else "",
            view.status["started"][:16].replace("T", " "),
            str(view.status.get("why", "")),
        )
    for folder, why in damaged.items():
        why = why.replace(f"{folder}/", "")  # the first column has it
        table.add_row(_name(folder, root), "damaged", "", "", "", "", "", why)
    (console or plain_console()).print(table)


def _name(folder: Path, root: Path) -> str:
    return str(folder.relative_to(root)) if folder != root else str(root)


def print_run(folder: Path, console: Console | None = None) -> None:
    """Print all that a run folder says, and draw its picture into it."""
    view, console = read_run(folder), console or plain_console()
    table = Table(title=str(folder), show_header=False)
    for name, value in _facts(view).items():
        table.add_row(name, value)
    console.print(table)
    if view.metrics:
        console.print(f"Drawn: {plot_run(folder)}")


def _facts(view: RunView) -> dict[str, str]:
    facts = {"state": view.state, "began": view.status["started"]}
    facts |= {key: view.status[key] for key in ("ended", "why") if key in view.status}
    facts["step"] = f"{view.step} of {view.steps}"
    if view.metrics:
        last = view.metrics[-1]
        facts["loss"] = f"{last['loss']:.4f}"
        facts["acceptance length on training rows"] = f"{last['batch_acceptance_length']:.3f}"
    if best := view.best:
        facts["best head"] = f"of step {best['step']}: {summary_text(best)}"
        facts["its folder"] = str(view.folder / "head")
    saved = checkpoints(view.folder / "checkpoints")
    facts["checkpoints"] = ", ".join(path.name for path in saved) or "none"
    if view.status["state"] not in ("running", "finished"):
        config = shlex.quote(str(view.folder / "config.yaml"))
        facts["to go on"] = f"headstart train --config {config} --resume"
    return facts


def plot_run(folder: Path) -> Path:
    """Draw loss and acceptance over the steps of a run into `progress.png`; returns its path.

    Raises:
        ValueError: the folder holds no run, or one without a step.
    """
    view = read_run(folder)
    if not view.metrics:
        raise ValueError(f"{folder} has no step yet: nothing to draw")
    figure = Figure(figsize=(10, 4), layout="constrained")
    loss, acceptance = figure.subplots(1, 2)
    steps = [row["step"] for row in view.metrics]
    loss.plot(steps, [row["loss"] for row in view.metrics], label="loss", linewidth=1)
    loss.set(xlabel="step", ylabel="nats a draft")
    title = f"{folder.name}, {view.step} of {view.steps} steps"
    loss.set_title(title, parse_math=False)  # a name holds any character
    of_batches = [row["batch_acceptance_length"] for row in view.metrics]
    acceptance.plot(steps, of_batches, label="training rows", linewidth=1, alpha=0.6)
    validated = [row for row in view.metrics if "acceptance_length" in row]
    if validated:
        points = [row["step"] for row in validated], [row["acceptance_length"] for row in validated]
        acceptance.plot(*points, marker="o", label="held out, walked")
    if best := view.best:
        acceptance.annotate(
            f"{best['acceptance_length']:.3f}",
            (best["step"], best["acceptance_length"]),
            textcoords="offset points",
            xytext=(0, 8),
            ha="center",
        )
    acceptance.set(xlabel="step", ylabel="acceptance length", title="tokens a round")
    for axes in (loss, acceptance):
        axes.grid(alpha=0.3)
        axes.legend()
    path = folder / PLOT
    with whole_file(path) as work:
        figure.savefig(work, dpi=120)
    return path

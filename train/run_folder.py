"""A run is a folder: what is in it, whether a run may start or go on there, how far it is and how
it ended.
"""

import json
import os
import platform
import shlex
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from matplotlib import style
from matplotlib.figure import Figure
from rich.console import Console
from rich.table import Table

from headstart.common.children import remove_left_behind
from headstart.common.console import duration, plain_console
from headstart.common.files import (
    PART,
    atomic_file,
    is_locked,
    lock_folder,
    open_own,
    refuse_link,
    write_atomically,
)
from headstart.configs.loader import dump_config, load_saved, read_saved
from headstart.configs.schema import Config
from headstart.data.sources import builtin_name
from headstart.eval.acceptance import RecallCounts
from headstart.heads.admission import reading
from headstart.train.checkpoints import (
    check_checkpoint,
    checkpoint_progress,
    checkpoints,
    other_origin,
)

CONFIG = "config.yaml"
STATUS = "status.json"
METRICS = "metrics.jsonl"
PHASES = "phases.json"
OF_A_HEAD = ("*.json", "*.safetensors", "adapter")  # names in a head's folder
_NO_DIFFERENCE = (
    "data.cache_dir", "target.sharded", "train.activation_checkpointing", "train.compile",
    "train.save_steps", "train.save_total_limit",
)  # fmt: skip
"""Settings that may change when a run goes on: its steps stay the same."""
_SHARES = ("train.batch_size", "train.gradient_accumulation_steps")
"""Settings that may change with the number of processes: their product with it may not."""


class RunRefused(ValueError):
    """A start that does not fit what the folder holds: nothing there changes."""


@contextmanager
def run_folder(run: Path, doing: str) -> Iterator[None]:
    """Work in a run folder, alone, and note in status.json what is done there and how it ended.

    A process that is killed notes nothing; that nobody holds the folder then tells. A start that is
    refused leaves the note of the run that is there.

    Raises:
        ValueError: another process works there.
    """
    with lock_folder(run, "output_dir=PATH"):
        note = {"doing": doing, "started": _now(), "host": platform.node(), "pid": os.getpid()}
        there = (run / STATUS).read_text(encoding="utf-8") if (run / STATUS).is_file() else None
        _write_status(run, {**note, "state": "running"})
        try:
            yield
        except RunRefused:
            if there is not None:
                write_atomically(run / STATUS, there)
            raise
        except BaseException as error:
            stopped = isinstance(error, KeyboardInterrupt)
            why = " ".join(str(error).split()) or type(error).__name__
            state = "stopped" if stopped else "failed"
            _write_status(run, {**note, "state": state, "why": why, "ended": _now()})
            raise
        _write_status(run, {**note, "state": "finished", "ended": _now()})


def _now() -> str:
    return datetime.now(timezone.utc).isoformat(timespec="seconds")


def _write_status(run: Path, status: dict[str, Any]) -> None:
    write_atomically(run / STATUS, json.dumps(status, indent=2) + "\n")


def read_status(run: Path) -> dict[str, Any]:
    """status.json, with state `killed` where a run says that it runs and nobody holds its folder.

    Raises:
        ValueError: there is none, or it is damaged.
    """
    path = run / STATUS
    if not path.is_file():
        raise ValueError(f"{run} holds no run: there is no {path}")
    with reading(str(path), "is damaged"):
        status: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        if not all(isinstance(status[key], str) for key in ("state", "doing", "started")):
            raise TypeError("state, doing and started are to be texts")
    if status["state"] == "running" and not is_locked(run):
        status |= {"state": "killed", "why": "its process is gone and noted no end"}
    return status


def read_steps(run: Path) -> int:
    """Optimizer steps that the configuration of a run asks for; 0: it failed before its
    configuration was written.

    Raises:
        ValueError: config.yaml is damaged.
    """
    path = run / CONFIG
    if not path.is_file():
        return 0
    # Of another version it may have settings that this one does not know.
    tree = read_saved(path)
    train = tree.get("train")
    steps = train.get("max_steps") if isinstance(train, dict) else None
    if not isinstance(steps, int):
        raise ValueError(f"{path} is damaged: it has no train.max_steps")
    return steps


def open_run(config: Config, resume: bool, processes: int) -> None:
    """Write the resolved configuration into a run folder, where a run may start or go on there.

    A folder without a checkpoint holds nothing to lose and is started afresh.

    Args:
        config: of the run.
        resume: whether it goes on from the newest checkpoint.
        processes: of this launch.

    Raises:
        RunRefused: there is a checkpoint and `resume` is off, or the newest one was written by a
            configuration that trains something else; or what is to be replaced is of no run.
        ValueError: the newest one is damaged, or a folder to write to is a link.
    """
    run = config.output_dir
    for ours in ("checkpoints", "head", METRICS):
        refuse_link(run / ours)
    _check_ours(run)
    for folder in (run, run / "checkpoints"):
        remove_left_behind(folder, PART)
    if saved := checkpoints(run / "checkpoints"):
        if not resume:
            raise RunRefused(
                f"{run} holds a run already: go on with --resume, or name another folder, "
                "output_dir=PATH"
            )
        state = check_checkpoint(saved[-1])
        earlier = load_saved(saved[-1] / "config.yaml")
        if change := what_differs(earlier, state["processes"], config, processes):
            raise RunRefused(
                f"{saved[-1]} was written with {change}: give it back, or name another folder, "
                "output_dir=PATH"
            )
    write_config(config)


def write_config(config: Config) -> None:
    """Write the resolved configuration into the run folder."""
    write_atomically(config.output_dir / CONFIG, dump_config(config))


def _check_ours(run: Path) -> None:
    """Raise `RunRefused` where a run would replace what is of none: a source folder called `head`,
    the config.yaml of another program."""
    beside = sorted((run / "head").iterdir()) if (run / "head").is_dir() else []
    odd = [path for path in beside if not any(map(path.match, OF_A_HEAD))]
    if (run / CONFIG).is_file():
        try:
            ours = read_saved(run / CONFIG).keys() <= Config.model_fields.keys()
        except ValueError:
            ours = False
        if not ours:
            odd.append(run / CONFIG)
    if odd:
        raise RunRefused(
            f"{odd[0]} is of no run and would be lost: name another folder, output_dir=PATH"
        )


def check_origin(run: Path, origin: Mapping[str, str]) -> None:
    """Raise `RunRefused` where the newest checkpoint of a run was written with others than those of
    the `origin` (`RunState.origin`)."""
    if not (saved := checkpoints(run / "checkpoints")):
        return
    if why := other_origin(saved[-1], check_checkpoint(saved[-1]), origin):
        raise RunRefused(why)


def what_differs(earlier: Config, its_processes: int, now: Config, processes: int) -> str:
    """The first setting that changes what is trained, in words; empty if there is none.

    A step takes `batch_size` x `gradient_accumulation_steps` conversations in each process: how
    they are dealt may change, how many there are may not.
    """
    before = _training_settings(earlier, its_processes)
    after = _training_settings(now, processes)
    for key in sorted(before):
        if before[key] != after.get(key, before[key]):
            return f"{key}={before[key]}, now {after[key]}"
    return ""


def _training_settings(config: Config, processes: int) -> dict[str, Any]:
    tree = config.model_dump(mode="json", exclude={"output_dir", "eval", "wandb"})
    for source in tree["data"]["prompts"]:  # a set has one name, wherever a run tells of it
        source["path"] = builtin_name(source["path"])
    seed = tree.pop("seed")
    # Whose copies are no training prompts, so that another one deals all of them anew.
    evaluated = config.eval and builtin_name(config.eval.prompts)
    settings = {f"{s}.{key}": v for s, section in tree.items() for key, v in section.items()}
    settings |= {"seed": seed, "eval.prompts": evaluated}
    settings["head.centroid_intermediate_top_k"] = config.head.clusters_read  # once 32, now null
    a_step = processes
    for key in _SHARES:
        a_step *= settings.pop(key)
    for key in _NO_DIFFERENCE:
        del settings[key]
    if config.train.num_epochs is not None:  # which says how many steps there are
        del settings["train.max_steps"]
    return settings | {"train.batch_size x train.gradient_accumulation_steps x processes": a_step}


def append_metrics(run: Path, row: dict[str, Any]) -> None:
    """Add one line to metrics.jsonl."""
    with open_own(run / METRICS, "a") as file:
        file.write(json.dumps(row) + "\n")


def read_metrics(run: Path) -> list[dict[str, Any]]:
    """The whole lines of metrics.jsonl; none where there is no such file.

    Raises:
        ValueError: one is damaged; it is named.
    """
    path = run / METRICS
    if not path.is_file():
        return []
    *lines, torn = path.read_bytes().split(b"\n")
    del torn  # empty after a whole line; the rest of one that a kill cut, or that is being written
    rows: list[dict[str, Any]] = []
    for number, line in enumerate(lines, start=1):
        with reading(f"{path}, line {number}", "is damaged; delete the line"):
            row = json.loads(line)
            needed = [row[key] for key in ("step", "loss")]
            if not all(isinstance(value, int | float) for value in [*needed, *row.values()]):
                raise TypeError("not all of it are numbers")
        rows.append(row)
    return rows


def drop_metrics_after(run: Path, step: int) -> None:
    """Forget the metrics of steps that will be done again, and a line cut short by a kill."""
    if (run / METRICS).is_file():
        kept = [row for row in read_metrics(run) if row["step"] <= step]
        write_atomically(run / METRICS, "".join(f"{json.dumps(row)}\n" for row in kept))


def summary_text(row: dict[str, Any]) -> str:
    """One or two lines of a validation: acceptance lengths, and the recall of the clusters."""
    text = f"acceptance length {row['acceptance_length']:.3f}"
    if "recall" not in row:
        return text
    tops = " / ".join(RecallCounts.tops())
    shares = {
        kind: " / ".join(f"{share:.3f}" for share in row["recall"][kind].values())
        for kind in ("argmax", "mass")
    }
    return (
        f"{text} (dense {row['dense_acceptance_length']:.3f}); in the top {tops} clusters: the "
        f"teacher's best token {shares['argmax']}, its mass {shares['mass']}"
    )


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
    summarized: dict[str, Any] | None = None
    """`best` of summary.json, once training has ended."""
    started: dict[str, Any] | None = None
    """The validation of a finished head before it was trained on, as the newest checkpoint has it;
    None: there is no checkpoint, or the run began with no such head."""

    @property
    def step(self) -> int:
        """The last step whose metrics are written."""
        return int(self.metrics[-1]["step"]) if self.metrics else 0

    @property
    def best(self) -> dict[str, Any] | None:
        """The validation of the head in head/. Once training has ended it is that of summary.json,
        which has its ordered embeddings, and step 0 where no step was better than the start."""
        if self.summarized is not None:
            return self.summarized
        validated = [row for row in self.metrics if "acceptance_length" in row]
        if self.started is not None:
            validated = [self.started, *validated]
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
    status = read_status(folder)
    trained = status["state"] == "finished" or status["doing"] == "evaluating"
    best = _summarized_best(folder) if trained else None
    steps, metrics = read_steps(folder), read_metrics(folder)
    return RunView(folder, status, steps, metrics, best, _started(folder))


def _started(folder: Path) -> dict[str, Any] | None:
    if not (saved := checkpoints(folder / "checkpoints")):
        return None
    try:
        start = checkpoint_progress(saved[-1]).start
    except (OSError, ValueError, LookupError, TypeError):  # --resume says what is damaged
        return None
    return {"step": 0, "acceptance_length": start} if start else None


def _summarized_best(folder: Path) -> dict[str, Any] | None:
    path = folder / "summary.json"
    if not path.is_file():
        return None
    with reading(str(path), "is damaged"):
        best: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))["best"]
        summary_text(best | {"step": int(best["step"])})
    return best


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


def print_run(folder: Path) -> None:
    """Print all that a run folder says, and draw its picture into it."""
    view, console = read_run(folder), plain_console()
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
    facts |= _phases(view.folder)
    saved = checkpoints(view.folder / "checkpoints")
    facts["checkpoints"] = ", ".join(path.name for path in saved) or "none"
    if view.status["state"] not in ("running", "finished"):
        # The folder may have moved, or be looked at from another one.
        config, out = str(view.folder / "config.yaml"), f"output_dir={view.folder}"
        command = shlex.join(["headstart", "train", "--config", config, out, "--resume"])
        adapted = (view.folder.parent / "notes.json").is_file()
        facts["to go on"] = "give the same headstart adapt command again" if adapted else command
    return facts


def _phases(folder: Path) -> dict[str, str]:
    """What each phase of the run that began last took, or should take."""
    path, facts = folder / PHASES, {}
    if not path.is_file():
        return {}
    with reading(str(path), "is damaged; delete it"):
        for row in json.loads(path.read_text(encoding="utf-8")):
            should, took = (row[key] for key in ("seconds", "took"))
            ended = "" if took is None else f"took {duration(float(took))}, "
            told = "it is not known how long" if should is None else duration(float(should))
            facts[f"phase {row['name']}"] = f"{ended}should take {told}"
    return facts


@style.context("default")  # not what a matplotlibrc in the current folder says
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
        acceptance.plot(*points, marker="o", label="held out, simulated")
    if best := view.best:
        drawn = best.get("dense_acceptance_length", best["acceptance_length"])  # as validated
        acceptance.annotate(
            f"{drawn:.3f}",
            (best["step"], drawn),
            textcoords="offset points",
            xytext=(0, 8),
            ha="center",
        )
    acceptance.set(xlabel="step", ylabel="acceptance length", title="tokens a round")
    for axes in (loss, acceptance):
        axes.grid(alpha=0.3)
        axes.legend()
    path = folder / PLOT
    with atomic_file(path) as work:
        figure.savefig(work, dpi=120)
    return path

"""A run is a folder: what is in it, whether a run may start or go on there, and how it ended."""

import json
import os
import platform
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from headstart.configs.loader import dump_config, read_yaml
from headstart.configs.schema import Config
from headstart.heads.files import PART, open_own, refuse_link, write_atomically
from headstart.heads.leftovers import remove_left_behind
from headstart.heads.locks import is_held, only_one_in
from headstart.train.checkpoints import (
    check_checkpoint,
    checkpoint_config,
    checkpoints,
)

CONFIG = "config.yaml"
STATUS = "status.json"
METRICS = "metrics.jsonl"
_NO_DIFFERENCE = (
    "run.dir", "data.cache_dir", "target.sharded", "train.activation_checkpointing",
    "train.compile", "train.checkpoint_every", "train.keep_checkpoints",
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
    with only_one_in(run):
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
    try:
        status: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        if not all(isinstance(status[key], str) for key in ("state", "doing", "started")):
            raise TypeError("state, doing and started are to be texts")
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise ValueError(f"{path} is damaged ({_reason(error)})") from error
    if status["state"] == "running" and not is_held(run):
        status |= {"state": "killed", "why": "its process is gone and noted no end"}
    return status


def _reason(error: Exception) -> str:
    return f"no {error}" if isinstance(error, KeyError) else " ".join(str(error).split())


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
    tree = read_yaml(path, Config)
    train = tree.get("train")
    steps = train.get("steps") if isinstance(train, dict) else None
    if not isinstance(steps, int):
        raise ValueError(f"{path} is damaged: it has no train.steps")
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
            configuration that trains something else.
        ValueError: the newest one is damaged, or a folder to write to is a link.
    """
    run = config.run.dir
    for ours in ("checkpoints", "head", METRICS):
        refuse_link(run / ours)
    for folder in (run, run / "checkpoints"):
        remove_left_behind(folder, PART)
    if saved := checkpoints(run / "checkpoints"):
        if not resume:
            raise RunRefused(
                f"{run} holds a run already: go on with --resume, or name another folder, "
                "run.dir=PATH"
            )
        state = check_checkpoint(saved[-1])
        earlier = checkpoint_config(saved[-1])
        if change := what_differs(earlier, state["processes"], config, processes):
            raise RunRefused(
                f"{saved[-1]} was written with {change}: give it back, or name another folder, "
                "run.dir=PATH"
            )
    write_atomically(run / CONFIG, dump_config(config))


def what_differs(earlier: Config, its_processes: int, now: Config, processes: int) -> str:
    """The first setting that changes what is trained, in words; empty if there is none.

    A step takes `batch_size` x `gradient_accumulation_steps` conversations in each process: how
    they are dealt may change, how many there are may not.
    """
    before = _training_settings(earlier, its_processes)
    after = _training_settings(now, processes)
    for key in sorted(before):
        if before[key] != after[key]:
            return f"{key}={before[key]}, now {after[key]}"
    return ""


def _training_settings(config: Config, processes: int) -> dict[str, Any]:
    tree = config.model_dump(mode="json", exclude={"eval", "wandb"})
    settings = {f"{s}.{key}": v for s, section in tree.items() for key, v in section.items()}
    a_step = processes
    for key in _SHARES:
        a_step *= settings.pop(key)
    for key in _NO_DIFFERENCE:
        del settings[key]
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
        try:
            row = json.loads(line)
            needed = [row[key] for key in ("step", "loss")]
            if not all(isinstance(value, int | float) for value in [*needed, *row.values()]):
                raise TypeError("not all of it are numbers")
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            raise ValueError(
                f"{path}, line {number} is damaged ({_reason(error)}): delete the line"
            ) from error
        rows.append(row)
    return rows


def drop_metrics_after(run: Path, step: int) -> None:
    """Forget the metrics of steps that will be done again, and a line cut short by a kill."""
    if (run / METRICS).is_file():
        kept = [row for row in read_metrics(run) if row["step"] <= step]
        write_atomically(run / METRICS, "".join(f"{json.dumps(row)}\n" for row in kept))

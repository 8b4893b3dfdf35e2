"""Checkpoints: safetensors and JSON in one folder that appears whole or not at all; and the moving
average of the weights that they hold."""

import json
import re
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from pydantic import TypeAdapter
from safetensors.torch import load_file, save_file
from torch.optim.swa_utils import get_ema_multi_avg_fn

from headstart.common.files import atomic_folder, content_sha256, file_sha256, plain_name
from headstart.common.processes import full_tensor, placed_like
from headstart.configs.loader import save_config
from headstart.configs.schema import Config, TrainConfig
from headstart.heads.admission import reading
from headstart.heads.kinds import kind_of
from headstart.heads.target import Target
from headstart.heads.unroll import DraftHead


class Average:
    """Weights averaged over the steps, in float32; a run without a decay averages nothing.

    The decay of the first steps is smaller, `(1 + n) / (10 + n)` after n of them, so that the start
    is soon forgotten (as TensorFlow's `ExponentialMovingAverage` with `num_updates`).

    Args:
        parameters: name -> parameter, as the optimizer updates them.
        decay: a step; None: none.
    """

    def __init__(self, parameters: dict[str, torch.nn.Parameter], decay: float | None):
        self.parameters, self.decay = parameters, decay
        self.values: dict[str, torch.Tensor] = {}
        if decay is not None:
            self.values = {name: p.detach().clone() for name, p in parameters.items()}

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Take in the weights after `step` (from 1) optimizer steps."""
        if self.decay is not None:
            average = get_ema_multi_avg_fn(min(self.decay, (1 + step) / (10 + step)))
            average(list(self.values.values()), list(self.parameters.values()), step)

    @contextmanager
    def applied(self) -> Iterator[None]:
        """Within, the average stands in the place of the weights."""
        self._swap()
        try:
            yield
        finally:
            self._swap()

    @torch.no_grad()
    def _swap(self) -> None:
        for name, value in self.values.items():
            weights = self.parameters[name].clone()
            self.parameters[name].copy_(value)
            value.copy_(weights)


STATE = "state.json"
STEP = re.compile(r"step-\d{6,}")  # name of a checkpoint


@dataclass
class Progress:
    """How far a run is."""

    step: int = 0
    """Optimizer steps done."""
    best: float = 0.0
    """The best acceptance length so far; 0 before the first validation."""
    start: float = 0.0
    """That of a finished head, before it was trained on; 0: the run began with none."""
    evals_since_best: int = 0
    """Validations since the best one."""
    seconds: float = 0.0
    """Time spent in steps and validations."""

    def ended(self, c: TrainConfig) -> bool:
        """Whether nothing is left to do: steps, time, or gain."""
        patience = c.early_stopping_patience
        return (
            self.step >= c.max_steps
            or (c.max_minutes is not None and self.seconds >= 60 * c.max_minutes)
            or (patience is not None and self.evals_since_best >= patience)
        )


@dataclass
class RunState:
    """All that changes while a run goes on: what a checkpoint holds."""

    head: DraftHead
    model: torch.nn.Module
    """The head as accelerate has wrapped it."""
    optimizer: torch.optim.Optimizer
    average: Average
    progress: Progress
    origin: dict[str, str] = field(default_factory=dict)
    """What a run goes on from only where it is the same, by name: SHA-256."""
    begun_here: bool = True
    """Whether the head began with this run: what of it is not trained is in no other place."""

    def saved(self) -> dict[str, torch.nn.Parameter]:
        """Name -> parameter that a checkpoint holds: those that are trained, and of a head that
        began here all but the target's table."""
        if not self.begun_here:
            return self.head.trainable()
        tables = tuple(kind_of(self.head.assistant.config).tables)
        return {n: p for n, p in self.head.named_parameters() if not n.endswith(tables)}

    def tensors(self) -> dict[str, dict[str, torch.Tensor]]:
        """Whole tensors by file; all processes must call it.

        Of the head what `saved` says; the optimizer's moments and the
        average by parameter name.
        """
        moments = {
            f"{name}.{key}": full_tensor(value)
            for name, parameter in self.head.trainable().items()
            for key, value in self.optimizer.state[parameter].items()
        }
        weights = {n: full_tensor(tensor.detach()) for n, tensor in self.saved().items()}
        files = {"head": weights, "optimizer": moments}
        if self.average.values:
            files["average"] = {n: full_tensor(value) for n, value in self.average.values.items()}
        return {
            f"{name}.safetensors": {key: tensor.contiguous() for key, tensor in tensors.items()}
            for name, tensors in files.items()
        }


def save_checkpoint(state: RunState, config: Config, target: Target) -> None:
    """Write `checkpoints/step-NNNNNN` of the run and remove all but the newest that are to be kept.

    All processes must call it; the main one writes.

    Args:
        state: of the run.
        config: the resolved configuration, kept beside the weights.
        target: its fingerprint is saved.

    Raises:
        OSError: the disk is full; earlier checkpoints are kept.
    """
    files, processes = state.tensors(), PartialState()
    if not processes.is_main_process:
        return
    folder = config.output_dir / "checkpoints"
    with atomic_folder(folder / f"step-{state.progress.step:06d}") as work:
        for name, tensors in files.items():
            save_file(tensors, work / name)
        save_config(config, work / "config.yaml")
        content: dict[str, Any] = {
            **asdict(state.progress),
            "target": target.fingerprint,
            "origin": state.origin,
            "processes": processes.num_processes,
            "files": {name: file_sha256(work / name) for name in [*files, "config.yaml"]},
        }
        (work / STATE).write_text(json.dumps(content | {"sha256": content_sha256(content)}))
    for old in checkpoints(folder)[: -config.train.save_total_limit]:
        shutil.rmtree(old)


def checkpoints(folder: Path) -> list[Path]:
    """Complete checkpoints, oldest first; links and other names are none of ours."""
    found = (
        path
        for path in folder.glob("step-*")
        if STEP.fullmatch(path.name) and path.is_dir() and not path.is_symlink()
    )
    return sorted(found, key=_step)


def _step(path: Path) -> int:
    return int(path.name.removeprefix("step-"))


def check_checkpoint(path: Path) -> dict[str, Any]:
    """The state of a checkpoint whose files are all as they were written: progress, target,
    processes.

    Raises:
        ValueError: a file is missing or damaged; the newest earlier checkpoint that is whole is
            offered.
    """
    try:
        return _read_state(path)
    except ValueError as error:
        earlier = [other for other in checkpoints(path.parent) if _step(other) < _step(path)]
        raise ValueError(f"{error}: {_way_out(path, earlier)}") from error


def _read_state(path: Path) -> dict[str, Any]:
    with reading(str(path / STATE), "is missing or damaged"):
        state: dict[str, Any] = json.loads((path / STATE).read_text(encoding="utf-8"))
        if content_sha256(state) != state["sha256"]:
            raise ValueError(f"{path / STATE} is damaged: its SHA-256 does not match")
        for name, expected in state["files"].items():
            plain_name(name, path / STATE)
            if not (path / name).is_file():
                raise ValueError(f"{path / name} is missing")
            if file_sha256(path / name) != expected:
                raise ValueError(f"{path / name} is damaged: its SHA-256 does not match")
        _progress(state)
        if not (isinstance(state["processes"], int) and isinstance(state["target"], str)):
            raise TypeError("processes is to be a number, and target a text")
    return state


def _way_out(path: Path, earlier: list[Path]) -> str:
    for other in reversed(earlier):
        try:
            _read_state(other)
        except ValueError:
            continue
        return f"delete the folder {path}, and --resume goes on from {other}, which is whole"
    return "no earlier checkpoint is whole: name another folder, output_dir=PATH, to start afresh"


def checkpoint_progress(path: Path) -> Progress:
    """How far the run was, of a checkpoint that was checked."""
    return _progress(json.loads((path / STATE).read_text(encoding="utf-8")))


def other_origin(path: Path, saved: Mapping[str, Any], origin: Mapping[str, str]) -> str:
    """Why a run does not go on from a checkpoint of this state; empty: it may. Checkpoints of
    before say nothing of it."""
    for name, sha256 in origin.items():
        if saved.get("origin", {}).get(name, sha256) != sha256:
            return (
                f"{path} was trained with other {name}, which have changed since: put them back, "
                "or name another folder, output_dir=PATH"
            )
    return ""


@torch.no_grad()
def load_checkpoint(state: RunState, path: Path, target: Target) -> None:
    """Fill the state of a run from a checkpoint.

    Args:
        state: of a run at step 0; the head's weights may be split over the processes.
        path: of a checkpoint.
        target: that the head is trained for.

    Raises:
        ValueError: the checkpoint is damaged, of a head with other parameters, of another target or
            of other texts.
    """
    saved = check_checkpoint(path)
    if saved["target"] != target.fingerprint:
        raise ValueError(
            f"{path} was trained for a target with fingerprint {saved['target'][:12]}, "
            f"{target.name} now has {target.fingerprint[:12]}: name another folder, output_dir=PATH"
        )
    if why := other_origin(path, saved, state.origin):
        raise ValueError(why)
    weights = load_file(path / "head.safetensors")
    parameters = state.saved()
    shapes = {name: tuple(parameter.shape) for name, parameter in parameters.items()}
    found = {name: tuple(tensor.shape) for name, tensor in weights.items()}
    if shapes != found:
        odd = next(k for k in shapes | found if shapes.get(k) != found.get(k))
        raise ValueError(
            f"{path} is of another head: {odd} is {found.get(odd)} there and {shapes.get(odd)} here"
        )
    for name, parameter in parameters.items():
        parameter.copy_(placed_like(weights[name], parameter))
    for key, value in load_file(path / "optimizer.safetensors").items():
        name, _, moment = key.rpartition(".")
        parameter = parameters[name]
        # The count of steps is no moment: it is whole in every process.
        alike = value.shape == parameter.shape
        placed = placed_like(value, parameter) if alike else value.to(parameter.device)
        state.optimizer.state[parameter][moment] = placed
    if values := state.average.values:
        for name, value in load_file(path / "average.safetensors").items():
            values[name].copy_(placed_like(value, values[name]))
    state.progress = _progress(saved)


def _progress(state: dict[str, Any]) -> Progress:
    # Checkpoints of before 2026-11-28 call it otherwise.
    state = {"evals_since_best": state.get("stale"), **state}
    values = {field.name: state[field.name] for field in fields(Progress)}
    return TypeAdapter(Progress).validate_python(values)

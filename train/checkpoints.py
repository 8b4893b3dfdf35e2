"""Checkpoints: safetensors and JSON in one folder that appears whole or not at all."""

import json
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from headstart.heads.unroll import DraftHead

KEEP = 2


def save_checkpoint(
    folder: Path,
    step: int,
    head: DraftHead,
    optimizer: torch.optim.Optimizer,
    state: dict[str, Any],
) -> Path:
    """Write `folder/step-NNNNNN` and remove all but the newest `KEEP`.

    Args:
        folder: the run's `checkpoints/`.
        step: optimizer steps done.
        head: its trainable parameters are saved; the target's table is not.
        optimizer: its moments are saved.
        state: JSON values to come back from `load_checkpoint`.
    """
    path = folder / f"step-{step:06d}"
    work = folder / f"{path.name}.part"
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir(parents=True)
    save_file(
        {k: p.detach().contiguous() for k, p in head.trainable().items()}, work / "head.safetensors"
    )
    moments = {
        f"{name}.{key}": value.contiguous()
        for name, parameter in head.trainable().items()
        for key, value in optimizer.state[parameter].items()
    }
    save_file(moments, work / "optimizer.safetensors")
    (work / "state.json").write_text(json.dumps({"step": step, **state}))
    shutil.rmtree(path, ignore_errors=True)
    work.rename(path)
    for old in checkpoints(folder)[:-KEEP]:
        shutil.rmtree(old)
    return path


def checkpoints(folder: Path) -> list[Path]:
    """Complete checkpoints, oldest first."""
    return sorted(p for p in folder.glob("step-*") if p.suffix != ".part")


def load_checkpoint(
    path: Path, head: DraftHead, optimizer: torch.optim.Optimizer
) -> dict[str, Any]:
    """Fill the head and the optimizer; returns the state that was saved, `step` among it.

    Raises:
        ValueError: the checkpoint is of a head with other parameters.
    """
    weights = load_file(path / "head.safetensors")
    parameters = head.trainable()
    shapes = {k: tuple(p.shape) for k, p in parameters.items()}
    found = {k: tuple(p.shape) for k, p in weights.items()}
    if shapes != found:
        odd = next(k for k in shapes | found if shapes.get(k) != found.get(k))
        raise ValueError(
            f"{path} is of another head: {odd} is {found.get(odd)} there and {shapes.get(odd)} here"
        )
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(weights[name])
    state: dict[str, Any] = json.loads((path / "state.json").read_text())
    for key, value in load_file(path / "optimizer.safetensors").items():
        name, _, moment = key.rpartition(".")
        optimizer.state[parameters[name]][moment] = value
    return state

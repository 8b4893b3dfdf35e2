"""Checkpoints: safetensors and JSON in one folder that appears whole or not at all."""

import json
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from headstart.configs.loader import save_config
from headstart.configs.schema import Config
from headstart.heads.files import part_name, replace_folder
from headstart.heads.targets import Target
from headstart.heads.unroll import DraftHead

KEEP = 2


def save_checkpoint(
    config: Config,
    step: int,
    head: DraftHead,
    optimizer: torch.optim.Optimizer,
    target: Target,
    best: float,
) -> None:
    """Write `checkpoints/step-NNNNNN` of the run and remove all but the newest `KEEP`.

    Args:
        config: the resolved configuration, kept beside the weights.
        step: optimizer steps done.
        head: what is trained and the order of its tokens are saved; the target's table is not.
        optimizer: its moments are saved, by parameter name.
        target: its fingerprint is saved.
        best: the best acceptance length so far, 0 before the first validation.
    """
    folder = config.run.dir / "checkpoints"
    path = folder / f"step-{step:06d}"
    work = part_name(path)
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir(parents=True)
    weights = {name: tensor.detach().contiguous() for name, tensor in head.state().items()}
    save_file(weights, work / "head.safetensors")
    moments = {
        f"{name}.{key}": value.contiguous()
        for name, parameter in head.trainable().items()
        for key, value in optimizer.state[parameter].items()
    }
    save_file(moments, work / "optimizer.safetensors")
    state = {"step": step, "best": best, "target": target.fingerprint}
    (work / "state.json").write_text(json.dumps(state))
    save_config(config, work / "config.yaml")
    replace_folder(work, path)
    for old in checkpoints(folder)[:-KEEP]:
        shutil.rmtree(old)


def checkpoints(folder: Path) -> list[Path]:
    """Complete checkpoints, oldest first."""
    return sorted(p for p in folder.glob("step-*") if p.suffix != ".part")


def load_checkpoint(
    path: Path, head: DraftHead, optimizer: torch.optim.Optimizer, target: Target
) -> dict[str, Any]:
    """Fill the head and the optimizer; returns the state that was saved: step, best, target.

    Raises:
        ValueError: the checkpoint is of a head with other parameters, or of another target.
    """
    state: dict[str, Any] = json.loads((path / "state.json").read_text())
    if state["target"] != target.fingerprint:
        raise ValueError(
            f"{path} was trained for a target with fingerprint {state['target'][:12]}, "
            f"{target.name} now has {target.fingerprint[:12]}: name another folder, run.dir=PATH"
        )
    weights = load_file(path / "head.safetensors")
    parameters, tensors = head.trainable(), head.state()
    shapes = {k: tuple(tensor.shape) for k, tensor in tensors.items()}
    found = {k: tuple(p.shape) for k, p in weights.items()}
    if shapes != found:
        odd = next(k for k in shapes | found if shapes.get(k) != found.get(k))
        raise ValueError(
            f"{path} is of another head: {odd} is {found.get(odd)} there and {shapes.get(odd)} here"
        )
    with torch.no_grad():
        for name, tensor in tensors.items():
            tensor.copy_(weights[name])
    for key, value in load_file(path / "optimizer.safetensors").items():
        name, _, moment = key.rpartition(".")
        optimizer.state[parameters[name]][moment] = value
    return state

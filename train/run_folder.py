"""A run is a folder: what is in it, and whether a run may start or go on there."""

import json
from pathlib import Path
from typing import Any

import yaml

from headstart.configs.loader import save_config
from headstart.configs.schema import Config
from headstart.heads.files import write_atomically
from headstart.train.checkpoints import checkpoints


def open_run(config: Config, resume: bool) -> None:
    """Make the run folder and write its resolved configuration.

    A folder without a checkpoint holds nothing to lose and is started afresh.

    Raises:
        ValueError: there is a checkpoint and `resume` is off, or it was made by a configuration
            that trains something else.
    """
    run = config.run.dir
    saved = run / "config.yaml"
    if checkpoints(run / "checkpoints"):
        if not resume:
            raise ValueError(
                f"{run} holds a run already: go on with --resume, or name another folder, "
                "run.dir=PATH"
            )
        earlier = Config.model_validate(yaml.safe_load(saved.read_text(encoding="utf-8")))
        if change := what_differs(earlier, config):
            raise ValueError(
                f"{run} was started with {change}: give it back, or name another folder, "
                "run.dir=PATH"
            )
    run.mkdir(parents=True, exist_ok=True)
    save_config(config, saved)


def what_differs(earlier: Config, now: Config) -> str:
    """The first setting that changes what is trained, in words; empty if there is none."""
    for (key, was), (_, value) in zip(
        sorted(_training_settings(earlier).items()),
        sorted(_training_settings(now).items()),
        strict=True,
    ):
        if was != value:
            return f"{key}={was}, now {value}"
    return ""


def _training_settings(config: Config) -> dict[str, Any]:
    tree = config.model_dump(mode="json", exclude={"eval", "wandb"})
    settings = {f"{s}.{key}": v for s, section in tree.items() for key, v in section.items()}
    del settings["run.dir"], settings["data.cache_dir"]
    return settings


def append_metrics(run: Path, row: dict[str, Any]) -> None:
    """Add one line to metrics.jsonl."""
    with (run / "metrics.jsonl").open("a", encoding="utf-8") as file:
        file.write(json.dumps(row) + "\n")


def read_metrics(run: Path) -> list[dict[str, Any]]:
    """The lines of metrics.jsonl."""
    lines = (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines]


def drop_metrics_after(run: Path, step: int) -> None:
    """Forget the metrics of steps that will be done again, and a line cut short by a kill."""
    path = run / "metrics.jsonl"
    if not path.is_file():
        return
    *lines, torn = path.read_text(encoding="utf-8").split("\n")
    del torn  # empty after a whole line
    kept = [line for line in lines if json.loads(line)["step"] <= step]
    write_atomically(path, "".join(f"{line}\n" for line in kept))

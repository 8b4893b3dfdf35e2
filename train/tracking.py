"""Weights & Biases: the metrics of a run, and nothing else unless `wandb.upload` names it."""

import secrets
from typing import Any

from accelerate import Accelerator

from headstart.configs.schema import Config
from headstart.heads.files import write_atomically

RUN_ID = "wandb-id.txt"  # in the run folder: a resumed run goes on in the same place


def start_trackers(accelerator: Accelerator, config: Config) -> None:
    """Begin to log, or go on where the run of this folder was logged before.

    wandb drops rows of steps that it has seen: those that a resumed run does again are the same.
    """
    if config.wandb.mode == "disabled" or not accelerator.is_main_process:
        return
    import wandb

    upload, path = config.wandb.upload, config.run.dir / RUN_ID
    if not path.is_file():
        write_atomically(path, secrets.token_hex(4))
    settings: dict[str, Any] = {
        "console": "auto" if "console" in upload else "off",
        "x_disable_stats": "system" not in upload,
        "x_disable_meta": "system" not in upload,
        "x_disable_machine_info": "system" not in upload,
        "disable_code": True,
        "disable_git": True,
        "disable_job_creation": True,
        "x_save_requirements": False,
    }
    accelerator.init_trackers(
        config.wandb.project,
        config.model_dump(mode="json") if "config" in upload else None,
        {
            "wandb": {
                "mode": config.wandb.mode,
                "dir": str(config.run.dir),
                "id": path.read_text(encoding="utf-8"),
                "name": config.run.dir.name,
                # One entry for all the processes of a run, and all its resumptions.
                "group": config.run.dir.name,
                "resume": "allow",
                "settings": wandb.Settings(**settings),
            }
        },
    )


def finish_trackers(accelerator: Accelerator, config: Config) -> None:
    """Log the best head where asked to, and end."""
    if "head" in config.wandb.upload and accelerator.trackers:
        import wandb

        artifact = wandb.Artifact(f"{config.run.dir.name}-head", type="model")
        artifact.add_dir(str(config.run.dir / "head"))
        accelerator.get_tracker("wandb", unwrap=True).log_artifact(artifact)
    # Not `end_training`, which parts from the other processes too early (`leave_processes`).
    for tracker in accelerator.trackers:
        tracker.finish()

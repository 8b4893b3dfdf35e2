"""Weights & Biases: the metrics of a run, and nothing else unless `wandb.upload` names it."""

import io
import secrets
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from PIL import Image

from headstart.common.files import write_atomically
from headstart.configs.schema import Config
from headstart.eval.page import decoder_name
from headstart.eval.plots import figures

LOGGED = ("acceptance_length", "acceptance_rate", "speedup", "tokens_per_second")
OF_FOLDER = (Path("wandb/settings"), Path(".wandb/settings"))  # that wandb reads, wherever it runs
RUN_ID = "wandb-id.txt"  # in the run folder: a resumed run goes on in the same place


def check_wandb_settings(config: Config) -> None:
    """Raise `ValueError` where the current folder, which somebody else may have made, holds
    settings of wandb: they may say where the user's key and the metrics go."""
    found = [path for path in OF_FOLDER if path.exists()]
    if found and config.wandb.mode != "disabled":
        raise ValueError(
            f"{found[0].absolute()} holds settings of wandb, which may send your key and your "
            "metrics elsewhere: delete it, and say what is yours in the environment "
            "(WANDB_BASE_URL, WANDB_ENTITY) or in ~/.config/wandb/settings"
        )


def start_trackers(accelerator: Accelerator, config: Config) -> None:
    """Begin to log, or go on where the run of this folder was logged before.

    wandb drops rows of steps that it has seen: those that a resumed run does again are the same.
    """
    if config.wandb.mode == "disabled" or not accelerator.is_main_process:
        return
    check_wandb_settings(config)
    accelerator.init_trackers(
        config.wandb.project,
        config.model_dump(mode="json") if "config" in config.wandb.upload else None,
        {"wandb": _place(config)},
    )


def _place(config: Config) -> dict[str, Any]:
    """Arguments of `wandb.init` for the run of this folder."""
    import wandb

    upload, path = config.wandb.upload, config.output_dir / RUN_ID
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
    return {
        "mode": config.wandb.mode,
        "dir": str(config.output_dir),
        "id": path.read_text(encoding="utf-8"),
        "name": config.output_dir.name,
        # One entry for all the processes of a run, and all its resumptions.
        "group": config.output_dir.name,
        "resume": "allow",
        "settings": wandb.Settings(**settings),
    }


def log_report(config: Config, content: dict[str, Any]) -> None:
    """Log an evaluation in the place of its run: the figures of each decoder over all prompts, and
    the pictures of report.html.

    Args:
        config: of the run.
        content: of report.json.
    """
    if config.wandb.mode == "disabled":
        return
    check_wandb_settings(config)
    import wandb

    run = wandb.init(project=config.wandb.project, **_place(config))
    logged: dict[str, Any] = {"eval/verdict": content["verdict"]}
    for r in content["results"]:
        if r["category"] == "all" and r["looping_texts"] == "with":
            name = f"eval/{decoder_name(r)} K={r['num_assistant_tokens']}"
            known = [figure for figure in LOGGED if r[figure] is not None]
            logged |= {f"{name}/{figure}": r[figure] for figure in known}
    for name, figure in figures(content).items():
        picture = io.BytesIO()
        figure.savefig(picture, format="png", dpi=120, facecolor="white")
        logged[f"eval/{name}"] = wandb.Image(Image.open(picture))
    run.log(logged)
    run.finish()


def finish_trackers(accelerator: Accelerator, config: Config) -> None:
    """Log the best head where asked to, and end."""
    if "head" in config.wandb.upload and accelerator.trackers:
        import wandb

        artifact = wandb.Artifact(f"{config.output_dir.name}-head", type="model")
        artifact.add_dir(str(config.output_dir / "head"))
        accelerator.get_tracker("wandb", unwrap=True).log_artifact(artifact)
    # Not `end_training`, which parts from the other processes too early (`leave_processes`).
    for tracker in accelerator.trackers:
        tracker.finish()

"""What several commands parse alike."""

import argparse
from pathlib import Path
from typing import Any, get_args


def count(text: str) -> int:
    """For argparse: a whole number, 1 or more."""
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{value} is not 1 or more")
    return value


def counts(text: str) -> list[int]:
    """For argparse: `2,4`."""
    return [count(part) for part in text.split(",")]


def decoders(text: str) -> list[str]:
    """For argparse: `transformers,exact`."""
    from headstart.configs.schema import Decoder

    known, names = get_args(Decoder), text.split(",")
    if odd := [name for name in names if name not in known]:
        raise argparse.ArgumentTypeError(f"{odd[0]!r} is none of {', '.join(known)}")
    return names


def numbers(text: str) -> list[float]:
    """For argparse: `0,0.7`."""
    return [float(part) for part in text.split(",")]


def default_device() -> Any:
    """Where a model runs that nobody placed: the device of this process of the launch."""
    from headstart.heads.processes import join_processes

    return join_processes().device


def add_config_arguments(parser: argparse.ArgumentParser, required: bool = False) -> None:
    """Add `--config`, `--debug` and the `key=value` settings.

    Args:
        parser: of a command.
        required: whether the command makes no sense without a run YAML.
    """
    default = "" if required else " (default: the built-in defaults)"
    parser.add_argument(
        "--config", required=required, type=Path, metavar="FILE", help=f"run YAML{default}"
    )
    parser.add_argument("--debug", action="store_true", help="show the traceback of a failure")
    parser.add_argument(
        "overrides",
        nargs="*",
        metavar="key=value",
        help="settings, such as target.name=ORG/my-gemma or train.steps=300",
    )

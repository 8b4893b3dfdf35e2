"""What several commands parse alike."""

import argparse
import re
from collections.abc import Callable
from typing import Any, get_args


class Parser(argparse.ArgumentParser):
    """A parser that has `--debug`, as those of all its commands have."""

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        # Suppressed, or the default of a command would replace what stands before its name.
        self.add_argument(
            "--debug", action="store_true", default=argparse.SUPPRESS,
            help="show the traceback of a failure",
        )  # fmt: skip


def count(text: str) -> int:
    """For argparse: a whole number, 1 or more."""
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{value} is not 1 or more")
    return value


def natural(text: str) -> int:
    """For argparse: a whole number, 0 or more."""
    value = int(text)
    if value < 0:
        raise argparse.ArgumentTypeError(f"{value} is below 0")
    return value


def counts(text: str) -> list[int]:
    """For argparse: `2,4`."""
    return [count(part) for part in text.split(",")]


def minutes(text: str) -> float:
    """For argparse: `15m`, `90s`, `1h30m` or a bare number of minutes."""
    unit = r"(\d+(?:\.\d+)?)"
    found = re.fullmatch(rf"{unit}|(?:{unit}h)?(?:{unit}m)?(?:{unit}s)?", text)
    if not text or found is None:
        raise argparse.ArgumentTypeError(f"{text!r} is no time: write 15m, 1h30m or 90s")
    bare, hours, whole, seconds = (float(part or 0) for part in found.groups())
    return bare + 60 * hours + whole + seconds / 60


def _one_of(kind: str, but: str | None = None) -> Callable[[str], str]:
    """For argparse: a name of a `Literal` of the schema (`Quantization`, `Engine`), but for one."""

    def parse(name: str) -> str:
        from headstart.configs import schema  # here, or it would double the time of --help

        known = [one for one in get_args(getattr(schema, kind)) if one != but]
        if name not in known:
            raise argparse.ArgumentTypeError(f"{name!r} is none of {', '.join(known)}")
        return name

    return parse


quantization, engine = _one_of("Quantization"), _one_of("Engine")
installed_engine = _one_of("Engine", but="transformers")  # in an environment of its own


def decoders(text: str) -> list[str]:
    """For argparse: `transformers,exact`."""
    return [_one_of("Decoder")(name) for name in text.split(",")]


def numbers(text: str) -> list[float]:
    """For argparse: `0,0.7`."""
    return [float(part) for part in text.split(",")]


def default_device() -> Any:
    """Where a model runs that nobody placed: the device of this process of the launch."""
    from headstart.common.processes import join_processes

    return join_processes().device


def add_target_arguments(parser: argparse.ArgumentParser) -> None:
    """Add in which dtype a command loads its target, and what is done to that before it is
    served."""
    parser.add_argument(
        "--dtype", choices=("auto", "bfloat16", "float32"), default="auto",
        help="of the target and of heads (default auto: what pays on this machine)",
    )  # fmt: skip
    parser.add_argument(
        "--adapter", action="append", default=[], metavar="ADAPTER",
        help="folder or Hub id (ID@REVISION) of a PEFT adapter on the target; may come again, and "
        "is applied in that order",
    )  # fmt: skip
    parser.add_argument(
        "--keep-adapters", action="store_true",
        help="keep adapters beside the target's weights, in place of adding them to these",
    )  # fmt: skip
    parser.add_argument(
        "--quantization", type=quantization, metavar="NAME",
        help="how the target's layers are held when it is served: torchao-int8, bnb-int8 or "
        "bnb-nf4 (default: as they are)",
    )  # fmt: skip
    parser.add_argument("--revision", help="branch, tag or commit of the target on the Hub")
    parser.add_argument(
        "--trust-remote-code", action="store_true",
        help="let the code run that comes with the target's checkpoint",
    )  # fmt: skip


def target_config(args: argparse.Namespace) -> Any:
    """The `TargetConfig` of `--target` and the arguments beside it."""
    from headstart.configs.schema import TargetConfig

    return TargetConfig(
        name=args.target,
        revision=args.revision,
        dtype=args.dtype,
        trust_remote_code=args.trust_remote_code,
        adapters=args.adapter,
        merge_adapters=not args.keep_adapters,
        quantization=args.quantization,
    )


def add_config_arguments(parser: argparse.ArgumentParser, required: bool = False) -> None:
    """Add `--config` and the `key=value` settings.

    Args:
        parser: of a command.
        required: whether the command makes no sense without a run YAML.
    """
    default = "" if required else " (default: the built-in defaults)"
    parser.add_argument(
        "--config", required=required, metavar="NAME|FILE",
        help=f"a recipe by its name (headstart configs list), or a run YAML{default}",
    )  # fmt: skip
    parser.add_argument(
        "overrides",
        nargs="*",
        metavar="key=value",
        help="settings, such as target.name=ORG/my-gemma or train.steps=300",
    )

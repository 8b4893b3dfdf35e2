"""The `headstart` command: arguments in, one call out, an exit code back.

Exit codes: 0 done, 1 a failure explained in one line on stderr, 2 wrong usage, 130 interrupted
with everything saved, 128 + N ended by the signal N (SIGTERM 143, SIGHUP 129).
"""

import argparse
import logging
import sys
import traceback
from importlib.metadata import version
from pathlib import Path
from typing import Any

from headstart.cli.arguments import Parser, add_config_arguments
from headstart.cli.configs import add_configs_commands
from headstart.cli.data import add_data_commands
from headstart.cli.eval import add_check_command, add_eval_commands
from headstart.cli.heads import add_heads_commands
from headstart.cli.serve import add_publish_command, add_serving_commands
from headstart.cli.train import add_adapt_command, add_bench_commands, add_runs_commands
from headstart.common.console import keep_output, one_line, visible
from headstart.common.files import expand_home
from headstart.common.signals import Ended, tidy_ends


def main(argv: list[str] | None = None) -> int:
    """Run one command; returns the exit code."""
    keep_output()
    args = _parse(argv)
    try:
        for chatty in ("torchao", "bitsandbytes", "torch.utils._pytree"):
            # They warn at import, of what nobody asked for.
            logging.getLogger(chatty).setLevel(logging.ERROR)
        # Seconds of imports, so only after the arguments are known to be good; and the version
        # before the classes that another release may lack.
        from headstart.common.versions import check_transformers

        check_transformers()
        from transformers.utils.logging import disable_progress_bar

        disable_progress_bar()  # ours say more; "Loading weights" took a second
        for handler in logging.getLogger("transformers").handlers:
            handler.setFormatter(_Visible())  # its warnings name what a config.json says
        with tidy_ends():
            args.command(args)
    except KeyboardInterrupt as stop:
        what = (
            one_line(str(stop)) or "interrupted; finished work is kept (train: go on with --resume)"
        )
        print(f"headstart: {what}", file=sys.stderr)
        code = 128 + stop.number if isinstance(stop, Ended) else 130
    except Exception as error:
        if args.debug:
            print(visible(traceback.format_exc()), end="", file=sys.stderr)
        else:
            print(f"headstart: {_one_line(error)} (--debug shows the traceback)", file=sys.stderr)
        code = 1
    else:
        code = 0
    from headstart.common.processes import leave_processes

    leave_processes()  # after the errors, whose frames hold what the command worked with
    return code


class _Visible(logging.Formatter):
    """Messages without control characters."""

    def format(self, record: logging.LogRecord) -> str:
        return visible(super().format(record))


def _parse(argv: list[str] | None) -> argparse.Namespace:
    parser = _parser()
    # argparse takes positionals from one place only; overrides may stand between options too.
    args, rest = parser.parse_known_args(argv)
    odd = [part for part in rest if part.startswith("-") or "=" not in part]
    if odd or (rest and "overrides" not in args):
        parser.error(f"unrecognized arguments: {' '.join(odd or rest)}")
    if rest:
        args.overrides += rest
    for name, value in vars(args).items():
        if name != "overrides":  # in which the settings that are paths see to it
            setattr(args, name, _at_home(value))
    return args


def _at_home(value: Any) -> Any:
    """An argument with `~` taken for the home folder, where a shell left it."""
    match value:
        case str() | Path():
            return type(value)(expand_home(str(value)))
        case list():
            return [_at_home(item) for item in value]
    return value


def _one_line(error: Exception) -> str:
    if type(error).__name__ == "ValidationError":  # arguments that make no settings
        from pydantic import ValidationError

        from headstart.configs.loader import explain_all

        if isinstance(error, ValidationError):
            error = ValueError(explain_all(error))
    text = visible(" ".join(str(error).split())) or "no message"
    # Ours are ValueErrors and RuntimeErrors with a full sentence; others need their type's name.
    known = isinstance(error, (ValueError, RuntimeError, ModuleNotFoundError))
    return text if known else f"{type(error).__name__}: {text}"


def _parser() -> argparse.ArgumentParser:
    parser = Parser(
        prog="headstart",
        description="Give any Gemma model its own multi-token-prediction (MTP) draft head.",
    )
    parser.set_defaults(debug=False)
    parser.add_argument("--version", action="version", version=f"headstart {version('headstart')}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    train = commands.add_parser(
        "train",
        help="distill a draft head for a target, then measure it",
        description="Distill a draft head for a frozen target into a run folder, then measure it. "
        "`accelerate launch train.py` with the same arguments runs the same code.",
        epilog="example: headstart train --config quickstart train.steps=300 run.dir=runs/mine",
    )
    _add_train_arguments(train)
    train.set_defaults(command=_run_train)

    add_configs_commands(commands)
    add_check_command(commands)
    add_data_commands(commands)
    add_heads_commands(commands)
    add_bench_commands(commands)
    add_runs_commands(commands)

    add_eval_commands(commands)
    add_publish_command(commands)
    add_serving_commands(commands)
    add_adapt_command(commands)
    return parser


def _add_train_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--resume",
        action="store_true",
        help="go on from the newest checkpoint of the run folder, or start where there is none",
    )
    parser.add_argument(
        "--plan",
        action="store_true",
        help="print shapes, sizes and token counts, and stop: no data, no training",
    )
    add_config_arguments(parser, required=True)


def _run_train(args: argparse.Namespace) -> None:
    from headstart.configs.loader import load_config
    from headstart.train.plan import print_plan
    from headstart.train.run import run

    config = load_config(args.config, args.overrides)
    if args.plan:
        print_plan(config)
    else:
        run(config, resume=args.resume)

"""The `headstart` command: arguments in, one call out, an exit code back.

Exit codes: 0 done, 1 a failure explained in one line on stderr, 2 wrong usage, 3 a head that is
watched has gone stale, 130 interrupted with everything saved, 128 + N ended by the signal N
(SIGTERM 143, SIGHUP 129).
"""

import argparse
import difflib
import logging
import sys
import traceback
from importlib.metadata import version
from typing import Any

from headstart.cli.arguments import (
    Command,
    CommandParser,
    flag_parents,
    missing,
    read_settings,
    refuse_unread,
    split_words,
)
from headstart.cli.configs import CONFIGS
from headstart.cli.data import EXTRACT, INSPECT, REGENERATE
from headstart.cli.eval import CHECK, COMPARE, EVAL, SIMULATE
from headstart.cli.heads import DESCRIBE, HEADS, ORDER
from headstart.cli.retired import renamed_command, renamed_flags
from headstart.cli.serve import EXPORT, INSTALL, PUBLISH, SERVE_CHECK, WATCH
from headstart.cli.train import ADAPT, BENCH, RUNS, TRAIN
from headstart.common.console import keep_output, one_line, visible
from headstart.common.files import expand_home
from headstart.common.signals import Ended, tidy_ends

COMMANDS: tuple[Command, ...] = (
    TRAIN, ADAPT, EVAL, SIMULATE, COMPARE, CHECK, REGENERATE, EXTRACT, INSPECT, DESCRIBE, ORDER,
    HEADS, EXPORT, SERVE_CHECK, INSTALL, PUBLISH, WATCH, RUNS, CONFIGS, BENCH,
)  # fmt: skip


def main(argv: list[str] | None = None) -> int:
    """Run one command; returns the exit code."""
    keep_output()
    args = _parse(argv)
    if (key := missing(args.of, args.config, args.settings)) is not None:
        named = f"{key}=VALUE"
        if key == "--config":
            named = "--config NAME|FILE, such as --config quickstart (headstart configs list)"
        args.parser.error(f"{args.of.name} needs {named}")
    try:
        for chatty in ("torchao", "bitsandbytes", "torch.utils._pytree"):
            # They warn at import, of what nobody asked for.
            logging.getLogger(chatty).setLevel(logging.ERROR)
        if args.of.settings:
            _read_config(args)
        # Seconds of imports, so only after the arguments are known to be good; and the version
        # before the classes that another release may lack.
        from headstart.common.versions import check_transformers

        check_transformers()
        from transformers.utils.logging import disable_progress_bar

        disable_progress_bar()  # ours say more; "Loading weights" took a second
        for handler in logging.getLogger("transformers").handlers:
            handler.setFormatter(_Visible())  # its warnings name what a config.json says
        with tidy_ends():
            code = args.of.run(args) or 0
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
        if "torch" in sys.modules:
            from headstart.common.processes import wait_for_name

            wait_for_name(error)
    if "torch" in sys.modules:
        from headstart.common.processes import leave_processes

        leave_processes()  # after the errors, whose frames hold what the command worked with
    return code


class _Visible(logging.Formatter):
    """Messages without control characters."""

    def format(self, record: logging.LogRecord) -> str:
        return visible(super().format(record))


def _parse(argv: list[str] | None) -> argparse.Namespace:
    words = sys.argv[1:] if argv is None else argv
    parser = _parser()
    plain = [word for word in words if not word.startswith("-")]
    if (said := renamed_command(plain) or _misspelled(plain)) is not None:
        parser.error(said)
    args, rest = parser.parse_known_args(words)  # words may stand between flags too
    args.debug = getattr(args, "debug", False)
    args.words += [word for word in rest if not word.startswith("-")]
    odd = [word for word in rest if word.startswith("-")]
    if odd:
        args.parser.error(
            "; ".join(renamed_flags(odd))
            or f"unrecognized arguments: {' '.join(odd)}; settings are key=value"
        )
    try:
        found, args.settings = split_words(args.of, args.words)
    except ValueError as error:
        args.parser.error(str(error))
    found |= {"config": args.config, "json": args.json}
    vars(args).update({name: _at_home(value) for name, value in found.items()})
    return args


def _misspelled(words: list[str]) -> str | None:
    """What to say of a command that there is not, where one is spelled like it."""
    names = [command.name for command in COMMANDS]
    if not words or words[0] in names:
        return None
    near = difflib.get_close_matches(words[0], names, n=1)
    return f"no command {words[0]}; one that is spelled like it is {near[0]}" if near else None


def _read_config(args: argparse.Namespace) -> None:
    """Find the file of `--config`, with a line where it is not the recipe of that name, and read
    all settings once, so that wrong ones are told at once."""
    from headstart.configs.recipes import find_config

    if args.config is not None:
        args.config = find_config(args.config)
    refuse_unread(args.of, args.settings, read_settings(args))


def _at_home(value: Any) -> Any:
    """An argument with `~` taken for the home folder, where a shell left it."""
    match value:
        case str():
            return expand_home(value)
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


class _Version(argparse.Action):
    """Looks it up when it is asked for: a checkout that is not installed has none, and runs."""

    def __call__(self, parser: argparse.ArgumentParser, *rest: Any, **more: Any) -> None:
        print(f"headstart {version('headstart')}")
        parser.exit()


def _parser() -> argparse.ArgumentParser:
    parents = flag_parents()
    parser = argparse.ArgumentParser(
        prog="headstart",
        description="Give any Gemma model its own multi-token-prediction (MTP) draft head.",
        epilog="headstart COMMAND --help says more. What a command acts on is an argument, what it "
        "is told is a setting, key=value (headstart configs keys).",
        parents=[parents["--debug"]],
        allow_abbrev=False,
    )
    parser.add_argument("--version", action=_Version, nargs=0, help="show the version and exit")
    commands: Any = parser.add_subparsers(
        required=True, metavar="COMMAND", parser_class=CommandParser, title="commands"
    )
    for command in COMMANDS:
        shared = ["--debug", *command.flags, *(["--config"] if command.settings else [])]
        child: Any = commands.add_parser(
            command.name,
            help=command.summary,
            parents=[parents[flag] for flag in shared],
            allow_abbrev=False,
        )
        child.command = command
        child.add_argument("words", nargs="*")
        child.set_defaults(
            of=command, parser=child, config=None, json=None, resume=False, plan=False
        )
    return parser

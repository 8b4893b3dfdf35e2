"""The grammar of all commands: `headstart COMMAND [ARGUMENT ...] [--config NAME|FILE] [key=value
...]`.

What a command acts on is an argument, what it is told is a setting of the configuration, and a flag
is for what is neither.
"""

import argparse
import re
import shutil
import textwrap
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

SETTING = re.compile(r"[a-z_]+(\.[a-z0-9_]+)*=")
STALE = 3  # the exit code of a watch that found the head stale
FLAGS = {
    "--resume": "go on where an earlier call stopped",
    "--plan": "say what would be done, and stop",
    "--json": "FILE: write the figures there too",
}
"""Those that some commands have, beside `--config`, `--debug` and `--help`."""


@dataclass(frozen=True)
class Argument:
    """What a command acts on."""

    name: str
    """In capitals, as --help writes it."""
    help: str
    many: Literal["1", "?", "*"] = "1"
    """How many there may be. A `*` is the last."""
    choices: tuple[str, ...] = ()
    """Words that it may be. None: any."""


@dataclass(frozen=True)
class Command:
    """One command, and all that its --help says."""

    name: str
    summary: str
    """A line, without a stop at its end."""
    description: str
    example: str
    """A command line, which a test runs."""
    run: Callable[[argparse.Namespace], int | None]
    """Returns the exit code; None: 0."""
    arguments: tuple[Argument, ...] = ()
    settings: tuple[str, ...] = ()
    """Keys that it reads, or `section.*` for all of one. None: it takes no configuration."""
    defaults: tuple[tuple[str, Any], ...] = ()
    """Keys whose default is another than the schema's; an `Argument` stands for what is given as
    that."""
    unnamed: tuple[tuple[str, str], ...] = ()
    """Keys that nothing is read from where nobody names them, and what --help says then."""
    required: tuple[str, ...] = ()
    """Keys that somebody has to name, and `--config` where a file has to."""
    flags: tuple[str, ...] = ()
    """Of `FLAGS`."""

    def usage(self) -> str:
        """The line that shows how it is called."""
        shapes = {"1": "{}", "?": "[{}]", "*": "[{} ...]"}
        parts = [shapes[a.many].format("|".join(a.choices) or a.name) for a in self.arguments]
        if self.settings:
            needed = "--config" in self.required
            parts += ["--config NAME|FILE" if needed else "[--config NAME|FILE]", "[key=value ...]"]
        parts += [f"[{flag}{' FILE' if flag == '--json' else ''}]" for flag in self.flags]
        return f"headstart {self.name} {' '.join(parts)}".rstrip()


def flag_parents() -> dict[str, argparse.ArgumentParser]:
    """A parent parser for each flag, so that it is declared once."""
    parents = {}
    for flag, text in {"--debug": "show the traceback of a failure", **FLAGS}.items():
        parents[flag] = parent = argparse.ArgumentParser(add_help=False)
        if flag == "--json":
            parent.add_argument(flag, metavar="FILE", help=text)
        else:  # suppressed, or what stands before the command's name would be forgotten
            parent.add_argument(flag, action="store_true", default=argparse.SUPPRESS, help=text)
    parents["--config"] = config = argparse.ArgumentParser(add_help=False)
    config.add_argument(
        "--config", metavar="NAME|FILE", help="a recipe (headstart configs list), or a YAML file"
    )
    return parents


class CommandParser(argparse.ArgumentParser):
    """Parses what follows a command's name; its help has the defaults of the schema."""

    command: Command

    def format_usage(self) -> str:
        """What stands above an error."""
        return f"usage: {self.command.usage()}\n"

    def format_help(self) -> str:
        """The screen of `--help`."""
        command, width = self.command, min(100, shutil.get_terminal_size().columns)
        usage = textwrap.wrap(f"usage: {command.usage()}", width, subsequent_indent=" " * 7)
        parts = [*usage, *textwrap.wrap(command.description, width), ""]
        if command.arguments:
            parts += ["arguments:", *_columns([(a.name, a.help) for a in command.arguments], width)]
        if command.settings:
            shown = dict(command.defaults + command.unnamed)
            shown |= dict.fromkeys(command.required, "... (to be named)")
            rows = [setting_row(key, shown) for key in command.settings]
            parts += ["settings, with their defaults:", *_columns(rows, width)]
        flags = [(flag, FLAGS[flag]) for flag in command.flags]
        if command.settings:
            flags.insert(
                0, ("--config NAME|FILE", "a recipe by its name, or a YAML file of settings")
            )
        flags.append(("--debug, --help", "show the traceback of a failure; show this"))
        parts += ["flags:", *_columns(flags, width), f"example: {command.example}", ""]
        return "\n".join(parts)


def _columns(rows: Sequence[tuple[str, str]], width: int) -> list[str]:
    """Two columns; a long name has the line for itself."""
    indent = min(36, 4 + max(len(name) for name, _ in rows))
    lines = []
    for name, text in rows:
        wrapped = textwrap.wrap(text, width - indent) or [""]
        if len(name) + 3 > indent:
            lines.append(f"  {name}")
        else:
            wrapped[0] = f"  {name}".ljust(indent) + wrapped[0]
        first = len(name) + 3 <= indent
        lines += wrapped[:first] + [" " * indent + line for line in wrapped[first:]]
    return lines


def setting_row(key: str, defaults: dict[str, Any]) -> tuple[str, str]:
    """`key=default` and what it is, in a sentence."""
    from headstart.configs.keys import describe_setting

    section, _, leaf = key.rpartition(".")
    if leaf == "*":
        return key, f"all others of it: headstart configs keys {section}"
    default, text = describe_setting(key)
    first = re.split(r"(?<=\.) ", text, maxsplit=1)[0]
    return f"{key}={defaults.get(key, default)}", first


def split_words(command: Command, words: Sequence[str]) -> tuple[dict[str, Any], list[str]]:
    """The arguments, by their names in small letters, and the settings.

    Raises:
        ValueError: one is missing, is none of the choices, or is too much.
    """
    settings = [word for word in words if SETTING.match(word)]
    given = [word for word in words if not SETTING.match(word)]
    if settings and not command.settings:
        raise ValueError(f"{settings[0]}: {command.name} has no settings")
    found: dict[str, Any] = {}
    for argument in command.arguments:
        name = argument.name.lower()
        if argument.many == "*":
            found[name], given = given, []
        elif given:
            found[name] = given.pop(0)
            if argument.choices and found[name] not in argument.choices:
                known = ", ".join(argument.choices)
                raise ValueError(f"{argument.name} {found[name]!r} is none of {known}")
        elif argument.many == "?":
            found[name] = None
        else:
            raise ValueError(f"{argument.name} is missing: {argument.help}")
    if given:
        hint = "; settings are key=value" if command.settings else ""
        raise ValueError(f"unrecognized arguments: {' '.join(given)}{hint}")
    for key in (word.partition("=")[0] for word in settings):
        if not is_read(key, command.settings):
            _refuse_unread(key, command)
    return found, settings


def is_read(key: str, keys: Sequence[str]) -> bool:
    """Whether a command that reads these keys reads this one, or a part or the whole of it."""
    return any(
        key == one or key.startswith(f"{one}.") or one.startswith(f"{key}.")
        or (one.endswith(".*") and key.startswith(one[:-1]))
        for one in keys
    )  # fmt: skip


def _refuse_unread(key: str, command: Command) -> None:
    """Raise `ValueError` for a setting that the command would pass over; a key that does not exist,
    or no more, is left to the configuration, which says so."""
    from headstart.configs.keys import known_keys

    if key in known_keys():
        raise ValueError(f"{command.name} does not read {key}: leave it out")


def refuse_unread(command: Command, words: Sequence[str], settings: Any) -> None:
    """Raise `ValueError` for what the command would pass over of a section that was given whole,
    such as `eval={limit: 8}`.

    Args:
        command: that was called.
        words: its settings as they were typed.
        settings: the `Settings` that they make.
    """
    from headstart.configs.keys import known_keys

    typed = tuple(f"{word.partition('=')[0]}." for word in words)
    for key in settings.given(known_keys()):
        if key.startswith(typed) and not is_read(key, command.settings):
            raise ValueError(f"{command.name} does not read {key}: leave it out")


def missing(command: Command, config: str | None, settings: Sequence[str]) -> str | None:
    """The first of what a command needs that no command line without a file can do without."""
    if config is not None:
        return None
    named = {word.partition("=")[0] for word in settings}
    return next((key for key in command.required if not is_read(key, sorted(named))), None)


def read_settings(args: argparse.Namespace, defaults: Sequence[tuple[str, Any]] = ()) -> Any:
    """The `Settings` of `--config` and `key=value`.

    Args:
        args: of the command.
        defaults: beside those of the command.

    Raises:
        ValueError: as of `load_settings`, or one that the command needs is not named.
    """
    from headstart.configs.loader import load_settings

    command: Command = args.of
    found = [
        (key, getattr(args, value.name.lower()) if isinstance(value, Argument) else value)
        for key, value in (*defaults, *command.defaults)
    ]
    if args.config is None:  # a file says what a head is evaluated on; nobody else does
        found.append(("eval", None))
    settings = load_settings(args.config, args.settings, found)
    for key in command.required:
        if key != "--config" and not settings.given([key]):
            raise ValueError(f"{command.name} needs {key}=VALUE: {setting_row(key, {})[1]}")
    return settings


def default_device() -> Any:
    """Where a model runs that nobody placed: the device of this process of the launch."""
    from headstart.common.processes import join_processes

    return join_processes().device

"""The commands around recipes: configs list and configs show."""

import argparse
import sys
from contextlib import redirect_stdout
from typing import Any


def add_configs_commands(commands: Any) -> None:
    """Add them to the subparsers of `headstart`."""
    configs = commands.add_parser("configs", help="see the recipes that come with Headstart")
    kinds = configs.add_subparsers(required=True, metavar="COMMAND")
    listing = kinds.add_parser(
        "list",
        help="the names of all recipes, and what each is for",
        description="Print the names that --config takes, and what each recipe is for.",
        epilog="example: headstart configs list",
    )
    listing.set_defaults(command=_run_list)
    show = kinds.add_parser(
        "show",
        help="the text of a recipe",
        description="Print the file that --config NAME reads. Keep it as a file of your own to "
        "change it, and give the path of that file to --config.",
        epilog="example: headstart configs show quickstart > mine.yaml",
    )
    show.add_argument(
        "name", metavar="NAME", help="of a recipe (headstart configs list), or a path"
    )
    show.set_defaults(command=_run_show)


def _run_list(args: argparse.Namespace) -> None:
    from headstart.configs.recipes import print_recipes

    print_recipes()


def _run_show(args: argparse.Namespace) -> None:
    from headstart.common.console import visible
    from headstart.configs.recipes import read_config_text

    with redirect_stdout(sys.stderr):  # the text is the output, which file it is of is not
        text = read_config_text(args.name)
    print(visible(text), end="")

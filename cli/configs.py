"""`headstart configs`: the recipes that come with Headstart, and the keys of a configuration."""

import argparse
import sys
from contextlib import redirect_stdout

from headstart.cli.arguments import Argument, Command


def _configs(args: argparse.Namespace) -> None:
    from headstart.common.console import visible
    from headstart.configs.keys import print_keys
    from headstart.configs.recipes import print_recipes, read_config_text

    if args.action == "list":
        print_recipes()
    elif args.action == "keys":
        print_keys(args.name)
    elif args.name is None:
        raise ValueError("configs show needs the name of a recipe (headstart configs list)")
    else:
        with redirect_stdout(sys.stderr):  # the text is the output, which file it is of is not
            text = read_config_text(args.name)
        print(visible(text), end="")


CONFIGS = Command(
    "configs",
    "see the recipes that come with Headstart, and all keys",
    "`list` prints the names that --config takes, and what each recipe is for. `show` prints the "
    "file that --config NAME reads: keep it as a file of your own to change it, and give the path "
    "of that file to --config. `keys` prints every key of a configuration, its default and what it "
    "is, or those of one section.",
    "headstart configs show quickstart",
    _configs,
    arguments=(
        Argument("ACTION", "what to do", choices=("list", "show", "keys")),
        Argument(
            "NAME", "of `show`: a recipe, or a path; of `keys`: a section, such as train", "?"
        ),
    ),
)

"""`headstart runs`: arguments in, one call out."""

import argparse
from pathlib import Path
from typing import Any


def add_runs_commands(commands: Any) -> None:
    """Add `runs list` and `runs show`."""
    runs = commands.add_parser("runs", help="see how training runs stand")
    kinds = runs.add_subparsers(required=True, metavar="COMMAND")
    listing = kinds.add_parser(
        "list",
        help="a line for each run below a folder",
        description="Print a line for each run below DIR: whether it runs, finished, stopped, "
        "failed (and why) or was killed, its last step, its best acceptance length and its loss.",
        epilog="example: headstart runs list runs",
    )
    listing.add_argument("root", nargs="?", type=Path, default=Path("runs"), metavar="DIR")
    listing.set_defaults(command=_run_list)
    show = kinds.add_parser(
        "show",
        help="all about one run, with a picture",
        description="Print what a run folder says, and draw its loss and acceptance lengths over "
        "the steps into RUN/progress.png. It may be running.",
        epilog="example: headstart runs show runs/quickstart",
    )
    show.add_argument("run", type=Path, metavar="RUN")
    show.set_defaults(command=_run_show)
    for parser in (listing, show):
        parser.add_argument("--debug", action="store_true", help="show the traceback of a failure")


def _run_list(args: argparse.Namespace) -> None:
    from headstart.train.watching import print_runs

    print_runs(args.root)


def _run_show(args: argparse.Namespace) -> None:
    from headstart.train.watching import print_run

    print_run(args.run)

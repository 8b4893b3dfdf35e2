"""`headstart sweep`: arguments in, one call out."""

import argparse
from pathlib import Path
from typing import Any

from headstart.cli.arguments import default_device


def add_sweep_command(commands: Any) -> None:
    """Add it to the subparsers of `headstart`."""
    sweep = commands.add_parser(
        "sweep",
        help="train runs that differ in some settings, and compare their heads",
        description="Train the runs of a sweep one after another, judge every head on the same "
        "stored texts, and print a line a run: acceptance length, and the difference from the "
        "first run, with 95% intervals. The same command goes on where it stopped.",
        epilog="example: headstart sweep configs/sweep-traps.yaml --out runs/traps",
    )
    sweep.add_argument("sweep", type=Path, metavar="SWEEP", help="YAML of the sweep")
    sweep.add_argument(
        "--out", type=Path, metavar="DIR", help="folder of the runs (default runs/NAME of the YAML)"
    )
    sweep.add_argument("--debug", action="store_true", help="show the traceback of a failure")
    sweep.add_argument(
        "overrides", nargs="*", metavar="key=value", help="settings of every run, as in train"
    )
    sweep.set_defaults(command=_run_sweep)


def _run_sweep(args: argparse.Namespace) -> None:
    from headstart.configs.sweep import load_sweep
    from headstart.train.sweep import run_sweep

    out = args.out or Path("runs") / args.sweep.stem
    run_sweep(load_sweep(args.sweep), out, args.overrides, default_device())
    print(f"Written: {out / 'sweep.json'}, sweep.png")

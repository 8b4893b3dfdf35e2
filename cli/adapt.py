"""`headstart adapt`: arguments in, one call out."""

import argparse
import sys
from pathlib import Path
from typing import Any

from headstart.cli.arguments import (
    add_target_arguments,
    count,
    default_device,
    natural,
    target_config,
)


def add_adapt_command(commands: Any) -> None:
    """Add it to the subparsers of `headstart`."""
    adapt = commands.add_parser(
        "adapt",
        help="train a head on for a target that was fine-tuned",
        description="Measure what a head has lost on a tuned target, let that target answer your "
        "prompts, train the head on them for as long as it gains or there is time, and measure "
        "again: adapt.json, adapt.md, adapt.png, and the head in run/head. The same command goes "
        "on where it stopped.",
        epilog="example: headstart adapt --target google/gemma-4-E4B-it --adapter ORG/my-lora "
        "--head google/gemma-4-E4B-it-assistant --prompts my_prompts.jsonl --budget 2h "
        "--out runs/my-head",
    )
    add = adapt.add_argument
    add("--target", required=True, help="the tuned target: a folder, a Hub id or a GGUF file")
    add_target_arguments(adapt)
    add(
        "--dtype", choices=("auto", "bfloat16", "float32"), default="auto",
        help="of the target (default auto: what pays on this machine)",
    )  # fmt: skip
    add(
        "--head", required=True, metavar="HEAD",
        help="folder or Hub id of the head to go on from: of the target before it was tuned",
    )  # fmt: skip
    add(
        "--prompts", required=True, metavar="SET",
        help="prompts of the target's new work: a file or a Hub dataset; some are held out",
    )  # fmt: skip
    add(
        "--general", metavar="SET",
        help="prompts of everything else, mixed in so that the head does not forget; some are "
        "held out to show it",
    )  # fmt: skip
    add(
        "--general-share", type=float, metavar="S",
        help="share of general prompts in the training, 0 to 1 (default 0.25 with --general)",
    )  # fmt: skip
    add(
        "--base", metavar="NAME",
        help="the target that the head was trained for, to say what was lost (default: as the head "
        "notes, else the target without its adapters)",
    )  # fmt: skip
    add("--budget", default="15m", metavar="TIME", help="for all of it: 15m, 1h30m (default 15m)")
    add(
        "--held-out", type=count, default=48, metavar="N",
        help="prompts of each kind to measure on (default 48)",
    )  # fmt: skip
    add(
        "--num-assistant-tokens", type=count, default=4, metavar="K",
        help="draft length at which the head is measured (default 4)",
    )  # fmt: skip
    add(
        "--decoded", type=natural, default=8, metavar="N",
        help="held-out prompts of each kind that are decoded in the end for the speedup, as far as "
        "time allows (default 8; 0: none)",
    )  # fmt: skip
    add("--measure-only", action="store_true", help="say what was lost, and stop there")
    add("--out", required=True, type=Path, metavar="DIR", help="for the report and the head")
    add("--debug", action="store_true", help="show the traceback of a failure")
    add(
        "overrides", nargs="*", metavar="key=value",
        help="settings of the training, such as head.lora={rank: 16} or data.max_new_tokens=256",
    )  # fmt: skip
    adapt.set_defaults(command=_run_adapt)


def _run_adapt(args: argparse.Namespace) -> None:
    from headstart.configs.adapt import Adaptation, minutes
    from headstart.train.adapt import adapt

    told = {} if args.general_share is None else {"general_share": args.general_share}
    asked = Adaptation(
        target=target_config(args),
        head=args.head,
        prompts=args.prompts,
        general=args.general,
        base=args.base,
        budget_minutes=minutes(args.budget),
        held_out=args.held_out,
        num_assistant_tokens=args.num_assistant_tokens,
        decoded=args.decoded,
        measure_only=args.measure_only,
        **told,
    )
    adapt(asked, args.out, args.overrides, default_device(), ["headstart", *sys.argv[1:]])

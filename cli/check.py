"""`headstart check`: arguments in, one call out."""

import argparse
from typing import Any

from headstart.cli.arguments import add_target_arguments, default_device, target_config


def add_check_command(commands: Any) -> None:
    """Add it to the subparsers of `headstart`."""
    check = commands.add_parser(
        "check",
        help="see whether a target, its adapters, heads and prompts are what they should be",
        description="Admit a target with its adapters, heads and prompts as every run does before "
        "it begins, without training: a line for each says what it is, what is changed of it, or "
        "why it is refused and what mends it. The first command when something looks wrong.",
        epilog="example: headstart check ORG/my-gemma --adapter my-lora --head runs/mine/head "
        "--prompts my_prompts.jsonl",
    )
    add = check.add_argument
    add("target", metavar="TARGET", help="gemma3-270m, a folder, a Hub id or a GGUF file")
    add_target_arguments(check)
    add("--head", action="append", default=[], metavar="HEAD", help="may come again")
    add(
        "--prompts", action="append", default=[], metavar="SET",
        help="prompts or conversations: a file, a folder, a Hub dataset or a benchmark's name; may "
        "come again",
    )  # fmt: skip
    add(
        "--dtype", choices=("auto", "bfloat16", "float32"), default="auto",
        help="of the weights (default auto: what pays on this machine)",
    )  # fmt: skip
    add("--debug", action="store_true", help="show the traceback of a failure")
    check.set_defaults(command=_run_check)


def _run_check(args: argparse.Namespace) -> None:
    from headstart.eval.check import check_inputs, print_findings

    print_findings(check_inputs(target_config(args), args.head, args.prompts, default_device()))

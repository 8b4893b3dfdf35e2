"""`headstart check`: arguments in, one call out."""

import argparse
import sys
from contextlib import redirect_stdout
from typing import Any

from headstart.cli.arguments import (
    add_config_arguments,
    add_target_arguments,
    default_device,
    target_config,
)


def add_check_command(commands: Any) -> None:
    """Add it to the subparsers of `headstart`."""
    check = commands.add_parser(
        "check",
        help="see whether a target, its adapters, heads and prompts are what they should be",
        description="Load a target with its adapters, heads and prompts and check that they are "
        "whole and fit together, as every run does, without training: a row for each says good; "
        "noted, which is taken with what the lines say; or refused, and why (exit code 1). The "
        "target is loaded whole. The first command when something looks wrong.",
        epilog="example: headstart check ORG/my-gemma --adapter my-lora --head runs/mine/head "
        "--prompts my_prompts.jsonl data.chat_template_kwargs={enable_thinking: true}",
    )
    add = check.add_argument
    add("target", metavar="TARGET", help="gemma3-270m, a folder, a Hub id or a GGUF file")
    add_target_arguments(check)
    add(
        "--head",
        action="append",
        default=[],
        metavar="HEAD",
        help="folder (RUN/head) or Hub id of a draft head for the target; may come again",
    )
    add(
        "--prompts", action="append", default=[], metavar="SET",
        help="prompts or conversations: a file, a folder, a Hub dataset or a benchmark's name; may "
        "come again",
    )  # fmt: skip
    add(
        "--dtype", choices=("auto", "bfloat16", "float32"), default="auto",
        help="of the weights (default auto: bfloat16 where the machine computes in it)",
    )  # fmt: skip
    add_config_arguments(check)
    check.set_defaults(command=_run_check)


def _run_check(args: argparse.Namespace) -> None:
    from headstart.configs.loader import load_config
    from headstart.configs.schema import TargetConfig
    from headstart.eval.check import check_inputs, print_findings

    config = load_config(args.config, args.overrides)
    told = target_config(args).model_dump(exclude_defaults=True) | {"name": args.target}
    target = TargetConfig(**config.target.model_dump() | told)
    with redirect_stdout(sys.stderr):  # the table is the output, how far it is is not
        found = check_inputs(target, config.data, args.head, args.prompts, default_device())
    print_findings(found)

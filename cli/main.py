"""The `headstart` command: arguments in, one call out, an exit code back.

Exit codes: 0 done, 1 a failure explained in one line on stderr, 2 wrong usage, 130 interrupted
with everything saved.
"""

import argparse
import sys
import traceback
from importlib.metadata import version
from pathlib import Path

from headstart.cli.arguments import (
    add_config_arguments,
    count,
    counts,
    decoders,
    default_device,
)
from headstart.cli.bench import add_bench_commands
from headstart.cli.data import add_data_commands
from headstart.cli.heads import add_heads_commands
from headstart.cli.runs import add_runs_commands


def main(argv: list[str] | None = None) -> int:
    """Run one command; returns the exit code."""
    args = _parse(argv)
    try:
        # Seconds of imports, so only after the arguments are known to be good; and the version
        # before the classes that another release may lack.
        from headstart.heads.versions import check_transformers

        check_transformers()
        from transformers.utils.logging import disable_progress_bar

        disable_progress_bar()  # ours say more; "Loading weights" took a second
        args.command(args)
    except KeyboardInterrupt as stop:
        what = str(stop) or "interrupted; finished work is kept (train: go on with --resume)"
        print(f"headstart: {what}", file=sys.stderr)
        code = 130
    except Exception as error:
        if args.debug:
            traceback.print_exc()
        else:
            print(f"headstart: {_one_line(error)} (--debug shows the traceback)", file=sys.stderr)
        code = 1
    else:
        code = 0
    from headstart.heads.processes import leave_processes

    leave_processes()  # after the errors, whose frames hold what the command worked with
    return code


def _parse(argv: list[str] | None) -> argparse.Namespace:
    parser = _parser()
    # argparse takes positionals from one place only; overrides may stand between options too.
    args, rest = parser.parse_known_args(argv)
    odd = [part for part in rest if part.startswith("-") or "=" not in part]
    if odd or (rest and "overrides" not in args):
        parser.error(f"unrecognized arguments: {' '.join(odd or rest)}")
    if rest:
        args.overrides += rest
    return args


def _one_line(error: Exception) -> str:
    text = " ".join(str(error).split()) or "no message"
    # Ours are ValueErrors and RuntimeErrors with a full sentence; others need their type's name.
    known = isinstance(error, (ValueError, RuntimeError, ModuleNotFoundError))
    return text if known else f"{type(error).__name__}: {text}"


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="headstart",
        description="Give any Gemma model its own multi-token-prediction (MTP) draft head.",
    )
    parser.add_argument("--version", action="version", version=f"headstart {version('headstart')}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    train = commands.add_parser(
        "train",
        help="distill a draft head for a target, then measure it",
        description="Distill a draft head for a frozen target into a run folder, then measure it. "
        "`accelerate launch train.py` with the same arguments runs the same code.",
        epilog="example: headstart train --config configs/quickstart.yaml train.steps=300 "
        "run.dir=runs/mine",
    )
    _add_train_arguments(train)
    train.set_defaults(command=_run_train)

    add_data_commands(commands)
    add_heads_commands(commands)
    add_bench_commands(commands)
    add_runs_commands(commands)

    evaluate = commands.add_parser(
        "eval",
        help="compare plain and assisted decoding on prompts",
        description="Decode prompts greedily with transformers' generate, plainly and with a draft "
        "head in turn, and report acceptance and speedup.",
        epilog="example: headstart eval --target gemma3-270m --head runs/quickstart/head "
        "--prompts data/prompts/text_eval.jsonl --num-assistant-tokens 2,4 --out report/",
    )
    _add_eval_arguments(evaluate)
    evaluate.set_defaults(command=_run_eval)
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


def _add_eval_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--target", required=True, help="gemma3-270m, a folder or a Hub id")
    parser.add_argument("--head", required=True, help="folder or Hub id of a draft head")
    parser.add_argument("--prompts", required=True, type=Path, metavar="FILE.jsonl")
    parser.add_argument(
        "--num-assistant-tokens",
        type=counts,
        default=[2, 4],
        metavar="K,K",
        help="draft lengths to measure (default 2,4)",
    )
    parser.add_argument(
        "--decoders",
        type=decoders,
        default=["transformers", "exact"],
        metavar="NAME,NAME",
        help="ways to draft: transformers (the stock generator), exact (clean keys and values, a "
        "leaner loop), cost (as many drafts as pay), hybrid (lookups in the text too), lookup (no "
        "head); default transformers,exact",
    )
    parser.add_argument("--max-new-tokens", type=count, default=64, metavar="N")
    parser.add_argument(
        "--limit", type=count, metavar="M", help="measure M prompts, dealt over the categories"
    )
    parser.add_argument(
        "--dtype",
        choices=("auto", "bfloat16", "float32"),
        default="auto",
        help="of target and head; in float32 texts must equal plain decoding (default auto: what "
        "pays on this machine)",
    )
    parser.add_argument("--revision", help="Hub revision of the target")
    parser.add_argument("--trust-remote-code", action="store_true", help="run code of the target's")
    parser.add_argument("--out", required=True, type=Path, metavar="DIR", help="for report.json")
    parser.add_argument(
        "--resume", action="store_true", help="go on with the prompts that DIR does not have yet"
    )
    parser.add_argument("--debug", action="store_true", help="show the traceback of a failure")


def _run_eval(args: argparse.Namespace) -> None:
    from headstart.configs.schema import EvalConfig
    from headstart.eval.report import run_evaluation
    from headstart.heads.assistant import load_assistant
    from headstart.heads.targets import load_target

    device = default_device()
    target = load_target(args.target, args.dtype, args.revision, args.trust_remote_code, device)
    assistant = load_assistant(args.head, target.table.dtype, device)
    chosen = EvalConfig(
        prompts=args.prompts,
        num_assistant_tokens=args.num_assistant_tokens,
        decoders=args.decoders,
        max_new_tokens=args.max_new_tokens,
        limit=args.limit,
    )
    run_evaluation(target, assistant, args.head, chosen, args.out, args.resume)

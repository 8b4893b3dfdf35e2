"""The commands that measure heads: eval, compare and check."""

import argparse
import sys
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

from headstart.cli.arguments import (
    add_config_arguments,
    add_target_arguments,
    count,
    counts,
    decoders,
    default_device,
    numbers,
    target_config,
)

DECODERS = """ways to draft, compared with plain decoding in one run:
transformers (the head through the stock generator), exact (clean keys and values, a leaner loop),
heuristic (exact; two drafts more or one less after each round), cost (exact; as many as pay on
this machine), hybrid (cost, and lookups in the text), lookup (no head), draft-model (a small model,
--draft-model); default transformers,exact"""


def add_eval_commands(commands: Any) -> None:
    """Add `eval` and `compare` to the subparsers of `headstart`."""
    _add_eval(commands)
    _add_compare(commands)


def _add_eval(commands: Any) -> None:
    evaluate = commands.add_parser(
        "eval",
        help="compare plain and assisted decoding on prompts",
        description="Decode prompts with transformers' generate, plainly and with drafts in turn, "
        "and report acceptance, speedup and what to use: report.json, report.md, report.html.",
        epilog="example: headstart eval --target gemma3-270m --head runs/quickstart/head "
        "--prompts builtin:text_eval --num-assistant-tokens 2,4 --out report/",
    )
    add = evaluate.add_argument
    add("--target", required=True, help="gemma3-270m, a folder, a Hub id or a GGUF file")
    add_target_arguments(evaluate)
    add(
        "--head", action="append", default=[], metavar="HEAD",
        help="folder or Hub id of a draft head, such as Google's own, or HEAD+ADAPTER for a head "
        "with a peft adapter of its own; again for each other head",
    )  # fmt: skip
    add(
        "--draft-model", action="append", default=[], metavar="NAME",
        help="folder or Hub id of a small model of the target's vocabulary; may come again",
    )  # fmt: skip
    texts = evaluate.add_mutually_exclusive_group(required=True)
    texts.add_argument(
        "--prompts", metavar="SET",
        help="a file, a Hub dataset, builtin:text_eval, builtin:chat_eval, or spec-bench, "
        "mt-bench, humaneval, gsm8k, mbpp, speed-bench (from the Hub; NAME=FILE from the set's own "
        "file)",
    )  # fmt: skip
    texts.add_argument(
        "--simulate", type=Path, metavar="STORE",
        help="estimate acceptance from an activation store instead: nothing is decoded",
    )  # fmt: skip
    add(
        "--rope-position", choices=("newest", "one_earlier"), default="newest",
        help="with --simulate: where drafts stand, as in transformers and llama.cpp (default "
        "newest) or one earlier, as in vLLM",
    )  # fmt: skip
    add(
        "--num-assistant-tokens", type=counts, default=[2, 4], metavar="K,K",
        help="draft lengths to measure (default 2,4)",
    )  # fmt: skip
    add(
        "--decoders", type=decoders, metavar="NAME,NAME", default=["transformers", "exact"],
        help=DECODERS,
    )  # fmt: skip
    add(
        "--temperature", type=numbers, default=[0.0], metavar="T,T",
        help="of the sampling; 0 is greedy (default 0)",
    )  # fmt: skip
    add(
        "--top-p", type=float, default=1.0, metavar="P",
        help="sample from the likeliest tokens of mass P",
    )  # fmt: skip
    add("--top-k", type=count, metavar="N", help="sample from the N likeliest tokens")
    add(
        "--max-new-tokens", type=count, default=64, metavar="N",
        help="tokens to generate for a prompt, at most (default 64)",
    )  # fmt: skip
    add("--limit", type=count, metavar="M", help="measure M prompts, dealt over the categories")
    add("--out", required=True, type=Path, metavar="DIR", help="for the report")
    add("--resume", action="store_true", help="go on with the prompts that DIR does not have yet")
    evaluate.set_defaults(command=_run_eval)


def _add_compare(commands: Any) -> None:
    compare = commands.add_parser(
        "compare",
        help="say what changed from one report to another",
        description="Lay two reports of `headstart eval` side by side, text by text, and say which "
        "changes chance does not explain.",
        epilog="examples: headstart compare runs/a/eval/report.json runs/b/eval/report.json | "
        "headstart compare runs/a/eval --decoders transformers,exact",
    )
    compare.add_argument("before", type=Path, metavar="A", help="report.json, or its folder")
    compare.add_argument(
        "after", nargs="?", type=Path, metavar="B", help="another (default: A, with --decoders)"
    )
    compare.add_argument(
        "--decoders", type=decoders, metavar="X,Y", help="decoder X of A against decoder Y of B"
    )
    compare.set_defaults(command=_run_compare)


def _run_eval(args: argparse.Namespace) -> None:
    from headstart.configs.schema import EvalConfig
    from headstart.eval.asked import asked_by_heads
    from headstart.eval.replay import run_estimate
    from headstart.eval.report import run_evaluation
    from headstart.heads.loading import load_served, load_target
    from headstart.heads.saving import load_assistant

    told = {} if args.prompts is None else {"prompts": args.prompts}
    chosen = EvalConfig(
        **told, num_assistant_tokens=args.num_assistant_tokens, decoders=args.decoders,
        draft_models=args.draft_model, temperatures=args.temperature, top_p=args.top_p,
        top_k=args.top_k, max_new_tokens=args.max_new_tokens, limit=args.limit,
    )  # fmt: skip
    # Wrong settings are told before the weights are loaded.
    asked = asked_by_heads(args.head)
    device = default_device()
    target = load_served(target_config(args), device)
    dtype = target.table.dtype
    heads = {name: load_assistant(name, dtype, device) for name in args.head}
    if args.simulate is not None:
        run_estimate(
            target, heads, args.simulate, args.num_assistant_tokens, args.out, args.rope_position
        )
        return
    of_target = str(dtype).removeprefix("torch.")
    models = {name: load_target(name, of_target, device=device).model for name in args.draft_model}
    run_evaluation(
        target, heads, chosen, args.out, resume=args.resume, draft_models=models, asked=asked
    )


def _run_compare(args: argparse.Namespace) -> None:
    from headstart.eval.compare import print_changes, read_report
    from headstart.heads.admission import reading

    if args.after is None and args.decoders is None:
        raise ValueError("name a second report, or --decoders X,Y of this one")
    if args.decoders is not None and len(args.decoders) != 2:
        raise ValueError(f"--decoders compares two, not {len(args.decoders)}")
    before, after = read_report(args.before), read_report(args.after or args.before)
    with reading(f"{args.before} or {args.after or 'itself'}", "is no report to compare"):
        print_changes(before, after, None if args.decoders is None else tuple(args.decoders))


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
        "--head", action="append", default=[], metavar="HEAD",
        help="folder (RUN/head) or Hub id of a draft head for the target; may come again",
    )  # fmt: skip
    add(
        "--prompts", action="append", default=[], metavar="SET",
        help="prompts or conversations: a file, a folder, a Hub dataset, builtin:NAME or a "
        "benchmark's name; may come again",
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

"""The commands that measure heads: eval, simulate, compare and check."""

import argparse
import sys
from contextlib import redirect_stdout
from pathlib import Path

from headstart.cli.arguments import Argument, Command, default_device, read_settings

HEADS = Argument(
    "HEAD",
    "folder (RUN/head) or Hub id of a draft head, or HEAD+ADAPTER for one with a peft adapter",
    "*",
)


def _eval(args: argparse.Namespace) -> None:
    from headstart.eval.report import evaluate_heads

    heads = {name: name for name in args.head}
    config = read_settings(args).of_run()
    evaluate_heads(heads, config, default_device(), args.resume, together=True)


EVAL = Command(
    "eval",
    "compare plain and assisted decoding on prompts",
    "Decode prompts plainly and with drafts in turn, and report acceptance, speedup and what to "
    "use: report.json, report.md, report.html. Decoders: transformers (its own loop), exact (clean "
    "keys and values, a leaner loop), unconstrained (exact, ignoring JSON schemas), heuristic (two "
    "more or one less after each round), cost (as many as pay on this machine), hybrid (cost, and "
    "lookups), lookup (no head), draft-model (a small model).",
    "headstart eval runs/quickstart/head eval.num_assistant_tokens=2,4 output_dir=report",
    _eval,
    arguments=(HEADS,),
    settings=(
        "output_dir", "target.name", "target.adapters", "target.*", "eval.prompts",
        "eval.num_assistant_tokens", "eval.decoders", "eval.draft_models", "eval.temperatures",
        "eval.top_p", "eval.top_k", "eval.seeds", "eval.max_new_tokens", "eval.limit",
        "eval.concurrency",
    ),
    required=("output_dir",),
    flags=("--resume",),
)  # fmt: skip


def _simulate(args: argparse.Namespace) -> None:
    from headstart.configs.schema import EvalConfig
    from headstart.eval.asked import asked_by_heads
    from headstart.eval.replay import run_estimate
    from headstart.heads.loading import load_served
    from headstart.heads.saving import load_assistant

    settings = read_settings(args)
    tokens = (settings.eval or EvalConfig()).num_assistant_tokens
    asked_by_heads(args.head)
    target = load_served(settings.target, default_device())
    heads = {name: load_assistant(name, target.table.dtype, target.device) for name in args.head}
    offset = settings.simulate.draft_position_offset
    run_estimate(target, heads, Path(args.store), tokens, settings.output_dir, offset)


SIMULATE = Command(
    "simulate",
    "estimate acceptance from stored activations, without decoding",
    "Replay the rounds of decoding over the text of an activation store (headstart extract), and "
    "report the simulated acceptance length of each head.",
    "headstart simulate store runs/quickstart/head eval.num_assistant_tokens=4 output_dir=estimate",
    _simulate,
    arguments=(Argument("STORE", "folder of `headstart extract`"), HEADS),
    settings=(
        "output_dir", "target.name", "target.adapters", "target.*", "eval.num_assistant_tokens",
        "simulate.draft_position_offset",
    ),
    required=("output_dir",),
)  # fmt: skip


def _compare(args: argparse.Namespace) -> None:
    from headstart.eval.compare import print_changes, read_report
    from headstart.heads.admission import reading

    settings = read_settings(args)
    pair = settings.eval.decoders if settings.given(["eval.decoders"]) else None
    if args.after is None and pair is None:
        raise ValueError("name a second report, or eval.decoders=X,Y of this one")
    if pair is not None and len(pair) != 2:
        raise ValueError(f"eval.decoders are two to compare, not {len(pair)}")
    before, after = read_report(Path(args.before)), read_report(Path(args.after or args.before))
    with reading(f"{args.before} or {args.after or 'itself'}", "is no report to compare"):
        print_changes(before, after, None if pair is None else tuple(pair))


COMPARE = Command(
    "compare",
    "say what changed from one report to another",
    "Lay two reports of `headstart eval` side by side, text by text, and say which changes chance "
    "does not explain. With eval.decoders=X,Y decoder X of the first is compared with decoder Y of "
    "the second, or of the same.",
    "headstart compare runs/a/eval runs/b/eval eval.decoders=transformers,exact",
    _compare,
    arguments=(
        Argument("BEFORE", "report.json, or its folder"),
        Argument("AFTER", "another (the same, with eval.decoders)", "?"),
    ),
    settings=("eval.decoders",),
    unnamed=(("eval.decoders", "null"),),
)


def _check(args: argparse.Namespace) -> None:
    from headstart.eval.check import check_inputs, print_findings

    settings = read_settings(args)
    data = settings.data
    if not settings.given(["data.prompts"]):
        data = data.model_copy(update={"prompts": []})
    evaluated = settings.eval.prompts if settings.given(["eval.prompts"]) else None
    with redirect_stdout(sys.stderr):  # the table is the output, how far it is is not
        found = check_inputs(settings.target, data, args.head, evaluated, default_device())
    print_findings(found)


CHECK = Command(
    "check",
    "see whether a target, its adapters, heads and prompts are what they should be",
    "Load a target with its adapters, heads and prompts and check that they are whole and fit "
    "together, as every run does, without training: a row for each says good; noted, which is "
    "taken with what the lines say; or refused, and why (exit code 1). The target is loaded whole. "
    "The first command when something looks wrong.",
    "headstart check runs/mine/head target.name=ORG/my-gemma target.adapters=my-lora "
    "data.prompts=my_prompts.jsonl 'data.chat_template_kwargs={enable_thinking: true}'",
    _check,
    arguments=(HEADS,),
    settings=(
        "target.name", "target.adapters", "target.*", "data.prompts", "data.chat_template_kwargs",
        "data.*", "eval.prompts",
    ),
    unnamed=(("data.prompts", "null"), ("eval.prompts", "null")),
)  # fmt: skip

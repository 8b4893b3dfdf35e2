"""The `headstart bench` commands: speed as ratios that one run measures."""

import argparse
from pathlib import Path
from typing import Any

from headstart.cli.arguments import add_config_arguments, count, default_device

ABOUT = {
    "extract": "storing activations, beside the bare forward and beside regeneration",
    "regenerate": "answering prompts in batches, beside one by one",
    "train": "a training step, beside the target's forward and the full-vocabulary objective",
}


def add_bench_commands(commands: Any) -> None:
    """Add them to the subparsers of `headstart`."""
    bench = commands.add_parser(
        "bench",
        help="measure speed ratios on this machine",
        description="Measure what a step costs against what it cannot do without, in one run, the "
        "sides taking turns; print the ratios.",
    )
    kinds = bench.add_subparsers(required=True, metavar="COMMAND")
    for name, about in ABOUT.items():
        kind = kinds.add_parser(
            name,
            help=about,
            description=f"Measure {about}.",
            epilog=f"example: headstart bench {name} --json {name}.json",
        )
        prompts = 8 if name == "train" else 64  # the plain objective takes gigabytes
        kind.add_argument(
            "--prompts",
            type=count,
            default=prompts,
            metavar="N",
            help=f"prompts measured (default {prompts})",
        )
        _add_json(kind)
        add_config_arguments(kind)
        kind.set_defaults(command=_run_bench, name=name)
    _add_tie(kinds)
    _add_draft(kinds)


def _add_tie(kinds: Any) -> None:
    tie = kinds.add_parser(
        "tie",
        help="how often low-rank ties of several widths keep the target's best token",
        description="Draw up low-rank ties of several widths from the training texts, data-aware "
        "and by the plain SVD of the table, and count on held-out texts how often each keeps the "
        "target's best token.",
        epilog="example: headstart bench tie data.store=store --json tie.json",
    )
    _add_json(tie)
    add_config_arguments(tie)
    tie.set_defaults(command=_run_tie)


def _run_tie(args: argparse.Namespace) -> None:
    from headstart.configs.loader import load_config
    from headstart.train.benchmark import run_tie_benchmark

    config = load_config(args.config, args.overrides)
    run_tie_benchmark(config, default_device(), args.json)


def _add_json(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures there too")


def _run_bench(args: argparse.Namespace) -> None:
    from headstart.configs.loader import load_config

    config = load_config(args.config, args.overrides)
    if args.name == "train":
        from headstart.train.benchmark import run_train_benchmark

        run_train_benchmark(config, args.prompts, default_device(), args.json)
    else:
        from headstart.eval.benchmarks import run_benchmark

        run_benchmark(args.name, config, args.prompts, default_device(), args.json)


def _add_draft(kinds: Any) -> None:
    draft = kinds.add_parser(
        "draft",
        help="draft steps and verifications, beside a step of the target",
        description="Measure a target step, verifications of 1 to 8 draft tokens and draft steps "
        "of a head, dense and through its ordered embeddings, and print from which acceptance "
        "length on the head pays.",
        epilog="example: headstart bench draft --head runs/quickstart/head --json draft.json",
    )
    draft.add_argument("--head", required=True, metavar="DIR", help="folder or Hub id of a head")
    draft.add_argument(
        "--target",
        default="gemma3-270m",
        metavar="NAME",
        help="built-in name, folder or Hub id (default gemma3-270m)",
    )
    draft.add_argument(
        "--dtype",
        choices=("auto", "bfloat16", "float32"),
        default="auto",
        help="of target and head (default auto: what pays on this machine)",
    )
    draft.add_argument(
        "--context",
        type=count,
        default=128,
        metavar="N",
        help="tokens in the target's cache (default 128)",
    )
    _add_json(draft)
    draft.add_argument("--debug", action="store_true", help="show the traceback of a failure")
    draft.set_defaults(command=_run_draft)


def _run_draft(args: argparse.Namespace) -> None:
    from headstart.eval.draft_cost import run_draft_benchmark
    from headstart.heads.export import load_assistant
    from headstart.heads.loading import load_target

    target = load_target(args.target, args.dtype, device=default_device())
    assistant = load_assistant(args.head, target.table.dtype, target.device)
    run_draft_benchmark(target, assistant, args.head, args.context, args.json)

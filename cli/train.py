"""Commands of training: adapt, bench and runs. Arguments in, one call out."""

import argparse
import sys
from pathlib import Path
from typing import Any

from headstart.cli.arguments import (
    add_config_arguments,
    add_target_arguments,
    count,
    default_device,
    minutes,
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
    add(
        "--budget", type=minutes, default="15m", metavar="TIME",
        help="for all of it: 15m, 1h30m (default 15m)",
    )  # fmt: skip
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
    add(
        "overrides", nargs="*", metavar="key=value",
        help="settings of the training, such as head.lora={rank: 16} or data.max_new_tokens=256",
    )  # fmt: skip
    adapt.set_defaults(command=_run_adapt)


def _run_adapt(args: argparse.Namespace) -> None:
    from headstart.configs.schema import Adaptation
    from headstart.train.adapt import adapt

    told = {} if args.general_share is None else {"general_share": args.general_share}
    asked = Adaptation(
        target=target_config(args),
        head=args.head,
        prompts=args.prompts,
        general=args.general,
        base=args.base,
        budget_minutes=args.budget,
        held_out=args.held_out,
        num_assistant_tokens=args.num_assistant_tokens,
        decoded=args.decoded,
        measure_only=args.measure_only,
        **told,
    )
    adapt(asked, args.out, args.overrides, default_device(), ["headstart", *sys.argv[1:]])


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
        "variants taking turns; print the ratios.",
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
    _add_draft(kinds)


def _add_json(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures there too")


def _run_bench(args: argparse.Namespace) -> None:
    from headstart.configs.loader import load_config
    from headstart.train.benchmark import run_benchmark

    config = load_config(args.config, args.overrides)
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
    draft.set_defaults(command=_run_draft)


def _run_draft(args: argparse.Namespace) -> None:
    from headstart.eval.draft_cost import run_draft_benchmark
    from headstart.heads.loading import load_target
    from headstart.heads.saving import load_assistant

    target = load_target(args.target, args.dtype, device=default_device())
    assistant = load_assistant(args.head, target.table.dtype, target.device)
    run_draft_benchmark(target, assistant, args.head, args.context, args.json)


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
    listing.add_argument(
        "root", nargs="?", type=Path, default=Path("runs"), metavar="DIR", help="(default runs)"
    )
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


def _run_list(args: argparse.Namespace) -> None:
    from headstart.train.run_folder import print_runs

    print_runs(args.root)


def _run_show(args: argparse.Namespace) -> None:
    from headstart.train.run_folder import print_run

    print_run(args.run)

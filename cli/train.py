"""The commands that train, and those around runs: train, adapt, bench, runs."""

import argparse
import sys
from pathlib import Path

from headstart.cli.arguments import Argument, Command, default_device, read_settings
from headstart.configs.defaults import ADAPT as ADAPT_DEFAULTS


def _train(args: argparse.Namespace) -> None:
    from headstart.configs.loader import load_config
    from headstart.train.plan import print_plan
    from headstart.train.run import run

    config = load_config(args.config, args.settings)
    if args.plan:
        print_plan(config)
    else:
        run(config, resume=args.resume)


TRAIN = Command(
    "train",
    "distill a draft head for a target, then measure it",
    "Distill a draft head for a frozen target into a run folder, then measure it. `accelerate "
    "launch -m headstart.cli train` with the same arguments runs the same code in several "
    "processes. --plan prints shapes, sizes and token counts; --resume goes on from the newest "
    "checkpoint of the run folder, or starts where there is none.",
    "headstart train --config quickstart train.max_steps=300 output_dir=runs/mine",
    _train,
    settings=(
        "output_dir", "target.name", "target.*", "data.prompts", "data.num_conversations", "data.*",
        "head.init_from", "head.*", "train.max_steps", "train.*", "eval.*", "seed", "wandb.*",
    ),
    unnamed=(("output_dir", "runs/NAME"),),
    required=("--config",),
    flags=("--resume", "--plan"),
)  # fmt: skip


def _adapt(args: argparse.Namespace) -> None:
    from headstart.train.adapt import adapt
    from headstart.train.adaptation import adapt_defaults

    settings = read_settings(args, adapt_defaults(args.head))
    adapt(settings, args.head, default_device(), ["headstart", *sys.argv[1:]])


ADAPTED = Argument("HEAD", "folder or Hub id of the head to go on from: of the target untuned")
ADAPT = Command(
    "adapt",
    "train a head on for a target that was fine-tuned",
    "Measure what a head has lost on a tuned target, let that target answer your prompts, train "
    "the head on them for as long as it gains or there is time, and measure again: adapt.json, "
    "adapt.md, adapt.png, and the head in run/head. The same command goes on where it stopped.",
    "headstart adapt google/gemma-4-E4B-it-assistant target.name=google/gemma-4-E4B-it "
    "target.adapters=ORG/my-lora data.prompts=my_prompts.jsonl adapt.budget=2h "
    "output_dir=runs/my-head",
    _adapt,
    arguments=(ADAPTED,),
    settings=(
        "output_dir", "target.name", "target.adapters", "target.*", "data.prompts", "data.*",
        "adapt.budget", "adapt.general_prompts", "adapt.conversations", "adapt.base",
        "adapt.measure_only", "adapt.*",
        "eval.num_assistant_tokens", "head.*", "train.max_steps", "train.learning_rate", "train.*",
        "seed", "wandb.*",
    ),
    defaults=(("head.init_from", ADAPTED), *ADAPT_DEFAULTS),
    required=("output_dir", "target.name", "data.prompts"),
)  # fmt: skip


def _bench(args: argparse.Namespace) -> None:
    from headstart.train.benchmark import run_benchmark

    unread = UNREAD.get(args.what, ())
    for setting in args.settings:  # of a recipe some may be left over
        key = setting.partition("=")[0]
        if {key, key.partition(".")[0]} & {*unread}:
            raise ValueError(f"bench {args.what} does not read {key}: leave it out")
    settings = read_settings(args)
    out = None if args.json is None else Path(args.json)
    if args.what != "draft" and args.head is not None:
        raise ValueError(f"bench {args.what} takes no head, and {args.head} was given")
    if args.what == "draft" and args.head is None:
        raise ValueError("bench draft needs the folder or Hub id of a head")
    if out is not None:  # before minutes of work, since it may not be possible
        out.parent.mkdir(parents=True, exist_ok=True)
    if args.what == "loader":
        from headstart.train.loader_benchmark import run_loader_benchmark

        run_loader_benchmark(settings.of_run(), out)
        return
    if args.what == "limits":
        from headstart.eval.limits import run_limits

        run_limits(default_device(), out)
        return
    if args.what != "draft":
        count = settings.bench.prompts or (8 if args.what == "train" else 64)
        run_benchmark(args.what, settings.of_run(), count, default_device(), out)
        return
    from headstart.eval.draft_cost import run_draft_benchmark
    from headstart.heads.loading import load_served
    from headstart.heads.saving import load_assistant

    target = load_served(settings.target, default_device())
    assistant = load_assistant(args.head, target.table.dtype, target.device)
    run_draft_benchmark(target, assistant, args.head, settings.bench.context, out)


UNREAD = {
    "draft": ("bench.prompts", "data", "head", "train", "seed"),
    "limits": ("target", "bench", "data", "head", "train", "seed"),
}
"""Sections and settings that a benchmark does not read."""
BENCHMARKS = ("extract", "regenerate", "loader", "train", "draft", "limits")
BENCH = Command(
    "bench",
    "measure speed ratios on this machine",
    "Measure what a step costs against what it cannot do without, in one run, the variants taking "
    "turns; print the ratios. `extract`: storing activations, beside the bare forward, beside "
    "regeneration and beside the matrix products alone. `limits`: the machine's rates of matrix "
    "products and of memory. `loader`: how long a training step waits for its batch, over random "
    "activations of the target's shapes. `regenerate`: answering prompts in batches, beside one by "
    "one and beside the products alone. `train`: a training step, beside the target's forward and "
    "the full-vocabulary objective. `draft`: draft steps of a head and verifications, beside a "
    "step of the target, and from which acceptance length on the head pays.",
    "headstart bench draft runs/quickstart/head --json draft.json",
    _bench,
    arguments=(
        Argument("WHAT", "what is measured", choices=BENCHMARKS),
        Argument("HEAD", "of `draft`: folder or Hub id of a head", "?"),
    ),
    settings=(
        "target.name", "target.dtype", "target.*", "bench.prompts", "bench.context", "data.*",
        "head.*", "train.*", "seed",
    ),
    flags=("--json",),
)  # fmt: skip


def _runs(args: argparse.Namespace) -> None:
    from headstart.train.run_folder import print_run, print_runs

    if args.action == "list":
        print_runs(Path(args.folder or "runs"))
    elif args.folder is None:
        raise ValueError("runs show needs a run folder, such as runs/quickstart")
    else:
        print_run(Path(args.folder))


RUNS = Command(
    "runs",
    "see how training runs stand",
    "`list` prints a line for each run below a folder: whether it runs, finished, stopped, "
    "failed (and why) or was killed, its last step, its best acceptance length and its loss. "
    "`show` prints all that one run folder says, and draws its loss and acceptance lengths over "
    "the steps into FOLDER/progress.png; it may be running.",
    "headstart runs show runs/quickstart",
    _runs,
    arguments=(
        Argument("ACTION", "what to do", choices=("list", "show")),
        Argument("FOLDER", "of `list`: where to look (runs); of `show`: a run folder", "?"),
    ),
)

"""The commands around finished draft heads: heads describe and heads order."""

import argparse
from pathlib import Path
from typing import Any

from headstart.cli.arguments import add_config_arguments, count, default_device, natural


def add_heads_commands(commands: Any) -> None:
    """Add them to the subparsers of `headstart`."""
    heads = commands.add_parser("heads", help="look at draft heads")
    kinds = heads.add_subparsers(required=True, metavar="COMMAND")
    describe = kinds.add_parser(
        "describe",
        help="shapes, parameters, bytes and the estimated cost of a draft",
        description="Print what a draft head is and what a draft of it should cost, from its "
        "configuration and the header of its weights; no weights are read.",
        epilog="example: headstart heads describe runs/quickstart/head --target gemma3-270m",
    )
    describe.add_argument("head", metavar="DIR", help="folder or Hub id of a draft head")
    describe.add_argument(
        "--target", metavar="NAME",
        help="gemma3-270m, a folder or a Hub id: the cost in steps of this target too",
    )  # fmt: skip
    describe.set_defaults(command=_run_describe)

    order = kinds.add_parser(
        "order",
        help="give a head ordered embeddings, or refine those it has",
        description="Learn the centroids of a head's ordered embeddings on the states that the "
        "head has now, or cluster the vocabulary anew. Its other weights stay as they are. Prints "
        "recall and acceptance length before and after.",
        epilog="example: headstart heads order google/gemma-4-E2B-it-assistant --out ordered "
        "target.name=ORG/my-gemma data.store=store",
    )
    order.add_argument("head", metavar="DIR", help="folder or Hub id of a draft head")
    order.add_argument("--out", required=True, type=Path, metavar="DIR", help="for the new head")
    order.add_argument(
        "--rebuild", action="store_true", help="cluster anew, in place of keeping the clusters"
    )
    order.add_argument("--num-centroids", type=count, metavar="N", help="clusters, with --rebuild")
    order.add_argument(
        "--top-k", type=count, metavar="N", help="clusters whose tokens a draft is chosen from"
    )
    order.add_argument(
        "--steps", type=natural, default=500, metavar="N",
        help="of learning (default 500); 0 with --rebuild: centroids are the means of the clusters",
    )  # fmt: skip
    add_config_arguments(order)
    order.set_defaults(command=_run_order)


def _run_describe(args: argparse.Namespace) -> None:
    from headstart.heads.describe import describe, print_description
    from headstart.heads.loading import load_target_config

    target = None if args.target is None else load_target_config(args.target)
    print_description(args.head, describe(args.head, target))


def _run_order(args: argparse.Namespace) -> None:
    from headstart.configs.loader import load_config
    from headstart.heads.loading import open_target
    from headstart.train.ordering import Order, print_order, reorder

    config = load_config(args.config, args.overrides)
    target = open_target(config.target, default_device())
    order = Order(args.rebuild, args.num_centroids, args.top_k, args.steps)
    print_order(reorder(args.head, target, config, order, args.out))
    print(f"Written: {args.out}")

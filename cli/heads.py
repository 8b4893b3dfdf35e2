"""The commands around draft heads: their kinds, and describe and order of finished ones."""

import argparse

from headstart.cli.arguments import Argument, Command, default_device, read_settings

HEAD = Argument("HEAD", "folder or Hub id of a draft head")


def _describe(args: argparse.Namespace) -> None:
    from headstart.heads.describe import describe, print_description
    from headstart.heads.loading import load_target_config

    settings = read_settings(args)
    t, target = settings.target, None
    if settings.given(["target.name"]):
        target = load_target_config(t.name, t.revision, t.trust_remote_code)
    print_description(args.head, describe(args.head, target))


DESCRIBE = Command(
    "describe",
    "shapes, parameters, bytes and the estimated cost of a head's draft",
    "Print what a draft head is and what a draft of it should cost, from its configuration and the "
    "header of its weights; no weights are read. With target.name the cost is told in steps of "
    "this target too.",
    "headstart describe runs/quickstart/head target.name=gemma3-270m",
    _describe,
    arguments=(HEAD,),
    settings=("target.name", "target.revision", "target.trust_remote_code"),
    unnamed=(("target.name", "null"),),
)


def _heads(args: argparse.Namespace) -> None:
    from headstart.heads.describe import print_kinds

    print_kinds()


HEADS = Command(
    "heads",
    "see the kinds of draft heads",
    "`kinds` prints the kinds of heads that head.kind takes: what each reads of the target, what a "
    "draft of it costs, and what serves it.",
    "headstart heads kinds",
    _heads,
    arguments=(Argument("ACTION", "what to do", choices=("kinds",)),),
)


def _order(args: argparse.Namespace) -> None:
    from headstart.heads.loading import open_target
    from headstart.train.ordering import Order, print_order, reorder

    settings = read_settings(args)
    h, target = settings.head, open_target(settings.target, default_device())
    rebuild, keep = (h.on_existing_clusters == how for how in ("rebuild", "keep"))
    steps = 0 if keep else h.centroid_steps
    order = Order(rebuild, h.num_centroids, h.centroid_intermediate_top_k, steps)
    print_order(reorder(args.head, target, settings.of_run(), order, settings.output_dir))
    print(f"Written: {settings.output_dir}")


ORDER = Command(
    "order",
    "give a head ordered embeddings, or refine those it has",
    "Learn the centroids of a head's ordered embeddings on the states that the head has now, or "
    "cluster the vocabulary anew (head.on_existing_clusters=rebuild). Its other weights stay as "
    "they are. Prints recall and acceptance length before and after.",
    "headstart order google/gemma-4-E2B-it-assistant target.name=ORG/my-gemma data.store=store "
    "output_dir=ordered",
    _order,
    arguments=(HEAD,),
    settings=(
        "output_dir", "target.name", "target.*", "data.store", "data.conversations",
        "data.prompts", "data.*", "head.on_existing_clusters", "head.num_centroids",
        "head.centroid_intermediate_top_k", "head.centroid_steps", "train.max_anchors",
        "train.multi_step_anchors", "train.num_speculative_steps", "seed",
    ),
    defaults=(("head.init_from", HEAD), ("head.use_ordered_embeddings", True)),
    required=("output_dir",),
)  # fmt: skip

"""The commands around data: regenerate, extract, inspect."""

import argparse

from headstart.cli.arguments import Argument, Command, default_device, read_settings


def _regenerate(args: argparse.Namespace) -> None:
    from headstart.data.prepare import run_regenerate

    settings = read_settings(args)
    run_regenerate(settings.of_run(), settings.server, False, default_device())


REGENERATE = Command(
    "regenerate",
    "let the target answer prompts: the conversations that a head is trained on",
    "Let the target answer the prompts of data.prompts, in process or through a server with the "
    "OpenAI API (vLLM, SGLang, llama.cpp), into a folder of Parquet files. An interrupted call "
    "goes on where it stopped. Copies of the configuration's evaluation prompts are left out. "
    "Train on it with data.conversations=DIR.",
    "headstart regenerate target.name=ORG/my-gemma data.prompts=my_prompts.jsonl "
    "output_dir=conversations",
    _regenerate,
    settings=(
        "output_dir", "target.name", "target.adapters", "target.*", "data.prompts",
        "data.num_conversations", "data.max_new_tokens", "data.temperatures", "data.*",
        "server.url", "server.model", "server.api_key_env", "server.concurrency", "eval.prompts",
        "seed",
    ),
    unnamed=(("eval.prompts", "null"),),
    required=("output_dir",),
)  # fmt: skip


def _extract(args: argparse.Namespace) -> None:
    from headstart.data.conversations import taken_answers
    from headstart.data.prepare import run_extract, run_regenerate
    from headstart.heads.loading import open_target

    settings = read_settings(args)
    if settings.data.chooses:
        raise ValueError(
            "extract stores everything: data.filter chooses in training, headstart train"
        )
    conversations = args.conversations
    if conversations is None:
        if settings.data.shipped:  # a recipe's: of its prompts, and of one target
            target = open_target(settings.target, default_device())
            taken = taken_answers(target, settings.data)
            settings = settings.model_copy(update={"data": taken})
            del target  # before it is opened again
        conversations = settings.data.conversations
    if conversations is None:
        run_regenerate(settings.of_run(), settings.server, True, default_device())
    else:
        run_extract(settings.of_run(), str(conversations), default_device())


EXTRACT = Command(
    "extract",
    "store the target's activations over conversations",
    "Run the target once over conversations and store what the head will see: train on it with "
    "data.store=DIR. Without CONVERSATIONS or data.conversations the target answers data.prompts "
    "first, as in `headstart regenerate`, and its activations are stored from the same forwards. "
    "An interrupted call goes on where it stopped. Stored is what heads of head.kind read.",
    "headstart extract conversations target.name=ORG/my-gemma data.storage=int8 output_dir=store",
    _extract,
    arguments=(
        Argument(
            "CONVERSATIONS",
            "folder of `headstart regenerate`, or any source of whole conversations: a JSONL, "
            "Parquet, Arrow or CSV file, a folder of them, or a Hub dataset",
            "?",
        ),
    ),
    settings=(
        "output_dir", "target.name", "target.adapters", "target.*", "data.storage",
        "data.teacher_top_k", "data.max_tokens", "data.prompts", "data.num_conversations",
        "data.max_new_tokens", "data.*", "head.kind", "eval.prompts", "seed",
    ),
    unnamed=(("eval.prompts", "null"),),
    required=("output_dir",),
)  # fmt: skip


def _inspect(args: argparse.Namespace) -> None:
    from headstart.data.inspection import inspect_path

    settings = read_settings(args)
    target = settings.target.name if settings.given(["target.name"]) else None
    try:
        count = int(args.examples or 3)
    except ValueError:
        raise ValueError(f"EXAMPLES is a number, not {args.examples!r}") from None
    inspect_path(args.path, count, target, settings.data)


INSPECT = Command(
    "inspect",
    "counts, lengths, masks, duplicates and examples of a data set",
    "Print what PATH holds: counts, lengths, mask coverage, the share of mass that the teacher's "
    "top k keep, duplicates, a few examples with the trained tokens marked, and bytes per token.",
    "headstart inspect conversations 2",
    _inspect,
    arguments=(
        Argument("PATH", "folder of `regenerate` or `extract`, or any source of prompts"),
        Argument("EXAMPLES", "how many documents to print (3)", "?"),
    ),
    settings=("target.name", "data.*"),
    unnamed=(("target.name", "null"),),
)

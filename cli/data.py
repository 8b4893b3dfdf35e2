"""The commands around data: regenerate, extract, data inspect."""

import argparse
from pathlib import Path
from typing import Any

from headstart.cli.arguments import add_config_arguments, count, default_device


def add_data_commands(commands: Any) -> None:
    """Add them to the subparsers of `headstart`."""
    _add_regenerate(commands)
    extract = commands.add_parser(
        "extract",
        help="store the target's activations over conversations",
        description="Run the target once over conversations and store what the head will see: "
        "train on it with data.store=DIR. An interrupted call goes on where it stopped.",
        epilog="example: headstart extract --conversations conversations --out store "
        "target.name=ORG/my-gemma data.storage=int8",
    )
    extract.add_argument(
        "--conversations",
        required=True,
        metavar="PATH",
        help="folder of `headstart regenerate`, or any source of whole conversations: a JSONL, "
        "Parquet, Arrow or CSV file, a folder of them, or a Hub dataset",
    )
    extract.add_argument("--out", required=True, type=Path, metavar="DIR", help="folder to write")
    add_config_arguments(extract)
    extract.set_defaults(command=_run_extract)

    data = commands.add_parser("data", help="look at prompts, conversations and activations")
    kinds = data.add_subparsers(required=True, metavar="COMMAND")
    inspect = kinds.add_parser(
        "inspect",
        help="counts, lengths, masks, duplicates and examples of a data set",
        description="Print what PATH holds: counts, lengths, mask coverage, the share "
        "of mass that the teacher's top k keep, duplicates, a few examples with the trained tokens "
        "marked, and bytes a token.",
        epilog="example: headstart data inspect conversations --examples 2",
    )
    inspect.add_argument(
        "path",
        metavar="PATH",
        help="folder of `regenerate` or `extract`, or any source of prompts",
    )
    inspect.add_argument(
        "--examples", type=int, default=3, metavar="N", help="documents to print (default 3)"
    )
    inspect.add_argument(
        "--target", metavar="NAME", help="whose tokenizer counts the tokens of a source of prompts"
    )
    add_config_arguments(inspect)
    inspect.set_defaults(command=_run_inspect)


def _add_regenerate(commands: Any) -> None:
    parser = commands.add_parser(
        "regenerate",
        help="let the target answer prompts: the conversations that a head is trained on",
        description="Let the target answer the prompts of data.prompts, in process or through a "
        "server with the OpenAI API, into a folder of Parquet files. An interrupted call goes on "
        "where it stopped. Copies of the configuration's evaluation prompts are left out.",
        epilog="examples: headstart regenerate --out conversations target.name=ORG/my-gemma "
        "data.prompts='[my_prompts.jsonl]'  |  the same with --extract, which writes the "
        "activations too  |  the same with --server http://localhost:8000, where vLLM, SGLang or "
        "llama.cpp runs the target",
    )
    parser.add_argument(
        "--extract", action="store_true", help="store the activations from the same forwards"
    )
    parser.add_argument("--server", metavar="URL", help="let this OpenAI-compatible server answer")
    parser.add_argument("--model", help="the target's name there (default: the only one)")
    parser.add_argument(
        "--api-key-env", metavar="NAME",
        help="variable of the environment with the server's key (default HEADSTART_SERVER_API_KEY; "
        "without it none is sent)",
    )  # fmt: skip
    parser.add_argument(
        "--concurrency",
        type=count,
        default=16,
        metavar="N",
        help="requests to the server under way at once (default 16)",
    )
    parser.add_argument("--out", required=True, type=Path, metavar="DIR", help="folder to write")
    add_config_arguments(parser)
    parser.set_defaults(command=_run_regenerate)


def _run_regenerate(args: argparse.Namespace) -> None:
    from headstart.configs.loader import load_config
    from headstart.data.prepare import run_regenerate

    config = load_config(args.config, args.overrides)
    run_regenerate(
        config, args.out, args.extract, default_device(),
        url=args.server, model=args.model, concurrency=args.concurrency,
        key_variable=args.api_key_env,
    )  # fmt: skip


def _run_extract(args: argparse.Namespace) -> None:
    from headstart.configs.loader import load_config
    from headstart.data.prepare import run_extract

    run_extract(
        load_config(args.config, args.overrides), args.conversations, args.out, default_device()
    )


def _run_inspect(args: argparse.Namespace) -> None:
    from headstart.configs.loader import load_config
    from headstart.data.inspection import inspect_path

    data = load_config(args.config, args.overrides).data
    inspect_path(args.path, args.examples, args.target, data)

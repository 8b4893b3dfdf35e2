"""`headstart export`, `engines install` and `serve-check`: arguments in, one call out."""

import argparse
from pathlib import Path
from typing import Any

from headstart.cli.arguments import (
    add_target_arguments,
    count,
    default_device,
    engine,
    installed_engine,
    target_config,
)

INSTALLABLE = "vllm, llama.cpp or mlx"


def add_serving_commands(commands: Any) -> None:
    """Add them to the subparsers of `headstart`."""
    export = commands.add_parser(
        "export",
        help="write a head as a serving engine wants it",
        description="Write a head for an engine, with its target's tokenizer. What the engine "
        "would refuse is found before, and said with its cure.",
        epilog="example: headstart export runs/mine/head --to vllm --target ORG/my-gemma --dense "
        "--out head-vllm",
    )
    add = export.add_argument
    add("head", metavar="HEAD", help="folder or Hub id of a draft head, or HEAD+ADAPTER")
    add("--to", required=True, type=engine, metavar="ENGINE", help=f"transformers, {INSTALLABLE}")
    add("--target", required=True, metavar="NAME", help="gemma3-270m, a folder or a Hub id")
    add("--revision", help="Hub revision of the target")
    add("--out", required=True, type=Path, metavar="DIR")
    _add_dense(export)
    add("--dtype", choices=("bfloat16", "float32"), default="bfloat16", help="(default bfloat16)")
    add("--debug", action="store_true", help="show the traceback of a failure")
    export.set_defaults(command=_run_export)

    engines = commands.add_parser("engines", help="serving engines in environments of their own")
    kinds = engines.add_subparsers(required=True, metavar="COMMAND")
    install = kinds.add_parser(
        "install",
        help="make the environment of an engine",
        description="Install an engine into an environment of its own below the user's cache "
        "(HEADSTART_CACHE): vllm takes about 3 GB, the others 1 GB each.",
        epilog="example: headstart engines install llama.cpp",
    )
    install.add_argument("engine", type=installed_engine, metavar="ENGINE", help=INSTALLABLE)
    install.add_argument("--debug", action="store_true", help="show the traceback of a failure")
    install.set_defaults(command=_run_install)

    check = commands.add_parser(
        "serve-check",
        help="compare a real engine with transformers",
        description="Start an engine on this machine with the target, and again with the head; "
        "compare its greedy texts with those of transformers token by token, and its acceptance "
        "with that of the exact decoder, and measure tokens a second with the head and without. "
        "serve-check.json and the engine's logs are in DIR.",
        epilog="example: headstart serve-check --engine vllm --target gemma3-270m --head "
        "runs/quickstart/head --dense --out check",
    )
    add = check.add_argument
    add("--engine", required=True, type=installed_engine, metavar="ENGINE", help=INSTALLABLE)
    add("--target", required=True, help="gemma3-270m, a folder or a Hub id")
    add_target_arguments(check)
    add("--head", required=True, metavar="HEAD", help="folder or Hub id of a draft head")
    add(
        "--prompts", default="data/prompts/text_eval.jsonl", metavar="SET",
        help="a set's name, a file or a Hub dataset (default data/prompts/text_eval.jsonl)",
    )  # fmt: skip
    add("--limit", type=count, default=16, metavar="M", help="prompts (default 16)")
    add("--num-assistant-tokens", type=count, default=4, metavar="K", help="(default 4)")
    add("--max-new-tokens", type=count, default=64, metavar="N", help="(default 64)")
    _add_dense(check)
    add(
        "--dtype", choices=("auto", "bfloat16", "float32"), default="auto",
        help="of target and head (default auto: what pays on this machine)",
    )  # fmt: skip
    add("--out", required=True, type=Path, metavar="DIR")
    add("--debug", action="store_true", help="show the traceback of a failure")
    check.set_defaults(command=_run_check)


def _add_dense(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--dense", action="store_true",
        help="leave ordered embeddings out: drafts read the whole table",
    )  # fmt: skip


def _run_export(args: argparse.Namespace) -> None:
    import torch

    from headstart.configs.schema import TargetConfig
    from headstart.heads.engine_export import export_for_engine
    from headstart.heads.loading import load_target_config, load_target_tokens
    from headstart.heads.progress import say

    config = load_target_config(args.target, args.revision)
    tokens = load_target_tokens(TargetConfig(name=args.target, revision=args.revision))
    remarks = export_for_engine(
        args.head, args.to, config, tokens.tokenizer, args.out, args.dense,
        getattr(torch, args.dtype),
    )  # fmt: skip
    for remark in remarks:
        say(remark)
    for path in sorted(args.out.iterdir()):
        print(f"{path.stat().st_size:>13,}  {path}")


def _run_install(args: argparse.Namespace) -> None:
    from headstart.heads.engine_environments import install_engine

    print(f"Installing {args.engine} (minutes the first time) ...", flush=True)
    print(f"Ready: {install_engine(args.engine)}")


def _run_check(args: argparse.Namespace) -> None:
    from headstart.data.prompt_sets import load_prompt_set
    from headstart.data.prompts import limit_evenly
    from headstart.eval.serve_check import ServeCheck, print_serve_check, serve_check
    from headstart.heads.engine_environments import engine_python
    from headstart.heads.loading import load_served, load_target_config

    engine_python(args.engine)  # before the weights are loaded
    if args.quantization is not None:
        raise ValueError("serve-check writes the target's weights for the engine: leave out bits")
    prompts = limit_evenly(load_prompt_set(args.prompts), args.limit)
    target = load_served(target_config(args), default_device())
    config = load_target_config(args.target, args.revision, args.trust_remote_code)
    check = ServeCheck(
        args.engine, args.head, args.num_assistant_tokens, args.max_new_tokens, args.dense
    )
    print_serve_check(serve_check(target, config, check, prompts, args.out))
    print(f"Written: {args.out / 'serve-check.json'}")

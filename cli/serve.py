"""Commands for those who serve a head: publish, export, serve-check and engines."""

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


def add_publish_command(commands: Any) -> None:
    """Add it to the subparsers of `headstart`."""
    publish = commands.add_parser(
        "publish",
        help="put a head, its report and a model card on the Hugging Face Hub",
        description="Build the repository of a finished run's head: weights, tokenizer, settings, "
        "report, pictures and a model card with the report's figures. It is read back and compared "
        "with the head that was evaluated, then uploaded in one commit. The token is the one of "
        "`hf auth login` or HF_TOKEN.",
        epilog="examples: headstart publish runs/mine --repo-id ORG/my-head --dry-run --out folder "
        "| headstart publish runs/mine --repo-id ORG/my-head --public",
    )
    add = publish.add_argument
    add("run", type=Path, metavar="RUN", help="run folder, or that of `headstart adapt`")
    add("--repo-id", required=True, metavar="ORG/NAME")
    add("--out", type=Path, metavar="DIR", help="keep the folder here")
    add("--dry-run", action="store_true", help="write the folder, print its files, upload nothing")
    add("--report", type=Path, metavar="DIR", help="of the figures (default: the run's own)")
    add(
        "--base-model", action="append", default=[], metavar="ORG/NAME",
        help="the target on the Hub, whole; again for what else is its base (default: as the run "
        "names it)",
    )  # fmt: skip
    add(
        "--base-head", metavar="ORG/NAME",
        help="the head that a head's adapter goes onto, ORG/NAME@REVISION for a revision (default: "
        "as the run names it)",
    )  # fmt: skip
    add("--target", metavar="DIR", help="where the target lies now, if it was moved")
    add(
        "--adapter", action="append", default=[], metavar="DIR",
        help="where an adapter of the target lies now; again for each, in their order",
    )  # fmt: skip
    add("--merged", action="store_true", help="publish an adapter's head whole")
    add("--license", metavar="NAME", help="(default: that of the target)")
    add("--language", action="append", default=[], metavar="CODE", help="of the prompts: en, de")
    add(
        "--without-texts", action="store_true",
        help="leave the example texts out of the report: they are of your prompts",
    )  # fmt: skip
    add("--public", action="store_true", help="a repository that all can see (default: private)")
    add("--branch", metavar="NAME", help="of the repository (default: main)")
    add("--pr", action="store_true", help="open a pull request")
    publish.set_defaults(command=_run_publish)


def _run_publish(args: argparse.Namespace) -> None:
    from headstart.common.children import temporary_folder
    from headstart.serve.hub import upload
    from headstart.serve.publish import Publication, build_folder, print_folder

    if args.dry_run and args.out is None:
        raise ValueError("--dry-run writes a folder: name it with --out DIR")
    what = Publication(
        run=args.run,
        repo_id=args.repo_id,
        report=args.report,
        base_models=tuple(args.base_model),
        base_head=args.base_head,
        merged=args.merged,
        license=args.license,
        languages=tuple(args.language),
        target=args.target,
        adapters=tuple(args.adapter),
        texts=not args.without_texts,
    )
    with temporary_folder() as temporary:
        out = args.out or temporary / "folder"
        print_folder(build_folder(what, out), out, args.run)
        if not args.dry_run:
            upload(out, args.repo_id, not args.public, args.branch, args.pr)


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
        "--prompts", default="builtin:text_eval", metavar="SET",
        help="a set's name, a file or a Hub dataset (default builtin:text_eval)",
    )  # fmt: skip
    add("--limit", type=count, default=16, metavar="M", help="prompts (default 16)")
    add("--num-assistant-tokens", type=count, default=4, metavar="K", help="(default 4)")
    add("--max-new-tokens", type=count, default=64, metavar="N", help="(default 64)")
    _add_dense(check)
    add("--out", required=True, type=Path, metavar="DIR")
    check.set_defaults(command=_run_check)


def _add_dense(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--dense", action="store_true",
        help="leave ordered embeddings out: drafts read the whole table",
    )  # fmt: skip


def _run_export(args: argparse.Namespace) -> None:
    import torch

    from headstart.common.console import print_once
    from headstart.configs.schema import TargetConfig
    from headstart.heads.loading import load_target_config, load_target_tokens
    from headstart.serve.engines import export_for_engine

    config = load_target_config(args.target, args.revision)
    tokens = load_target_tokens(TargetConfig(name=args.target, revision=args.revision))
    engine_warnings = export_for_engine(
        args.head, args.to, config, tokens.tokenizer, args.out, dense=args.dense,
        dtype=getattr(torch, args.dtype),
    )  # fmt: skip
    for remark in engine_warnings:
        print_once(remark)
    for path in sorted(args.out.iterdir()):
        print(f"{path.stat().st_size:>13,}  {path}")


def _run_install(args: argparse.Namespace) -> None:
    from headstart.serve.engines import install_engine

    print(f"Installing {args.engine} (minutes the first time) ...", flush=True)
    print(f"Ready: {install_engine(args.engine)}")


def _run_check(args: argparse.Namespace) -> None:
    from headstart.data.prompts import limit_evenly, load_prompt_set
    from headstart.heads.loading import load_served, load_target_config
    from headstart.serve.engine_check import ServeCheck, print_serve_check, serve_check
    from headstart.serve.engines import engine_python

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

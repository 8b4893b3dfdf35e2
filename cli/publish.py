"""`headstart publish`: arguments in, one call out."""

import argparse
from pathlib import Path
from typing import Any


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
    add("--debug", action="store_true", help="show the traceback of a failure")
    publish.set_defaults(command=_run_publish)


def _run_publish(args: argparse.Namespace) -> None:
    from headstart.eval.hub import upload
    from headstart.eval.publish import Publication, build_folder, print_folder
    from headstart.heads.leftovers import temporary_folder

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

"""The `headstart` command: arguments in, one call out, an exit code back.

Exit codes: 0 done, 1 a failure explained in one line on stderr, 2 wrong usage, 130 interrupted
with everything saved.
"""

import argparse
import sys
import traceback
from importlib.metadata import version
from pathlib import Path
from typing import Any


def main(argv: list[str] | None = None) -> int:
    """Run one command; returns the exit code."""
    args = _parse(argv)
    try:
        # Seconds of imports, so only after the arguments are known to be good; and the version
        # before the classes that another release may lack.
        from headstart.heads.versions import check_transformers

        check_transformers()
        from transformers.utils.logging import disable_progress_bar

        disable_progress_bar()  # ours say more; "Loading weights" took a second
        args.command(args)
    except KeyboardInterrupt as stop:
        what = str(stop) or "interrupted; finished work is kept (train: go on with --resume)"
        print(f"headstart: {what}", file=sys.stderr)
        return 130
    except Exception as error:
        if args.debug:
            traceback.print_exc()
        else:
            print(f"headstart: {_one_line(error)} (--debug shows the traceback)", file=sys.stderr)
        return 1
    return 0


def _parse(argv: list[str] | None) -> argparse.Namespace:
    parser = _parser()
    # argparse takes positionals from one place only; overrides may stand between options too.
    args, rest = parser.parse_known_args(argv)
    odd = [part for part in rest if part.startswith("-") or "=" not in part]
    if odd or (rest and "overrides" not in args):
        parser.error(f"unrecognized arguments: {' '.join(odd or rest)}")
    if rest:
        args.overrides += rest
    return args


def _one_line(error: Exception) -> str:
    text = " ".join(str(error).split()) or "no message"
    # Ours are ValueErrors and RuntimeErrors with a full sentence; others need their type's name.
    known = isinstance(error, (ValueError, RuntimeError, ModuleNotFoundError))
    return text if known else f"{type(error).__name__}: {text}"


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="headstart",
        description="Give any Gemma model its own multi-token-prediction (MTP) draft head.",
    )
    parser.add_argument("--version", action="version", version=f"headstart {version('headstart')}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    train = commands.add_parser(
        "train",
        help="distill a draft head for a target, then measure it",
        description="Distill a draft head for a frozen target into a run folder, then measure it. "
        "`accelerate launch train.py` with the same arguments runs the same code.",
        epilog="example: headstart train --config configs/quickstart.yaml train.steps=300 "
        "run.dir=runs/mine",
    )
    _add_train_arguments(train)
    train.set_defaults(command=_run_train)

    regenerate = commands.add_parser(
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
    _add_regenerate_arguments(regenerate)
    regenerate.set_defaults(command=_run_regenerate)

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
    _add_data_arguments(extract)
    extract.set_defaults(command=_run_extract)

    _add_data_command(commands)
    _add_bench_command(commands)

    evaluate = commands.add_parser(
        "eval",
        help="compare plain and assisted decoding on prompts",
        description="Decode prompts greedily with transformers' own generate, plainly and with a "
        "draft head in turn, and report acceptance and speedup.",
        epilog="example: headstart eval --target gemma3-270m --head runs/quickstart/head "
        "--prompts data/prompts/text_eval.jsonl --num-assistant-tokens 2,4 --out report/",
    )
    _add_eval_arguments(evaluate)
    evaluate.set_defaults(command=_run_eval)
    return parser


def _add_train_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--config", required=True, type=Path, metavar="FILE", help="run YAML")
    parser.add_argument(
        "--resume",
        action="store_true",
        help="go on from the newest checkpoint of the run folder, or start where there is none",
    )
    parser.add_argument(
        "--plan",
        action="store_true",
        help="print shapes, sizes and token counts, and stop: no data, no training",
    )
    parser.add_argument("--debug", action="store_true", help="show the traceback of a failure")
    parser.add_argument(
        "overrides",
        nargs="*",
        metavar="key=value",
        help="dotted overrides of the YAML, such as train.steps=300",
    )


def _run_train(args: argparse.Namespace) -> None:
    from headstart.configs.loader import load_config
    from headstart.train.plan import print_plan
    from headstart.train.run import run

    config = load_config(args.config, args.overrides)
    if args.plan:
        print_plan(config)
    else:
        run(config, resume=args.resume)


def _add_data_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--out", required=True, type=Path, metavar="DIR", help="folder to write")
    _add_config_arguments(parser)


def _add_config_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--config", type=Path, metavar="FILE", help="run YAML (default: the built-in defaults)"
    )
    parser.add_argument("--debug", action="store_true", help="show the traceback of a failure")
    parser.add_argument(
        "overrides",
        nargs="*",
        metavar="key=value",
        help="settings, such as target.name=ORG/my-gemma or data.max_new_tokens=512",
    )


def _add_regenerate_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--extract", action="store_true", help="store the activations from the same forwards"
    )
    parser.add_argument(
        "--server", metavar="URL", help="let this OpenAI-compatible server answer ($OPENAI_API_KEY)"
    )
    parser.add_argument("--model", help="the target's name there (default: the only one)")
    parser.add_argument(
        "--concurrency",
        type=_count,
        default=16,
        metavar="N",
        help="requests to the server under way at once (default 16)",
    )
    _add_data_arguments(parser)


def _run_regenerate(args: argparse.Namespace) -> None:
    from headstart.configs.loader import load_config
    from headstart.data.commands import run_regenerate

    config = load_config(args.config, args.overrides)
    run_regenerate(
        config, args.out, args.extract, _device(), args.server, args.model, args.concurrency
    )


def _run_extract(args: argparse.Namespace) -> None:
    from headstart.configs.loader import load_config
    from headstart.data.commands import run_extract

    run_extract(load_config(args.config, args.overrides), args.conversations, args.out, _device())


def _add_data_command(commands: Any) -> None:
    data = commands.add_parser("data", help="look at prompts, conversations and activations")
    kinds = data.add_subparsers(required=True, metavar="COMMAND")
    inspect = kinds.add_parser(
        "inspect",
        help="counts, lengths, masks, duplicates and examples of a data set",
        description="Print what PATH holds: counts, length histograms, mask coverage, the share "
        "of mass that the teacher's top k keep, duplicates, a few examples with the trained tokens "
        "marked, and bytes a token.",
        epilog="example: headstart data inspect conversations --examples 2",
    )
    inspect.add_argument(
        "path", help="folder of `regenerate` or `extract`, or any source of prompts"
    )
    inspect.add_argument(
        "--examples", type=int, default=3, metavar="N", help="rendered (default 3)"
    )
    inspect.add_argument(
        "--target", metavar="NAME", help="whose tokenizer counts the tokens of a source of prompts"
    )
    inspect.add_argument("--debug", action="store_true", help="show the traceback of a failure")
    inspect.set_defaults(command=_run_inspect)


def _run_inspect(args: argparse.Namespace) -> None:
    from headstart.data.inspection import inspect_path

    inspect_path(args.path, args.examples, args.target)


def _add_bench_command(commands: Any) -> None:
    bench = commands.add_parser(
        "bench",
        help="measure speed ratios on this machine",
        description="Measure what a step costs against what it cannot do without, in one run, "
        "interleaved; print the ratios.",
        epilog="example: headstart bench extract --json extract.json",
    )
    bench.add_argument("name", choices=("extract", "regenerate"), help="what is measured")
    bench.add_argument("--json", type=Path, metavar="FILE", help="write the figures there too")
    bench.add_argument(
        "--prompts", type=_count, default=64, metavar="N", help="prompts measured (default 64)"
    )
    _add_config_arguments(bench)
    bench.set_defaults(command=_run_bench)


def _run_bench(args: argparse.Namespace) -> None:
    from headstart.configs.loader import load_config
    from headstart.eval.benchmarks import run_benchmark

    config = load_config(args.config, args.overrides)
    run_benchmark(args.name, config, args.prompts, _device(), args.json)


def _device() -> str:
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


def _add_eval_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--target", required=True, help="gemma3-270m, a folder or a Hub id")
    parser.add_argument("--head", required=True, help="folder or Hub id of a draft head")
    parser.add_argument("--prompts", required=True, type=Path, metavar="FILE.jsonl")
    parser.add_argument(
        "--num-assistant-tokens",
        type=_counts,
        default=[2, 4],
        metavar="K,K",
        help="draft lengths to measure (default 2,4)",
    )
    parser.add_argument("--max-new-tokens", type=_count, default=64, metavar="N")
    parser.add_argument(
        "--limit", type=_count, metavar="M", help="measure M prompts, dealt over the categories"
    )
    parser.add_argument(
        "--dtype",
        choices=("bfloat16", "float32"),
        default="bfloat16",
        help="of target and head (default bfloat16); in float32 texts must equal plain decoding",
    )
    parser.add_argument("--revision", help="Hub revision of the target")
    parser.add_argument("--trust-remote-code", action="store_true", help="run code of the target's")
    parser.add_argument("--out", required=True, type=Path, metavar="DIR", help="for report.json")
    parser.add_argument("--debug", action="store_true", help="show the traceback of a failure")


def _run_eval(args: argparse.Namespace) -> None:
    from headstart.eval.report import run_evaluation
    from headstart.heads.assistant import load_assistant
    from headstart.heads.targets import load_target

    device = _device()
    target = load_target(args.target, args.dtype, args.revision, args.trust_remote_code, device)
    assistant = load_assistant(args.head, target.table.dtype, device)
    run_evaluation(
        target,
        assistant,
        args.head,
        args.prompts,
        args.limit,
        args.num_assistant_tokens,
        args.max_new_tokens,
        args.out,
    )


def _count(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{value} is not 1 or more")
    return value


def _counts(text: str) -> list[int]:
    return [_count(part) for part in text.split(",")]

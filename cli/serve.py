"""The commands for those who serve a head: export, install, serve-check, publish, watch."""

import argparse
from pathlib import Path
from typing import Any

from headstart.cli.arguments import STALE, Argument, Command, default_device, read_settings

INSTALLABLE = ("vllm", "llama.cpp", "mlx", "litert")
HEAD = Argument("HEAD", "folder or Hub id of a draft head, or HEAD+ADAPTER")
OF_LITERT = ("export.num_assistant_tokens", "export.cache_length")


def _export(args: argparse.Namespace) -> None:
    import torch

    from headstart.common.console import print_once
    from headstart.heads.loading import load_served, load_target_config, load_target_tokens
    from headstart.serve.engines import export_for_engine
    from headstart.serve.litert import export_for_litert

    settings = read_settings(args)
    t, export, out = settings.target, settings.export, settings.output_dir
    config = load_target_config(t.name, t.revision, t.trust_remote_code)
    if args.engine == "litert":
        if t.quantization is not None:
            raise ValueError("the target is written from its weights: no target.quantization")
        whole = t.model_copy(update={"dtype": "float32", "merge_adapters": True})
        engine_warnings = export_for_litert(
            args.head, config, lambda: load_served(whole), out, export
        )
    else:
        given = settings.given(OF_LITERT)
        # A recipe may have it, for training.
        given += [s for s in args.settings if s.startswith("target.eos_token_ids=")]
        if given or export.dtype == "int8":
            named = given[0] if given else "export.dtype=int8"
            raise ValueError(f"{named} is of litert's file: leave it out for {args.engine}")
        if t.adapters:
            raise ValueError(
                f"{args.engine} gets the head alone: merge target.adapters into a folder that the "
                "engine loads"
            )
        engine_warnings = export_for_engine(
            args.head, args.engine, config, load_target_tokens(t).tokenizer, out,
            dense=export.dense, dtype=getattr(torch, export.dtype or "bfloat16"),
        )  # fmt: skip
    for remark in engine_warnings:
        print_once(remark)
    for path in sorted(out.iterdir()):
        print(f"{path.stat().st_size:>13,}  {path}")


EXPORT = Command(
    "export",
    "write a head as a serving engine wants it",
    "Write a head for an engine, with its target's tokenizer; for litert the target too, both in "
    "one file. What the engine would refuse is found before, and said with how to fix it.",
    "headstart export runs/mine/head vllm target.name=ORG/my-gemma export.dense=true "
    "output_dir=head-vllm",
    _export,
    arguments=(HEAD, Argument("ENGINE", "what serves it", choices=("transformers", *INSTALLABLE))),
    settings=(
        "output_dir", "target.name", "target.revision", "target.trust_remote_code",
        "target.adapters", "target.chat_template", "target.eos_token_ids", "export.dense",
        "export.dtype", "export.num_assistant_tokens", "export.cache_length",
    ),
    required=("output_dir", "target.name"),
)  # fmt: skip


def _install(args: argparse.Namespace) -> None:
    from headstart.serve.engines import install_engine

    print(f"Installing {args.engine} (minutes the first time) ...", flush=True)
    print(f"Ready: {install_engine(args.engine)}")


INSTALL = Command(
    "install",
    "install a serving engine into an environment of its own",
    "Install an engine into an environment of its own below the user's cache (HEADSTART_CACHE): "
    "vllm takes about 3 GB, litert 2.3 GB, the others 1 GB each.",
    "headstart install llama.cpp",
    _install,
    arguments=(Argument("ENGINE", "which one", choices=INSTALLABLE),),
)


def _serve_check(args: argparse.Namespace) -> None:
    from headstart.data.prompts import limit_evenly, load_prompt_set
    from headstart.eval.recorded import prompt_set
    from headstart.heads.loading import load_served, load_target_config
    from headstart.serve.engine_check import ServeCheck, print_serve_check, serve_check
    from headstart.serve.engines import check_served, engine_python

    litert = args.engine == "litert"
    settings = read_settings(args, [("target.dtype", "float32")] if litert else [])
    # The engine gets weights that all adapters are in.
    if settings.target.sharded or not settings.target.merge_adapters:
        raise ValueError(
            "serve-check compares whole models with all adapters merged: leave "
            "target.merge_adapters=false and target.sharded=true out"
        )
    t, chosen = settings.target, settings.eval
    check_served(args.engine, args.head)
    engine_python(args.engine)  # before the weights are loaded
    if t.quantization is not None:
        raise ValueError("serve-check writes the weights for the engine: no target.quantization")
    if litert and t.dtype != "float32":
        raise ValueError("LiteRT-LM computes in float32 on a CPU: give target.dtype=float32")
    if chosen is None:
        raise ValueError("serve-check asks prompts, and eval is null: give eval.prompts=SET")
    if len(chosen.num_assistant_tokens) != 1:
        raise ValueError("serve-check drafts with one K: eval.num_assistant_tokens=4")
    dtype: Any = settings.export.dtype or "float32"
    if settings.export.dtype is not None and (not litert or dtype == "bfloat16"):
        raise ValueError("the engine gets target.dtype; litert float32, or export.dtype=int8")
    (tokens,) = chosen.num_assistant_tokens
    several = tuple(n for n in chosen.concurrency if n > 1)
    check = ServeCheck(
        args.engine, args.head, tokens, chosen.max_new_tokens, settings.export.dense, dtype,
        several, settings.export.target_gguf,
    )  # fmt: skip
    loaded = load_prompt_set(chosen.prompts)
    prompts = limit_evenly(loaded, chosen.limit)
    if (most := max(several, default=1)) > len(prompts):
        raise ValueError(
            f"eval.concurrency={most}: so many texts at once take as many prompts, and there are "
            f"{len(prompts)}: raise eval.limit"
        )
    target = load_served(t, default_device())
    config = load_target_config(t.name, t.revision, t.trust_remote_code)
    recorded = prompt_set(chosen.prompts, loaded)
    print_serve_check(serve_check(target, config, check, prompts, settings.output_dir, recorded))


SERVE_CHECK = Command(
    "serve-check",
    "compare a real engine with transformers",
    "Start an engine on this machine with the target, and again with the head; compare its greedy "
    "texts with those of transformers token by token, and its acceptance with that of the exact "
    "decoder, and measure tokens per second with the head and without; with vllm and "
    "eval.concurrency=1,4,16 for so many texts at once too. serve-check.json and the engine's logs "
    "are in output_dir.",
    "headstart serve-check runs/quickstart/head vllm export.dense=true output_dir=check",
    _serve_check,
    arguments=(HEAD, Argument("ENGINE", "which one", choices=INSTALLABLE)),
    settings=(
        "output_dir", "target.name", "target.adapters", "target.*", "eval.prompts", "eval.limit",
        "eval.num_assistant_tokens", "eval.max_new_tokens", "eval.concurrency", "export.dense",
        "export.dtype", "export.target_gguf",
    ),
    defaults=(("eval.num_assistant_tokens", [4]), ("eval.limit", 16), ("eval.concurrency", [1])),
    required=("output_dir",),
)  # fmt: skip


def _publish(args: argparse.Namespace) -> None:
    from headstart.serve.publish import Publication, publish

    settings = read_settings(args)
    given = settings.given(["output_dir", "target.name"])
    target = settings.target.name if "target.name" in given else None
    adapters = tuple(settings.target.adapters) or None
    template = settings.target.chat_template
    what = Publication(Path(args.run), args.repo_id, settings.publish, target, adapters, template)
    publish(what, settings.output_dir if "output_dir" in given else None, args.plan)
    if args.plan:
        print("Nothing was uploaded: the same command without --plan does that")


PUBLISH = Command(
    "publish",
    "put a head, its report and a model card on the Hugging Face Hub",
    "Build the repository of a finished run's head: weights, tokenizer, settings, report, pictures "
    "and a model card with the report's figures. It is read back and compared with the head that "
    "was evaluated, then uploaded in one commit. The token is the one of `hf auth login` or "
    "HF_TOKEN. --plan writes the folder to output_dir, and uploads nothing.",
    "headstart publish runs/mine ORG/my-head --plan output_dir=folder",
    _publish,
    arguments=(
        Argument("RUN", "run folder, or that of `headstart adapt`"),
        Argument("REPO_ID", "ORG/NAME of the repository"),
    ),
    settings=(
        "output_dir", "publish.private", "publish.report", "publish.base_models",
        "publish.base_head", "publish.merge_adapter", "publish.license", "publish.languages",
        "publish.include_texts", "publish.branch", "publish.create_pr", "target.name",
        "target.adapters", "target.chat_template",
    ),
    unnamed=(("output_dir", "null"), ("target.name", "as the run names it")),
    flags=("--plan",),
)  # fmt: skip


def _watch(args: argparse.Namespace) -> int:
    from headstart.serve.watch import watch

    settings = read_settings(args)
    server = settings.server.model_copy(update={"url": args.url})  # a file may name another
    out = None if args.json is None else Path(args.json)
    content = watch(server, args.head, settings.watch, out)
    return STALE if content["stale"] else 0


URL = Argument("URL", "address of the server, such as http://localhost:8000")
WATCH = Command(
    "watch",
    "see whether a served head still accepts what its report says",
    "Read the metrics of a vLLM, SGLang or llama.cpp server while it serves: acceptance at each "
    "draft since its start and lately, beside the report that the head was published with. A test "
    "that may be looked at any time says whether the head has gone stale; then it ends, with exit "
    "code 3. Ctrl-C ends it with a summary.",
    "headstart watch http://localhost:8000 runs/mine watch.seconds=0",
    _watch,
    arguments=(
        URL,
        Argument(
            "HEAD", "whose report it is held to: a run folder, a head's, ORG/NAME of the Hub, or a "
            "report.json", "?",
        ),
    ),
    settings=(
        "watch.head", "watch.temperature", "watch.interval", "watch.rounds", "watch.seconds",
        "watch.margin", "watch.false_alarms", "server.model", "server.api_key_env",
    ),
    defaults=(("server.url", URL),),
    flags=("--json",),
)  # fmt: skip

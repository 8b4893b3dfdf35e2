"""A target and its head as one file of LiteRT-LM, which runs it on phones and laptops.

The engine's own converter exports no drafter, and of some targets no hidden states to draft from
(docs/upstream.md): `serve/litert_convert.py` makes the graphs, in the engine's environment. All
that it needs is written here, as safetensors and JSON.
"""

import copy
import errno
import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import PreTrainedModel

from headstart.common.children import run_python
from headstart.common.console import phase, print_once
from headstart.common.files import atomic_folder, check_empty
from headstart.configs.settings import ExportConfig
from headstart.heads.assistant import write_global_keys
from headstart.heads.drafting import Drafter
from headstart.heads.kinds import Verified
from headstart.heads.pairing import DRAFTS, check_shapes, other_target
from headstart.heads.saving import load_assistant, load_assistant_config, save_assistant
from headstart.heads.target import Target, source_layers
from headstart.serve.engines import (
    DRAFT_POSITION_OFFSETS,
    engine_python,
    engine_warnings,
    errors_of,
    incompatibilities,
)

BUNDLE = "model.litertlm"
CONVERT = Path(__file__).with_name("litert_convert.py").absolute()
NO_ROOM = 74  # how the program ends that could not write: EX_IOERR
SHORTEST = 2  # tokens of a text beside K drafts: one of a prompt and the newest
PREFILL = (32, 128)  # tokens that calls of the prefill take


def export_for_litert(
    path: str | Path,
    config: Any,
    load: Callable[[], Target],
    out: Path,
    export: ExportConfig,
    by_ids: bool = False,
) -> list[str]:
    """Write `model.litertlm` with a target and its head into a folder, which appears whole or not
    at all.

    Args:
        path: folder or Hub id of a head in the native format, or HEAD+ADAPTER.
        config: the configuration of its target, whole.
        load: loads the target in float32; called when nothing speaks against it.
        out: folder, new or empty.
        export: how; of it `target_gguf` is another engine's.
        by_ids: pack a tokenizer in place of the target's whose text is the numbers of tokens
            (`serve-check` sends and reads these).

    Returns:
        `engine_warnings` of the engine on the head.

    Raises:
        ValueError: the engine is not installed, the head does not fit the target, or one of them
            is not exported, with the fix; `out` holds something.
        OSError: the disk is full.
        RuntimeError: the conversion failed, with the end of what it said.
    """
    check_empty(out)
    if export.dtype == "bfloat16":
        raise ValueError("LiteRT-LM runs no bfloat16 on a CPU: export.dtype=float32, or int8")
    head = load_assistant_config(path)
    text = config.get_text_config()
    check_shapes(text, head, "the target")
    if found := incompatibilities("litert", head, config):
        raise ValueError(f"litert cannot have {path}: {'; '.join(found)}")
    if (most := text.max_position_embeddings) < export.cache_length:
        raise ValueError(
            f"export.cache_length={export.cache_length} (of serve-check the longest prompt and "
            f"eval.max_new_tokens) is above the {most} positions of the target: lower it to that"
        )
    python = engine_python("litert")
    assistant: Any = load_assistant(path, torch.float32)
    k = export.num_assistant_tokens or assistant.generation_config.num_assistant_tokens or DRAFTS
    if export.cache_length < k + SHORTEST:
        raise ValueError(
            f"export.cache_length={export.cache_length} has no room for a verification of {k} "
            f"drafts: raise it to {k + SHORTEST} at least, or lower export.num_assistant_tokens"
        )
    if export.dense:
        assistant.config.use_ordered_embeddings, assistant.masked_embedding = False, None
    with atomic_folder(out) as work:
        parts = work / "parts"
        _write_parts(assistant, k, load(), parts, export, by_ids)
        with phase("Converting for LiteRT-LM"):
            done = run_python(python, str(CONVERT), str(parts), str(work / BUNDLE))
        if done.returncode:
            said = errors_of(done.stderr, lines=1)
            # The second is what the graphs' writer says, which ends the program.
            if done.returncode == NO_ROOM or "IO failure on output stream" in said:
                raise OSError(errno.ENOSPC, said)
            raise RuntimeError(
                f"the conversion for LiteRT-LM failed (exit status {done.returncode}): {said}"
            )
        shutil.rmtree(parts)
    return engine_warnings("litert", head)


def _write_parts(
    assistant: Any, k: int, target: Target, folder: Path, export: ExportConfig, by_ids: bool
) -> None:
    """Write what the converter reads: `target`, `head`, `tokenizer.json` and `export.json`."""
    _write_text_model(target, folder / "target")
    if (warning := other_target(target, assistant)) is not None:
        print_once(warning)
    save_assistant(assistant, assistant.lm_head.weight, folder / "head", k, torch.float32)
    _as_before_layers(folder / "head" / "config.json")
    _write_probe(target, assistant, folder / "probe.safetensors", export.cache_length)
    if by_ids:
        tokenizer_by_ids(target.config.vocab_size).save(str(folder / "tokenizer.json"))
    else:
        target.tokenizer.save_pretrained(folder)
        if not (folder / "tokenizer.json").is_file():
            raise ValueError(
                f"{target.name} has no tokenizer.json, which LiteRT-LM reads: save its tokenizer "
                "with transformers' fast class"
            )
        if not (template := _chat_template(target)):
            print_once(
                f"{target.name} has no chat template: give `litert-lm run` --no-template, or "
                "export with target.chat_template=FILE"
            )
    settings = {
        "num_assistant_tokens": k,
        "cache_length": export.cache_length,
        "prefill_lengths": PREFILL,
        "dtype": export.dtype or "float32",
        "source_layers": source_layers(target.config),
        "stop_ids": list(target.eos_ids),
        "bos_token_id": None if by_ids else _first_token(target),
        "chat_template": "" if by_ids else template,
    }
    (folder / "export.json").write_text(json.dumps(settings, indent=2), encoding="utf-8")


def _write_text_model(target: Target, folder: Path) -> None:
    """The text model as `Gemma3ForCausalLM` or `Gemma4ForCausalLM` reads it, in float32, whatever
    class it is part of."""
    folder.mkdir(parents=True)
    weights = target.model.get_decoder().state_dict()
    state = {f"model.{name}": tensor.float().contiguous() for name, tensor in weights.items()}
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    config = copy.deepcopy(target.config)
    config.tie_word_embeddings = True  # of a multimodal target the whole configuration says it
    config.save_pretrained(folder)
    _as_before_layers(folder / "config.json")


def _as_before_layers(path: Path) -> None:
    """Say in a config.json what layers differ in as releases before 5.19 do, of which the
    converter's is one: it has no configuration a layer."""
    if json.loads(path.read_text(encoding="utf-8"))["model_type"] != "gemma3_text":
        write_global_keys(path)
    content = json.loads(path.read_text(encoding="utf-8"))
    content.get("text_config", content).pop("per_layer_config", None)
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def _write_probe(target: Target, assistant: PreTrainedModel, path: Path, room: int) -> None:
    """What target and head say here of random tokens beyond the sliding window, with which the
    converter compares what they say there."""
    window: int = target.config.sliding_window
    rows = min(window + 16, room - 1)
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(target.config.vocab_size, (1, rows + 1), generator=generator)
    seen = target.activations(ids[:, :-1].to(target.device))
    drafter = Drafter(assistant, target.model.get_input_embeddings())
    state = drafter.new_text(offset=DRAFT_POSITION_OFFSETS["litert"])
    state.commit(Verified(ids[:, :-1], seen.hidden, seen.shared_kv))
    drafts = drafter.draft(ids[:, -1:], state, 1, frozenset(), None, sample=True)
    assert drafts.logits is not None
    save_file({"ids": ids, "hidden": seen.hidden, "logits": drafts.logits}, path)


def _first_token(target: Target) -> int | None:
    """The token with which the target's texts begin, which the engine puts before them: <bos> where
    the tokenizer or the chat template puts it there."""
    first: int | None = target.tokenizer.bos_token_id
    begins = target.tokenizer("a")["input_ids"][:1] == [first]
    return first if begins or "bos_token" in _chat_template(target) else None


def _chat_template(target: Target) -> str:
    """That for plain turns, of a tokenizer that has several too; empty: there is none."""
    tokenizer = target.tokenizer
    return tokenizer.get_chat_template() if tokenizer.chat_template else ""


def logged_rate(log: Path, counted: float, whole: bool) -> float:
    """The share of all drafts that were accepted, as the engine's log has it in its end.

    Args:
        log: of the engine, which has ended.
        counted: the same by the server's count (`litert_server.py`).
        whole: whether that has all drafts: a text that ended by itself hides some.

    Raises:
        RuntimeError: the log has none, or another one.
    """
    text = log.read_text(encoding="utf-8", errors="replace")
    found = re.findall(r"MTP Drafter - Success rate: (\S+)", text)
    if not found:
        raise RuntimeError(f"LiteRT-LM did not draft: {log} has no success rate")
    rate = float(found[-1])
    if whole and abs(rate - counted) > 1e-4:
        raise RuntimeError(
            f"LiteRT-LM accepted {rate:.4f} of the drafts by its log, and {counted:.4f} by what it "
            f"handed out: {log}"
        )
    return rate


def tokenizer_by_ids(vocab_size: int) -> Tokenizer:
    """A tokenizer whose text of tokens 7 and 42 is "7 42", and nothing else."""
    words = {str(token): token for token in range(vocab_size)}
    tokenizer = Tokenizer(WordLevel(words, unk_token="0"))
    tokenizer.pre_tokenizer = WhitespaceSplit()
    return tokenizer

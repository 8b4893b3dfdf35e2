"""A real engine against transformers: equal greedy texts, equal acceptance, and what the head is
worth there (`headstart serve-check`).

The engine (`serve/engine_server.py`) is asked one prompt after another, with a head and without,
and again with several at once where it works on several together.
"""

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from rich.table import Column, Table
from transformers import AutoModelForCausalLM, PreTrainedModel

from headstart.common.children import temporary_folder
from headstart.common.console import counted, plain_console, print_once
from headstart.common.files import drop_remote_code, write_figures
from headstart.common.machine import environment
from headstart.configs.settings import ExportConfig
from headstart.data.prompts import Prompt, tell_schemas
from headstart.data.templates import encode_prompts
from headstart.eval.acceptance import AcceptanceCounts, zero_counts
from headstart.eval.asked import asked_by_heads
from headstart.eval.concurrency import BatchCost, measure_batches
from headstart.eval.decoding import Decoded, decode, divergence
from headstart.heads.admission import check_file
from headstart.heads.assistant import write_global_keys
from headstart.heads.decoder import ExactDecoding
from headstart.heads.kernels import fast_kernels
from headstart.heads.pairing import check_pair
from headstart.heads.saving import draft_position_offset, load_assistant, load_assistant_config
from headstart.heads.target import Gemma3ForAssistedDecoding, Target
from headstart.serve.engine_server import Answer, Asked, EngineServer, ask
from headstart.serve.engines import (
    DRAFT_POSITION_OFFSETS,
    GGUF,
    GGUF_TYPES,
    Engine,
    convert_to_gguf,
    engine_version,
    export_for_engine,
    gguf_metadata,
    unlike_gguf,
)
from headstart.serve.litert import BUNDLE, export_for_litert, logged_rate

SCHEMA = 1
SPARE = 16  # tokens of the context beside K drafts beyond the end of the longest text


@dataclass(frozen=True)
class ServeCheck:
    """What to check."""

    engine: Engine
    head: str
    num_assistant_tokens: int
    max_new_tokens: int
    dense: bool
    """Leave ordered embeddings out, for transformers too."""
    dtype: Literal["float32", "int8"] = "float32"
    """Of LiteRT-LM's weights."""
    concurrency: tuple[int, ...] = ()
    """Numbers of texts at once that are measured beside one after another, in vLLM alone."""
    target_gguf: Path | None = None
    """File of the target that llama.cpp serves, quantized perhaps. None: one is made."""

    def __post_init__(self) -> None:
        if self.target_gguf is not None:
            if self.engine != "llama.cpp":
                raise ValueError(f"{self.engine} reads no GGUF: leave export.target_gguf out")
            if not self.target_gguf.is_file():
                raise ValueError(f"there is no file {self.target_gguf}")
            check_file(self.target_gguf)
        if self.concurrency and self.engine != "vllm":
            raise ValueError(
                f"{self.engine} is run one text at a time here: give eval.concurrency=1, or "
                "check with vllm"
            )


def serve_check(
    target: Target,
    config: Any,
    check: ServeCheck,
    prompts: Sequence[Prompt],
    out: Path,
    recorded: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """Decode prompts with transformers, plainly and by the exact decoder, then in an engine without
    a head and with it; write serve-check.json.

    Args:
        target: in the dtype to compare in.
        config: its configuration, whole.
        check: engine, head and lengths.
        prompts: whose greedy texts are compared.
        out: folder; the engine's logs stay there.
        recorded: the set that the prompts are of, by `prompt_set`; None: of none.

    Returns:
        The content of serve-check.json: acceptance of both sides by position, the share of texts
        that are equal to plain decoding of transformers and of the engine's own, tokens a second.

    Raises:
        ValueError: the engine is not installed, or would refuse the head, here or everywhere.
        RuntimeError: it did not come up or stopped; its log is kept.
    """
    asked = asked_by_heads([check.head])
    out.mkdir(parents=True, exist_ok=True)
    with temporary_folder() as temporary:
        k = check.num_assistant_tokens
        tell_schemas(prompts, "serve-check")
        ids = encode_prompts(prompts, target.tokenizer, asked.chat_template_kwargs)
        context = max(map(len, ids)) + check.max_new_tokens + k + SPARE
        head, served_target, served_head = _written(target, config, check, context, temporary)
        ours, counts, costs = _by_transformers(target, head, check, ids)
        dtype = str(target.identity["dtype"])
        variants: dict[str, Asked] = {}
        several: dict[tuple[str, int], Asked] = {}
        for name, served in (("plain", None), ("assisted", served_head)):
            with EngineServer(
                check.engine, served_target, served, k, context, stop_ids=target.eos_ids,
                log=out / f"{name}.log", dtype=dtype, threads=torch.get_num_threads(),
                at_once=max(check.concurrency, default=1),
            ) as server:  # fmt: skip
                what = f"{check.engine}, {name}"
                variants[name] = ask(server, ids, check.max_new_tokens, what)
                for n in check.concurrency:
                    of_n = f"{what}, {n} at once"
                    several[name, n] = ask(server, ids, check.max_new_tokens, of_n, at_once=n)
                told = server.read_counts()  # the warm-up's too
    content = {
        "schema": SCHEMA,
        "environment": environment(target.device)
        | {
            "target": target.name, "head": check.head, "engine": check.engine,
            "engine_version": engine_version(check.engine),
            "engine_puts_drafts": DRAFT_POSITION_OFFSETS[check.engine],
            "head_trained_for_drafts": draft_position_offset(load_assistant_config(check.head)),
            "dtype": dtype, "prompts": len(prompts), "prompt_set": recorded,
            "num_assistant_tokens": k, "dense": check.dense, "max_new_tokens": check.max_new_tokens,
            "engine_dtype": _engine_dtype(check, dtype),
            "chat_template_kwargs": asked.chat_template_kwargs,
        },
        **_compared(ours, counts, variants),
        "concurrency": [_at_once(several, cost, counts.acceptance_length) for cost in costs],
    }  # fmt: skip
    if check.engine == "litert":
        rate = sum(told.by_position) / max(told.rounds * k, 1)
        whole = not content["ended_texts"]
        content["log_acceptance_rate"] = logged_rate(out / "assisted.log", rate, whole)
    write_figures(content, out / "serve-check.json")
    return content


def _written(
    target: Target, config: Any, check: ServeCheck, context: int, folder: Path
) -> tuple[Path, Path, Path]:
    """The head for transformers, as the engine gets it; target and head as the engine reads
    them, for texts of up to `context` tokens."""
    dtype = target.table.dtype
    head, model, gguf = folder / "head", folder / "target", folder / "target.gguf"
    ordered = load_assistant_config(check.head).use_ordered_embeddings
    if check.engine == "vllm" and ordered and not check.dense:  # its build for the CPU is installed
        raise ValueError(
            "vLLM's CPU backend cannot read ordered embeddings: check with export.dense=true"
        )
    given = check.target_gguf
    if given is not None and (unlike := unlike_gguf(given, config.to_dict())):
        raise ValueError(f"{unlike}: name a file of {target.name}")
    export_for_engine(
        check.head, check.engine, config, target.tokenizer, head, dense=check.dense, dtype=dtype
    )
    if given is not None:
        return head, given, head / GGUF
    if check.engine == "litert":
        k, bundle = check.num_assistant_tokens, folder / "litert"
        how = ExportConfig(num_assistant_tokens=k, cache_length=context, dtype=check.dtype)
        export_for_litert(head, config, lambda: target, bundle, how, by_ids=True)
        return head, bundle / BUNDLE, bundle / BUNDLE
    served_model(target, check.engine).save_pretrained(model)
    target.tokenizer.save_pretrained(model)
    drop_remote_code(model)
    # Ours is a class of the same weights, whose name no engine knows.
    path = model / "config.json"
    text, ours = path.read_text(encoding="utf-8"), f'"{Gemma3ForAssistedDecoding.__name__}"'
    path.write_text(text.replace(ours, '"Gemma3ForCausalLM"'), encoding="utf-8")
    if config.model_type.startswith("gemma4"):
        write_global_keys(path)
    if check.engine != "llama.cpp":
        return head, model, head
    convert_to_gguf(model, gguf, GGUF_TYPES[dtype])
    return head, gguf, head / GGUF


def served_model(target: Target, engine: Engine) -> PreTrainedModel:
    """A target as an engine reads it. A multimodal one has let go of what reads images and sounds:
    mlx-vlm, which reads no other Gemma 4, gets that from its checkpoint again, and the others the
    text model alone."""
    model, decoder = target.model, target.model.get_decoder()
    if decoder is model.base_model:
        return model
    if engine == "mlx":
        assert target.settings is not None
        name, revision = (target.settings[key] for key in ("name", "revision"))
        cls: Any = type(model)
        whole = cls.from_pretrained(name, revision=revision, dtype=target.table.dtype)
        whole.get_decoder().load_state_dict(decoder.state_dict())
    else:
        text = copy.deepcopy(target.config)
        text.tie_word_embeddings = True  # of a multimodal target the whole configuration says it
        with torch.device("meta"):
            whole = AutoModelForCausalLM.from_config(text)
        whole.model, whole.lm_head = decoder, model.get_output_embeddings()
    whole.generation_config = model.generation_config
    return whole


def _engine_dtype(check: ServeCheck, dtype: str) -> str:
    """Of the target's weights in the engine; of a GGUF file that was given, as it says."""
    if check.target_gguf is not None:
        return str(gguf_metadata(check.target_gguf).get("general.file_type", "unknown"))
    return check.dtype if check.engine == "litert" else dtype


def _by_transformers(
    target: Target, head: Path, check: ServeCheck, ids: Sequence[list[int]]
) -> tuple[dict[str, list[Answer]], AcceptanceCounts, list[BatchCost]]:
    """Plain and exact decoding of each prompt, in turn; acceptance where drafts stand as in the
    engine; and what rounds cost over several texts at once."""
    assistant = load_assistant(head, target.table.dtype, target.device)
    check_pair(target, assistant)
    decoding_config, k, n = ExactDecoding(), check.num_assistant_tokens, check.max_new_tokens
    as_there = ExactDecoding(draft_position_offset=DRAFT_POSITION_OFFSETS[check.engine])
    found: dict[str, list[Answer]] = {"plain": [], "assisted": []}
    counts = zero_counts(k)
    with fast_kernels(target.model), fast_kernels(assistant):  # prepared once for all texts
        decode(target, ids[0], k + 1, assistant, k, decoding_config)  # a warm-up
        for prompt in counted(ids, "transformers (texts)"):
            plain = decode(target, prompt, n)
            drafted = decode(target, prompt, n, assistant, k, decoding_config)
            for name, text in (("plain", plain), ("assisted", drafted)):
                found[name].append(Answer.of(text.tokens, target.eos_ids, n, text.seconds))
            longer = decode(target, prompt, n + k + 1, assistant, k, as_there)
            counts += as_engine_counts(longer, len(prompt), n, k, check.engine)
    return found, counts, measure_batches(target, assistant, check.concurrency, [k])


def as_engine_counts(
    longer: Decoded, prompt_len: int, max_new_tokens: int, k: int, engine: Engine
) -> AcceptanceCounts:
    """Acceptance in a text of `max_new_tokens` as an engine counts it, by how many drafts it
    proposes at the end.

    Args:
        longer: the same text with K + 1 tokens more, so that no round within it had fewer drafts;
            but for a text that ends by itself, beyond whose end engines count and this does not.
        prompt_len: tokens of the prompt.
        max_new_tokens: N of the engine's text.
        k: drafts a round.
        engine: that is compared with.
    """
    rounds = []
    for (seen, _), (_, accepted) in zip(
        longer.forwards[1:], longer.rounds(prompt_len), strict=True
    ):
        left = max_new_tokens - (seen + 1 - prompt_len)
        # vLLM goes beyond the end; llama.cpp leaves a place for the target's own token, as
        # transformers does; mlx-vlm does not.
        proposed = {"llama.cpp": min(k, left - 1), "mlx": min(k, left)}.get(engine, k)
        if left > 0 and proposed > 0:
            rounds.append((proposed, min(accepted, proposed)))
    return AcceptanceCounts.of_rounds(rounds, k)


def _compared(
    ours: dict[str, list[Answer]],
    counts: AcceptanceCounts,
    variants: dict[str, Asked],
) -> dict[str, Any]:
    plain, assisted = variants["plain"].answers, variants["assisted"].answers
    told = variants["assisted"].counts
    rates = [accepted / max(told.rounds, 1) for accepted in told.by_position]
    speeds = {f"transformers_{name}": _speed(texts) for name, texts in ours.items()}
    speeds |= {f"engine_{name}": _speed(asked.answers) for name, asked in variants.items()}
    return {
        "acceptance_length": {"transformers": counts.acceptance_length, "engine": 1 + sum(rates)},
        "cumulative_acceptance_rate": {
            "transformers": counts.cumulative_acceptance_rate,
            "engine": rates,
        },
        "rounds": {"transformers": counts.rounds, "engine": told.rounds},
        "ended_texts": sum(text.ended for text in assisted),
        "equal_texts": {
            "engine_assisted_to_engine_plain": _equal(assisted, plain),
            "engine_plain_to_transformers_plain": _equal(plain, ours["plain"]),
            "engine_assisted_to_transformers_plain": _equal(assisted, ours["plain"]),
        },
        "first_parting": [
            divergence(a.tokens, b.tokens) for a, b in zip(ours["plain"], assisted, strict=True)
        ],
        "tokens_per_second": speeds,
        "speedup": speeds["engine_assisted"] / speeds["engine_plain"],
    }


def _at_once(
    several: dict[tuple[str, int], Asked], cost: BatchCost, acceptance_length: float
) -> dict[str, Any]:
    """What the engine did with so many texts at once, and what was predicted of it by the
    acceptance length of one after another."""
    plain, assisted = (several[name, cost.texts] for name in ("plain", "assisted"))
    counts = assisted.counts
    return {
        "texts": cost.texts,
        "acceptance_length": 1 + sum(counts.by_position) / max(counts.rounds, 1),
        "tokens_per_second_plain": plain.tokens_per_second,
        "tokens_per_second_assisted": assisted.tokens_per_second,
        "speedup": assisted.tokens_per_second / plain.tokens_per_second,
        "predicted_speedup": cost.speedup(acceptance_length),
        "c": cost.c,
        "v": cost.v,
    }


def _speed(texts: Sequence[Answer]) -> float:
    return sum(t.written for t in texts) / sum(t.seconds for t in texts)


def _equal(texts: Sequence[Answer], others: Sequence[Answer]) -> float:
    """Share of texts that are the same tokens."""
    return sum(a.tokens == b.tokens for a, b in zip(texts, others, strict=True)) / len(texts)


def print_serve_check(content: dict[str, Any]) -> None:
    """The comparison, for a terminal."""
    env, speed = content["environment"], content["tokens_per_second"]
    columns = ["acceptance length", "accepted at draft 1 ..", "tokens/s plain", "with head"]
    table = Table(
        "", *(Column(name, justify="right") for name in columns),
        title=f"{env['head']} for {env['target']}, {env['prompts']} prompts",
    )  # fmt: skip
    for name, label in (
        ("transformers", f"transformers, exact, {env['dtype']}"),
        ("engine", f"{env['engine']}, {env['engine_dtype']}"),
    ):
        rates = ", ".join(f"{rate:.3f}" for rate in content["cumulative_acceptance_rate"][name])
        speeds = [f"{speed[f'{name}_{variant}']:.1f}" for variant in ("plain", "assisted")]
        table.add_row(label, f"{content['acceptance_length'][name]:.3f}", rates, *speeds)
    plain_console().print(table)
    for name, share in content["equal_texts"].items():
        print(f"equal texts, {name.replace('_', ' ')}: {share:.0%}")
    print_once(f"speedup of {env['engine']} by the head: {content['speedup']:.2f}")
    for row in content["concurrency"]:
        print_once(
            f"{row['texts']} texts at once: {row['tokens_per_second_plain']:.1f} tokens/s plain, "
            f"{row['tokens_per_second_assisted']:.1f} with the head, {row['speedup']:.2f} times as "
            f"fast; predicted {row['predicted_speedup']:.2f}"
        )

"""A real engine against transformers: equal greedy texts, equal acceptance, and what the head is
worth there (`headstart serve-check`)."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.table import Table

from headstart.common.children import temporary_folder
from headstart.common.console import plain_console, progress_bar, say
from headstart.common.files import drop_remote_code, write_atomically
from headstart.common.machine import environment
from headstart.data.prompts import Prompt
from headstart.data.templates import encode_prompts
from headstart.eval.acceptance import AcceptanceCounts, zero_counts
from headstart.eval.asked import asked_by_heads
from headstart.eval.decoding import Decoded, decode, parting
from headstart.heads.assistant import check_pair
from headstart.heads.decoder import ExactDecoding
from headstart.heads.saving import (
    load_assistant,
    load_assistant_config,
    rope_position,
    write_global_keys,
)
from headstart.heads.target import Gemma3ForAssistedDecoding, Target
from headstart.serve.engine_servers import Answer, Counts, EngineServer
from headstart.serve.engines import (
    GGUF,
    GGUF_TYPES,
    ROPE_POSITIONS,
    Engine,
    convert_to_gguf,
    engine_version,
    export_for_engine,
)

SCHEMA = 1
SPARE = 16  # tokens of the context beside K drafts beyond the end of the longest text
WARM_UP = 8  # tokens of a request before the clock runs


@dataclass(frozen=True)
class ServeCheck:
    """What to check."""

    engine: Engine
    head: str
    num_assistant_tokens: int
    max_new_tokens: int
    dense: bool
    """Leave ordered embeddings out, for transformers too."""


def serve_check(
    target: Target, config: Any, check: ServeCheck, prompts: Sequence[Prompt], out: Path
) -> dict[str, Any]:
    """Decode prompts with transformers, plainly and by the exact decoder, then in an engine without
    a head and with it; write serve-check.json.

    Args:
        target: in the dtype to compare in.
        config: its configuration, whole.
        check: engine, head and lengths.
        prompts: whose greedy texts are compared.
        out: folder; the engine's logs stay there.

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
        head, served_target, served_head = _written(target, config, check, temporary)
        k = check.num_assistant_tokens
        ids = encode_prompts(prompts, target.tokenizer, asked.chat_template_kwargs)
        context = max(map(len, ids)) + check.max_new_tokens + k + SPARE
        ours, counts = _by_transformers(target, head, check, ids)
        dtype = str(target.identity["dtype"])
        sides: dict[str, tuple[list[Answer], Counts]] = {}
        for name, served in (("plain", None), ("assisted", served_head)):
            server = EngineServer(
                check.engine, served_target, served, k, context, target.eos_ids,
                out / f"{name}.log", dtype, torch.get_num_threads(),
            )  # fmt: skip
            with server:
                sides[name] = _ask(server, ids, check.max_new_tokens, f"{check.engine}, {name}")
    content = {
        "schema": SCHEMA,
        "environment": environment(target.device)
        | {
            "target": target.name, "head": check.head, "engine": check.engine,
            "engine_version": engine_version(check.engine),
            "engine_puts_drafts": ROPE_POSITIONS[check.engine],
            "head_trained_for_drafts": rope_position(load_assistant_config(check.head)),
            "dtype": dtype, "prompts": len(prompts), "num_assistant_tokens": k,
            "dense": check.dense, "max_new_tokens": check.max_new_tokens,
            "chat_template_kwargs": asked.chat_template_kwargs,
        },
        **_compared(ours, counts, sides),
    }  # fmt: skip
    write_atomically(out / "serve-check.json", json.dumps(content, indent=2) + "\n")
    return content


def _written(
    target: Target, config: Any, check: ServeCheck, folder: Path
) -> tuple[Path, Path, Path]:
    """The head for transformers, as the engine gets it; target and head as the engine reads
    them."""
    dtype = target.table.dtype
    head, model, gguf = folder / "head", folder / "target", folder / "target.gguf"
    ordered = load_assistant_config(check.head).use_ordered_embeddings
    if check.engine == "vllm" and ordered and not check.dense:  # its build for the CPU is installed
        raise ValueError("vLLM's CPU backend cannot read ordered embeddings: check with --dense")
    export_for_engine(check.head, check.engine, config, target.tokenizer, head, check.dense, dtype)
    target.model.save_pretrained(model)
    target.tokenizer.save_pretrained(model)
    drop_remote_code(model)
    content = json.loads((model / "config.json").read_text(encoding="utf-8"))
    # Ours is a class of the same weights, whose name no engine knows.
    if content["architectures"] == [Gemma3ForAssistedDecoding.__name__]:
        content["architectures"] = ["Gemma3ForCausalLM"]
        text = json.dumps(content, indent=2) + "\n"
        (model / "config.json").write_text(text, encoding="utf-8")
    if config.model_type.startswith("gemma4"):
        write_global_keys(model / "config.json")
    if check.engine != "llama.cpp":
        return head, model, head
    convert_to_gguf(model, gguf, GGUF_TYPES[dtype])
    return head, gguf, head / GGUF


def _by_transformers(
    target: Target, head: Path, check: ServeCheck, ids: Sequence[list[int]]
) -> tuple[dict[str, list[Answer]], AcceptanceCounts]:
    """Plain and exact decoding of each prompt, in turn, and the acceptance of the latter."""
    assistant = load_assistant(head, target.table.dtype, target.device)
    check_pair(target, assistant)
    how, k, n = ExactDecoding(), check.num_assistant_tokens, check.max_new_tokens
    found: dict[str, list[Answer]] = {"plain": [], "assisted": []}
    counts = zero_counts(k)
    with progress_bar() as bar:
        task = bar.add_task("transformers (texts)", total=len(ids), status="")
        for prompt in ids:
            plain = decode(target, prompt, n)
            drafted = decode(target, prompt, n, assistant, k, how)
            for name, text in (("plain", plain), ("assisted", drafted)):
                found[name].append(Answer.of(text.tokens, target.eos_ids, n, text.seconds))
            longer = decode(target, prompt, n + k + 1, assistant, k, how)
            counts += as_engine_counts(longer, len(prompt), n, k, check.engine)
            bar.update(task, advance=1)
    return found, counts


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


def _ask(
    server: EngineServer, ids: Sequence[list[int]], max_new_tokens: int, what: str
) -> tuple[list[Answer], Counts]:
    """All prompts, one after another, and what the engine counted meanwhile."""
    server.answer(ids[0], WARM_UP)
    before = server.read_counts()
    with progress_bar() as bar:
        task = bar.add_task(f"{what} (texts)", total=len(ids), status="")
        found = []
        for prompt in ids:
            found.append(server.answer(prompt, max_new_tokens))
            bar.update(task, advance=1)
    return found, server.read_counts() - before


def _compared(
    ours: dict[str, list[Answer]],
    counts: AcceptanceCounts,
    sides: dict[str, tuple[list[Answer], Counts]],
) -> dict[str, Any]:
    plain, (assisted, told) = sides["plain"][0], sides["assisted"]
    rates = [accepted / max(told.rounds, 1) for accepted in told.by_position]
    speeds = {
        **{f"transformers_{name}": _speed(texts) for name, texts in ours.items()},
        **{f"engine_{name}": _speed(texts) for name, (texts, _) in sides.items()},
    }
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
            parting(a.tokens, b.tokens) for a, b in zip(ours["plain"], assisted, strict=True)
        ],
        "tokens_per_second": speeds,
        "speedup": speeds["engine_assisted"] / speeds["engine_plain"],
    }


def _speed(texts: Sequence[Answer]) -> float:
    return sum(t.written for t in texts) / sum(t.seconds for t in texts)


def _equal(texts: Sequence[Answer], others: Sequence[Answer]) -> float:
    """Share of texts that are the same tokens."""
    return sum(a.tokens == b.tokens for a, b in zip(texts, others, strict=True)) / len(texts)


def print_serve_check(content: dict[str, Any]) -> None:
    """The comparison, for a terminal."""
    env, speed = content["environment"], content["tokens_per_second"]
    table = Table(
        title=f"{env['head']} for {env['target']}, {env['dtype']}, {env['prompts']} prompts"
    )
    columns = ["", "acceptance length", "accepted at draft 1 ..", "tokens/s plain", "with head"]
    for column in columns:
        table.add_column(column, justify="left" if not column else "right")
    for name, label in (("transformers", "transformers, exact"), ("engine", env["engine"])):
        rates = content["cumulative_acceptance_rate"][name]
        table.add_row(
            label,
            f"{content['acceptance_length'][name]:.3f}",
            ", ".join(f"{rate:.3f}" for rate in rates),
            f"{speed[f'{name}_plain']:.1f}",
            f"{speed[f'{name}_assisted']:.1f}",
        )
    plain_console().print(table)
    for name, share in content["equal_texts"].items():
        print(f"equal texts, {name.replace('_', ' ')}: {share:.0%}")
    say(f"speedup of {env['engine']} by the head: {content['speedup']:.2f}")

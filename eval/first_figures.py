"""First figures of a target, before a head of it is trained: what drafts have to beat here.

Letters: K draft tokens.
"""

import json
import time
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table
from transformers import PreTrainedModel

from headstart.common.console import one_line, plain_console
from headstart.common.files import write_atomically
from headstart.common.machine import environment, machine_name
from headstart.configs.schema import EvalConfig
from headstart.data.conversations import stable_hash
from headstart.data.prompts import Prompt, limit_evenly, load_prompt_set, tell_schemas
from headstart.eval.decoding import decode, kernels_of
from headstart.eval.draft_cost import (
    COST_CONTEXT,
    MAX_DRAFT_TOKENS,
    longest_draft,
    measure_costs,
)
from headstart.eval.figures import summarize
from headstart.eval.measurements import Asked, Text
from headstart.eval.recorded import prompt_set
from headstart.eval.spans import spans_of_tokens
from headstart.eval.statistics import with_interval
from headstart.heads.target import Target

PROMPTS = 4  # of the evaluation
BUDGET = 12.0  # seconds of decoding, and of measuring costs; what has begun ends
WARM_UP_TOKENS = 8
NAME = "first_figures.json"
DECODERS = {"exact": "exact decoder", "transformers": "stock decoder"}


def first_figures(
    target: Target, assistant: PreTrainedModel, chosen: EvalConfig, asked: Asked, out: Path
) -> dict[str, Any]:
    """Measure in about a minute, write `first_figures.json` into `out` and return what it holds:
    plain decoding, prompt lookup without a head, and the acceptance length from which on a head of
    this shape pays. Those of the same settings that are there are not measured again.

    Args:
        target: in the dtype to measure.
        assistant: a head of the shape, in the same dtype; what it drafts does not count.
        chosen: the prompts, draft lengths and lengths of texts of the evaluation.
        asked: how prompts are asked.
        out: the run folder.

    Raises:
        ValueError: the prompts cannot be read.
    """
    loaded = load_prompt_set(chosen.prompts)
    where = environment(target.device)
    settings = {
        "machine": [machine_name(where), where["torch"], where["transformers"]],
        "target_fingerprint": target.fingerprint,
        "head": stable_hash(assistant.config.to_json_string()),
        "dtype": str(target.table.dtype).removeprefix("torch."),
        "chat_template_kwargs": asked.chat_template_kwargs,
        "context": COST_CONTEXT,
        "prompt_set": prompt_set(chosen.prompts, loaded),
        **chosen.model_dump(
            mode="json", include={"num_assistant_tokens", "max_new_tokens", "limit"}
        ),
    }
    if (there := _read(out / NAME)).get("settings") == settings:
        return there
    ks = chosen.num_assistant_tokens or [MAX_DRAFT_TOKENS]  # decoders may choose K themselves
    looked_up = summarize(_texts(target, loaded, chosen, max(ks), asked), max(ks), None)
    costs = measure_costs(target, assistant, longest_draft(chosen), BUDGET)
    measured = {name: costs[name] for name in DECODERS if name in costs}
    kept = (
        "acceptance_length", "acceptance_length_interval", "speedup", "speedup_interval", "texts",
        "loops", "new_tokens",
    )  # fmt: skip
    content = {
        "settings": settings,
        "environment": where | {"target": target.name},
        "plain": {
            "tokens_per_second": looked_up["baseline_tokens_per_second"],
            "decode_tokens_per_second": looked_up["baseline_decode_tokens_per_second"],
            "time_to_first_token": looked_up["baseline_time_to_first_token"],
        },
        "lookup": {"num_assistant_tokens": max(ks)} | {key: looked_up[key] for key in kept},
        "break_even": {  # K*c + v(K), by K
            name: {str(k): own.of_round(k) for k in ks} for name, own in measured.items()
        },
        "draft_step": {name: own.c for name, own in measured.items()},
    }
    write_atomically(out / NAME, json.dumps(content, indent=2) + "\n")
    return _read(out / NAME)


def _texts(
    target: Target, loaded: list[Prompt], chosen: EvalConfig, k: int, asked: Asked
) -> list[Text]:
    """Some prompts decoded plainly and by prompt lookup, as many as there is time for."""
    prompts = limit_evenly(loaded, min(PROMPTS, chosen.limit or PROMPTS))
    tell_schemas(prompts, "a first look")
    encoded = [asked.encode(prompt, target.tokenizer) for prompt in prompts]
    with kernels_of(target, []):
        decode(target, encoded[0], WARM_UP_TOKENS, num_assistant_tokens=k)
        texts, began = list[Text](), time.perf_counter()
        pairs = list(zip(prompts, encoded, strict=True))
        for number, (prompt, ids) in enumerate(pairs):
            if texts and time.perf_counter() - began > BUDGET:
                break
            ways: list[int | None] = [None, k] if number % 2 == 0 else [k, None]
            new = chosen.max_new_tokens
            done = {way: decode(target, ids, new, num_assistant_tokens=way) for way in ways}
            plain, drafted = done[None], done[k]
            texts.append(Text(
                prompt.id, 0, prompt.category, len(ids), plain, drafted, None, None, seed=None,
                spans=spans_of_tokens(target.tokenizer, ids, drafted.tokens, target.eos_ids),
            ))  # fmt: skip
    return texts


def _read(path: Path) -> dict[str, Any]:
    """What the file holds; nothing where there is none, or it is damaged."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return content if isinstance(content, dict) else {}


def print_first_figures(content: dict[str, Any], console: Console | None = None) -> None:
    """Print them as one table of at most 80 columns."""
    plain, lookup = content["plain"], content["lookup"]
    target, dtype = content["environment"]["target"], content["settings"]["dtype"]
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for name in ("", "K", "acceptance length", "speedup (95%)"):
        table.add_column(name, justify="right" if name else "left", no_wrap=True)
    table.add_row("plain decoding", "", "", f"{plain['tokens_per_second']:.1f} tokens per second")
    table.add_row(
        f"prompt lookup, {lookup['texts']} texts",
        str(lookup["num_assistant_tokens"]),
        f"{lookup['acceptance_length']:.2f}",
        with_interval(lookup["speedup"], lookup["speedup_interval"]),
    )
    for name, found in content["break_even"].items():
        for k, length in found.items():
            table.add_row(f"a head, {DECODERS[name]}", k, f"from {length:.2f} on", "above 1")
    console = console or plain_console()
    console.print(one_line(f"First figures of {target}, {dtype}, on this machine"))
    console.print(table)

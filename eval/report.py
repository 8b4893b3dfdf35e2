"""The evaluation: plain against assisted decoding, interleaved, and its report.json."""

import json
import random
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from transformers import PreTrainedModel

from headstart.configs.schema import Decoder
from headstart.data.progress import progress_bar
from headstart.data.prompts import Prompt, limit_evenly, load_prompts
from headstart.data.templates import encode_prompt
from headstart.eval.acceptance import zero_counts
from headstart.eval.decoding import Decoded, greedy, top2_gap
from headstart.eval.draft_cost import MAX_DRAFT_TOKENS, measure_costs
from headstart.eval.environment import environment
from headstart.eval.verdict import ends_in_loop, verdict
from headstart.heads.assistant import check_pair
from headstart.heads.draft_length import CostRule
from headstart.heads.exact import ExactDecoding, Lookup
from headstart.heads.files import write_atomically
from headstart.heads.targets import Target

SCHEMA = 1
BOOTSTRAP = 1000


@dataclass(frozen=True)
class Side:
    """One way to decode that is compared with plain decoding."""

    decoder: Decoder
    num_assistant_tokens: int
    """K, the most drafts of a round."""
    how: ExactDecoding | None
    """Of the exact decoder; learns from prompt to prompt."""

    def decode(
        self, target: Target, prompt_ids: list[int], max_new_tokens: int, assistant: PreTrainedModel
    ) -> Decoded:
        """One greedy text."""
        head = None if self.decoder == "lookup" else assistant
        return greedy(target, prompt_ids, max_new_tokens, head, self.num_assistant_tokens, self.how)


def make_sides(
    decoders: Sequence[Decoder],
    num_assistant_tokens: Sequence[int],
    target: Target,
    assistant: PreTrainedModel,
) -> list[Side]:
    """Each decoder with each K; those that choose K themselves once, told what drafts cost here."""
    sides: list[Side] = []
    costs = None
    if {"cost", "hybrid"} & set(decoders):
        costs = measure_costs(target, assistant)
    for decoder in decoders:
        match decoder:
            case "transformers" | "lookup":
                sides += [Side(decoder, k, None) for k in num_assistant_tokens]
            case "exact":
                sides += [Side(decoder, k, ExactDecoding()) for k in num_assistant_tokens]
            case "cost" | "hybrid":
                assert costs is not None
                rule = CostRule(*costs)
                lookup = Lookup(rule) if decoder == "hybrid" else None
                sides.append(Side(decoder, MAX_DRAFT_TOKENS, ExactDecoding(rule, lookup)))
    return sides


@dataclass(frozen=True)
class Comparison:
    """One prompt decoded plainly and with K draft tokens."""

    prompt: Prompt
    prompt_len: int
    plain: Decoded
    assisted: Decoded
    top2_gap: float | None = None
    """The target's top-2 logit gap where the texts part."""

    @property
    def loops(self) -> bool:
        """Whether the plain text ends in a loop, which flatters drafts of any kind."""
        return ends_in_loop(self.plain.tokens)

    @property
    def parted_at(self) -> int | None:
        """Index of the first token that differs from plain decoding; None: equal."""
        if self.plain.tokens == self.assisted.tokens:
            return None
        pairs = zip(self.plain.tokens, self.assisted.tokens, strict=False)
        shorter = min(len(self.plain.tokens), len(self.assisted.tokens))
        return next((i for i, (a, b) in enumerate(pairs) if a != b), shorter)


@dataclass
class Evaluation:
    """What was measured, by decoder and K."""

    head: str
    max_new_tokens: int
    dtype: str
    comparisons: dict[tuple[Decoder, int], list[Comparison]]


def evaluate(
    target: Target,
    assistant: PreTrainedModel,
    head_name: str,
    prompts: list[Prompt],
    num_assistant_tokens: list[int],
    max_new_tokens: int,
    decoders: Sequence[Decoder] = ("transformers",),
) -> Evaluation:
    """Decode every prompt plainly and with each decoder and K, in turn, after a warm-up.

    Raises:
        ValueError: the head does not fit the target.
    """
    check_pair(target, assistant)
    dtype = str(target.table.dtype).removeprefix("torch.")
    sides = make_sides(decoders, num_assistant_tokens, target, assistant)
    keys = [(side.decoder, side.num_assistant_tokens) for side in sides]
    result = Evaluation(head_name, max_new_tokens, dtype, {key: [] for key in keys})
    ids = [encode_prompt(p, target.tokenizer) for p in prompts]
    warm_up = min(max_new_tokens, 16)  # thrown away
    greedy(target, ids[0], warm_up)
    for side in sides:
        side.decode(target, ids[0], warm_up, assistant)
    with progress_bar() as bar:
        task = bar.add_task(f"Decoding ({dtype})", total=len(prompts), status="")
        for prompt, prompt_ids in zip(prompts, ids, strict=True):
            plain = greedy(target, prompt_ids, max_new_tokens)
            for key, side in zip(keys, sides, strict=True):
                assisted = side.decode(target, prompt_ids, max_new_tokens, assistant)
                one = Comparison(prompt, len(prompt_ids), plain, assisted)
                if (at := one.parted_at) is not None:
                    one = replace(one, top2_gap=top2_gap(target, prompt_ids + plain.tokens[:at]))
                result.comparisons[key].append(one)
            bar.update(task, advance=1)
    return result


def report(evaluation: Evaluation, device: torch.device) -> dict[str, Any]:
    """The content of report.json (schema 1; docs/report.md explains each field)."""
    results = []
    for (decoder, k), comparisons in evaluation.comparisons.items():
        groups = {"all": comparisons}
        if any(c.loops for c in comparisons):
            groups["no loops"] = [c for c in comparisons if not c.loops]
        categories = sorted({c.prompt.category for c in comparisons})
        if len(categories) > 1:
            groups |= {
                name: [c for c in comparisons if c.prompt.category == name] for name in categories
            }
        results += [
            _summarise(evaluation, decoder, k, name, chosen)
            for name, chosen in groups.items()
            if chosen
        ]
    where = environment(device) | {
        "dtype": evaluation.dtype,
        "max_new_tokens": evaluation.max_new_tokens,
    }
    content = {"schema": SCHEMA, "environment": where, "results": results}
    return content | {"verdict": verdict(results)}


def _summarise(
    evaluation: Evaluation,
    decoder: Decoder,
    k: int,
    category: str,
    comparisons: list[Comparison],
) -> dict[str, Any]:
    counts = zero_counts(k)
    for c in comparisons:
        counts += c.assisted.counts(c.prompt_len, k)
    plain_seconds = sum(c.plain.seconds for c in comparisons)
    seconds = sum(c.assisted.seconds for c in comparisons)
    low, high = speedup_interval(comparisons)
    parted = [c for c in comparisons if c.parted_at is not None]
    return {
        "head": evaluation.head,
        "decoder": decoder,
        "num_assistant_tokens": k,
        "category": category,
        "prompts": len(comparisons),
        "loops": sum(c.loops for c in comparisons),
        "acceptance_length": counts.acceptance_length,
        "acceptance_rate": counts.acceptance_rate,
        "conditional_acceptance_rate": counts.conditional_acceptance_rate,
        "tokens_per_second": sum(len(c.assisted.tokens) for c in comparisons) / seconds,
        "baseline_tokens_per_second": sum(len(c.plain.tokens) for c in comparisons) / plain_seconds,
        "speedup": plain_seconds / seconds,
        "speedup_interval": [low, high],
        "equal_to_plain": not parted,
        "parted_share": len(parted) / len(comparisons),
        "parted": [
            {"id": c.prompt.id, "token": c.parted_at, "top2_logit_gap": c.top2_gap} for c in parted
        ],
        "new_tokens": sum(len(c.assisted.tokens) for c in comparisons),
        "target_forwards": sum(len(c.assisted.forwards) for c in comparisons),
        "baseline_target_forwards": sum(len(c.plain.forwards) for c in comparisons),
        "rounds": counts.rounds,
        "drafted": counts.drafted,
        "accepted": list(counts.accepted),
    }


def speedup_interval(comparisons: list[Comparison]) -> tuple[float, float]:
    """95% percentile bootstrap of the speedup, prompts drawn with replacement."""
    rng = random.Random(0)
    speedups = sorted(
        sum(c.plain.seconds for c in draw) / sum(c.assisted.seconds for c in draw)
        for draw in (rng.choices(comparisons, k=len(comparisons)) for _ in range(BOOTSTRAP))
    )
    return speedups[round(0.025 * BOOTSTRAP)], speedups[round(0.975 * BOOTSTRAP) - 1]


def print_report(content: dict[str, Any], console: Console | None = None) -> None:
    """Print the results as a table, and what it takes to read them."""
    # Outside a terminal rich assumes 80 columns and would fold every cell.
    console = console or Console(width=None if sys.stdout.isatty() else 132)
    width = max(r["num_assistant_tokens"] for r in content["results"])
    env = content["environment"]
    table = Table(
        title=f"Greedy decoding, {env['dtype']}, {env['max_new_tokens']} new tokens, "
        f"{env['threads']} threads of {env['accelerator'] or env['processor']}"
    )
    names = ["decoder", "K", "category", "n", "acceptance length", "rate"]
    names += [f"a_{i + 1}" for i in range(width)]
    names += ["tok/s", "plain", "speedup (95%)", "equal"]
    for name in names:
        table.add_column(
            name, justify="left" if name in ("decoder", "category") else "right", no_wrap=True
        )
    for r in content["results"]:
        rates = [f"{a:.2f}" for a in r["conditional_acceptance_rate"]]
        low, high = r["speedup_interval"]
        equal = "yes" if r["equal_to_plain"] else f"{r['parted_share']:.0%} part"
        table.add_row(
            r["decoder"], str(r["num_assistant_tokens"]), r["category"], str(r["prompts"]),
            f"{r['acceptance_length']:.2f}", f"{r['acceptance_rate']:.2f}",
            *rates, *[""] * (width - len(rates)),
            f"{r['tokens_per_second']:.1f}", f"{r['baseline_tokens_per_second']:.1f}",
            f"{r['speedup']:.2f} ({low:.2f}-{high:.2f})", equal,
            end_section=r is content["results"][-1],
        )  # fmt: skip
    console.print(table)
    console.print(content["verdict"])
    gaps = [p["top2_logit_gap"] for r in content["results"] for p in r["parted"]]
    if gaps:
        console.print(
            f"Where texts part from plain decoding, the target's two best logits are at most "
            f"{max(gaps):.3g} apart (docs/report.md says what is normal)."
        )


def run_evaluation(
    target: Target,
    assistant: PreTrainedModel,
    head_name: str,
    prompts_path: Path,
    limit: int | None,
    num_assistant_tokens: list[int],
    max_new_tokens: int,
    decoders: Sequence[Decoder],
    out: Path,
) -> dict[str, Any]:
    """Evaluate a head on a prompt file, print the table and write `out/report.json`.

    Raises:
        ValueError: bad prompts, or a head that does not fit the target.
    """
    prompts = limit_evenly(load_prompts(prompts_path), limit)
    evaluation = evaluate(
        target, assistant, head_name, prompts, num_assistant_tokens, max_new_tokens, decoders
    )
    content = report(evaluation, target.device)
    content["environment"] |= {"target": target.name, "prompts": str(prompts_path)}
    out.mkdir(parents=True, exist_ok=True)
    write_atomically(out / "report.json", json.dumps(content, indent=2) + "\n")
    print_report(content)
    print(f"Written: {out / 'report.json'}")
    return content

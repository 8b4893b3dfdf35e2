"""The evaluation: plain against assisted decoding, interleaved, and its report.json."""

import json
import random
import sys
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from headstart.configs.schema import Decoder, EvalConfig
from headstart.data.prompts import limit_evenly, load_prompts
from headstart.eval.acceptance import zero_counts
from headstart.eval.decoding import Decoded
from headstart.eval.environment import environment
from headstart.eval.measurements import Comparison, Measurements, measure_prompts
from headstart.eval.sides import make_sides
from headstart.eval.verdict import verdict
from headstart.heads.assistant import Assistant, check_pair
from headstart.heads.files import write_atomically
from headstart.heads.targets import Target

SCHEMA = 1
BOOTSTRAP = 1000


def results(
    head: str, measured: dict[tuple[Decoder, int], list[Comparison]]
) -> list[dict[str, Any]]:
    """The `results` of report.json (docs/report.md explains each field): an entry for each decoder,
    K and group of prompts."""
    found = []
    for (decoder, k), comparisons in measured.items():
        groups = {"all": comparisons}
        if any(c.loops for c in comparisons):
            groups["no loops"] = [c for c in comparisons if not c.loops]
        categories = sorted({c.category for c in comparisons})
        if len(categories) > 1:
            groups |= {name: [c for c in comparisons if c.category == name] for name in categories}
        for name, chosen in groups.items():
            if chosen:
                what = {"head": head, "decoder": decoder, "num_assistant_tokens": k}
                found.append(what | {"category": name} | _summarise(k, chosen))
    return found


def _summarise(k: int, comparisons: list[Comparison]) -> dict[str, Any]:
    counts = zero_counts(k)
    for c in comparisons:
        counts += c.assisted.counts(c.prompt_len, k)
    plain_seconds = sum(c.plain.seconds for c in comparisons)
    seconds = sum(c.assisted.seconds for c in comparisons)
    first = sum(c.assisted.first_token_seconds for c in comparisons)
    drafting = sum(c.assisted.drafting_seconds or 0.0 for c in comparisons)
    low, high = speedup_interval(comparisons)
    parted = [c for c in comparisons if c.parted_at is not None]
    return {
        "prompts": len(comparisons),
        "loops": sum(c.loops for c in comparisons),
        "acceptance_length": counts.acceptance_length,
        "acceptance_rate": counts.acceptance_rate,
        "conditional_acceptance_rate": counts.conditional_acceptance_rate,
        "time_to_first_token": first / len(comparisons),
        "decode_tokens_per_second": _decode_rate([c.assisted for c in comparisons]),
        "baseline_decode_tokens_per_second": _decode_rate([c.plain for c in comparisons]),
        "drafting_share": drafting / seconds if drafting else None,
        "tokens_per_second": sum(len(c.assisted.tokens) for c in comparisons) / seconds,
        "baseline_tokens_per_second": sum(len(c.plain.tokens) for c in comparisons) / plain_seconds,
        "speedup": plain_seconds / seconds,
        "speedup_interval": [low, high],
        "equal_to_plain": not parted,
        "parted_share": len(parted) / len(comparisons),
        "parted": [
            {"id": c.id, "token": c.parted_at, "top2_logit_gap": c.top2_gap} for c in parted
        ],
        "new_tokens": sum(len(c.assisted.tokens) for c in comparisons),
        "target_forwards": sum(len(c.assisted.forwards) for c in comparisons),
        "baseline_target_forwards": sum(len(c.plain.forwards) for c in comparisons),
        "rounds": counts.rounds,
        "drafted": counts.drafted,
        "accepted": list(counts.accepted),
    }


def _decode_rate(texts: list[Decoded]) -> float | None:
    """Tokens a second after the first one; None: there are none."""
    seconds = sum(text.seconds - text.first_token_seconds for text in texts)
    tokens = sum(len(text.tokens) - 1 for text in texts)
    return tokens / seconds if tokens and seconds > 0 else None


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
    width = min(4, max(r["num_assistant_tokens"] for r in content["results"]))
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
        rates = [f"{a:.2f}" for a in r["conditional_acceptance_rate"][:width]]
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
    assistant: Assistant,
    head: str,
    chosen: EvalConfig,
    out: Path,
    resume: bool = False,
) -> dict[str, Any]:
    """Evaluate a head on a prompt file, print the table and write `out/report.json`.

    Args:
        target: in the dtype to measure.
        assistant: a head in the native format, in the same dtype and on the same device.
        head: what the report calls it.
        chosen: prompts, decoders, draft lengths and the length of texts.
        out: folder; `measurements.jsonl` there has every text and its times.
        resume: go on with the prompts that are missing there.

    Returns:
        What report.json holds.

    Raises:
        ValueError: bad prompts, a head that does not fit the target, or measurements of something
            else to go on with.
    """
    check_pair(target, assistant)
    prompts = limit_evenly(load_prompts(chosen.prompts), chosen.limit)
    settings = {
        "target": target.name,
        "head": head,
        "dtype": str(target.table.dtype).removeprefix("torch."),
        "prompts": str(chosen.prompts),
        "limit": chosen.limit,
        "decoders": chosen.decoders,
        "num_assistant_tokens": chosen.num_assistant_tokens,
        "max_new_tokens": chosen.max_new_tokens,
    }
    kept = Measurements(out / "measurements.jsonl", settings, resume)
    sides = make_sides(chosen.decoders, chosen.num_assistant_tokens, target, assistant)
    measure_prompts(target, assistant, prompts, sides, chosen.max_new_tokens, kept)
    found = results(head, kept.comparisons())
    where = environment(target.device) | settings
    content = {"schema": SCHEMA, "environment": where, "results": found, "verdict": verdict(found)}
    write_atomically(out / "report.json", json.dumps(content, indent=2) + "\n")
    print_report(content)
    print(f"Written: {out / 'report.json'}")
    return content

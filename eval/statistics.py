"""What many texts come to: sums over texts, how far they would differ over other prompts, and in
words which decoder to use here.

Letters: K draft tokens, P prompts, S resamples.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import numpy as np

from headstart.eval.acceptance import AcceptanceCounts, zero_counts

if TYPE_CHECKING:  # whoever reads a finished report needs nothing that decodes
    from headstart.eval.decoding import Decoded
    from headstart.eval.draft_cost import Costs
    from headstart.eval.measurements import Text

RESAMPLES = 2000
POSITIONS = [0, 16, 32, 64, 128, 256, 512, 1024]  # new tokens before a round: edges of the groups


def resampled(ids: Sequence[str], values: Any, seed: int = 0) -> np.ndarray:
    """Sums of values over prompts: as they are, then over P drawn with replacement, S times.

    Values of one prompt (its turns) stay together. The draws depend on P and the seed alone, so
    that figures of the same prompts in the same order are drawn alike.

    Args:
        ids: [n] of the prompt of each value.
        values: [n] or [n, K].
        seed: of the draws.

    Returns:
        [1 + S] or [1 + S, K].
    """
    places = {name: i for i, name in enumerate(dict.fromkeys(ids))}
    prompts, values = len(places), np.array(values, dtype=float)
    # How often each prompt is drawn, [S, P].
    drawn = np.random.default_rng(seed).multinomial(prompts, [1 / prompts] * prompts, RESAMPLES)
    table = np.zeros((prompts, *values.shape[1:]))
    np.add.at(table, [places[name] for name in ids], values)
    return np.concatenate([np.ones((1, prompts)), drawn]) @ table


def resampled_sums(
    texts: Sequence[Text], figures: dict[str, Callable[[Text], float | Sequence[float]]]
) -> dict[str, np.ndarray]:
    """`resampled` figures of texts, by name.

    Args:
        texts: of one side.
        figures: name -> what a text adds to it; a number, or K of them.
    """
    ids = [text.id for text in texts]
    return {
        name: resampled(ids, [figure(text) for text in texts]) for name, figure in figures.items()
    }


def interval(values: np.ndarray) -> tuple[float, float]:
    """95% percentile interval of a statistic whose first value is that of the prompts as they
    are."""
    low, high = np.percentile(values[1:], [2.5, 97.5])
    return float(low), float(high)


def summarise(texts: Sequence[Text], k: int, costs: Costs | None) -> dict[str, Any]:
    """The figures of one result of report.json (docs/report.md explains each).

    Args:
        texts: of one side.
        k: K, its most drafts in a round.
        costs: of its drafts and verifications; None: no speedup is predicted.
    """
    counts = [text.assisted.counts(text.prompt_len, k) for text in texts]
    by_text = {id(text): count for text, count in zip(texts, counts, strict=True)}
    total = sum(counts, zero_counts(k))
    sums = resampled_sums(texts, {
        "seconds": lambda t: t.assisted.seconds,
        "tokens": lambda t: len(t.assisted.tokens),
        "plain_seconds": lambda t: t.plain.seconds,
        "plain_tokens": lambda t: len(t.plain.tokens),
        "rounds": lambda t: by_text[id(t)].rounds,
        "reached": lambda t: by_text[id(t)].reached,
        "accepted": lambda t: by_text[id(t)].accepted,
    })  # fmt: skip
    parted = [text for text in texts if text.parted_at is not None]
    greedy = all(text.greedy for text in texts)
    return {
        "prompts": len({text.id for text in texts}),
        "texts": len(texts),
        "loops": sum(text.loops for text in texts),
        **_acceptance(total, sums),
        **_speed(texts, sums),
        **_prediction(texts, costs),
        "equal_to_plain": not parted if greedy else None,
        "parted_share": len(parted) / len(texts) if greedy else None,
        "parted": [
            {
                "id": t.id,
                "turn": t.turn,
                "token": t.parted_at,
                **asdict(t.parting),
                "within_rounding": t.parting.within_rounding,
            }
            for t in parted
            if t.parting is not None
        ],
        "new_tokens": sum(len(text.assisted.tokens) for text in texts),
        "target_forwards": sum(len(text.assisted.forwards) for text in texts),
        "baseline_target_forwards": sum(len(text.plain.forwards) for text in texts),
        "rounds": total.rounds,
        "drafted": total.drafted,
        "reached": list(total.reached),
        "accepted": list(total.accepted),
        "accepted_histogram": total.accepted_histogram,
        "by_position": _by_position(texts),
    }


def _acceptance(total: AcceptanceCounts, sums: dict[str, np.ndarray]) -> dict[str, Any]:
    rounds = np.maximum(sums["rounds"], 1)
    conditional = sums["accepted"] / np.maximum(sums["reached"], 1)
    intervals = np.percentile(conditional[1:], [2.5, 97.5], axis=0).T
    return {
        "acceptance_length": total.acceptance_length,
        "acceptance_length_interval": interval(1 + sums["accepted"].sum(axis=1) / rounds),
        "acceptance_rate": total.acceptance_rate,
        "conditional_acceptance_rate": total.conditional_acceptance_rate,
        "conditional_acceptance_rate_interval": intervals.tolist(),
        "cumulative_acceptance_rate": total.cumulative_acceptance_rate,
    }


def _speed(texts: Sequence[Text], sums: dict[str, np.ndarray]) -> dict[str, Any]:
    speedup = (sums["plain_seconds"] / sums["plain_tokens"]) / (sums["seconds"] / sums["tokens"])
    assisted, plain = [t.assisted for t in texts], [t.plain for t in texts]
    rate, plain_rate = _decode_rate(assisted), _decode_rate(plain)
    drafting = sum(text.drafting_seconds or 0.0 for text in assisted)
    peaks = [t.peak_memory_bytes for t in assisted if t.peak_memory_bytes is not None]
    prompt_tokens = sum(text.prompt_len for text in texts)
    return {
        "tokens_per_second": float(sums["tokens"][0] / sums["seconds"][0]),
        "baseline_tokens_per_second": float(sums["plain_tokens"][0] / sums["plain_seconds"][0]),
        "speedup": float(speedup[0]),
        "speedup_interval": interval(speedup),
        "time_to_first_token": sum(t.first_token_seconds for t in assisted) / len(texts),
        "baseline_time_to_first_token": sum(t.first_token_seconds for t in plain) / len(texts),
        "prefill_tokens_per_second": prompt_tokens / sum(t.first_token_seconds for t in assisted),
        "decode_tokens_per_second": rate,
        "baseline_decode_tokens_per_second": plain_rate,
        "decode_speedup": rate / plain_rate if rate and plain_rate else None,
        "target_forwards_per_token": sum(len(t.forwards) for t in assisted)
        / sum(len(t.tokens) for t in assisted),
        "drafting_share": drafting / sum(t.seconds for t in assisted) if drafting else None,
        "peak_memory_bytes": max(peaks, default=None),
    }


def _decode_rate(texts: Sequence[Decoded]) -> float | None:
    """Tokens a second after the first one; None: there are none."""
    seconds = sum(text.seconds - text.first_token_seconds for text in texts)
    tokens = sum(len(text.tokens) - 1 for text in texts)
    return tokens / seconds if tokens and seconds > 0 else None


def _prediction(texts: Sequence[Text], costs: Costs | None) -> dict[str, Any]:
    """Speedup of the rounds from their drafts and what those cost, to lay beside
    `decode_speedup`."""
    if costs is None:
        return {"predicted_decode_speedup": None}
    rounds = [pair for text in texts for pair in text.assisted.rounds(text.prompt_len)]
    cost = sum(costs.of_round(proposed) for proposed, _ in rounds)
    cost -= costs.c * sum(text.assisted.looked_up for text in texts)  # nobody drafted those
    tokens = sum(1 + accepted for _, accepted in rounds)
    return {"predicted_decode_speedup": tokens / cost if cost else None}


def _by_position(texts: Sequence[Text]) -> list[dict[str, Any]]:
    """Acceptance of the rounds that begin after so many new tokens."""
    rounds, accepted = [0] * len(POSITIONS), [0] * len(POSITIONS)
    for text in texts:
        pairs = text.assisted.rounds(text.prompt_len)
        for (cached, _), (_, n) in zip(text.assisted.forwards[1:], pairs, strict=True):
            written = cached - text.prompt_len + 1
            group = sum(written >= edge for edge in POSITIONS) - 1
            rounds[group] += 1
            accepted[group] += n
    return [
        {"from": edge, "rounds": r, "acceptance_length": 1 + n / r}
        for edge, r, n in zip(POSITIONS, rounds, accepted, strict=True)
        if r
    ]


def noise(texts: Sequence[Text]) -> dict[str, Any] | None:
    """Plain decoding against itself: what a speedup of 1 looks like here. None: never done twice.

    Args:
        texts: of any one side.
    """
    twice = [text for text in texts if text.again_seconds is not None]
    if not twice:
        return None
    sums = resampled_sums(twice, {
        "plain": lambda t: t.plain.seconds, "again": lambda t: t.again_seconds or 0.0,
    })  # fmt: skip
    ratio = sums["plain"] / sums["again"]
    return {"texts": len(twice), "speedup": float(ratio[0]), "speedup_interval": interval(ratio)}


NAMES = {
    "transformers": "the stock decoder",
    "exact": "the exact decoder",
    "heuristic": "the exact decoder with transformers' heuristic",
    "cost": "the exact decoder with the cost rule",
    "hybrid": "hybrid drafting",
    "lookup": "prompt lookup, without a head,",
    "draft-model": "a small model's drafts",
}
LOSSY = (
    "The stock decoder, sampling, does not keep to the target's distribution with a head: its "
    "figures are no advice. "
)
OWN_LENGTH = ("heuristic", "cost", "hybrid")


def verdict(results: list[dict[str, Any]]) -> str:
    """What to use here, for each temperature, from the whole set and from its texts without loops.

    Args:
        results: of report.json (docs/report.md).
    """
    temperatures = sorted({r["temperature"] for r in results})
    texts = []
    for t in temperatures:
        own = [r for r in results if r["temperature"] == t and r["category"] == "all"]
        # Sampling, the stock decoder draws neither from the target nor from the head.
        lossless = [r for r in own if r["decoder"] != "transformers" or t == 0]
        mode = "" if len(temperatures) == 1 else f"At temperature {t:g}: " if t else "Greedy: "
        advice = _advice(lossless) if lossless else "Measure the exact decoder."
        texts.append(mode + (LOSSY if len(lossless) < len(own) else "") + advice)
    return " ".join(texts)


def _advice(results: list[dict[str, Any]]) -> str:
    whole = [r for r in results if r["looping_texts"] == "with"]
    best = max(whole, key=lambda r: r["speedup"])
    low, high = best["speedup_interval"]
    several = len({r["head"] for r in whole} - {None}) > 1
    name = _name(best, several)
    gain = (
        f"{best['speedup']:.2f} times as fast as plain decoding "
        f"(95% interval {low:.2f} to {high:.2f}, {best['prompts']} prompts)"
    )
    if low > 1:
        text = f"Use {name}: {gain}."
    elif high < 1:
        text = f"Decode plainly: the quickest with drafts, {name}, is {gain}."
    else:
        text = f"Within the noise: the quickest with drafts, {name}, is {gain}. Decode plainly, or "
        text += "measure more prompts."
    if not best["loops"]:
        return text
    text += f" {best['loops']} of the texts end in loops, which flatters every draft"
    straight = [r for r in results if r["looping_texts"] == "without"]
    if not straight:
        return text + "."
    rival = max(straight, key=lambda r: r["speedup"])
    low, high = rival["speedup_interval"]
    return (
        f"{text}; without them the quickest is {_name(rival, several)}, {rival['speedup']:.2f} "
        f"({low:.2f} to {high:.2f})."
    )


def _name(result: dict[str, Any], several: bool) -> str:
    """`the exact decoder with K = 4`, and of which head where there are several."""
    k, decoder = result["num_assistant_tokens"], result["decoder"]
    drafts = f"up to {k} draft tokens" if decoder in OWN_LENGTH else f"K = {k}"
    head = f" of {result['head']}" if several and result["head"] is not None else ""
    return f"{NAMES[decoder]} with {drafts}{head}"

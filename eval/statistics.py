"""How far sums over texts would differ over other prompts, which texts loop, and in words which
decoder to use here.

Letters: K draft tokens, P prompts, S resamples.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

RESAMPLES = 2000
CONTEXTS = [0, *(2**n for n in range(9, 18))]  # tokens before a round, prompt included: likewise
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


def interval(values: np.ndarray) -> tuple[float, float]:
    """95% percentile interval of a statistic whose first value is that of the prompts as they
    are."""
    low, high = np.percentile(values[1:], [2.5, 97.5])
    return float(low), float(high)


def with_interval(value: float, ends: Sequence[float], form: str = ".2f") -> str:
    """A figure and its interval in words: `1.80 (1.68 to 1.95)`."""
    low, high = ends
    return f"{value:{form}} ({low:{form}} to {high:{form}})"


def ends_in_loop(tokens: list[int]) -> bool:
    """Whether the second half of a text repeats what stands before it, with a period of up to a
    quarter of its length."""
    half = len(tokens) // 2
    return any(
        tokens[half:] == tokens[half - period : len(tokens) - period]
        for period in range(1, len(tokens) // 4 + 1)
    )


NAMES = {
    "transformers": "the stock decoder",
    "exact": "the exact decoder",
    "unconstrained": "the exact decoder, whose drafts ignore JSON schemas,",
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
UNTIMED = (
    "Acceptance alone: nothing was timed, since texts alone were checked, or several processes "
    "shared a device. To see what pays, run headstart eval in one process, or with a GPU for each."
)
HOST_BOUND = 0.5
"""Share of a step's time: where the device works less, times are of Python more than of it."""
SAME = 0.95
"""v(K) below which a verification is quicker than a plain step by more than noise."""
OWN_LENGTH = ("heuristic", "cost", "hybrid")  # decoders that choose K themselves
NO_HEAD = ("lookup", "draft-model")
ENOUGH = 5  # prompts, below which those drawn with replacement tell nothing of others


def merit(result: dict[str, Any]) -> float:
    """By which results are ranked: their speedup, or where none was measured their acceptance
    length."""
    speedup = result["speedup"]
    return float(result["acceptance_length"] if speedup is None else speedup)


def sampling_name(result: Mapping[str, Any]) -> str:
    """How the target chose its tokens in a result of report.json."""
    if not result["temperature"]:
        return "greedy"
    # Reports of before have top-k and top-p among the settings alone.
    top_k, top_p = result.get("top_k"), result.get("top_p", 1.0)
    name = f"temperature {result['temperature']:g}"
    name += "" if top_k is None else f", top-k {top_k}"
    return name if top_p == 1 else f"{name}, top-p {top_p:g}"


def least_verification(costs: Mapping[str, Mapping[str, Mapping[str, Any]]]) -> float | None:
    """The least v(K) of a report's `costs` from K = 1 on, in plain steps; None: none is known."""
    measured = [cost["v"][1:] for of_head in costs.values() for cost in of_head.values()]
    return min((v for one in measured for v in one), default=None)


def verdict(
    results: list[dict[str, Any]],
    busy_share: float | None = None,
    verification: float | None = None,
) -> str:
    """What to use here, for each temperature, from the whole set and from its texts without loops.

    Args:
        results: of report.json (docs/reference/report.md).
        busy_share: of the time of a plain step, that in which the device worked; None: not known.
        verification: `least_verification`; None: not known.
    """
    if any(r["speedup"] is None for r in results):
        return UNTIMED
    temperatures = sorted({r["temperature"] for r in results})
    texts = []
    for t in temperatures:
        own = [r for r in results if r["temperature"] == t and r["category"] == "all"]
        # Sampling, the stock decoder draws neither from the target nor from the head.
        lossless = [r for r in own if r["decoder"] != "transformers" or t == 0]
        mode = f"At {sampling_name(own[0])}: " if t else "Greedy: "
        mode = "" if temperatures == [0] else mode
        advice = _advice(lossless) if lossless else "Measure the exact decoder."
        texts.append(mode + (LOSSY if len(lossless) < len(own) else "") + advice)
    if busy_share is not None and busy_share < HOST_BOUND:
        texts.append(
            f"These speeds are host-bound: in a plain step the device worked {busy_share:.0%} of "
            "the time, and waited for Python in the rest. A server that launches a step as one "
            "graph has other costs, and another speedup."
        )
    if (line := slow_baseline(verification)) is not None:
        texts.append(line)
    return " ".join(texts)


def slow_baseline(verification: float | None) -> str | None:
    """That plain decoding is slower than it has to be, where a verification, which computes more,
    takes less time (in plain steps); None: it is not."""
    if verification is None or verification >= SAME:
        return None
    return (
        f"Plain decoding is not at this machine's best: verifying drafts took {verification:.2f} "
        "of a plain step, though it computes more. That part of a speedup is no merit of drafts."
    )


def _advice(results: list[dict[str, Any]]) -> str:
    whole, straight = (
        [r for r in results if r["looping_texts"] == texts] for texts in ("with", "without")
    )
    best = max(whole, key=lambda r: r["speedup"])
    low, high = best["speedup_interval"]
    several = len({r["head"] for r in whole} - {None}) > 1
    name = _name(best, several)
    gain = (
        f"{best['speedup']:.2f} times as fast as plain decoding "
        f"(95% interval {low:.2f} to {high:.2f}, {best['prompts']} prompts{_seeds(best)})"
    )
    if best["prompts"] < ENOUGH:
        text = f"Too few prompts to say what to use: the quickest with drafts, {name}, is {gain}."
    elif low > 1:
        text = f"Use {name}: {gain}."
    elif high < 1:
        text = f"Decode plainly: the quickest with drafts, {name}, is {gain}."
    else:
        text = f"Within the noise: the quickest with drafts, {name}, is {gain}. Decode plainly, or "
        text += "measure more prompts."
    if not best["loops"]:
        return text
    text += f" {best['loops']} of the texts end in loops, which flatters every draft"
    if straight:
        rival = max(straight, key=lambda r: r["speedup"])
        text += f"; without them the quickest is {_name(rival, several)}, "
        text += with_interval(rival["speedup"], rival["speedup_interval"])
    return text + "."


def _seeds(result: dict[str, Any]) -> str:
    seeds = result.get("seeds", [])  # reports of before do not say
    return f", each sampled {len(seeds)} times" if len(seeds) > 1 else ""


def _name(result: dict[str, Any], several: bool) -> str:
    """`the exact decoder with K = 4`, and of which head where there are several."""
    k, decoder = result["num_assistant_tokens"], result["decoder"]
    drafts = f"up to {k} draft tokens" if decoder in OWN_LENGTH else f"K = {k}"
    head = f" of {result['head']}" if several and result["head"] is not None else ""
    return f"{NAMES[decoder]} with {drafts}{head}"

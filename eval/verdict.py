"""What a report comes to, in words: which decoder to use here, and when not to bother."""

from typing import Any

NAMES = {
    "transformers": "the stock decoder",
    "exact": "the exact decoder",
    "heuristic": "the exact decoder with transformers' heuristic",
    "confident": "the exact decoder while it is sure of its drafts",
    "cost": "the exact decoder with the cost rule",
    "hybrid": "hybrid drafting",
    "lookup": "prompt lookup, without a head",
    "draft-model": "a small model's drafts",
}
LOSSY = (
    "The stock decoder, sampling, does not keep to the target's distribution with a head: its "
    "figures are no advice. "
)
OWN_LENGTH = ("heuristic", "confident", "cost", "hybrid")


def ends_in_loop(tokens: list[int]) -> bool:
    """Whether the second half of a text repeats what stands before it, with a period of up to a
    quarter of its length."""
    half = len(tokens) // 2
    return any(
        tokens[half:] == tokens[half - period : len(tokens) - period]
        for period in range(1, len(tokens) // 4 + 1)
    )


def verdict(results: list[dict[str, Any]]) -> str:
    """One paragraph on what to use here, for each temperature, from the whole set and from its
    texts without loops.

    Args:
        results: of report.json (docs/report.md).
    """
    temperatures = sorted({r["temperature"] for r in results})
    texts = []
    for t in temperatures:
        own = [r for r in results if r["temperature"] == t and r["category"] == "all"]
        mode = "" if len(temperatures) == 1 else f"At temperature {t:g}: " if t else "Greedy: "
        texts.append(mode + _advice(own))
    return " ".join(texts)


def _lossless(result: dict[str, Any]) -> bool:
    """The stock decoder samples neither from the target nor from the head (docs/decoding.md)."""
    return result["decoder"] != "transformers" or result["temperature"] == 0


def _advice(results: list[dict[str, Any]]) -> str:
    lossy = [r for r in results if not _lossless(r)]
    results = [r for r in results if _lossless(r)]
    if not results:
        return LOSSY + "Measure the exact decoder."
    return (LOSSY if lossy else "") + _advice_among(results)


def _advice_among(results: list[dict[str, Any]]) -> str:
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
    side = ("head", "decoder", "num_assistant_tokens")
    straight = [r for r in results if r["looping_texts"] == "without"]
    same = [r for r in straight if all(r[key] == best[key] for key in side)]
    if not same:
        return text + "."
    low, high = same[0]["speedup_interval"]
    text += f"; without them it is {same[0]['speedup']:.2f} ({low:.2f} to {high:.2f})"
    rival = max(straight, key=lambda r: r["speedup"])
    if rival is not same[0]:
        text += f", and the quickest is {_name(rival, several)}, {rival['speedup']:.2f}"
    return text + "."


def _name(result: dict[str, Any], several: bool) -> str:
    """`the exact decoder with K = 4`, and of which head where there are several."""
    k, decoder = result["num_assistant_tokens"], result["decoder"]
    drafts = f"up to {k} draft tokens" if decoder in OWN_LENGTH else f"K = {k}"
    head = f" of {result['head']}" if several and result["head"] is not None else ""
    comma = "," if decoder == "lookup" else ""
    return f"{NAMES[decoder]}{comma} with {drafts}{head}"

"""What a report comes to, in words: which decoder to use here, and when not to bother."""

from typing import Any

NAMES = {
    "transformers": "the stock decoder",
    "exact": "the exact decoder",
    "cost": "the exact decoder with the cost rule",
    "hybrid": "hybrid drafting",
    "lookup": "prompt lookup, without a head",
}


def ends_in_loop(tokens: list[int]) -> bool:
    """Whether the second half of a text repeats what stands before it, with a period of up to a
    quarter of its length."""
    half = len(tokens) // 2
    return any(
        tokens[half:] == tokens[half - period : len(tokens) - period]
        for period in range(1, len(tokens) // 4 + 1)
    )


def verdict(results: list[dict[str, Any]]) -> str:
    """One paragraph on what to use here, from the whole set and from its texts without loops.

    Args:
        results: of report.json (docs/report.md).
    """
    best = max((r for r in results if r["category"] == "all"), key=lambda r: r["speedup"])
    side, k = best["decoder"], best["num_assistant_tokens"]
    low, high = best["speedup_interval"]
    drafts = f"up to {k} draft tokens" if side in ("cost", "hybrid") else f"K = {k}"
    name = f"{NAMES[side]} with {drafts}"
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
    if best["loops"]:
        text += f" {best['loops']} of the texts end in loops, which flatters every draft"
        same = [
            r["speedup"]
            for r in results
            if (r["decoder"], r["num_assistant_tokens"], r["category"]) == (side, k, "no loops")
        ]
        text += f"; without them it is {same[0]:.2f}." if same else "."
    return text

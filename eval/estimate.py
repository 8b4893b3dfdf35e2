"""`headstart eval --simulate`: acceptance of heads from an activation store, without decoding."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from rich.console import Console
from rich.table import Table
from transformers import PreTrainedModel

from headstart.data.store import ActivationStore
from headstart.eval.environment import environment
from headstart.eval.statistics import interval
from headstart.eval.tables import wide_console
from headstart.eval.walked import Walked, length_draws, total_counts, walk_texts
from headstart.heads.assistant import check_pair
from headstart.heads.files import write_atomically
from headstart.heads.progress import say
from headstart.heads.targets import Target
from headstart.heads.unroll import DraftHead


def run_estimate(
    target: Target,
    heads: Mapping[str, PreTrainedModel],
    store: Path,
    num_assistant_tokens: Sequence[int],
    out: Path,
    position: Literal["newest", "one_earlier"] = "newest",
) -> dict[str, Any]:
    """Walk rounds over the greedy texts of a store; print a table and write `out/estimate.json`.

    Args:
        target: that of the store, for its embeddings and table; it runs over no text.
        heads: name -> head in the native format.
        store: folder of `headstart extract` or `headstart regenerate --extract`.
        num_assistant_tokens: draft lengths K.
        out: folder.
        position: RoPE position of the drafts: `newest`, where transformers puts them, or
            `one_earlier`, where vLLM does.

    Returns:
        What the file holds.

    Raises:
        ValueError: a head or the store does not fit the target, or no text of it is greedy.
    """
    for head in heads.values():
        check_pair(target, head)
    stored = ActivationStore(store, target)
    found: list[dict[str, Any]] = []
    first: dict[int, list[Walked]] = {}
    for name, assistant in heads.items():
        for k in num_assistant_tokens:
            doing, ahead = f"Walking {name}, K = {k}", {"texts": int(position == "newest")}
            walked = walk_texts(
                DraftHead(assistant), target, {"texts": stored}, k, doing, ahead, greedy=True
            )["texts"]
            if not walked:
                raise ValueError(
                    f"{store} holds no greedy text of the target: make one with `headstart "
                    "regenerate --extract 'data.temperatures=[0.0]'`"
                )
            beside = first.setdefault(k, walked)
            found.append(_result(name, k, "all", walked, None if beside is walked else beside))
            for category in sorted({text.category for text in walked}):
                own = [text for text in walked if text.category == category]
                found.append(_result(name, k, category, own, None))
    content = {
        "estimate": 1,
        "environment": environment(target.device)
        | {
            "target": target.name,
            "store": str(store),
            "texts": len(walked),
            "rope_position": position,
        },
        "results": found,
    }
    out.mkdir(parents=True, exist_ok=True)
    write_atomically(out / "estimate.json", json.dumps(content, indent=2) + "\n")
    print_estimate(content)
    say(f"Written: {out / 'estimate.json'}")
    return content


def _result(
    head: str, k: int, category: str, texts: list[Walked], beside: list[Walked] | None
) -> dict[str, Any]:
    """Of some texts; beside those of the first head, with the interval of the difference."""
    counts, draws = total_counts(texts), length_draws(texts)
    result: dict[str, Any] = {
        "head": head,
        "num_assistant_tokens": k,
        "category": category,
        "acceptance_length": counts.acceptance_length,
        "acceptance_length_interval": list(interval(draws)),
        "acceptance_rate": counts.acceptance_rate,
        "conditional_acceptance_rate": counts.conditional_acceptance_rate,
        "rounds": counts.rounds,
        "drafted": counts.drafted,
        "accepted": list(counts.accepted),
        "difference": None,
        "difference_interval": None,
    }
    if beside is not None:
        assert [text.id for text in texts] == [text.id for text in beside]
        difference = draws - length_draws(beside)
        result["difference"] = float(difference[0])
        result["difference_interval"] = list(interval(difference))
    return result


def print_estimate(content: dict[str, Any], console: Console | None = None) -> None:
    """Print the results as a table."""
    where = content["environment"]
    table = Table(title=f"{where['texts']} greedy texts of {where['target']}, rounds walked")
    names = ["head", "K", "category", "rounds", "acceptance length (95%)", "a_1 .. a_K"]
    for name in [*names, "beside the first head (95%)"]:
        table.add_column(name)
    for r in content["results"]:
        rates = ", ".join(f"{a:.2f}" for a in r["conditional_acceptance_rate"])
        cells = [r["head"], str(r["num_assistant_tokens"]), r["category"], str(r["rounds"])]
        low, high = r["acceptance_length_interval"]
        cells += [f"{r['acceptance_length']:.3f} ({low:.2f} to {high:.2f})", rates]
        if r["difference"] is not None:
            low, high = r["difference_interval"]
            cells.append(f"{r['difference']:+.3f} ({low:+.3f} to {high:+.3f})")
        table.add_row(*cells)
    (console or wide_console()).print(table)

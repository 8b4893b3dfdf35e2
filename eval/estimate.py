"""`headstart eval --simulate`: acceptance of heads from an activation store, without decoding."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from rich.console import Console
from rich.table import Table
from transformers import PreTrainedModel

from headstart.data.store import ActivationStore
from headstart.eval.acceptance import AcceptanceCounts, zero_counts
from headstart.eval.environment import environment
from headstart.eval.simulate import DOCUMENTS, simulate_acceptance
from headstart.heads.assistant import check_pair
from headstart.heads.files import write_atomically
from headstart.heads.progress import progress_bar
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
    by_category: dict[str, list[int]] = {}
    for i, entry in enumerate(stored.entries):
        if entry.temperature == 0 and entry.trained >= 2:
            by_category.setdefault(entry.category, []).append(i)
    if not by_category:
        raise ValueError(
            f"{store} holds no greedy text of the target: make one with `headstart regenerate "
            "--extract 'data.temperatures=[0.0]'`"
        )
    texts = sum(map(len, by_category.values()))
    found = []
    with progress_bar() as bar:
        total = texts * len(heads) * len(num_assistant_tokens)
        task = bar.add_task("Walking rounds", total=total, status="texts")
        for name, assistant in heads.items():
            head = DraftHead(assistant)
            for k in num_assistant_tokens:
                whole, parts = zero_counts(k), list[dict[str, Any]]()
                for category, which in sorted(by_category.items()):
                    counts = zero_counts(k)
                    for start in range(0, len(which), DOCUMENTS):
                        few = which[start : start + DOCUMENTS]
                        counts += simulate_acceptance(
                            head, target, stored, k, few, ahead=int(position == "newest")
                        ).acceptance
                        bar.update(task, advance=len(few))
                    whole += counts
                    parts.append(_result(name, k, category, counts))
                found += [_result(name, k, "all", whole), *parts]
    content = {
        "estimate": 1,
        "environment": environment(target.device)
        | {
            "target": target.name,
            "store": str(store),
            "texts": texts,
            "rope_position": position,
        },
        "results": found,
    }
    out.mkdir(parents=True, exist_ok=True)
    write_atomically(out / "estimate.json", json.dumps(content, indent=2) + "\n")
    print_estimate(content)
    print(f"Written: {out / 'estimate.json'}")
    return content


def _result(head: str, k: int, category: str, counts: AcceptanceCounts) -> dict[str, Any]:
    return {
        "head": head,
        "num_assistant_tokens": k,
        "category": category,
        "acceptance_length": counts.acceptance_length,
        "acceptance_rate": counts.acceptance_rate,
        "conditional_acceptance_rate": counts.conditional_acceptance_rate,
        "rounds": counts.rounds,
        "drafted": counts.drafted,
        "accepted": list(counts.accepted),
    }


def print_estimate(content: dict[str, Any], console: Console | None = None) -> None:
    """Print the results as a table."""
    where = content["environment"]
    table = Table(title=f"{where['texts']} greedy texts of {where['target']}, rounds walked")
    for name in ("head", "K", "category", "rounds", "acceptance length", "a_1 .. a_K"):
        table.add_column(name)
    for r in content["results"]:
        rates = ", ".join(f"{a:.2f}" for a in r["conditional_acceptance_rate"])
        cells = [r["head"], str(r["num_assistant_tokens"]), r["category"], str(r["rounds"])]
        table.add_row(*cells, f"{r['acceptance_length']:.3f}", rates)
    (console or Console()).print(table)

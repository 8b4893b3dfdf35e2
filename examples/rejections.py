"""Where the drafts of a head are rejected.

    python examples/rejections.py runs/gemma3-270m/head stores/eval rejections.json

Rounds are replayed over the greedy texts of an activation store of Gemma 3 270M (`headstart
extract`), as `headstart simulate` replays them, K = 4. Each draft is put into classes by the token
that the text has there: what it looks like, how sure the target was, whether the text had it before
after the same token, whether the clusters hid it; and the first of a round by how the round before
ended. Of each class: the drafts that a decoder checks, the share that it accepts, and the share of
all rejections.
"""

import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from rich.table import Table

from headstart.common.console import counted, plain_console
from headstart.common.files import write_figures
from headstart.common.machine import environment
from headstart.configs.schema import TargetConfig
from headstart.data.store import ActivationStore
from headstart.eval.replay import JudgedAnswer, judge_drafts
from headstart.heads.loading import open_target
from headstart.heads.saving import load_assistant
from headstart.heads.target import Target
from headstart.heads.unroll import DraftHead

K = 4
UNSURE = ((0.5, "below 0.5 nats"), (1.5, "0.5 to 1.5 nats"), (float("inf"), "1.5 nats and more"))


def look(text: str) -> str:
    """What a token looks like."""
    if not text.strip():
        return "space or line break"
    if any(c.isdigit() for c in text):
        return "number"
    if not any(c.isalpha() for c in text):
        return "punctuation"
    return "begins a word" if text[0].isspace() else "goes on with a word"


def sureness(logprobs: torch.Tensor) -> str:
    """By the entropy of the target's stored top tokens, of which those left out make one more."""
    p = logprobs.double().exp()
    rest = (1 - p.sum()).clamp_min(1e-12)
    entropy = float(-(p * p.clamp_min(1e-12).log()).sum() - rest * rest.log())
    return next(name for limit, name in UNSURE if entropy < limit)


def classes_of(answer: JudgedAnswer, target: Target) -> Callable[[int, int], dict[str, str]]:
    """(row, draft) of an answer -> dimension -> class of that draft."""
    ids = answer.document.ids.tolist()
    began: dict[tuple[int, int], int] = {}  # where each pair of tokens ends for the first time
    for at in range(1, len(ids)):
        began.setdefault((ids[at - 1], ids[at]), at)

    def classes(row: int, k: int) -> dict[str, str]:
        at = int(answer.rows[row]) + 2 + k  # of the token that was to be drafted
        known = began[ids[at - 1], ids[at]] < at
        missed = bool(answer.dense_right[row, k] & ~answer.right[row, k])
        return {
            "what it looks like": look(target.tokenizer.decode([ids[at]])),
            "entropy of the target": sureness(answer.document.teacher_logprobs[at - 1]),
            "the same pair of tokens before it": "in the text" if known else "not in the text",
            "the clusters": "hide the right draft" if missed else "change nothing",
            "draft": str(k + 1),
        }

    return classes


def drafts_of(answer: JudgedAnswer) -> Iterator[tuple[int, int, bool, str]]:
    """(row, draft from 0, accepted, how the round before ended) of all drafts that a decoder
    checks: those of its rounds up to the first wrong one."""
    leading = (answer.right & answer.counted).long().cumprod(1).sum(1).tolist()
    proposed = answer.counted.sum(1).tolist()
    row, before = 0, "none, the text begins"
    while row < len(leading):
        for k in range(min(leading[row] + 1, proposed[row])):
            yield row, k, k < leading[row], before
        before = "all drafts accepted" if leading[row] == proposed[row] else "a draft rejected"
        row += leading[row] + 1


def rejections(head: DraftHead, target: Target, store: ActivationStore) -> dict[str, Any]:
    """Dimension -> class -> drafts that a decoder checks, and how many of them it rejects."""
    found: dict[str, dict[str, dict[str, int]]] = {}
    for i, entry in counted(list(enumerate(store.entries)), "Replaying (texts)"):
        if entry.trained < 2 or entry.temperature:
            continue
        for answer in judge_drafts(head, target, store.read([i]), K)[0]:
            classes = classes_of(answer, target)
            for row, k, accepted, before in drafts_of(answer):
                own = classes(row, k) | {"the round before": before} if not k else classes(row, k)
                for dimension, name in own.items():
                    counts = found.setdefault(dimension, {}).setdefault(
                        name, {"drafts": 0, "rejected": 0}
                    )
                    counts["drafts"] += 1
                    counts["rejected"] += not accepted
    return found


def print_rejections(found: dict[str, Any]) -> None:
    for dimension, classes in found.items():
        table = Table("class", "drafts", "accepted", "of all rejections", title=dimension)
        total = sum(counts["rejected"] for counts in classes.values())
        for name, counts in sorted(classes.items(), key=lambda one: -one[1]["rejected"]):
            accepted = 1 - counts["rejected"] / counts["drafts"]
            share = counts["rejected"] / max(total, 1)
            table.add_row(name, str(counts["drafts"]), f"{accepted:.0%}", f"{share:.0%}")
        plain_console().print(table)


if __name__ == "__main__":
    head_folder, store_folder, out = sys.argv[1:]
    device = torch.device("cpu")
    target = open_target(TargetConfig(name="gemma3-270m"), device)
    assistant = load_assistant(head_folder, target.table.dtype, device)
    store = ActivationStore(Path(store_folder), target)
    found = rejections(DraftHead(assistant), target, store)
    print_rejections(found)
    content = {
        "rejections": 1,
        "environment": environment(device) | {"target": target.name},
        "head": head_folder,
        "store": Path(store_folder).name,
        "num_assistant_tokens": K,
        "found": found,
    }
    write_figures(content, Path(out))

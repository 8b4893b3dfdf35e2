"""How much of each built-in evaluation prompt one single training prompt holds, counted.

    python examples/overlap.py docs/results/eval-64.json docs/results/overlap.json

The share of an evaluation prompt is that of its 5-word shingles (runs of words, case and
punctuation aside) that the nearest training prompt has too. From 70% on both say the same but for
names and numbers; from 30% on they are siblings, made from one template or cut from overlapping
passages. Prompts are counted set by set, each against the training sets of its family and against
all of them, on which the reference recipe trains; and so are those of a report.
"""

import hashlib
import json
import sys
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from importlib import resources
from pathlib import Path
from typing import Any

from headstart.common.files import write_atomically
from headstart.data.contamination import WORDS, Shingle, shingles_of
from headstart.data.prompts import Prompt, load_prompts

SHARES = (0.7, 0.3)
TRAINING = {
    "chat": ["builtin:chat_train"],
    "text": ["builtin:text_train", "builtin:passages_train"],
}
EVALUATION = {"chat": "builtin:chat_eval", "text": "builtin:text_eval"}


def largest_shares(evaluation: Sequence[Prompt], training: Iterable[Prompt]) -> list[float]:
    """Of each evaluation prompt the largest share of its shingles that one training prompt holds;
    0 of a prompt that is too short to have any."""
    own = [shingles_of(prompt) for prompt in evaluation]
    holders: dict[Shingle, list[int]] = defaultdict(list)
    for i, shingles in enumerate(own):
        for shingle in shingles:
            holders[shingle].append(i)
    most = [0] * len(own)
    for prompt in training:
        held = Counter(i for s in shingles_of(prompt) for i in holders.get(s, ()))
        for i, count in held.items():
            most[i] = max(most[i], count)
    return [count / max(len(shingles), 1) for count, shingles in zip(most, own, strict=True)]


def counts(shares: Sequence[float]) -> dict[str, int]:
    """How many prompts there are, and how many of at least 70%, and of 30% to 70%."""
    high, low = SHARES
    near = sum(share >= high for share in shares)
    return {
        "prompts": len(shares),
        "from_70": near,
        "from_30_to_70": sum(share >= low for share in shares) - near,
    }


def overlap(report: dict[str, Any]) -> dict[str, Any]:
    """The content of overlap.json: the sets, and the prompts of a report of `headstart eval` over
    `builtin:*_eval`, by id.

    Raises:
        ValueError: the report has other prompts.
    """
    trained = {
        family: [prompt for name in names for prompt in load_prompts(name)]
        for family, names in TRAINING.items()
    }
    everything = [name for names in TRAINING.values() for name in names]
    every = [prompt for prompts in trained.values() for prompt in prompts]
    sets: list[dict[str, Any]] = []
    shares: dict[str, float] = {}
    for family, name in EVALUATION.items():
        evaluation = load_prompts(name)
        own, all_of_it = (largest_shares(evaluation, t) for t in (trained[family], every))
        sets += [
            {"evaluation": name, "training": TRAINING[family], **counts(own)},
            {"evaluation": name, "training": everything, **counts(all_of_it)},
        ]
        shares |= {p.id: share for p, share in zip(evaluation, all_of_it, strict=True)}
    ids = list(dict.fromkeys(row[0] for row in report["results"][0]["per_text"]))
    if strange := sorted(set(ids) - shares.keys()):
        raise ValueError(f"the report has prompts of other sets, such as {strange[0]}")
    asked = {name: shares[name] for name in ids}
    return {
        "words": WORDS,
        "sha256": {name: _sha256(name) for name in (*everything, *EVALUATION.values())},
        "sets": sets,
        "report": {"training": everything, **counts([*asked.values()]), "shares": asked},
    }


def _sha256(name: str) -> str:
    file = resources.files("headstart.data") / "prompts" / f"{name.partition(':')[2]}.jsonl"
    return hashlib.sha256(file.read_bytes()).hexdigest()


def main(report: str, out: str) -> None:
    content = overlap(json.loads(Path(report).read_text(encoding="utf-8")))
    write_atomically(Path(out), json.dumps(content, indent=1) + "\n")
    for row in [*content["sets"], content["report"]]:
        name, against = row.get("evaluation", Path(report).name), " and ".join(row["training"])
        print(
            f"{name} against {against}: of {row['prompts']} prompts {row['from_70']} share 70% and "
            f"more with one training prompt, {row['from_30_to_70']} more share 30%"
        )


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit(__doc__)
    main(*sys.argv[1:])

"""Acceptance of such drafts by Headstart's replay, as `headstart simulate` has it, and the share of
all places, not of rounds, where draft k is right after those before it, which is the accuracy that
speculators prints: `python replay.py DRAFTS.safetensors DATA OUT.json`."""

import json
import sys
from pathlib import Path

import torch
from datasets import load_from_disk
from safetensors.torch import load_file

from headstart.common.machine import environment
from headstart.eval.acceptance import replay_rounds
from headstart.eval.replay import ReplayedText, length_draws, total_counts
from headstart.eval.statistics import interval

K = 8
drafts, data, out = map(Path, sys.argv[1:])
found, texts = load_file(drafts), load_from_disk(str(data)).with_format("torch")
replayed: dict[int, list[ReplayedText]] = {k: [] for k in range(1, K + 1)}
right, reached = torch.zeros(K), torch.zeros(K)
for i, text in enumerate(texts):
    ids, last = text["input_ids"], len(text["input_ids"]) - 1
    first = int(text["loss_mask"].nonzero()[0])
    rows = torch.arange(first - 1, last - 1)
    places = rows[:, None] + torch.arange(2, 2 + K)
    judged = places < last  # the last token before a text is cut is the target's own
    matches = found[str(i)][rows].long() == ids[places.clamp_max(last)]
    for k, own in replayed.items():
        counts = replay_rounds(matches[:, :k], judged[:, :k])
        own.append(ReplayedText(str(i), "all", counts, None))
    alive = torch.cat([judged[:, :1], (matches & judged).cumprod(1).bool()[:, :-1]], 1) & judged
    right, reached = right + (alive & matches).sum(0), reached + alive.sum(0)
results = {}
for k, own in replayed.items():
    draws, total = length_draws(own), total_counts(own)
    results[k] = {
        "acceptance_length": float(draws[0]), "interval": list(interval(draws)),
        "conditional_acceptance_rate": total.conditional_acceptance_rate,
    }  # fmt: skip
accuracy = (right / reached.clamp_min(1)).tolist()
content = {"environment": environment(torch.device("cpu")), "texts": len(texts), "results": results,
           "accuracy_over_all_places": accuracy}  # fmt: skip
out.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")

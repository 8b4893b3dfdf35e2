"""Reports as `headstart eval` writes them, with figures that are easy to check."""

from typing import Any

from headstart.eval.acceptance import AcceptanceCounts
from headstart.eval.replay import ReplayedText
from headstart.eval.statistics import verdict

HOSTILE = 'a & b </div><script>alert("x")</script>\nthen $x^2'


def one_result(decoder: str, k: int, speedup: float, **other: Any) -> dict[str, Any]:
    """A result in which half of the rounds accept the first draft, none the second."""
    ks = range(k)
    return {
        "head": None if decoder == "lookup" else "runs/a/head",
        "decoder": decoder,
        "temperature": 0.0,
        "num_assistant_tokens": k,
        "category": "all",
        "looping_texts": "with",
        "prompts": 2,
        "texts": 2,
        "loops": 0,
        "acceptance_length": 1.5,
        "acceptance_rate": 0.5 / k,
        "acceptance_length_interval": [1.25, 1.75],
        "conditional_acceptance_rate": [0.5, *[0.0 for _ in ks[1:]]],
        "conditional_acceptance_rate_interval": [[0.4, 0.6], *[[0.0, 0.0] for _ in ks[1:]]],
        "tokens_per_second": 10 * speedup,
        "baseline_tokens_per_second": 10.0,
        "speedup": speedup,
        "speedup_interval": [speedup - 0.1, speedup + 0.2],
        "time_to_first_token": 0.5,
        "baseline_time_to_first_token": 0.4,
        "baseline_decode_tokens_per_second": 12.5,
        "drafting_share": 0.25 if decoder == "exact" else None,
        "decode_speedup": speedup + 0.1,
        "predicted_decode_speedup": None if decoder == "lookup" else speedup + 0.05,
        "equal_to_plain": True,
        "diverged_share": 0.0,
        "diverged": [],
        "new_tokens": 40,
        "baseline_target_forwards": 40,
        "rounds": 20,
        "reached": [20, 10, *[0 for _ in ks[2:]]][:k],
        "accepted": [10, *[0 for _ in ks[1:]]],
        "accepted_histogram": [10, 10, *[0 for _ in ks[1:]]],
        "by_position": [
            {"from": 0, "rounds": 10, "acceptance_length": 1.25},
            {"from": 16, "rounds": 10, "acceptance_length": 1.75},
        ],
    } | other


def report(results: list[dict[str, Any]], **other: Any) -> dict[str, Any]:
    """What report.json would hold."""
    variant = {key: results[0][key] for key in ("decoder", "head", "num_assistant_tokens")}
    tokens = [["Yes", "bonus"], ["<b>", "accepted"], ["\n", "accepted"], ["No\n", "rejected"]]
    return {
        "environment": {
            "target": "tiny",
            "dtype": "float32",
            "max_new_tokens": 20,
            "threads": 1,
            "accelerator": None,
            "processor": "a processor",
            "heads": ["runs/a/head"],
            "draft_models": [],
            "prompt_set": {"name": "mine.jsonl", "sha256": "ab" * 32},
            "peak_process_memory_bytes": 2_500_000_000,
        },
        "costs": {"runs/a/head": {"exact": {"c": 0.1, "v": [1.0, 1.1, 1.2]}}},
        "thresholds": {"runs/a/head": 0.35},
        "noise": {"texts": 2, "speedup": 1.01, "speedup_interval": [0.97, 1.04]},
        "verdict": verdict(results),
        "results": results,
        "examples": [
            {"id": "p-1", "category": "chat", "prompt": HOSTILE, "temperature": 0.0, **variant}
            | {"tokens": tokens}
        ],
    } | other


def usual() -> dict[str, Any]:
    """Two decoders with two K, one that chooses K, lookup, and categories."""
    results = [one_result("transformers", k, 0.8 + k / 100) for k in (2, 4)]
    results += [one_result("exact", k, 1.1 + k / 100) for k in (2, 4)]
    results += [one_result("cost", 8, 1.3), one_result("lookup", 2, 0.9)]
    results += [
        one_result("exact", 4, s, category=c) for c, s in {"chat": 1.05, "code": 1.35}.items()
    ]
    results.append(one_result("exact", 4, 1.02, looping_texts="without"))
    return report(results)


def texts(*accepted: int, looping: int = 0) -> list[ReplayedText]:
    """Texts of ten rounds, of which so many accepted one draft; the first `looping` loop."""
    return [
        ReplayedText(f"t{i}", "c", AcceptanceCounts(10, 10, (10,), (n,)), i < looping)
        for i, n in enumerate(accepted)
    ]

"""The figures of one result of a report: acceptance, speed, both where the text is code or prose,
or the context long, and how many texts are of their JSON schemas."""

from bisect import bisect
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

import numpy as np

from headstart.eval.acceptance import AcceptanceCounts, zero_counts
from headstart.eval.decoding import Decoded
from headstart.eval.draft_cost import Costs
from headstart.eval.measurements import Text
from headstart.eval.spans import SPANS
from headstart.eval.statistics import CONTEXTS, POSITIONS, interval, resampled
from headstart.heads.structured import fault
from headstart.heads.target import Target

SHOWN = 5  # invalid texts that a result names


def summarize(texts: Sequence[Text], k: int, costs: Costs | None) -> dict[str, Any]:
    """The figures of one result of report.json (docs/reference/report.md explains each): of the
    texts of a variant that drafts K in a round at most, at these costs (None: no speedup is
    predicted)."""
    counts = [text.assisted.counts(text.prompt_len, k) for text in texts]
    total = sum(counts, zero_counts(k))
    diverged = [text for text in texts if text.diverged_at is not None]
    seeds = sorted({text.seed for text in texts if text.seed is not None})
    greedy = not seeds
    return {
        "seeds": seeds,
        "prompts": len({text.id for text in texts}),
        "texts": len(texts),
        "loops": sum(text.loops for text in texts),
        **_acceptance([text.id for text in texts], counts, total),
        **_speed(texts),
        "predicted_decode_speedup": None if costs is None else _predicted_speedup(texts, costs),
        "equal_to_plain": not diverged if greedy else None,
        "diverged_share": len(diverged) / len(texts) if greedy else None,
        "diverged": [
            {"id": t.id, "turn": t.turn, "token": t.diverged_at}
            | asdict(t.divergence)
            | {"within_rounding": t.divergence.within_rounding}
            for t in diverged
            if t.divergence is not None
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
        "by_span": _by_span(texts, k, costs),
        "by_context": _by_context(texts),
    }


def _acceptance(
    ids: Sequence[str], counts: Sequence[AcceptanceCounts], total: AcceptanceCounts
) -> dict[str, Any]:
    rounds = np.maximum(resampled(ids, [c.rounds for c in counts]), 1)
    reached = np.maximum(resampled(ids, [c.reached for c in counts]), 1)
    accepted = resampled(ids, [c.accepted for c in counts])
    intervals = np.percentile((accepted / reached)[1:], [2.5, 97.5], axis=0).T
    return {
        "acceptance_length": total.acceptance_length,
        "acceptance_length_interval": interval(1 + accepted.sum(axis=1) / rounds),
        "acceptance_rate": total.acceptance_rate,
        "conditional_acceptance_rate": total.conditional_acceptance_rate,
        "conditional_acceptance_rate_interval": intervals.tolist(),
        "cumulative_acceptance_rate": total.cumulative_acceptance_rate,
    }


def _speed(texts: Sequence[Text]) -> dict[str, Any]:
    assisted, plain = [t.assisted for t in texts], [t.plain for t in texts]
    ids = [text.id for text in texts]
    # [1 + S] seconds and tokens of both.
    (seconds, tokens), (plain_seconds, plain_tokens) = (
        (resampled(ids, [t.seconds for t in own]), resampled(ids, [len(t.tokens) for t in own]))
        for own in (assisted, plain)
    )
    speedup = (plain_seconds / plain_tokens) / (seconds / tokens)
    rate, plain_rate = (
        _decode_rate([(one, t.prompt_len) for one, t in zip(own, texts, strict=True)])
        for own in (assisted, plain)
    )
    prefill = sum(t.first_token_seconds for t in assisted)
    drafting = sum(t.drafting_seconds or 0.0 for t in assisted)
    peaks = [t.peak_memory_bytes for t in assisted if t.peak_memory_bytes is not None]
    return {
        "tokens_per_second": float(tokens[0] / seconds[0]),
        "baseline_tokens_per_second": float(plain_tokens[0] / plain_seconds[0]),
        "speedup": float(speedup[0]),
        "speedup_interval": interval(speedup),
        "time_to_first_token": prefill / len(texts),
        "baseline_time_to_first_token": sum(t.first_token_seconds for t in plain) / len(texts),
        "prefill_tokens_per_second": sum(t.prompt_len for t in texts) / prefill,
        "decode_tokens_per_second": rate,
        "baseline_decode_tokens_per_second": plain_rate,
        "decode_speedup": rate / plain_rate if rate and plain_rate else None,
        "target_forwards_per_token": sum(len(t.forwards) for t in assisted)
        / sum(len(t.tokens) for t in assisted),
        "drafting_share": drafting / sum(t.seconds for t in assisted) if drafting else None,
        "peak_memory_bytes": max(peaks, default=None),
    }


def _decode_rate(texts: Sequence[tuple[Decoded, int]]) -> float | None:
    """Tokens a second after those of the first forward, of texts and the lengths of their prompts;
    None: there are none."""
    seconds = sum(text.seconds - text.first_token_seconds for text, _ in texts)
    tokens = sum(len(text.tokens) - text.first_tokens(prompt_len) for text, prompt_len in texts)
    return tokens / seconds if tokens and seconds > 0 else None


def _predicted_speedup(texts: Sequence[Text], costs: Costs) -> float | None:
    """Of the rounds, from their drafts and what those cost, to lay beside `decode_speedup`."""
    rounds = [pair for text in texts for pair in text.assisted.rounds(text.prompt_len)]
    cost = sum(costs.of_round(proposed) for proposed, _ in rounds)
    cost -= costs.c * sum(text.assisted.looked_up for text in texts)  # nobody drafted those
    return sum(1 + accepted for _, accepted in rounds) / cost if cost else None


def _by_position(texts: Sequence[Text]) -> list[dict[str, Any]]:
    """Acceptance of the rounds that begin after so many new tokens."""
    begun = [(first, n) for text in texts for first, _, n in _begun(text)]
    return _grouped(begun, POSITIONS)


def _by_context(texts: Sequence[Text]) -> list[dict[str, Any]]:
    """Acceptance of the rounds that begin after so many tokens of prompt and text, and speed of the
    texts whose prompts are as long."""
    begun = [[(t.prompt_len + first, n) for first, _, n in _begun(t)] for t in texts]
    rows = _grouped([pair for own in begun for pair in own], CONTEXTS)
    speeds = ("speedup", "speedup_interval", "decode_speedup")
    for row in rows:
        its = bisect(CONTEXTS, row["from"])
        accepted = [[n for before, n in own if bisect(CONTEXTS, before) == its] for own in begun]
        row["acceptance_length_interval"] = _length_interval(texts, accepted)
        asked = [text for text in texts if bisect(CONTEXTS, text.prompt_len) == its]
        found: dict[str, Any] = _speed(asked) if asked else {}
        row |= {"texts": len(asked)} | {name: found.get(name) for name in speeds}
    return rows


def _length_interval(texts: Sequence[Text], accepted: Sequence[list[int]]) -> list[float]:
    """Of the acceptance length of some rounds of each text."""
    counts = [[len(own), sum(own)] for own in accepted]
    sums = resampled([text.id for text in texts], counts)
    return list(interval(1 + sums[:, 1] / np.maximum(sums[:, 0], 1)))


def _begun(text: Text) -> list[tuple[int, int, int]]:
    """Of each round: new tokens before it, drafts that were judged, and those accepted."""
    pairs = text.assisted.judged_rounds(text.prompt_len)
    starts = [cached - text.prompt_len + 1 for cached, _ in text.assisted.forwards[1:]]
    return [(first, *pair) for first, pair in zip(starts, pairs, strict=True)]


def _grouped(begun: Sequence[tuple[int, int]], edges: Sequence[int]) -> list[dict[str, Any]]:
    """Rounds and their acceptance length by what lies before them, from pairs of that and of the
    drafts that were accepted."""
    rounds, accepted = Counter[int](), Counter[int]()
    for before, n in begun:
        edge = edges[bisect(edges, before) - 1]
        rounds[edge] += 1
        accepted[edge] += n
    return [
        {
            "from": edge,
            "rounds": rounds[edge],
            "acceptance_length": 1 + accepted[edge] / rounds[edge],
        }
        for edge in edges
        if rounds[edge]
    ]


def _by_span(texts: Sequence[Text], k: int, costs: Costs | None) -> list[dict[str, Any]]:
    """Acceptance in each span of the texts, of those that drafts K in a round at most.

    A draft belongs to the span of the token that stands where it would have stood, beyond the end
    to that of the last; a round to that of its first draft. So the counts of all spans add up to
    those of the result.
    """
    tokens, rounds, emitted = Counter[str](), Counter[str](), Counter[str]()
    steps = dict.fromkeys(SPANS, 0.0)
    drafted, reached, accepted = (dict.fromkeys(SPANS, np.zeros(k, int)) for _ in range(3))
    if any(text.assisted.looked_up for text in texts):  # which of the drafts cost nothing?
        costs = None
    for text in texts:
        own = text.spans
        tokens.update(own)
        made = text.assisted.rounds(text.prompt_len)
        for (first, judged, kept), (proposed, _) in zip(_begun(text), made, strict=True):
            begins = own[min(first, len(own) - 1)]
            rounds[begins] += 1
            emitted[begins] += 1 + kept
            steps[begins] += 0.0 if costs is None else costs.of_round(proposed)
            for place in range(judged):
                span, one = own[min(first + place, len(own) - 1)], np.arange(k) == place
                drafted[span] = drafted[span] + one
                reached[span] = reached[span] + one * (place <= kept)
                accepted[span] = accepted[span] + one * (place < kept)
    whole = sum(emitted.values()) - sum(steps.values())
    return [
        {
            "span": span,
            "tokens": tokens[span],
            "rounds": rounds[span],
            "acceptance_length": emitted[span] / rounds[span] if rounds[span] else None,
            "drafted": int(drafted[span].sum()),
            "reached": reached[span].tolist(),
            "accepted": accepted[span].tolist(),
            "conditional_acceptance_rate": (accepted[span] / np.maximum(reached[span], 1)).tolist(),
            "predicted_decode_speedup": emitted[span] / steps[span] if steps[span] else None,
            "saved_share": (emitted[span] - steps[span]) / whole
            if steps[span] and whole > 0
            else None,
        }
        for span in SPANS
        if tokens[span]
    ]


def noise(texts: Sequence[Text]) -> dict[str, Any] | None:
    """Plain decoding against itself, in the texts of any one variant: what a speedup of 1 looks
    like here. None: never done twice."""
    twice = [text for text in texts if text.again_seconds is not None]
    if not twice:
        return None
    ids = [text.id for text in twice]
    ratio = resampled(ids, [text.plain.seconds for text in twice])
    ratio /= resampled(ids, [text.again_seconds for text in twice])
    return {"texts": len(twice), "speedup": float(ratio[0]), "speedup_interval": interval(ratio)}


def validity(
    target: Target, texts: Sequence[Text], schemas: Mapping[str, dict[str, Any]]
) -> dict[str, Any] | None:
    """Of the texts with a schema, by the ids of their prompts: how many there are, how many ended
    before the limit, how many of those are valid, and some that are not. None: there are none."""
    held = [text for text in texts if text.id in schemas]
    ended = [text for text in held if text.assisted.tokens[-1] in target.eos_ids]
    invalid = []
    for text in ended:
        written = target.tokenizer.decode(text.assisted.tokens[:-1])
        if why := fault(written, schemas[text.id]):
            invalid.append({"id": text.id, "turn": text.turn, "seed": text.seed, "why": why})
    counts = {"texts": len(held), "ended": len(ended), "valid": len(ended) - len(invalid)}
    return counts | {"invalid": invalid[:SHOWN]} if held else None

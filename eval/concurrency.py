"""What a head is worth where several texts are decoded at once, as a server does: predicted.

A step of the target over B texts reads its weights once for all of them, so that what it computes
comes to weigh more than what it reads, and a verification of K drafts computes K + 1 times as much.
Measured are v(K, B), a verification of K drafts of each of B texts, and c(B), a draft for each,
both in plain steps over B texts. With an acceptance length L the speedup is L / (K*c(B) + v(K, B)).

transformers decodes one text at a time with an assistant, so that the rounds themselves are not run
here: the target's forwards are, and the head's, as training runs it over many rows.

Letters: B texts, T tokens of context, K draft tokens, D target width, H head width, V vocabulary,
M tokens that a draft looks at.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from transformers import DynamicCache, PreTrainedModel

from headstart.common.machine import timed
from headstart.eval.draft_cost import COST_CONTEXT, FOR_DRAFTS, forward, random_ids
from headstart.heads.decoder import verified
from headstart.heads.kernels import fast_kernels
from headstart.heads.kinds import Texts, all_rows, kind_of
from headstart.heads.target import Target

TURNS = 4  # of each variant; the quickest counts, since what disturbs a machine only slows it
WARM_UP = 1


@dataclass(frozen=True)
class BatchCost:
    """What a round costs where so many texts are decoded at once, in plain steps over them."""

    texts: int
    """B."""
    num_assistant_tokens: int
    """K."""
    c: float
    """A draft for each text."""
    v: float
    """A verification of K drafts of each."""

    def speedup(self, acceptance_length: float) -> float:
        """Over plain decoding of as many texts, without the prefill."""
        return acceptance_length / (self.num_assistant_tokens * self.c + self.v)


def measure_batches(
    target: Target, assistant: PreTrainedModel, sizes: Sequence[int], ks: Sequence[int]
) -> list[BatchCost]:
    """The costs at each number of texts and each K; none for a head that no engine serves, since
    nothing decodes several texts with it.

    Args:
        target: in the dtype to measure.
        assistant: a head that fits it, on the same device, with a table of its own.
        sizes: B.
        ks: K.
    """
    if not kind_of(assistant.config).engines:
        return []
    return [cost for size in sizes for cost in _measure(target, assistant, size, ks)]


@torch.inference_mode()
def _measure(
    target: Target, assistant: PreTrainedModel, size: int, ks: Sequence[int]
) -> list[BatchCost]:
    longest, context = max(ks), min(COST_CONTEXT, target.config.sliding_window)
    ids = random_ids(target, size, context + longest + 1)
    cache = DynamicCache(config=target.config)
    cache.activate_past_recording()
    prompt = ids[:, :context]
    seen = verified(forward(target, cache, prompt, logits_to_keep=1, **FOR_DRAFTS), prompt)

    def step(tokens: int) -> torch.Tensor:
        given = ids[:, : context + tokens]
        best: torch.Tensor = forward(target, cache, given).logits.argmax(-1)
        cache.crop(context - cache.get_seq_length())
        return best

    table = assistant.get_output_embeddings().weight
    kv = {
        name: (keys.to(table.device, table.dtype), values.to(table.device, table.dtype))
        for name, (keys, values) in seen.shared_kv.items()
    }
    texts = Texts(seen.hidden.to(table.device, table.dtype), kv)
    following = ids[:, context : context + longest].to(table.device)
    # By the tokens that a forward of the target is given; 0 stands for the drafts.
    variants: dict[int, Callable[[], object]] = {
        0: partial(draft_for_all, assistant, texts, following, target),
        **{tokens: partial(step, tokens) for tokens in (1, *(k + 1 for k in ks))},
    }
    seconds = _quickest(target, assistant, variants)
    c = seconds[0] / longest / seconds[1]
    return [BatchCost(size, k, c, seconds[k + 1] / seconds[1]) for k in ks]


def draft_for_all(
    assistant: Any, texts: Texts, following: torch.Tensor, target: Target
) -> list[torch.Tensor]:
    """K tokens for each text: K of [B]. What the head reads in their place are the tokens
    `following` [B, K], which costs the same. All is where the head is, in its dtype."""
    at = torch.full((len(following), 1), texts.hidden.shape[1] - 1, device=following.device)
    rows = all_rows(at, following[:, None])
    states = kind_of(assistant.config).unroll(assistant, texts, rows, target.embed, 0)
    return [_best(assistant, state[:, 0]) for state in states]


def _best(assistant: Any, states: torch.Tensor) -> torch.Tensor:
    """[B] tokens drafted, of states [B, H], through the clusters where there are some."""
    table, embedder = assistant.lm_head.weight, assistant.masked_embedding
    if embedder is None or not assistant.config.use_ordered_embeddings:
        return (states @ table.T).argmax(-1)
    best = embedder.centroids(states).topk(embedder.centroid_intermediate_top_k).indices
    members = embedder.token_ordering.view(embedder.num_centroids, -1)
    looked_at = members[best].flatten(1)  # [B, M]
    places = torch.bmm(table[looked_at], states[..., None])[..., 0].argmax(-1, keepdim=True)
    return looked_at.gather(1, places)[:, 0]


def _quickest(
    target: Target, assistant: PreTrainedModel, variants: Mapping[int, Callable[[], object]]
) -> dict[int, float]:
    """Seconds of the quickest turn of each variant, the variants taking turns."""
    found: dict[int, list[float]] = {name: [] for name in variants}
    with fast_kernels(target.model), fast_kernels(assistant):
        for turn in range(WARM_UP + TURNS):
            for name, variant in variants.items():
                seconds = timed(target.device, variant)
                if turn >= WARM_UP:
                    found[name].append(seconds)
    return {name: min(times) for name, times in found.items()}


def predicted(
    batches: Mapping[str, Sequence[dict[str, Any]]], results: Sequence[dict[str, Any]]
) -> list[dict[str, Any]]:
    """What each head is predicted to be worth over so many texts at once.

    Args:
        batches: head -> fields of its `BatchCost`s.
        results: of a report, whose acceptance lengths count: of the exact decoder over all texts,
            at the highest temperature of several, since servers sample unless they are told not to.

    Returns:
        A row for each head, number of texts and K: the cost, `temperature`, `acceptance_length` and
        `speedup`.
    """
    counted: dict[tuple[str, int], dict[str, Any]] = {}
    for r in sorted(results, key=lambda r: float(r["temperature"])):
        if (r["decoder"], r["category"], r["looping_texts"]) == ("exact", "all", "with"):
            same = ("temperature", "acceptance_length")
            counted[r["head"], r["num_assistant_tokens"]] = {name: r[name] for name in same}
    rows = []
    for head, costs in batches.items():
        for cost in costs:
            if (found := counted.get((head, cost["num_assistant_tokens"]))) is not None:
                gain = BatchCost(**cost).speedup(found["acceptance_length"])
                rows.append({"head": head} | cost | found | {"speedup": gain})
    return rows


def where_it_pays(rows: Sequence[dict[str, Any]]) -> list[str]:
    """A sentence for each head of the rows of `predicted`: the number of texts at once from which
    on it is to be left off."""
    lines = []
    heads = list(dict.fromkeys(row["head"] for row in rows))
    for head in heads:
        own = [row for row in rows if row["head"] == head]
        sizes = sorted({row["texts"] for row in own})
        best = {n: max(r["speedup"] for r in own if r["texts"] == n) for n in sizes}
        name = f"{head}: " if len(heads) > 1 else ""
        if (size := leave_off_from(best)) is not None:
            before = max((tried for tried in best if tried < size), default=1)
            gap = "" if size - before == 1 else f" (between {before} and {size} none was tried)"
            lines.append(
                f"{name}From {size} texts at once on{gap} leave the head off: with it a server is "
                f"predicted to be {best[size]:.2f} times as fast as without. {_prediction(own)}"
            )
        else:
            size = max(best)
            lines.append(
                f"{name}Up to {size} texts at once, the most that was tried, the head is predicted "
                f"to pay: {best[size]:.2f} times as fast as without. {_prediction(own)}"
            )
    return lines


def _prediction(rows: Sequence[dict[str, Any]]) -> str:
    """What a prediction is made of, and what it is worth."""
    warm = max(row.get("temperature", 0.0) for row in rows)  # reports of before do not say
    texts = f"texts sampled at T={warm:g}" if warm else "greedy texts"
    return (
        f"That is of {texts} after at most {COST_CONTEXT} tokens of context, and of what "
        "transformers computes: an upper bound for a server, which headstart serve-check measures."
    )


def leave_off_from(best: Mapping[int, float]) -> int | None:
    """The least number of texts from which on, as far as was tried, no speedup is above 1; None:
    the largest number pays.

    Args:
        best: number of texts -> speedup at the best K.
    """
    paying = [size for size, gain in best.items() if gain > 1]
    return min((size for size in best if size > max(paying, default=0)), default=None)


COLUMNS = ["texts at once", "K", "a draft, c", "a verification, v", "predicted speedup"]


def table_of(rows: Sequence[dict[str, Any]]) -> list[list[str]]:
    """The rows of `predicted`, one head's, as cells of `COLUMNS`."""
    return [
        [str(r["texts"]), str(r["num_assistant_tokens"]), f"{r['c']:.3f}", f"{r['v']:.2f}",
         f"{r['speedup']:.2f}"]
        for r in rows
    ]  # fmt: skip

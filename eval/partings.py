"""Where an assisted greedy text leaves that of plain decoding, and whether rounding explains it.

Letters: V vocabulary.
"""

from dataclasses import dataclass
from itertools import pairwise

import torch
from transformers import DynamicCache

from headstart.heads.few_rows import plain_strides
from headstart.heads.targets import Target
from headstart.heads.versions import CACHE

ROUNDING = {"float32": 1e-3, "bfloat16": 0.25}
"""Gap between two logits that the shape of a batch may turn around anywhere: in bfloat16 two units
in the last place of logits between 16 and 32 (Gemma 4's are capped at 30)."""
AT_A_TIME = (1, 5)  # rows of the forwards that plain decoding and a verification make


@dataclass(frozen=True)
class Parting:
    """What the target thinks where two texts part."""

    top2_logit_gap: float
    """Between its two best tokens, in one forward over the whole text."""
    token_logit_gap: float | None
    """Between the tokens of the two texts there; None: one of the texts had ended."""
    rounding: float | None
    """How much that gap differs between forwards over the same tokens: over all of them at once,
    one after another, five at a time. None: not measured, the gap is within `ROUNDING` anyway."""

    @property
    def within_rounding(self) -> bool:
        """Whether the roundings of forwards of different shapes may have turned the two around."""
        if self.token_logit_gap is None:
            return False
        # Twice: three forwards show a part of what rounding can do.
        return self.rounding is None or self.token_logit_gap <= 2 * self.rounding


def parting(plain: list[int], assisted: list[int]) -> int | None:
    """Index of the first token that differs; None: equal."""
    if plain == assisted:
        return None
    shorter = min(len(plain), len(assisted))
    pairs = zip(plain, assisted, strict=False)
    return next((i for i, (a, b) in enumerate(pairs) if a != b), shorter)


@torch.no_grad()
def explain_parting(
    target: Target, prompt_ids: list[int], plain: list[int], assisted: list[int]
) -> Parting | None:
    """Where and why two greedy texts part; None: they are equal.

    Args:
        target: in the dtype that they were decoded in.
        prompt_ids: of both.
        plain, assisted: the new tokens of each.
    """
    at = parting(plain, assisted)
    if at is None:
        return None
    ids = prompt_ids + plain[:at]
    logits = _last_logits(target, ids, len(ids), len(ids))
    best = logits.topk(2).values
    top2 = float(best[0] - best[1])
    if at >= min(len(plain), len(assisted)):
        return Parting(top2, None, None)

    def gap(logits: torch.Tensor) -> float:
        return float(logits[plain[at]] - logits[assisted[at]])

    gaps = [gap(logits)]
    if abs(gaps[0]) <= ROUNDING[str(target.table.dtype).removeprefix("torch.")]:
        return Parting(top2, abs(gaps[0]), None)
    gaps += [gap(_last_logits(target, ids, len(prompt_ids), rows)) for rows in AT_A_TIME]
    return Parting(top2, abs(gaps[0]), max(gaps) - min(gaps))


def _last_logits(target: Target, ids: list[int], first: int, rows: int) -> torch.Tensor:
    """[V] logits after `ids`, given in a forward of the `first` and then so many rows at a time."""
    cache = DynamicCache(config=target.config)
    given = torch.tensor([ids], device=target.device)
    edges = [0, *range(first, len(ids), rows), len(ids)]
    logits = torch.empty(0)
    with plain_strides(target.model):
        for start, end in pairwise(edges):
            logits = target.model(
                input_ids=given[:, start:end],
                attention_mask=torch.ones_like(given[:, :end]),
                use_cache=True,
                logits_to_keep=1,
                **{CACHE: cache},
            ).logits[0, -1]
    return logits.float()

"""How the target chooses tokens while it generates, each sequence of a batch in its own way.

Letters: B batch, V vocabulary.
"""

import torch
from transformers import LogitsProcessor

from headstart.heads.tokens import Sampling


class SamplingMixture(LogitsProcessor):
    """Chooses the next token of every sequence in its own way: greedy, or sampled.

    Used with `do_sample=False`: the chosen token gets an infinite score, so that the argmax takes
    it. Sampling by inverse CDF needs one uniform number a row; `torch.multinomial` draws V of
    them, which on a CPU took as long as the whole decoding step. Temperature, top-k and top-p are
    applied in the order of transformers' `generate`.

    Args:
        sampling: one for each row.
        seed: of the uniform numbers.
    """

    def __init__(self, sampling: list[Sampling], seed: int):
        self.groups: dict[Sampling, torch.Tensor] = {}
        for drawn in dict.fromkeys(s for s in sampling if s.temperature > 0):
            rows = [i for i, other in enumerate(sampling) if other == drawn]
            self.groups[drawn] = torch.tensor(rows)
        self.generator = torch.Generator().manual_seed(seed)

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """`scores` [B, V] -> the same with +inf at the chosen tokens."""
        chosen = scores.clone() if self.groups else scores
        for drawn, rows in self.groups.items():
            rows = rows.to(scores.device)
            chosen[rows, self._draw(scores[rows].float(), drawn)] = torch.inf
        return chosen

    def _draw(self, logits: torch.Tensor, drawn: Sampling) -> torch.Tensor:
        """[n, V] -> [n] token ids."""
        logits = logits / drawn.temperature
        ids = None
        if drawn.top_k is not None or drawn.top_p < 1:
            logits, ids = logits.topk(min(drawn.top_k or logits.shape[-1], logits.shape[-1]))
        p = logits.softmax(-1)
        if drawn.top_p < 1:  # a token stays while those above it hold less
            p = p * (p.cumsum(-1) - p < drawn.top_p)
        cdf = p.cumsum(-1)
        uniform = torch.rand(len(p), 1, generator=self.generator).to(p.device)
        # cdf ends a rounding error away from 1, or where top-p cut it: scale by what it ends at.
        place = torch.searchsorted(cdf, uniform * cdf[:, -1:]).clamp_max(p.shape[-1] - 1)
        return (place if ids is None else ids.gather(-1, place))[:, 0]

"""How the target chooses tokens while it generates, each sequence of a batch in its own way.

Letters: B batch, V vocabulary.
"""

import torch
from transformers import LogitsProcessor

from headstart.heads.tokens import Sampling

BLOCK = 512  # weights summed before the running sum: about the root of a Gemma vocabulary


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
            uniform = torch.rand(len(rows), 1, generator=self.generator).to(scores.device)
            # Row by row a CPU keeps the V values in its cache: a fifth of the time of all at once.
            parts = rows.split(1) if scores.device.type == "cpu" else (rows,)
            numbers = uniform.split([len(part) for part in parts])
            for part, number in zip(parts, numbers, strict=True):
                chosen[part, _draw(scores[part].float(), drawn, number)] = torch.inf
        return chosen


def _draw(logits: torch.Tensor, drawn: Sampling, uniform: torch.Tensor) -> torch.Tensor:
    """Logits [n, V] and uniform numbers [n, 1] -> [n] token ids."""
    logits = logits / drawn.temperature
    ids = None
    if drawn.top_k is not None or drawn.top_p < 1:
        logits, ids = logits.topk(min(drawn.top_k or logits.shape[-1], logits.shape[-1]))
    p = (logits - logits.amax(-1, keepdim=True)).exp_()
    if drawn.top_p < 1:  # a token stays while those above it hold less
        p = p / p.sum(-1, keepdim=True)
        p = p * (p.cumsum(-1) - p < drawn.top_p)
    place = _inverse_cdf(p, uniform)
    return (place if ids is None else ids.gather(-1, place))[:, 0]


def _inverse_cdf(p: torch.Tensor, uniform: torch.Tensor) -> torch.Tensor:
    """Where the share `uniform` [n, 1] of the weights `p` [n, V] is reached, [n, 1].

    First among the sums of blocks, then within the block: running sums over V values are what
    takes longest on a CPU. The weights need not add up to 1.
    """
    padded = torch.nn.functional.pad(p, (0, -p.shape[-1] % BLOCK))
    blocks = padded.view(len(p), -1, BLOCK)
    sums = blocks.sum(-1).cumsum(-1)
    sought = uniform * sums[:, -1:]
    block = _first_above(sums, sought)
    before = sums.gather(-1, block) - blocks.sum(-1).gather(-1, block)
    inside = blocks.gather(1, block[..., None].expand(-1, -1, BLOCK))[:, 0].cumsum(-1)
    return block * BLOCK + _first_above(inside, (sought - before).clamp_min(0))


def _first_above(sums: torch.Tensor, sought: torch.Tensor) -> torch.Tensor:
    """The first place whose running sum is above `sought`; at most the last that adds anything,
    which rounding could lead past."""
    last = torch.searchsorted(sums, sums[:, -1:].contiguous())
    return torch.minimum(torch.searchsorted(sums, sought.contiguous(), right=True), last)

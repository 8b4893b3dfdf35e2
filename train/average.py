"""An exponential moving average of the weights in training."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch.optim.swa_utils import get_ema_multi_avg_fn


class Average:
    """Weights averaged over the steps, in float32; a run without a decay averages nothing.

    The decay of the first steps is smaller, `(1 + n) / (10 + n)` after n of them, so that the start
    is soon forgotten (as TensorFlow's `ExponentialMovingAverage` with `num_updates`).

    Args:
        parameters: name -> parameter, as the optimizer updates them.
        decay: a step; None: none.
    """

    def __init__(self, parameters: dict[str, torch.nn.Parameter], decay: float | None):
        self.parameters, self.decay = parameters, decay
        self.values: dict[str, torch.Tensor] = {}
        if decay is not None:
            self.values = {name: p.detach().clone() for name, p in parameters.items()}

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Take in the weights after `step` (from 1) optimizer steps."""
        if self.decay is not None:
            average = get_ema_multi_avg_fn(min(self.decay, (1 + step) / (10 + step)))
            average(list(self.values.values()), list(self.parameters.values()), step)

    @contextmanager
    def applied(self) -> Iterator[None]:
        """Within, the average stands in the place of the weights."""
        self._swap()
        try:
            yield
        finally:
            self._swap()

    @torch.no_grad()
    def _swap(self) -> None:
        for name, value in self.values.items():
            weights = self.parameters[name].clone()
            self.parameters[name].copy_(value)
            value.copy_(weights)

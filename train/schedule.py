"""How the learning rate goes."""

import math


def learning_rate(
    step: int, steps: int, warmup: int, peak: float, time_spent: float = 0.0
) -> float:
    """Linear warm-up, then a cosine to a tenth of the peak.

    Args:
        step: steps done.
        steps: of the whole run.
        warmup: steps of the warm-up.
        peak: learning rate after it.
        time_spent: share of the run's time, where that is limited; the cosine is as far as the one
            of both that is further.
    """
    if step < warmup:
        return peak * (step + 1) / warmup
    progress = max((step - warmup) / max(steps - warmup, 1), min(time_spent, 1.0))
    return peak * (0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * progress)))

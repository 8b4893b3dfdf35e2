"""What one step of a target reads and multiplies, from its configuration.

Letters: D target width, V vocabulary.
"""

from typing import Any

import torch
from torch import nn

from headstart.heads.targets import SUPPORTED


def target_step_weights(config: Any) -> tuple[int, int]:
    """What decoding one token takes of a target, counted without its weights.

    Args:
        config: the target's text configuration.

    Returns:
        Weights read, and multiply-adds: all but the embedding lookups, of the experts of a mixture
        those that one token is sent to, and the LM head V x D once.
    """
    with torch.device("meta"):  # shapes alone: no memory for weights
        model = SUPPORTED[config.model_type](config)
    tables = [m.weight for m in model.modules() if isinstance(m, nn.Embedding)]
    left_out = {id(p) for p in [*tables, model.get_output_embeddings().weight]}
    weights = products = config.vocab_size * config.hidden_size
    for parameter in model.parameters():
        if id(parameter) in left_out:
            continue
        used = parameter.numel()
        if parameter.ndim == 3:  # [experts, out, in]
            used = used * config.top_k_experts // config.num_experts
        weights += used
        products += used if parameter.ndim > 1 else 0
    return weights, products

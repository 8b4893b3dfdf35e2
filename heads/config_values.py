"""Numbers in the config.json of targets and heads that cannot be."""

import math
from typing import Any

# Keys of config.json whose numbers are above 0 where there are any -> the most that they can be.
ABOVE_ZERO = {
    "sliding_window": math.inf, "max_position_embeddings": math.inf, "top_k_experts": math.inf,
    "query_pre_attn_scalar": math.inf, "rms_norm_eps": 0.1,
    "final_logit_softcapping": math.inf, "attn_logit_softcapping": math.inf,
    "rope_theta": math.inf, "factor": math.inf, "partial_rotary_factor": 1.0,
}  # fmt: skip
ROPE = {"rope_theta", "factor", "partial_rotary_factor"}  # of them, those in rope_parameters


def check_values(config: Any, name: str) -> None:
    """Raise `ValueError` where a number in config.json of a target or a head cannot be: a model
    would be built of it, and say something else or stop in mid-text.

    Args:
        config: of its text part.
        name: of the checkpoint.
    """
    values = {key: value for key, value in config.to_dict().items() if key in ABOVE_ZERO}
    if not getattr(config, "enable_moe_block", False):  # Gemma 3 has no such field
        values.pop("top_k_experts", None)
    for layer_type, rope in config.rope_parameters.items():
        values |= {f"{layer_type}: {key}": rope[key] for key in ROPE & rope.keys()}
    for key, value in values.items():
        most = ABOVE_ZERO.get(key.rpartition(" ")[2], math.inf)
        if value is not None and not 0 < value <= most:
            limit = "" if most == math.inf else f" and at most {most:g}"
            raise ValueError(
                f"{name}: config.json says {key} is {value}, which cannot be (it is above 0{limit}"
                "): copy config.json from where the weights are from"
            )

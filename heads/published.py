"""Shapes of Gemma 4 and its assistants as Google published them: a plan needs no network.

Read in public sources, never in the weights: transformers' conversion scripts
(`models/gemma4/convert_gemma4_weights.py`, and for 12B
`models/gemma4_unified/convert_gemma4_unified_weights.py`) hold all fields below, and MaxText's
`configs/models/gemma4-*.yml` agree; google-deepmind/gemma (`gm/nn/gemma4/_gemma4.py`) agrees for
all but 12B, which it lacks. Defaults of transformers 5.22 that match no checkpoint are spelled out.
Sources part in one field, which changes no weight that a plan counts: for 12B the script has
`vocab_size_per_layer_input` 0 and the published config.json 262,144; there are no per-layer inputs.

The assistants' shapes are those of the same scripts in their later versions; the published
config.json was seen quoted for E2B (whole) and 12B (in part), for the others it was not.
"""

from typing import Any

from transformers import Gemma4TextConfig, Gemma4UnifiedTextConfig

from headstart.configs.schema import HeadConfig

_ALL: dict[str, Any] = {
    "vocab_size": 262_144,
    "head_dim": 256,
    "global_head_dim": 512,
    "final_logit_softcapping": 30.0,
    "rope_parameters": {
        "full_attention": {
            "rope_type": "proportional",
            "rope_theta": 1_000_000.0,
            "partial_rotary_factor": 0.25,
        },
        "sliding_attention": {"rope_type": "default", "rope_theta": 10_000.0},
    },
}
_SMALL: dict[str, Any] = {
    "num_attention_heads": 8,
    "sliding_window": 512,
    "max_position_embeddings": 131_072,
    "hidden_size_per_layer_input": 256,
    "vocab_size_per_layer_input": 262_144,
}
_LARGE: dict[str, Any] = {
    "sliding_window": 1024,
    "max_position_embeddings": 262_144,
    "hidden_size_per_layer_input": 0,
    "attention_k_eq_v": True,
    "use_bidirectional_attention": "vision",
}


def _layers(sliding: int, repeats: int) -> dict[str, Any]:
    types = ["sliding_attention"] * sliding + ["full_attention"]
    return {"layer_types": types * repeats, "num_hidden_layers": len(types) * repeats}


SHAPES: dict[str, dict[str, Any]] = {
    "gemma-4-E2B": {
        **_ALL, **_SMALL, **_layers(4, 7), "hidden_size": 1536, "intermediate_size": 6144,
        "num_key_value_heads": 1, "num_kv_shared_layers": 20, "use_double_wide_mlp": True,
    },
    "gemma-4-E4B": {
        **_ALL, **_SMALL, **_layers(5, 7), "hidden_size": 2560, "intermediate_size": 10_240,
        "num_key_value_heads": 2, "num_kv_shared_layers": 18,
    },
    "gemma-4-12B": {
        **_ALL, **_LARGE, **_layers(5, 8), "hidden_size": 3840, "intermediate_size": 15_360,
        "num_attention_heads": 16, "num_key_value_heads": 8, "num_global_key_value_heads": 1,
    },
    "gemma-4-26B-A4B": {
        **_ALL, **_LARGE, **_layers(5, 5), "hidden_size": 2816, "intermediate_size": 2112,
        "num_attention_heads": 16, "num_key_value_heads": 8, "num_global_key_value_heads": 2,
        "enable_moe_block": True, "num_experts": 128, "top_k_experts": 8,
        "moe_intermediate_size": 704,
    },
    "gemma-4-31B": {
        **_ALL, **_LARGE, **_layers(5, 10), "hidden_size": 5376, "intermediate_size": 21_504,
        "num_attention_heads": 32, "num_key_value_heads": 16, "num_global_key_value_heads": 4,
    },
}  # fmt: skip
"""Checkpoint without its suffix -> its text configuration."""


ASSISTANTS: dict[str, dict[str, Any]] = {
    "gemma-4-E2B": {"hidden_size": 256, "intermediate_size": 2048, "num_attention_heads": 4},
    "gemma-4-E4B": {"hidden_size": 256, "intermediate_size": 2048, "num_attention_heads": 4},
    "gemma-4-12B": {"hidden_size": 1024, "intermediate_size": 8192, "num_attention_heads": 16},
    "gemma-4-26B-A4B": {"hidden_size": 1024, "intermediate_size": 8192, "num_attention_heads": 16},
    "gemma-4-31B": {"hidden_size": 1024, "intermediate_size": 8192, "num_attention_heads": 32},
}
"""Checkpoint without its suffix -> what its assistant chose; KV heads and the like are the
target's. All have three sliding layers and a full one; the two small ones clusters of 128."""


def published_head(name: str) -> HeadConfig | None:
    """The shape of `google/gemma-4-NAME-it-assistant`; None: it is none of the five."""
    checkpoint = name.removeprefix("google/").removesuffix("-it-assistant")
    shape = ASSISTANTS.get(checkpoint)
    if shape is None or name != f"google/{checkpoint}-it-assistant":
        return None
    ordered = checkpoint in ("gemma-4-E2B", "gemma-4-E4B")
    return HeadConfig(num_hidden_layers=4, use_ordered_embeddings=ordered, **shape)


def published_config(name: str) -> Gemma4TextConfig | Gemma4UnifiedTextConfig | None:
    """The text configuration of `google/gemma-4-NAME` or `google/gemma-4-NAME-it`; None: it is none
    of the five."""
    shape = SHAPES.get(name.removeprefix("google/").removesuffix("-it"))
    if shape is None or not name.startswith("google/"):
        return None
    if "12B" not in name:
        return Gemma4TextConfig(**shape)
    unified = {k: v for k, v in shape.items() if k != "hidden_size_per_layer_input"}
    return Gemma4UnifiedTextConfig(**unified)

"""Tiny random targets of every supported family."""

from collections.abc import Callable
from typing import Any

import torch
from transformers import (
    Gemma4Config,
    Gemma4ForCausalLM,
    Gemma4ForConditionalGeneration,
    Gemma4UnifiedConfig,
    Gemma4UnifiedForCausalLM,
    Gemma4UnifiedForConditionalGeneration,
    Gemma4UnifiedTextConfig,
    PreTrainedModel,
)

from headstart.heads.loading import (
    VOCAB_SIZE,
    byte_tokenizer,
    gemma3_config,
    gemma4_text_config,
    random_model,
)
from headstart.heads.target import Gemma3ForAssistedDecoding, Target

PER_LAYER = {"hidden_size_per_layer_input": 8, "vocab_size_per_layer_input": VOCAB_SIZE}


MOE = {
    "enable_moe_block": True,
    "num_experts": 4,
    "top_k_experts": 2,
    "moe_intermediate_size": 16,
    # As in 26B-A4B: the full layers have KV heads of their own and values made of keys.
    "attention_k_eq_v": True,
    "num_global_key_value_heads": 1,
}


VISION = {
    "vision_config": {
        "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1,
        "num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 8,
    },
    "audio_config": None,
}  # fmt: skip


def _unified_text() -> Any:
    text = gemma4_text_config().to_dict()
    keys = Gemma4UnifiedTextConfig().to_dict().keys() & text.keys()
    return {k: text[k] for k in keys - {"model_type"}}


FAMILIES: dict[str, Callable[[], PreTrainedModel]] = {
    "gemma3": lambda: Gemma3ForAssistedDecoding(gemma3_config()),
    "gemma4": lambda: Gemma4ForCausalLM(gemma4_text_config()),
    "gemma4-kv-sharing": lambda: Gemma4ForCausalLM(
        gemma4_text_config(num_kv_shared_layers=3, use_double_wide_mlp=True, **PER_LAYER)
    ),
    "gemma4-moe": lambda: Gemma4ForCausalLM(gemma4_text_config(**MOE)),
    "gemma4-multimodal": lambda: Gemma4ForConditionalGeneration(
        Gemma4Config(
            text_config=gemma4_text_config(num_kv_shared_layers=3, **PER_LAYER).to_dict(), **VISION
        )
    ),
    "gemma4-unified": lambda: Gemma4UnifiedForCausalLM(Gemma4UnifiedTextConfig(**_unified_text())),
    "gemma4-unified-multimodal": lambda: Gemma4UnifiedForConditionalGeneration(
        Gemma4UnifiedConfig(text_config=_unified_text(), audio_config=None)
    ),
}


def make_target(family: str, dtype: torch.dtype = torch.float32) -> Target:
    """A tiny random target of a family, the same each time."""
    return Target(random_model(FAMILIES[family]).to(dtype), byte_tokenizer(), family)

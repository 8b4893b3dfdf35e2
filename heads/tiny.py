"""Tiny random targets from the real configuration classes, with a byte tokenizer.

They cover every architecture whose weights are not at hand, in tests and in `configs/tiny.yaml`.
"""

from collections.abc import Callable
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import (
    Gemma3TextConfig,
    Gemma4ForCausalLM,
    Gemma4TextConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

from headstart.heads.target import Gemma3ForAssistedDecoding

TINY_TARGETS = ("tiny-gemma4", "tiny-gemma3")
VOCAB_SIZE = 320  # 256 bytes and the special tokens, with room to spare
_TEXT: dict[str, Any] = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 48,
    "intermediate_size": 64,
    "num_hidden_layers": 6,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "sliding_window": 8,
    "max_position_embeddings": 1024,
    "initializer_range": 0.2,  # large enough that attention and MLP have a say
    "layer_types": ["sliding_attention", "sliding_attention", "full_attention"] * 2,
}
_GEMMA4: dict[str, Any] = {
    "global_head_dim": 32,
    "hidden_size_per_layer_input": 0,
    "vocab_size_per_layer_input": 0,
    "final_logit_softcapping": 30.0,
}


def gemma4_text_config(**changes: Any) -> Gemma4TextConfig:
    """A tiny Gemma 4 text configuration; `changes` go to `Gemma4TextConfig`."""
    return Gemma4TextConfig(**{**_TEXT, **_GEMMA4, **changes})


def gemma3_config(**changes: Any) -> Gemma3TextConfig:
    """A tiny Gemma 3 text configuration; `changes` go to `Gemma3TextConfig`."""
    return Gemma3TextConfig(**{**_TEXT, "query_pre_attn_scalar": 16, **changes})


def tiny_config(name: str) -> Gemma3TextConfig | Gemma4TextConfig:
    """`tiny-gemma4` (KV sharing, per-layer embeddings, soft cap) or `tiny-gemma3`."""
    if name == "tiny-gemma3":
        return gemma3_config()
    per_layer = {"hidden_size_per_layer_input": 8, "vocab_size_per_layer_input": VOCAB_SIZE}
    return gemma4_text_config(num_kv_shared_layers=3, **per_layer)


def tiny_target(name: str) -> PreTrainedModel:
    """The model of `tiny_config(name)`, with the same weights each time."""
    cls = Gemma3ForAssistedDecoding if name == "tiny-gemma3" else Gemma4ForCausalLM
    return random_model(lambda: cls(tiny_config(name)))


def random_model(build: Callable[[], PreTrainedModel]) -> PreTrainedModel:
    """A model with seeded random weights whose greedy text is varied.

    The residual stream of a random model still holds the embedding of its last token, so a tied
    LM head repeats that token for ever. Random signs in the final norm break this.
    """
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(0)
        model = build()
        decoder: Any = model.model
        norm = (decoder.language_model if hasattr(decoder, "language_model") else decoder).norm
        signs = torch.randint(0, 2, norm.weight.shape) * 2.0 - 1.0
        # Gemma 3 stores w of a `1 + w` norm.
        norm.weight.copy_(signs - 1 if type(norm).__name__.startswith("Gemma3") else signs)
    return model


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """One token a byte, after <pad> 0, <eos> 1, <bos> 2, <unk> 3, as in Gemma's tokenizers."""
    specials = ["<pad>", "<eos>", "<bos>", "<unk>"]
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: i for i, token in enumerate([*specials, *alphabet])}
    tokenizer = Tokenizer(models.BPE(vocabulary, [], unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<bos> $A", special_tokens=[("<bos>", vocabulary["<bos>"])]
    )
    names = dict(zip(("pad_token", "eos_token", "bos_token", "unk_token"), specials, strict=True))
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names)

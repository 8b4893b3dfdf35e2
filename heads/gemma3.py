"""Gemma 3 as a target of Gemma 4 assistants.

transformers gives `shared_kv_states` only from Gemma 4 and refuses every other class by name.
Gemma 3 keeps the same tensors in its cache, so a subclass that reads them there is enough.
"""

from inspect import Parameter, Signature, signature
from typing import Any

import torch
from transformers import DynamicCache, Gemma3ForCausalLM, Gemma3TextConfig
from transformers.generation.candidate_generator import (
    CandidateGenerator,
    SinglePositionMultiTokenCandidateGenerator,
)

from headstart.heads.versions import CACHE

SharedKV = dict[str, tuple[torch.Tensor, torch.Tensor]]


def _with_argument(stock: Signature, name: str) -> Signature:
    added = Parameter(name, Parameter.KEYWORD_ONLY, default=False, annotation=bool)
    named = [p for p in stock.parameters.values() if p.kind is not Parameter.VAR_KEYWORD]
    others = [p for p in stock.parameters.values() if p.kind is Parameter.VAR_KEYWORD]
    return stock.replace(parameters=[*named, added, *others])


class Gemma3ForAssistedDecoding(Gemma3ForCausalLM):
    """`Gemma3ForCausalLM` that hands out shared KV and accepts `generate(assistant_model=...)`."""

    config: Gemma3TextConfig

    def shared_kv_states(self, cache: DynamicCache, q_len: int) -> SharedKV:
        """Keys and values of the last layer of each type, as a forward of `q_len` tokens saw them.

        Mirrors what `Gemma4TextAttention` stores: all rows for a full layer, and for a sliding
        layer the `sliding_window - 1` rows before the new tokens and the new tokens.

        Returns:
            Layer type -> (keys, values), each [B, kv heads, rows, head_dim].
        """
        types = self.config.layer_types
        shared = {}
        for layer_type in sorted(set(types)):
            layer = cache.layers[len(types) - 1 - types[::-1].index(layer_type)]
            rows = layer.keys.shape[2]
            if layer.is_sliding:
                rows = min(rows, self.config.sliding_window - 1 + q_len)
            shared[layer_type] = (layer.keys[:, :, -rows:], layer.values[:, :, -rows:])
        return shared

    def forward(self, *args: Any, return_shared_kv_states: bool = False, **kwargs: Any) -> Any:
        """As `Gemma3ForCausalLM.forward`; `return_shared_kv_states` adds `shared_kv_states`."""
        outputs = super().forward(*args, **kwargs)
        if return_shared_kv_states:
            given = args[0] if args else kwargs.get("input_ids")
            given = kwargs["inputs_embeds"] if given is None else given
            outputs["shared_kv_states"] = self.shared_kv_states(outputs[CACHE], given.shape[1])
        return outputs

    # `generate` reads the signature to see what it may pass; names differ from release to release.
    forward.__signature__ = _with_argument(  # type: ignore[attr-defined]
        signature(Gemma3ForCausalLM.forward), "return_shared_kv_states"
    )

    def _get_candidate_generator(self, **kwargs: Any) -> CandidateGenerator:
        assistant = kwargs.get("assistant_model")
        if assistant is None or not type(assistant).__name__.startswith("Gemma4Assistant"):
            return super()._get_candidate_generator(**kwargs)
        return SinglePositionMultiTokenCandidateGenerator(
            assistant_model=assistant,
            target_model_input_embeddings=self.get_input_embeddings(),
            generation_config=kwargs["generation_config"],
        )

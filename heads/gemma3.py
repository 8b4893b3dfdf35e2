"""Gemma 3 as a target of Gemma 4 assistants.

transformers gives `shared_kv_states` only from Gemma 4 and refuses every other class by name.
Gemma 3 keeps the same tensors in its cache, so a subclass that reads them there is enough.
"""

from typing import Any

import torch
from transformers import DynamicCache, Gemma3ForCausalLM, Gemma3TextConfig
from transformers.generation.candidate_generator import (
    CandidateGenerator,
    SinglePositionMultiTokenCandidateGenerator,
)

SharedKV = dict[str, tuple[torch.Tensor, torch.Tensor]]


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

    def forward(  # every name spelled out: `generate` reads the signature to see what it may pass
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        past_key_values: DynamicCache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        return_shared_kv_states: bool = False,
        **kwargs: Any,
    ) -> Any:
        """As `Gemma3ForCausalLM.forward`; `return_shared_kv_states` adds `shared_kv_states`."""
        seen = 0 if past_key_values is None else past_key_values.get_seq_length()
        outputs = super().forward(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            labels=labels,
            use_cache=use_cache,
            logits_to_keep=logits_to_keep,
            **kwargs,
        )
        if return_shared_kv_states:
            cache = outputs.past_key_values
            outputs["shared_kv_states"] = self.shared_kv_states(
                cache, cache.get_seq_length() - seen
            )
        return outputs

    def _get_candidate_generator(self, **kwargs: Any) -> CandidateGenerator:
        assistant = kwargs.get("assistant_model")
        if assistant is None or not type(assistant).__name__.startswith("Gemma4Assistant"):
            return super()._get_candidate_generator(**kwargs)
        return SinglePositionMultiTokenCandidateGenerator(
            assistant_model=assistant,
            target_model_input_embeddings=self.get_input_embeddings(),
            generation_config=kwargs["generation_config"],
        )

"""What transformers' own generator drafts, and what the parallel forward of training computes."""

from typing import Any

import torch
from transformers import DynamicCache, GenerationConfig
from transformers.generation.candidate_generator import (
    SinglePositionMultiTokenCandidateGenerator,
)

from headstart.heads.assistant import Assistant
from headstart.heads.kinds import Texts, all_rows
from headstart.heads.target import Activations, Target
from headstart.heads.unroll import DraftHead

K = 3


def prefill(target: Target, ids: torch.Tensor) -> Any:
    cache = DynamicCache(config=target.model.config.get_text_config())
    cache.activate_past_recording()  # as `_assisted_decoding` does
    return target.model(
        input_ids=ids,
        past_key_values=cache,
        output_hidden_states=True,
        return_shared_kv_states=True,
    )


def stock_drafts(
    target: Target,
    assistant: Assistant,
    ids: torch.Tensor,
    outputs: Any,
    matches: int = 0,
    is_prefill: bool = True,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The stock generator's draft tokens [K] and logits [K, V] after `ids`."""
    config = GenerationConfig(num_assistant_tokens=K, max_length=10_000)
    assistant.generation_config = config
    generator = SinglePositionMultiTokenCandidateGenerator(
        assistant, target.model.get_input_embeddings(), config
    )
    generator.is_main_model_prefill = is_prefill
    candidates, logits = generator.get_candidates(
        ids,
        model_kwargs={"attention_mask": torch.ones_like(ids)},
        model_outputs=outputs,
        is_first_iteration=False,
        n_last_matches=matches,
    )
    return candidates[0, ids.shape[1] :], logits[0]


def training_logits(
    target: Target, head: DraftHead, seen: Activations, rows: torch.Tensor, tokens: torch.Tensor
) -> torch.Tensor:
    """[K, R, V] of the parallel forward, for rows [R] and the tokens [R, K] fed to each."""
    texts = Texts(seen.hidden, seen.shared_kv, seen.ids, None, seen.layers)
    read = all_rows(rows[None], tokens[None])
    said = head(texts, read, target.embed, 0)
    return torch.stack(said)[:, 0] @ target.table.T

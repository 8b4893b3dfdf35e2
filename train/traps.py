"""Mistakes that trainers of draft heads make, to be measured: what each costs in acceptance.

Most show the head something in training that no decoder will show it, and look better for it in the
loss; the others teach it what the target does not say, or starve it.
Validation and decoding stay right, so that what a trapped head loses there is the price.

Letters: B conversations, R anchors of each, T positions, K rounds, D target width, H head width,
k teacher tokens, N drafts, C candidates, V vocabulary.
"""

import copy
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch

from headstart.configs.schema import HeadConfig, Trap
from headstart.data.loader import Batch
from headstart.heads.assistant import set_table
from headstart.heads.ordered import (
    Taught,
    cluster_count,
    set_order,
    token_clusters,
    token_usage,
    with_clusters,
)
from headstart.heads.saving import Assistant
from headstart.heads.target import Target

LOGIT_ROWS = 64  # rows of V logits held at once


def trapped(trap: Trap, batch: Batch, target: Target) -> Batch:
    """The same batch as a trainer with this mistake would make it.

    Args:
        trap: `same_token` pairs the embedding of a token with the target's state of that very token
            (right: of the one before), from which its own LM head would tell the teacher's answer;
            `pre_norm` takes hidden states before the final norm; `own_key` lets a row see the key
            of its own token; `future_keys` lets it see those of the whole text, as the assistant's
            stock forward over several rows of a padded batch does; `no_soft_cap` takes the
            teacher's logits as they are before its soft cap. (`top_clusters`, training through the
            clusters that a draft reads, is no matter of the batch.)
        batch: a conversation a row, nothing packed.
        target: for `pre_norm` it runs over the batch again; for `no_soft_cap` its LM head does.

    Raises:
        ValueError: `no_soft_cap` of a target that has none.
    """
    match trap:
        case "same_token":
            return replace(batch, hidden=_at(batch.text_hidden, batch.rows + 1))
        case "pre_norm":
            return replace(batch, hidden=_at(_before_norm(target, batch.ids), batch.rows))
        case "own_key":
            return replace(batch, seen=(batch.rows + 1).clamp_max(batch.ids.shape[1] - 1))
        case "future_keys":
            return replace(batch, seen=_last_rows(batch).expand_as(batch.rows))
        case "no_soft_cap":
            return replace(batch, teacher_logprobs=_uncapped_logprobs(batch, uncapped(target)))
        case "top_clusters":
            return batch


def uncapped(target: Target) -> Target:
    """The same target without a soft cap of its logits.

    Raises:
        ValueError: it has none.
    """
    if target.config.final_logit_softcapping is None:
        raise ValueError(f"trap=no_soft_cap: {target.name} caps no logits")
    other = copy.copy(target)
    other.config = copy.copy(target.config)
    other.config.final_logit_softcapping = None
    return other


def with_top_clusters(
    assistant: Assistant, target: Target, taught: Taught, h: HeadConfig
) -> Assistant:
    """A head as wide as its target, with clusters before it is trained: made of the target's own
    states, under mean centroids that stay as they are, since the choice of the best ones hands them
    no gradient."""
    clusters = cluster_count(len(target.table), h.num_centroids, h.centroid_intermediate_top_k)
    assistant = with_clusters(assistant, clusters, h.centroid_intermediate_top_k)
    usage = token_usage(target.logits, taught)
    set_order(assistant.masked_embedding, taught.hidden, usage, target.table)
    assistant.masked_embedding.requires_grad_(False)
    set_table(assistant, target.table)
    return assistant.train()


def in_top_clusters(
    assistant: Assistant, ids: torch.Tensor
) -> Callable[[torch.Tensor], torch.Tensor]:
    """Of states [N, H], which of the tokens `ids` [C] are in the clusters that a draft reads,
    [N, C]."""
    embedder = assistant.masked_embedding
    cluster_of = token_clusters(embedder.token_ordering, embedder.num_centroids)[ids]

    def read(states: torch.Tensor) -> torch.Tensor:
        scores = embedder.centroids(states.detach().to(embedder.centroids.weight.dtype))
        top = scores.topk(embedder.centroid_intermediate_top_k, dim=1).indices
        chosen = torch.zeros_like(scores, dtype=torch.bool).scatter(1, top, True)
        return chosen[:, cluster_of]

    return read


@torch.no_grad()
def _uncapped_logprobs(batch: Batch, target: Target) -> torch.Tensor:
    """[B, R, K, k] of the batch's teacher tokens."""
    hidden = batch.text_hidden.flatten(0, 1)
    chunks = [target.logits(rows).logsumexp(-1) for rows in hidden.split(LOGIT_ROWS)]
    normaliser = torch.cat(chunks).view(batch.text_hidden.shape[:2])
    rounds = torch.arange(1, batch.tokens.shape[2] + 1, device=batch.rows.device)
    at = (batch.rows[..., None] + rounds).clamp_max(normaliser.shape[1] - 1)  # [B, R, K]
    states = _at(batch.text_hidden, at.flatten(1)).view(*at.shape, -1)
    logits = (target.table[batch.teacher_ids].to(states.dtype) @ states[..., None])[..., 0]
    return logits.float() - normaliser.gather(1, at.flatten(1)).view(at.shape)[..., None]


def _at(states: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    """States [B, T, D] at rows [B, R] -> [B, R, D]."""
    rows = rows.clamp_max(states.shape[1] - 1)
    return states.gather(1, rows[..., None].expand(-1, -1, states.shape[-1]))


def _last_rows(batch: Batch) -> torch.Tensor:
    """[B, 1] the last KV row of each text; rows of padding hold zeros."""
    keys, _ = batch.shared_kv["full_attention"]
    filled = keys.abs().sum((1, 3)) > 0
    places = torch.arange(filled.shape[1], device=filled.device)
    return (filled * places).amax(1, keepdim=True)


@torch.no_grad()
def _before_norm(target: Target, ids: torch.Tensor) -> torch.Tensor:
    """[B, T, D] what goes into the final norm. Padding is on the right, where no row looks."""
    found: list[torch.Tensor] = []

    def note(module: torch.nn.Module, args: tuple[Any, ...]) -> None:
        found.append(args[0])

    hook = target.final_norm.register_forward_pre_hook(note)
    try:
        target.activations(ids)
    finally:
        hook.remove()
    return found[0]

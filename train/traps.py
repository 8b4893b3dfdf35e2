"""Mistakes that trainers of draft heads make, to be measured: what each costs in acceptance.

Each shows the head something in training that no decoder will show it, and most look better for it
in the loss.
Validation and decoding stay right, so that what a trapped head loses there is the price.

Letters: B conversations, R anchors of each, T positions, D target width.
"""

from dataclasses import replace
from typing import Any

import torch

from headstart.configs.schema import Trap
from headstart.data.loader import Batch
from headstart.heads.targets import Target


def trapped(trap: Trap, batch: Batch, target: Target) -> Batch:
    """The same batch as a trainer with this mistake would make it.

    Args:
        trap: `same_token` pairs the embedding of a token with the target's state of that very token
            (right: of the one before), from which its own LM head would tell the teacher's answer;
            `pre_norm` takes hidden states before the final norm; `own_key` lets a row see the key
            of its own token; `future_keys` lets it see those of the whole text, as the assistant's
            stock forward over several rows of a padded batch does.
        batch: a conversation a row, nothing packed.
        target: for `pre_norm` it runs over the batch again.
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

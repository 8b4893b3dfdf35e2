"""Acceptance on held-out conversations, and the best head, which is kept."""

from functools import partial

import torch
from accelerate import Accelerator, PartialState

from headstart.common.processes import full_tensor, full_weights
from headstart.configs.schema import Config
from headstart.data.conversations import template_variables
from headstart.data.documents import Documents
from headstart.eval.replay import simulate_acceptance
from headstart.heads.saving import (
    kept_notes,
    save_assistant,
    scalings_of,
    trained_notes,
    without_lora,
    write_adapter,
)
from headstart.heads.target import Target
from headstart.heads.unroll import DraftHead, served_position
from headstart.train.checkpoints import RunState


def keep_if_better(
    state: RunState, target: Target, validation: Documents, config: Config, accelerator: Accelerator
) -> float:
    """Acceptance length on the held-out conversations; the head is saved in head/ where it is the
    best so far."""
    progress = state.progress
    with state.average.applied():
        found = validate(state, target, validation, config, accelerator)
        progress.evals_since_best += 1
        if found > progress.best:
            progress.best, progress.evals_since_best = found, 0
            export_head(state.head, target, config, trained=progress.step > 0)
    return found


def validate(
    state: RunState, target: Target, validation: Documents, config: Config, accelerator: Accelerator
) -> float:
    """Acceptance length on the held-out conversations, every process replaying its share."""
    c = config.train
    share = range(accelerator.process_index, len(validation.entries), accelerator.num_processes)
    position = served_position(c.draft_position_offset)
    with full_weights(state.model), accelerator.autocast():
        found = simulate_acceptance(
            state.head, target, validation, c.num_speculative_steps, share, position
        )
    counts = torch.tensor([sum(found.dense.accepted), found.dense.rounds], dtype=torch.float32)
    accepted, rounds = accelerator.reduce(counts.to(accelerator.device)).tolist()
    return 1 + float(accepted) / max(float(rounds), 1)


def export_head(head: DraftHead, target: Target, config: Config, trained: bool = True) -> None:
    """Save a head in head/, in the native format and in the target's dtype, so that both load as
    one; an adapter is added to it, and saved beside it too.

    All processes must call it; the main one writes. One that is not trained yet keeps what it says
    of its training.
    """
    h, dtype, assistant = config.head, target.table.dtype, head.assistant
    weights = {name: full_tensor(tensor) for name, tensor in assistant.state_dict().items()}
    notes = kept_notes(assistant.config, target.identity)
    if trained:
        variables = template_variables(config.data)
        notes |= trained_notes(assistant.config, config.train.draft_position_offset, variables)
    beside = None
    if h.lora is not None:
        weights, adapter = without_lora(weights, scalings_of(assistant), dtype)
        beside = partial(write_adapter, adapter=adapter, lora=h.lora, base=h.init_from, notes=notes)
    # Within `full_weights` it is in the dtype that FSDP2 computes in.
    projection = None if head.projection is None else full_tensor(head.projection.detach())
    with full_weights(head):
        if PartialState().is_main_process:
            save_assistant(
                assistant,
                head.table(target.table, projection),
                config.output_dir / "head",
                config.train.num_speculative_steps,
                dtype,
                weights=weights,
                notes=notes,
                beside=beside,
            )

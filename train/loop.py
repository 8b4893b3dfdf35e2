"""The training loop: batches, step, validation, log, checkpoint, read from top to bottom."""

import time
from functools import partial
from typing import Any

import torch
from accelerate import Accelerator, PartialState
from accelerate.utils import send_to_device

from headstart.common.console import progress_bar, say
from headstart.common.processes import whole, whole_weights
from headstart.common.signals import Interrupted, stop_signals
from headstart.configs.schema import Config
from headstart.data.conversations import template_variables
from headstart.data.loader import AnchorLoader
from headstart.data.store import Documents
from headstart.eval.replay import simulate_acceptance
from headstart.heads.saving import (
    MADE_FOR,
    save_assistant,
    scalings_of,
    trained_notes,
    without_lora,
    write_adapter,
)
from headstart.heads.target import Target
from headstart.heads.unroll import DraftHead, served_position
from headstart.train.checkpoints import RunState, save_checkpoint
from headstart.train.run_folder import append_metrics
from headstart.train.step import optimizer_step


def train_head(
    state: RunState,
    likely: torch.Tensor,
    target: Target,
    training: Documents,
    validation: Documents,
    config: Config,
    accelerator: Accelerator,
) -> None:
    """Train until the steps, the time or the gains end; the best head is then in head/.

    Args:
        state: of the run; it changes in place.
        likely: as of `start_run`.
        target: that the head is trained for.
        training, validation: its activations.
        config: of the run.
        accelerator: of the launch.

    Raises:
        Diverged: a loss or gradient is not finite.
        Interrupted: SIGINT or SIGTERM arrived; the last finished step is saved.
        OSError: the disk is full, say; earlier checkpoints are kept.
    """
    c, run, progress = config.train, config.run.dir, state.progress
    loader = AnchorLoader(
        training,
        batch_size=c.batch_size,
        anchors=c.anchors,
        rounds=c.rounds,
        seed=config.run.seed,
        pack_tokens=c.pack_tokens,
        rank=accelerator.process_index,
        world_size=accelerator.num_processes,
        later_anchors=c.later_anchors,
    )
    keep = partial(keep_if_better, state, target, validation, config, accelerator)
    if config.head.warm and not progress.step:  # what finds nothing better ends with what it had
        progress.start = keep()
        say(f"Held-out acceptance length before training: {progress.start:.3f}")

    with progress_bar() as bar, stop_signals() as stop_requests:
        task = bar.add_task("Training", total=c.steps, completed=progress.step, status="")
        while not progress.ended(c):
            began, accumulated = time.monotonic(), c.gradient_accumulation_steps
            numbers = range(progress.step * accumulated, (progress.step + 1) * accumulated)
            batches = [send_to_device(loader.batch(n), accelerator.device) for n in numbers]
            stops = len(stop_requests)
            row = optimizer_step(state, batches, likely, target, config, accelerator, stops)
            stop = row.pop("stop")
            progress.seconds += _seconds_since(began, accelerator)

            if progress.step % c.validate_every == 0 or progress.ended(c):
                began = time.monotonic()
                row["acceptance_length"] = keep()
                progress.seconds += _seconds_since(began, accelerator)

            accelerator.log(row, step=progress.step)
            if accelerator.is_main_process:
                append_metrics(run, {"step": progress.step, **row})
            if progress.step % c.checkpoint_every == 0 or progress.ended(c) or stop:
                save_checkpoint(state, config, target)
            status = status_text(row, progress.best, bar.tasks[task].speed)
            bar.update(task, completed=progress.step, status=status)
            if stop:
                raise Interrupted(f"stopped after step {progress.step}, saved; go on with --resume")


def keep_if_better(
    state: RunState, target: Target, validation: Documents, config: Config, accelerator: Accelerator
) -> float:
    """Acceptance length on the held-out conversations; the head is saved in head/ where it is the
    best so far."""
    progress = state.progress
    with state.average.applied():
        found = validate(state, target, validation, config, accelerator)
        progress.stale += 1
        if found > progress.best:
            progress.best, progress.stale = found, 0
            export_head(state.head, target, config, trained=progress.step > 0)
    return found


def validate(
    state: RunState, target: Target, validation: Documents, config: Config, accelerator: Accelerator
) -> float:
    """Acceptance length on the held-out conversations, every process walking its share."""
    c = config.train
    share = range(accelerator.process_index, len(validation.entries), accelerator.num_processes)
    with whole_weights(state.model), accelerator.autocast():
        found = simulate_acceptance(
            state.head, target, validation, c.rounds, share, served_position(c.rope_position)
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
    weights = {name: whole(tensor) for name, tensor in assistant.state_dict().items()}
    beside = None
    if h.lora is not None:
        weights, adapter = without_lora(weights, scalings_of(assistant), dtype)
        beside = partial(write_adapter, adapter=adapter, lora=h.lora, base=h.start)
    notes: dict[str, Any] = {MADE_FOR: target.identity}
    if trained:
        variables = template_variables(config.data)
        notes |= trained_notes(assistant.config, config.train.rope_position, variables)
    with whole_weights(head):
        if PartialState().is_main_process:
            save_assistant(
                assistant,
                head.table(target.table),
                config.run.dir / "head",
                config.train.rounds,
                dtype,
                weights=weights,
                notes=notes,
                beside=beside,
            )


def _seconds_since(began: float, accelerator: Accelerator) -> float:
    """By the clock of the main process, so that all end at the same step."""
    own = time.monotonic() - began if accelerator.is_main_process else 0.0
    return float(accelerator.reduce(torch.tensor(own, device=accelerator.device)))


def status_text(row: dict[str, Any], best: float, steps_per_second: float | None) -> str:
    """What the progress bar says beside the steps."""
    text = f"loss {row['loss']:.3f} accept {row['batch_acceptance_length']:.2f}"
    held_out = f" held out {best:.2f}" if best else ""
    return f"{text}{held_out} {row['rows'] * (steps_per_second or 0):.0f} tok/s"

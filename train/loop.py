"""The training loop: prompts -> conversations -> activations -> head, read from top to bottom."""

import math
import time
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator, PartialState
from accelerate.utils import set_seed

from headstart.common.console import phase, progress_bar, say
from headstart.common.processes import join_processes, whole, whole_weights
from headstart.common.signals import Interrupted, stop_signals
from headstart.configs.schema import Config, TrainConfig
from headstart.data.conversations import template_variables
from headstart.data.loader import AnchorLoader
from headstart.data.prepare import prepare_documents
from headstart.data.store import Documents
from headstart.eval.replay import simulate_acceptance
from headstart.heads.loading import open_target
from headstart.heads.saving import (
    ROPE_POSITION,
    note_variables,
    save_assistant,
    scalings_of,
    without_lora,
    write_adapter,
)
from headstart.heads.target import Target
from headstart.heads.unroll import DraftHead, walked_at
from headstart.train.checkpoints import (
    Average,
    Progress,
    checkpoints,
    gather_tensors,
    load_checkpoint,
    save_checkpoint,
)
from headstart.train.ordering import order_best
from headstart.train.run_folder import (
    append_metrics,
    drop_metrics_after,
    open_run,
    plot_run,
    run_folder,
    summary_text,
    write_summary,
)
from headstart.train.start import build_head, likely_tokens, taught_rows
from headstart.train.step import batch_sums, diverged, learning_rate, loss_weight, step_candidates
from headstart.train.tracking import check_settings, finish_trackers, start_trackers


def train(config: Config, resume: bool = False) -> None:
    """Distill a head for `config.target` into the run folder.

    Writes config.yaml, status.json, metrics.jsonl, checkpoints/, head/ (the best head, native
    format), summary.json and progress.png.

    Args:
        config: the whole run.
        resume: go on from the newest checkpoint where there is one.

    Raises:
        ValueError: the run folder holds another run, the configuration does not fit, or a
            checkpoint is damaged.
        Diverged: a loss or gradient is not finite.
        Interrupted: SIGINT or SIGTERM arrived; the last finished step is saved.
        OSError: the disk is full, say; earlier checkpoints are kept.
    """
    check_settings(config)
    join_processes()
    accelerator = Accelerator(
        mixed_precision="bf16" if config.train.precision == "bfloat16" else "no",
        log_with=None if config.wandb.mode == "disabled" else "wandb",
        project_dir=config.run.dir,
    )
    if not accelerator.is_main_process:
        _train(config, resume, accelerator)
        return
    with run_folder(config.run.dir, "training"):
        open_run(config, resume, accelerator.num_processes)
        _train(config, resume, accelerator)


def _train(config: Config, resume: bool, accelerator: Accelerator) -> None:
    c, run, seed = config.train, config.run.dir, config.run.seed
    set_seed(seed)
    target = open_target(config.target, accelerator.device)
    held_out = config.eval.prompts if config.eval else None
    training, validation = prepare_documents(target, config.data, seed, held_out)

    saved = checkpoints(run / "checkpoints") if resume else []
    with phase("Starting the head"):
        taught = taught_rows(training, target.device)
        head = build_head(target, config, taught, validation, resumed=bool(saved))
        likely = likely_tokens(target, taught, c)
        del taught
    optimizer = torch.optim.AdamW(_parameter_groups(head, c.weight_decay), lr=c.learning_rate)
    if c.activation_checkpointing:
        head.assistant.model.gradient_checkpointing_enable({"use_reentrant": False})
    if c.compile:
        for layer in head.assistant.model.layers:
            layer.compile(dynamic=True)
    model, optimizer = accelerator.prepare(head, optimizer)
    average = Average(head.trainable(), c.ema_decay)
    progress = Progress()
    if saved:
        progress = load_checkpoint(saved[-1], head, optimizer, average, target)
        say(f"Resuming {run} after step {progress.step}")
    loader = AnchorLoader(
        training, c.batch_size, c.anchors, c.rounds, seed, c.pack_tokens,
        accelerator.process_index, accelerator.num_processes, c.later_anchors,
    )  # fmt: skip
    if accelerator.is_main_process:
        drop_metrics_after(run, progress.step)
    start_trackers(accelerator, config)
    if config.head.warm and not saved:  # a run that finds nothing better ends with what it had
        found = _validate(accelerator, head, model, target, validation, c)
        progress.start = progress.best = found
        export_head(head, target, run / "head", config)
        say(f"Held-out acceptance length before training: {found:.3f}")
    # Of what is exported from here on; a head to start from, above, keeps what it says of itself.
    setattr(head.assistant.config, ROPE_POSITION, c.rope_position)
    note_variables(head.assistant.config, template_variables(config.data))

    with progress_bar() as bar, stop_signals() as stop_requests:
        task = bar.add_task("Training", total=c.steps, completed=progress.step, status="")
        while not progress.ended(c):
            step, began = progress.step, time.monotonic()
            spent = progress.seconds / (60 * c.max_minutes) if c.max_minutes else 0.0
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(step, c.steps, c.warmup_steps, c.learning_rate, spent)
            numbers = range(
                step * c.gradient_accumulation_steps, (step + 1) * c.gradient_accumulation_steps
            )
            batches = [loader.batch(n).to(accelerator.device) for n in numbers]
            # One mean over all rows of the step, whatever batch and process they are in.
            weight = torch.stack([loss_weight(b, c.round_decay) for b in batches]).sum()
            denominator = accelerator.reduce(weight).clamp_min(1e-6)
            candidates = step_candidates(
                batches, likely, c, seed * 1_000_003 + step, accelerator.reduce
            )
            totals: dict[str, torch.Tensor] = {}
            for number, batch in zip(numbers, batches, strict=True):
                last = number == numbers[-1]
                with nullcontext() if last else accelerator.no_sync(model):
                    sums = batch_sums(model, target, batch, c, candidates)
                    # DDP averages gradients over processes; this makes it the sum.
                    loss = sums["loss_sum"] * accelerator.num_processes / denominator
                    accelerator.backward(loss)
                for name, value in sums.items():
                    totals[name] = totals.get(name, torch.zeros_like(value)) + value.detach()
            clipped = accelerator.clip_grad_norm_(head.trainable().values(), c.max_grad_norm)
            norm = float(whole(clipped))
            totals["stop"] = torch.tensor(float(len(stop_requests)), device=accelerator.device)
            reduced = {name: float(accelerator.reduce(value)) for name, value in totals.items()}
            if not all(map(math.isfinite, [norm, *reduced.values()])):
                raise diverged(step + 1, norm, reduced, batches, run)
            optimizer.step()
            optimizer.zero_grad()
            progress.step = step = step + 1
            average.update(step)

            row = {
                "step": step,
                "loss": reduced["loss_sum"] / float(denominator),
                # Over the rows of the batch, drafts compared over its candidates alone: for
                # watching. `acceptance_length` below is the figure to compare.
                "batch_acceptance_length": 1 + reduced["accepted"] / max(reduced["beyond"], 1),
                "learning_rate": optimizer.param_groups[0]["lr"],
                "grad_norm": norm,
                "rows": reduced["rows"],
            }
            progress.seconds += _seconds_since(began, accelerator)
            if step % c.validate_every == 0 or progress.ended(c):
                began = time.monotonic()
                with average.applied():
                    found = _validate(accelerator, head, model, target, validation, c)
                    row["acceptance_length"] = found
                    progress.stale += 1
                    if found > progress.best:
                        progress.best, progress.stale = found, 0
                        export_head(head, target, run / "head", config)
                progress.seconds += _seconds_since(began, accelerator)
            accelerator.log({k: v for k, v in row.items() if k != "step"}, step=step)
            if accelerator.is_main_process:
                append_metrics(run, row)
            if step % c.checkpoint_every == 0 or progress.ended(c) or reduced["stop"]:
                files = gather_tensors(head, optimizer, average)
                if accelerator.is_main_process:
                    save_checkpoint(config, progress, target, files, accelerator.num_processes)
            bar.update(
                task, completed=step, status=_status(row, progress.best, bar.tasks[task].speed)
            )
            if reduced["stop"]:
                raise Interrupted(f"stopped after step {step}, saved; go on with --resume")
    ordered = None
    if config.head.use_ordered_embeddings:
        ordered = order_best(config, target, training, validation)
    if accelerator.is_main_process:
        summary = write_summary(config, head, target, training, validation, progress.start, ordered)
        say(f"Best head, of step {summary['best']['step']}: {summary_text(summary['best'])}")
        plot_run(run)
    finish_trackers(accelerator, config)


def export_head(head: DraftHead, target: Target, folder: Path, config: Config) -> None:
    """Save the head in the native format and in the target's dtype, so that both load as one; an
    adapter is added to it, and saved beside it too.

    All processes must call it; the main one writes.
    """
    h, dtype = config.head, target.table.dtype
    weights = {name: whole(tensor) for name, tensor in head.assistant.state_dict().items()}
    beside = None
    if h.lora is not None:
        weights, adapter = without_lora(weights, scalings_of(head.assistant), dtype)
        beside = partial(write_adapter, adapter=adapter, lora=h.lora, base=h.start)
    with whole_weights(head):
        if PartialState().is_main_process:
            save_assistant(
                head.assistant, head.table(target.table), folder, config.train.rounds, dtype,
                weights, target.identity, beside,
            )  # fmt: skip


def _parameter_groups(head: DraftHead, weight_decay: float) -> list[dict[str, Any]]:
    parameters = head.trainable().values()
    return [
        {"params": [p for p in parameters if p.ndim > 1], "weight_decay": weight_decay},
        {"params": [p for p in parameters if p.ndim == 1], "weight_decay": 0.0},
    ]


def _seconds_since(began: float, accelerator: Accelerator) -> float:
    """By the clock of the main process, so that all end at the same step."""
    own = time.monotonic() - began if accelerator.is_main_process else 0.0
    return float(accelerator.reduce(torch.tensor(own, device=accelerator.device)))


def _validate(
    accelerator: Accelerator,
    head: DraftHead,
    model: torch.nn.Module,
    target: Target,
    validation: Documents,
    c: TrainConfig,
) -> float:
    """Acceptance length on the held-out conversations, every process walking its share."""
    share = range(accelerator.process_index, len(validation.entries), accelerator.num_processes)
    with whole_weights(model), accelerator.autocast():
        found = simulate_acceptance(
            head, target, validation, c.rounds, share, walked_at(c.rope_position)
        )
    counts = torch.tensor([sum(found.dense.accepted), found.dense.rounds], dtype=torch.float32)
    accepted, walked = accelerator.reduce(counts.to(accelerator.device)).tolist()
    return 1 + float(accepted) / max(float(walked), 1)


def _status(row: dict[str, Any], best: float, steps_per_second: float | None) -> str:
    text = f"loss {row['loss']:.3f} accept {row['batch_acceptance_length']:.2f}"
    held_out = f" held out {best:.2f}" if best else ""
    return f"{text}{held_out} {row['rows'] * (steps_per_second or 0):.0f} tok/s"

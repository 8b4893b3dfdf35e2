"""The training loop: batches, step, validation, log, checkpoint, read from top to bottom."""

import time
from functools import partial
from typing import Any

import torch
from accelerate import Accelerator

from headstart.common.console import print_once, progress_bar
from headstart.common.signals import Interrupted, stop_signals
from headstart.configs.schema import Config
from headstart.data.background import THREADS, Prefetch
from headstart.data.documents import Documents
from headstart.data.loader import run_loader
from headstart.heads.target import Target
from headstart.train.checkpoints import RunState, save_checkpoint
from headstart.train.run_folder import append_metrics
from headstart.train.step import StepResult, optimizer_step
from headstart.train.validation import keep_if_better


def train_head(
    state: RunState,
    likely: torch.Tensor,
    target: Target,
    training: Documents,
    validation: Documents,
    config: Config,
    accelerator: Accelerator,
) -> None:
    """Train until the steps are done, the time is up or validations gain no more; the best head is
    then in head/.

    Args:
        state: of the run; it changes in place.
        likely: [V] bool, tokens that are candidates in every step, from `start_run`.
        target: that the head is trained for.
        training, validation: its activations over conversations, the latter held out.
        config: of the run.
        accelerator: of the launch.

    Raises:
        Diverged: a loss or gradient is not finite.
        Interrupted: SIGINT or SIGTERM arrived; the last finished step is saved.
        OSError: the disk is full, say; earlier checkpoints are kept.
    """
    c, run, progress = config.train, config.output_dir, state.progress
    loader = run_loader(
        training,
        config,
        state.head.inputs,
        rank=accelerator.process_index,
        world_size=accelerator.num_processes,
    )
    keep = partial(keep_if_better, state, target, validation, config, accelerator)
    if config.head.warm and not progress.step:  # what finds nothing better ends with what it had
        progress.start = keep()
        print_once(f"Held-out acceptance length before training: {progress.start:.3f}")
    accumulated = c.gradient_accumulation_steps

    def note(result: StepResult, validates: bool = False) -> float:
        """Log what a step came to, and return how many signals to stop there were."""
        numbers = range((result.step - 1) * accumulated, result.step * accumulated)
        row = result.read(lambda: [loader.batch(n) for n in numbers], run)
        progress.seconds += row.pop("seconds")
        stop = row.pop("stop")
        if validates:
            row["acceptance_length"] = keep()
        accelerator.log(row, step=result.step)
        if accelerator.is_main_process:
            append_metrics(run, {"step": result.step, **row})
        status = status_text(row, progress.best, bar.tasks[task].speed)
        bar.update(task, completed=result.step, status=status)
        return stop

    # Online activations come from the target itself, which has to run between the steps.
    ahead = Prefetch(
        loader.batch,
        first=progress.step * accumulated,
        device=accelerator.device,
        threads=0 if config.data.online else THREADS,
    )
    with progress_bar() as bar, stop_signals() as stop_requests, ahead:
        task = bar.add_task("Training", total=c.max_steps, completed=progress.step, status="")
        unread: StepResult | None = None
        ended, stop, clock = progress.ended(c), 0.0, time.monotonic()
        while not ended:
            batches = [ahead.take() for _ in range(accumulated)]
            began, clock = clock, time.monotonic()
            result = optimizer_step(
                state, batches, likely, target, config, accelerator,
                stop_requests=stop_requests, seconds=clock - began,
            )  # fmt: skip
            if unread is not None:  # a step late: the device works on this one meanwhile
                stop += note(unread)
            unread, ended = result, progress.ended(c)
            validates = progress.step % c.eval_steps == 0 or ended
            saves = progress.step % c.save_steps == 0 or ended or stop
            if not (validates or saves):
                continue

            stop, unread = stop + note(result, validates), None
            # The state of the head in head/: a run that goes on elsewhere finds it no more.
            saves = saves or (validates and progress.evals_since_best == 0)
            progress.seconds += _seconds_since(clock, accelerator)
            clock = time.monotonic()
            ended = validates and progress.ended(c)  # not before the head has been judged
            if saves or ended or stop:
                save_checkpoint(state, config, target)
            if stop:
                raise Interrupted(f"stopped after step {progress.step}, saved; go on with --resume")


def _seconds_since(began: float, accelerator: Accelerator) -> float:
    """By the clock of the main process, so that all end at the same step."""
    own = time.monotonic() - began if accelerator.is_main_process else 0.0
    return float(accelerator.reduce(torch.tensor(own, device=accelerator.device)))


def status_text(row: dict[str, Any], best: float, steps_per_second: float | None) -> str:
    """What the progress bar says beside the steps."""
    text = f"loss {row['loss']:.3f} accept {row['batch_acceptance_length']:.2f}"
    held_out = f" held out {best:.2f}" if best else ""
    return f"{text}{held_out} {row['rows'] * (steps_per_second or 0):.0f} anchors/s"

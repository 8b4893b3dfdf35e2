"""One optimizer step: each batch adds to the loss and the metrics as sums, which are divided once,
after the reduction over processes; the learning rate; and what is said where a loss is not finite.

Letters: B rows of keys and values, each of one conversation or of several that are packed, R
anchors (places that drafts begin from) in each, K rounds, N drafts (one anchor in one round each),
V vocabulary.
"""

import math
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import extract_model_from_parallel, gather_object

from headstart.common.machine import Readback
from headstart.common.processes import full_tensor
from headstart.configs.schema import Config, DraftPositionOffset, TrainConfig
from headstart.data.loader import Batch, broken_documents
from headstart.heads.target import Target
from headstart.train.checkpoints import RunState, checkpoints
from headstart.train.losses import (
    OBJECTIVES,
    Candidates,
    Teacher,
    draw_candidates,
    exact_losses,
    sparse_losses,
)


@dataclass(frozen=True)
class BatchDrafts:
    """The N drafts of a batch that count, in the order of `CountedDrafts`."""

    states: torch.Tensor
    """[N, width] whose product with the head's `draft_table` [V, width] is the draft's logits."""
    teacher: Teacher


def draft_batch(
    model: torch.nn.Module,
    target: Target,
    batch: Batch,
    dtype: torch.dtype,
    position: DraftPositionOffset,
) -> BatchDrafts:
    """Run the head over a batch and pair what it says with what the target says.

    Args:
        model: a `DraftHead`, wrapped or not.
        target: for its embeddings.
        batch: B rows of keys and values, R anchors in each, K rounds.
        dtype: of the shared KV; with bfloat16 under autocast, the weights staying float32.
        position: where the drafts stand.
    """
    texts, drafts = batch.texts.computed_in(dtype), batch.drafts
    with torch.autocast(batch.weights.device.type, torch.bfloat16, enabled=dtype == torch.bfloat16):
        states = model(texts, batch.rows, target.embed, position)
    teacher = Teacher(
        hidden=texts.hidden.flatten(0, 1).index_select(0, drafts.positions),
        at=drafts.teacher,
        ids=batch.teacher_ids.flatten(0, 1)[drafts.anchor, drafts.round],
        logprobs=batch.teacher_logprobs.flatten(0, 1)[drafts.anchor, drafts.round],
    )
    flat = torch.cat([state.flatten(0, 1) for state in states])
    return BatchDrafts(flat.index_select(0, drafts.state), teacher)


def step_candidates(
    batches: list[Batch],
    likely: torch.Tensor,
    c: TrainConfig,
    seed: int,
    reduce: Callable[[torch.Tensor], torch.Tensor],
) -> Candidates | None:
    """The candidates of one optimizer step, the same for all its batches and processes: a step over
    one large batch and over the same batch in parts then have the same gradient.

    Args:
        batches: of this process.
        likely: [V] bool, tokens that are candidates always, beside the teachers'.
        c: vocabulary, negatives.
        seed: of the negatives, the same in all processes.
        reduce: adds a tensor up over the processes.

    Returns:
        None where `c.vocabulary` is exact.
    """
    if c.vocabulary == "exact":
        return None
    kept = likely.int()
    for batch in batches:
        ids = batch.teacher_ids.flatten(0, 1)[batch.drafts.anchor, batch.drafts.round]
        kept.index_fill_(0, ids.flatten(), 1)
    return draw_candidates(reduce(kept) > 0, c.negatives, seed)


def batch_sums(
    model: torch.nn.Module,
    target: Target,
    batch: Batch,
    c: TrainConfig,
    candidates: Candidates | None,
) -> dict[str, torch.Tensor]:
    """Forward the head over a batch and sum its losses and acceptance.

    Args:
        model: a `DraftHead`, wrapped or not.
        target: for its embeddings and table.
        batch: B rows of keys and values, R anchors in each, K rounds.
        c: objective, temperature, unroll, weights of the rounds, precision.
        candidates: that the softmax runs over, from `step_candidates`; None: the whole vocabulary.

    Returns:
        Scalars: `loss_sum` (weighted by round); `accepted` (drafts in a row from the first that
        are the teacher's best token, over the candidates) of the anchors `beyond` the first
        round; `rows`, all anchors.
    """
    dtype = torch.bfloat16 if c.mixed_precision == "bf16" else torch.float32
    table = extract_model_from_parallel(model).draft_table(target.table)
    drafts = draft_batch(model, target, batch, dtype, c.draft_position_offset)
    teacher, objective = drafts.teacher, OBJECTIVES[c.objective]
    common = (objective, c.temperature, dtype, table)
    if candidates is None:
        found = exact_losses(drafts.states, target, teacher, *common)
    else:
        found = sparse_losses(drafts.states, target, teacher, candidates, *common)
    weights = (c.step_loss_decay**batch.drafts.round).float()
    if c.unroll == "reached":
        weights = weights * _reached(found.drafts, batch)
    losses = {"loss_sum": (found.losses * weights).sum()}
    return losses | _accepted_in_a_row(found.drafts == teacher.ids[:, 0], batch)


def _reached(ids: torch.Tensor, batch: Batch) -> torch.Tensor:
    """[N] 1 where all earlier drafts of the round are the text's tokens, else 0.

    Args:
        ids: [N] tokens drafted.
    """
    right = _by_anchor(ids, batch)[:, :-1] == batch.rows.tokens.flatten(0, 1)[:, 1:]
    reached = torch.cat([torch.ones_like(right[:, :1]), right.cumprod(-1)], dim=-1)
    return reached[batch.drafts.anchor, batch.drafts.round].float()


def _by_anchor(values: torch.Tensor, batch: Batch) -> torch.Tensor:
    """Values [N] of the drafts as [B x R, K], 0 where there is none."""
    b, r, rounds = batch.weights.shape
    table = values.new_zeros(b * r, rounds)
    table[batch.drafts.anchor, batch.drafts.round] = values
    return table


def _accepted_in_a_row(hits: torch.Tensor, batch: Batch) -> dict[str, torch.Tensor]:
    """The leading hits of the anchors that go beyond the first round, and how many anchors do."""
    first, beyond = (*batch.drafts.of_round, 0)[:2]
    hit = _by_anchor(hits.float(), batch)[batch.drafts.anchor[first : first + beyond]]
    return {
        "accepted": hit.cumprod(-1).sum(),
        "beyond": hits.new_full((), beyond, dtype=torch.float32),
        "rows": hits.new_full((), first, dtype=torch.float32),
    }


def optimizer_step(
    state: RunState,
    batches: list[Batch],
    likely: torch.Tensor,
    target: Target,
    config: Config,
    accelerator: Accelerator,
    stop_requests: Sequence[object] = (),
    seconds: float = 0.0,
) -> "StepResult":
    """Take the next step over `batches`; all processes must call it.

    Args:
        state: of the run; its weights, average and count of steps move.
        batches: of this process.
        likely: as of `step_candidates`.
        target: for its embeddings and table.
        config: of the run.
        accelerator: that prepared the head.
        stop_requests: signals that this process has got; more may come in during the step.
        seconds: since the step before, by the clock of the main process, which all go by.

    Returns:
        What can be read once the device is done with the step, and must be before anything of the
        state is kept: the loss may not have been finite.
    """
    c, step = config.train, state.progress.step
    spent = state.progress.seconds / (60 * c.max_minutes) if c.max_minutes else 0.0
    rate = learning_rate(step, c.max_steps, c.warmup_steps, c.learning_rate, spent)
    for group in state.optimizer.param_groups:
        group["lr"] = rate
    # One mean over all drafts of the step, whatever batch and process they are in.
    weight = torch.stack([loss_weight(batch, c.step_loss_decay) for batch in batches]).sum()
    denominator = accelerator.reduce(weight).clamp_min(1e-6)
    seed = config.seed * 1_000_003 + step
    candidates = step_candidates(batches, likely, c, seed, accelerator.reduce)
    totals: dict[str, torch.Tensor] = {}
    for number, batch in enumerate(batches, start=1):
        last = number == len(batches)
        with nullcontext() if last else accelerator.no_sync(state.model):
            sums = batch_sums(state.model, target, batch, c, candidates)
            # DDP averages gradients over processes; this makes it the sum.
            loss = sums["loss_sum"] * accelerator.num_processes / denominator
            accelerator.backward(loss)
        for name, value in sums.items():
            totals[name] = totals.get(name, torch.zeros_like(value)) + value.detach()
    clipped = accelerator.clip_grad_norm_(state.head.trainable().values(), c.max_grad_norm)
    state.optimizer.step()
    state.optimizer.zero_grad()
    state.progress.step = step + 1
    state.average.update(step + 1)
    told = [float(len(stop_requests)), seconds if accelerator.is_main_process else 0.0]
    own = torch.stack([*totals.values(), *(weight.new_full((), one) for one in told)])
    shared = torch.stack([denominator, full_tensor(clipped)])
    return StepResult(
        step + 1, rate, (*totals, "stop", "seconds", "weight", "gradient norm"),
        Readback(torch.cat([accelerator.reduce(own), shared])),
    )  # fmt: skip


@dataclass(frozen=True)
class StepResult:
    """What a step computed, over all batches and processes, on its way to the host."""

    step: int
    """From 1."""
    learning_rate: float
    names: tuple[str, ...]
    values: Readback

    def read(self, batches: Callable[[], list[Batch]], run: Path) -> dict[str, float]:
        """Wait until it is there.

        Args:
            batches: gives those of this process once more, for an error.
            run: the run folder.

        Returns:
            `loss`, the mean over the drafts, each with the weight of its round;
            `batch_acceptance_length`, over the anchors of the step that go on beyond the first
            round, drafts compared over its candidates alone, for watching; `learning_rate`;
            `grad_norm` before it was clipped; `rows`, the anchors; `stop`, the number of signals;
            `seconds`.

        Raises:
            Diverged: the loss or the gradient is not finite, in all processes.
        """
        found = dict(zip(self.names, self.values.tolist(), strict=True))
        if not all(map(math.isfinite, found.values())):
            raise diverged(self.step, found, batches(), run)
        return {
            "loss": found["loss_sum"] / found["weight"],
            "batch_acceptance_length": 1 + found["accepted"] / max(found["beyond"], 1),
            "learning_rate": self.learning_rate,
            "grad_norm": found["gradient norm"],
            "rows": found["rows"],
            "stop": found["stop"],
            "seconds": found["seconds"],
        }


def loss_weight(batch: Batch, step_loss_decay: float) -> torch.Tensor:
    """The sum of the weights of all drafts of a batch, scalar: what a mean loss divides by."""
    rounds = torch.arange(batch.weights.shape[-1], device=batch.weights.device)
    return (batch.weights * step_loss_decay**rounds).sum()


NAMED = 16  # documents named in an error


class Diverged(RuntimeError):
    """A loss or a gradient is not finite; the message names the documents and a way on."""


def diverged(step: int, found: dict[str, float], batches: list[Batch], run: Path) -> Diverged:
    """What to raise where `step` has come to something that is not finite; all processes must call
    it.

    Args:
        step: from 1; nothing that it did has been kept.
        found: the step's sums and norm.
        batches: of this process.
        run: the run folder.
    """
    names = gather_object([name for b in batches for row in b.document_ids for name in row])
    broken = gather_object([name for batch in batches for name in broken_documents(batch)])
    what = ", ".join(f"{k} is {v}" for k, v in found.items() if not math.isfinite(v))
    cure = "lower train.learning_rate, or look at these documents"
    if broken:
        cure = f"activations of {_listed(broken)} are not finite: make their store again"
    saved = checkpoints(run / "checkpoints")
    last = f"the last good checkpoint is {saved[-1]}" if saved else "there is no checkpoint yet"
    return Diverged(
        f"step {step} was not kept, {what}, over the documents {_listed(names)}; {last}; {cure}"
    )


def _listed(names: list[str]) -> str:
    more = f" and {len(names) - NAMED} more" if len(names) > NAMED else ""
    return ", ".join(names[:NAMED]) + more


def learning_rate(
    step: int, steps: int, warmup: int, peak: float, time_spent: float = 0.0
) -> float:
    """Linear warm-up, then a cosine to a tenth of the peak.

    Args:
        step: steps done.
        steps: of the whole run.
        warmup: steps of the warm-up.
        peak: learning rate after it.
        time_spent: share of the run's time, where that is limited; the cosine is as far as the one
            of both that is further.
    """
    if step < warmup:
        return peak * (step + 1) / warmup
    progress = max((step - warmup) / max(steps - warmup, 1), min(time_spent, 1.0))
    return peak * (0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * progress)))

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

from headstart.common.processes import full_tensor
from headstart.configs.schema import Config, DraftPositionOffset, TrainConfig
from headstart.data.loader import Batch, broken_documents
from headstart.heads.target import Target
from headstart.heads.unroll import select
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
    """The N drafts of a batch that count, in the order of rounds, conversations and anchors."""

    round: torch.Tensor
    """[N] from 0."""
    anchor: torch.Tensor
    """[N] index into the B x R anchors."""
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
    texts = batch.texts.computed_in(dtype)
    with torch.autocast(batch.weights.device.type, torch.bfloat16, enabled=dtype == torch.bfloat16):
        states = model(texts, batch.rows, target.embed, position)
    b, r, rounds = batch.weights.shape
    anchors = torch.arange(b * r, device=batch.weights.device).view(b, r)
    counted, of_round, of_anchor = [], [], []
    for k in range(rounds):
        which, kept = anchors, batch.weights[..., k] > 0
        if k:
            # Places that only fill up repeat anchor 0 and do not count.
            which = select(anchors, batch.rows.multi_step)
            kept = select(kept, batch.rows.multi_step) & (batch.rows.multi_step >= 0)
        counted.append(kept)
        of_anchor.append(which[kept])
        of_round.append(torch.full_like(of_anchor[-1], k))
    anchor, round_ = torch.cat(of_anchor), torch.cat(of_round)
    picked = torch.cat([s[kept] for s, kept in zip(states, counted, strict=True)])
    return BatchDrafts(round_, anchor, picked, _teacher(batch, anchor, round_))


def _teacher(batch: Batch, anchor: torch.Tensor, round_: torch.Tensor) -> Teacher:
    """What the target says at row t + k of its texts, of draft k (from 1) of the anchor at row t:
    `round_` counts from 0."""
    hidden, anchors = batch.texts.hidden, batch.rows.at
    row = anchors.flatten()[anchor] + round_ + 1
    conversation, length = anchor // anchors.shape[1], hidden.shape[1]
    positions, at = torch.unique(conversation * length + row, return_inverse=True)
    ids = batch.teacher_ids.flatten(0, 1)[anchor, round_]
    logprobs = batch.teacher_logprobs.flatten(0, 1)[anchor, round_]
    return Teacher(hidden.flatten(0, 1)[positions], at, ids, logprobs)


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
        kept[batch.teacher_ids[batch.weights > 0]] = 1
    return draw_candidates(reduce(kept) > 0, c.negatives, torch.Generator().manual_seed(seed))


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
    weights = (c.step_loss_decay**drafts.round).float()
    if c.unroll == "reached":
        weights = weights * _reached(found.drafts, drafts, batch)
    losses = {"loss_sum": (found.losses * weights).sum()}
    return losses | _accepted_in_a_row(found.drafts == teacher.ids[:, 0], drafts, batch)


def _reached(ids: torch.Tensor, drafts: BatchDrafts, batch: Batch) -> torch.Tensor:
    """[N] 1 where all earlier drafts of the round are the text's tokens, else 0.

    Args:
        ids: [N] tokens drafted.
    """
    right = _by_anchor(ids, drafts, batch)[:, :-1] == batch.rows.tokens.flatten(0, 1)[:, 1:]
    reached = torch.cat([torch.ones_like(right[:, :1]), right.cumprod(-1)], dim=-1)
    return reached[drafts.anchor, drafts.round].float()


def _by_anchor(values: torch.Tensor, drafts: BatchDrafts, batch: Batch) -> torch.Tensor:
    """Values [N] of the drafts as [B x R, K], 0 where there is none."""
    b, r, rounds = batch.weights.shape
    table = values.new_zeros(b * r, rounds)
    table[drafts.anchor, drafts.round] = values
    return table


def _accepted_in_a_row(
    hits: torch.Tensor, drafts: BatchDrafts, batch: Batch
) -> dict[str, torch.Tensor]:
    """The leading hits of the anchors that go beyond the first round, and how many anchors do."""
    hit = _by_anchor(hits.float(), drafts, batch)
    beyond = drafts.anchor[drafts.round == 1]
    return {
        "accepted": hit[beyond].cumprod(-1).sum(),
        "beyond": (drafts.round == 1).sum().float(),
        "rows": (drafts.round == 0).sum().float(),
    }


def optimizer_step(
    state: RunState,
    batches: list[Batch],
    likely: torch.Tensor,
    target: Target,
    config: Config,
    accelerator: Accelerator,
    stop_requests: Sequence[object] = (),
) -> dict[str, float]:
    """Take the next step over `batches`; all processes must call it.

    Args:
        state: of the run; its weights, average and count of steps move.
        batches: of this process.
        likely: as of `step_candidates`.
        target: for its embeddings and table.
        config: of the run.
        accelerator: that prepared the head.
        stop_requests: signals that this process has got; more may come in during the step.

    Returns:
        Over all batches and processes: `loss`, the mean over the drafts, each with the weight of
        its round; `batch_acceptance_length`, over the anchors of the step that go on beyond the
        first round, drafts compared over its candidates alone, for watching; `learning_rate`;
        `grad_norm` before it was clipped; `rows`, the anchors; `stop`, the number of signals.

    Raises:
        Diverged: a loss or a gradient is not finite; the step is not taken.
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
    norm = float(full_tensor(clipped))
    totals["stop"] = torch.tensor(float(len(stop_requests)), device=accelerator.device)
    reduced = {name: float(accelerator.reduce(value)) for name, value in totals.items()}
    if not all(map(math.isfinite, [norm, *reduced.values()])):
        raise diverged(step + 1, norm, reduced, batches, config.output_dir)
    state.optimizer.step()
    state.optimizer.zero_grad()
    state.progress.step = step + 1
    state.average.update(step + 1)
    return {
        "loss": reduced["loss_sum"] / float(denominator),
        "batch_acceptance_length": 1 + reduced["accepted"] / max(reduced["beyond"], 1),
        "learning_rate": rate,
        "grad_norm": norm,
        "rows": reduced["rows"],
        "stop": reduced["stop"],
    }


def loss_weight(batch: Batch, step_loss_decay: float) -> torch.Tensor:
    """The sum of the weights of all drafts of a batch, scalar: what a mean loss divides by."""
    rounds = torch.arange(batch.weights.shape[-1], device=batch.weights.device)
    return (batch.weights * step_loss_decay**rounds).sum()


NAMED = 16  # documents named in an error


class Diverged(RuntimeError):
    """A loss or a gradient is not finite; the message names the documents and a way on."""


def diverged(
    step: int, norm: float, reduced: dict[str, float], batches: list[Batch], run: Path
) -> Diverged:
    """What to raise in place of taking `step`; all processes must call it.

    Args:
        step: that was not taken.
        norm: of the gradient.
        reduced: the step's sums.
        batches: of this process.
        run: the run folder.
    """
    names = gather_object([name for b in batches for row in b.document_ids for name in row])
    broken = gather_object([name for batch in batches for name in broken_documents(batch)])
    odd = {"gradient norm": norm, **reduced}
    what = ", ".join(f"{k} is {v}" for k, v in odd.items() if not math.isfinite(v))
    cure = "lower train.learning_rate, or look at these documents"
    if broken:
        cure = f"activations of {_listed(broken)} are not finite: make their store again"
    saved = checkpoints(run / "checkpoints")
    last = f"the last good checkpoint is {saved[-1]}" if saved else "there is no checkpoint yet"
    return Diverged(
        f"step {step} was not taken, {what}, over the documents {_listed(names)}; {last}; {cure}"
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

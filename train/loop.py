"""The training loop: prompts -> conversations -> activations -> head, read from top to bottom.

Letters: B conversations, R rows of each, K rounds, D target width, C candidates, k teacher tokens.
"""

import json
import math
import random
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import zip_longest
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed

from headstart.configs.loader import dump_config, save_config
from headstart.configs.schema import Config, DataConfig
from headstart.data.activations import ActivationStore, extract_activations
from headstart.data.conversations import generate_conversations
from headstart.data.loader import AnchorLoader, Batch
from headstart.data.progress import progress_bar
from headstart.data.prompts import Prompt, load_prompts, split_by_source
from headstart.eval.simulate import simulate_acceptance
from headstart.heads.assistant import build_assistant, low_rank_start, save_assistant
from headstart.heads.targets import Target, load_target
from headstart.heads.unroll import DraftHead
from headstart.train.checkpoints import checkpoints, load_checkpoint, save_checkpoint
from headstart.train.objectives import draw_candidates, sparse_forward_kl


class Interrupted(Exception):
    """The run was asked to stop; everything is saved. The message says how to go on."""


def train(config: Config, resume: bool = False) -> None:
    """Distill a head for `config.target` into the run folder.

    Writes config.yaml, metrics.jsonl, checkpoints/ and head/ (the best head, native format).

    Args:
        config: the whole run.
        resume: go on from the newest checkpoint where there is one.

    Raises:
        ValueError: the run folder holds another run, or the configuration does not fit.
        Interrupted: SIGINT or SIGTERM arrived; the last finished step is saved.
    """
    c = config.train
    accelerator = Accelerator(
        mixed_precision="bf16" if c.precision == "bfloat16" else "no",
        gradient_accumulation_steps=1,  # ours: the loss is divided before backward, see below
        log_with=None if config.wandb.mode == "disabled" else "wandb",
        project_dir=config.run.dir,
    )
    set_seed(config.run.seed)
    run = config.run.dir
    if accelerator.is_main_process:
        _open_run(config, resume)
    accelerator.wait_for_everyone()
    t = config.target
    target = load_target(t.name, t.dtype, t.revision, t.trust_remote_code, accelerator.device)
    with accelerator.main_process_first():
        training, validation = _stores(target, config.data, config.run.seed)

    head = _build_head(target, config, training).to(accelerator.device)
    optimizer = torch.optim.AdamW(_parameter_groups(head, c.weight_decay), lr=c.learning_rate)
    step, best = 0, -math.inf
    if resume and (saved := checkpoints(run / "checkpoints")):
        state = load_checkpoint(saved[-1], head, optimizer)
        step, best = state["step"], state["best"]
        accelerator.print(f"Resuming {run} after step {step}")
        _drop_metrics_after(run / "metrics.jsonl", step)
    model, optimizer = accelerator.prepare(head, optimizer)
    loader = AnchorLoader(
        training, c.batch_size, c.anchors, c.rounds, config.run.seed,
        accelerator.process_index, accelerator.num_processes,
    )  # fmt: skip
    if config.wandb.mode != "disabled":
        kwargs = {"wandb": {"mode": config.wandb.mode, "dir": str(run), "name": run.name}}
        accelerator.init_trackers(config.wandb.project, config.model_dump(mode="json"), kwargs)
    round_weights = c.round_decay ** torch.arange(c.rounds, device=accelerator.device)

    def save() -> None:
        if accelerator.is_main_process:
            save_checkpoint(run / "checkpoints", step, head, optimizer, {"best": best})

    with progress_bar(disable=not accelerator.is_main_process) as bar, _stop_signals() as stopped:
        task = bar.add_task("Training", total=c.steps, completed=step, status="")
        while step < c.steps:
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(step, c.steps, c.warmup_steps, c.learning_rate)
            metrics: dict[str, torch.Tensor] = {}
            for micro in range(c.gradient_accumulation_steps):
                number = step * c.gradient_accumulation_steps + micro
                batch = loader.batch(number).to(accelerator.device)
                sums = objective(
                    model, target, batch, round_weights, c.negatives, number, accelerator
                )
                loss = sums["loss_sum"] / sums["loss_count"].clamp_min(1e-6)
                accelerator.backward(loss / c.gradient_accumulation_steps)
                for name, value in sums.items():
                    metrics[name] = metrics.get(name, 0) + value.detach()
            norm = accelerator.clip_grad_norm_(model.parameters(), c.max_grad_norm)
            optimizer.step()
            optimizer.zero_grad()
            step += 1

            done = bar.tasks[task]
            totals = {k: float(accelerator.reduce(v)) for k, v in metrics.items()}
            row = {
                "step": step,
                "loss": totals["loss_sum"] / max(totals["loss_count"], 1e-6),
                # Drafts compared over the batch's candidates, so a little flattering.
                "batch_acceptance_length": 1 + totals["accepted"] / max(totals["rows"], 1),
                "learning_rate": optimizer.param_groups[0]["lr"],
                "grad_norm": float(norm),
                "rows": totals["rows"],
            }
            if step % c.validate_every == 0 or step == c.steps:
                length = _validate(accelerator, head, target, validation, c.rounds)
                row["acceptance_length"] = length
                if length > best:
                    best = length
                    if accelerator.is_main_process:
                        export_head(head, target, run / "head", c.rounds)
            _log(accelerator, run, row)
            rate = row["rows"] * (done.speed or 0.0)
            best_text = f" best {best:.2f}" if best > 0 else ""
            bar.update(
                task,
                completed=step,
                status=f"loss {row['loss']:.3f} accept {row['batch_acceptance_length']:.2f}"
                f"{best_text} {rate:.0f} tok/s",
            )
            if step % c.checkpoint_every == 0 or step == c.steps or stopped:
                save()
            if stopped:
                raise Interrupted(f"stopped after step {step}, saved; go on with --resume")
    accelerator.end_training()


def objective(
    model: torch.nn.Module,
    target: Target,
    batch: Batch,
    round_weights: torch.Tensor,
    negatives: int,
    number: int,
    accelerator: Accelerator,
) -> dict[str, torch.Tensor]:
    """Loss and acceptance of one batch, as sums and counts.

    Returns:
        Scalars `loss_sum`, `loss_count` (both weighted by round), `accepted` (drafts matched in
        a row from the first), `rows`.
    """
    generator = torch.Generator().manual_seed(number)
    # [B, R, K, ...] -> [K, B, R, ...], the order of the head's states.
    teacher_ids = batch.teacher_ids.permute(2, 0, 1, 3)
    teacher_logprobs = batch.teacher_logprobs.permute(2, 0, 1, 3)
    kept = batch.weights.permute(2, 0, 1)
    candidates = draw_candidates(teacher_ids, len(target.table), negatives, generator)
    dtype = torch.bfloat16 if accelerator.mixed_precision == "bf16" else torch.float32
    shared_kv = {t: (k.to(dtype), v.to(dtype)) for t, (k, v) in batch.shared_kv.items()}
    with accelerator.autocast():
        states = model(
            batch.hidden.float(), target.embed(batch.tokens).float(), batch.rows, shared_kv
        )  # [K, B, R, D]
        table = target.table[candidates.ids].to(dtype)
        logits = torch.nn.functional.linear(states.flatten(0, 2), table)  # [K*B*R, C]
    loss = sparse_forward_kl(
        logits,
        candidates.log_weights,
        candidates.slots.flatten(0, 2),
        teacher_logprobs.flatten(0, 2),
    ).view(kept.shape)
    weights = kept * round_weights[:, None, None]
    with torch.no_grad():
        hit = logits.argmax(-1).view(kept.shape) == candidates.slots[..., 0]
        accepted = (hit & kept.bool()).long().cumprod(dim=0).sum()
    return {
        "loss_sum": (loss * weights).sum(),
        "loss_count": weights.sum(),
        "accepted": accepted.float(),
        "rows": kept[0].sum(),
    }


def learning_rate(step: int, steps: int, warmup: int, peak: float) -> float:
    """Linear warm-up, then a cosine to a tenth of the peak; a function of the step alone."""
    if step < warmup:
        return peak * (step + 1) / warmup
    progress = (step - warmup) / max(steps - warmup, 1)
    return peak * (0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * progress)))


def export_head(head: DraftHead, target: Target, folder: Path, rounds: int) -> None:
    """Save the head in the native format and in the target's dtype, so that both load as one."""
    table = head.table(target.table)
    save_assistant(head.assistant, table, folder, rounds, target.table.dtype)


def _open_run(config: Config, resume: bool) -> None:
    run, text = config.run.dir, dump_config(config)
    saved = run / "config.yaml"
    if saved.is_file():
        if not resume:
            raise ValueError(
                f"{run} holds a run already: go on with --resume, or name another folder, "
                "run.dir=PATH"
            )
        change = changed_line(saved.read_text(encoding="utf-8"), text)
        if change:
            raise ValueError(f"{run} was started with another configuration: {change}")
    run.mkdir(parents=True, exist_ok=True)
    save_config(config, saved)


def changed_line(earlier: str, now: str) -> str:
    """The first difference of two resolved configurations, in words; empty if there is none."""
    for a, b in zip_longest(earlier.splitlines(), now.splitlines(), fillvalue=""):
        if a != b:
            return f"{b.strip()!r}, was {a.strip()!r}"
    return ""


def _stores(target: Target, data: DataConfig, seed: int) -> tuple[ActivationStore, ActivationStore]:
    """Training and validation activations; validation text is greedy and of other sources."""
    prompts = [p for path in data.prompts for p in load_prompts(path)]
    training, validation = split_by_source(prompts, data.validation_conversations)
    chosen = deal(training, data.num_conversations, seed)
    heats = [data.temperatures[i % len(data.temperatures)] for i in range(len(chosen))]
    written = generate_conversations(target, chosen, heats, data, seed, "Generating")
    greedy = [0.0] * len(validation)
    held_out = generate_conversations(target, validation, greedy, data, seed, "  held out")
    return (
        extract_activations(target, written, data, "Extracting"),
        extract_activations(target, held_out, data, "  held out"),
    )


def deal(prompts: list[Prompt], count: int, seed: int) -> list[Prompt]:
    """`count` prompts in a shuffled order, starting over where there are fewer."""
    rng = random.Random(seed)
    dealt: list[Prompt] = []
    while len(dealt) < count:
        dealt += rng.sample(prompts, len(prompts))
    return dealt[:count]


def _build_head(target: Target, config: Config, store: ActivationStore) -> DraftHead:
    assistant = build_assistant(target, config.head)
    width = assistant.config.text_config.hidden_size
    if width == target.config.hidden_size:
        return DraftHead(assistant)
    documents = [store[i] for i in range(min(len(store), 256))]
    hidden = torch.cat([d.hidden[d.prompt_len - 1 :] for d in documents])
    # The teacher's top tokens stand in for the token distribution, smoothed over the rest.
    weights = torch.full((len(target.table),), 1e-9)
    for d in documents:
        ids, p = (
            d.teacher_ids[d.prompt_len - 1 :].long(),
            d.teacher_logprobs[d.prompt_len - 1 :].exp(),
        )
        weights.index_add_(0, ids.flatten(), p.flatten())
    device = target.table.device
    return DraftHead(
        assistant, low_rank_start(target.table, hidden.to(device), weights.to(device), width)
    )


def _parameter_groups(head: DraftHead, weight_decay: float) -> list[dict[str, Any]]:
    parameters = head.trainable().values()
    return [
        {"params": [p for p in parameters if p.ndim > 1], "weight_decay": weight_decay},
        {"params": [p for p in parameters if p.ndim <= 1], "weight_decay": 0.0},
    ]


def _validate(
    accelerator: Accelerator, head: DraftHead, target: Target, store: ActivationStore, rounds: int
) -> float:
    """Acceptance length on the held-out conversations, every process walking its share."""
    share = range(accelerator.process_index, len(store), accelerator.num_processes)
    with accelerator.autocast():
        counts = simulate_acceptance(head, target, store, rounds, share)
    sums = torch.tensor([sum(counts.accepted), counts.rounds], device=accelerator.device)
    accepted, walked = accelerator.reduce(sums).tolist()
    return 1 + accepted / max(walked, 1)


def _log(accelerator: Accelerator, run: Path, row: dict[str, Any]) -> None:
    if accelerator.is_main_process:
        with (run / "metrics.jsonl").open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")
    accelerator.log({k: v for k, v in row.items() if k != "step"}, step=row["step"])


def _drop_metrics_after(path: Path, step: int) -> None:
    rows = [line for line in path.read_text().splitlines() if json.loads(line)["step"] <= step]
    path.write_text("".join(f"{line}\n" for line in rows))


@contextmanager
def _stop_signals() -> Iterator[list[int]]:
    """Collect SIGINT and SIGTERM: the step in hand ends first. A second signal kills."""
    received: list[int] = []

    def note(number: int, frame: FrameType | None) -> None:
        received.append(number)
        signal.signal(number, earlier[number])

    earlier: dict[int, Any] = {}
    each: int
    for each in (signal.SIGINT, signal.SIGTERM):
        earlier[each] = signal.signal(each, note)
    try:
        yield received
    finally:
        for each, handler in earlier.items():
            signal.signal(each, handler)

"""What a training step costs beside the target's own forward, and what a low-rank tie keeps:
`headstart bench train` and `headstart bench tie`.

Letters: N drafts, D target width, V vocabulary.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import torch
from rich.table import Table

from headstart.configs.schema import Config, TrainConfig
from headstart.data.conversations import Conversation, answered
from headstart.data.extraction import OnlineActivations
from headstart.data.loader import AnchorLoader, Batch
from headstart.data.prepare import prepare_documents
from headstart.data.prompts import load_prompts
from headstart.data.templates import encode_prompts
from headstart.eval.benchmarks import bare_forwards, in_turns, print_figures, write_figures
from headstart.eval.environment import environment
from headstart.eval.memory import peak_memory
from headstart.heads.loading import open_target
from headstart.heads.progress import plain_console
from headstart.heads.targets import Target
from headstart.heads.ties import low_rank_agreement
from headstart.heads.unroll import DraftHead
from headstart.train.start import (
    AGREEMENT_ROWS,
    build_head,
    likely_tokens,
    taught_rows,
    tie_start,
)
from headstart.train.step import batch_sums, draft_batch, loss_weight, step_candidates

TIE_SHARES = (0.4, 0.6)  # widths measured, as shares of the target's
PROMPT_TOKENS = 8  # of each text; the rest stands in for an answer


def run_train_benchmark(config: Config, prompts: int, device: str, out: Path | None) -> None:
    """Measure, print and write what a step of a recipe costs.

    The texts are the recipe's prompts themselves, all but their beginning taken as answers: what a
    step costs depends on lengths and on how many tokens the teachers rank high, not on who wrote.

    Args:
        config: target, head and training settings; its batch is `prompts` conversations.
        prompts: of the first source of `config.data`, the longest of them.
        device: where it all runs.
        out: a JSON file.

    Raises:
        ValueError: bad prompts or target.
    """
    if out is not None:
        out.parent.mkdir(parents=True, exist_ok=True)
    t, c = config.target, config.train
    target = open_target(config.target, device)
    texts = conversations_of_text(target, config, prompts)
    documents = OnlineActivations(target, texts, config.data)
    taught = taught_rows(documents, target.device)
    head = build_head(target, config, taught, documents, resumed=False)
    batch = AnchorLoader(
        documents, prompts, c.anchors, c.rounds, config.run.seed, later_anchors=c.later_anchors
    ).batch(0)
    likely = likely_tokens(target, taught, c)
    figures = bench_step(target, head, batch.to(target.device), texts, config, likely)
    content = {
        "benchmark": "train",
        "environment": environment(target.device)
        | {
            "target": t.name,
            "dtype": str(target.table.dtype).removeprefix("torch."),
            "precision": c.precision,
            "prompts": prompts,
            "head": config.head.model_dump(),
            "rounds": c.rounds,
            "likely_tokens": c.likely_tokens,
            "negatives": c.negatives,
        },
        **figures,
    }
    print_figures(content)
    write_figures(content, out)


def conversations_of_text(target: Target, config: Config, count: int) -> list[Conversation]:
    """The longest prompts as conversations: some tokens given, all others taken as the answer."""
    prompts = load_prompts(config.data.prompts[0], config.data.max_bad_rows)
    kwargs = config.data.chat_template_kwargs
    encoded = encode_prompts(prompts, target.tokenizer, kwargs)
    longest = sorted(encoded, key=len, reverse=True)[:count]
    length = config.data.max_prompt_tokens
    return [
        answered(ids[:PROMPT_TOKENS], ids[PROMPT_TOKENS:length], id=str(i), category="", source="")
        for i, ids in enumerate(longest)
    ]


def bench_step(
    target: Target,
    head: DraftHead,
    batch: Batch,
    texts: list[Conversation],
    config: Config,
    likely: torch.Tensor,
) -> dict[str, Any]:
    """Time and peak memory of the target's forward, the head's step, and the plain step.

    A token is one of text for the forward and an anchor, with all its rounds, for the steps.

    Returns:
        `ratios`: `step_over_forward` (per token), `plain_over_step` and `plain_over_step_memory`
        (the same rows); seconds and peak bytes per token of all three.
    """
    c = config.train
    parameters = list(head.trainable().values())
    optimizer = torch.optim.AdamW(parameters, lr=1e-6)

    def stepping(loss_of: Callable[[], torch.Tensor]) -> Callable[[int], None]:
        def step(turn: int) -> None:
            (loss_of() / loss_weight(batch, c.round_decay)).backward()
            torch.nn.utils.clip_grad_norm_(parameters, c.max_grad_norm)
            optimizer.step()
            optimizer.zero_grad()

        return step

    def sparse() -> torch.Tensor:
        candidates = step_candidates([batch], likely, c, config.run.seed, lambda kept: kept)
        return batch_sums(head, target, batch, c, candidates)["loss_sum"]

    sides = {
        "target forward with LM head": lambda turn: bare_forwards(target, texts),
        "head step": stepping(sparse),
        "head step, plain full-vocabulary objective": stepping(
            lambda: plain_loss(head, target, batch, c)
        ),
    }
    stepping(sparse)(0)  # a warm-up, which also makes the optimizer's moments
    peaks = [peak_memory(target.device, lambda side=side: side(0)) for side in sides.values()]  # type: ignore[misc]
    seconds = in_turns(target, *sides.values())
    tokens, anchors = sum(len(text.ids) for text in texts), int(batch.weights[..., 0].sum())
    per = [tokens, anchors, anchors]
    ratios = {
        "step_over_forward": (seconds[1] / anchors) / (seconds[0] / tokens),
        "plain_over_step": seconds[2] / seconds[1],
    }
    figures: dict[str, Any] = {
        "ratios": ratios,
        "seconds_per_token": {name: s / n for name, s, n in zip(sides, seconds, per, strict=True)},
        "tokens": tokens,
        "anchors": anchors,
        "drafts": int(batch.weights.sum()),
    }
    # None is not known; 0 is of a small call, which fits into memory that the process had freed.
    known = [peak for peak in peaks if peak]
    if len(known) == len(peaks):
        ratios["plain_over_step_memory"] = known[2] / known[1]
        figures["peak_bytes"] = dict(zip(sides, known, strict=True))
        figures["peak_bytes_per_token"] = {
            name: peak / n for name, peak, n in zip(sides, known, per, strict=True)
        }
    return figures


def plain_loss(head: DraftHead, target: Target, batch: Batch, c: TrainConfig) -> torch.Tensor:
    """Forward KL over all of V as one would write it down: [N, V] logits of both, whole."""
    dtype = torch.bfloat16 if c.precision == "bfloat16" else torch.float32
    drafts = draft_batch(head, target, batch, dtype, c.rope_position)
    log_p = target.logits(drafts.teacher.hidden).log_softmax(-1)[drafts.teacher.at]
    logits = torch.nn.functional.linear(drafts.states.to(dtype), target.table.to(dtype)).float()
    losses = torch.nn.functional.kl_div(
        logits.log_softmax(-1), log_p, reduction="none", log_target=True
    ).sum(-1)
    return (losses * c.round_decay**drafts.round).sum()


def run_tie_benchmark(config: Config, device: str, out: Path | None) -> None:
    """How often a low-rank tie keeps the target's best token, by width and start.

    The starts are drawn up from the training documents of `config.data` and judged on its held-out
    ones.

    Args:
        config: the target and its texts.
        device: where it all runs.
        out: a JSON file.

    Raises:
        ValueError: bad texts or target.
    """
    if out is not None:
        out.parent.mkdir(parents=True, exist_ok=True)
    t = config.target
    target = open_target(config.target, device)
    training, validation = prepare_documents(target, config.data, config.run.seed, None)
    taught = taught_rows(training, target.device)
    unseen = taught_rows(validation, target.device, AGREEMENT_ROWS).hidden
    kinds: tuple[Literal["data", "svd"], ...] = ("data", "svd")
    widths = [round(share * target.config.hidden_size) for share in TIE_SHARES]
    shares = {
        kind: {
            str(width): low_rank_agreement(
                target.table, tie_start(target, kind, taught, width), unseen
            )
            for width in widths
        }
        for kind in kinds
    }
    content = {
        "benchmark": "tie",
        "environment": environment(target.device)
        | {"target": t.name, "dtype": t.dtype, "prompts": len(validation.entries)},
        "rows": len(taught.hidden),
        "held_out_rows": len(unseen),
        "same_best_token": shares,
    }
    table = Table(title=f"tie: {t.name}, best token kept on {len(unseen):,} held-out rows")
    for name in ("width", *kinds):
        table.add_column(name, justify="right")
    for width in shares["data"]:
        table.add_row(width, *(f"{shares[kind][width]:.1%}" for kind in kinds))
    plain_console().print(table)
    write_figures(content, out)

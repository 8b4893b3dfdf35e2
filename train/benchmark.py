"""Speed as ratios that one run measures, the variants taking turns: `headstart bench`.

Letters: N drafts, D target width, V vocabulary.
"""

import resource
import time
from collections import Counter
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.table import Table

from headstart.common.children import temporary_folder
from headstart.common.console import plain_console
from headstart.common.files import write_figures
from headstart.common.machine import environment, machine_name, peak_memory
from headstart.common.versions import skips_prefill
from headstart.configs.schema import Config, TrainConfig
from headstart.data.background import to_device
from headstart.data.conversations import Conversation, answered, read_folder
from headstart.data.extraction import OnlineActivations, extract, forward_batches
from headstart.data.loader import Batch, candidate_rows, run_loader
from headstart.data.prepare import deal_sampling, inputs_read
from headstart.data.prompts import Prompt, load_prompts
from headstart.data.regenerate import Job, make_jobs, regenerate
from headstart.data.store import ActivationStore
from headstart.data.templates import encode_prompts
from headstart.eval.decoding import decode
from headstart.eval.draft_cost import in_turns
from headstart.eval.limits import products_counted, seconds_of
from headstart.eval.recorded import prompt_set
from headstart.heads.loading import open_target
from headstart.heads.target import Target
from headstart.heads.unroll import DraftHead
from headstart.train.start import (
    build_head,
    likely_tokens,
    make_optimizer,
    sample_teacher_rows,
)
from headstart.train.step import batch_sums, draft_batch, loss_weight, step_candidates

SINGLE = 8  # prompts answered one by one, spread over the lengths


def run_benchmark(name: str, config: Config, prompts: int, device: str, out: Path | None) -> None:
    """Run one benchmark, print its table and write its figures to `out`.

    Args:
        name: `extract`, `regenerate` or `train`.
        config: the target; how prompts are answered and stored, or head and training settings.
        prompts: of the first source of `config.data`.
        device: where it all runs.
        out: a JSON file.

    Raises:
        ValueError: bad prompts or target.
    """
    data = config.data
    source = data.prompts[0]
    if name != "train":  # which takes the longest of all
        source = source.model_copy(update={"limit": prompts})
    rows = load_prompts(source, data.max_bad_rows)
    recorded = prompt_set(source, rows)
    target = open_target(config.target, device)
    if name == "train":
        settings, figures = bench_train(target, config, rows, prompts)
    else:
        jobs = make_jobs(rows, deal_sampling(data, target, rows), target, data)
        prompts = len(jobs)
        settings = {
            "max_new_tokens": data.max_new_tokens,
            "batch_size": data.generation_batch_size,
            "storage": data.storage,
        }
        measure = bench_extract if name == "extract" else bench_regenerate
        figures = measure(target, jobs, config)
    what = {
        "target": config.target.name,
        "dtype": str(target.table.dtype).removeprefix("torch."),
        "prompts": prompts,
        "prompt_set": recorded,
    }
    content = {
        "benchmark": name,
        "environment": environment(target.device) | what | settings,
        **figures,
    }
    print_figures(content)
    write_figures(content, out)


def bench_extract(target: Target, jobs: list[Job], config: Config) -> dict[str, Any]:
    """What storing activations costs: beside a forward that was due anyway, and by itself.

    Returns:
        `extract_over_forward`: extraction to disk / the bare forward with its LM head over the
        same tokens in the same batches. `extract_over_gemm`: the products of matrices in it,
        alone / extraction to disk. `fused_over_regenerate`: `extract` without conversations /
        `regenerate`. `write_share`: of the former, the share in which the target waits for files.
        Tokens a second of all four. `stepwise`: what decoding step by step changes in the stored
        values.
    """
    data, seed = config.data, config.seed
    waited: list[float] = []
    counted: dict[int, Counter[tuple[int, int]]] = {}
    with temporary_folder() as work:

        def generating(extracting: bool) -> Callable[[int], None]:
            def run(turn: int) -> None:
                folder = work / f"{extracting}-{turn}"
                began = time.perf_counter()
                seconds = regenerate(
                    target, jobs, data, seed, folder,
                    extract=extracting, description="  answering",
                )  # fmt: skip
                if extracting:
                    waited.append(seconds / (time.perf_counter() - began))

            return run

        alone, fused = in_turns(target, generating(False), generating(True))
        recorded = work / "True-0"
        rows = list(read_folder(recorded))
        tokens = sum(len(row.ids) for row in rows)

        def extracting(turn: int) -> None:
            with products_counted(target) as forwards:
                extract(target, rows, tokens, data, work / f"store-{turn}")
            counted[turn] = forwards

        forward, stored = in_turns(target, lambda turn: bare_forwards(target, rows), extracting)
        difference = stepwise_difference(
            target, ActivationStore(recorded), ActivationStore(work / "store-0")
        )
    answers = sum(row.trained for row in rows)
    return {
        "ratios": {
            "extract_over_forward": stored / forward,
            "extract_over_gemm": seconds_of(target, counted[0]) / stored,
            "fused_over_regenerate": fused / alone,
            "write_share": min(waited),
        },
        "tokens_per_second": {
            "forward with LM head": tokens / forward,
            "extract": tokens / stored,
            "regenerate (answers alone)": answers / alone,
            "regenerate with activations (answers alone)": answers / fused,
        },
        "tokens": tokens,
        "answer_tokens": answers,
        "stepwise": difference,
        "peak_memory_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
    }


def bench_regenerate(target: Target, jobs: list[Job], config: Config) -> dict[str, Any]:
    """What batching is worth.

    Returns:
        `batched_over_single`: tokens a second of `regenerate` / of one-by-one greedy `generate`.
        `regenerate_over_gemm`: the products of matrices in `regenerate`, alone / all of it; not for
        targets that skip layers in a prefill, whose products are fewer than are counted.
    """
    chosen = jobs[:: max(1, len(jobs) // SINGLE)]
    singles: list[int] = []
    counted: dict[int, Counter[tuple[int, int]]] = {}
    with temporary_folder() as work:

        def batched(turn: int) -> None:
            folder = work / str(turn)
            with products_counted(target) as forwards:
                regenerate(
                    target, jobs, config.data, config.seed, folder,
                    extract=False, description="  batched",
                )  # fmt: skip
            counted[turn] = forwards

        def one_by_one(turn: int) -> None:
            singles.clear()
            for job in chosen:
                decoded = decode(target, job.prompt_ids, config.data.max_new_tokens)
                singles.append(len(decoded.tokens))

        decode(target, chosen[0].prompt_ids, 8)  # a warm-up
        seconds, seconds_single = in_turns(target, batched, one_by_one)
        tokens = sum(row.trained for row in read_folder(work / "0"))
    rates = {"batched": tokens / seconds, "one by one": sum(singles) / seconds_single}
    ratios = {"batched_over_single": rates["batched"] / rates["one by one"]}
    if not skips_prefill(target.config):
        ratios["regenerate_over_gemm"] = seconds_of(target, counted[0]) / seconds
    return {
        "ratios": ratios,
        "tokens_per_second": rates,
        "one_by_one_prompts": len(singles),
    }


@torch.inference_mode()
def bare_forwards(target: Target, conversations: list[Conversation]) -> None:
    """The target with its LM head over every token, in the batches that extraction takes."""
    for batch in forward_batches(conversations):
        rows = [torch.tensor(conversations[i].ids) for i in batch]
        padded = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True).to(target.device)
        mask = torch.nn.utils.rnn.pad_sequence([torch.ones_like(row) for row in rows], True)
        target.model(padded, attention_mask=mask.to(target.device), use_cache=False)


def stepwise_difference(
    target: Target, recorded: ActivationStore, clean: ActivationStore
) -> dict[str, Any]:
    """What the values recorded while decoding lie apart from those of one long forward.

    Over the rows that training reads.

    Returns:
        Relative errors (root of summed squares / that of the clean values) of hidden states, keys
        and values; of the teacher, the share of rows with the same best token, and the mean
        absolute difference of its log-probability.
    """
    sums: dict[str, torch.Tensor] = {}
    place = {entry.id: i for i, entry in enumerate(clean.entries)}
    for i, entry in enumerate(recorded.entries):
        (ours,), (theirs,) = recorded.read([i]), clean.read([place[entry.id]])
        rows = candidate_rows(ours)
        pairs = {"hidden": (ours.hidden[rows], theirs.hidden[rows])}
        for layer_type, kv in ours.shared_kv.items():
            for name, a, b in zip(
                ("keys", "values"), kv, theirs.shared_kv[layer_type], strict=True
            ):
                pairs[f"{layer_type}.{name}"] = (a[:-1], b[:-1])
        for name, (a, b) in pairs.items():
            apart = torch.stack([(a.float() - b.float()).square().sum(), b.float().square().sum()])
            sums[name] = sums.get(name, torch.zeros(2)) + apart
        same = ours.teacher_ids[rows, 0] == theirs.teacher_ids[rows, 0]
        gap = (ours.teacher_logprobs[rows, 0] - theirs.teacher_logprobs[rows, 0]).abs()
        told = torch.tensor([float(same.sum()), float(gap.sum()), float(len(rows))])
        sums["teacher"] = sums.get("teacher", torch.zeros(3)) + told
    agreed, gap, count = sums.pop("teacher").tolist()
    return {
        **{f"{name} relative error": float((a / b).sqrt()) for name, (a, b) in sums.items()},
        "same best token": agreed / max(count, 1),
        "best log-probability, mean difference": gap / max(count, 1),
    }


def print_figures(content: dict[str, Any]) -> None:
    """Print ratios, rates and differences as one table."""
    where = content["environment"]
    table = Table(
        title=f"{content['benchmark']}: {where['target']}, {where['dtype']}, {where['prompts']} "
        f"prompts, {machine_name(where)}",
        show_header=False,
    )
    forms = {
        "ratios": "{:.2f}",
        "tokens_per_second": "{:,.1f} tokens/s",
        "seconds_per_token": "{:.3g} s/token",
        "peak_bytes_per_token": "{:,.0f} bytes",
        "stepwise": "{:.3g}",
    }
    for section, form in forms.items():
        for name, value in content.get(section, {}).items():
            table.add_row(name, form.format(value))
        table.add_section()
    plain_console().print(table)


PROMPT_TOKENS = 8  # of each text; the rest stands in for an answer


def bench_train(
    target: Target, config: Config, rows: list[Prompt], prompts: int
) -> tuple[dict[str, Any], dict[str, Any]]:
    """What a step of a recipe costs, over one batch of so many conversations.

    The texts are the longest of the recipe's prompts, all but their beginning taken as answers:
    what a step costs depends on lengths and on how many tokens the teachers rank high, not on who
    wrote.

    Returns:
        The settings that count, and the figures of `bench_step`.
    """
    c = config.train
    texts = conversations_of_text(target, config, rows, prompts)
    inputs = inputs_read(config, target)
    documents = OnlineActivations(target, texts, config.data, inputs)
    samples = sample_teacher_rows(documents, target.device)
    head = build_head(target, config, samples, documents, resumed=False)
    loader = run_loader(documents, config, inputs, batch_size=prompts, max_packed_length=None)
    batch = to_device(loader.batch(0), target.device)
    likely = likely_tokens(target, samples, c)
    settings = {"head": config.head.model_dump()}
    settings |= c.model_dump(
        include={"mixed_precision", "num_speculative_steps", "likely_tokens", "negatives"}
    )
    return settings, bench_step(target, head, batch, texts, config, likely)


def conversations_of_text(
    target: Target, config: Config, prompts: list[Prompt], count: int
) -> list[Conversation]:
    """The longest prompts as conversations: some tokens given, all others taken as the answer."""
    encoded = encode_prompts(prompts, target.tokenizer, config.data.chat_template_kwargs)
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

    optimizer = make_optimizer(head, c)
    sparse = partial(batch_loss, head, target, batch, config, likely)
    step = partial(take_step, head, optimizer, batch, c, sparse)
    plain = partial(
        take_step, head, optimizer, batch, c, lambda: plain_loss(head, target, batch, c)
    )
    variants: dict[str, Callable[[int], None]] = {
        "target forward with LM head": lambda turn: bare_forwards(target, texts),
        "head step": step,
        "head step, plain full-vocabulary objective": plain,
    }
    step(0)  # a warm-up, which also makes the optimizer's moments
    peaks = [peak_memory(target.device, partial(variant, 0)) for variant in variants.values()]
    seconds = in_turns(target, *variants.values())
    tokens, anchors = sum(len(text.ids) for text in texts), int(batch.weights[..., 0].sum())
    per = [tokens, anchors, anchors]
    ratios = {
        "step_over_forward": (seconds[1] / anchors) / (seconds[0] / tokens),
        "plain_over_step": seconds[2] / seconds[1],
    }
    figures: dict[str, Any] = {
        "ratios": ratios,
        "seconds_per_token": {
            name: s / n for name, s, n in zip(variants, seconds, per, strict=True)
        },
        "tokens": tokens,
        "anchors": anchors,
        "drafts": int(batch.weights.sum()),
    }
    # None is not known; 0 is of a small call, which fits into memory that the process had freed.
    if all(peaks):
        known = [peak or 0 for peak in peaks]
        ratios["plain_over_step_memory"] = known[2] / known[1]
        figures["peak_bytes"] = dict(zip(variants, known, strict=True))
        figures["peak_bytes_per_token"] = {
            name: peak / n for name, peak, n in zip(variants, known, per, strict=True)
        }
    return figures


def batch_loss(
    head: DraftHead, target: Target, batch: Batch, config: Config, likely: torch.Tensor
) -> torch.Tensor:
    """The sum of the losses of a batch as a training step has it, of one process."""
    c = config.train
    candidates = step_candidates([batch], likely, c, config.seed, lambda kept: kept)
    return batch_sums(head, target, batch, c, candidates)["loss_sum"]


def take_step(
    head: DraftHead,
    optimizer: torch.optim.Optimizer,
    batch: Batch,
    c: TrainConfig,
    loss_of: Callable[[], torch.Tensor],
    turn: int,
) -> None:
    """One optimizer step over a batch, whose sum of losses `loss_of` gives; the `turn` is all the
    same."""
    (loss_of() / loss_weight(batch, c.step_loss_decay)).backward()
    torch.nn.utils.clip_grad_norm_(head.trainable().values(), c.max_grad_norm)
    optimizer.step()
    optimizer.zero_grad()


def plain_loss(head: DraftHead, target: Target, batch: Batch, c: TrainConfig) -> torch.Tensor:
    """Forward KL over all of V as one would write it down: [N, V] logits of both, whole."""
    dtype = torch.bfloat16 if c.mixed_precision == "bf16" else torch.float32
    drafts = draft_batch(head, target, batch, dtype, c.draft_position_offset)
    log_p = target.logits(drafts.teacher.hidden).log_softmax(-1)[drafts.teacher.at]
    logits = torch.nn.functional.linear(drafts.states.to(dtype), target.table.to(dtype)).float()
    losses = torch.nn.functional.kl_div(
        logits.log_softmax(-1), log_p, reduction="none", log_target=True
    ).sum(-1)
    return (losses * c.step_loss_decay**batch.drafts.round).sum()

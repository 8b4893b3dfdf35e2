"""Speed as ratios that one run measures, the sides taking turns: `headstart bench`."""

import json
import resource
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from headstart.configs.schema import Config
from headstart.data.conversations import Conversation, finished_parts, read_part
from headstart.data.extraction import extract, forward_batches
from headstart.data.jobs import Job, make_jobs
from headstart.data.loader import candidate_rows
from headstart.data.prepare import deal_sampling
from headstart.data.prompts import load_prompts
from headstart.data.regenerate import regenerate
from headstart.data.store import ActivationStore
from headstart.eval.decoding import decode, synchronize
from headstart.eval.environment import environment
from headstart.heads.files import write_atomically
from headstart.heads.leftovers import temporary_folder
from headstart.heads.loading import open_target
from headstart.heads.progress import plain_console, say
from headstart.heads.targets import Target

TURNS = 2  # of each side; the quicker one counts, since what disturbs a machine only slows it
SINGLE = 8  # prompts answered one by one, spread over the lengths


def run_benchmark(name: str, config: Config, prompts: int, device: str, out: Path | None) -> None:
    """Run one benchmark, print its table and write its figures to `out`.

    Args:
        name: `extract` or `regenerate`.
        config: the target, and how prompts are answered and stored.
        prompts: answered, from the first source of `config.data`.
        device: where the target runs.
        out: a JSON file.

    Raises:
        ValueError: bad prompts or target.
    """
    if out is not None:
        out.parent.mkdir(parents=True, exist_ok=True)
    t = config.target
    target = open_target(config.target, device)
    source = config.data.prompts[0].model_copy(update={"limit": prompts})
    rows = load_prompts(source, config.data.max_bad_rows)
    jobs = make_jobs(rows, deal_sampling(config.data, target, rows), target, config.data)
    measure = bench_extract if name == "extract" else bench_regenerate
    figures = measure(target, jobs, config)
    content = {
        "benchmark": name,
        "environment": environment(target.device)
        | {
            "target": t.name,
            "dtype": t.dtype,
            "prompts": len(jobs),
            "max_new_tokens": config.data.max_new_tokens,
            "batch_size": config.data.generation_batch_size,
            "storage": config.data.storage,
        },
        **figures,
    }
    print_figures(content)
    write_figures(content, out)


def write_figures(content: dict[str, Any], out: Path | None) -> None:
    """Write the figures of a benchmark as JSON, where `out` names a file."""
    if out is not None:
        write_atomically(out, json.dumps(content, indent=2) + "\n")
        say(f"Written: {out}")


def bench_extract(target: Target, jobs: list[Job], config: Config) -> dict[str, Any]:
    """What storing activations costs: beside a forward that was due anyway, and by itself.

    Returns:
        `extract_over_forward`: extraction to disk / the bare forward with its LM head over the
        same tokens in the same batches. `fused_over_regenerate`: `regenerate --extract` /
        `regenerate`. Tokens a second of all four. `stepwise`: what decoding step by step changes
        in the stored values.
    """
    data, seed = config.data, config.run.seed
    with temporary_folder() as work:

        def generating(extracting: bool) -> Callable[[int], None]:
            def run(turn: int) -> None:
                folder = work / f"{extracting}-{turn}"
                regenerate(target, jobs, data, seed, folder, extracting, "  answering")

            return run

        alone, fused = in_turns(target, generating(False), generating(True))
        recorded = work / "True-0"
        rows = [row for part in finished_parts(recorded) for row in read_part(part)]
        tokens = sum(len(row.ids) for row in rows)

        def extracting(turn: int) -> None:
            extract(target, rows, tokens, data, work / f"store-{turn}", "  extracting")

        forward, stored = in_turns(target, lambda turn: bare_forwards(target, rows), extracting)
        difference = stepwise_difference(
            target, ActivationStore(recorded), ActivationStore(work / "store-0")
        )
    answers = sum(row.trained for row in rows)
    return {
        "ratios": {
            "extract_over_forward": stored / forward,
            "fused_over_regenerate": fused / alone,
        },
        "tokens_per_second": {
            "forward with LM head": tokens / forward,
            "extract": tokens / stored,
            "regenerate (answers alone)": answers / alone,
            "regenerate --extract (answers alone)": answers / fused,
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
    """
    chosen = jobs[:: max(1, len(jobs) // SINGLE)]
    singles: list[int] = []
    with temporary_folder() as work:

        def batched(turn: int) -> None:
            folder = work / str(turn)
            regenerate(target, jobs, config.data, config.run.seed, folder, False, "  batched")

        def one_by_one(turn: int) -> None:
            singles.clear()
            for job in chosen:
                decoded = decode(target, job.prompt_ids, config.data.max_new_tokens)
                singles.append(len(decoded.tokens))

        decode(target, chosen[0].prompt_ids, 8)  # a warm-up
        seconds, seconds_single = in_turns(target, batched, one_by_one)
        parts = finished_parts(work / "0")
        tokens = sum(row.trained for part in parts for row in read_part(part))
    rates = {"batched": tokens / seconds, "one by one": sum(singles) / seconds_single}
    return {
        "ratios": {"batched_over_single": rates["batched"] / rates["one by one"]},
        "tokens_per_second": rates,
        "one_by_one_prompts": len(singles),
    }


def in_turns(target: Target, *sides: Callable[[int], None]) -> list[float]:
    """The quickest of `TURNS` turns of each side, in seconds: first to last, then last to first."""
    seconds: list[list[float]] = [[] for _ in sides]
    for turn in range(TURNS):
        order = range(len(sides))
        for side in order if turn % 2 == 0 else reversed(order):
            synchronize(target.device)
            start = time.perf_counter()
            sides[side](turn)
            synchronize(target.device)
            seconds[side].append(time.perf_counter() - start)
    return [min(turns) for turns in seconds]


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


def print_figures(content: dict[str, Any], console: Console | None = None) -> None:
    """Print ratios, rates and differences as one table."""
    where = content["environment"]
    table = Table(
        title=f"{content['benchmark']}: {where['target']}, {where['dtype']}, {where['prompts']} "
        f"prompts, {where['threads']} threads of {where['accelerator'] or where['processor']}",
        show_header=False,
    )
    sections = [("ratios", "{:.2f}"), ("tokens_per_second", "{:,.1f} tokens/s")]
    sections += [("seconds_per_token", "{:.3g} s/token"), ("peak_bytes_per_token", "{:,.0f} bytes")]
    sections += [("stepwise", "{:.3g}")]
    for section, form in sections:
        for name, value in content.get(section, {}).items():
            table.add_row(name, form.format(value))
        table.add_section()
    (console or plain_console()).print(table)

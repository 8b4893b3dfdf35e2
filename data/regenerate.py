"""On-policy conversations: the target answers the prompts, batched and resumable."""

import asyncio
from contextlib import nullcontext
from pathlib import Path

import torch
from accelerate import PartialState
from rich.progress import Progress
from transformers import GenerationConfig, LogitsProcessorList

from headstart.configs.schema import DataConfig
from headstart.data.conversations import (
    claim_folder,
    part_path,
    read_part,
    write_part,
)
from headstart.data.extraction import entries_of
from headstart.data.jobs import Job, batches_of, conversation_settings, conversations_of
from headstart.data.prompts import Prompt
from headstart.data.recording import Recorder
from headstart.data.sampling import SamplingMixture
from headstart.data.server import AnswerServer
from headstart.data.shards import shard_path, shard_settings, write_shard
from headstart.data.store import check_space, stored_bytes, write_index
from headstart.heads.few_rows import plain_strides
from headstart.heads.locks import alone_in
from headstart.heads.processes import in_step, is_mine, processes_in
from headstart.heads.progress import progress_bar, say
from headstart.heads.single_query import quick_single_queries
from headstart.heads.targets import Target
from headstart.heads.tokens import Sampling, TargetTokens

# What a process lets a split target answer while others have something to do.
_IDLE = Job("idle", Prompt("idle", "", "", [], raw=True), [0], Sampling(0.0))


def regenerate(
    target: Target,
    jobs: list[Job],
    config: DataConfig,
    seed: int,
    folder: Path,
    extract: bool,
    description: str = "Generating",
) -> None:
    """Let the target answer in process, and keep what it computes on the way where asked to.

    What an earlier call with the same settings has finished stays as it is.

    Args:
        target: the model that writes.
        jobs: from `make_jobs`.
        config: lengths, batch size, and how activations are stored.
        seed: each batch is a function of it and of the batch's number alone, so that a resumed
            call ends with the same conversations as an uninterrupted one.
        folder: for one Parquet part and, with `extract`, one shard of activations a batch.
        extract: whether to write the activation store from the same forwards.
        description: label of the progress bar.

    Raises:
        ValueError: the folder was begun with other settings, or its disk is too small.
        OSError: the disk is full; finished parts are kept.
    """
    longest = max(len(job.prompt_ids) for job in jobs) + config.max_new_tokens
    if extract and longest > config.max_tokens:
        raise ValueError(
            f"activations of {longest} tokens are longer than data.max_tokens={config.max_tokens}: "
            "raise it, or leave out --extract and run `headstart extract`, which cuts them"
        )
    batches = batches_of(jobs, config)
    made_with = conversation_settings(jobs, target, config, seed, extract)
    settings = shard_settings(target, config.teacher_top_k, config.storage)
    with processes_in(folder), progress_bar() as bar:
        if PartialState().is_main_process:
            claim_folder(folder, made_with, len(batches))
            if extract:
                _check_space(folder, target, batches, config)
        PartialState().wait_for_everyone()
        mine = [number for number in range(len(batches)) if is_mine(number)]
        missing = [number for number in mine if not _is_done(folder, number, extract)]
        there = [part_path(folder, number) for number in sorted(set(mine) - set(missing))]
        done = _Done(bar, description, sum(len(batches[n]) for n in mine), there)
        for pending in in_step(missing, target.sharded):
            if pending is None:
                answer(target, [_IDLE], 1, seed, None)
                continue
            batch = batches[pending]
            (folder / "index.json").unlink(missing_ok=True)
            recorder = Recorder(target, config.teacher_top_k) if extract else None
            responses = answer(target, batch, config.max_new_tokens, seed + pending, recorder)
            written = conversations_of(batch, responses, target.eos_ids)
            if recorder is not None:
                # First the shard, then the text: where the text is, the shard is whole.
                tensors = recorder.tensors([job.prompt_ids for job in batch], responses)
                entries = entries_of(written, tensors)
                write_shard(shard_path(folder, pending), tensors, entries, settings)
            path = part_path(folder, pending)
            write_part(path, written, target.tokenizer, target.name, target.revision)
            done.add(path)
        PartialState().wait_for_everyone()
        if extract and PartialState().is_main_process and not (folder / "index.json").is_file():
            write_index(folder, [shard_path(folder, i) for i in range(len(batches))], settings)


def _check_space(
    folder: Path, target: Target, batches: list[list[Job]], config: DataConfig
) -> None:
    missing = [b for i, b in enumerate(batches) if not _is_done(folder, i, extract=True)]
    prompt_tokens = sum(len(job.prompt_ids) for batch in missing for job in batch)
    answers = sum(len(batch) for batch in missing) * config.max_new_tokens
    each = stored_bytes(target, config)
    check_space(folder, each * (prompt_tokens + answers), each * prompt_tokens)


def regenerate_by_server(
    server: AnswerServer,
    tokens: TargetTokens,
    jobs: list[Job],
    config: DataConfig,
    seed: int,
    folder: Path,
) -> int:
    """Let an OpenAI-compatible server answer; otherwise as `regenerate`.

    Several batches are under way at once, so that one long answer holds up none of the others.

    Returns:
        How many answers came back as text alone and were tokenised again.

    Raises:
        ValueError, RuntimeError: what `AnswerServer` raises; finished parts are kept.
    """
    batches = batches_of(jobs, config)
    made_with = conversation_settings(jobs, tokens, config, seed, extract=False)
    retokenised = 0

    async def write(number: int, batch: list[Job], done: _Done) -> None:
        nonlocal retokenised
        path = part_path(folder, number)
        if path not in done.there:
            first = number * config.generation_batch_size
            answers = await asyncio.gather(
                *(
                    server.answer(
                        job.prompt_ids, job.sampling, seed + first + i, config.max_new_tokens
                    )
                    for i, job in enumerate(batch)
                )
            )
            retokenised += sum(answer.retokenised for answer in answers)
            written = conversations_of(batch, [a.ids for a in answers], tokens.eos_ids)
            write_part(path, written, tokens.tokenizer, tokens.name, tokens.revision)
            done.add(path)

    async def write_all(done: _Done) -> None:
        # Enough batches under way to keep the server busy, and no more: a kill loses those.
        at_once = asyncio.Semaphore(1 + -(-server.concurrency // config.generation_batch_size))

        async def bounded(number: int, batch: list[Job]) -> None:
            async with at_once:
                await write(number, batch, done)

        async with server:
            if not all(_is_done(folder, i, extract=False) for i in range(len(batches))):
                await server.check()
            for note in server.notes:
                say(note)
            ends = await asyncio.gather(
                *(bounded(number, batch) for number, batch in enumerate(batches)),
                # What is under way is finished and kept, whatever becomes of one request.
                return_exceptions=True,
            )
        for failure in ends:
            if isinstance(failure, BaseException):
                raise failure

    with alone_in(folder), progress_bar() as bar:
        claim_folder(folder, made_with, len(batches))
        numbers = range(len(batches))
        there = [part_path(folder, n) for n in numbers if _is_done(folder, n, extract=False)]
        asyncio.run(write_all(_Done(bar, "Generating", len(jobs), there)))
    return retokenised


class _Done:
    """Counts finished parts on a progress bar.

    Args:
        bar: where.
        description: of the task.
        total: conversations in all.
        there: parts that an earlier call finished.
    """

    def __init__(self, bar: Progress, description: str, total: int, there: list[Path]):
        self.bar, self.there, self.tokens = bar, set(there), 0
        count = sum(self._read(path) for path in there)
        status = self._status() if there else ""
        self.task = bar.add_task(description, total=total, completed=count, status=status)

    def add(self, path: Path) -> None:
        self.bar.update(self.task, advance=self._read(path), status=self._status())

    def _read(self, path: Path) -> int:
        conversations = read_part(path)
        self.tokens += sum(c.trained for c in conversations)
        return len(conversations)

    def _status(self) -> str:
        return f"{self.tokens:,} tokens"


def _is_done(folder: Path, number: int, extract: bool) -> bool:
    paths = [part_path(folder, number)] + [shard_path(folder, number)] * extract
    return all(path.is_file() for path in paths)


@torch.no_grad()  # a split target keeps buffers of its first forward: no inference tensors
def answer(
    target: Target, jobs: list[Job], max_new_tokens: int, seed: int, recorder: Recorder | None
) -> list[list[int]]:
    """Responses of one batch, without padding; the end-of-sequence token is kept."""
    inputs = target.tokenizer.pad(
        {"input_ids": [job.prompt_ids for job in jobs]}, padding_side="left", return_tensors="pt"
    ).to(target.device)
    mixture = SamplingMixture([job.sampling for job in jobs], seed)
    settings = GenerationConfig(
        do_sample=False,
        max_new_tokens=max_new_tokens,
        eos_token_id=target.eos_ids,
        pad_token_id=target.tokenizer.pad_token_id,
    )
    # The recorder is to see the logits as the target emits them.
    processors = [mixture] if recorder is None else [recorder, mixture]
    quick = quick_single_queries(target.config)
    with plain_strides(target.model), quick, recorder or nullcontext():
        output = target.model.generate(
            **inputs,
            generation_config=settings,
            logits_processor=LogitsProcessorList(processors),
            synced_gpus=target.sharded,
            **(recorder.arguments() if recorder is not None else {}),
        )
    responses = output[:, inputs["input_ids"].shape[1] :].tolist()
    return [_cut_after(response, target.eos_ids) for response in responses]


def _cut_after(ids: list[int], stops: list[int]) -> list[int]:
    for i, token in enumerate(ids):
        if token in stops:
            return ids[: i + 1]
    return ids

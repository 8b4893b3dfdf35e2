"""On-policy conversations: the target answers the prompts, batched and resumable.

Letters: B batch, V vocabulary.
"""

from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import astuple, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState

from headstart.common.console import print_once, progress_bar
from headstart.common.processes import in_step, is_mine, processes_in
from headstart.common.versions import CACHE, skips_prefill
from headstart.configs.schema import DataConfig
from headstart.data.background import BackgroundWriter
from headstart.data.conversations import (
    Conversation,
    answered,
    claim_folder,
    part_path,
    stable_hash,
    write_part,
)
from headstart.data.extraction import BATCH_TOKENS, Recorder, entries_of
from headstart.data.kv_cache import generation_cache
from headstart.data.prompts import Prompt, encode_usable, tell_schemas, unique_ids
from headstart.data.store import (
    check_space,
    kept_settings,
    shard_path,
    shard_settings,
    stored_bytes,
    write_index,
    write_shard,
)
from headstart.data.templates import check_template, encode_prompt, shortened
from headstart.heads.kernels import best_tokens, fast_kernels
from headstart.heads.target import KEYS_AND_VALUES, Inputs, Target
from headstart.heads.tokens import Sampling, TargetTokens


@dataclass(frozen=True)
class Job:
    """One answer to be written."""

    id: str
    prompt: Prompt
    prompt_ids: list[int]
    sampling: Sampling


def make_jobs(
    prompts: list[Prompt], sampling: list[Sampling], tokens: TargetTokens, config: DataConfig
) -> list[Job]:
    """The prompts as token ids, longest first, each with an id of its own and its sampling.

    Raises:
        ValueError: the target's chat template refuses more prompts than `data.max_bad_rows`.
    """
    check_template(prompts, tokens)
    tell_schemas(prompts, "regeneration")
    kwargs, most = config.chat_template_kwargs, config.max_prompt_tokens
    encoded = encode_usable(
        prompts, lambda p: encode_prompt(p, tokens.tokenizer, kwargs), config.max_bad_rows
    )
    # A prompt may be answered several times.
    ids = unique_ids([prompt.id for prompt in prompts], "#")
    jobs = [
        Job(job_id, prompt, shortened(prompt_ids, most), drawn)
        for job_id, prompt, prompt_ids, drawn in zip(ids, prompts, encoded, sampling, strict=True)
        if prompt_ids is not None
    ]
    if cut_short := sum(len(prompt_ids or []) > most for prompt_ids in encoded):
        print_once(
            f"{cut_short} of {len(prompts)} prompts are longer than data.max_prompt_tokens={most} "
            "and keep their last tokens"
        )
    # Equal lengths together: less padding. Longest first: memory runs out at once or never.
    return sorted(jobs, key=lambda job: -len(job.prompt_ids))


def conversation_settings(
    jobs: list[Job],
    tokens: TargetTokens,
    config: DataConfig,
    seed: int,
    extract: bool,
    inputs: Inputs = KEYS_AND_VALUES,
) -> dict[str, Any]:
    """What decides the conversations, and what is stored of them: equal settings, equal answers (of
    one machine)."""
    asked = [[job.id, job.prompt_ids, astuple(job.sampling)] for job in jobs]
    kwargs = config.chat_template_kwargs
    return {
        **({"chat_template_kwargs": kwargs} if kwargs else {}),
        "target": tokens.name,
        "revision": tokens.revision,
        "config": tokens.settings,
        "fingerprint": tokens.fingerprint,
        "tokenizer": tokens.tokenizer_hash,
        "eos_ids": tokens.eos_ids,
        "prompts": stable_hash(asked),
        "conversations": len(jobs),
        "max_new_tokens": config.max_new_tokens,
        "generation_batch_size": config.generation_batch_size,
        "seed": seed,
        "teacher_top_k": config.teacher_top_k if extract else None,
        "storage": config.storage if extract else None,
        **(kept_settings(inputs) if extract else {}),
    }


def batches_of(jobs: list[Job], config: DataConfig) -> list[list[Job]]:
    """The jobs of each part, in order."""
    size = config.generation_batch_size
    return [jobs[i : i + size] for i in range(0, len(jobs), size)]


def tokens_that_run(jobs: list[Job], max_new_tokens: int) -> int:
    """Of each text of a batch, padding included, at most: nothing runs on the last token."""
    return max(len(job.prompt_ids) for job in jobs) + max_new_tokens - 1


def conversations_of(
    jobs: list[Job], answers: list[list[int]], eos_ids: list[int]
) -> list[Conversation]:
    """The jobs with the responses to them."""
    return [
        answered(
            job.prompt_ids,
            ids,
            id=job.id,
            category=job.prompt.category,
            source=job.prompt.source,
            temperature=job.sampling.temperature,
            finish_reason="stop" if ids and ids[-1] in eos_ids else "length",
        )
        for job, ids in zip(jobs, answers, strict=True)
    ]


BLOCK = 512  # weights summed before the running sum: about the root of a Gemma vocabulary


class SamplingMixture:
    """Chooses the next token of every sequence in its own way: greedy, or sampled.

    Sampling by inverse CDF needs one uniform number a row; `torch.multinomial` draws V of them,
    which on a CPU took as long as the whole decoding step. Temperature, top-k and top-p are applied
    in the order of transformers' `generate`.

    Args:
        sampling: one for each row.
        seed: of the uniform numbers.
        steps: tokens that will be chosen in each row, at most.
        device: of the logits.
    """

    def __init__(self, sampling: list[Sampling], seed: int, steps: int, device: torch.device):
        groups = dict.fromkeys(s for s in sampling if s.temperature > 0)
        self.rows = {g: [i for i, other in enumerate(sampling) if other == g] for g in groups}
        generator = torch.Generator().manual_seed(seed)
        drawn: dict[Sampling, list[torch.Tensor]] = {group: [] for group in groups}
        for _ in range(steps):
            for group, rows in self.rows.items():
                drawn[group].append(torch.rand(len(rows), 1, generator=generator))
        # A GPU waits for each copy: one of each in all.
        self.uniform = {g: torch.stack(numbers).to(device) for g, numbers in drawn.items()}
        self.places = {g: torch.tensor(rows, device=device) for g, rows in self.rows.items()}

    def __call__(self, logits: torch.Tensor, step: int) -> torch.Tensor:
        """`logits` [B, V] and the step, from 0 -> the tokens [B]."""
        chosen = best_tokens(logits)
        for drawn, rows in self.rows.items():
            uniform = self.uniform[drawn][step]
            if logits.device.type == "cpu":
                # Row by row a CPU keeps the V values in its cache: a fifth of the time of all.
                pairs = zip(rows, uniform.split(1), strict=True)
                tokens = [_draw(logits[i : i + 1].float(), drawn, u) for i, u in pairs]
                chosen[self.places[drawn]] = torch.cat(tokens)
            else:
                chosen[self.places[drawn]] = _draw(
                    logits[self.places[drawn]].float(), drawn, uniform
                )
        return chosen


def _draw(logits: torch.Tensor, drawn: Sampling, uniform: torch.Tensor) -> torch.Tensor:
    """Logits [n, V] and uniform numbers [n, 1] -> [n] token ids."""
    logits = logits / drawn.temperature
    ids = None
    if drawn.top_k is not None or drawn.top_p < 1:
        logits, ids = logits.topk(min(drawn.top_k or logits.shape[-1], logits.shape[-1]))
    p = (logits - logits.amax(-1, keepdim=True)).exp_()
    if drawn.top_p < 1:  # a token stays while those above it hold less
        p = p / p.sum(-1, keepdim=True)
        p = p * (p.cumsum(-1) - p < drawn.top_p)
    place = _inverse_cdf(p, uniform)
    return (place if ids is None else ids.gather(-1, place))[:, 0]


def _inverse_cdf(p: torch.Tensor, uniform: torch.Tensor) -> torch.Tensor:
    """Where the share `uniform` [n, 1] of the weights `p` [n, V] is reached, [n, 1].

    First among the sums of blocks, then within the block: running sums over V values are what
    takes longest on a CPU. The weights need not add up to 1.
    """
    padded = torch.nn.functional.pad(p, (0, -p.shape[-1] % BLOCK))
    blocks = padded.view(len(p), -1, BLOCK)
    sums = blocks.sum(-1).cumsum(-1)
    sought = uniform * sums[:, -1:]
    block = _first_above(sums, sought)
    before = sums.gather(-1, block) - blocks.sum(-1).gather(-1, block)
    inside = blocks.gather(1, block[..., None].expand(-1, -1, BLOCK))[:, 0].cumsum(-1)
    return block * BLOCK + _first_above(inside, (sought - before).clamp_min(0))


def _first_above(sums: torch.Tensor, sought: torch.Tensor) -> torch.Tensor:
    """The first place whose running sum is above `sought`; at most the last that adds anything,
    which rounding could lead past."""
    last = torch.searchsorted(sums, sums[:, -1:].contiguous())
    return torch.minimum(torch.searchsorted(sums, sought.contiguous(), right=True), last)


# What a process lets a split target answer while others have something to do.
_IDLE = Job("idle", Prompt("idle", "", "", [], raw=True), [0], Sampling(0.0))


def check_lengths(jobs: list[Job], config: DataConfig) -> None:
    """Raise `ValueError` where activations could be longer than may be stored."""
    longest = max((len(job.prompt_ids) for job in jobs), default=0) + config.max_new_tokens
    if longest > config.max_tokens:
        raise ValueError(
            f"activations of {longest} tokens are longer than data.max_tokens={config.max_tokens}: "
            "raise it, or give what `headstart regenerate` writes to `headstart extract`, which "
            "cuts them"
        )


def regenerate(
    target: Target,
    jobs: list[Job],
    config: DataConfig,
    seed: int,
    folder: Path,
    extract: bool,
    description: str = "Generating",
    inputs: Inputs = KEYS_AND_VALUES,
) -> float:
    """Let the target answer in process, and keep what it computes on the way where asked to.

    What an earlier call with the same settings has finished stays as it is.

    Args:
        seed: each batch is a function of it and of the batch's number alone, so that a resumed
            call ends with the same conversations as an uninterrupted one.
        folder: for one Parquet part and, with `extract`, one shard of activations a batch.
        extract: whether to write the activation store from the same forwards.
        description: label of the progress bar.
        inputs: of the heads that the activations are for.

    Returns:
        Seconds for which the target waited until files were written.

    Raises:
        ValueError: the folder was begun with other settings, or its disk is too small.
        OSError: the disk is full; finished parts are kept.
    """
    if extract:
        check_lengths(jobs, config)
    batches = batches_of(jobs, config)
    settings = shard_settings(target, config.teacher_top_k, config.storage, inputs)
    with processes_in(folder), progress_bar() as bar:
        if PartialState().is_main_process:
            made_with = conversation_settings(jobs, target, config, seed, extract, inputs)
            claim_folder(folder, made_with, len(batches))
            if extract:
                _check_space(folder, target, batches, config, inputs)
        PartialState().wait_for_everyone()
        mine = [number for number in range(len(batches)) if is_mine(number)]
        missing = [number for number in mine if not is_done(folder, number, extract)]
        total, left = (sum(len(batches[n]) for n in numbers) for numbers in (mine, missing))
        task = bar.add_task(description, total=total, completed=total - left, status="")
        tokens = 0
        with BackgroundWriter() as writer:
            for pending in in_step(missing, target.sharded):
                if pending is None:
                    answer(target, [_IDLE], 1, seed, None)
                    continue
                batch = batches[pending]
                (folder / "index.json").unlink(missing_ok=True)
                recorder = None
                if extract:
                    room = tokens_that_run(batch, config.max_new_tokens)
                    recorder = Recorder(target, config.teacher_top_k, room, inputs)
                responses = answer(target, batch, config.max_new_tokens, seed + pending, recorder)
                written = conversations_of(batch, responses, target.eos_ids)
                tensors = None
                if recorder is not None:
                    prompts = [job.prompt_ids for job in batch]
                    tensors = recorder.tensors(prompts, responses, config.storage)
                writer.put(partial(_write, folder, pending, written, tensors, target, settings))
                tokens += sum(c.trained for c in written)
                bar.update(task, advance=len(written), status=f"{tokens:,} tokens")
        PartialState().wait_for_everyone()
        if extract and PartialState().is_main_process and not (folder / "index.json").is_file():
            write_index(folder, [shard_path(folder, i) for i in range(len(batches))], settings)
    return writer.waited


def _write(
    folder: Path,
    number: int,
    conversations: list[Conversation],
    tensors: dict[str, torch.Tensor] | None,
    target: Target,
    settings: dict[str, Any],
) -> None:
    """Write what one batch gave: its shard, where there are activations, and its part."""
    if tensors is not None:
        # First the shard, then the text: where the text is, the shard is whole.
        entries = entries_of(conversations, tensors)
        write_shard(shard_path(folder, number), tensors, entries, settings)
    path = part_path(folder, number)
    write_part(path, conversations, target.tokenizer, target.name, target.revision)


def _check_space(
    folder: Path, target: Target, batches: list[list[Job]], config: DataConfig, inputs: Inputs
) -> None:
    missing = [b for i, b in enumerate(batches) if not is_done(folder, i, extract=True)]
    prompt_tokens = sum(len(job.prompt_ids) for batch in missing for job in batch)
    answers = sum(len(batch) for batch in missing) * config.max_new_tokens
    each = stored_bytes(target, config, inputs)
    check_space(folder, each * (prompt_tokens + answers), each * prompt_tokens)


def is_done(folder: Path, number: int, extract: bool) -> bool:
    """Whether a batch has its part and, where it is to have one, its shard."""
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
    mixture = SamplingMixture([job.sampling for job in jobs], seed, max_new_tokens, target.device)
    prompts, mask = inputs["input_ids"], inputs["attention_mask"]
    listening = nullcontext() if recorder is None else recorder.listening()
    with fast_kernels(target.model, small_batch=False), listening:
        output = generate_tokens(target, prompts, mask, mixture, max_new_tokens, recorder)
    return [cut_after(response, target.eos_ids) for response in output.tolist()]


def generate_tokens(
    target: Target,
    ids: torch.Tensor,
    mask: torch.Tensor,
    mixture: SamplingMixture,
    max_new_tokens: int,
    recorder: Recorder | None,
) -> torch.Tensor:
    """What follows texts [B, W], padded on the left (`mask` [B, W]: 0 there), of which the last
    `ids` [B, T] have yet to run -> [B, S], until every row has an end-of-sequence token or there
    are `max_new_tokens`; padding after a row's end.

    `generate` of transformers would do: it copies the logits to float32, and ids, mask and cache
    anew at every step, a third of the time of a step of Gemma 3 270M.
    """
    prompts, room = mask.shape[1], mask.shape[1] + max_new_tokens - 1  # as `tokens_that_run`
    cache = recorder.cache if recorder is not None else generation_cache(target.config, room)
    # Layers that share keys need run on the last token alone, but where all rows are recorded.
    skips = recorder is None and skips_prefill(target.config)
    kept: dict[str, Any] = {"logits_to_keep": 1} if skips else {}
    # Not the decoder alone: a model with images has a forward around it, as in `activations`.
    decoder, pad = target.model.model, target.tokenizer.pad_token_id
    ends = torch.tensor(target.eos_ids, device=ids.device)
    positions = (mask.cumsum(-1) - 1).clamp_min(0)[:, -ids.shape[1] :]
    mask = torch.nn.functional.pad(mask, (0, max_new_tokens - 1), value=1)  # [B, room]
    ongoing = mask.new_ones(len(ids), dtype=torch.bool)
    chosen: list[torch.Tensor] = []
    ran = prompts - ids.shape[1]

    def forwards() -> Iterator[int]:
        """The tokens that each text has behind it after each forward: the prompts by blocks, and
        then one more, all the while that there is one to be chosen."""
        yield from range(ran + prefill_block(ids), prompts, prefill_block(ids))
        for end in range(prompts, room + 1):
            yield end
            if not ongoing.any():
                return

    for end in in_step(forwards(), target.sharded):
        if end is None:
            target.idle()
            continue
        given, ids = ids[:, : end - ran], ids[:, end - ran :]
        at, positions = positions[:, : end - ran], positions[:, end - ran :]
        outputs = decoder(
            input_ids=given, attention_mask=mask[:, :end], position_ids=at, use_cache=True,
            **{CACHE: cache}, **kept,
        )  # fmt: skip
        ran = end
        if recorder is not None:
            recorder.note(outputs.last_hidden_state, end)
        if end < prompts:
            continue
        logits = target.own_logits(outputs.last_hidden_state[:, -1].contiguous())
        if recorder is not None:
            recorder.note_teacher(logits)
        token = mixture(logits, len(chosen)).where(ongoing, pad)
        chosen.append(token)
        ongoing &= (token[:, None] != ends).all(-1)
        ids, positions = token[:, None], at[:, -1:] + 1
    return torch.stack(chosen, dim=1)


def prefill_block(ids: torch.Tensor) -> int:
    """How many tokens of each of the prompts [B, T] run at once: on a CPU so many that what lies
    between the layers comes from memory that the process has, and not from fresh pages."""
    if ids.device.type != "cpu":
        return max(1, ids.shape[1])
    return max(1, BATCH_TOKENS // len(ids))


def cut_after(ids: list[int], stops: list[int]) -> list[int]:
    """The ids up to the first of `stops`, that included."""
    return ids[: next((i + 1 for i, token in enumerate(ids) if token in stops), len(ids))]

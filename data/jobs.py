"""Answers to be written: prompts as token ids, each with an id and its sampling."""

from dataclasses import astuple, dataclass
from typing import Any

from headstart.configs.schema import DataConfig
from headstart.data.conversations import Conversation, answered, stable_hash
from headstart.data.prompts import Prompt, report_refused
from headstart.data.templates import check_template, encode_prompt, shortened
from headstart.heads.progress import say
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
    jobs: list[Job] = []
    refused: list[tuple[str, str]] = []
    taken, cut_short = set[str](), 0
    for prompt, drawn in zip(prompts, sampling, strict=True):
        job_id, times = prompt.id, 1
        while job_id in taken:  # a prompt may be answered several times
            times += 1
            job_id = f"{prompt.id}#{times}"
        taken.add(job_id)
        try:
            ids = encode_prompt(
                prompt, tokens.tokenizer, chat_template_kwargs=config.chat_template_kwargs
            )
        except ValueError as error:
            refused.append((prompt.id, str(error)))
            continue
        cut_short += len(ids) > config.max_prompt_tokens
        jobs.append(Job(job_id, prompt, shortened(ids, config.max_prompt_tokens), drawn))
    report_refused(refused, len(prompts), config.max_bad_rows)
    if cut_short:
        say(
            f"{cut_short} of {len(prompts)} prompts are longer than data.max_prompt_tokens="
            f"{config.max_prompt_tokens} and keep their last tokens"
        )
    # Equal lengths together: less padding. Longest first: memory runs out at once or never.
    return sorted(jobs, key=lambda job: -len(job.prompt_ids))


def conversation_settings(
    jobs: list[Job], tokens: TargetTokens, config: DataConfig, seed: int, extract: bool
) -> dict[str, Any]:
    """What decides the conversations: equal settings, equal answers (of one machine)."""
    asked = [[job.id, job.prompt_ids, astuple(job.sampling)] for job in jobs]
    kwargs = config.chat_template_kwargs
    return {
        **({"chat_template_kwargs": kwargs} if kwargs else {}),
        "target": tokens.name,
        "revision": tokens.revision,
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
    }


def batches_of(jobs: list[Job], config: DataConfig) -> list[list[Job]]:
    """The jobs of each part, in order."""
    size = config.generation_batch_size
    return [jobs[i : i + size] for i in range(0, len(jobs), size)]


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

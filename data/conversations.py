"""On-policy conversations: the target answers the prompts, batched, cached and resumable.

Letters: B batch, V vocabulary.
"""

import hashlib
import json
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from safetensors.torch import save_file
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList

from headstart.configs.schema import DataConfig
from headstart.data.progress import progress_bar
from headstart.data.prompts import Prompt
from headstart.data.recording import Recorder
from headstart.data.templates import encode_prompt
from headstart.heads.demo import cache_dir
from headstart.heads.files import part_name, write_atomically
from headstart.heads.targets import Target

FORMAT = 1  # of the cache: raise it when the same settings come to give other conversations


@dataclass(frozen=True)
class Conversation:
    """A prompt and the target's own response, as token ids."""

    id: str
    category: str
    prompt_ids: list[int]
    response_ids: list[int]
    """Ends with an end-of-sequence token where `finish_reason` is `stop`."""
    temperature: float
    finish_reason: str
    """`stop` or `length`."""


class TemperatureMixture(LogitsProcessor):
    """Chooses the next token of every sequence at a temperature of its own.

    Used with `do_sample=False`: the chosen token gets an infinite score, so that the argmax takes
    it. Sampling by inverse CDF needs one uniform number a row; `torch.multinomial` draws V of
    them, which on a CPU took as long as the whole decoding step.

    Args:
        temperatures: [B]; 0 is greedy.
        seed: of the uniform numbers.
    """

    def __init__(self, temperatures: list[float], seed: int):
        self.sampled = torch.tensor([i for i, t in enumerate(temperatures) if t > 0])
        self.temperatures = torch.tensor([t for t in temperatures if t > 0])[:, None]
        self.generator = torch.Generator().manual_seed(seed)

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """`scores` [B, V] -> the same with +inf at the chosen tokens."""
        if not len(self.sampled):
            return scores
        rows = self.sampled.to(scores.device)
        logits = scores[rows].float() / self.temperatures.to(scores.device)
        cdf = logits.softmax(-1).cumsum(-1)
        uniform = torch.rand(len(rows), 1, generator=self.generator).to(scores.device)
        # cdf ends a rounding error away from 1: scale by what it really ends at.
        tokens = torch.searchsorted(cdf, uniform * cdf[:, -1:]).clamp_max(scores.shape[-1] - 1)
        scores = scores.clone()
        scores[rows, tokens[:, 0]] = torch.inf
        return scores


def generate_batches(
    target: Target,
    prompts: list[Prompt],
    temperatures: list[float],
    config: DataConfig,
    seed: int,
    description: str,
) -> tuple[Path, list[int]]:
    """Let the target continue every prompt and keep what it computes on the way.

    Each batch is a file of conversations and a shard of their activations (`Recorder`), from the
    same forwards; what an earlier call has finished is reused.

    Args:
        target: the model that writes.
        prompts: one conversation each; a prompt may be there several times.
        temperatures: one a prompt.
        config: lengths, batch size and the cache folder.
        seed: each batch is a function of it and of the batch's number alone, so that a resumed
            call ends with the same conversations as an uninterrupted one.
        description: label of the progress bar.

    Returns:
        The folder of `batch-NNNNN.json` and `.safetensors` files, one for each batch, and the
        indices of `prompts` in the order in which the files hold them.
    """
    jobs = [
        (i, encode_prompt(p, target.tokenizer, config.max_prompt_tokens))
        for i, p in enumerate(prompts)
    ]
    # Equal lengths together: less padding. Longest first: memory runs out at once or never.
    jobs.sort(key=lambda job: -len(job[1]))
    size = config.generation_batch_size
    batches = [jobs[i : i + size] for i in range(0, len(jobs), size)]
    settings = [[prompts[i].id, ids, temperatures[i]] for i, ids in jobs]
    key = stable_hash(
        FORMAT, target.fingerprint, _eos_ids(target), settings, config.max_new_tokens, size, seed,
        config.teacher_top_k,
    )  # fmt: skip
    folder = (config.cache_dir or cache_dir()) / "conversations" / key
    folder.mkdir(parents=True, exist_ok=True)
    tokens = 0
    with progress_bar() as bar:
        task = bar.add_task(description, total=len(jobs), status="")
        for number, batch in enumerate(batches):
            path = folder / f"batch-{number:05d}.json"
            if not path.is_file():
                rows = [prompts[i] for i, _ in batch]
                heats = [temperatures[i] for i, _ in batch]
                ids = [prompt_ids for _, prompt_ids in batch]
                recorder = Recorder(target, config.teacher_top_k)
                answers = _answer(
                    target, ids, heats, config.max_new_tokens, seed + number, recorder
                )
                # First the shard, then the text: where the text is, the shard is whole.
                shard = path.with_suffix(".safetensors")
                save_file(recorder.tensors(ids, answers), part_name(shard))
                part_name(shard).replace(shard)
                _write(path, rows, ids, heats, answers, _eos_ids(target))
            tokens += sum(len(c.response_ids) for c in read_batch(path))
            bar.update(task, advance=len(batch), status=f"{tokens} tokens")
    return folder, [i for i, _ in jobs]


def batch_files(folder: Path) -> list[Path]:
    """The files of conversations in a folder of `generate_batches`, in order."""
    return sorted(folder.glob("batch-*.json"))


def read_batch(path: Path) -> list[Conversation]:
    """The conversations of one of them."""
    return [Conversation(**row) for row in json.loads(path.read_text())]


def stable_hash(*parts: object) -> str:
    """Sixteen hex digits of the SHA-256 of the parts' JSON."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:16]


def _eos_ids(target: Target) -> list[int]:
    eos = target.model.generation_config.eos_token_id
    if eos is None:
        eos = target.tokenizer.eos_token_id
    return eos if isinstance(eos, list) else [eos]


@torch.inference_mode()
def _answer(
    target: Target,
    prompt_ids: list[list[int]],
    temperatures: list[float],
    max_new_tokens: int,
    seed: int,
    recorder: Recorder,
) -> list[list[int]]:
    """Responses of one batch, without padding; the end-of-sequence token is kept."""
    inputs = target.tokenizer.pad(
        {"input_ids": prompt_ids}, padding_side="left", return_tensors="pt"
    ).to(target.device)
    eos_ids = _eos_ids(target)
    # The recorder comes first: it is to see the logits as the target emits them.
    processors = LogitsProcessorList([recorder, TemperatureMixture(temperatures, seed)])
    # The prefill cuts the last row out of each sequence, and over such a strided input torch's
    # linear runs one product a sequence on a CPU: a minute for 64 prompts of Gemma 3 270M.
    compact = target.model.get_output_embeddings().register_forward_pre_hook(
        lambda module, args: (args[0].contiguous(),)
    )
    with recorder:
        output = target.model.generate(
            **inputs,
            generation_config=GenerationConfig(
                do_sample=False,
                max_new_tokens=max_new_tokens,
                eos_token_id=eos_ids,
                pad_token_id=target.tokenizer.pad_token_id,
            ),
            past_key_values=recorder.cache,
            logits_processor=processors,
        )
    compact.remove()
    responses = output[:, inputs["input_ids"].shape[1] :].tolist()
    return [_cut_after(response, eos_ids) for response in responses]


def _cut_after(ids: list[int], stops: list[int]) -> list[int]:
    for i, token in enumerate(ids):
        if token in stops:
            return ids[: i + 1]
    return ids


def _write(
    path: Path,
    prompts: list[Prompt],
    prompt_ids: list[list[int]],
    temperatures: list[float],
    responses: list[list[int]],
    eos_ids: list[int],
) -> None:
    rows = [
        Conversation(
            id=prompt.id,
            category=prompt.category,
            prompt_ids=ids,
            response_ids=response,
            temperature=temperature,
            finish_reason="stop" if response[-1] in eos_ids else "length",
        )
        for prompt, ids, response, temperature in zip(
            prompts, prompt_ids, responses, temperatures, strict=True
        )
    ]
    write_atomically(path, json.dumps([asdict(row) for row in rows]))

"""Plain and assisted decoding with transformers' `generate`, one prompt at a time.

Target forwards are counted where they happen, by a hook on the target.
"""

import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import GenerationConfig, PreTrainedModel

from headstart.eval.acceptance import AcceptanceCounts
from headstart.heads.exact import ExactDecoding, exact_decoding
from headstart.heads.few_rows import plain_strides
from headstart.heads.targets import Target
from headstart.heads.tokens import Sampling
from headstart.heads.versions import CACHE

GREEDY = Sampling(0.0)


@dataclass(frozen=True)
class Decoded:
    """One generation."""

    tokens: list[int]
    """The new tokens."""
    seconds: float
    """Wall time of the whole call, prefill included."""
    first_token_seconds: float
    """Of it, until the target had run on the prompt."""
    drafting_seconds: float | None
    """Of it, spent on drafts; None where the stock generator drafts, which does not tell."""
    forwards: list[tuple[int, int]]
    """Target forwards in order: (tokens in the cache before it, tokens given to it)."""
    drafts: list[list[int]]
    """The draft tokens of each round, that is of each forward after the prefill."""
    looked_up: int = 0
    """Draft tokens that the exact decoder copied from the text."""
    peak_memory_bytes: int | None = None
    """Most memory of the GPU in use at once; None elsewhere."""

    def rounds(self, prompt_len: int) -> list[tuple[int, int]]:
        """(proposed, accepted) of each round, that is of each target forward after the prefill.

        A round that starts with `seen` tokens cached was given one accepted token and its
        drafts; the next forward's start, or the end of the text, says how many were accepted.
        """
        rounds = self.forwards[1:]
        # After the last round all tokens but the newest would be in the cache.
        starts = [seen for seen, _ in rounds] + [prompt_len + len(self.tokens) - 1]
        return [
            (given - 1, end - seen - 1)
            for (seen, given), end in zip(rounds, starts[1:], strict=True)
        ]

    def counts(self, prompt_len: int, num_assistant_tokens: int) -> AcceptanceCounts:
        """Acceptance over the rounds."""
        return AcceptanceCounts.of_rounds(self.rounds(prompt_len), num_assistant_tokens)


def decode(
    target: Target,
    prompt_ids: list[int],
    max_new_tokens: int,
    assistant: PreTrainedModel | None = None,
    num_assistant_tokens: int | None = None,
    how: ExactDecoding | None = None,
    sampling: Sampling = GREEDY,
    seed: int = 0,
) -> Decoded:
    """`target.model.generate`, assisted by `assistant` where one is given, else by prompt lookup
    where K is given.

    Args:
        target: batch size 1 is all that assisted decoding takes.
        prompt_ids: the prompt.
        max_new_tokens: at most so many tokens are generated.
        assistant: a head in the native format or a small model, on the target's device.
        num_assistant_tokens: K. The stock decoder reads it from the assistant's
            `generation_config` and nowhere else, so it is set there; a small model is told to
            keep to it.
        how: drafts of the exact decoder; None: of the stock candidate generator.
        sampling: greedy, or from the target's distribution.
        seed: of the draws.
    """
    extra = {}
    if assistant is not None:
        own = assistant.generation_config
        own.num_assistant_tokens = num_assistant_tokens
        own.num_assistant_tokens_schedule, own.assistant_confidence_threshold = "constant", 0.0
        extra["assistant_model"] = assistant
    lookup = None if assistant is not None else num_assistant_tokens
    config = _generation_config(target, max_new_tokens, sampling, lookup)
    ids = torch.tensor([prompt_ids], device=target.device)
    drafting = exact_decoding(target.model, how) if how is not None else nullcontext()
    if how is not None:
        how.rounds.clear()
    torch.manual_seed(seed)
    on_cuda = target.device.type == "cuda"
    if on_cuda:
        torch.cuda.reset_peak_memory_stats(target.device)
    # Plain strides on all sides, plain decoding too: the half second that a CPU otherwise takes
    # for the first token in bfloat16 is nobody's merit.
    lean = plain_strides(target.model)
    with drafting, lean, _watch(target.model) as seen, torch.inference_mode():
        synchronize(target.device)
        start = time.perf_counter()
        output = target.model.generate(
            ids, attention_mask=torch.ones_like(ids), generation_config=config, **extra
        )
        synchronize(target.device)
        seconds = time.perf_counter() - start
    return Decoded(
        tokens=output[0, len(prompt_ids) :].tolist(),
        seconds=seconds,
        first_token_seconds=seen.first_end - start,
        drafting_seconds=None if how is None else sum(r.seconds for r in how.rounds),
        forwards=[(cached, ids.shape[1]) for cached, ids in seen.given],
        drafts=[ids[0, 1:].tolist() for _, ids in seen.given[1:]],
        looked_up=0 if how is None else sum(r.looked_up for r in how.rounds),
        peak_memory_bytes=torch.cuda.max_memory_allocated(target.device) if on_cuda else None,
    )


def _generation_config(
    target: Target, max_new_tokens: int, sampling: Sampling, lookup: int | None
) -> GenerationConfig:
    chosen: dict[str, Any] = {"do_sample": False}
    if sampling.temperature:
        chosen = {
            "do_sample": True,
            "temperature": sampling.temperature,
            "top_p": sampling.top_p,
            "top_k": sampling.top_k or 0,  # unset, transformers takes 50
        }
    return GenerationConfig(
        max_new_tokens=max_new_tokens,
        eos_token_id=target.eos_ids,
        pad_token_id=target.tokenizer.pad_token_id,
        prompt_lookup_num_tokens=lookup,
        **chosen,
    )


@dataclass
class _Seen:
    """Target forwards as they happen."""

    given: list[tuple[int, torch.Tensor]] = field(default_factory=list)
    """Tokens in the cache, and the tokens [1, n] given."""
    first_end: float = 0.0


@contextmanager
def _watch(model: PreTrainedModel) -> Iterator[_Seen]:
    seen = _Seen()

    def begin(module: torch.nn.Module, args: tuple[object, ...], kwargs: dict[str, Any]) -> None:
        seen.given.append((kwargs[CACHE].get_seq_length(), kwargs["input_ids"]))

    def end(module: torch.nn.Module, args: tuple[object, ...], output: object) -> None:
        if len(seen.given) == 1:  # to wait after each would slow the decoding down
            synchronize(model.device)
            seen.first_end = time.perf_counter()

    handles = [
        model.register_forward_pre_hook(begin, with_kwargs=True),
        model.register_forward_hook(end),
    ]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


def synchronize(device: torch.device) -> None:
    """Wait for what an accelerator has under way, so that a clock says what it took."""
    if device.type != "cpu":
        torch.accelerator.synchronize(device)

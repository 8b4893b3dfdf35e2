"""Plain and assisted decoding with transformers' `generate`, one prompt at a time: the decoders
that are compared, and where their texts diverge.

Target forwards are counted where they happen, by a hook on the target.

Letters: V vocabulary.
"""

import time
from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from itertools import pairwise
from typing import Any

import torch
from transformers import (
    DynamicCache,
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    PreTrainedModel,
)

from headstart.common.machine import synchronize
from headstart.common.versions import CACHE
from headstart.configs.schema import Decoder
from headstart.eval.acceptance import AcceptanceCounts
from headstart.eval.draft_cost import MAX_DRAFT_TOKENS, Costs
from headstart.eval.statistics import NO_HEAD, OWN_LENGTH
from headstart.heads.decoder import (
    Constant,
    CostRule,
    ExactDecoding,
    Heuristic,
    Lookup,
    Round,
    exact_decoding,
    stock_decoding,
)
from headstart.heads.kernels import fast_kernels
from headstart.heads.kinds import kind_of, runs_in_transformers
from headstart.heads.target import Target
from headstart.heads.tokens import Sampling

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

    def first_tokens(self, prompt_len: int) -> int:
        """How many tokens the first forward brought: one, and where a generator drafts before the
        prompt has run, the drafts of it that were accepted."""
        if len(self.forwards) < 2:
            return len(self.tokens)
        return self.forwards[1][0] - prompt_len + 1

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

    def judged_rounds(self, prompt_len: int) -> list[tuple[int, int]]:
        """`rounds`, without the drafts of the last one from the text's last token on, where that
        was drafted: the target said it too, and it was neither accepted nor rejected, since nothing
        came after it."""
        rounds = self.rounds(prompt_len)
        if rounds:
            proposed, accepted = rounds[-1]
            if accepted < proposed and self.drafts[-1][accepted] == self.tokens[-1]:
                rounds[-1] = accepted, accepted
        return rounds

    def counts(self, prompt_len: int, num_assistant_tokens: int) -> AcceptanceCounts:
        """Acceptance over the rounds."""
        return AcceptanceCounts.of_rounds(self.judged_rounds(prompt_len), num_assistant_tokens)


def decode(
    target: Target,
    prompt_ids: list[int],
    max_new_tokens: int,
    assistant: PreTrainedModel | None = None,
    num_assistant_tokens: int | None = None,
    decoding_config: ExactDecoding | None = None,
    sampling: Sampling = GREEDY,
    seed: int = 0,
    processors: Sequence[LogitsProcessor] = (),
) -> Decoded:
    """`target.model.generate`, assisted by `assistant` where one is given, else by prompt lookup
    where K is given.

    Args:
        target: batch size 1 is all that assisted decoding takes.
        prompt_ids: the prompt.
        max_new_tokens: at most so many tokens are generated.
        assistant: a head in the native format or a small model, on the target's device.
        num_assistant_tokens: K, where `decoding_config` has no length of its own.
        decoding_config: drafts of the exact decoder; None: of the stock candidate generator.
        sampling: greedy, or from the target's distribution.
        seed: of the draws.
        processors: of logits, such as hold the text to a JSON schema.
    """
    extra = {} if assistant is None else {"assistant_model": assistant}
    lookup = None if assistant is not None else num_assistant_tokens
    config = _generation_config(target, max_new_tokens, sampling, lookup)
    ids = torch.tensor([prompt_ids], device=target.device)
    rounds: deque[Round] | None = None
    drafting: AbstractContextManager[None] = nullcontext()
    if decoding_config is not None:
        length, rounds = decoding_config.length, decoding_config.rounds
        if length is None and num_assistant_tokens is not None:
            decoding_config = replace(decoding_config, length=Constant(num_assistant_tokens))
        rounds.clear()
        drafting = exact_decoding(target.model, decoding_config)
    elif assistant is not None:
        drafting = stock_decoding(assistant, num_assistant_tokens)
    torch.manual_seed(seed)
    on_cuda = target.device.type == "cuda"
    if on_cuda:
        torch.cuda.reset_peak_memory_stats(target.device)
    # On all variants, plain decoding too: what kernels gain is no decoder's merit. To pack weights
    # takes as long as some steps: for several texts at once (`kernels_of`), not within each.
    own = nullcontext() if assistant is None else fast_kernels(assistant, packs=False)
    fast = fast_kernels(target.model, packs=False)
    with fast, own, drafting, _watch(target.model) as seen, torch.inference_mode():
        synchronize(target.device)
        start = time.perf_counter()
        output = target.model.generate(
            ids, attention_mask=torch.ones_like(ids), generation_config=config,
            logits_processor=LogitsProcessorList(processors), **extra,
        )  # fmt: skip
        synchronize(target.device)
        seconds = time.perf_counter() - start
    return Decoded(
        tokens=output[0, len(prompt_ids) :].tolist(),
        seconds=seconds,
        first_token_seconds=seen.first_end - start,
        drafting_seconds=None if rounds is None else sum(r.seconds for r in rounds),
        forwards=[(cached, ids.shape[1]) for cached, ids in seen.given],
        drafts=[ids[0, 1:].tolist() for _, ids in seen.given[1:]],
        looked_up=sum(r.looked_up for r in rounds or ()),
        peak_memory_bytes=torch.cuda.max_memory_allocated(target.device) if on_cuda else None,
    )


def _generation_config(
    target: Target, max_new_tokens: int, sampling: Sampling, lookup: int | None
) -> GenerationConfig:
    chosen: dict[str, Any] = {"do_sample": sampling.temperature > 0}
    if sampling.temperature:
        chosen |= {"temperature": sampling.temperature, "top_p": sampling.top_p}
        chosen |= {"top_k": sampling.top_k or 0}  # unset, transformers takes 50
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


START = 4  # draft tokens with which `heuristic` begins


@dataclass(frozen=True)
class DecoderVariant:
    """One way to decode that is compared with plain decoding."""

    decoder: Decoder
    head: str | None
    """Name of the head, or of the small model; None: it needs neither."""
    num_assistant_tokens: int
    """K, the most drafts of a round."""
    assistant: PreTrainedModel | None
    decoding_config: ExactDecoding | None
    """Of the exact decoder; learns from prompt to prompt."""
    costs: Costs | None
    """What its drafts and verifications cost; None: not measured."""

    @property
    def key(self) -> list[str | int | None]:
        """By which it is found again in a file."""
        return [self.decoder, self.head, self.num_assistant_tokens]

    def decode(
        self,
        target: Target,
        prompt_ids: list[int],
        max_new_tokens: int,
        sampling: Sampling,
        seed: int,
        processors: Sequence[LogitsProcessor] = (),
    ) -> Decoded:
        """One text."""
        return decode(
            target, prompt_ids, max_new_tokens, self.assistant, self.num_assistant_tokens,
            decoding_config=self.decoding_config, sampling=sampling, seed=seed,
            processors=processors,
        )  # fmt: skip


@contextmanager
def kernels_of(target: Target, variants: Iterable[DecoderVariant]) -> Iterator[None]:
    """Within, what these kernels prepare of the weights lasts from text to text."""
    heads = {id(v.assistant): v.assistant for v in variants if v.assistant is not None}
    with ExitStack() as kernels:
        for model in (target.model, *heads.values()):
            kernels.enter_context(fast_kernels(model))
        yield


def make_variants(
    decoders: Sequence[Decoder],
    num_assistant_tokens: Sequence[int],
    heads: Mapping[str, PreTrainedModel],
    draft_models: Mapping[str, PreTrainedModel],
    costs: Mapping[str, dict[str, Costs]],
) -> list[DecoderVariant]:
    """Each decoder with each head and each K; those that choose K themselves once for each head,
    and transformers' own with the heads that it runs.

    Args:
        decoders: what to compare.
        num_assistant_tokens: the K of those that keep to one.
        heads: name -> head.
        draft_models: name -> small model.
        costs: head -> what `measure_costs` found, of those where it was asked.
    """
    variants = list[DecoderVariant]()
    for decoder in decoders:
        ks = [MAX_DRAFT_TOKENS] if decoder in OWN_LENGTH else num_assistant_tokens
        models: Mapping[Any, Any] = heads
        if decoder in NO_HEAD:
            models = {None: None} if decoder == "lookup" else draft_models
        for name, model in models.items():
            if decoder == "transformers" and not runs_in_transformers(model.config):
                continue
            cost: Costs | None = None
            if decoder not in NO_HEAD and name in costs:
                cost = costs[name]["transformers" if decoder == "transformers" else "exact"]
            elif decoder == "lookup" and costs:
                cost = Costs(0.0, next(iter(costs.values()))["exact"].v)
            variants += [
                DecoderVariant(decoder, name, k, model, _drafting(decoder, cost, model), cost)
                for k in ks
            ]
    return variants


def _drafting(
    decoder: Decoder, costs: Costs | None, model: PreTrainedModel | None
) -> ExactDecoding | None:
    """How the exact decoder drafts; None: the stock one does."""
    if decoder == "exact":
        return ExactDecoding()
    if decoder == "unconstrained":
        return ExactDecoding(follow_text=False)
    if decoder == "heuristic":
        return ExactDecoding(Heuristic(START, MAX_DRAFT_TOKENS))
    if decoder not in OWN_LENGTH:
        return None
    assert costs is not None
    assert model is not None
    rule = CostRule(costs.c, costs.v, kind_of(model.config).most_drafts(model.config))
    return ExactDecoding(rule, Lookup(rule) if decoder == "hybrid" else None)


ROUNDING = {"float32": 1e-3, "bfloat16": 0.25}
"""Gap between two logits that the shape of a batch may turn around anywhere: in bfloat16 two units
in the last place of logits between 16 and 32 (Gemma 4's are capped at 30)."""
AT_A_TIME = (1, 5)  # rows of the forwards that plain decoding and a verification make


@dataclass(frozen=True)
class Divergence:
    """What the target says where two texts diverge."""

    top2_logit_gap: float
    """Between its two best tokens, in one forward over the whole text."""
    token_logit_gap: float | None
    """Between the tokens of the two texts there; None: one of the texts had ended."""
    rounding: float | None
    """How much that gap differs between forwards over the same tokens: over all of them at once,
    one after another, five at a time. None: not measured, the gap is within `ROUNDING` anyway."""

    @property
    def within_rounding(self) -> bool:
        """Whether the roundings of forwards of different shapes may have turned the two around."""
        if self.token_logit_gap is None:
            return False
        # Twice: three forwards show a part of what rounding can do.
        return self.rounding is None or self.token_logit_gap <= 2 * self.rounding


def divergence(plain: list[int], assisted: list[int]) -> int | None:
    """Index of the first token that differs; None: equal."""
    if plain == assisted:
        return None
    shorter = min(len(plain), len(assisted))
    pairs = zip(plain, assisted, strict=False)
    return next((i for i, (a, b) in enumerate(pairs) if a != b), shorter)


@torch.no_grad()
def explain_divergence(
    target: Target,
    prompt_ids: list[int],
    plain: list[int],
    assisted: list[int],
    processors: Sequence[LogitsProcessor] = (),
) -> Divergence | None:
    """Where and why two greedy texts diverge, of which these are the new tokens; None: they are
    equal. The target is in the dtype that they were decoded in, the processors are alike."""
    if (at := divergence(plain, assisted)) is None:
        return None
    ids = prompt_ids + plain[:at]
    logits = _last_logits(target, ids, len(ids), len(ids))
    scores = logits[None]
    for processor in processors:
        scores = processor(torch.tensor([ids], device=target.device), scores)
    best = scores[0].topk(2).values
    top2 = float(best[0] - best[1])
    if at >= min(len(plain), len(assisted)):
        return Divergence(top2, None, None)

    def gap(logits: torch.Tensor) -> float:
        return float(logits[plain[at]] - logits[assisted[at]])

    gaps = [gap(logits)]
    if abs(gaps[0]) <= ROUNDING[str(target.table.dtype).removeprefix("torch.")]:
        return Divergence(top2, abs(gaps[0]), None)
    gaps += [gap(_last_logits(target, ids, len(prompt_ids), rows)) for rows in AT_A_TIME]
    return Divergence(top2, abs(gaps[0]), max(gaps) - min(gaps))


def _last_logits(target: Target, ids: list[int], first: int, rows: int) -> torch.Tensor:
    """[V] logits after `ids`, given in a forward of the `first` and then so many rows at a time."""
    cache = DynamicCache(config=target.config)
    given = torch.tensor([ids], device=target.device)
    edges = [0, *range(first, len(ids), rows), len(ids)]
    logits = torch.empty(0)
    with fast_kernels(target.model, packs=False):
        for start, end in pairwise(edges):
            logits = target.model(
                input_ids=given[:, start:end],
                attention_mask=torch.ones_like(given[:, :end]),
                use_cache=True,
                logits_to_keep=1,
                **{CACHE: cache},
            ).logits[0, -1]
    return logits.float()

"""The clean-KV decoder: transformers' assisted decoding with a candidate generator of ours, and the
rules for how many tokens to draft in a round.

Loop, caches, logits processors and stopping criteria are those of `generate`; only the drafts come
from here, and the kernels on which target and head run (`fast_kernels`).
The head sees what is valid of each forward of the target, and keeps nothing of rejected drafts
(`DraftState`; of an assistant, `CleanKV`). The processors of the call shape drafts too, each after
the text with the drafts before it. Greedy drafts are the best tokens. Where the target samples the
head samples too, and hands out what it drew from: what speculative sampling (Leviathan et al.
2023, arXiv 2211.17192) asks for to be lossless. Drafts that are no samples, those looked up, go
without logits: the loop then samples from the target and compares, which is lossless for them.
docs/upstream.md has what the stock generator does otherwise.

Speedup at K draft tokens is tau / (K*c + v(K)), in steps of the target (c a draft step, v(K)
the verification of K draft tokens, tau the tokens emitted). A longer draft pays while what it adds
to tau is worth more than what it costs.

Letters: K draft tokens of a round, k of them drafted so far, V vocabulary, n tokens of the text.
"""

import copy
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field, replace
from math import prod
from threading import Lock
from types import MethodType
from typing import Any, ClassVar, Literal, Protocol
from weakref import WeakKeyDictionary

import torch
from transformers import (
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    PreTrainedModel,
    SynthIDTextWatermarkLogitsProcessor,
    UnbatchedClassifierFreeGuidanceLogitsProcessor,
)
from transformers.generation.candidate_generator import (
    CandidateGenerator,
    PromptLookupCandidateGenerator,
)

from headstart.common.versions import CACHE
from headstart.heads.drafting import WARPERS, Drafter, Drafts
from headstart.heads.kernels import fast_kernels
from headstart.heads.kinds import Verified, check_drafts, inputs_of, is_head
from headstart.heads.saving import draft_position_offset
from headstart.heads.unroll import served_position

BINS = 8  # of confidence, each with an acceptance rate of its own
OPTIMISTIC_PRIOR = 0.8  # acceptance rate of a place not tried yet: high, so that it is tried
PRIOR = 4.0  # drafts that a rate is assumed to have seen
FORGETTING = 0.98  # a draft's weight beside the next one's


class DraftLength(Protocol):
    """A rule that ends drafts."""

    @property
    def goes_on(self) -> Callable[[list[float]], bool] | None:
        """Asked, after each draft, with the confidences so far: whether to draft another; None: up
        to the limit."""

    def limit(self) -> int:
        """Draft tokens of this round at most; 0: none, the target decodes one step plainly."""
        ...

    def update(self, confidences: list[float], drafted: int, accepted: int) -> None:
        """What became of a round's drafts."""


@dataclass
class Constant:
    """After K tokens always, as the stock decoder does."""

    num_assistant_tokens: int
    goes_on: ClassVar[None] = None

    def limit(self) -> int:
        return self.num_assistant_tokens

    def update(self, confidences: list[float], drafted: int, accepted: int) -> None:
        pass


@dataclass
class Heuristic(Constant):
    """Two more after a round that accepted all, one less after any other.

    Mirrors `AssistedCandidateGenerator.update_candidate_strategy` of transformers 5.20 to 5.24,
    which knows no `most`.
    """

    most: int | None = None
    """Drafts of a round that are never exceeded."""

    def update(self, confidences: list[float], drafted: int, accepted: int) -> None:
        change = 2 if accepted == drafted else -1
        self.num_assistant_tokens = max(1, self.num_assistant_tokens + change)
        if self.most is not None:
            self.num_assistant_tokens = min(self.num_assistant_tokens, self.most)


@dataclass
class Rate:
    """A share that forgets what was long ago and starts from an assumption."""

    assumed: float
    hits: float = 0.0
    tries: float = 0.0

    def count(self, hit: bool) -> None:
        self.fade()
        self.hits, self.tries = self.hits + hit, self.tries + 1

    def fade(self) -> None:
        """Forget a little, so that what has not been tried for long is tried again."""
        self.hits, self.tries = self.hits * FORGETTING, self.tries * FORGETTING

    @property
    def value(self) -> float:
        return (self.hits + PRIOR * self.assumed) / (self.tries + PRIOR)


@dataclass
class CostRule:
    """As many drafts as pay on this machine, told from the head's confidence.

    A round goes on as long as some longer draft promises more tokens than its cost would earn
    otherwise, at the rate (tokens a target step) of the rounds so far: optimal for a renewal
    process whose probabilities are right. The probability of a draft is learned while decoding:
    the acceptance rate of drafts of like confidence, and for drafts not made yet that of their
    place in the round. Where no draft pays it decodes plainly, and tries again now and then.
    """

    c: float
    """A draft step, in target steps."""
    v: Sequence[float]
    """v(0) = 1, v(1) .. v(K): verification of so many draft tokens, in target steps."""
    most: int | None = None
    """Drafts that the head makes at most; None: any number."""
    tokens: float = field(default=1.0, init=False)
    cost: float = field(default=1.0, init=False)

    def __post_init__(self) -> None:
        if len(self.v) < 2 or self.v[0] != 1:
            raise ValueError(f"v has to begin with v(0) = 1 and go on, not {list(self.v)}")
        self.of_confidence = [Rate((i + 0.5) / BINS) for i in range(BINS)]
        longest = len(self.v) - 1
        self.longest = longest if self.most is None else min(longest, self.most)
        self.of_place = [Rate(OPTIMISTIC_PRIOR) for _ in range(self.longest)]

    @property
    def rate(self) -> float:
        """Tokens a target step, of the rounds so far; plain decoding makes 1."""
        return max(1.0, self.tokens / self.cost)

    def limit(self) -> int:
        return self.longest if self.goes_on([]) else 0

    def goes_on(self, confidences: list[float]) -> bool:
        k, gain = len(confidences), 0.0
        reached = prod(self._of(confidence).value for confidence in confidences)
        for longer in range(k + 1, self.longest + 1):
            reached *= self.of_place[longer - 1].value
            gain += reached
            if gain > self.rate * ((longer - k) * self.c + self.v[longer] - self.v[k]):
                return True
        return False

    def expected_tokens(self) -> float:
        """Tokens a target step that the best length promises before a round; plain decoding: 1."""
        best, reached, tokens = 1.0, 1.0, 1.0
        for k in range(1, self.longest + 1):
            reached *= self.of_place[k - 1].value
            tokens += reached
            best = max(best, tokens / (k * self.c + self.v[k]))
        return best

    def update(self, confidences: list[float], drafted: int, accepted: int) -> None:
        if not drafted:
            for rate in self.of_place:
                rate.fade()
        for i, confidence in enumerate(confidences[: accepted + 1]):
            self._of(confidence).count(i < accepted)
            self.of_place[i].count(i < accepted)
        self.tokens = self.tokens * FORGETTING + 1 + accepted
        self.cost = self.cost * FORGETTING + drafted * self.c + self.v[drafted]

    def _of(self, confidence: float) -> Rate:
        return self.of_confidence[min(BINS - 1, int(confidence * BINS))]


# It counts its calls: it acts on the target's logits alone. All others are functions of text and
# logits, as verification needs them too, and act on drafts. Any distribution may be drawn from.
NOT_ON_DRAFTS = (SynthIDTextWatermarkLogitsProcessor,)
ROUNDS_KEPT = 1 << 16  # more than a text has; a server that runs for days would fill its memory
LOOKUP_NGRAM = 3  # tokens that an earlier place has to share with the newest ones, at most


@dataclass
class Round:
    """One round: its drafts, and what became of them."""

    source: Literal["head", "lookup", "none"]
    drafts: Drafts
    seconds: float
    """Wall time of drafting."""
    accepted: int = 0

    @property
    def looked_up(self) -> int:
        """Draft tokens that were copied from the text."""
        return len(self.drafts.tokens) if self.source == "lookup" else 0


@dataclass
class ExactDecoding:
    """How the exact decoder drafts; what it learns and measures stays from text to text."""

    length: DraftLength | None = None
    """When a draft ends. None: after the head's own `generation_config.num_assistant_tokens`."""
    lookup: "Lookup | None" = None
    """Drafts from the text itself, in rounds where they promise more than the head."""
    rounds: deque[Round] = field(default_factory=lambda: deque(maxlen=ROUNDS_KEPT))
    """The newest rounds since it was emptied last, oldest first."""
    draft_position_offset: Literal[0, -1] | None = None
    """Where drafts stand (RoPE): at the newest token, or one before it as in vLLM. None: where they
    stood in the head's training."""
    follow_text: bool = True
    """Whether processors that read the text, such as those of a grammar, act on drafts too, each of
    which then sees those before it. False: on the target's logits alone, as in the stock decoder.
    """


class Lookup:
    """Drafts copied from where the newest tokens occurred before, while that has been right lately.

    What a lookup would have said is known in rounds of the head too, and counts.

    Args:
        costs: tells what a verification costs, and what the head promises.
    """

    def __init__(self, costs: CostRule):
        self.costs = costs
        self.right = Rate(0.5)
        self.found: list[int] = []

    def find(
        self,
        input_ids: torch.Tensor,
        max_length: int,
        limit: int,
        processors: LogitsProcessorList,
        vocab_size: int,
    ) -> None:
        """Look up what followed the newest of the tokens [1, n] before, up to what one of the
        processors rules out."""
        self.found = []
        limit = min(limit, len(self.costs.v) - 1)
        if limit > 0:
            generator = PromptLookupCandidateGenerator(
                num_output_tokens=limit,
                max_matching_ngram_size=LOOKUP_NGRAM,
                max_length=max_length,
                logits_processor=processors or None,
                vocab_size=vocab_size,
            )
            candidates, _ = generator.get_candidates(input_ids)
            self.found = candidates[0, input_ids.shape[1] :].tolist()

    def best(self) -> list[int]:
        """The found tokens that are worth verifying; empty where the head promises more."""
        promised, best = self.costs.expected_tokens(), 0
        reached, expected = 1.0, 1.0
        for k in range(1, len(self.found) + 1):
            reached *= self.right.value
            expected += reached
            if expected / self.costs.v[k] > promised:
                promised, best = expected / self.costs.v[k], k
        return self.found[:best]

    def update(self, said: Sequence[int]) -> None:
        """Compare with the tokens that the round brought."""
        for found, token in zip(self.found, said, strict=False):
            self.right.count(found == token)
            if found != token:
                break


class ExactCandidateGenerator(CandidateGenerator):
    """Candidates for one call of `generate`, whose maximal length, end tokens, sampling and
    processors count; `padding` tokens stand at the left of the prompt."""

    requires_model_outputs: bool = True

    def __init__(
        self,
        drafter: Drafter,
        decoding_config: ExactDecoding,
        length: DraftLength,
        padding: int,
        generation_config: GenerationConfig,
        processors: LogitsProcessorList,
    ):
        self.drafter, self.decoding_config, self.length = drafter, decoding_config, length
        self.model_kwargs_overrides = for_drafts(drafter.assistant)
        offset = decoding_config.draft_position_offset
        if offset is None:
            offset = served_position(draft_position_offset(drafter.assistant.config))
        self.state = drafter.new_text(padding, offset)
        self.max_length = generation_config.max_length
        ends = generation_config._eos_token_tensor
        self.stops_after = frozenset([] if ends is None else ends.flatten().tolist())
        self.sample = generation_config.do_sample
        self.processors: list[LogitsProcessor] = [
            one for one in processors
            if isinstance(one, WARPERS)
            or (decoding_config.follow_text and not isinstance(one, NOT_ON_DRAFTS))
        ]  # fmt: skip
        self.of_text = LogitsProcessorList(p for p in self.processors if not isinstance(p, WARPERS))
        """Those that read the text."""
        self.round: Round | None = None
        self.text_length = 0

    def get_candidates(
        self,
        input_ids: torch.Tensor,
        model_outputs: Any = None,
        is_first_iteration: bool = False,
        n_last_matches: int = 0,
        **kwargs: Any,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """The text [1, n] and drafts after it, and the logits [1, K, V] that they were drawn from;
        None: they were not drawn. The target's prefill comes first, without drafts."""
        if is_first_iteration:
            return input_ids, None
        start = time.perf_counter()
        # The prefill was given the prompt, a round its newest token and the drafts.
        given = model_outputs.hidden_states[-1].shape[1]
        valid = given if self.round is None else n_last_matches + 1
        tokens = input_ids[:, -1 - valid : -1]
        self.state.commit(verified(model_outputs, tokens, self.drafter.inputs.layers))
        # One token of the budget is the target's own.
        budget = self.max_length - input_ids.shape[1] - 1
        source, drafts = self._draft(input_ids, budget)
        drawn_from, drafted = drafts.logits, drafts.on_device
        # Megabytes, which the rounds would keep.
        drafts = replace(drafts, logits=None, on_device=None)
        self.round = Round(source, drafts, time.perf_counter() - start)
        self.text_length = input_ids.shape[1]
        self.decoding_config.rounds.append(self.round)
        if drafted is None:
            drafted = torch.tensor(drafts.tokens, dtype=input_ids.dtype)
        candidates = torch.cat([input_ids, drafted.to(input_ids.device)[None]], dim=1)
        return candidates, None if drawn_from is None else drawn_from[None]

    def _draft(
        self, input_ids: torch.Tensor, budget: int
    ) -> tuple[Literal["head", "lookup", "none"], Drafts]:
        if (lookup := self.decoding_config.lookup) is not None:
            size = len(self.drafter.assistant.lm_head.weight)
            lookup.find(input_ids, self.max_length, budget, self.of_text, size)
            if found := lookup.best():
                return "lookup", Drafts(found, [])
        limit = min(self.length.limit(), budget, self.drafter.most or budget)
        if limit <= 0:
            return "none", Drafts([], [])
        return "head", self.drafter.draft(
            input_ids[:, -1:],
            self.state,
            limit=limit,
            stops_after=self.stops_after,
            goes_on=self.length.goes_on,
            processors=self.processors,
            sample=self.sample,
            text=input_ids if self.of_text else None,
        )

    def update_candidate_strategy(
        self, input_ids: torch.Tensor, scores: torch.Tensor, num_matches: int
    ) -> None:
        """Note what the target accepted."""
        if self.round is None:
            return
        self.round.accepted = int(num_matches)
        if self.decoding_config.lookup is not None:
            self.decoding_config.lookup.update(input_ids[0, self.text_length :].tolist())
        if self.round.source != "lookup":
            drafts = self.round.drafts
            self.length.update(drafts.confidences, len(drafts.tokens), self.round.accepted)


def for_drafts(assistant: PreTrainedModel) -> dict[str, bool]:
    """What a forward of the target is asked for, beside its logits, so that a head can draft."""
    asked = {"output_hidden_states": True}
    if inputs_of(assistant.config).kv:
        asked["return_shared_kv_states"] = True
    return asked


def verified(outputs: Any, tokens: torch.Tensor, layers: Sequence[int] = ()) -> Verified:
    """What a head takes of a forward of the target that was asked `for_drafts`; `tokens` [1, v] are
    those of it that belong to the text, and `layers` those whose outputs the head reads."""
    states = outputs.hidden_states  # the embeddings' first; of the last layer after the final norm
    read = {i: states[i + 1] for i in layers}
    return Verified(tokens, states[-1], outputs.get("shared_kv_states") or {}, read)


_generators = WeakKeyDictionary[PreTrainedModel, list[Callable[..., CandidateGenerator] | None]]()
"""Of the targets that decode exactly what hands out their candidates: None or somebody else's,
and then that of each context, which may end in any order."""
_turn = Lock()
_entered: ContextVar[tuple[Callable[..., CandidateGenerator], ...]] = ContextVar("own", default=())
"""Those of the contexts that this thread is in; another thread's are of its own settings."""


@contextmanager
def exact_decoding(
    target: PreTrainedModel,
    decoding_config: ExactDecoding | None = None,
    weights_change: bool = False,
) -> Iterator[None]:
    """Within, `target.generate(..., assistant_model=head)` drafts as said here.

    Args:
        target: of a class that hands out shared KV, such as `load_target(...).model`.
        decoding_config: what ends a draft, and whether the text is looked up too. None: K drafts of
            the head, as its `generation_config` says; where it does not, `generate` raises
            `ValueError`.
        weights_change: whether the weights of the target may change within, such as by training it.
    """
    decoding_config = decoding_config or ExactDecoding()
    drafters: dict[int, Drafter] = {}
    kernels = ExitStack()  # of the heads

    def generator(**kwargs: Any) -> CandidateGenerator:
        mine = [one for one in _entered.get() if one in own]
        if mine and mine[-1] is not generator:
            return mine[-1](**kwargs)
        assistant = kwargs["assistant_model"]
        if assistant is None or not is_head(assistant.config):
            stock = own[0] or MethodType(type(target)._get_candidate_generator, target)
            return stock(**kwargs)
        cache = kwargs["model_kwargs"].get(CACHE)
        if cache is not None and cache.get_seq_length():  # before the prefill
            raise ValueError(
                "a cache of an earlier turn was given, from which transformers' assisted decoding "
                f"goes wrong: leave {CACHE} out, and give each turn its whole text"
            )
        _check_call(kwargs["generation_config"], kwargs["logits_processor"])
        if id(assistant) not in drafters:
            drafters[id(assistant)] = Drafter(assistant, target.get_input_embeddings())
            kernels.enter_context(fast_kernels(assistant))
        mask = kwargs["model_kwargs"].get("attention_mask")
        padding = 0 if mask is None else int((mask == 0).sum())
        length = decoding_config.length
        if length is None:
            tokens = assistant.generation_config.num_assistant_tokens
            if not tokens:
                raise ValueError(
                    "nothing says when a draft ends: set num_assistant_tokens in the head's "
                    "generation_config, or give a rule of headstart.heads.decoder"
                )
            length = Constant(tokens)
        if type(length) is Constant:
            check_drafts(assistant.config, [length.num_assistant_tokens], "num_assistant_tokens")
        return ExactCandidateGenerator(
            drafters[id(assistant)], decoding_config, length, padding, kwargs["generation_config"],
            kwargs["logits_processor"],
        )  # fmt: skip

    with _turn:
        own = _generators.setdefault(target, [target.__dict__.get("_get_candidate_generator")])
        own.append(generator)
        target._get_candidate_generator = generator
    _entered.set((*_entered.get(), generator))
    try:
        with fast_kernels(target, packs=not weights_change), kernels:
            yield
    finally:
        _entered.set(tuple(one for one in _entered.get() if one is not generator))
        with _turn:
            own.remove(generator)
            if own[-1] is not None:  # at once: a thread may be about to ask for it
                target._get_candidate_generator = own[-1]
            else:
                del target._get_candidate_generator
            if len(own) == 1:
                del _generators[target]


def _check_call(config: GenerationConfig, processors: LogitsProcessorList) -> None:
    """Raise `ValueError` for settings of a call with which assisted decoding writes other text than
    plain decoding (docs/upstream.md)."""
    if config.stop_strings:
        raise ValueError(
            "assisted decoding goes on past stop_strings within accepted drafts: leave them out, "
            "and cut the text where one stands"
        )
    if any(isinstance(one, UnbatchedClassifierFreeGuidanceLogitsProcessor) for one in processors):
        raise ValueError(
            "guidance_scale runs the target along with the text, rejected drafts in it: leave it "
            "out, or decode plainly"
        )


@contextmanager
def stock_decoding(assistant: PreTrainedModel, num_assistant_tokens: int | None) -> Iterator[None]:
    """Within, the stock decoder drafts K tokens in each round: it reads K from the
    `generation_config` of the assistant and nowhere else."""
    before = assistant.generation_config
    own = assistant.generation_config = copy.deepcopy(before)
    own.num_assistant_tokens = num_assistant_tokens
    # A small model keeps to K too.
    own.num_assistant_tokens_schedule, own.assistant_confidence_threshold = "constant", 0.0
    try:
        yield
    finally:
        assistant.generation_config = before

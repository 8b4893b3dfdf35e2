"""What a draft costs beside a step of the target, measured: `headstart bench draft`.

Speedup at K draft tokens is tau / (K*c + v(K)): c is a draft step and v(K) the verification of K
draft tokens, both in steps of the target. So K*c + v(K) is the acceptance length tau from which on
a head pays.

All are measured from one state of decoding, to which each returns.

Letters: B texts, T tokens of context, K draft tokens, D target width.
"""

import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.table import Column, Table
from transformers import DynamicCache, GenerationConfig, PreTrainedModel
from transformers.generation.candidate_generator import (
    SinglePositionMultiTokenCandidateGenerator,
)

from headstart.common.console import counted, plain_console
from headstart.common.files import write_figures
from headstart.common.machine import busy_seconds, environment, machine_name, timed
from headstart.common.versions import CACHE
from headstart.configs.schema import EvalConfig
from headstart.eval.statistics import OWN_LENGTH, slow_baseline
from headstart.heads.decoder import stock_decoding, verified
from headstart.heads.drafting import Drafter
from headstart.heads.kernels import fast_kernels
from headstart.heads.kinds import DraftState, Verified, inputs_of, kind_of, runs_in_transformers
from headstart.heads.pairing import check_pair
from headstart.heads.target import Target

MAX_DRAFT_TOKENS = 8  # verifications are measured for K = 1 .. 8
FOR_DRAFTS = {"output_hidden_states": True, "return_shared_kv_states": True}


@dataclass(frozen=True)
class DecodeState:
    """A target that has run on `context` tokens, and what a draft after its next step starts from.

    Each step, verification and draft starts from here again; `restore` takes back what a step
    added to the cache.
    """

    target: Target
    ids: torch.Tensor
    """[1, T + K + 1] the context and the tokens after it."""
    context: int
    """T, tokens in the cache."""
    cache: DynamicCache
    outputs: Any
    """Of the target's forward over token T, as the stock decoder hands them to the head."""
    seen: tuple[Verified, Verified]
    """Of the forwards over the context and over token T, as the exact decoder does."""

    def step(self) -> torch.Tensor:
        """Decode one token plainly, as `generate` does: the next token, [1, 1]."""
        return self._go_on(1).logits.float().argmax(dim=-1)

    def verify(self, num_assistant_tokens: int) -> torch.Tensor:
        """Verify K draft tokens as the stock assisted decoder does: the target's own tokens
        [1, K + 1]. It asks for hidden states and shared KV, and compares in float32."""
        return self._go_on(1 + num_assistant_tokens, **FOR_DRAFTS).logits.float().argmax(dim=-1)

    def draft(self, assistant: PreTrainedModel, num_assistant_tokens: int) -> torch.Tensor:
        """Draft K tokens after token T + 1 as the stock decoder does: [1, K]."""
        ids = self.ids[:, : self.context + 2]
        settings = GenerationConfig(max_length=ids.shape[1] + num_assistant_tokens + 1)
        with stock_decoding(assistant, num_assistant_tokens):
            generator = SinglePositionMultiTokenCandidateGenerator(
                assistant, self.target.model.get_input_embeddings(), settings
            )
        candidates, _ = generator.get_candidates(
            ids,
            model_kwargs={"attention_mask": torch.ones_like(ids)},
            model_outputs=self.outputs,
            is_first_iteration=False,
            n_last_matches=0,
        )
        return candidates[:, ids.shape[1] :]

    def begin(self, drafter: Drafter) -> DraftState:
        """What drafting after token T + 1 begins with, each time anew."""
        begun = drafter.new_text()
        for seen in self.seen:
            begun.commit(seen)
        return begun

    def draft_exact(
        self, drafter: Drafter, begun: DraftState, num_assistant_tokens: int
    ) -> list[int]:
        """Draft K tokens after token T + 1 as the exact decoder does, from what `begin` gave."""
        token, k = self.ids[:, self.context + 1 : self.context + 2], num_assistant_tokens
        return drafter.draft(token, begun, k, frozenset(), goes_on=None).tokens

    def restore(self) -> None:
        """Take the rows after the context out of the cache again."""
        self.cache.crop(self.context - self.cache.get_seq_length())

    def _go_on(self, tokens: int, **kwargs: Any) -> Any:
        return forward(self.target, self.cache, self.ids[:, : self.context + tokens], **kwargs)


def forward(target: Target, cache: DynamicCache, ids: torch.Tensor, **kwargs: Any) -> Any:
    """Run the target over the last of `ids` [B, T], those that the cache does not hold yet."""
    return target.model(
        input_ids=ids[:, cache.get_seq_length() :],
        attention_mask=torch.ones_like(ids),
        use_cache=True,
        **{CACHE: cache},
        **kwargs,
    )


def random_ids(target: Target, texts: int, tokens: int) -> torch.Tensor:
    """[texts, tokens] on the target's device: a seeded draw of ordinary ids, those of the second
    and third quarter of the vocabulary: special tokens and the places of images stand at its ends.

    What a step costs does not depend on their values, but in a mixture of experts, where chance
    decides how many of them a verification reads.
    """
    size, seeded = target.config.vocab_size, torch.Generator().manual_seed(0)
    ids = torch.randint(size // 4, 3 * size // 4, (texts, tokens), generator=seeded)
    return ids.to(target.device)


@torch.inference_mode()
def prepare(target: Target, context: int, layers: Sequence[int] = ()) -> DecodeState:
    """Run the target on a context of `context` tokens, `random_ids`, for heads that read outputs of
    `layers`."""
    ids = random_ids(target, 1, context + MAX_DRAFT_TOKENS + 1)
    cache = DynamicCache(config=target.config)
    cache.activate_past_recording()  # as the stock assisted decoder does: sliding layers can be cut
    prefill = forward(target, cache, ids[:, :context], logits_to_keep=1, **FOR_DRAFTS)
    cache.crop(0)
    outputs = forward(target, cache, ids[:, : context + 1], **FOR_DRAFTS)
    seen = (
        verified(prefill, ids[:, :context], layers),
        verified(outputs, ids[:, context : context + 1], layers),
    )
    state = DecodeState(target, ids, context, cache, outputs, seen)
    state.restore()
    return state


@contextmanager
def dense_lm_head(assistant: PreTrainedModel) -> Iterator[None]:
    """Within, a head with ordered embeddings runs its LM head over the whole vocabulary."""
    ordered = assistant.config.use_ordered_embeddings
    assistant.config.use_ordered_embeddings = False
    try:
        yield
    finally:
        assistant.config.use_ordered_embeddings = ordered


DRAFTS = 4  # a draft step is timed as a part of a round: its first draft finds other weights cached
TURNS = 40  # of each variant; the median counts
WARM_UP = 2  # turns thrown away
COST_CONTEXT, COST_TURNS = 128, 10  # of `measure_costs`
KINDS = {
    "dense": "dense",
    "ordered": "ordered",
    "exact_dense": "exact decoder, dense",
    "exact_ordered": "exact decoder, ordered",
}
"""Draft steps that are measured: through the stock draft loop, or the exact decoder's."""


@torch.inference_mode()
def measure(
    state: DecodeState,
    assistant: PreTrainedModel,
    turns: int | None = None,
    middle: Callable[[list[float]], float] = statistics.median,
    longest: int = MAX_DRAFT_TOKENS,
    budget: float | None = None,
) -> dict[str, Any]:
    """Seconds of each variant, the variants taking turns, every other turn in reverse order. All
    of them run on the same kernels, as in an evaluation.

    Args:
        state: from `prepare`.
        assistant: a head that fits its target, on the same device.
        turns: of each variant. None: `TURNS`.
        middle: of a variant's seconds, one a turn.
        longest: the largest K that is verified, 8 at most.
        budget: seconds after which no further turn begins, once there is one that counts.

    Returns:
        The `middle` of the turns: `target_step`, `verification` (a list, K = 1 to `longest`),
        `draft_step_dense` and `draft_step_exact_dense` and, for a head with ordered embeddings,
        `draft_step_ordered` and `draft_step_exact_ordered`; those of the stock decoder, without
        `exact` in their names, only for a head that it can run.
    """
    verified = range(1, longest + 1)
    variants = _variants(state, assistant, verified)
    seconds: dict[str, list[float]] = {name: [] for name in variants}
    began = time.perf_counter()
    with fast_kernels(state.target.model), fast_kernels(assistant):
        for turn in counted(range(WARM_UP + (turns or TURNS)), "Measuring (turns)"):
            if budget is not None and turn > WARM_UP and time.perf_counter() - began > budget:
                break
            for name in list(variants) if turn % 2 == 0 else reversed(variants):
                taken = timed(state.target.device, variants[name])
                state.restore()
                if turn >= WARM_UP:
                    seconds[name].append(taken)
    found = {name: middle(values) for name, values in seconds.items()}
    drafts = drafts_timed(assistant)
    return {
        "target_step": found["target_step"],
        "verification": [found[f"verification of {k}"] for k in verified],
        **{name: taken / drafts for name, taken in found.items() if name.startswith("draft_step")},
    }


def _variants(
    state: DecodeState, assistant: PreTrainedModel, verified: range
) -> dict[str, Callable[[], object]]:
    """What is measured, by name."""
    embed, drafts = state.target.model.get_input_embeddings(), drafts_timed(assistant)
    stock = runs_in_transformers(assistant.config)
    with dense_lm_head(assistant):
        dense = Drafter(assistant, embed)

    def draft_dense() -> None:
        with dense_lm_head(assistant):
            state.draft(assistant, drafts)

    exact = partial(state.draft_exact, dense, state.begin(dense), drafts)
    variants: dict[str, Callable[[], object]] = {"target_step": state.step}
    variants |= {"draft_step_dense": draft_dense} if stock else {}
    variants |= {"draft_step_exact_dense": exact}
    variants |= {f"verification of {k}": partial(state.verify, k) for k in verified}
    if assistant.config.use_ordered_embeddings:
        ordered = Drafter(assistant, embed)
        if stock:
            variants["draft_step_ordered"] = partial(state.draft, assistant, drafts)
        begun = state.begin(ordered)
        variants["draft_step_exact_ordered"] = partial(state.draft_exact, ordered, begun, drafts)
    return variants


def drafts_timed(assistant: PreTrainedModel) -> int:
    """Drafts of the rounds that are timed: `DRAFTS`, or as many as the head can make."""
    return min(DRAFTS, kind_of(assistant.config).most_drafts(assistant.config) or DRAFTS)


def cost_ratios(seconds: dict[str, Any]) -> dict[str, Any]:
    """What `measure` found, in steps of the target.

    Returns:
        `c_dense`, `c_ordered`, `c_exact_dense`, `c_exact_ordered`: a draft step / a target step, by
        the stock draft loop and by the exact decoder's. `ordered_over_dense`,
        `exact_ordered_over_exact_dense`: of the draft steps. `v`: a verification of K draft tokens
        / a target step, a list from K = 1 on. `break_even_KIND`: K*c + v(K), from which
        acceptance length on assisted decoding is quicker than plain decoding, lists too. Those with
        `ordered` in their name only for a head with ordered embeddings.
    """
    step = seconds["target_step"]
    c = {k: seconds[f"draft_step_{k}"] / step for k in KINDS if f"draft_step_{k}" in seconds}
    ratios: dict[str, Any] = {f"c_{kind}": value for kind, value in c.items()}
    for loop in ("", "exact_"):
        if f"{loop}ordered" in c:
            ratios[f"{loop}ordered_over_{loop}dense"] = c[f"{loop}ordered"] / c[f"{loop}dense"]
    ratios["v"] = v = [taken / step for taken in seconds["verification"]]
    for kind in c:
        ratios[f"break_even_{kind}"] = [k * c[kind] + cost for k, cost in enumerate(v, start=1)]
    return ratios


@dataclass(frozen=True)
class Costs:
    """What a round costs, in steps of the target."""

    c: float
    """A draft step."""
    v: list[float]
    """v(0) = 1, v(1), ..: a verification of so many draft tokens."""

    def of_round(self, drafted: int) -> float:
        """Of a round of so many drafts; beyond v's end, as if v went on as it did last."""
        beyond = max(0, drafted - len(self.v) + 1)
        return self.c * drafted + self.v[drafted - beyond] + beyond * (self.v[-1] - self.v[-2])


def longest_draft(chosen: EvalConfig) -> int:
    """The largest K whose cost an evaluation needs: that of its decoders which keep to one, or all
    where one chooses for itself."""
    ks = chosen.num_assistant_tokens
    chooses = not ks or any(decoder in OWN_LENGTH for decoder in chosen.decoders)
    return MAX_DRAFT_TOKENS if chooses else min(max(ks), MAX_DRAFT_TOKENS)


def measure_costs(
    target: Target,
    assistant: PreTrainedModel,
    longest: int = MAX_DRAFT_TOKENS,
    budget: float | None = None,
) -> dict[str, Costs]:
    """Costs by the exact decoder, `exact`, and by the stock one, `transformers`, where that runs
    such a head.

    The least of some turns counts: other work on the machine only ever adds to a time, and a rule
    that is fed one disturbed v(K) avoids that K for good. `longest` is the largest K, and `budget`
    the seconds, as of `measure`.
    """
    state = prepare(target, COST_CONTEXT, inputs_of(assistant.config).layers)
    seconds = measure(state, assistant, COST_TURNS, min, longest, budget)
    ratios = cost_ratios(seconds)
    kind = "ordered" if assistant.config.use_ordered_embeddings else "dense"
    names = {"transformers": f"c_{kind}", "exact": f"c_exact_{kind}"}
    return {
        decoder: Costs(ratios[name], [1.0, *ratios["v"]])
        for decoder, name in names.items()
        if name in ratios
    }


@torch.inference_mode()
def busy_share(target: Target) -> float | None:
    """Share of the time of a plain step of decoding in which the GPU works, rather than waits for
    Python; None where that is not known, such as on a CPU."""
    if target.device.type == "cpu":
        return None
    state = prepare(target, COST_CONTEXT)

    def step() -> None:
        state.step()
        state.restore()

    with fast_kernels(target.model):
        busy = busy_seconds(target.device, step)
        if busy is None:
            return None
        return min(busy / min(timed(target.device, step) for _ in range(COST_TURNS)), 1.0)


def run_draft_benchmark(
    target: Target, assistant: PreTrainedModel, head_name: str, context: int, out: Path | None
) -> dict[str, Any]:
    """Measure a head beside its target, on one device and in one dtype; print the table, write the
    figures to the JSON file `out` and return them.

    Args:
        target, assistant: the head in the native format.
        head_name: what the file calls it.
        context: T, tokens in the target's cache.
        out: None: no file is written.

    Raises:
        ValueError: the head does not fit the target.
    """
    check_pair(target, assistant)
    state = prepare(target, context, inputs_of(assistant.config).layers)
    seconds = measure(state, assistant)
    what = {
        "target": target.name,
        "dtype": str(target.table.dtype).removeprefix("torch."),
        "head": head_name,
        "context": context,
    }
    content = {
        "benchmark": "draft",
        "environment": environment(target.device) | what,
        "repeats": TURNS,
        "drafts_a_repeat": drafts_timed(assistant),
        "seconds": seconds,
        "ratios": cost_ratios(seconds),
        "busy_share": busy_share(target),
    }
    print_draft_cost(content)
    write_figures(content, out)
    return content


def print_draft_cost(content: dict[str, Any]) -> None:
    """Print the times of one step each, and by K what a round costs."""
    where, seconds, ratios = content["environment"], content["seconds"], content["ratios"]
    kinds = [kind for kind in KINDS if f"c_{kind}" in ratios]
    console = plain_console()
    names = ["K", "v(K)", *(f"K*c + v(K), {KINDS[k]}" for k in kinds)]
    table = Table(
        *(Column(name, justify="right") for name in names),
        title=f"draft: {where['head']} for {where['target']}, {where['dtype']}, "
        f"{where['context']} tokens of context, {machine_name(where)}",
        caption=f"Medians of {content['repeats']} turns. The head pays from an acceptance length "
        "of K*c + v(K) on.",
    )  # fmt: skip
    columns = [ratios[name] for name in ("v", *(f"break_even_{k}" for k in kinds))]
    for k, row in enumerate(zip(*columns, strict=True), start=1):
        table.add_row(str(k), *(f"{value:.2f}" for value in row))
    console.print(table)
    if (line := slow_baseline(min(ratios["v"]))) is not None:
        console.print(line)
    console.print(f"target step: {seconds['target_step'] * 1000:.2f} ms")
    if (busy := content["busy_share"]) is not None:
        console.print(f"of which the device works {busy:.0%}")
    for kind in kinds:
        step = seconds[f"draft_step_{kind}"] * 1000
        console.print(f"draft step, {KINDS[kind]}: {step:.2f} ms, c = {ratios[f'c_{kind}']:.3f}")
    for name in ratios:
        if "_over_" in name:
            console.print(f"{name.replace('_', ' ')}: {ratios[name]:.2f}")


# Of each variant; the quicker one counts, since what disturbs a machine only slows it.
BENCH_TURNS = 2


def in_turns(target: Target, *variants: Callable[[int], None]) -> list[float]:
    """Seconds of the quickest of `BENCH_TURNS` turns of each variant: first to last, then back."""
    seconds: list[list[float]] = [[] for _ in variants]
    for turn in range(BENCH_TURNS):
        order = range(len(variants))
        for variant in order if turn % 2 == 0 else reversed(order):
            seconds[variant].append(timed(target.device, partial(variants[variant], turn)))
    return [min(turns) for turns in seconds]

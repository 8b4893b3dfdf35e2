"""What the work of a run costs on this machine, measured in seconds by doing a little of it: with
the run's own code, in its shapes, over a few of its texts, and with heads that are thrown away.

Letters: B rows of a batch, T tokens of context, N points that are clustered, C clusters,
V vocabulary, D target width.
"""

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import cycle, islice
from typing import Any

import torch

from headstart.common.machine import synchronize, timed
from headstart.configs.schema import Config, DataConfig
from headstart.data.background import to_device
from headstart.data.conversations import Conversation, answered, trainable
from headstart.data.documents import Document, Entry
from headstart.data.extraction import OnlineActivations, Recorder
from headstart.data.loader import Batch, run_loader
from headstart.data.prepare import PlannedDocuments, Questions, stream_folder
from headstart.data.regenerate import Job, answer, tokens_that_run
from headstart.data.store import ActivationStore
from headstart.eval.decoding import decode
from headstart.eval.replay import simulate_acceptance
from headstart.heads.ordered import (
    USAGE_ROWS,
    TeacherSamples,
    balanced_kmeans,
    band_sizes,
    token_usage,
)
from headstart.heads.target import Inputs, Target
from headstart.heads.unroll import DraftHead, served_position
from headstart.train.benchmark import batch_loss, take_step
from headstart.train.ordering import learn_centroids
from headstart.train.start import build_head, make_optimizer, sample_teacher_rows
from headstart.train.step import draft_batch

ENOUGH = 6.0
"""Seconds after which a measurement is not repeated. A first call also makes kernels and takes
memory from the system: of a training step of 0.25 s it has taken 2.3 s."""


def seconds_of(target: Target, call: Callable[[], object], times: int = 2) -> float:
    """Seconds of the quickest of some calls; of fewer where one takes long."""
    best = math.inf
    for _ in range(times):
        best = min(best, timed(target.device, call))
        if best > ENOUGH:
            break
    return best


WHOLE_PROMPTS = 8  # that are answered; batches are answered after short ones
SHORT = 8  # tokens of these
TOKENS = 3  # that are written
EXTRACTING = 5.0  # seconds


@dataclass(frozen=True)
class AnsweringCosts:
    """Seconds of answering batches: of each prompt token, and of each step, which writes a token in
    every row, as `fixed + B * row + B * T * context`."""

    prompt_token: float
    fixed: float
    row: float
    context: float

    def of_batch(self, jobs: Sequence[Job], new_tokens: int) -> float:
        """Of a batch whose answers are as long as they may be."""
        rows, width = len(jobs), max(len(job.prompt_ids) for job in jobs)
        between = width + new_tokens / 2
        step = self.fixed + rows * (self.row + between * self.context)
        return self.prompt_token * rows * width + step * new_tokens


class _Clock(Recorder):
    """Notes when each token was due."""

    def __init__(self, target: Target, top_k: int, room: int, inputs: Inputs):
        super().__init__(target, top_k, room, inputs)
        self.times = [time.perf_counter()]

    def note_teacher(self, logits: torch.Tensor) -> None:
        super().note_teacher(logits)
        synchronize(self.target.device)
        self.times.append(time.perf_counter())

    def seconds(self) -> tuple[float, float]:
        """Until the first token, and of a step after it."""
        first, *steps = [b - a for a, b in zip(self.times, self.times[1:], strict=False)]
        return first, min(steps, default=first)  # every row may have ended at once


def probe_answers(target: Target, asked: Questions, data: DataConfig) -> AnsweringCosts:
    """Answer a few prompts whole, then few and a batch of short ones."""

    jobs = asked.jobs

    def timed(some: list[Job]) -> tuple[float, float]:
        room = tokens_that_run(some, TOKENS)
        clock = _Clock(target, data.teacher_top_k, room, asked.inputs)
        answer(target, some, TOKENS, 0, clock)
        return clock.seconds()

    middle = sorted(jobs, key=lambda job: len(job.prompt_ids))[len(jobs) // 2]
    length = len(middle.prompt_ids)
    short = [replace(job, prompt_ids=middle.prompt_ids[:SHORT]) for job in jobs]
    few, many = min(WHOLE_PROMPTS, len(jobs)), min(data.generation_batch_size, len(jobs))
    first, whole = timed([replace(job, prompt_ids=middle.prompt_ids) for job in jobs[:few]])
    _, of_few = timed(short[:few])
    _, of_many = timed(short[:many]) if many > few else (0.0, of_few)
    row = max(0.0, of_many - of_few) / (many - few) if many > few else of_few / few
    context = max(0.0, whole - of_few) / (few * max(1, length - SHORT))
    return AnsweringCosts(first / (few * length), max(0.0, of_few - few * row), row, context)


@dataclass
class Held:
    """A few documents in memory, and what it took to make their activations."""

    documents: list[Document]
    entries: Sequence[Entry]
    seconds_per_token: float | None
    """None: they were stored."""

    def read(self, which: Sequence[int]) -> list[Document]:
        """The documents with these indices."""
        return [self.documents[i] for i in which]


def probe_documents(planned: PlannedDocuments, count: int) -> Held:
    """So many documents like those of the run; the same again where making them takes long.

    Raises:
        ValueError: what the run reads is damaged, or of another target.
    """
    target, data = planned.target, planned.data
    if data.store is not None:
        store = ActivationStore(data.store, target, planned.inputs)
        which = [i for i, entry in enumerate(store.entries) if entry.trained >= 2][:count]
        entries, found, spent = [store.entries[i] for i in which], store.read(which), None
    else:
        online = OnlineActivations(target, _texts(planned, count), data, planned.inputs)
        some = range(min(1, len(online.entries)))  # it says how many there is time for
        one = seconds_of(target, lambda: online.read(some), times=1)
        which = list(range(min(len(online.entries), count, max(1, int(EXTRACTING / one)))))
        began = time.perf_counter()
        entries, found = [online.entries[i] for i in which], online.read(which)
        spent = (time.perf_counter() - began) / max(1, sum(len(document.ids) for document in found))
    if not found:
        raise ValueError("no conversation has an answer of two tokens: nothing to train on")
    places = list(islice(cycle(range(len(found))), count))
    return Held([found[i] for i in places], [entries[i] for i in places], spent)


def _texts(planned: PlannedDocuments, count: int) -> list[Conversation]:
    """Conversations of the run, or prompts of it with as long answers as they may be, for which
    prompts stand."""
    data = planned.data
    if data.conversations is not None:
        stored = stream_folder(data.conversations, planned.target)
        return list(islice(trainable(stored, data.max_tokens), count))
    jobs = planned.questions[0].jobs
    spread = jobs[:: max(1, len(jobs) // count)][:count]
    said = [token for job in spread for token in job.prompt_ids]
    starts = range(0, len(spread) * 7, 7)  # no two answers alike
    return [
        answered(job.prompt_ids, list(islice(cycle(said), s, s + data.max_new_tokens)),
                 id=str(s), category="", source="")
        for s, job in zip(starts, spread, strict=True)
    ]  # fmt: skip


SAMPLED = 64  # of the `USAGE_ROWS` rows of V logits that a head's start and its order look at


@dataclass(frozen=True)
class TrainingCosts:
    """Seconds of training."""

    start: float
    """Of making the head at step 0."""
    step: float
    """Of an optimizer step, its batches included where the target runs for them."""
    document: float
    """Of a document in a validation."""


def probe_training(config: Config, planned: PlannedDocuments, held: Held) -> TrainingCosts:
    """Build a head as the run does, take a step or two, and validate it on a document."""
    target, c = planned.target, config.train
    samples = sample_teacher_rows(held, target.device, SAMPLED)
    began = time.perf_counter()
    head = build_head(target, config, samples, held, resumed=True)
    start = time.perf_counter() - began
    if c.vocabulary == "sparse":
        start += _usage_seconds(target, target.logits, samples)
    if c.activation_checkpointing:
        head.assistant.gradient_checkpointing_enable({"use_reentrant": False})
    batch = to_device(_batch(config, held, head), target.device)
    likely = torch.arange(len(target.table), device=target.device) < c.likely_tokens
    optimizer = make_optimizer(head, c)
    loss = partial(batch_loss, head, target, batch, config, likely)
    step = seconds_of(target, partial(take_step, head, optimizer, batch, c, loss, 0))
    if config.data.online and held.seconds_per_token is not None:
        step += held.seconds_per_token * sum(len(document.ids) for document in held.documents)
    return TrainingCosts(
        start=start,
        step=step * c.gradient_accumulation_steps,
        document=_replay_seconds(head, config, target, held),
    )


def _batch(config: Config, held: Held, head: DraftHead) -> Batch:
    return run_loader(held, config, head.inputs).batch(0)


def _replay_seconds(head: DraftHead, config: Config, target: Target, held: Held) -> float:
    """Of a document, in which a head that accepts more looks at more drafts than this one."""
    position = served_position(config.train.draft_position_offset)
    replay = partial(
        simulate_acceptance, head, target, held, config.train.num_speculative_steps, [0], position
    )
    return seconds_of(target, replay, times=1)


def _usage_seconds(
    target: Target, logits_of: Callable[[torch.Tensor], torch.Tensor], samples: TeacherSamples
) -> float:
    once = seconds_of(target, partial(token_usage, logits_of, samples), times=1)
    return once * USAGE_ROWS / max(1, len(samples.hidden))


@dataclass(frozen=True)
class OrderingCosts:
    """Seconds of giving a head ordered embeddings."""

    draft: float
    """Of each draft that they are made from."""
    drafts_a_document: float
    """In one pass over the training text."""
    usage: float
    """Of finding out how likely each token is."""
    clustering: float
    """Of clustering the vocabulary."""
    step: float
    """Of learning the centroids."""
    document: float
    """Of a document in judging the outcome."""


def probe_ordering(config: Config, target: Target, held: Held, assistant: Any) -> OrderingCosts:
    """Draft a batch with a head that has clusters of no meaning, cluster a part of the vocabulary
    and learn for two steps."""
    head = DraftHead(assistant)
    batch = to_device(_batch(config, held, head), target.device)
    position = config.train.draft_position_offset
    with torch.no_grad():
        draft = partial(draft_batch, head, target, batch, torch.float32, position)
        seconds, drafts = seconds_of(target, draft), draft()
    teacher = drafts.teacher
    drafted = TeacherSamples(drafts.states, teacher.ids.long(), teacher.logprobs)
    table = assistant.lm_head.weight.float()
    usage = drafted.token_weights(len(table))
    few = TeacherSamples(
        *(part[:SAMPLED] for part in (drafted.hidden, drafted.ids, drafted.logprobs))
    )
    learn = partial(learn_centroids, head, drafted, usage, table, seed=0)
    return OrderingCosts(
        draft=seconds / len(drafts.states),
        drafts_a_document=len(drafts.states) / config.train.batch_size,
        usage=_usage_seconds(target, lambda states: states @ table.T, few),
        clustering=_clustering_seconds(target, table, int(assistant.config.num_centroids)),
        step=max(0.0, seconds_of(target, partial(learn, 3)) - seconds_of(target, partial(learn, 1)))
        / 2,
        document=_replay_seconds(head, config, target, held),
    )


CLUSTERED = 1 << 14  # tokens that are clustered at most to see how long all take


def _clustering_seconds(target: Target, table: torch.Tensor, clusters: int) -> float:
    """Of `order_vocabulary`, from two parts of the vocabulary of which one is twice the other: the
    time grows by a power of the number of tokens, between the first and the second."""
    size = len(table) // clusters
    if clusters < 4 or len(table) <= CLUSTERED:
        return seconds_of(target, lambda: balanced_kmeans(_points(table), clusters))
    count = max(4, CLUSTERED // size)
    half, whole = (
        seconds_of(target, partial(balanced_kmeans, _points(table[: n * size]), n), times=1)
        for n in (count // 2, count)
    )
    power = min(2.0, max(1.0, math.log(whole / half) / math.log(count / (count // 2))))
    return sum(whole * (band / count) ** power for band in band_sizes(clusters))


def _points(rows: torch.Tensor) -> torch.Tensor:
    """[N, D] as `token_features` has them, but for the states that it weighs them by."""
    return torch.nn.functional.normalize(rows.float() - rows.float().mean(0), dim=1)


@dataclass(frozen=True)
class DecodingCosts:
    """Seconds of plain decoding."""

    prompt: float
    """Until the first token."""
    step: float
    """Of each token after it."""


def probe_decoding(target: Target, prompt_ids: list[int]) -> DecodingCosts:
    """Decode a few tokens."""
    decode(target, prompt_ids, 2)  # a warm-up
    decoded = decode(target, prompt_ids, 1 + 2 * TOKENS)
    steps = len(decoded.tokens) - 1
    rest = decoded.seconds - decoded.first_token_seconds
    return DecodingCosts(decoded.first_token_seconds, rest / steps if steps else rest)

"""How long the phases of a run should take on this machine, by a probe of seconds before they
begin (train/probe.py), and what is left as the run goes on."""

import json
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from headstart.common.console import duration, plain_console, print_once, within_run
from headstart.common.files import write_atomically
from headstart.configs.schema import Config, EvalConfig
from headstart.data.cache_folders import extraction_folder
from headstart.data.conversations import read_folder, trainable
from headstart.data.extraction import SHARD
from headstart.data.prepare import PlannedDocuments, stream_folder
from headstart.data.prompts import limit_evenly, load_prompt_set
from headstart.data.store import read_index, shard_paths
from headstart.eval.draft_cost import COST_TURNS, KINDS, WARM_UP, longest_draft
from headstart.eval.measurements import AGAIN_EVERY, Asked
from headstart.eval.statistics import OWN_LENGTH
from headstart.heads.target import Target
from headstart.train.checkpoints import Progress, checkpoint_progress, checkpoints
from headstart.train.ordering import RECORD, drafts_needed
from headstart.train.probe import (
    Held,
    probe_answers,
    probe_decoding,
    probe_documents,
    probe_ordering,
    probe_training,
)
from headstart.train.run_folder import PHASES
from headstart.train.start import count_steps


@dataclass
class Phase:
    """A part of a run."""

    name: str
    size: str
    """How much there is to do, in words."""
    seconds: float | None
    """That it should take; None: not known."""
    bar: str = ""
    """Of the progress bar that shows nearly all of it, the description, where there is one."""
    beside_bar: float = 0.0
    """Seconds of it that this bar does not show, since they come later."""
    took: float | None = None
    """Seconds, once it has ended."""


@dataclass
class Schedule:
    """The phases of a run, in order; none: nothing is estimated."""

    phases: list[Phase] = field(default_factory=list)
    folder: Path | None = None
    """Of the run, where phases.json says what each should take and took."""

    @property
    def seconds(self) -> float:
        """Of all phases of which it is known."""
        return sum(phase.seconds or 0.0 for phase in self.phases)

    def print(self, console: Console | None = None) -> None:
        """Print a table of at most 80 columns: a line for each phase, and the sum."""
        table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
        table.add_column("phase", no_wrap=True)
        table.add_column("")
        table.add_column("should take", justify="right", no_wrap=True)
        for phase in self.phases:
            told = "not known" if phase.seconds is None else duration(phase.seconds)
            table.add_row(phase.name, phase.size, told)
        table.add_section()
        table.add_row("all", "", duration(self.seconds))
        (console or plain_console()).print(table)

    def write(self) -> None:
        """Write phases.json."""
        if self.folder is not None:
            kept = ("name", "size", "seconds", "took")
            rows = [{key: getattr(phase, key) for key in kept} for phase in self.phases]
            write_atomically(self.folder / PHASES, json.dumps(rows, indent=2) + "\n")

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """The work of a phase: its progress says what is left of the run, and its end what it took
        and what is left then."""
        found = [number for number, phase in enumerate(self.phases) if phase.name == name]
        if not found:
            yield
            return
        phase, later = self.phases[found[0]], self.phases[found[0] + 1 :]
        of_later = sum(other.seconds or 0.0 for other in later)
        began = time.monotonic()

        def left(description: str, of_task: float | None) -> str:
            if description == phase.bar and of_task is not None:
                return f"run {duration(of_task + phase.beside_bar + of_later)} left"
            expected = (phase.seconds or 0.0) - (time.monotonic() - began)
            seconds = max(expected, of_task or 0.0)
            over = "" if seconds > 0 else "over "  # it takes longer than expected
            return f"run {over}{duration(seconds + of_later)} left"

        with within_run(left):
            yield
        phase.took = time.monotonic() - began
        self.write()
        told = "" if phase.seconds is None else f" ({duration(phase.seconds)} expected)"
        line = f"{name.capitalize()}: took {duration(phase.took)}{told}"
        if later:
            line += f", left of the run: {duration(of_later)}"
        elif all(other.took is not None for other in self.phases):
            took = sum(other.took or 0.0 for other in self.phases)
            line += f", all phases: {duration(took)} ({duration(self.seconds)} expected)"
        print_once(line)


TEXTS, TRAINING, ORDERING, EVALUATION = "texts", "training", "ordering", "evaluation"
"""Names of the phases."""


def estimate_run(
    config: Config, planned: PlannedDocuments, assistant: Any, asked: Asked
) -> list[Phase]:
    """Probe what the run costs here; phases whose work is there already take no time.

    Args:
        config: the whole run; it goes on from what its folder holds.
        planned: its documents.
        assistant: a head as the run's will be served, of weights that do not count; in float32.
        asked: how the evaluation asks.

    Raises:
        ValueError: what the run would read is damaged, or of another target.
    """
    counted = count_steps(config.train, _documents(planned)[0], processes=1)
    config = config.model_copy(update={"train": counted})
    saved = checkpoints(config.output_dir / "checkpoints")
    progress = checkpoint_progress(saved[-1]) if saved else Progress()
    held = probe_documents(planned, config.train.batch_size)
    phases = [_answering(planned, held), _training(config, planned, held, progress)]
    if config.head.use_ordered_embeddings:
        phases.append(_ordering(config, planned, held, assistant, progress))
    if config.eval is not None:
        phases.append(_evaluation(config, config.eval, planned.target, asked))
    return phases


def _answering(planned: PlannedDocuments, held: Held) -> Phase:
    data = planned.data
    if data.store is not None:
        return Phase(TEXTS, f"there: {data.store}", 0.0)
    if data.conversations is not None:
        if data.online:
            return Phase(TEXTS, f"there: {data.conversations}", 0.0)
        total, done, greedy = _extraction(planned)
        assert held.seconds_per_token is not None, "nothing was stored"
        size = f"{total - done:,} tokens to extract" + (f", {done:,} there" if done else "")
        if not greedy:  # which prompts these are is known once the others are read
            size += f"; {data.validation_conversations:,} answers to validate on come on top"
        return Phase(
            TEXTS, size, held.seconds_per_token * (total - done), bar="Extracting (tokens)"
        )
    trained, held_out = (questions.missing(data) for questions in planned.questions)
    missing = [*trained, *held_out]
    jobs = sum(map(len, missing))
    total = sum(len(questions.jobs) for questions in planned.questions)
    if not missing:
        return Phase(TEXTS, f"{total:,} conversations are there", 0.0)
    costs = probe_answers(planned.target, planned.questions[0], data)
    there = f", {total - jobs:,} there" if total > jobs else ""
    size = f"{jobs:,} of up to {data.max_new_tokens:,} tokens{there}"
    seconds = [
        sum(costs.of_batch(batch, data.max_new_tokens) for batch in batches)
        for batches in (trained, held_out)
    ]
    return Phase(TEXTS, size, sum(seconds), bar="Generating", beside_bar=seconds[1])


def _extraction(planned: PlannedDocuments) -> tuple[int, int, bool]:
    """Tokens of `data.conversations` in all; those whose activations are stored, as if each shard
    had as many conversations as there may be; whether some are greedy, to validate on."""
    data = planned.data
    assert data.conversations is not None, "the caller knows"
    lengths, greedy = list[int](), False
    for piece in trainable(stream_folder(data.conversations, planned.target), data.max_tokens):
        lengths.append(len(piece.ids))
        greedy = greedy or piece.temperature == 0
    folder, _ = extraction_folder(planned.target, data, planned.inputs)
    whole = (folder / "index.json").is_file()
    done = lengths if whole else lengths[: SHARD * len(shard_paths(folder))]
    return sum(lengths), sum(done), greedy


def _training(config: Config, planned: PlannedDocuments, held: Held, progress: Progress) -> Phase:
    c, step = config.train, progress.step
    if progress.ended(c):
        return Phase(TRAINING, f"{step:,} steps are done", 0.0)
    costs = probe_training(config, planned, held)
    validations = c.max_steps // c.eval_steps - step // c.eval_steps
    validations += bool(c.max_steps % c.eval_steps)
    validated = min(planned.data.validation_conversations, _documents(planned)[1])
    seconds = (c.max_steps - step) * costs.step + validations * validated * costs.document
    if c.max_minutes is not None:
        seconds = min(seconds, 60 * c.max_minutes - progress.seconds)
    there = f", {step:,} done" if step else ""
    early = ", fewer without gain" if c.early_stopping_patience is not None else ""
    size = f"{c.max_steps - step:,} steps{there}{early}; {validations} "
    size += "validation" if validations == 1 else "validations"
    return Phase(TRAINING, size, costs.start + seconds, bar="Training")


def _documents(planned: PlannedDocuments) -> tuple[int, int]:
    """Of training and validation, as far as they are known before they are read."""
    if planned.questions:
        trained, validated = (len(questions.jobs) for questions in planned.questions)
        return trained, validated
    data = planned.data
    if data.store is not None:
        count = sum(len(shard["documents"]) for shard in read_index(data.store)["shards"])
    else:
        assert data.conversations is not None, "one of the two"
        count = sum(1 for _ in read_folder(data.conversations))
    return data.filter.num_conversations or count, data.validation_conversations


def _ordering(
    config: Config,
    planned: PlannedDocuments,
    held: Held,
    assistant: Any,
    progress: Progress,
) -> Phase:
    clusters = int(assistant.config.num_centroids)
    size = f"{len(planned.target.table):,} tokens in {clusters:,} clusters"
    if progress.ended(config.train) and (config.output_dir / "head" / RECORD).is_file():
        return Phase(ORDERING, f"{size}, done", 0.0)
    costs = probe_ordering(config, planned.target, held, assistant)
    trained, validated = _documents(planned)
    passes = 2 * trained * costs.drafts_a_document  # at most two
    drafts = min(drafts_needed(config.head.centroid_steps), passes)
    seconds = drafts * costs.draft + costs.usage + costs.clustering
    seconds += config.head.centroid_steps * costs.step
    return Phase(ORDERING, size, seconds + validated * costs.document)


FLOAT32_BYTES = 2  # to those of bfloat16: what a token reads


def _evaluation(config: Config, chosen: EvalConfig, target: Target, asked: Asked) -> Phase:
    """As if drafts brought nothing, so that each way to decode takes as long as plain decoding:
    what the head will be worth is not known yet."""
    prompts = limit_evenly(load_prompt_set(chosen.prompts), chosen.limit)
    lengths = [(len(asked.encode(p, target.tokenizer)), p) for p in prompts]
    _, middle = sorted(lengths, key=lambda pair: pair[0])[len(lengths) // 2]
    costs = probe_decoding(target, asked.encode(middle, target.tokenizer))
    ways = sum(
        (1 if decoder in OWN_LENGTH else len(chosen.num_assistant_tokens))
        * (len(chosen.draft_models) if decoder == "draft-model" else 1)
        for decoder in chosen.decoders
    )
    times = sum(1 if t == 0 else len(chosen.seeds) for t in chosen.temperatures)
    texts = times * sum(1 + len(p.later_turns) for p in prompts)
    one = costs.prompt + (chosen.max_new_tokens - 1) * costs.step
    seconds = texts * (1 + ways + 1 / AGAIN_EVERY) * one
    turns, each = WARM_UP + COST_TURNS, 2 * longest_draft(chosen) + len(KINDS)
    seconds += turns * each * costs.step  # what a draft costs is measured first
    checked = 0.0
    if config.target.dtype != "float32" and chosen.fp32_check_prompts:
        texts = min(chosen.fp32_check_prompts, len(prompts))
        checked = texts * (1 + len(chosen.decoders)) * one * FLOAT32_BYTES
    dtype = str(target.table.dtype).removeprefix("torch.")
    size = f"{len(prompts):,} prompts, {ways + 1} ways of up to {chosen.max_new_tokens:,} tokens"
    return Phase(EVALUATION, size, seconds + checked, bar=f"Decoding ({dtype})", beside_bar=checked)

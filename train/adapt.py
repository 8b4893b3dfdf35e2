"""`headstart adapt`: a head follows its target to the target's new work, within a given time.

Measure, say what was lost, let the target answer, train on, measure again. Every stage is noted in
notes.json when it is done, and the same command goes on where it stopped.
"""

import json
import shlex
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState

from headstart.configs.adapt import DEFAULTS, Adaptation, check_settings
from headstart.configs.loader import load_config
from headstart.configs.schema import Config, EvalConfig
from headstart.data.contamination import remove_contaminated
from headstart.data.jobs import make_jobs
from headstart.data.prepare import deal_sampling
from headstart.data.prompts import Prompt, deal, load_prompts, split_by_source
from headstart.data.regenerate import regenerate
from headstart.eval.adaptation import (
    Texts,
    adaptation_markdown,
    advice,
    compare_stages,
    headline,
    outcome,
    plot_adaptation,
)
from headstart.eval.asked import as_the_head_was
from headstart.eval.environment import environment
from headstart.eval.report import as_json
from headstart.heads.export import load_assistant_config, rope_position
from headstart.heads.files import write_atomically
from headstart.heads.loading import open_target
from headstart.heads.locks import alone_in
from headstart.heads.progress import say
from headstart.heads.served import served_name
from headstart.train.before_after import (
    DECODING,
    check_before,
    measure_again,
    measure_before,
    read_texts,
    write_held_out,
)
from headstart.train.loop import train
from headstart.train.notes import Notes

SCHEMA = 2
ANSWERING = 0.5  # share of the time between both measurements in which the target answers


def adapt(
    a: Adaptation, out: Path, overrides: list[str], device: torch.device | str, command: list[str]
) -> dict[str, Any]:
    """Train a head on for a tuned target; writes adapt.json, adapt.md, adapt.png,
    held_out.jsonl and the head.

    Args:
        a: what is asked.
        out: folder; the head is in `out`/run/head.
        overrides: `section.key=value` of the training and its data.
        device: where target and head run.
        command: the command line, for the report.

    Returns:
        What adapt.json holds.

    Raises:
        ValueError: several processes, a setting that is an argument's, bad prompts, a head that
            does not fit the target, a folder of another adaptation, or a budget that measuring
            alone takes.
    """
    if PartialState().num_processes > 1:
        raise ValueError(
            "adapt runs in one process; with several use `headstart regenerate --extract`, then "
            "train with head.start=HEAD, which both take them all"
        )
    check_settings(overrides)
    start = load_assistant_config(a.head)
    config = load_config(None, [
        *DEFAULTS, ("head.start", a.head),
        ("head.use_ordered_embeddings", start.use_ordered_embeddings),
        ("train.rope_position", rope_position(start)),
        *overrides, ("run.dir", out / "run"), ("data.store", out / "answers"),
        ("target", a.target.model_dump()),
    ])  # fmt: skip
    config = config.model_copy(update={"data": as_the_head_was(config.data, a.head)})
    a = a.model_copy(update={"target": config.target})  # in the dtype of this machine
    if not (out / "notes.json").is_file():  # it would have been refused when it began
        check_before(a)
    with alone_in(out):
        settings = a.model_dump(mode="json", exclude={"measure_only"})
        settings |= {"overrides": overrides, "adaptation": SCHEMA}
        notes = Notes(out / "notes.json", settings)
        prompts = split_prompts(a, config)
        write_held_out({kind: own for kind, (_, own) in prompts.items()}, out / "held_out.jsonl")
        held_out = EvalConfig(
            prompts=str(out / "held_out.jsonl")
        )  # of which training keeps no copy
        config = config.model_copy(update={"eval": held_out})
        stages = measure_before(a, config, prompts, out, notes, device)
        told = advice(compare_stages(stages))
        say(told)
        content = {"advice": told}
        if not a.measure_only:
            # Each opens the target for itself, so that training never holds a second one.
            notes.once("conversations", lambda: _conversations(a, config, prompts, notes))
            notes.once("answering", lambda: _answer(a, config, prompts, out, notes, device))
            minutes = notes.once("minutes", lambda: max(1.0, _left(a, notes) / 60))
            notes.once("training", lambda: _train(config, minutes))
            if {"adapted", "decoding"} - set(notes.found):
                measure_again(a, config, prompts, out, notes, device)
            stages["adapted"] = read_texts(notes.found["adapted"])
            content["speedup"] = notes.found["decoding"]
        return _write(a, config, stages, content, out, notes, command)


def split_prompts(a: Adaptation, config: Config) -> dict[str, tuple[list[Prompt], list[Prompt]]]:
    """Kind -> prompts to train on, and held out: no source and no copy is in both.

    Raises:
        ValueError: a set is missing, malformed or too small to hold out from.
    """
    sources = {"domain": a.prompts} | ({"general": a.general} if a.general else {})
    loaded = {k: load_prompts(source, config.data.max_bad_rows) for k, source in sources.items()}
    parts = {}
    for kind, own in loaded.items():
        try:
            parts[kind] = split_by_source(own, a.held_out, config.run.seed, "--held-out")
        except ValueError as error:
            raise ValueError(f"{sources[kind].path}: {error}") from error
    held_out = [prompt for _, own in parts.values() for prompt in own]
    found = {}
    for kind, (training, own) in parts.items():
        kept, copies = remove_contaminated(training, held_out)
        say(f"{kind}: {len(own)} prompts held out, {len(kept):,} to train on; {copies.describe()}")
        if not (kept or a.measure_only) and (kind == "domain" or a.general_share):
            raise ValueError(
                f"{sources[kind].path}: no prompt is left to train on, since all are copies of "
                "those held out: add prompts, or lower --held-out"
            )
        found[kind] = (kept, own)
    return found


def _conversations(a: Adaptation, config: Config, prompts: Any, notes: Notes) -> int:
    """How many there is time for, whole batches, where the settings say nothing.

    Raises:
        ValueError: measuring leaves less than a minute.
    """
    d = config.data
    if d.num_conversations is not None:
        return d.num_conversations
    # After a stop in that stage, answering took less time than it would have.
    answering = max(notes.found["stale"]["answering"], notes.seconds["stale"] / 2)
    each = answering / sum(len(own) for _, own in prompts.values())
    left = _left(a, notes)
    if left < 60:
        raise ValueError(
            f"a budget of {a.budget_minutes:g} minutes is not enough: measuring takes "
            f"{sum(notes.seconds.values()) / 60:.1f} of them; give more, --budget 15m, or "
            "hold fewer prompts out, --held-out 16"
        )
    size = d.generation_batch_size
    return max(1, round(ANSWERING * left / each / size)) * size


def _answer(
    a: Adaptation, config: Config, prompts: Any, out: Path, notes: Notes, device: Any
) -> int:
    """Let the tuned target answer the prompts of the mixture; returns how many."""
    d, seed = config.data, config.run.seed
    sources = [(prompts["domain"][0], 1 - a.general_share if a.general else None)]
    if a.general and a.general_share:
        sources.append((prompts["general"][0], a.general_share))
    dealt = deal(sources, notes.found["conversations"], seed)
    target = open_target(a.target, device)
    jobs = make_jobs(dealt, deal_sampling(d, target, dealt), target, d)
    regenerate(target, jobs, d, seed, out / "answers", True, "Answering")
    return len(jobs)


def _train(config: Config, minutes: float) -> dict[str, Any]:
    """Train in the time that is left; what of summary.json the report keeps."""
    limit = config.train.max_minutes or minutes
    timed = config.train.model_copy(update={"max_minutes": limit})
    train(config.model_copy(update={"train": timed}), resume=True)
    summary = json.loads((config.run.dir / "summary.json").read_text(encoding="utf-8"))
    return {key: summary[key] for key in ("best", "validations", "parameters_trained", "data")}


def _left(a: Adaptation, notes: Notes) -> float:
    """Seconds of the budget that are not spent, and not needed to load and validate around the
    training or to measure after it."""
    walking = 1.5 * notes.seconds["stale"]
    decoding = DECODING * 60 * a.budget_minutes * bool(a.decoded)
    return 60 * a.budget_minutes - sum(notes.seconds.values()) - walking - decoding


def _write(
    a: Adaptation,
    config: Config,
    stages: dict[str, Texts],
    content: dict[str, Any],
    out: Path,
    notes: Notes,
    command: list[str],
) -> dict[str, Any]:
    compared = compare_stages(stages)
    content = {
        "adaptation": SCHEMA,
        "environment": environment(PartialState().device),
        "commands": [shlex.join(command)],
        "target": {
            **a.target.model_dump(mode="json"),
            "name": served_name(a.target.name, a.target.adapters, a.target.quantization),
        },
        "head": a.head,
        "num_assistant_tokens": a.num_assistant_tokens,
        "chat_template_kwargs": config.data.chat_template_kwargs,
        "general_share": a.general_share if a.general else 0.0,
        **headline(compared),
        **content,
        "acceptance": compared,
        "seconds": notes.seconds,
        "training": notes.found.get("training"),
    }
    content["verdict"] = outcome(content) if "adapted" in stages else content["advice"]
    write_atomically(out / "adapt.json", as_json(content))
    write_atomically(out / "adapt.md", adaptation_markdown(content))
    plot_adaptation(content, out / "adapt.png")
    say(content["verdict"])
    say(f"Written: {out / 'adapt.json'}, adapt.md, adapt.png")
    return content

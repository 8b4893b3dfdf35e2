"""`headstart adapt`: a head follows its target to the target's new work, within a given time.

Measure, say what was lost, let the target answer, train on, measure again. Every stage is noted in
notes.json when it is done, and the same command goes on where it stopped.
"""

import json
import random
import shlex
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState

from headstart.common.console import print_once
from headstart.common.files import (
    StageCache,
    expand_home,
    lock_folder,
    weights_sha256,
    write_atomically,
)
from headstart.common.machine import environment
from headstart.common.signals import Interrupted
from headstart.configs.schema import Config, EvalConfig, TargetConfig
from headstart.configs.settings import Settings
from headstart.data.conversations import (
    Conversation,
    encode_answered,
    read_folder,
    tokens_when_cut,
)
from headstart.data.extraction import extract
from headstart.data.prepare import deal_sampling
from headstart.data.prompts import Prompt, deal, limit_evenly
from headstart.data.regenerate import make_jobs, regenerate
from headstart.data.store import ActivationStore
from headstart.eval.asked import asked_by_run
from headstart.eval.decoding import decode
from headstart.eval.page import as_json
from headstart.eval.recorded import is_private, prompt_set, set_name, without_paths
from headstart.eval.replay import ReplayedText, replay_texts
from headstart.eval.report import run_evaluation
from headstart.heads.kinds import inputs_of
from headstart.heads.live import MEMORY
from headstart.heads.loading import (
    check_target,
    load_target_config,
    load_target_tokens,
    noted_target,
    open_target,
    served_name,
)
from headstart.heads.pairing import check_pair, check_shapes
from headstart.heads.saving import (
    load_assistant,
    load_assistant_config,
    made_for,
    split_pair,
)
from headstart.heads.target import Target
from headstart.heads.tokens import Sampling
from headstart.heads.unroll import DraftHead, served_position
from headstart.train.adapt_report import (
    TextsOfKinds,
    adaptation_markdown,
    advice,
    compare_stages,
    headline,
    outcome,
    plot_adaptation,
    speedups,
)
from headstart.train.adaptation import (
    HELD_OUT,
    Adaptation,
    Kinds,
    Split,
    load_kinds,
    read_adaptation,
    split_prompts,
)
from headstart.train.run import check_start, train

DECODING = 0.12  # share of the budget that the decoding in the end may take


def _base(a: Adaptation) -> TargetConfig | None:
    """The target that the head was trained for, in the dtype of the tuned one."""
    t, made = a.config.target, made_for(load_assistant_config(a.head))
    if a.options.base is not None:
        return TargetConfig(name=a.options.base, dtype=t.dtype)
    # One that was in memory is gone, or has been tuned since.
    if made is not None and not made["name"].startswith(MEMORY):
        return noted_target(made).model_copy(update={"dtype": t.dtype})
    if t.adapters or t.quantization:
        return t.model_copy(update={"adapters": [], "quantization": None})
    return None


def check_before(a: Adaptation, loaded: Kinds) -> None:
    """Raise `ValueError` where a target, an adapter, the head, or conversations that are given,
    will not do, before any answers.

    What only loaded weights of a target show, and those of the Hub, is known when it is opened.
    """
    head = load_assistant(a.head, torch.float32)
    check_start(a.config)
    for stage, served in (("reference", _base(a)), ("unadapted", a.config.target)):
        if served is not None:
            with _telling(stage):
                check_target(served)
                config = load_target_config(served.name, served.revision, served.trust_remote_code)
                check_shapes(config.get_text_config(), head.config, served.name)
    for source, prompts in loaded.get("conversations", []):
        encode_answered(prompts, source.path, load_target_tokens(a.config.target), a.config.data)


def evaluate_baseline(
    a: Adaptation, prompts: Any, notes: StageCache, device: Any
) -> dict[str, TextsOfKinds]:
    """Replay the head over what its own target says to the held-out prompts, and the tuned one.

    Args:
        a: what is asked; the answers are stored in its folder, `reference` and `unadapted`.
        prompts: kind -> prompts to train on, and held out.
        notes: where both stages are kept.
        device: where target and head run.

    Returns:
        `unadapted`, and `reference` where that target is known.

    Raises:
        ValueError: a target that does not load, or that the head does not fit.
    """
    stages = {}
    for stage, served in (("reference", _base(a)), ("unadapted", a.config.target)):
        if served is None:
            continue

        def measure(served: TargetConfig = served, stage: str = stage) -> dict[str, Any]:
            with _telling(stage):
                target = open_target(served, device)
            began = time.monotonic()
            held_out = {kind: own for kind, (_, own) in prompts.items()}
            stores = _answers(target, held_out, a, a.out / stage)
            answering = time.monotonic() - began
            texts = _replayed(target, a.head, stores, a, f"Replaying ({stage})")
            return {"texts": texts, "answering": answering}

        stages[stage] = read_texts(notes.run_once(stage, measure)["texts"])
    return stages


@contextmanager
def _telling(stage: str) -> Iterator[None]:
    """Within, an error of the target that the head was trained for says where its name is from."""
    try:
        yield
    except ValueError as error:
        if stage == "unadapted":
            raise
        raise ValueError(
            f"{error}. It was taken for the target that the head was trained for: name that one, "
            "adapt.base=NAME"
        ) from error


def _answers(
    target: Target, held_out: dict[str, list[Prompt]], a: Adaptation, folder: Path
) -> dict[str, ActivationStore]:
    """Kind -> the target's greedy answers."""
    stores, config = {}, a.config
    inputs = inputs_of(load_assistant_config(a.head))
    for kind, own in held_out.items():
        jobs = make_jobs(own, [Sampling(0.0)] * len(own), target, config.data)
        name = f"Answering ({kind}, held out)"
        regenerate(
            target, jobs, config.data, config.seed, folder / kind, extract=True, description=name,
            inputs=inputs,
        )  # fmt: skip
        stores[kind] = ActivationStore(folder / kind, target)
    return stores


def _replayed(
    target: Target, head: str, stores: dict[str, ActivationStore], a: Adaptation, doing: str
) -> dict[str, Any]:
    assistant = load_assistant(head, target.table.dtype, target.device)
    check_pair(target, assistant)
    k = a.num_assistant_tokens
    positions = dict.fromkeys(stores, served_position(a.config.train.draft_position_offset))
    found = replay_texts(DraftHead(assistant), target, stores, [k], doing, positions)
    return {kind: [text.row() for text in texts[k]] for kind, texts in found.items()}


def read_texts(found: dict[str, Any]) -> TextsOfKinds:
    """Of what a stage noted."""
    return {kind: [ReplayedText.read(row) for row in rows] for kind, rows in found.items()}


def evaluate_adapted(a: Adaptation, prompts: Any, notes: StageCache, device: Any) -> None:
    """Replay the trained head over the answers of the tuned target, and decode some of the prompts
    plainly, with the old head and with the new one; both stages are noted.

    Args: as for `evaluate_baseline`.
    """
    config, head = a.config, str(a.config.output_dir / "head")
    target = open_target(config.target, device)

    def replay() -> dict[str, Any]:
        stores = {kind: ActivationStore(a.out / "unadapted" / kind, target) for kind in prompts}
        return _replayed(target, head, stores, a, "Replaying (adapted)")

    def compare_speeds() -> dict[str, Any] | None:
        if not a.options.decoded_prompts:
            return None
        names = {"unadapted": a.head, "adapted": head}
        chosen = EvalConfig(
            prompts=str(_decodable(a, prompts, target)),
            num_assistant_tokens=[a.num_assistant_tokens],
            decoders=["exact"],
            max_new_tokens=config.data.max_new_tokens,
            fp32_check_prompts=0,
        )
        dtype = target.table.dtype
        heads = {name: load_assistant(name, dtype, target.device) for name in names.values()}
        report = run_evaluation(
            target, heads, chosen, a.out / "eval", asked=asked_by_run(config.data)
        )
        return speedups(report, names)

    notes.run_once("adapted", replay)
    notes.run_once("decoding", compare_speeds)


def write_held_out(prompts: dict[str, list[Prompt]], path: Path) -> None:
    """Write prompts such that `eval.prompts` can name them, their kind in the category."""
    rows = []
    for kind, own in prompts.items():
        for prompt in own:
            asked: dict[str, Any] = {"messages": prompt.question, "tools": prompt.tools}
            if prompt.raw:
                asked = {"text": prompt.text}
            row = {"id": f"{kind}-{prompt.id}", "category": f"{kind}: {prompt.category}", **asked}
            rows.append({key: value for key, value in row.items() if value is not None})
    write_atomically(path, "".join(json.dumps(row) + "\n" for row in rows))


def _decodable(a: Adaptation, prompts: Any, target: Target) -> Path:
    """Write the held-out prompts of each kind that there is time to decode three times each, and
    half as long again for what a decoder measures first; after a stop they stay."""
    path, data = a.out / "decoded.jsonl", a.config.data
    if path.is_file():
        return path
    first = prompts["domain"][1][0]
    ids = asked_by_run(data).encode(first, target.tokenizer)
    seconds = decode(target, ids, data.max_new_tokens).seconds  # plain: the longest of the three
    there = DECODING * 60 * a.options.budget / (4.5 * seconds) / len(prompts)
    many = max(2, min(a.options.decoded_prompts, int(there)))
    write_held_out({kind: limit_evenly(own, many) for kind, (_, own) in prompts.items()}, path)
    return path


SCHEMA = 3
EXTRACTING = 0.4  # share of the time beside answering that conversations may take
FORWARDS = 3  # tokens that the target runs over, at least, in the time in which it writes one


def adapt(
    settings: Settings, head: str, device: torch.device | str, command: list[str]
) -> dict[str, Any]:
    """Train a head on for a tuned target; writes adapt.json, adapt.md, adapt.png,
    held_out.jsonl and the head, run/head, into `settings.output_dir`.

    Args:
        settings: the tuned target, its prompts, and all else; `adapt_defaults` are the defaults.
        head: folder or Hub id of the head to go on from.
        device: where target and head run.
        command: the command line, for the report.

    Returns:
        What adapt.json holds.

    Raises:
        ValueError: several processes, a setting that would be passed over, bad prompts, a head that
            does not fit the target, a folder of another adaptation, or a budget that measuring
            alone takes.
    """
    if PartialState().num_processes > 1:
        raise ValueError(
            "adapt runs in one process; with several use `headstart extract`, then train with "
            "head.init_from=HEAD, which both take them all"
        )
    a = read_adaptation(settings, head)
    loaded = load_kinds(a)
    sets = {kind: [prompt_set(*pair) for pair in own] for kind, own in loaded.items()}
    if not (a.out / "notes.json").is_file():  # it would have been refused when it began
        check_before(a, loaded)
    with lock_folder(a.out):
        notes = StageCache(a.out / "notes.json", _identity(a, sets, device))
        prompts, given = split_prompts(a, loaded)
        write_held_out({kind: own for kind, (_, own) in prompts.items()}, a.out / HELD_OUT)
        stages = evaluate_baseline(a, prompts, notes, device)
        told = advice(compare_stages(stages))
        print_once(told)
        content = {"advice": told, "prompt_sets": sets}
        if not a.options.measure_only:
            # Each opens the target for itself, so that training never holds a second one.
            notes.run_once("conversations", lambda: _conversations(a, prompts, notes))
            notes.run_once("answering", lambda: _answer(a, prompts, given, notes, device))
            minutes = notes.run_once("minutes", lambda: max(1.0, _left(a, notes) / 60))
            notes.run_once("training", lambda: _train(a.config, minutes))
            if {"adapted", "decoding"} - set(notes.found):
                evaluate_adapted(a, prompts, notes, device)
            stages["adapted"] = read_texts(notes.found["adapted"])
            content["speedup"] = notes.found["decoding"]
        return _write(a, stages, content, notes=notes, command=command)


def _identity(a: Adaptation, sets: dict[str, list[dict[str, Any]]], device: Any) -> dict[str, Any]:
    """What has to be the same for an adaptation to go on; its prompts may move, and its folder
    until the training has a checkpoint, which names it."""
    own: Any = {"output_dir": True, "data": {"store", "cache_dir"}, "eval": True, "wandb": True}
    tree = a.config.model_dump(mode="json", exclude=own)
    tree["adapt"] = a.options.model_dump(mode="json", exclude={"measure_only"})
    general = tree["adapt"]["general_prompts"]
    given = tree["adapt"]["conversations"]
    sources = {"domain": tree["data"]["prompts"], "general": [general] if general else []}
    sources["conversations"] = [given] if given else []
    for kind, own_sets in sets.items():
        for source, recorded in zip(sources[kind], own_sets, strict=True):
            del source["path"]
            source |= {"prompt_set": recorded}
    asked = {"adaptation": SCHEMA, "head": a.head, "seed": tree.pop("seed")}
    asked["eval.num_assistant_tokens"] = a.num_assistant_tokens
    # Names stay where weights are tuned on.
    if a.config.target.name.startswith(MEMORY):
        asked["target.fingerprint"] = open_target(a.config.target, device).fingerprint
    for name in (a.config.target.name, *a.config.target.adapters, *split_pair(a.head)):
        if name is not None and Path(name).exists():
            asked[f"the weights in {name}"] = weights_sha256(Path(name))
    return asked | {f"{name}.{key}": v for name, part in tree.items() for key, v in part.items()}


def _conversations(a: Adaptation, prompts: Any, notes: StageCache) -> int:
    """How many there is time for, whole batches, where the settings say nothing.

    Raises:
        ValueError: measuring leaves less than a minute.
    """
    d, share = a.config.data, a.options.answering_share
    if share and d.num_conversations is not None:
        return d.num_conversations
    each = _answering_seconds(notes) / sum(len(own) for _, own in prompts.values())
    left = _left(a, notes)
    if left < 60:
        raise ValueError(
            f"a budget of {a.options.budget:g} minutes is not enough: measuring took "
            f"{sum(notes.seconds.values()) / 60:.1f} of them, and what it takes again after the "
            "training leaves less than one minute to train; give more than that, such as "
            "adapt.budget=15m, or hold out fewer prompts than "
            f"adapt.held_out_prompts={a.options.held_out_prompts}"
        )
    size = d.generation_batch_size
    return max(1, round(share * left / each / size)) * size if share else 0


def _answering_seconds(notes: StageCache) -> float:
    """Of the tuned target's answers to what is held out. After a stop in that stage they took less
    time than they would have."""
    return float(max(notes.found["unadapted"]["answering"], notes.seconds["unadapted"] / 2))


def _answer(
    a: Adaptation, prompts: Split, given: list[Prompt], notes: StageCache, device: Any
) -> int:
    """Let the tuned target answer the prompts of the mixture, and run it over the conversations;
    returns how many of both."""
    d, seed = a.config.data, a.config.seed
    share = _general_share(a, notes)
    sources = [(prompts["domain"][0], 1 - share if a.options.general_prompts else None)]
    if share:
        sources.append((prompts["general"][0], share))
    count = notes.found["conversations"]
    dealt = deal(sources, count, seed) if count else []
    target = open_target(a.config.target, device)
    jobs = make_jobs(dealt, deal_sampling(d, target, dealt), target, d) if dealt else []
    inputs = inputs_of(load_assistant_config(a.head))
    inputs = inputs._replace(prompts=not d.completion_only_loss)
    answers = a.out / ("written" if given else "answers")
    rows = []
    if given:  # first of all: some may be refused
        assert a.options.conversations is not None
        rows = encode_answered(given, a.options.conversations.path, target, d)
    if jobs:
        regenerate(
            target, jobs, d, seed, answers, extract=not given, description="Answering",
            inputs=inputs,
        )  # fmt: skip
    if not given:
        return len(jobs)
    written = list(read_folder(answers)) if jobs else []
    random.Random(seed).shuffle(rows)  # a file may be sorted, and there may be time for a part
    rows = rows[: _room_for(rows, sum(len(one.ids) for one in written), a, notes)] + written
    tokens = tokens_when_cut(rows, d.max_tokens)
    extract(target, rows, tokens, d, a.out / "answers", d.chat_template_kwargs, inputs)
    return len(rows)


def _room_for(given: list[Conversation], written: int, a: Adaptation, notes: StageCache) -> int:
    """How many of the conversations there is time to run over, beside `written` tokens that the
    target has answered with: that takes a part of the time in which it writes."""
    stores = [ActivationStore(folder) for folder in (a.out / "unadapted").iterdir()]
    answered = sum(entry.trained for store in stores for entry in store.entries)
    seconds = EXTRACTING * (1 - a.options.answering_share) * _left(a, notes)
    room, count = FORWARDS * answered / _answering_seconds(notes) * seconds - written, 0
    for conversation in given:
        room -= len(conversation.ids)
        if room < 0:
            break
        count += 1
    if count < len(given):
        print_once(f"There is time for {count:,} of the {len(given):,} conversations")
    return max(count, 1)


def _general_share(a: Adaptation, notes: StageCache) -> float:
    """Of what the target writes to train on."""
    writes = notes.found.get("conversations", 1) > 0
    return a.options.general_share if a.options.general_prompts and writes else 0.0


def _train(config: Config, minutes: float) -> dict[str, Any]:
    """Train in the time that is left; what of summary.json the report keeps."""
    limit = config.train.max_minutes or minutes
    timed = config.train.model_copy(update={"max_minutes": limit})
    try:
        train(config.model_copy(update={"train": timed}), resume=True)
    except Interrupted:
        raise Interrupted("stopped in the training, saved; the same command goes on") from None
    summary = json.loads((config.output_dir / "summary.json").read_text(encoding="utf-8"))
    return {key: summary[key] for key in ("best", "validations", "parameters_trained", "data")}


def _left(a: Adaptation, notes: StageCache) -> float:
    """Seconds of the budget that are not spent, and not needed to load and validate around the
    training or to measure after it."""
    replaying = 1.5 * notes.seconds["unadapted"]
    decoding = DECODING * 60 * a.options.budget * bool(a.options.decoded_prompts)
    return 60 * a.options.budget - sum(notes.seconds.values()) - replaying - decoding


def _write(
    a: Adaptation,
    stages: dict[str, TextsOfKinds],
    content: dict[str, Any],
    notes: StageCache,
    command: list[str],
) -> dict[str, Any]:
    compared = compare_stages(stages)
    content = {
        "adaptation": SCHEMA,
        "environment": environment(PartialState().device),
        "commands": [shlex.join(map(expand_home, command))],
        "target": {
            **a.config.target.model_dump(mode="json"),
            "name": served_name(a.config.target),
        },
        "head": a.head,
        "num_assistant_tokens": a.num_assistant_tokens,
        "chat_template_kwargs": a.config.data.chat_template_kwargs,
        "general_share": _general_share(a, notes),
        **headline(compared),
        **content,
        "acceptance": compared,
        "seconds": notes.seconds,
        "training": notes.found.get("training"),
    }
    content["verdict"] = outcome(content) if "adapted" in stages else content["advice"]
    others = (a.options.general_prompts, a.options.conversations)
    sources = (*a.config.data.prompts, *(one for one in others if one is not None))
    names = {one.path: set_name(one) for one in sources}
    t = a.config.target
    places = (t.name, *t.adapters, a.head, str(a.out), a.options.base or "")
    names |= {place: Path(place).name for place in places if is_private(place)}
    content = without_paths(content, names)
    out = a.out
    write_atomically(out / "adapt.json", as_json(content))
    write_atomically(out / "adapt.md", adaptation_markdown(content))
    plot_adaptation(content, out / "adapt.png")
    print_once(content["verdict"])
    print_once(f"Written: {out / 'adapt.json'}, adapt.md, adapt.png")
    return content

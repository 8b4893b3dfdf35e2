"""A head before and after an adaptation: walked over the answers to held-out prompts, and decoding
some of them.
"""

import json
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from headstart.configs.adapt import Adaptation
from headstart.configs.schema import Config, EvalConfig, TargetConfig
from headstart.data.jobs import make_jobs
from headstart.data.prompts import Prompt, limit_evenly
from headstart.data.regenerate import regenerate
from headstart.data.store import ActivationStore
from headstart.eval.adaptation import Texts, speedups
from headstart.eval.asked import asked_by_run
from headstart.eval.decoding import decode
from headstart.eval.report import run_evaluation
from headstart.eval.walked import Walked, walk_texts
from headstart.heads.assistant import check_pair, check_shapes
from headstart.heads.export import load_assistant, load_assistant_config, made_for
from headstart.heads.files import write_atomically
from headstart.heads.loading import check_target, load_target_config, open_target
from headstart.heads.served import served_config
from headstart.heads.targets import Target
from headstart.heads.tokens import Sampling
from headstart.heads.unroll import DraftHead
from headstart.train.notes import Notes

DECODING = 0.12  # share of the budget that the decoding in the end may take


def _base(a: Adaptation) -> TargetConfig | None:
    """The target that the head was trained for, in the dtype of the tuned one."""
    t, made = a.target, made_for(load_assistant_config(a.head))
    name = a.base or (made["name"] if made else None)
    if name is not None:
        revision = made["revision"] if made and not a.base else None
        return served_config(str(name), revision).model_copy(update={"dtype": t.dtype})
    if t.adapters or t.quantization:
        return t.model_copy(update={"adapters": [], "quantization": None})
    return None


def check_before(a: Adaptation) -> None:
    """Raise `ValueError` where a target, an adapter or the head will not do, before any answers.

    What only loaded weights of a target show, and those of the Hub, is known when it is opened.
    """
    head = load_assistant(a.head, torch.float32)
    for stage, served in (("reference", _base(a)), ("stale", a.target)):
        if served is not None:
            with _telling(stage):
                check_target(served)
                config = load_target_config(served.name, served.revision, served.trust_remote_code)
                check_shapes(config.get_text_config(), head.config, served.name)


def measure_before(
    a: Adaptation, config: Config, prompts: Any, out: Path, notes: Notes, device: Any
) -> dict[str, Texts]:
    """Walk the head over what its own target says to the held-out prompts, and the tuned one.

    Args:
        a: what is asked.
        config: of the run, for lengths and batches of the answers.
        prompts: kind -> prompts to train on, and held out.
        out: folder; the answers are stored in `out`/reference and `out`/stale.
        notes: where both stages are kept.
        device: where target and head run.

    Returns:
        `stale`, and `reference` where that target is known.

    Raises:
        ValueError: a target that does not load, or that the head does not fit.
    """
    stages = {}
    for stage, served in (("reference", _base(a)), ("stale", a.target)):
        if served is None:
            continue

        def measure(served: TargetConfig = served, stage: str = stage) -> dict[str, Any]:
            with _telling(stage):
                target = open_target(served, device)
            began = time.monotonic()
            held_out = {kind: own for kind, (_, own) in prompts.items()}
            stores = _answers(target, held_out, config, out / stage)
            answering = time.monotonic() - began
            texts = _walked(target, a.head, stores, a, f"Walking ({stage})")
            return {"texts": texts, "answering": answering}

        stages[stage] = read_texts(notes.once(stage, measure)["texts"])
    return stages


@contextmanager
def _telling(stage: str) -> Iterator[None]:
    """Within, an error of the target that the head was trained for says where its name is from."""
    try:
        yield
    except ValueError as error:
        if stage == "stale":
            raise
        raise ValueError(
            f"{error}. It was taken for the target that the head was trained for: name that one, "
            "--base NAME"
        ) from error


def _answers(
    target: Target, held_out: dict[str, list[Prompt]], config: Config, folder: Path
) -> dict[str, ActivationStore]:
    """Kind -> the target's greedy answers."""
    stores = {}
    for kind, own in held_out.items():
        jobs = make_jobs(own, [Sampling(0.0)] * len(own), target, config.data)
        name = f"Answering ({kind}, held out)"
        regenerate(target, jobs, config.data, config.run.seed, folder / kind, True, name)
        stores[kind] = ActivationStore(folder / kind, target)
    return stores


def _walked(
    target: Target, head: str, stores: dict[str, ActivationStore], a: Adaptation, doing: str
) -> dict[str, Any]:
    assistant = load_assistant(head, target.table.dtype, target.device)
    check_pair(target, assistant)
    found = walk_texts(DraftHead(assistant), target, stores, a.num_assistant_tokens, doing)
    return {kind: [text.row() for text in texts] for kind, texts in found.items()}


def read_texts(found: dict[str, Any]) -> Texts:
    """Of what a stage noted."""
    return {kind: [Walked.read(row) for row in rows] for kind, rows in found.items()}


def measure_again(
    a: Adaptation, config: Config, prompts: Any, out: Path, notes: Notes, device: Any
) -> None:
    """Walk the trained head over the answers of the tuned target, and decode some of the prompts
    plainly, with the old head and with the new one; both stages are noted.

    Args: as for `measure_before`.
    """
    head = str(config.run.dir / "head")
    target = open_target(a.target, device)

    def walk() -> dict[str, Any]:
        stores = {kind: ActivationStore(out / "stale" / kind, target) for kind in prompts}
        return _walked(target, head, stores, a, "Walking (adapted)")

    def compare_speeds() -> dict[str, Any] | None:
        if not a.decoded:
            return None
        names = {"stale": a.head, "adapted": head}
        chosen = EvalConfig(
            prompts=str(_decodable(a, config, prompts, target, out)),
            num_assistant_tokens=[a.num_assistant_tokens],
            decoders=["exact"],
            max_new_tokens=config.data.max_new_tokens,
            exact_limit=0,
        )
        dtype = target.table.dtype
        heads = {name: load_assistant(name, dtype, target.device) for name in names.values()}
        report = run_evaluation(
            target, heads, chosen, out / "eval", resume=True, asked=asked_by_run(config.data)
        )
        return speedups(report, names)

    notes.once("adapted", walk)
    notes.once("decoding", compare_speeds)


def write_held_out(prompts: dict[str, list[Prompt]], path: Path) -> None:
    """Write prompts such that `headstart eval --prompts` reads them, their kind in the category."""
    rows = []
    for kind, own in prompts.items():
        for prompt in own:
            asked: dict[str, Any] = {"messages": prompt.question, "tools": prompt.tools}
            if prompt.raw:
                asked = {"text": prompt.text}
            row = {"id": f"{kind}-{prompt.id}", "category": f"{kind}: {prompt.category}", **asked}
            rows.append({key: value for key, value in row.items() if value is not None})
    write_atomically(path, "".join(json.dumps(row) + "\n" for row in rows))


def _decodable(a: Adaptation, config: Config, prompts: Any, target: Target, out: Path) -> Path:
    """Write the held-out prompts of each kind that there is time to decode three times each, and
    half as long again for what a decoder measures first; after a stop they stay."""
    path = out / "decoded.jsonl"
    if path.is_file():
        return path
    first = prompts["domain"][1][0]
    ids = asked_by_run(config.data).encode(first, target.tokenizer)
    n = config.data.max_new_tokens
    seconds = decode(target, ids, n).seconds  # plain: the longest of the three
    there = DECODING * 60 * a.budget_minutes / (4.5 * seconds) / len(prompts)
    many = max(2, min(a.decoded, int(there)))
    write_held_out({kind: limit_evenly(own, many) for kind, (_, own) in prompts.items()}, path)
    return path

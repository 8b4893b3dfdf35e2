"""The evaluation: plain against assisted decoding, interleaved, and its report."""

import resource
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from headstart.common.console import say
from headstart.common.files import alone_in
from headstart.common.machine import environment
from headstart.common.versions import skips_prefill
from headstart.configs.schema import EvalConfig
from headstart.data.prompts import Prompt, limit_evenly, load_prompt_set
from headstart.data.templates import check_template, encode_prompts
from headstart.eval.decoding import Side, make_sides
from headstart.eval.draft_cost import Costs, measure_costs
from headstart.eval.measurements import Asked, Measurements, Text, measure_prompts
from headstart.eval.page import print_report, write_report
from headstart.eval.statistics import noise, summarise, verdict
from headstart.heads.assistant import check_pair, other_target
from headstart.heads.target import Target, model_fingerprint
from headstart.heads.tokens import Sampling

SCHEMA = 2
EXAMPLES = 6  # texts that are shown token by token
PER_TEXT = [
    "id", "turn", "category", "prompt_tokens", "plain_seconds", "plain_tokens", "seconds",
    "tokens", "rounds", "accepted",
]  # fmt: skip


def run_evaluation(
    target: Target,
    heads: Mapping[str, PreTrainedModel],
    chosen: EvalConfig,
    out: Path,
    resume: bool = False,
    draft_models: Mapping[str, PreTrainedModel] | None = None,
    asked: Asked | None = None,
) -> dict[str, Any]:
    """Evaluate heads on prompts, print a table and write report.json, .md and .html.

    Args:
        target: in the dtype to measure.
        heads: name -> head in the native format, in the same dtype and on the same device.
        chosen: prompts, decoders, draft lengths, temperatures and the length of texts.
        out: folder; `measurements.jsonl` there has every text and its times.
        resume: go on with the prompts that are missing there.
        draft_models: name -> small model of the target's vocabulary.
        asked: how the run of the heads asked its prompts, as these are asked; None: not known.

    Returns:
        What report.json holds.

    Raises:
        ValueError: bad prompts, a head that does not fit the target, measurements of something
            else to go on with, or another process at work in `out`.
    """
    asked = asked or Asked()
    _check_models(target, heads, draft_models or {}, chosen)
    warnings = {n: w for n, head in heads.items() if (w := other_target(target, head))}
    for name, warning in warnings.items():
        say(f"{name}: {warning}")
    prompts = limit_evenly(load_prompt_set(chosen.prompts), chosen.limit)
    check_template(prompts, target)
    # One that cannot be used is named before all work.
    encode_prompts(prompts, target.tokenizer, asked.chat_template_kwargs)
    settings = {
        "target": target.name,
        "target_fingerprint": target.fingerprint,
        "heads": list(heads),
        "head_fingerprints": {n: model_fingerprint(h, h.config) for n, h in heads.items()},
        "dtype": target.identity["dtype"],
        **chosen.model_dump(mode="json", exclude={"exact_limit"}),
        "chat_template_kwargs": asked.chat_template_kwargs or None,  # as if earlier files had it
    }
    samplings = [Sampling(t, chosen.top_k, chosen.top_p) for t in chosen.temperatures]
    with alone_in(out, "--out DIR"):
        kept = Measurements(out / "measurements.jsonl", settings, resume)
        sides = _prepare(target, heads, draft_models or {}, chosen, samplings, kept)
        measure_prompts(target, prompts, sides, chosen.max_new_tokens, kept, asked)
        content = _content(target, prompts, sides, settings, kept, asked) | {"warnings": warnings}
        write_report(content, out)
    print_report(content)
    say(f"Written: {out / 'report.json'}, report.md, report.html")
    return content


def _content(
    target: Target,
    prompts: Sequence[Prompt],
    sides: Mapping[Sampling, Sequence[Side]],
    settings: dict[str, Any],
    kept: Measurements,
    asked: Asked,
) -> dict[str, Any]:
    """Of report.json."""
    measured: dict[tuple[Any, ...], list[Text]] = {}
    found = []
    for sampling, own in sides.items():
        for side in own:
            texts = kept.texts(side, sampling.temperature)
            measured[(*side.key, sampling.temperature)] = texts
            found += _results(side, sampling.temperature, texts)
    first = next(iter(measured.values()))
    return {
        "schema": SCHEMA,
        "environment": environment(target.device)
        | settings
        | {"prefill_skips_layers": skips_prefill(target.config)}
        | {"longer_than_trained": _longer(first, asked.max_prompt_tokens)}
        | {"peak_process_memory_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024},
        "costs": kept.found.get("costs", {}),
        "noise": noise(first),
        "verdict": verdict(found),
        "per_text_columns": PER_TEXT,
        "results": found,
        "examples": _examples(target, prompts, measured, found),
    }


def _longer(texts: Sequence[Text], most: int | None) -> int | None:
    """Prompts that training would have cut; None: not known."""
    return None if most is None else len({t.id for t in texts if t.prompt_len > most})


def _check_models(
    target: Target,
    heads: Mapping[str, PreTrainedModel],
    draft_models: Mapping[str, PreTrainedModel],
    chosen: EvalConfig,
) -> None:
    needing = [name for name in chosen.decoders if name not in ("lookup", "draft-model")]
    if needing and not heads:
        raise ValueError(f"the decoder {needing[0]} needs a head: name one or more")
    for head in heads.values():
        check_pair(target, head)
    for name, model in draft_models.items():
        size = model.config.get_text_config().vocab_size
        if size != target.config.vocab_size:
            raise ValueError(
                f"{name} cannot draft for {target.name}: its vocabulary has {size} tokens, the "
                f"target's {target.config.vocab_size}"
            )


def _prepare(
    target: Target,
    heads: Mapping[str, PreTrainedModel],
    draft_models: Mapping[str, PreTrainedModel],
    chosen: EvalConfig,
    samplings: Sequence[Sampling],
    kept: Measurements,
) -> dict[Sampling, list[Side]]:
    """Measure what drafts cost, once for a report, and make the sides: for each sampling its
    own, since they learn."""
    if "costs" not in kept.found:
        measured = {name: measure_costs(target, head) for name, head in heads.items()}
        kept.find("costs", {n: {d: asdict(c) for d, c in m.items()} for n, m in measured.items()})
    costs = {n: {d: Costs(**c) for d, c in m.items()} for n, m in kept.found["costs"].items()}
    return {
        sampling: make_sides(
            chosen.decoders, chosen.num_assistant_tokens, heads, draft_models, costs
        )
        for sampling in samplings
    }


def _results(side: Side, temperature: float, texts: Sequence[Text]) -> list[dict[str, Any]]:
    """The results of one side: all prompts and each category, with and without looping texts."""
    groups = {"all": list(texts)}
    categories = sorted({text.category for text in texts})
    if len(categories) > 1:
        groups |= {name: [t for t in texts if t.category == name] for name in categories}
    found = []
    for category, group in groups.items():
        straight = [text for text in group if not text.loops]
        for loops, few in (("with", group), ("without", straight)):
            if not few or (loops == "without" and len(few) == len(group)):
                continue
            what = {
                "head": side.head, "decoder": side.decoder, "temperature": temperature,
                "num_assistant_tokens": side.num_assistant_tokens, "category": category,
                "looping_texts": loops,
            }  # fmt: skip
            result = what | summarise(few, side.num_assistant_tokens, side.costs)
            if category == "all" and loops == "with":
                result["per_text"] = [_row(text, side.num_assistant_tokens) for text in few]
            found.append(result)
    return found


def _row(text: Text, k: int) -> list[Any]:
    counts = text.assisted.counts(text.prompt_len, k)
    return [
        text.id, text.turn, text.category, text.prompt_len, round(text.plain.seconds, 5),
        len(text.plain.tokens), round(text.assisted.seconds, 5), len(text.assisted.tokens),
        counts.rounds, sum(counts.accepted),
    ]  # fmt: skip


def _examples(
    target: Target,
    prompts: Sequence[Prompt],
    measured: Mapping[tuple[Any, ...], Sequence[Text]],
    found: Sequence[dict[str, Any]],
) -> list[dict[str, Any]]:
    """Some texts of the quickest side, token by token: accepted, bonus or rejected."""
    whole = [r for r in found if r["category"] == "all" and r["looping_texts"] == "with"]
    best = max(whole, key=lambda r: r["speedup"])
    names = ("decoder", "head", "num_assistant_tokens", "temperature")  # as in `Side.key`
    side = {name: best[name] for name in names}
    of_prompt = {text.id: text for text in reversed(measured[tuple(side.values())])}
    shown = []
    for prompt in limit_evenly(list(prompts), EXAMPLES):
        text = of_prompt[prompt.id]
        tokens = [[target.tokenizer.decode([token]), kind] for token, kind in _kinds(text)]
        asked = prompt.text[-400:]
        shown.append({"id": prompt.id, "category": prompt.category, "prompt": asked} | side)
        shown[-1]["tokens"] = tokens
    return shown


def _kinds(text: Text) -> list[tuple[int, str]]:
    """The tokens of a text and its rejected drafts, in the order in which they came."""
    decoded = text.assisted
    kinds = [(decoded.tokens[0], "bonus")]  # the prefill's
    for drafts, (_, accepted) in zip(decoded.drafts, decoded.rounds(text.prompt_len), strict=True):
        kinds += [(token, "accepted") for token in drafts[:accepted]]
        kinds += [(token, "rejected") for token in drafts[accepted:]]
        written = sum(kind != "rejected" for _, kind in kinds)
        if written < len(decoded.tokens):
            kinds.append((decoded.tokens[written], "bonus"))
    return kinds

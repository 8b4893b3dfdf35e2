"""The evaluation: plain against assisted decoding, interleaved, and its report."""

import json
import resource
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from transformers import PreTrainedModel

from headstart.common.console import print_once
from headstart.common.files import lock_folder
from headstart.common.machine import environment, machine_name
from headstart.common.processes import processes_in, told_by_main
from headstart.common.versions import skips_prefill
from headstart.configs.schema import Config, EvalConfig
from headstart.data.conversations import stable_hash
from headstart.data.prompts import (
    Prompt,
    check_prompt_set,
    limit_evenly,
    load_prompt_set,
    schemas_of,
)
from headstart.data.templates import check_template, encode_prompts
from headstart.eval.asked import asked_by_heads
from headstart.eval.concurrency import measure_batches, predicted
from headstart.eval.decoding import GREEDY, DecoderVariant, make_variants
from headstart.eval.draft_cost import Costs, busy_share, longest_draft, measure_costs
from headstart.eval.figures import noise, summarize, validity
from headstart.eval.measurements import (
    MACHINE,
    Asked,
    Measurements,
    Text,
    drawn_order,
    measure_prompts,
)
from headstart.eval.page import SCHEMA, print_report, write_report
from headstart.eval.recorded import prompt_set
from headstart.eval.statistics import (
    NO_HEAD,
    OWN_LENGTH,
    least_verification,
    merit,
    sampling_name,
    verdict,
)
from headstart.heads.kinds import check_drafts, kind_of, runs_in_transformers
from headstart.heads.loading import load_served, load_target, open_whole
from headstart.heads.pairing import check_pair, other_target
from headstart.heads.saving import load_assistant
from headstart.heads.structured import structured_output
from headstart.heads.target import Target, model_fingerprint
from headstart.heads.tokens import Sampling

OTHER = "output_dir=DIR"  # how to name another folder
EXAMPLES = 6  # texts that are shown token by token
SPEEDS = [
    "tokens_per_second", "baseline_tokens_per_second", "speedup", "speedup_interval",
    "time_to_first_token", "baseline_time_to_first_token", "prefill_tokens_per_second",
    "decode_tokens_per_second", "baseline_decode_tokens_per_second", "decode_speedup",
    "drafting_share",
]  # fmt: skip
"""Fields of a result that are null where nothing was timed."""
ROUGH_COSTS = 1.0
"""Seconds that are enough for costs which choose K and are shown nowhere."""
PER_TEXT = [
    "id", "turn", "seed", "category", "prompt_tokens", "plain_seconds", "plain_tokens", "seconds",
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
    printed: bool = True,
    together: bool = False,
    timed: bool = True,
) -> dict[str, Any]:
    """Evaluate heads on prompts, write report.json, .md and .html, print a table, and return what
    report.json holds.

    Where processes of a launch that work together share a device nothing is timed: the report has
    acceptance and texts, and no speeds.

    Args:
        target: in the dtype to measure.
        heads: name -> head in the native format, in the same dtype and on the same device.
        chosen: prompts, decoders, draft lengths, temperatures and the length of texts.
        out: folder; `measurements.jsonl` there has every text and its times.
        resume: go on with the prompts that are missing there.
        draft_models: name -> small model of the target's vocabulary.
        asked: how the run of the heads asked its prompts, as these are asked; None: not known.
        printed: whether the table is printed; the caller may have more to do before.
        together: all processes of the launch call it, and share the prompts; the main one writes
            the report, and all return it.
        timed: False: texts and acceptance alone are wanted, in the least time.

    Raises:
        ValueError: bad prompts, a head that does not fit the target, measurements of something
            else to go on with, or another process at work in `out`.
    """
    asked, draft_models = asked or Asked(), draft_models or {}
    samplings = _samplings(target, chosen)
    _check_models(target, heads, draft_models, chosen)
    warnings = {n: w for n, head in heads.items() if (w := other_target(target, head))}
    for name, warning in warnings.items():
        print_once(f"{name}: {warning}")
    loaded = load_prompt_set(chosen.prompts)
    prompts = limit_evenly(loaded, chosen.limit)
    check_template(prompts, target)
    # One that cannot be used is named before all work.
    encoded = encode_prompts(prompts, target.tokenizer, asked.chat_template_kwargs)
    structured = structured_output(target, schemas_of(prompts))
    settings = _settings(target, heads, draft_models, chosen, asked) | {
        "prompt_set": prompt_set(chosen.prompts, loaded),
        "encoded_sha256": stable_hash(encoded),
    }
    state, path = PartialState(), out / "measurements.jsonl"
    together = together and state.num_processes > 1
    where = environment(target.device)
    machine = [machine_name(where), where["torch"], where["transformers"]] if timed else None
    # Processes of a launch may be of unlike machines, each of which times prompts of its own.
    measured_as = settings | {MACHINE: told_by_main(lambda: machine) if together else machine}
    main = state.is_main_process or not together
    with processes_in(out, OTHER) if together else lock_folder(out, OTHER):
        if main:
            kept = Measurements(path, measured_as, resume)
            _find_costs(target, heads, chosen, kept, timed)
        if together:
            state.wait_for_everyone()  # for what the main process has found there
            if not main:
                kept = Measurements.beside(path, measured_as, state.process_index)
            state.wait_for_everyone()  # before it adds to it
        variants = _variants(heads, draft_models, chosen, samplings, kept)
        measure_prompts(
            target, prompts, variants, chosen.seeds, chosen.max_new_tokens, kept, asked, together,
            timed, structured,
        )  # fmt: skip
        if together:
            state.wait_for_everyone()
        if main:
            kept.take_in([prompts[place].id for place in drawn_order(prompts)])
            content = _content(target, prompts, variants, settings, kept, asked) | {
                "warnings": warnings
            }
            if together:
                content["environment"]["processes"] = state.num_processes
            write_report(content, out)
    if not main:
        content = json.loads((out / "report.json").read_text(encoding="utf-8"))
    if printed and main:
        print_report(content)
        print_once(f"The page: {out / 'report.html'}, beside it report.md and report.json")
    return content


def evaluate_heads(
    heads: Mapping[str, str],
    config: Config,
    device: torch.device,
    resume: bool = False,
    together: bool = False,
) -> dict[str, Any]:
    """Load a target, heads and draft models and evaluate them, as `run_evaluation` says.

    Args:
        heads: what the report calls a head -> its folder or Hub id, or HEAD+ADAPTER.
        config: of it the target, the evaluation and the folder to write.
        device: where all of them run.
        resume: go on with the prompts that are missing in the folder.
        together: all processes of the launch call it.
    """
    chosen = config.eval or EvalConfig()
    # Wrong settings are told before the weights are loaded.
    check_prompt_set(chosen.prompts)
    asked = asked_by_heads(list(heads.values()))
    target = (open_whole if together else load_served)(config.target, device)
    dtype = target.table.dtype
    assistants = {name: load_assistant(path, dtype, device) for name, path in heads.items()}
    name = str(dtype).removeprefix("torch.")
    models = {one: load_target(one, name, device=device).model for one in chosen.draft_models}
    return run_evaluation(
        target, assistants, chosen, config.output_dir,
        resume=resume, draft_models=models, asked=asked, together=together,
    )  # fmt: skip


def _settings(
    target: Target,
    heads: Mapping[str, PreTrainedModel],
    draft_models: Mapping[str, PreTrainedModel],
    chosen: EvalConfig,
    asked: Asked,
) -> dict[str, Any]:
    """What an evaluation is of, its prompts apart; one that goes on has to be of the same."""
    models = {n: model_fingerprint(m, m.config) for n, m in draft_models.items()}
    return {
        "target": target.name,
        "target_fingerprint": target.fingerprint,
        "heads": list(heads),
        "head_fingerprints": {n: model_fingerprint(h, h.config) for n, h in heads.items()},
        "dtype": target.identity["dtype"],
        **chosen.model_dump(mode="json", exclude={"prompts", "fp32_check_prompts"}),
        "own_sampling": asdict(target.own_sampling) if "model" in chosen.temperatures else None,
        "chat_template_kwargs": asked.chat_template_kwargs or None,  # as if earlier files had it
        "eos_token_ids": list(target.eos_ids),
        "draft_model_fingerprints": models or None,
    }


def _content(
    target: Target,
    prompts: Sequence[Prompt],
    variants: Mapping[Sampling, Sequence[DecoderVariant]],
    settings: dict[str, Any],
    kept: Measurements,
    asked: Asked,
) -> dict[str, Any]:
    """Of report.json."""
    measured: dict[tuple[Any, ...], list[Text]] = {}
    schemas = schemas_of(prompts)
    found: list[dict[str, Any]] = []
    for alike in zip(*variants.values(), strict=True):  # a sampled one beside its greedy one
        for sampling, variant in zip(variants, alike, strict=True):
            texts = kept.texts(variant, sampling.temperature)
            measured[(*variant.key, sampling.temperature)] = texts
            found += _results(target, variant, sampling, texts, kept.timed, schemas)
    first, most = next(iter(measured.values())), asked.max_prompt_tokens
    # Prompts that training would have cut; None: not known.
    longer = None if most is None else len({t.id for t in first if t.prompt_len > most})
    costs = kept.found.get("costs", {})
    verification = least_verification(costs) if kept.timed else None
    several = predicted(kept.found.get("batches", {}), found) if kept.timed else []
    return {
        "schema": SCHEMA,
        "environment": environment(target.device)
        | settings
        | {"prefill_skips_layers": skips_prefill(target.config)}
        | {"longer_than_trained": longer}
        | {"peak_process_memory_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024},
        "costs": costs,
        "noise": noise(first) if kept.timed else None,
        "busy_share": kept.found.get("busy_share"),
        "least_verification": verification,
        "verdict": verdict(found, kept.found.get("busy_share"), verification),
        "concurrency": several,
        "per_text_columns": PER_TEXT,
        "results": found,
        "examples": _examples(target, prompts, measured, found),
    }


def _samplings(target: Target, chosen: EvalConfig) -> list[Sampling]:
    """Of `eval.temperatures`, each another temperature: by it a report tells them apart."""
    found = []
    for t in chosen.temperatures:
        if t == "model":
            found.append(target.own_sampling)
        else:
            found.append(Sampling(t, chosen.top_k, chosen.top_p) if t else GREEDY)
    own = [way.temperature for way in found]
    if len(set(own)) < len(own):
        raise ValueError(
            f"eval.temperatures={chosen.temperatures} names one twice: model is "
            f"{sampling_name(asdict(target.own_sampling))} here. Measure them one by one"
        )
    return found


def _check_models(
    target: Target,
    heads: Mapping[str, PreTrainedModel],
    draft_models: Mapping[str, PreTrainedModel],
    chosen: EvalConfig,
) -> None:
    needing = [name for name in chosen.decoders if name not in NO_HEAD]
    if needing and not heads:
        raise ValueError(f"the decoder {needing[0]} needs a head: name one or more")
    for name, head in heads.items():
        check_pair(target, head)
        if any(decoder not in OWN_LENGTH for decoder in needing):
            check_drafts(head.config, chosen.num_assistant_tokens, "eval.num_assistant_tokens")
        if "transformers" in needing and not runs_in_transformers(head.config):
            kind = kind_of(head.config).name
            if needing == ["transformers"]:
                raise ValueError(
                    f"transformers' own decoder cannot run {name}, a head of the kind {kind}: give "
                    "eval.decoders=exact"
                )
            print_once(
                f"{name} is a head of the kind {kind}, which transformers' own decoder cannot run"
            )
    for name, model in draft_models.items():
        size = model.config.get_text_config().vocab_size
        if size != target.config.vocab_size:
            raise ValueError(
                f"{name} cannot draft for {target.name}: its vocabulary has {size} tokens, the "
                f"target's {target.config.vocab_size}"
            )


def _find_costs(
    target: Target,
    heads: Mapping[str, PreTrainedModel],
    chosen: EvalConfig,
    kept: Measurements,
    timed: bool,
) -> None:
    """Measure what drafts cost and how busy the device is, once for a report; without times for the
    decoders alone that need costs to choose K, and roughly."""
    if timed and "busy_share" not in kept.found:
        kept.find("busy_share", busy_share(target))
    if "costs" not in kept.found:
        longest, budget = longest_draft(chosen), None if timed else ROUGH_COSTS
        wanted = heads if timed or any(d in OWN_LENGTH for d in chosen.decoders) else {}
        measured = {name: measure_costs(target, h, longest, budget) for name, h in wanted.items()}
        kept.find("costs", {n: {d: asdict(c) for d, c in m.items()} for n, m in measured.items()})
    sizes, ks = chosen.concurrency, chosen.num_assistant_tokens
    if timed and sizes and ks and "exact" in chosen.decoders and "batches" not in kept.found:
        found = {name: measure_batches(target, head, sizes, ks) for name, head in heads.items()}
        kept.find("batches", {name: list(map(asdict, costs)) for name, costs in found.items()})


def _variants(
    heads: Mapping[str, PreTrainedModel],
    draft_models: Mapping[str, PreTrainedModel],
    chosen: EvalConfig,
    samplings: Sequence[Sampling],
    kept: Measurements,
) -> dict[Sampling, list[DecoderVariant]]:
    """For each sampling its own variants, since they learn."""
    costs = {n: {d: Costs(**c) for d, c in m.items()} for n, m in kept.found["costs"].items()}
    return {
        sampling: make_variants(
            chosen.decoders, chosen.num_assistant_tokens, heads, draft_models, costs
        )
        for sampling in samplings
    }


def _results(
    target: Target,
    variant: DecoderVariant,
    sampling: Sampling,
    texts: Sequence[Text],
    timed: bool,
    schemas: Mapping[str, dict[str, Any]],
) -> list[dict[str, Any]]:
    """The results of one variant: all prompts and each category, with and without looping texts;
    without speeds where they were not timed."""
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
                "head": variant.head, "decoder": variant.decoder, **asdict(sampling),
                "num_assistant_tokens": variant.num_assistant_tokens, "category": category,
                "looping_texts": loops,
            }  # fmt: skip
            result = what | summarize(few, variant.num_assistant_tokens, variant.costs)
            result["structured"] = validity(target, few, schemas)
            if not timed:
                result |= dict.fromkeys(SPEEDS)
                for context in result["by_context"]:
                    context |= {"speedup": None, "speedup_interval": None, "decode_speedup": None}
            if category == "all" and loops == "with":
                k = variant.num_assistant_tokens
                result["per_text"] = [_row(text, k, timed) for text in few]
            found.append(result)
    return found


def _row(text: Text, k: int, timed: bool) -> list[Any]:
    counts = text.assisted.counts(text.prompt_len, k)
    plain, assisted = (
        round(decoded.seconds, 5) if timed else None for decoded in (text.plain, text.assisted)
    )
    return [
        text.id, text.turn, text.seed, text.category, text.prompt_len, plain,
        len(text.plain.tokens), assisted, len(text.assisted.tokens), counts.rounds,
        sum(counts.accepted),
    ]  # fmt: skip


def _examples(
    target: Target,
    prompts: Sequence[Prompt],
    measured: Mapping[tuple[Any, ...], Sequence[Text]],
    found: Sequence[dict[str, Any]],
) -> list[dict[str, Any]]:
    """Some texts of the quickest variant, token by token: accepted, bonus or rejected."""
    whole = [r for r in found if r["category"] == "all" and r["looping_texts"] == "with"]
    best = max(whole, key=merit)
    names = ("decoder", "head", "num_assistant_tokens", "temperature")  # as in `DecoderVariant.key`
    variant = {name: best[name] for name in names}
    of_prompt = {text.id: text for text in reversed(measured[tuple(variant.values())])}
    shown = []
    for prompt in limit_evenly(list(prompts), EXAMPLES):
        text = of_prompt[prompt.id]
        tokens = [[target.tokenizer.decode([token]), kind] for token, kind in _kinds(text)]
        asked = prompt.text[-400:]
        shown.append({"id": prompt.id, "category": prompt.category, "prompt": asked} | variant)
        shown[-1]["tokens"] = tokens
    return shown


def _kinds(text: Text) -> list[tuple[int, str]]:
    """The tokens of a text and its rejected drafts, in the order in which they came."""
    decoded = text.assisted
    first = decoded.tokens[: decoded.first_tokens(text.prompt_len)]
    kinds = [(token, "bonus") for token in first]  # the prefill's
    rounds = decoded.judged_rounds(text.prompt_len)
    for drafts, (judged, accepted) in zip(decoded.drafts, rounds, strict=True):
        kinds += [(token, "accepted") for token in drafts[:accepted]]
        kinds += [(token, "rejected") for token in drafts[accepted:judged]]
        written = sum(kind != "rejected" for _, kind in kinds)
        if written < len(decoded.tokens):
            kinds.append((decoded.tokens[written], "bonus"))
    return kinds

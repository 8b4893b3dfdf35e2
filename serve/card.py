"""The model card of a published head: metadata in the Hub's own form, and figures of its report."""

import json
import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCardData
from jinja2 import Environment, StrictUndefined

from headstart.common.console import code_in_markdown, in_markdown, markdown_row
from headstart.common.machine import machine_name
from headstart.configs.schema import Config, TargetConfig
from headstart.data.sources import is_hub_dataset
from headstart.eval.page import cells, title
from headstart.eval.recorded import describe_set, recorded_set
from headstart.eval.statistics import sampling_name, verdict
from headstart.heads.adapters import split_revision
from headstart.heads.kinds import kind_of, runs_in_transformers
from headstart.heads.loading import BUILT_IN
from headstart.heads.saving import draft_position_offset
from headstart.serve.engines import ENGINES, engine_warnings, incompatibilities

TEMPLATE = Path(__file__).with_name("card.md.jinja")


@dataclass(frozen=True)
class Published:
    """What a card is written from; every figure is of the report or of the run's summary."""

    repo_id: str
    base_models: list[str]
    """Hub ids: what the target was tuned with, and the target."""
    base_head: str | None
    """What is published is a PEFT adapter of this head; None: it is a whole head."""
    served: TargetConfig
    """The target by the names that others load it by."""
    head_name: str
    """What the report calls the head."""
    head_config: Any
    own_parameters: int
    """Of the head, its embedding table apart."""
    target_config: Any
    config: Config
    """Of the run."""
    summary: dict[str, Any]
    """summary.json of the run."""
    report: dict[str, Any]
    license: dict[str, str]
    languages: list[str]


def model_card(p: Published) -> str:
    """README.md of the repository.

    Raises:
        ValueError: the report has no figures of this head.
    """
    env, head = p.report["environment"], p.head_name
    asked = recorded_set(env)
    results = [r for r in p.report["results"] if r["head"] == head and r["category"] == "all"]
    if not results:
        raise ValueError(f"the report has no results of {head}")
    template = Environment(
        undefined=StrictUndefined, keep_trailing_newline=True, trim_blocks=True, lstrip_blocks=True
    )
    template.filters |= {"markdown": in_markdown, "code": code_in_markdown, "quoted": shlex.quote}
    template.filters["machine"] = machine_name
    base_head, base_revision = split_revision(p.base_head or "")
    return template.from_string(TEMPLATE.read_text(encoding="utf-8")).render(
        p=p,
        metadata=_metadata(p, results).to_yaml(),
        served=p.served,
        env=env,
        setting=title(p.report),
        prompts=asked,
        architecture=p.head_config.architectures[0],
        k=p.config.train.num_speculative_steps,
        adapters=[split_revision(adapter) for adapter in p.served.adapters],
        load_target=_load_target(p),
        base_head=base_head,
        base_revision=base_revision,
        rows=[markdown_row(_row(result)) for result in results],
        verdict=verdict(
            [r for r in p.report["results"] if r["head"] in (head, None)],
            p.report.get("busy_share"),
            p.report.get("least_verification"),
        ),
        gemma=p.target_config.model_type[:6],
        engines={
            engine: (
                incompatibilities(engine, p.head_config, p.target_config),
                engine_warnings(engine, p.head_config),
            )
            for engine in ENGINES if engine != "transformers"
        },
        sources=", ".join(_trained_on(p)),
        stock=runs_in_transformers(p.head_config),
        position=draft_position_offset(p.head_config)
        if kind_of(p.head_config).has_position
        else None,
    )  # fmt: skip


def _row(result: dict[str, Any]) -> list[str]:
    decoder, k, _, texts, length, _, speedup, *_ = cells(result)
    loops = {"with": "all", "without": "no loops"}[result["looping_texts"]]
    return [decoder, k, f"{texts}, {loops}", length, speedup]


def _load_target(p: Published) -> str:
    """The call of `headstart.heads.loading.load_target` that loads the target as it is served."""
    # The built-in Gemma 3 270M has other weights than the Hub's: they were quantized.
    t, served = p.config.target, p.served
    same = t.name in BUILT_IN and len(t.adapters) == len(served.adapters)
    arguments = [json.dumps(t.name if same else served.name)]
    for name in ("revision", "adapters", "quantization"):
        if value := getattr(served, name):
            arguments.append(f"{name}={json.dumps(value)}")
    if not served.merge_adapters:
        arguments.append("merge_adapters=False")
    return f"load_target({', '.join(arguments)})"


def _metadata(p: Published, results: list[dict[str, Any]]) -> ModelCardData:
    """The head of the card. A draft head is no fine-tune, but of the relations that the Hub knows
    (adapter, merge, quantized, finetune) that is the nearest; it puts the head into the target's
    model tree."""
    env = p.report["environment"]
    asked = recorded_set(env)
    # The Hub keeps one set of arguments for a dataset: what all results share. The rest is in the
    # metrics' names.
    shared = {
        "hardware": env["accelerator"] or env["processor"], "threads": env["threads"],
        "dtype": env["dtype"], "max_new_tokens": env["max_new_tokens"],
    }  # fmt: skip
    if asked["sha256"]:
        shared["prompts_sha256"] = asked["sha256"]
    evaluated = []
    for result in results:
        loops = {"with": "", "without": ", texts without loops"}[result["looping_texts"]]
        how = (
            f"{result['decoder']} decoder, K = {result['num_assistant_tokens']}, "
            f"{sampling_name(result)}, {result['texts']} texts{loops}"
        )
        metrics = ("acceptance_length", "speedup")
        for metric in (m for m in metrics if result[m] is not None):
            evaluated.append(EvalResult(
                task_type="text-generation", dataset_args=shared, dataset_name=asked["name"],
                dataset_type=asked["name"] if _is_on_the_hub(asked["name"]) else "prompts",
                metric_type=metric, metric_value=round(result[metric], 4),
                metric_name=f"{metric.replace('_', ' ')} ({how})",
            ))  # fmt: skip
    license_fields: Any = p.license  # license and license_link
    return ModelCardData(
        base_model=[split_revision(p.base_head)[0]] if p.base_head else p.base_models,
        base_model_relation="adapter" if p.base_head else "finetune",
        library_name="peft" if p.base_head else "transformers",
        pipeline_tag="text-generation",
        datasets=[name for name in _prompts(p.config) if _is_on_the_hub(name)] or None,
        language=p.languages or None,
        tags=["speculative-decoding", "multi-token-prediction", "draft-head", "headstart"],
        model_name=p.repo_id.rpartition("/")[2],
        eval_results=evaluated,
        **license_fields,
    )


def _is_on_the_hub(prompts: str) -> bool:
    # A bare name may be that of a built-in set.
    return "/" in prompts and is_hub_dataset(prompts)


def _trained_on(p: Published) -> list[str]:
    """The training prompts with their SHA-256; of a run of before, which noted none, where they
    came from."""
    noted = p.summary["data"].get("prompt_sets")
    return _prompts(p.config) if noted is None else [describe_set(one) for one in noted]


def _prompts(config: Config) -> list[str]:
    """Where the training prompts came from; empty where the run read texts that were there."""
    data = config.data
    if data.store is not None or (data.conversations is not None and not data.shipped):
        return []
    return [source.path for source in data.prompts]

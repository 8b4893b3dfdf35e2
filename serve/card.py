"""The model card of a published head: metadata in the Hub's own form, and figures of its report."""

import json
import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCardData
from jinja2 import Environment, StrictUndefined

from headstart.common.console import code_in_markdown, in_markdown, markdown_row
from headstart.configs.schema import Config, RopePosition, TargetConfig
from headstart.data.sources import is_hub_dataset
from headstart.eval.page import cells, title
from headstart.eval.statistics import verdict
from headstart.heads.adapters import split_revision
from headstart.heads.loading import BUILT_IN
from headstart.heads.saving import rope_position
from headstart.serve.engines import ENGINES, Engine, obstacles, remarks

TEMPLATE = Path(__file__).with_name("card.md.jinja")
POSITIONS: dict[RopePosition, str] = {
    "newest": "RoPE position: trained for drafts that stand at the newest token, as in "
    "transformers and llama.cpp; vLLM, SGLang and MLX put them one earlier.",
    "one_earlier": "RoPE position: trained for drafts that stand one before the newest token, as "
    "in vLLM, SGLang and MLX; transformers and llama.cpp put them at the newest.",
    "both": "RoPE position: trained for drafts at the newest token, as in transformers and "
    "llama.cpp, and one before it, as in vLLM, SGLang and MLX.",
}
NAMES = {"vllm": "vLLM", "llama.cpp": "llama.cpp", "mlx": "MLX (mlx-vlm)"}


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

    @property
    def engine_target(self) -> str:
        """What the commands of engines call the target; `_served_merged` says what TARGET is."""
        return "TARGET" if self.served.adapters else self.served.name


def model_card(published: Published) -> str:
    """README.md of the repository.

    Raises:
        ValueError: the report has no figures of this head.
    """
    results = _results(published)
    p, env = published, published.report["environment"]
    architecture = p.head_config.architectures[0]
    setting = title(p.report)
    base_head, base_revision = split_revision(p.base_head or "")
    adapters = [split_revision(adapter) for adapter in p.served.adapters]
    template = Environment(
        undefined=StrictUndefined, keep_trailing_newline=True, trim_blocks=True, lstrip_blocks=True
    ).from_string(TEMPLATE.read_text(encoding="utf-8"))
    return template.render(
        metadata=_metadata(p, results).to_yaml(),
        name=in_markdown(p.repo_id.rpartition("/")[2]),
        repo_id=p.repo_id,
        target=code_in_markdown(env["target"]),
        served=p.served,
        revision=_revision(p.served.revision),
        adapters=[(name, _revision(revision)) for name, revision in adapters],
        load_target=_load_target(p),
        base_head=base_head,
        base_revision=_revision(base_revision),
        architecture=architecture,
        parameters=f"{p.own_parameters:,}",
        num_assistant_tokens=p.config.train.rounds,
        setting=in_markdown(f"{setting}, torch {env['torch']}, transformers {env['transformers']}")
        + f", prompts {code_in_markdown(env['prompts'])}.",
        rows=[markdown_row(_row(result)) for result in results],
        verdict=in_markdown(
            verdict([r for r in p.report["results"] if r["head"] in (p.head_name, None)])
        ),
        needs_headstart=_needs_headstart(p),
        engines=[
            *(_engine(engine, p) for engine in ENGINES if engine != "transformers"),
            _sglang(p),
        ],
        training=_training(p),
        limits=_limits(p),
    )


def _results(p: Published) -> list[dict[str, Any]]:
    """The report's results of this head over all prompts, with looping texts and without."""
    found = [r for r in p.report["results"] if r["head"] == p.head_name and r["category"] == "all"]
    if not found:
        raise ValueError(f"the report has no results of {p.head_name}")
    return found


def _row(result: dict[str, Any]) -> list[str]:
    decoder, k, _, texts, length, _, speedup, *_ = cells(result)
    loops = {"with": "all", "without": "no loops"}[result["looping_texts"]]
    return [decoder, k, f"{texts}, {loops}", length, speedup]


def _needs_headstart(p: Published) -> str:
    """Why the target is loaded through Headstart; empty: transformers does."""
    if p.target_config.model_type.startswith("gemma3"):
        return (
            "Plain transformers takes assistants for Gemma 4 targets alone. For this Gemma 3 "
            "target the class comes from Headstart:"
        )
    if p.served.quantization:
        return f"The target is served as {p.served.quantization}, as Headstart loads it:"
    return ""


def _revision(revision: str | None) -> str:
    """The last argument of a call that loads from the Hub."""
    return f", revision={json.dumps(revision)}" if revision else ""


def _load_target(p: Published) -> str:
    """The call of `headstart.heads.loading.load_target` that loads the target as it is served."""
    # The built-in Gemma 3 270M has other weights than the Hub's: they were quantised.
    t = p.config.target
    same = t.name in BUILT_IN and len(t.adapters) == len(p.served.adapters)
    call = f'load_target("{t.name if same else p.served.name}"{_revision(p.served.revision)}'
    if p.served.adapters:
        call += f", adapters={json.dumps(p.served.adapters)}"
    if not p.served.merge_adapters:
        call += ", merge_adapters=False"
    if p.served.quantization:
        call += f', quantization="{p.served.quantization}"'
    return call + ")"


def _metadata(p: Published, results: list[dict[str, Any]]) -> ModelCardData:
    """The head of the card. A draft head is no fine-tune, but of the relations that the Hub knows
    (adapter, merge, quantized, finetune) that is the nearest; it puts the head into the target's
    model tree."""
    env = p.report["environment"]
    # The Hub keeps one set of arguments for a dataset: what all results share. The rest is in the
    # metrics' names.
    shared = {
        "hardware": env["accelerator"] or env["processor"], "threads": env["threads"],
        "dtype": env["dtype"], "max_new_tokens": env["max_new_tokens"],
    }  # fmt: skip
    evaluated = []
    for result in results:
        loops = {"with": "", "without": ", texts without loops"}[result["looping_texts"]]
        how = (
            f"{result['decoder']} decoder, K = {result['num_assistant_tokens']}, temperature "
            f"{result['temperature']:g}, {result['texts']} texts{loops}"
        )
        for metric in ("acceptance_length", "speedup"):
            evaluated.append(EvalResult(
                task_type="text-generation", dataset_args=shared, dataset_name=env["prompts"],
                dataset_type=env["prompts"] if _is_on_the_hub(env["prompts"]) else "prompts",
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


def _prompts(config: Config) -> list[str]:
    """Where the training prompts came from; empty where the run read texts that were there."""
    data = config.data
    if data.store is not None or data.conversations is not None:
        return []
    return [source.path for source in data.prompts]


def _engine(engine: Engine, p: Published) -> dict[str, str]:
    """What the card says of an engine: its command, or why it does not take this head."""
    repo, target = p.repo_id, p.engine_target
    against = obstacles(engine, p.head_config, p.target_config)
    says = {
        "name": NAMES[engine],
        "says": "Not checked with this head; `headstart serve-check` does.",
        "command": "",
    }
    if against:
        return says | {"says": "It does not take this head as it is: " + "; ".join(against) + "."}
    said = [f"{line}." for line in remarks(engine, p.head_config)]
    at = f" --revision {shlex.quote(p.served.revision)}" if p.served.revision else ""
    export = f"headstart export {{}} --to {engine} --target {target}{at} --out"
    if p.base_head:
        merge = export.format(f"{p.base_head}+{repo}") + " head"
        return says | {"says": " ".join([*said, "With the adapter merged:"]), "command": merge}
    commands = {
        "vllm": f"vllm serve {target}{at} --speculative-config "
        f'\'{{"method": "mtp", "model": "{repo}", "num_speculative_tokens": '
        f"{p.config.train.rounds}}}'",
        "llama.cpp": export.format(repo) + " head-gguf",
        "mlx": f"mlx_vlm.server --model {target} --draft-model {repo}",
    }
    return says | {"says": " ".join([says["says"], *said]), "command": commands[engine]}


def _sglang(p: Published) -> dict[str, str]:
    """As its pull request 24436 has it: `NEXTN` becomes `FROZEN_KV_MTP` for these heads."""
    if not p.target_config.model_type.startswith("gemma4") or p.base_head:
        return {"name": "SGLang", "says": "Gemma 4 targets and whole heads alone.", "command": ""}
    k = p.config.train.rounds
    return {
        "name": "SGLang",
        "says": "As sgl-project/sglang#24436 has it; never run with this head.",
        "command": f"python -m sglang.launch_server --model-path {p.engine_target} "
        f"--speculative-algorithm NEXTN --speculative-draft-model-path {p.repo_id} "
        f"--speculative-num-steps {k} --speculative-eagle-topk 1 "
        f"--speculative-num-draft-tokens {k + 1}",
    }


def _training(p: Published) -> list[str]:
    data, env, train = p.summary["data"], p.summary["environment"], p.config.train
    where = env["accelerator"] or f"{env['threads']} threads of {env['processor']}"
    source = in_markdown(", ".join(_prompts(p.config)))
    best, last = p.summary["best"], p.summary["validations"][-1]["step"]
    start = p.config.head.start
    return [
        f"{data['documents']:,} conversations of the target's own ({data['answer_tokens']:,} "
        f"answer tokens)" + (f", prompts from {source}" if source else ""),
        "started from "
        + {"target": "layers of the target", "random": "random weights"}.get(
            start, in_markdown(start)
        ),
        f"{last:,} steps, of which step {best['step']:,} was the best; each process "
        f"{train.batch_size * train.gradient_accumulation_steps} conversations a step, "
        f"{train.rounds} rounds, objective {train.objective}",
        f"on {in_markdown(where)}, torch {env['torch']}, transformers {env['transformers']}",
        f"acceptance length {best['acceptance_length']:.2f} on "
        f"{data['validation_documents']} held-out conversations",
    ]


def _limits(p: Published) -> list[str]:
    made = p.report["environment"]
    data = p.config.data
    spoken = in_markdown(", ".join(p.languages)) or "not declared; those of its prompts"
    fingerprint = code_in_markdown(made["target_fingerprint"][:16])
    return [
        f"For this target alone: {in_markdown(made['target'])}, fingerprint {fingerprint} in "
        f"{made['dtype']}. Another fine-tune, or other bits, "
        "costs accepted drafts: `headstart adapt` trains it on.",
        POSITIONS[rope_position(p.head_config)],
        f"Languages: {spoken}.",
        f"Lengths: trained on prompts of up to {data.max_prompt_tokens} tokens and answers of up "
        f"to {data.max_new_tokens}.",
        *_served_merged(p),
        "Measured on the machine named above; a figure of another machine has to be measured "
        "there: `headstart eval`.",
    ]


def _served_merged(p: Published) -> list[str]:
    if not p.served.adapters:
        return []
    served, adapters = in_markdown(p.served.name), in_markdown(", ".join(p.served.adapters))
    return [
        f"The target is {served} with {adapters}: TARGET in the commands of engines stands for a "
        "folder where they are merged."
    ]

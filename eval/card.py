"""The model card of a published head: metadata in the Hub's own form, and figures of its report."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCardData
from jinja2 import Environment, StrictUndefined

from headstart.configs.schema import Config, RopePosition
from headstart.eval.tables import cells, title
from headstart.heads.engines import ENGINES, Engine, obstacles, remarks
from headstart.heads.export import rope_position

TEMPLATE = Path(__file__).with_name("card.md.jinja")
GEMMA_TERMS = {"license": "gemma", "license_link": "https://ai.google.dev/gemma/terms"}
APACHE = {
    "license": "apache-2.0",
    "license_link": "https://ai.google.dev/gemma/docs/gemma_4_license",
}
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
    """Hub ids: the target, or where it was tuned its adapters too; of an adapter of a head, the
    head."""
    head_name: str
    """What the report calls the head."""
    head_config: Any
    target_config: Any
    config: Config
    """Of the run."""
    summary: dict[str, Any]
    """summary.json of the run."""
    report: dict[str, Any]
    license: dict[str, str]
    languages: list[str]
    is_adapter: bool
    """Whether what is published is a PEFT adapter of the head in `base_models`."""


def licence_of(target_config: Any) -> dict[str, str]:
    """The licence of a target's weights, which binds heads distilled from them.

    Sources: https://ai.google.dev/gemma/terms for Gemma 3; the cards of Google's Gemma 4
    checkpoints and https://ai.google.dev/gemma/docs/gemma_4_license for Gemma 4.
    """
    return APACHE if target_config.model_type.startswith("gemma4") else GEMMA_TERMS


def model_card(published: Published) -> str:
    """README.md of the repository.

    Raises:
        ValueError: the report has no figures of this head.
    """
    results = _results(published)
    p, env = published, published.report["environment"]
    architecture = p.head_config.architectures[0]
    setting = title(p.report)
    template = Environment(undefined=StrictUndefined, keep_trailing_newline=True).from_string(
        TEMPLATE.read_text(encoding="utf-8")
    )
    return template.render(
        metadata=_metadata(p, results).to_yaml(),
        name=p.repo_id.rpartition("/")[2],
        repo_id=p.repo_id,
        target=env["target"],
        base_model=p.config.target.name if p.is_adapter else p.base_models[0],
        base_head=p.base_models[0],
        adapter=p.is_adapter,
        architecture=architecture,
        parameters=f"{p.summary['parameters_trained']:,}",
        num_assistant_tokens=p.config.train.rounds,
        setting=f"{setting}, torch {env['torch']}, transformers {env['transformers']}, prompts "
        f"`{env['prompts']}`.",
        rows=[_row(result) for result in results],
        verdict=p.report["verdict"],
        needs_headstart=p.target_config.model_type.startswith("gemma3"),
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


def _metadata(p: Published, results: list[dict[str, Any]]) -> ModelCardData:
    """The head of the card. A draft head is no fine-tune, but of the relations that the Hub knows
    (adapter, merge, quantized, finetune) that is the nearest; it puts the head into the target's
    model tree."""
    env = p.report["environment"]
    where = {"hardware": env["accelerator"] or env["processor"], "threads": env["threads"]}
    evaluated = []
    for result in results:
        name = f"{result['decoder']} decoder, K = {result['num_assistant_tokens']}"
        args = where | {
            "dtype": env["dtype"], "temperature": result["temperature"], "texts": result["texts"],
            "max_new_tokens": env["max_new_tokens"],
            "looping_texts": result["looping_texts"],
        }  # fmt: skip
        for metric in ("acceptance_length", "speedup"):
            evaluated.append(EvalResult(
                task_type="text-generation", dataset_type="prompts", dataset_name=env["prompts"],
                dataset_args=args, metric_type=metric, metric_value=round(result[metric], 4),
                metric_name=f"{metric.replace('_', ' ')} ({name})", metric_args=args,
            ))  # fmt: skip
    license_fields: Any = p.license  # license and license_link
    sources = [source.path for source in p.config.data.prompts]
    on_the_hub = [s for s in sources if s.count("/") == 1 and not Path(s).suffix]
    return ModelCardData(
        base_model=p.base_models,
        base_model_relation="adapter" if p.is_adapter else "finetune",
        library_name="peft" if p.is_adapter else "transformers",
        pipeline_tag="text-generation",
        datasets=on_the_hub or None,
        language=p.languages or None,
        tags=["speculative-decoding", "multi-token-prediction", "draft-head", "headstart"],
        model_name=p.repo_id.rpartition("/")[2],
        eval_results=evaluated,
        **license_fields,
    )


def _engine(engine: Engine, p: Published) -> dict[str, str]:
    """What the card says of an engine: its command, or why it does not take this head."""
    target, repo = p.base_models[0], p.repo_id
    against = obstacles(engine, p.head_config, p.target_config)
    says = {
        "name": NAMES[engine],
        "says": "Not checked with this head; `headstart serve-check` does.",
        "command": "",
    }
    if p.is_adapter:
        merge = f"headstart export {p.base_models[0]}+{repo} --to {engine} --out head --target "
        return says | {"says": "With the adapter merged:", "command": merge + p.config.target.name}
    if against:
        return says | {"says": "It does not take this head as it is: " + "; ".join(against) + "."}
    commands = {
        "vllm": f"vllm serve {target} --speculative-config "
        f'\'{{"method": "mtp", "model": "{repo}", "num_speculative_tokens": '
        f"{p.config.train.rounds}}}'",
        "llama.cpp": f"headstart export {repo} --to llama.cpp --target {target} --out head-gguf",
        "mlx": f"mlx_vlm.server --model {target} --draft-model {repo}",
    }
    said = [says["says"], *(f"{line}." for line in remarks(engine, p.head_config))]
    return says | {"says": " ".join(said), "command": commands[engine]}


def _sglang(p: Published) -> dict[str, str]:
    """As its pull request 24436 has it: `NEXTN` becomes `FROZEN_KV_MTP` for these heads."""
    if not p.target_config.model_type.startswith("gemma4") or p.is_adapter:
        return {"name": "SGLang", "says": "Gemma 4 targets and whole heads alone.", "command": ""}
    k = p.config.train.rounds
    return {
        "name": "SGLang",
        "says": "As sgl-project/sglang#24436 has it; never run with this head.",
        "command": f"python -m sglang.launch_server --model-path {p.base_models[0]} "
        f"--speculative-algorithm NEXTN --speculative-draft-model-path {p.repo_id} "
        f"--speculative-num-steps {k} --speculative-eagle-topk 1 "
        f"--speculative-num-draft-tokens {k + 1}",
    }


def _training(p: Published) -> list[str]:
    data, env, train = p.summary["data"], p.summary["environment"], p.config.train
    where = env["accelerator"] or f"{env['threads']} threads of {env['processor']}"
    source = ", ".join(s.path for s in p.config.data.prompts) or "a store of conversations"
    return [
        f"{data['documents']:,} conversations of the target's own "
        f"({data['answer_tokens']:,} answer tokens), prompts from {source}",
        f"{train.steps:,} steps of {train.batch_size * train.gradient_accumulation_steps} "
        f"conversations, {train.rounds} rounds, objective {train.objective}",
        f"on {where}, torch {env['torch']}, transformers {env['transformers']}",
        f"acceptance length {p.summary['best']['acceptance_length']:.2f} on "
        f"{data['validation_documents']} held-out conversations",
    ]


def _limits(p: Published) -> list[str]:
    made = p.report["environment"]
    data = p.config.data
    spoken = ", ".join(p.languages) or "not declared; those of its prompts"
    return [
        f"For this target alone: {made['target']}, fingerprint "
        f"`{made['target_fingerprint'][:16]}` in {made['dtype']}. Another fine-tune, or "
        "other bits, costs accepted drafts: `headstart adapt` trains it on.",
        POSITIONS[rope_position(p.head_config)],
        f"Languages: {spoken}.",
        f"Lengths: trained on prompts of up to {data.max_prompt_tokens} tokens and answers of up "
        f"to {data.max_new_tokens}.",
        *_served_merged(p),
        "Measured on the machine named above; a figure of another machine has to be measured "
        "there: `headstart eval`.",
    ]


def _served_merged(p: Published) -> list[str]:
    if not p.config.target.adapters:
        return []
    added = ", ".join(p.config.target.adapters)
    return [
        f"The target is {p.config.target.name} with {added}: engines that read whole checkpoints "
        "want it merged, and its folder in place of the name above."
    ]

"""The story of a run: target, data, head, training, ordered embeddings, evaluation."""

import json
import shlex
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator, PartialState
from accelerate.utils import set_seed
from transformers import PreTrainedModel

from headstart.common.console import hidden_progress, kept_lines, phase, print_once
from headstart.common.files import write_atomically
from headstart.common.machine import (
    deterministic_algorithms,
    environment,
    free_memory,
    is_out_of_memory,
    random_numbers_kept,
    release_memory,
)
from headstart.common.processes import join_processes, reduce_in_float32
from headstart.configs.schema import Config, EvalConfig, HeadConfig
from headstart.data.documents import Documents, WithPrompts
from headstart.data.loader import usable
from headstart.data.prepare import PlannedDocuments, plan_documents
from headstart.data.prompts import check_prompts
from headstart.data.splits import LeftOut
from headstart.eval.asked import asked_by_run
from headstart.eval.first_figures import first_figures, print_first_figures
from headstart.eval.page import print_report
from headstart.eval.recorded import prompt_set, prompts_sha256, set_names, without_paths
from headstart.eval.report import run_evaluation
from headstart.eval.statistics import NO_HEAD, OWN_LENGTH
from headstart.heads.kinds import check_drafts, head_kind, inputs_of, kind_of
from headstart.heads.live import MEMORY, moved
from headstart.heads.loading import load_served, open_target, open_whole
from headstart.heads.pairing import head_config
from headstart.heads.saving import draft_position_offset, load_assistant, load_assistant_config
from headstart.heads.target import Target
from headstart.train.estimate import (
    EVALUATION,
    ORDERING,
    TEXTS,
    TRAINING,
    Schedule,
    estimate_run,
)
from headstart.train.loop import train_head
from headstart.train.memory import cached_rows, kv_bytes
from headstart.train.ordering import order_best
from headstart.train.run_folder import (
    check_origin,
    drop_metrics_after,
    open_run,
    plot_run,
    read_metrics,
    run_folder,
    summary_text,
    write_config,
)
from headstart.train.start import clusters_wanted, count_steps, start_run, untrained_assistant
from headstart.train.tracking import (
    check_wandb_settings,
    finish_trackers,
    log_report,
    start_trackers,
)


def run(config: Config, resume: bool = False) -> None:
    """Train into `config.output_dir`, then evaluate its best head as `config.eval` says, and say on
    the way how long it should take, what drafts have to beat, what is left, and what is next.

    The reports land in `eval/` (in the target's dtype) and, unless that is float32 already, in
    `eval/exact/` (float32, where every text must equal plain greedy decoding; where memory is short
    a line says that it was skipped).

    Raises:
        RuntimeError: it does not.
    """
    schedule = Schedule()
    train(config, resume, schedule)
    state = PartialState()
    if config.eval is not None:
        doing = run_folder(config.output_dir, "evaluating")
        with doing if state.is_main_process else nullcontext():
            _evaluate(config, config.eval, state.device, schedule)
    for line in next_commands(config):
        print_once(line)


def train(config: Config, resume: bool = False, schedule: Schedule | None = None) -> None:
    """Distill a head for `config.target` into the run folder.

    Writes config.yaml, status.json, metrics.jsonl, checkpoints/, head/ (the best head, native
    format), summary.json and progress.png.

    Args:
        config: the whole run.
        resume: go on from the newest checkpoint where there is one.
        schedule: is filled by a probe of some seconds, and first figures are measured. None: there
            is no time for that.

    Raises:
        ValueError: the run folder holds another run, the configuration does not fit, or a
            checkpoint is damaged.
        Diverged, Interrupted, OSError: as of `train_head`.
    """
    check_wandb_settings(config)
    join_processes()
    accelerator = Accelerator(
        mixed_precision=config.train.mixed_precision,
        log_with=None if config.wandb.mode == "disabled" else "wandb",
        project_dir=config.output_dir,
    )
    reduce_in_float32(accelerator)
    with deterministic_algorithms(config.train.deterministic) as same_bits:
        if not accelerator.is_main_process:
            _train(config, resume, accelerator, None, same_bits)
            return
        with run_folder(config.output_dir, "training"):
            open_run(config, resume, accelerator.num_processes)
            _train(config, resume, accelerator, schedule, same_bits)


def check_start(config: Config) -> None:
    """Raise `ValueError` where drafts are to stand at a position, and those of the kind stand at
    none; or where the head that training starts from does not say where its drafts stood, or would
    lose the clusters of which the settings speak."""
    asked, kind = config.train.draft_position_offset, head_kind(config.head.kind)
    if config.head.warm:
        start = load_assistant_config(config.head.init_from)
        draft_position_offset(start)
        kind = kind_of(start)
        _check_clusters(config.head, start.use_ordered_embeddings)
        if config.head.use_ordered_embeddings:
            clusters_wanted(config.head, start.get_text_config().vocab_size)
    if asked != "mixed" and not kind.has_position:
        raise ValueError(
            f"train.draft_position_offset={asked}: drafts of the kind {kind.name} stand at no "
            "position, leave it out"
        )


def _check_clusters(head: HeadConfig, there: bool) -> None:
    """Raise `ValueError`, or say so, where a finished head's clusters are not asked for."""
    if head.use_ordered_embeddings:
        return
    if head.on_existing_clusters is not None:
        raise ValueError(
            f"head.on_existing_clusters={head.on_existing_clusters} needs "
            "head.use_ordered_embeddings=true"
        )
    if not there:
        return
    print_once(
        f"{head.init_from} has clusters, and the head of this run will have none: "
        "head.use_ordered_embeddings=true makes it one with clusters too"
    )


def _train(
    config: Config,
    resume: bool,
    accelerator: Accelerator,
    schedule: Schedule | None,
    same_bits: Callable[[], None],
) -> None:
    run, seed = config.output_dir, config.seed
    set_seed(seed)
    check_start(config)  # before anything is loaded
    held_out = config.eval.prompts if config.eval else None
    check_prompts(config.data, held_out)
    target = open_target(config.target, accelerator.device)
    head = head_config(target.config, config.head, config.train.num_speculative_steps)
    if config.eval is not None and not set(config.eval.decoders) <= {*OWN_LENGTH, *NO_HEAD}:
        check_drafts(head, config.eval.num_assistant_tokens, "eval.num_assistant_tokens")
    planned = plan_documents(target, config.data, seed, held_out, inputs_of(head))
    prompt_sets = [prompt_set(*pair) for pair in planned.sources]
    read = [one for _, own in planned.sources if own is not None for one in own]
    prompts = prompts_sha256(read) if read else ""
    if resume:
        check_origin(run, {"prompts": prompts})  # before they are answered
    if schedule is not None:
        look_ahead(config, planned, schedule)
    schedule = schedule or Schedule()
    with schedule.phase(TEXTS):
        training, validation, left_out = planned.prepare()
    same_bits()
    counted = count_steps(config.train, len(usable(training)), accelerator.num_processes)
    config = config.model_copy(update={"train": counted})
    if accelerator.is_main_process:
        write_config(config)
    with schedule.phase(TRAINING):
        state, likely = start_run(
            config, target, training, validation, prompts, accelerator, resume
        )
        if accelerator.is_main_process:
            drop_metrics_after(run, state.progress.step)
        start_trackers(accelerator, config)
        train_head(
            state,
            likely,
            target=target,
            training=training,
            validation=validation,
            config=config,
            accelerator=accelerator,
        )
    ordered = None
    if config.head.use_ordered_embeddings:
        with schedule.phase(ORDERING):
            ordered = order_best(config, target, training, validation)
    if accelerator.is_main_process:
        summary = write_summary(
            config,
            target,
            parameters=sum(p.numel() for p in state.head.trainable().values()),
            training=training,
            validation=validation,
            left_out=left_out,
            prompt_sets=prompt_sets,
            start=state.progress.start,
            ordered=ordered,
        )
        print_once(f"Best head, of step {summary['best']['step']}: {summary_text(summary['best'])}")
        plot_run(run)
    finish_trackers(accelerator, config)


SHORT = 60.0  # seconds of a whole run that is over before first figures would be of use


def look_ahead(config: Config, planned: PlannedDocuments, schedule: Schedule) -> None:
    """Fill the schedule of a run and print it, and the first figures, which are measured where the
    run is to be evaluated and takes longer than they do. The run goes on as if nothing had been.
    """
    if PartialState().num_processes > 1:
        print_once("How long the phases take is not estimated for several processes")
        return
    target, asked = planned.target, asked_by_run(config.data)
    with random_numbers_kept(target.device):
        with phase("Measuring how long it will take"), hidden_progress(), kept_lines():
            drafts = config.train.num_speculative_steps
            assistant = untrained_assistant(target, config.head, drafts)
            schedule.phases = estimate_run(config, planned, assistant, asked)
        schedule.folder = config.output_dir
        schedule.write()
        schedule.print()
        if config.eval is not None and schedule.seconds >= SHORT:
            served = moved(assistant, target.device, target.table.dtype).eval()
            with phase("Measuring first figures"), hidden_progress(), kept_lines():
                figures = first_figures(target, served, config.eval, asked, config.output_dir)
            print_first_figures(figures)
    del assistant
    release_memory(target.device)


def next_commands(config: Config) -> list[str]:
    """What to do with the head of a finished run, a line for each command."""
    run, t = config.output_dir, config.target
    if t.name.startswith(MEMORY):  # of which no other process knows
        return []
    settings = [f"target.name={t.name}"]
    settings += [f"target.adapters=[{', '.join(t.adapters)}]"] if t.adapters else []
    settings += [] if t.merge_adapters else ["target.merge_adapters=false"]
    settings += [] if t.quantization is None else [f"target.quantization={t.quantization}"]
    settings += [] if t.revision is None else [f"target.revision={t.revision}"]
    settings += [] if t.chat_template is None else [f"target.chat_template={t.chat_template}"]
    settings += [] if t.eos_token_ids is None else [f"target.eos_token_ids={t.eos_token_ids}"]
    settings += ["target.trust_remote_code=true"] if t.trust_remote_code else []
    settings += ["eval.prompts=MY.jsonl", f"output_dir={run / 'eval-mine'}"]
    evaluate = shlex.join(["headstart", "eval", str(run / "head"), *settings])
    lines = [f"Next, on prompts of your own: {evaluate}"]
    if config.eval is not None:
        publish = f"headstart publish {shlex.quote(str(run))} ORG/NAME"
        if Path(t.name).exists():  # a card names the target as others find it
            publish += " publish.base_models=ORG/TARGET"
        if t.chat_template is not None:
            publish += " " + shlex.quote(f"target.chat_template={t.chat_template}")
        lines.append(f"Or put it on the Hub: {publish}")
    return lines


def write_summary(
    config: Config,
    target: Target,
    parameters: int,
    training: Documents,
    validation: Documents,
    left_out: LeftOut,
    prompt_sets: list[dict[str, Any]],
    start: float,
    ordered: dict[str, Any] | None,
) -> dict[str, Any]:
    """Write `summary.json` into the run folder.

    Args:
        config: the resolved configuration.
        target: that the head was distilled from.
        parameters: that were trained.
        training, validation: what it was trained and validated on.
        left_out: for the sake of the validation.
        prompt_sets: that the training texts answer, as far as that is known.
        start: acceptance length before training, of a head that was finished; 0: there was none.
        ordered: acceptance lengths and recall of its ordered embeddings, where it got some.

    Returns:
        The content: `best`, the validation that the head in `head/` comes from; all `validations`;
        data, sizes, environment and configuration, without the folders of this machine.
    """
    rows = read_metrics(config.output_dir)
    validations = [{"step": 0, "acceptance_length": start}] if start else []
    validations += [
        {key: row[key] for key in ("step", "acceptance_length")}
        for row in rows
        if "acceptance_length" in row
    ]
    best = max(validations, key=lambda row: row["acceptance_length"])
    answers = training.documents if isinstance(training, WithPrompts) else training
    content = {
        "best": best | (ordered or {}),
        "validations": validations,
        "loss": rows[-1]["loss"],
        "parameters_trained": parameters,
        "data": {
            "documents": len(training.entries),
            "answer_tokens": sum(entry.trained for entry in answers.entries),
            "trained_tokens": sum(entry.trained for entry in training.entries),
            "validation_documents": len(validation.entries),
            "validation_answer_tokens": sum(entry.trained for entry in validation.entries),
            **asdict(left_out),
            "prompt_sets": prompt_sets,
        },
        "environment": environment(target.device) | {"target": target.name},
        "config": config.model_dump(mode="json"),
    }
    content = without_paths(content, set_names(config))
    write_atomically(config.output_dir / "summary.json", json.dumps(content, indent=2) + "\n")
    return dict(content)


def _evaluate(config: Config, chosen: EvalConfig, device: torch.device, schedule: Schedule) -> None:
    """Measure the run's best head, and check it in float32 where there is memory for that: else a
    line says what was left out. Reports land in `eval/` and `eval/exact/`, and what became of the
    check in summary.json.

    Raises:
        RuntimeError: a text of the check is not plain decoding's.
    """
    folder = config.output_dir / "eval"
    exact: dict[str, Any] | None = None
    checked, skipped = folder, None
    with schedule.phase(EVALUATION):
        content, needed = _measure(config, chosen, folder, device, together=True)
        if not PartialState().is_main_process:
            return  # the check is of a few prompts: the main process does it
        log_report(config, content)
        if config.target.dtype == "float32" and 0 in chosen.temperatures:
            exact = content
        elif chosen.fp32_check_prompts:
            checked = folder / "exact"
            exact, skipped = _measure_in_float32(config, chosen, checked, device, needed)
    print_report(content)
    print_once(f"The page: {folder / 'report.html'}, beside it report.md and report.json")
    if exact is not None:
        _check_lossless(exact, checked)
        _note_check(config, "every text equals plain decoding's")
    if skipped is not None:
        _note_check(config, skipped)
        print_once(skipped)


def _measure(
    config: Config,
    what: EvalConfig,
    out: Path,
    device: torch.device,
    together: bool = False,
    timed: bool = True,
) -> tuple[dict[str, Any], int]:
    """Evaluate the run's best head in the dtype of `config.target`, in this process or in all of
    the launch `together`: what the report holds, and the bytes that the same takes in float32."""
    # The target of before would leave no room for this one on a GPU. Cycles of references hold it,
    # such as those of FSDP2's communication context, which go with a collection alone.
    release_memory(device)
    target = (open_whole if together else load_served)(config.target, device)
    head = config.output_dir / "head"
    assistant = load_assistant(head, getattr(torch, config.target.dtype), device)
    asked, heads = asked_by_run(config.data), {str(head): assistant}
    content = run_evaluation(
        target, heads, what, out,
        asked=asked, printed=False, together=together, timed=timed,
    )  # fmt: skip
    texts = [row for result in content["results"] for row in result.get("per_text", ())]
    columns = [content["per_text_columns"].index(name) for name in ("prompt_tokens", "tokens")]
    longest = max(sum(row[column] for column in columns) for row in texts)
    return content, float32_bytes(target, assistant, longest)


def float32_bytes(target: Target, assistant: PreTrainedModel, tokens: int) -> int:
    """Bytes of the weights of a target and its head in float32, and of the keys and values of so
    many tokens; what a forward holds beside them comes on top."""
    weights = sum(
        p.numel() * (4 if p.is_floating_point() else p.element_size())
        for model in (target.model, assistant)
        for p in model.parameters()
    )
    rows = cached_rows(target.config, tokens)
    return weights + sum(kv_bytes(target.config, i, 4) * n for i, n in enumerate(rows))


def _measure_in_float32(
    config: Config, chosen: EvalConfig, out: Path, device: torch.device, needed: int
) -> tuple[dict[str, Any] | None, str | None]:
    """What the report of the check holds, or why there is none: the run is good all the same."""
    # Sampled texts are the target's in distribution, and equal no other.
    few = chosen.model_copy(
        update={
            "limit": chosen.fp32_check_prompts,
            "num_assistant_tokens": sorted(chosen.num_assistant_tokens)[-1:],
            "temperatures": [0.0],
        }
    )
    skipped = "The check in float32, that every text equals plain decoding's, was skipped: "
    again = ["headstart", "eval", str(config.output_dir / "head")]
    again += ["--config", str(config.output_dir / "config.yaml"), "target.dtype=float32"]
    again += [f"eval.limit={few.limit}", f"eval.num_assistant_tokens={few.num_assistant_tokens}"]
    if chosen.temperatures != few.temperatures:
        again += ["eval.temperatures=0", "eval.seeds=0,1", "eval.top_k=null", "eval.top_p=1"]
    again += [f"output_dir={out}"]
    elsewhere = f". Where there is as much: {shlex.join(again)}"
    size = f"{needed / 2**30:.2f} GiB"
    release_memory(device)
    # The weights of a GGUF file are computed in the memory of the CPU on their way to a GPU.
    on_cpu = [torch.device("cpu")] if config.target.name.endswith(".gguf") else []
    for place in dict.fromkeys([device, *on_cpu]):
        free = free_memory(place)
        if free is not None and free < needed:
            there = f"{free / 2**30:.2f} GiB are free on {place}"
            return None, f"{skipped}it needs {size}, and {there}{elsewhere}"
    target = config.target.model_copy(update={"dtype": "float32"})
    try:
        own = config.model_copy(update={"target": target})
        return _measure(own, few, out, device, timed=False)[0], None  # nobody decodes so
    except (torch.OutOfMemoryError, MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
    return None, f"{skipped}{device} had less free than the {size} and more it needs{elsewhere}"


def _check_lossless(content: dict[str, Any], out: Path) -> None:
    """Raise `RuntimeError` where a text of a float32 evaluation diverges from plain decoding."""
    diverged = [p for r in content["results"] for p in r["diverged"] if not p["within_rounding"]]
    if diverged:
        gap = max(p["top2_logit_gap"] for p in diverged)
        raise RuntimeError(
            f"assisted decoding gave other text than plain decoding in float32, at a logit gap "
            f"of {gap:.3g}: this is a fault, see {out / 'report.json'}"
        )


def _note_check(config: Config, outcome: str) -> None:
    """Say in summary.json what became of the check."""
    path = config.output_dir / "summary.json"
    content = json.loads(path.read_text(encoding="utf-8")) | {"fp32_check": outcome}
    write_atomically(path, json.dumps(content, indent=2) + "\n")

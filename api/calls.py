"""Train, adapt, evaluate, decode with and publish a head, on what a script holds in memory.

Each call tells the same story as its command. The model comes back as it was, and nothing is left
on the disk but in an `output_dir`.
"""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from headstart.api.inputs import TrainedHead, Work, assistant_of, head_path, work_on
from headstart.common.console import print_once
from headstart.common.files import expand_home
from headstart.configs.loader import Override
from headstart.configs.schema import Config
from headstart.configs.settings import PublishConfig, Settings
from headstart.eval.report import evaluate_heads
from headstart.heads.decoder import exact_decoding
from headstart.heads.live import aliased, as_target_class, check_model
from headstart.heads.pairing import check_shapes
from headstart.heads.saving import load_assistant
from headstart.serve.publish import Publication, publish
from headstart.train.adapt import adapt
from headstart.train.adaptation import adapt_defaults
from headstart.train.run import run


def train_head(
    model: Any,
    tokenizer: Any = None,
    data: Any = None,
    config: Config | str | Path | None = None,
    *,
    eval_data: Any = None,
    output_dir: str | Path | None = None,
) -> TrainedHead:
    """Distill a draft head for a target, as `headstart train` does.

    Args:
        model: a Gemma 3 or Gemma 4, a `PeftModel` of one, whose active adapters are served beside
            its weights, or a name or folder of a target.
        tokenizer: of a model in memory.
        data: prompts to train on, which the target answers itself: a `datasets.Dataset` with a
            column `messages` or `prompt`, or a source of `data.prompts`. None: as `config` says.
        config: built in code, or the name or file of a recipe. What it leaves open has the values
            of the schema; the dtype is the model's own, and nothing is evaluated.
        eval_data: held-out prompts to evaluate on; of the kinds of `data`.
        output_dir: a run folder to write. None: nothing stays on the disk.

    Raises:
        ValueError: one of them is of another kind, or does not fit the others; or as of `run`.
        RuntimeError: in float32 a text is another than plain decoding's.
    """
    with work_on(model, tokenizer, output_dir) as work:
        more = work.trained_on(data)
        if eval_data is not None:
            more.append(("eval.prompts", work.prompts(eval_data, "eval_prompts.jsonl")))
        settings = work.settings(config, more, [("eval", None)])
        _check_prompts(settings)
        run(settings.of_run())
        return _finished(work, work.out, work.out / "eval" / "report.json")


def adapt_head(
    model: Any,
    tokenizer: Any = None,
    data: Any = None,
    head: Any = None,
    config: Config | str | Path | None = None,
    *,
    general_data: Any = None,
    output_dir: str | Path | None = None,
) -> TrainedHead:
    """Train a head on for a target that was tuned, as `headstart adapt` does.

    Args:
        model, tokenizer, data: as for `train_head`.
        head: to go on from: what `train_head` returned, a loaded one, a folder or a Hub id.
        config: as for `train_head`; `headstart.configs.settings.Settings` has `adapt` too, with the
            budget. What it leaves open is as for `headstart adapt`.
        general_data: prompts of everything else, to be mixed in (`adapt.general_prompts`).
        output_dir: a folder to write, in which the same call goes on after a stop.

    Raises:
        ValueError: as of `train_head`, or as of `adapt`; or the configuration has
            `adapt.measure_only`, of which no head comes: use `evaluate_head`.
    """
    with work_on(model, tokenizer, output_dir) as work:
        path = head_path(head, work.out)
        more = work.trained_on(data)
        if general_data is not None:
            general = work.prompts(general_data, "general.jsonl")
            more.append(("adapt.general_prompts", general))
        settings = work.settings(config, more, adapt_defaults(path))
        _check_prompts(settings)
        if settings.adapt.measure_only:
            raise ValueError("adapt.measure_only makes no head: use evaluate_head")
        adapt(settings, path, work.device, ["headstart.api.adapt_head", path])
        return _finished(work, work.out / "run", work.out / "adapt.json")


def evaluate_head(
    model: Any,
    tokenizer: Any = None,
    head: Any = None,
    data: Any = None,
    config: Config | str | Path | None = None,
    *,
    output_dir: str | Path | None = None,
) -> dict[str, Any]:
    """Compare plain and assisted decoding, as `headstart eval` does; returns what report.json
    holds.

    Args:
        model, tokenizer: as for `train_head`.
        head: as for `adapt_head`.
        data: prompts, as for `train_head`. None: `eval.prompts` of `config`.
        config: as for `train_head`; its `eval` and `target` count.
        output_dir: where report.json, report.md and report.html are written. None: nowhere.

    Raises:
        ValueError: as of `train_head`, or as of `run_evaluation`.
    """
    with work_on(model, tokenizer, output_dir) as work:
        path = head_path(head, work.passing)
        more: list[Override] = []
        if data is not None:
            more.append(("eval.prompts", work.prompts(data, "eval_prompts.jsonl")))
        settings = work.settings(config, more, makes_head=False)
        name = path if isinstance(head, str | Path) else "head"
        report = evaluate_heads({name: path}, settings.of_run(), work.device)
        _tell_kept(work)
        return report


@contextmanager
def clean_kv_decoding(model: Any, head: Any) -> Iterator[Any]:
    """Gives the model as one whose `generate` drafts with the head by the clean-KV decoder: greedy
    text stays the model's own, sampled text its distribution.

    It shares the memory of the model, which can go on being used and trained on beside it. Batch
    size 1; K is `generation_config.num_assistant_tokens` of the head.

    Args:
        model: as for `train_head`, in memory.
        head: as for `adapt_head`.

    Raises:
        ValueError: as of `train_head`, or the head does not fit the model.
    """
    check_model(model)
    twin = aliased(model)
    served: Any = twin if isinstance(twin, PreTrainedModel) else twin.get_base_model()
    as_target_class(served).eval()
    assistant = assistant_of(head, served.dtype, served.device)
    check_shapes(served.config.get_text_config(), assistant.config, type(served).__name__)
    with exact_decoding(served, weights_change=True):
        served.generate = partial(served.generate, assistant_model=assistant)
        yield served


def publish_head(
    run: TrainedHead | str | Path,
    repo_id: str,
    model: Any = None,
    tokenizer: Any = None,
    options: PublishConfig | None = None,
    *,
    output_dir: str | Path | None = None,
    plan: bool = False,
    chat_template: str | Path | None = None,
) -> str | None:
    """Put a head, its report and a model card on the Hugging Face Hub, as `headstart publish` does;
    returns the address.

    Args:
        run: a run folder, or what `train_head` or `adapt_head` returned with an `output_dir`.
        repo_id: ORG/NAME of the repository, private unless `options` says otherwise.
        model, tokenizer: of a target that was in memory, as it was evaluated.
        options: what a card says and who sees it. Of a target that was in memory nobody can know
            where others find it: `base_models` has to say.
        output_dir: where the folder of the repository is written. None: nowhere.
        plan: upload nothing; the folder is to be looked at.
        chat_template: the file that the run had in `target.chat_template`, which may be published.

    Raises:
        ValueError: the run was not kept, or as of `build_folder` and `upload`.
        RuntimeError: the Hub refuses, or cannot be reached.
    """
    folder = run.folder if isinstance(run, TrainedHead) else Path(run)
    if folder is None:
        raise ValueError(
            "the run of this head was not kept, and what is published is read from there: train "
            "with output_dir=DIR"
        )
    chosen = PublishConfig() if options is None else options
    what = Publication(
        folder, repo_id, chosen,
        chat_template=None if chat_template is None else Path(expand_home(str(chat_template))),
    )  # fmt: skip
    out = None if output_dir is None else Path(output_dir)
    if model is None:
        return publish(what, out, plan)
    with work_on(model, tokenizer, None) as work:
        t = work.settings(None, makes_head=False).target
        return publish(replace(what, target=t.name, adapters=tuple(t.adapters)), out, plan)


def _check_prompts(settings: Settings) -> None:
    """Raise `ValueError` where nobody said what to train on: prompts of ours would be taken."""
    if not settings.given(["data.prompts", "data.conversations", "data.store"]):
        raise ValueError(
            "nothing says what to train on: give data, a datasets.Dataset with a column "
            "`messages` or `prompt`, or data.prompts in the configuration"
        )


def _finished(work: Work, folder: Path, report: Path) -> TrainedHead:
    """What a run left, read before its folder goes."""
    summary = json.loads((folder / "summary.json").read_text(encoding="utf-8"))
    found = json.loads(report.read_text(encoding="utf-8")) if report.is_file() else None
    dtype = getattr(torch, summary["config"]["target"]["dtype"])
    assistant = load_assistant(folder / "head", dtype, work.device)
    _tell_kept(work)
    return TrainedHead(assistant, summary, found, work.out if work.kept else None)


def _tell_kept(work: Work) -> None:
    if not work.kept:
        print_once("The folder of these results was of the time being: output_dir=DIR keeps one")

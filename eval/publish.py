"""A head as the folder of a repository of the Hub, checked against its report."""

import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import ModelCard
from rich.console import Console
from rich.table import Table

from headstart.configs.loader import load_config
from headstart.configs.schema import Config, TargetConfig
from headstart.eval.card import Published, model_card
from headstart.eval.compare import read_report
from headstart.eval.licence import licence_of, notice
from headstart.eval.report import write_report
from headstart.heads.export import load_assistant, load_assistant_config
from headstart.heads.files import check_empty, whole_folder
from headstart.heads.loading import load_target_config, load_target_tokens
from headstart.heads.lora import ADAPTER
from headstart.heads.served import model_fingerprint, split_revision

DEMO = {"gemma3-270m": "google/gemma-3-270m"}  # built-in name -> what it is on the Hub
NOT_PUBLISHED = (ADAPTER, "order.json")  # of a run's head folder: what no reader of heads wants
SETTINGS, EVALUATION = "training_config.yaml", "evaluation"


@dataclass(frozen=True)
class Publication:
    """What to publish, and as what."""

    run: Path
    """A run folder, or that of `headstart adapt`."""
    repo_id: str
    """ORG/NAME."""
    report: Path | None = None
    """Folder of the report that the figures come from; None: the run's own."""
    base_models: tuple[str, ...] = ()
    """Hub ids: the target, whole, and what else the card is to name as its base; empty: as the run
    names it."""
    base_head: str | None = None
    """Hub id of the head that an adapter of a head goes onto, `ORG/NAME@REVISION` for a revision;
    None: as the run names it."""
    merged: bool = False
    """Publish a head that was trained as an adapter as a whole head."""
    license: str | None = None
    """None: the target's own."""
    languages: tuple[str, ...] = ()
    texts: bool = True
    """Whether the report keeps its example texts, which are of the evaluation prompts."""


@dataclass(frozen=True)
class _Run:
    """Where things lie in a run folder, or in that of `headstart adapt`."""

    folder: Path

    @property
    def training(self) -> Path:
        adapted = self.folder / "run"
        return adapted if (adapted / "config.yaml").is_file() else self.folder

    @property
    def head(self) -> Path:
        return self.training / "head"

    def config(self) -> Config:
        """The resolved configuration of the training."""
        if not (self.head / "config.json").is_file():
            raise ValueError(f"{self.folder} holds no finished head: {self.head} is missing")
        return load_config(self.training / "config.yaml")

    def summary(self) -> dict[str, Any]:
        """What the training came to."""
        path = self.training / "summary.json"
        if not path.is_file():
            raise ValueError(f"{self.folder} holds no finished run: {path} is missing")
        found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        return found

    @property
    def pictures(self) -> list[Path]:
        run, adapted = self.training, self.folder
        paths = [run / "progress.png", adapted / "adapt.png", adapted / "adapt.md"]
        return [path for path in paths if path.is_file()]


def build_folder(what: Publication, out: Path) -> list[Path]:
    """Write the folder of a repository, read it back and compare it with the head that was
    evaluated; returns its files.

    Args:
        what: to publish.
        out: folder, which appears whole or not at all; an earlier one of this kind is replaced.

    Raises:
        ValueError: there is no finished run; its report is missing, of another head or of another
            target; the target has no name on the Hub; what was written does not load back as what
            was evaluated; or `out` holds something else.
    """
    if not ((out / SETTINGS).is_file() and (out / EVALUATION).is_dir()):
        check_empty(out)
    run = _Run(what.run)
    config = run.config()
    report = read_report(what.report or run.folder / "eval")
    evaluated = _evaluated(report, run.head)
    as_adapter = (run.head / ADAPTER).is_dir() and not what.merged
    base_head = _base_head(what, config) if as_adapter else None
    served = _on_the_hub(what, config)
    if not what.texts:
        report = report | {"examples": []}
    t = config.target
    target_config = load_target_config(t.name, t.revision, t.trust_remote_code)
    tokenizer = load_target_tokens(t).tokenizer
    terms = {"license": what.license} if what.license else licence_of(target_config, served)
    published = Published(
        repo_id=what.repo_id,
        # The last is what the head was trained for, and comes first.
        base_models=list(what.base_models)
        or [split_revision(name)[0] for name in (*reversed(served.adapters), served.name)],
        base_head=base_head,
        served=served,
        head_name=evaluated.name,
        head_config=load_assistant_config(run.head),
        own_parameters=evaluated.own_parameters,
        target_config=target_config,
        config=config,
        summary=run.summary(),
        report=report,
        license=terms,
        languages=list(what.languages),
    )
    with whole_folder(out) as work:
        if base_head is not None:
            _copy_adapter(run.head / ADAPTER, work, base_head)
        else:
            shutil.copytree(
                run.head, work, dirs_exist_ok=True, ignore=shutil.ignore_patterns(*NOT_PUBLISHED)
            )
            tokenizer.save_pretrained(work)
        shutil.copy(run.training / "config.yaml", work / SETTINGS)
        (work / EVALUATION).mkdir()
        write_report(report, work / EVALUATION)
        for picture in run.pictures:
            shutil.copy(picture, work / EVALUATION / picture.name)
        (work / "README.md").write_text(model_card(published), encoding="utf-8")
        if (wanted := notice(terms, served.name)) is not None:
            (work / "NOTICE").write_text(wanted, encoding="utf-8")
        _check(work, base_head, evaluated)
    return files_of(out)


def files_of(folder: Path) -> list[Path]:
    """The files below a folder, in order of their names."""
    return sorted(path for path in folder.rglob("*") if path.is_file())


@dataclass(frozen=True)
class _Evaluated:
    """The head that a report is of."""

    name: str
    """What the report calls it."""
    fingerprint: str
    dtype: torch.dtype
    """In which it was evaluated, and has this fingerprint."""
    own_parameters: int
    """Its embedding table apart."""


def _evaluated(report: dict[str, Any], head: Path) -> _Evaluated:
    env = report["environment"]
    known = env.get("head_fingerprints")
    again = (
        f"evaluate this head: headstart eval --target NAME --head {head} --prompts SET --out DIR, "
        "then publish with --report DIR"
    )
    if not known:
        raise ValueError(f"the report does not say which weights it is of: {again}")
    dtype = getattr(torch, env["dtype"])
    assistant = load_assistant(head, dtype)
    mine = model_fingerprint(assistant, assistant.config)
    name = next((name for name, fingerprint in known.items() if fingerprint == mine), None)
    if name is None:
        others = ", ".join(f"{name} ({other[:12]})" for name, other in known.items())
        raise ValueError(
            f"{head} ({mine[:12]}) is not a head of the report, which is of {others}: {again}"
        )
    if other := report.get("warnings", {}).get(name):
        raise ValueError(f"the report is of another target: {other}. On its own, {again}")
    own = sum(p.numel() for n, p in assistant.named_parameters() if "embed_tokens" not in n)
    return _Evaluated(name, mine, dtype, own)


def _on_the_hub(what: Publication, config: Config) -> TargetConfig:
    """The target by the names that others load it by."""
    if what.base_models:
        named: dict[str, Any] = {"name": what.base_models[0], "revision": None, "adapters": []}
        return config.target.model_copy(update=named)
    t = config.target
    names = [DEMO.get(t.name, t.name), *t.adapters]
    for name in names:
        if Path(name).exists() or name.count("/") != 1:
            raise ValueError(
                f"the target {name} is no repository of the Hub, which a card has to name: give "
                "--base-model ORG/NAME, that of the target or of what it was tuned from"
            )
    return t.model_copy(update={"name": names[0]})


def _base_head(what: Publication, config: Config) -> str:
    name = what.base_head or config.head.start
    if Path(name).exists() or name.count("/") != 1:
        raise ValueError(
            f"the head {name}, which this adapter goes onto, is no repository of the Hub: publish "
            "it and give --base-head ORG/NAME, or publish the whole head with --merged"
        )
    return name


def _copy_adapter(adapter: Path, work: Path, base_head: str) -> None:
    """An adapter of a head as peft reads it, with its base by the name that it has on the Hub."""
    shutil.copytree(adapter, work, dirs_exist_ok=True)
    path = work / "adapter_config.json"
    name, revision = split_revision(base_head)
    content = json.loads(path.read_text(encoding="utf-8"))
    content |= {"base_model_name_or_path": name, "revision": revision}
    path.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def _check(work: Path, base_head: str | None, evaluated: _Evaluated) -> None:
    """Read the folder back, an adapter onto its base as the Hub has it: what was evaluated has to
    come out, and the card has to be one."""
    path = f"{base_head}+{work}" if base_head is not None else work
    try:
        assistant = load_assistant(path, evaluated.dtype)
    except ValueError as error:
        raise ValueError(
            f"what was written does not load back ({' '.join(str(error).split())}): nothing was "
            "published"
        ) from error
    if (found := model_fingerprint(assistant, assistant.config)) != evaluated.fingerprint:
        raise ValueError(
            f"what was written reads back as another head ({found[:12]}) than the one evaluated "
            f"({evaluated.fingerprint[:12]}): nothing was published"
        )
    card = ModelCard.load(work / "README.md")
    if card.data.eval_results is None:
        raise ValueError("the model card holds no figures: nothing was published")


def print_folder(files: list[Path], out: Path) -> None:
    """Every file with its size."""
    table = Table(title=str(out))
    table.add_column("file")
    table.add_column("bytes", justify="right")
    for path in files:
        table.add_row(str(path.relative_to(out)), f"{path.stat().st_size:,}")
    Console().print(table)

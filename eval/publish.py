"""A head as a repository of the Hub: its folder, checked against its report, and the upload."""

import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import CommitOperationAdd, HfApi, ModelCard
from huggingface_hub.errors import HfHubHTTPError, LocalTokenNotFoundError, RepositoryNotFoundError
from rich.console import Console
from rich.table import Table

from headstart.configs.loader import load_config
from headstart.configs.schema import Config
from headstart.data.progress import say
from headstart.eval.card import Published, licence_of, model_card
from headstart.eval.compare import read_report
from headstart.eval.report import write_report
from headstart.heads.export import load_assistant, load_assistant_config
from headstart.heads.files import whole_folder
from headstart.heads.loading import load_target_config, load_target_tokens
from headstart.heads.lora import ADAPTER
from headstart.heads.served import model_fingerprint

DEMO = {"gemma3-270m": "google/gemma-3-270m"}  # built-in name -> what it is on the Hub
NOT_PUBLISHED = (ADAPTER, "order.json")  # of a run's head folder: what no reader of heads wants


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
    """Hub ids of the target; empty: as the run names it."""
    base_head: str | None = None
    """Hub id of the head that an adapter of a head goes onto; None: as the run names it."""
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
        out: folder, which appears whole or not at all.

    Raises:
        ValueError: there is no finished run; its report is missing or of another head; the target
            has no name on the Hub; or what was written does not load back as what was evaluated.
    """
    run = _Run(what.run)
    if not (run.head / "config.json").is_file():
        raise ValueError(f"{what.run} holds no finished head: {run.head} is missing")
    config = load_config(run.training / "config.yaml")
    report = read_report(what.report or run.folder / "eval")
    name, fingerprint = _evaluated(report, run.head)
    as_adapter = (run.head / ADAPTER).is_dir() and not what.merged
    base_models = [_base_head(what, config)] if as_adapter else _base_models(what, config)
    if not what.texts:
        report = report | {"examples": []}
    t = config.target
    target_config = load_target_config(t.name, t.revision, t.trust_remote_code)
    published = Published(
        repo_id=what.repo_id,
        base_models=base_models,
        head_name=name,
        head_config=load_assistant_config(run.head),
        target_config=target_config,
        config=config,
        summary=json.loads((run.training / "summary.json").read_text(encoding="utf-8")),
        report=report,
        license={"license": what.license} if what.license else licence_of(target_config),
        languages=list(what.languages),
        is_adapter=as_adapter,
    )
    with whole_folder(out) as work:
        if as_adapter:
            _copy_adapter(run.head / ADAPTER, work, base_models[0])
        else:
            shutil.copytree(
                run.head, work, dirs_exist_ok=True, ignore=shutil.ignore_patterns(*NOT_PUBLISHED)
            )
            load_target_tokens(config.target).tokenizer.save_pretrained(work)
        shutil.copy(run.training / "config.yaml", work / "training_config.yaml")
        (work / "evaluation").mkdir()
        write_report(report, work / "evaluation")
        for picture in run.pictures:
            shutil.copy(picture, work / "evaluation" / picture.name)
        (work / "README.md").write_text(model_card(published), encoding="utf-8")
        _check(work, config, as_adapter, fingerprint, report["environment"]["dtype"])
    return files_of(out)


def files_of(folder: Path) -> list[Path]:
    """The files below a folder, in order of their names."""
    return sorted(path for path in folder.rglob("*") if path.is_file())


def _evaluated(report: dict[str, Any], head: Path) -> tuple[str, str]:
    """What the report calls this head, and its fingerprint in the report's dtype."""
    env = report["environment"]
    known = env.get("head_fingerprints")
    again = f"evaluate this head: headstart eval --target {env['target']} --head {head} --out DIR"
    if not known:
        raise ValueError(f"the report does not say which weights it is of: {again}")
    assistant = load_assistant(head, getattr(torch, env["dtype"]))
    mine = model_fingerprint(assistant, assistant.config)
    for name, fingerprint in known.items():
        if fingerprint == mine:
            return name, mine
    others = ", ".join(f"{name} ({other[:12]})" for name, other in known.items())
    raise ValueError(
        f"{head} ({mine[:12]}) is not a head of the report, which is of {others}: {again}"
    )


def _base_models(what: Publication, config: Config) -> list[str]:
    if what.base_models:
        return list(what.base_models)
    names = [DEMO.get(config.target.name, config.target.name), *config.target.adapters]
    for name in names:
        if Path(name).exists() or name.count("/") != 1:
            raise ValueError(
                f"the target {name} is no repository of the Hub, which a card has to name: give "
                "--base-model ORG/NAME, that of the target or of what it was tuned from"
            )
    # The last is what the head was trained for, and comes first.
    return [name.partition("@")[0] for name in reversed(names)]


def _base_head(what: Publication, config: Config) -> str:
    name = what.base_head or config.head.start
    if Path(name).exists() or name.count("/") != 1:
        raise ValueError(
            f"the head {name}, which this adapter goes onto, is no repository of the Hub: publish "
            "it and give --base-head ORG/NAME, or publish the whole head with --merged"
        )
    return name.partition("@")[0]


def _copy_adapter(adapter: Path, work: Path, base_head: str) -> None:
    """An adapter of a head as peft reads it, with its base by the name that it has on the Hub."""
    shutil.copytree(adapter, work, dirs_exist_ok=True)
    path = work / "adapter_config.json"
    content = json.loads(path.read_text(encoding="utf-8")) | {"base_model_name_or_path": base_head}
    path.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def _check(work: Path, config: Config, as_adapter: bool, fingerprint: str, dtype: str) -> None:
    """Read the folder back: what was evaluated has to come out, and the card has to be one."""
    path = f"{config.head.start}+{work}" if as_adapter else work
    assistant = load_assistant(path, getattr(torch, dtype))
    if (found := model_fingerprint(assistant, assistant.config)) != fingerprint:
        raise ValueError(
            f"what was written reads back as another head ({found[:12]}) than the one evaluated "
            f"({fingerprint[:12]}): nothing was published"
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


def upload(folder: Path, repo_id: str, private: bool, branch: str | None, create_pr: bool) -> str:
    """Upload a folder in one commit; returns where it is. Large files that an earlier try has
    brought there are not sent again.

    Args:
        folder: of `build_folder`.
        repo_id: ORG/NAME, created where it is not there.
        private: of a repository that is created.
        branch: created where it is not there; None: main.
        create_pr: as a pull request.

    Raises:
        RuntimeError: the Hub refuses or cannot be reached; the message says what to do.
    """
    api = HfApi(library_name="headstart")
    try:
        api.create_repo(repo_id, private=private, exist_ok=True)
        if branch is not None:
            api.create_branch(repo_id, branch=branch, exist_ok=True)
        # Not `upload_folder`, which makes several commits where hf_xet is installed.
        commit = api.create_commit(
            repo_id,
            [CommitOperationAdd(str(path.relative_to(folder)), path) for path in files_of(folder)],
            commit_message="Publish a draft head",
            revision=branch,
            create_pr=create_pr,
        )
    except LocalTokenNotFoundError as error:
        raise RuntimeError("the Hub wants a token: run `hf auth login`, or set HF_TOKEN") from error
    except HfHubHTTPError as error:
        raise RuntimeError(_refusal(error, repo_id)) from error
    except Exception as error:
        # huggingface_hub 1 speaks through httpx, 2 through httpx2.
        if not type(error).__module__.startswith(("httpx", "httpcore")):
            raise
        raise RuntimeError(
            f"the connection to the Hub was cut ({type(error).__name__}): run the same command "
            "again, large files that arrived are not sent again"
        ) from error
    say(f"Published: {commit.pr_url or commit.commit_url}")
    return str(commit.pr_url or commit.commit_url)


def _refusal(error: HfHubHTTPError, repo_id: str) -> str:
    status = error.response.status_code
    if status == 401 or isinstance(error, RepositoryNotFoundError):
        return (
            f"the Hub does not know you, or {repo_id} is not yours to see (401): run `hf auth "
            "login` with a token that may write"
        )
    match status:
        case 403:
            return (
                f"your token may not write to {repo_id} (403): make one that may, or ask its owner"
            )
        case 409:
            return f"somebody else changed {repo_id} at the same time (409): run the command again"
        case _ if status >= 500:
            return f"the Hub fails at the moment ({status}): run the command again later"
    return f"the Hub refused {repo_id} ({status})"

"""A head as the folder of a repository of the Hub, checked against its report."""

import copy
import json
import re
import shutil
from dataclasses import dataclass, field
from itertools import count
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import ModelCard
from transformers import PreTrainedTokenizerBase

from headstart.common.children import temporary_folder
from headstart.common.console import print_once
from headstart.common.files import (
    atomic_folder,
    check_empty,
    drop_remote_code,
    put_back,
    refuse_link,
)
from headstart.configs.loader import load_saved, save_config
from headstart.configs.schema import Config, TargetConfig
from headstart.configs.settings import PublishConfig
from headstart.eval.compare import read_report
from headstart.eval.page import write_report
from headstart.eval.recorded import is_local, without_paths
from headstart.heads.adapters import split_revision
from headstart.heads.admission import reading
from headstart.heads.kinds import kind_of
from headstart.heads.live import MEMORY
from headstart.heads.loading import load_served, load_target_config, load_target_tokens, served_name
from headstart.heads.saving import ADAPTER, MADE_FOR, load_assistant, load_assistant_config
from headstart.heads.target import model_fingerprint
from headstart.serve.card import Published, model_card
from headstart.serve.hub import (
    ADAPTER_FILES,
    EVALUATION,
    HEAD_FILES,
    SETTINGS,
    TOLD,
    check_hub_id,
    is_hub_id,
    license_of,
    notice,
    upload,
)
from headstart.train.adapt_report import adaptation_markdown

DEMO = {"gemma3-270m": "google/gemma-3-270m"}  # built-in name -> what it is on the Hub
# What an earlier publication may have left in its folder; in `evaluation/` there it is `TOLD`.
WRITTEN = ("*.json", "*.safetensors", "*.jinja", "*.model", "README.md", "NOTICE", SETTINGS)
TEMPLATES = "additional_chat_templates"  # folder of a tokenizer that has several


@dataclass(frozen=True)
class Publication:
    """What to publish, and as what."""

    run: Path
    """A run folder, or that of `headstart adapt`."""
    repo_id: str
    """ORG/NAME."""
    options: PublishConfig = field(default_factory=PublishConfig)
    target: str | None = None
    """Where the target lies now; None: where the run has it."""
    adapters: tuple[str, ...] | None = None
    """Where its adapters lie now; None: where the run has them."""
    chat_template: Path | None = None
    """A file that may be published as its chat template; None: no file but the tokenizer's own."""


class _Run:
    """Where things lie in a run folder, or in that of `headstart adapt`.

    Raises:
        ValueError: it holds no finished run.
    """

    def __init__(self, folder: Path):
        adapted = folder / "run"
        self.folder = folder
        self.training = adapted if (adapted / "config.yaml").is_file() else folder
        self.head = self.training / "head"
        pictures = self.training / "progress.png", folder / "adapt.png"
        self.pictures = [path for path in pictures if path.is_file()]
        summary = self.training / "summary.json"
        for inner in (self.training, self.head, self.head / ADAPTER):
            if inner != folder and inner.is_symlink():
                raise ValueError(
                    f"{inner} is a link, behind which may be what is not to be published: put a "
                    "copy in its place"
                )
        put_back(self.head)
        if not (self.head / "config.json").is_file():
            raise ValueError(f"{folder} holds no finished head: {self.head} is missing")
        self.config = load_saved(self.training / "config.yaml")
        if not summary.is_file():
            raise ValueError(f"{folder} holds no finished run: {summary} is missing")
        with reading(str(summary), "is damaged"):
            self.summary: dict[str, Any] = json.loads(summary.read_text(encoding="utf-8"))


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
    _check_ours(out)
    if not is_hub_id(what.repo_id) or "@" in what.repo_id:
        raise ValueError(f"{what.repo_id} is no name of a repository: give ORG/NAME")
    run = _Run(what.run)
    config = run.config
    as_adapter = (run.head / ADAPTER).is_dir() and not what.options.merge_adapter
    base_head = (what.options.base_head or config.head.init_from) if as_adapter else None
    if base_head is not None:
        check_hub_id(
            base_head, "the head of this adapter,",
            "publish it and give publish.base_head=ORG/NAME, or publish the whole head with "
            "publish.merge_adapter=true",
        )  # fmt: skip
    served = _on_the_hub(what, config)
    report = read_report(what.options.report or run.folder / "eval")
    evaluated = _evaluated(report, run.head)
    target_config, tokenizer = _load_target(what, config.target, report["environment"])
    names = _public_names(what, config, served, report, evaluated)
    report = without_paths(report if what.options.include_texts else _without_texts(report), names)
    report["environment"]["target"] = served_name(served)  # where it lay then, it may not lie now
    report["warnings"] = {}  # of other heads: this one has none
    config = Config.model_validate(without_paths(config.model_dump(mode="json"), names))
    # Whoever trains by these settings decides for himself whose code may run.
    distrustful = config.target.model_copy(update={"trust_remote_code": False})
    config = config.model_copy(update={"target": distrustful})
    terms = (
        {"license": what.options.license}
        if what.options.license
        else license_of(target_config, served)
    )
    published = Published(
        repo_id=what.repo_id,
        # The last is what the head was trained for, and comes first.
        base_models=[
            split_revision(name)[0]
            for name in what.options.base_models or (*reversed(served.adapters), served.name)
        ],
        base_head=base_head,
        served=served,
        head_name=names[evaluated.name],
        head_config=load_assistant_config(run.head),
        own_parameters=evaluated.own_parameters,
        target_config=target_config,
        config=config,
        summary=run.summary,
        report=report,
        license=terms,
        languages=list(what.options.languages),
    )
    with atomic_folder(out) as work:
        _write(run, published, tokenizer, names, work)
        _check(work, base_head, evaluated)
    return sorted(path for path in out.rglob("*") if path.is_file())


def _write(run: _Run, p: Published, tokenizer: Any, names: dict[str, str], work: Path) -> None:
    of_the_hub: dict[str, str | None] = {}
    if p.base_head is not None:
        _copy(run.head / ADAPTER, work, ADAPTER_FILES)
        base, revision = split_revision(p.base_head)
        of_the_hub = {"base_model_name_or_path": base, "revision": revision}
    else:
        _copy(run.head, work, HEAD_FILES)
        tokenizer.save_pretrained(work)
    # A head's notes its target, a tokenizer's whatever its trainer put there.
    for path in work.glob("*config.json"):
        own = of_the_hub if path.name == "adapter_config.json" else {}
        content = json.loads(path.read_text(encoding="utf-8")) | own
        content = public_config(content, names, p.served)
        path.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    save_config(p.config, work / SETTINGS)
    evaluation = work / EVALUATION
    evaluation.mkdir()
    write_report(p.report, evaluation)
    if (told := run.folder / "adapt.json").exists():
        content = json.loads(_own(told).read_text(encoding="utf-8"))
        text = adaptation_markdown(_public_adaptation(content, names, p.served))
        (evaluation / "adapt.md").write_text(text, encoding="utf-8")
    for picture in run.pictures:
        shutil.copyfile(_own(picture), evaluation / picture.name)
    (work / "README.md").write_text(model_card(p), encoding="utf-8")
    if (wanted := notice(p.license, p.served.name)) is not None:
        (work / "NOTICE").write_text(wanted, encoding="utf-8")
    drop_remote_code(work)


def _public_adaptation(
    content: dict[str, Any], names: dict[str, str], served: TargetConfig
) -> dict[str, Any]:
    """An adapt.json by the names that others know, without its command line, which has paths in
    words of many forms."""
    content = without_paths(content, names) | {"commands": []}
    content["target"]["name"] = served_name(served)
    if is_local(content["head"]):
        content["head"] = Path(content["head"]).name
    return content


def _without_texts(report: dict[str, Any]) -> dict[str, Any]:
    """A report without what its target wrote: the examples, and the values that a JSON schema's
    complaint repeats."""
    report = copy.deepcopy(report) | {"examples": []}
    for result in report["results"]:
        for text in (result.get("structured") or {}).get("invalid", []):
            text["why"] = "not told"
    return report


def _check_ours(out: Path) -> None:
    """Raise `ValueError` where a folder that is to be replaced holds what no publishing wrote, such
    as a clone of the repository with its history."""
    refuse_link(out)
    if not ((out / SETTINGS).is_file() and (out / EVALUATION).is_dir()):
        check_empty(out)
        return
    for path in [*out.iterdir(), *(out / EVALUATION).iterdir()]:
        names = WRITTEN if path.parent == out else TOLD
        known = path.is_file() and any(map(path.match, names))
        if path == out / TEMPLATES:
            known = path.is_dir() and all(one.match("*.jinja") for one in path.iterdir())
        if path.is_symlink() or not (known or path == out / EVALUATION):
            raise ValueError(
                f"{out} holds {path.relative_to(out)}, which is not of an earlier publication and "
                "would be lost: name another folder, output_dir=DIR"
            )


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
        f"evaluate this head: headstart eval {head} target.name=NAME eval.prompts=SET "
        "output_dir=DIR, then publish with publish.report=DIR"
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
    tables = kind_of(assistant.config).tables
    own = sum(p.numel() for n, p in assistant.named_parameters() if n not in tables)
    return _Evaluated(name, mine, dtype, own)


def _on_the_hub(what: Publication, config: Config) -> TargetConfig:
    """The target by the names that others load it by."""
    t = config.target
    for name in what.options.base_models:
        check_hub_id(name, "publish.base_models", "give publish.base_models=ORG/NAME")
    if what.options.base_models:
        name, revision = split_revision(what.options.base_models[0])
        return t.model_copy(update={"name": name, "revision": revision, "adapters": []})
    named = t.model_copy(update={"name": DEMO.get(t.name, t.name)})
    for name in (named.name, *named.adapters):
        check_hub_id(
            name, "the target",
            "a card has to name one, give publish.base_models=ORG/NAME, that of the target or of "
            "what it was tuned from",
        )  # fmt: skip
    return named


def _load_target(
    what: Publication, t: TargetConfig, env: dict[str, Any]
) -> tuple[Any, PreTrainedTokenizerBase]:
    """The configuration and the tokenizer of a run's target, from where it lies now.

    Raises:
        ValueError: it is not there, or another target than the one that was evaluated.
    """
    named = t.chat_template
    if what.chat_template is not None:
        t = t.model_copy(update={"chat_template": what.chat_template})
    elif named is not None and not named.resolve().is_relative_to(
        Path(what.target or t.name).resolve()
    ):
        # Somebody else may have written the run's settings, and named any file of the user's.
        raise ValueError(
            f"the run's settings name {named} as the chat template, and it would be published: say "
            f"that it may be, target.chat_template={named}"
        )
    if what.target is not None or what.adapters is not None:
        moved: dict[str, Any] = {}
        if what.adapters is not None:
            moved["adapters"] = list(what.adapters)
        if what.target is not None:
            moved |= {"name": what.target, "revision": None}
        t = t.model_copy(update=moved)
        found = load_served(t.model_copy(update={"dtype": env["dtype"]})).fingerprint
        if found != env["target_fingerprint"]:
            raise ValueError(
                f"{served_name(t)} ({found[:12]}) is not the "
                f"target of the report ({env['target_fingerprint'][:12]}): name the one that was "
                "evaluated, target.name=DIR, and target.adapters=[DIR] for its adapters"
            )
    try:
        tokenizer = load_target_tokens(t).tokenizer
        _check_tokenizer_files(tokenizer)
        return load_target_config(t.name, t.revision, t.trust_remote_code), tokenizer
    except (OSError, ValueError) as error:
        raise ValueError(
            f"{' '.join(str(error).split())}. If the target of the run was moved, say where it is "
            "now: target.name=DIR, and target.adapters=[DIR] for its adapters"
        ) from error


def _check_tokenizer_files(tokenizer: PreTrainedTokenizerBase) -> None:
    """Raise `ValueError` where a tokenizer's folder has a link that leads out of it: a chat
    template, which is published, may be any file of the user's then."""
    if not tokenizer.name_or_path:  # a built-in one
        return
    folder = Path(tokenizer.name_or_path).resolve()
    blobs = folder.parent.parent / "blobs"  # of the Hub's cache, where all files are links there
    inside = sorted(folder.iterdir()) if folder.is_dir() else []
    more = [below for path in inside if path.is_dir() for below in path.glob("*.jinja")]
    for path in [*inside, *more]:
        real = path.resolve()
        known = real.is_relative_to(folder) or real.parent == blobs
        if path.suffix in (".json", ".jinja", ".model") and not known:
            raise ValueError(
                f"{path} is a link to {real}, which would be published: put a copy in its place"
            )


def _public_names(
    what: Publication,
    config: Config,
    served: TargetConfig,
    report: dict[str, Any],
    evaluated: "_Evaluated",
) -> dict[str, str]:
    """Path -> what others know it by; names that are public already stand for themselves."""
    t, data, env, evaluation = config.target, config.data, report["environment"], config.eval
    paths = [config.output_dir, data.conversations, data.store, data.cache_dir, t.chat_template]
    places = [str(path) for path in paths if path is not None]
    # These may be names of the Hub too.
    named = [
        t.name, *t.adapters, config.head.init_from, *(source.path for source in data.prompts),
        *env["heads"], *env.get("draft_models", []),
    ]  # fmt: skip
    if "prompts" in env:  # a report of before has their path
        named.append(env["prompts"])
    if evaluation is not None:
        named += [evaluation.prompts, *evaluation.draft_models]
    places += filter(is_local, named)
    if what.options.base_models:  # which say what the target is to others
        places += [n for n in (t.name, *t.adapters) if "/" in n or n.startswith(MEMORY)]
    names: dict[str, str] = {}
    for place in dict.fromkeys(places):  # the heads of several runs are all called head
        name, known = Path(place).name, names.values()
        more = (f"{name}-{number}" for number in count(2))
        names[place] = name if name not in known else next(n for n in more if n not in known)
    if t.name in names or Path(t.name).exists():
        names[t.name] = served.name
    if names.keys() & {t.name, *t.adapters}:
        names[served_name(t)] = served_name(served)
    return names | {evaluated.name: what.repo_id}


def public_config(
    content: dict[str, Any], names: dict[str, str], served: TargetConfig
) -> dict[str, Any]:
    """A config.json by the names that others know, a head's note of its target too: one of
    `publish.base_models` has the adapters of the run in it."""
    noted = (content.get(MADE_FOR) or {}).get("config")
    content = without_paths(content, names)
    if noted and names.keys() & {noted["name"], *noted["adapters"]}:
        public = {"name", "adapters", "revision"}
        content[MADE_FOR]["config"] |= served.model_dump(mode="json", include=public)
    return content


def _copy(folder: Path, work: Path, wanted: re.Pattern[str]) -> None:
    """The files of a folder that are wanted.

    Raises:
        ValueError: one is a link, behind which may be any file of the user's.
    """
    for path in sorted(folder.iterdir()):
        if wanted.fullmatch(path.name):
            shutil.copyfile(_own(path), work / path.name)


def _own(path: Path) -> Path:
    """A path, unless it is a link, or no file: a run folder may come from somebody else."""
    if path.is_symlink() or not path.is_file():
        raise ValueError(
            f"{path} is no file of its own, but a link or a folder: nothing was published. If what "
            "is behind it is meant, put a copy in its place"
        )
    return path


def _check(work: Path, base_head: str | None, evaluated: _Evaluated) -> None:
    """Read the folder back, an adapter onto its base as the Hub has it: what was evaluated has to
    come out, and the card has to be one."""
    try:
        path = f"{base_head}+{work}" if base_head is not None else work
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
    if ModelCard.load(work / "README.md").data.eval_results is None:
        raise ValueError("the model card holds no figures: nothing was published")


def publish(what: Publication, out: Path | None, plan: bool) -> str | None:
    """Build the folder of a repository and upload it; returns its address.

    Args:
        what: the run, and where it goes.
        out: where the folder is written. None: nowhere.
        plan: upload nothing; the folder is to be looked at.

    Raises:
        ValueError: a plan that is written nowhere, or as of `build_folder` and `upload`.
        RuntimeError: the Hub refuses, or cannot be reached.
    """
    if plan and out is None:
        raise ValueError("a plan writes the folder and uploads nothing: name it, output_dir=DIR")
    with temporary_folder() as passing:
        out = out or passing / "folder"
        _print_folder(build_folder(what, out), out, what.run)
        return None if plan else upload(out, what.repo_id, what.options)


def _print_folder(files: list[Path], out: Path, run: Path) -> None:
    """Every file with its size, and what lies in the run folder and was left out."""
    for path in files:
        print(f"{path.stat().st_size:>13,}  {path.relative_to(out)}")
    where = _Run(run)
    taken = {*where.pictures, where.folder / "adapt.md", where.training}
    wanted = {where.head: HEAD_FILES, where.head / ADAPTER: ADAPTER_FILES}
    left = []
    for folder in dict.fromkeys([where.folder, where.training, *wanted]):
        for path in sorted(folder.iterdir()) if folder.is_dir() else []:
            known = folder in wanted and wanted[folder].fullmatch(path.name)
            if not (known or path in taken or path in wanted):
                left.append(str(path.relative_to(run)) + ("/" if path.is_dir() else ""))
    names = [name if name.isprintable() else ascii(name) for name in left]
    print_once(f"Left out of {run}: {', '.join(names) or 'nothing'}")
    print_once(f"Written: {out}")

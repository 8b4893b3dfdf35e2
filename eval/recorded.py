"""How result files record what they were made of: a prompt set by its name and SHA-256, and nothing
by the folders of this machine."""

import hashlib
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from headstart.common.files import file_sha256
from headstart.configs.schema import Config, SourceConfig
from headstart.configs.section import BUILTIN
from headstart.data.prompts import SETS, Prompt
from headstart.data.sources import IN_CHECKOUT, builtin_files, builtin_name, is_hub_dataset

FIELDS = ("id", "category", "messages", "raw", "tools", "later_turns")
"""Of a prompt, those that `prompts_sha256` is over: what is asked, and what a report groups by."""
SHOWN = 12  # hex digits of a SHA-256 that a page shows


def prompt_set(
    source: str | SourceConfig, prompts: Sequence[Prompt] | None = None
) -> dict[str, Any]:
    """How a result file records a prompt set: `name`, that of `set_name`, and `sha256`.

    That of one file, a built-in set too, is of its bytes, as `sha256sum` gives it. Several files
    and datasets have that of their prompts (`prompts_sha256`).

    Args:
        source: as `load_prompts` or `load_prompt_set` takes it.
        prompts: all that were loaded from it. None: nothing was; `sha256` of what is no single file
            is None then, not known.
    """
    sha256 = _file_sha256(source if isinstance(source, str) else source.path)
    if sha256 is None and prompts is not None:
        sha256 = prompts_sha256(prompts)
    return {"name": set_name(source), "sha256": sha256}


def set_name(source: str | SourceConfig) -> str:
    """What a prompt set is called wherever it lies: `builtin:NAME`; the id of a Hub dataset, with
    its configuration, split and revision where they are given; of a benchmark SET or SET=FILE; else
    the name of the file, folder or glob, without the folders that it lies in."""
    source = SourceConfig(path=source) if isinstance(source, str) else source
    key, given, path = source.path.partition("=")
    if given and key in SETS:
        return f"{key}={_last(path)}"
    if (name := builtin_name(source.path)).startswith(BUILTIN):
        return name
    if not is_hub_dataset(source.path):
        return _last(source.path)
    settings = source.model_dump(include={"name", "split", "revision"}, exclude_defaults=True)
    chosen = ", ".join(f"{setting}={value}" for setting, value in settings.items())
    return f"{name} ({chosen})" if chosen else name


def prompts_sha256(prompts: Sequence[Prompt]) -> str:
    """SHA-256, in hex, of prompts as they were loaded: of one line of JSON for each, an object of
    `FIELDS`, and `json_schema` where there is one, with sorted keys, in ASCII."""
    digest = hashlib.sha256()
    for prompt in prompts:
        row = {name: getattr(prompt, name) for name in FIELDS}
        if prompt.json_schema is not None:  # as if earlier prompts had it
            row["json_schema"] = prompt.json_schema
        digest.update(json.dumps(row, sort_keys=True, default=str).encode() + b"\n")
    return digest.hexdigest()


def describe_set(found: dict[str, Any]) -> str:
    """A recorded prompt set in words, with the first digits of its SHA-256 where that is known."""
    sha256 = found["sha256"]
    return f"{found['name']} (SHA-256 {sha256[:SHOWN]})" if sha256 else str(found["name"])


def recorded_set(environment: dict[str, Any]) -> dict[str, Any]:
    """The prompt set of a report, by its `environment`; `sha256` is None in reports of before,
    which have a path alone."""
    if "prompt_set" in environment:
        return dict(environment["prompt_set"])
    return {"name": set_name(environment["prompts"]), "sha256": None}


def set_names(config: Config) -> dict[str, str]:
    """The places of a run's prompt sets -> their names."""
    names = {source.path: set_name(source) for source in config.data.prompts}
    if config.eval is not None:
        names[config.eval.prompts] = set_name(config.eval.prompts)
    return names


def is_private(name: str) -> bool:
    """Whether a name is a path that tells of the machine."""
    return name.startswith(("/", "~", "../")) or Path(name).is_absolute()


def is_local(name: str) -> bool:
    """Whether what names a file, a folder or a repository of the Hub is a path that tells of the
    folders it lies in, here or where a run was made."""
    if is_private(name):
        return True
    on_the_hub = is_hub_dataset(name.partition("@")[0])  # models are named alike
    # Of every checkout, and `builtin:NAME` of every machine: names that tell nothing.
    return "/" in name and not on_the_hub and Path(name).parent != IN_CHECKOUT


NAMES = frozenset([
    "name", "target", "head", "heads", "adapters", "init_from", "path", "prompts", "draft_models",
    "conversations", "store", "cache_dir", "output_dir", "chat_template",
])  # fmt: skip
"""Fields of reports and settings whose values are names of models, prompt sets or folders."""
BY_NAME = frozenset(["costs", "head_fingerprints"])
"""Fields of reports that hold something for each head."""


def without_paths(value: Any, names: dict[str, str], field: str = "") -> Any:
    """JSON without the paths of this machine, in its keys too.

    Args:
        value: of a report, of settings, or a text.
        names: path -> what others know it by. One without a folder, such as `model`, may be a word
            of the settings too, and is a path where a name stands alone. Of another path that
            stands alone its last part is left; within texts the working folder is left out and the
            home folder is `~`.
        field: in which the value stands.
    """
    match value:
        case dict():
            keyed = "name" if field in BY_NAME else ""
            return {
                without_paths(k, names, keyed): without_paths(v, names, k) for k, v in value.items()
            }
        case list():
            return [without_paths(item, names, field) for item in value]
        case str():
            return _without_paths(value, names, field in NAMES)
    return value


def _without_paths(text: str, names: dict[str, str], is_name: bool) -> str:
    if text in names and (is_name or "/" in text):
        return names[text]
    for path in sorted((name for name in names if "/" in name), key=len, reverse=True):
        text = text.replace(path, names[path])
    if is_private(text) and "\n" not in text and len(Path(text).parts) > 1:
        return Path(text).name
    return text.replace(f"{Path.cwd()}/", "").replace(f"{Path.home()}/", "~/")


def _last(path: str) -> str:
    """The last part of a path, also of `.` and `..`."""
    return Path(os.path.abspath(path)).name


def _file_sha256(path: str) -> str | None:
    """SHA-256 of the one file that a source is; None: it is no single file."""
    if path.startswith(BUILTIN):
        files = builtin_files(path)
        return hashlib.sha256(files[0].read_bytes()).hexdigest() if len(files) == 1 else None
    key, given, own = path.partition("=")
    file = Path(own if given and key in SETS else path)
    return file_sha256(file) if file.is_file() else None

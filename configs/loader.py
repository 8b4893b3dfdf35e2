"""YAML plus dotted overrides -> `Config`; an error names the key and its nearest valid one."""

import difflib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeAlias, get_args, get_origin

from pydantic import BaseModel, ValidationError

from headstart.configs import hardware
from headstart.configs.schema import Config
from headstart.configs.yaml_text import dump_yaml, load_yaml, meant, read_value, section_in

Override: TypeAlias = str | tuple[str, Any]
"""`section.key=value` as a user types it, or a key and the value itself."""


def load_config(path: str | Path | None, overrides: Sequence[Override] = ()) -> Config:
    """Read a run configuration.

    Args:
        path: YAML file; None: defaults, and no evaluation.
        overrides: later ones win. Of text, a value is taken as it stands where the setting is a
            text or a path, and read as YAML elsewhere.

    Raises:
        ValueError: the file is missing or malformed, a key does not exist (the nearest valid key
            is named), a value has the wrong type, or a combination cannot work.
    """
    tree = {"eval": None} if path is None else _read_tree(Path(path))
    for override in overrides:
        _apply(tree, override)
    try:
        config = Config.model_validate(tree)
    except ValidationError as error:
        raise ValueError(f"{path or 'the settings'}: {explain_all(error, Config)}") from error
    return _without_auto(config)


def load_saved(path: Path) -> Config:
    """The resolved configuration of a run, as `save_config` wrote it.

    Raises:
        ValueError: as `load_config`, or the file was cut short.
    """
    sections = read_yaml(path, Config)
    missing = [name for name in Config.model_fields if name not in sections]
    if missing or not path.read_bytes().endswith(b"\n"):
        raise ValueError(f"{path} was cut short{f': it has no {missing[0]}' if missing else ''}")
    return load_config(path)


def _without_auto(config: Config) -> Config:
    """The same with the dtypes of this machine, so that what is saved says what was computed."""
    update: dict[str, Any] = {}
    if config.target.dtype == "auto":
        dtype = hardware.natural_dtype()
        update["target"] = config.target.model_copy(update={"dtype": dtype})
    if config.train.precision == "auto":
        precision = hardware.natural_dtype()
        update["train"] = config.train.model_copy(update={"precision": precision})
    return config.model_copy(update=update)


def _read_tree(path: Path) -> dict[str, Any]:
    tree = read_yaml(path, Config)
    run = tree.setdefault("run", {})
    if isinstance(run, dict):
        run.setdefault("dir", f"runs/{path.stem}")
    return tree


def read_yaml(path: Path, model: type[BaseModel]) -> dict[str, Any]:
    """The sections of a YAML file that holds a `model`.

    Raises:
        ValueError: it is missing, empty, malformed, or holds something else.
    """
    if not path.is_file():
        raise ValueError(f"no configuration file {path}")
    try:
        tree = meant(load_yaml(path.read_text(encoding="utf-8")), model)
    except (OSError, ValueError, RecursionError) as error:  # a file that is no UTF-8 text too
        raise ValueError(f"{path} is not YAML: {' '.join(str(error).split())}") from error
    if tree is None:
        raise ValueError(f"{path} is empty: expected sections such as `train:`")
    if not isinstance(tree, dict):
        raise ValueError(f"{path}: expected sections such as `train:`, found a bare value")
    return tree


def save_config(config: Config, path: Path) -> None:
    """Write the resolved configuration, every default spelled out, as YAML."""
    path.write_text(dump_config(config), encoding="utf-8")


def dump_config(config: Config) -> str:
    """The resolved configuration as YAML text; equal texts are equal configurations."""
    return dump_yaml(config.model_dump(mode="json"))


def _apply(tree: dict[str, Any], override: Override) -> None:
    if isinstance(override, tuple):
        key, value = override
    else:
        key, separator, text = override.partition("=")
        if not separator or not key:
            raise ValueError(f"override {override!r} is not of the form section.key=value")
        try:
            value = read_value(text, _annotation_of(key))
        except ValueError as error:
            raise ValueError(f"override {override!r}: the value is not YAML") from error
    *parents, leaf = key.split(".")
    node = tree
    for parent in parents:
        if node.get(parent) is None:  # absent, or switched off as `eval: null`
            node[parent] = {}
        node = node[parent]
        if not isinstance(node, dict):
            raise ValueError(f"override {override!r}: {parent} is a value, not a section")
    node[leaf] = value


def _annotation_of(key: str) -> Any:
    """The type of the setting with this dotted key; `Any` where there is none, or where it lies
    within a free mapping."""
    found: Any = Config
    for part in key.split("."):
        section = section_in(found)
        if section is None or part not in section.model_fields:
            return get_args(found)[1] if get_origin(found) is dict else Any
        found = section.model_fields[part].annotation
    return found


def explain_all(error: ValidationError, model: type[BaseModel] = Config) -> str:
    """All that pydantic finds wrong with a tree of `model`, in words; of another section's no key
    may be unknown."""
    return "; ".join(explain(dict(problem), model) for problem in error.errors())


def explain(problem: dict[str, Any], model: type[BaseModel]) -> str:
    """One of pydantic's problems with a tree of `model`, in words; a wrong key with the nearest
    one that exists."""
    location = [str(part) for part in problem["loc"]]
    key = ".".join(location)
    if problem["type"] != "extra_forbidden":
        message = problem["msg"].removeprefix("Value error, ")
        return f"{key}: {message}" if key else message
    *parents, leaf = location
    valid = _keys(parents, model)
    nearest = difflib.get_close_matches(leaf, valid, n=1, cutoff=0.0)
    hint = ".".join([*parents, nearest[0]]) if nearest else ""
    return f"no key {key}; the nearest valid key is {hint} (valid: {', '.join(valid)})"


def _keys(parents: list[str], section: type[BaseModel]) -> list[str]:
    for parent in parents:
        if not parent.isdigit():  # an item of a list: its section is known already
            section = section_in(section.model_fields[parent].annotation) or section
    return list(section.model_fields)

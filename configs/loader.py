"""YAML plus dotted overrides -> `Config`; an error names the key and its nearest valid one."""

import difflib
from pathlib import Path
from typing import Any, get_args

import yaml
from pydantic import BaseModel, ValidationError

from headstart.configs import hardware
from headstart.configs.schema import Config


def load_config(path: str | Path | None, overrides: list[str] | None = None) -> Config:
    """Read a run configuration.

    Args:
        path: YAML file; None: defaults, and no evaluation.
        overrides: `section.key=value` strings; values are read as YAML.

    Raises:
        ValueError: the file is missing or malformed, a key does not exist (the nearest valid key
            is named), a value has the wrong type, or a combination cannot work.
    """
    tree = {"eval": None} if path is None else _read_tree(Path(path))
    for override in overrides or []:
        _apply(tree, override)
    try:
        config = Config.model_validate(tree)
    except ValidationError as error:
        problems = "; ".join(explain(dict(e), Config) for e in error.errors())
        raise ValueError(f"{path or 'the settings'}: {problems}") from error
    return _without_auto(config)


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
    tree = read_yaml(path)
    run = tree.setdefault("run", {})
    if isinstance(run, dict):
        run.setdefault("dir", f"runs/{path.stem}")
    return tree


def read_yaml(path: Path) -> dict[str, Any]:
    """The sections of a YAML file.

    Raises:
        ValueError: it is missing, malformed, or holds something else.
    """
    if not path.is_file():
        raise ValueError(f"no configuration file {path}")
    try:
        tree = yaml.safe_load(path.read_text(encoding="utf-8")) or {}
    except yaml.YAMLError as error:
        raise ValueError(f"{path} is not YAML: {' '.join(str(error).split())}") from error
    if not isinstance(tree, dict):
        raise ValueError(f"{path}: expected sections such as `train:`, found a bare value")
    return tree


def save_config(config: Config, path: Path) -> None:
    """Write the resolved configuration, every default spelled out, as YAML."""
    path.write_text(dump_config(config), encoding="utf-8")


def dump_config(config: Config) -> str:
    """The resolved configuration as YAML text; equal texts are equal configurations."""
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False)


def _apply(tree: dict[str, Any], override: str) -> None:
    key, separator, text = override.partition("=")
    if not separator or not key:
        raise ValueError(f"override {override!r} is not of the form section.key=value")
    *parents, leaf = key.split(".")
    node = tree
    for parent in parents:
        if node.get(parent) is None:  # absent, or switched off as `eval: null`
            node[parent] = {}
        node = node[parent]
        if not isinstance(node, dict):
            raise ValueError(f"override {override!r}: {parent} is a value, not a section")
    try:
        node[leaf] = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ValueError(f"override {override!r}: the value is not YAML") from error


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
            section = _section_in(section.model_fields[parent].annotation) or section
    return list(section.model_fields)


def _section_in(annotation: Any) -> type[BaseModel] | None:
    """The section that a field holds, by itself, in a list or as one of several types."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    return next(filter(None, map(_section_in, get_args(annotation))), None)

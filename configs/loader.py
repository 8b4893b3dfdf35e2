"""YAML plus dotted overrides -> `Config`, and back; an error names the key and its nearest valid
one.
"""

import difflib
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import NoneType
from typing import Annotated, Any, Literal, TypeAlias, get_args, get_origin

import yaml
from pydantic import BaseModel, ValidationError

from headstart.configs.keys import is_class, known_keys, section_at, section_in
from headstart.configs.recipes import find_config
from headstart.configs.renamed import refuse_renamed, with_new_names
from headstart.configs.schema import Config
from headstart.configs.settings import Settings

Override: TypeAlias = str | tuple[str, Any]
"""`section.key=value` as a user types it, or a key and the value itself."""


def load_config(path: str | Path | None, overrides: Sequence[Override] = ()) -> Config:
    """Read the configuration of a run, as `load_settings` does; its folder is runs/NAME for a file
    or recipe NAME that names none, and without a file nothing is evaluated."""
    stem = None if path is None else find_config(path).stem
    run = [("eval", None)] if stem is None else [("output_dir", f"runs/{stem}")]
    return load_settings(path, overrides, defaults=run).of_run()


def load_settings(
    path: str | Path | None,
    overrides: Sequence[Override] = (),
    defaults: Sequence[tuple[str, Any]] = (),
) -> Settings:
    """Read all settings.

    Args:
        path: YAML file, or the name of a recipe; None: the command line alone.
        overrides: later ones win. Of text, a value is taken as it stands where the setting is a
            text or a path, and read as YAML elsewhere.
        defaults: keys, and the values that they have where neither file nor overrides say.

    Raises:
        ValueError: the file is missing or malformed, a key does not exist (the nearest valid key
            is named) or was renamed, a value has the wrong type, or a combination cannot work.
    """
    tree = {} if path is None else read_yaml(find_config(path), Settings)
    try:
        refuse_renamed(tree)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    for override in overrides:
        _apply(tree, override)
    refuse_renamed(tree)
    typed = [one[0] if isinstance(one, tuple) else one.partition("=")[0] for one in overrides]
    return _validated(tree, defaults, path, typed)


def load_saved(path: Path) -> Config:
    """The resolved configuration of a run, as `save_config` wrote it, of an earlier version too.

    Raises:
        ValueError: as `load_settings`, or the file was cut short.
    """
    sections = read_saved(path)
    missing = [name for name in Config.model_fields if name not in sections]
    if missing or not path.read_bytes().endswith(b"\n"):
        raise ValueError(f"{path} was cut short{f': it has no {missing[0]}' if missing else ''}")
    return _validated(sections, [], path).of_run()


def read_saved(path: Path) -> dict[str, Any]:
    """The sections of a run's configuration as they stand there, under the names of today.

    Raises:
        ValueError: as `read_yaml`.
    """
    return with_new_names(read_yaml(path, Config))


def _validated(
    tree: dict[str, Any],
    defaults: Sequence[tuple[str, Any]],
    path: str | Path | None,
    typed: Sequence[str] = (),
) -> Settings:
    for key, value in defaults:
        _set_default(tree, key.split("."), value)
    try:
        settings = Settings.model_validate(tree)
    except ValidationError as error:
        # What was typed is no fault of the file.
        wrong = [".".join(str(part) for part in one["loc"]) for one in error.errors()]
        told = any(key == one or key.startswith(f"{one}.") for key in wrong for one in typed)
        name = path if path is not None and not told else "the settings"
        raise ValueError(f"{name}: {explain_all(error, Settings)}") from error
    return _without_auto(settings)


def _set_default(tree: dict[str, Any], path: list[str], value: Any) -> None:
    first, *rest = path
    if not rest:
        tree.setdefault(first, value)
    elif isinstance(section := tree.setdefault(first, {}), dict):
        _set_default(section, rest, value)


def _without_auto(settings: Settings) -> Settings:
    """The same with the dtypes of this machine, so that what is saved says what was computed."""
    from headstart.common import machine  # torch: seconds, that errors and --help do without

    update: dict[str, Any] = {}
    if settings.target.dtype == "auto":
        dtype = machine.natural_dtype()
        update["target"] = settings.target.model_copy(update={"dtype": dtype})
    if settings.train.mixed_precision == "auto":
        precision = "bf16" if machine.natural_dtype() == "bfloat16" else "no"
        update["train"] = settings.train.model_copy(update={"mixed_precision": precision})
    return settings.model_copy(update=update)


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
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False)


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
    found: Any = Settings
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
        if problem["type"] == "literal_error":
            message += f", not {problem['input']!r}"
        return f"{key}: {message}" if key else message
    *parents, leaf = location
    valid = list(section_at(".".join(parents), model).model_fields)
    everywhere, meant_by = known_keys(model), MEANT.get(leaf, leaf)
    if not parents and (same := [k for k in everywhere if k.endswith(f".{leaf}")]):
        return f"no key {leaf}: it is {' or '.join(same)}"
    if nearest := difflib.get_close_matches(meant_by, valid, n=1, cutoff=0.5):
        hint = ".".join([*parents, nearest[0]])
        return f"no key {key}; the nearest valid key is {hint} (valid: {', '.join(valid)})"
    names = {k.rpartition(".")[2]: k for k in everywhere}
    near = [names[one] for one in difflib.get_close_matches(meant_by, names, n=2)]
    hint = f"; near it: {', '.join(near)}" if near else ""
    return f"no key {key}{hint} (valid: {', '.join(valid)}; headstart configs keys lists all)"


MEANT = {
    "epochs": "num_epochs",
    "steps": "max_steps",
    "lr": "learning_rate",
    "output": "output_dir",
}
"""What others call settings of ours."""


OTHER_BASES = re.compile(r"[-+]?(\d[\d_]*(:[0-5]?\d)+(\.\d*)?|0\d+)")
"""Numbers of YAML 1.1 that say something else to anybody."""
MOST = 100_000  # values of a file, each counted wherever it is referred to
NULLS = ("", "~", "null", "Null", "NULL", "None")  # None: as the settings' descriptions call it


@dataclass(frozen=True)
class Spelled:
    """A bare word that YAML reads as something else than text."""

    value: Any
    """A number, a truth value or None."""
    text: str
    """How it is spelled."""


class _Loader(yaml.SafeLoader):
    """Gives `Spelled` for bare words; dates are text, since no setting is a date."""

    def __init__(self, stream: str):
        super().__init__(stream)
        self.sizes: dict[yaml.Node, int] = {}
        """Values in each node."""

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node:
        """Refuses values that refer to values that refer to others (`*a`), which a line doubles:
        of thirty lines a reader would make a billion values."""
        referred = self.check_event(yaml.AliasEvent)
        node = super().compose_node(parent, index)
        assert node is not None, "the parser gives a node, or raises"
        if node not in self.sizes:
            of = node.value if isinstance(node, yaml.CollectionNode) else ()
            parts = [part for item in of for part in (item if isinstance(item, tuple) else (item,))]
            # Not known yet: it refers to what it is part of.
            self.sizes[node] = MOST + 1 if referred else 1 + sum(self.sizes[p] for p in parts)
        if self.sizes[node] > MOST:
            raise yaml.composer.ComposerError(
                None, None, f"more than {MOST:,} values, by references", node.start_mark
            )
        return node

    def construct_word(self, node: yaml.ScalarNode) -> Any:
        kind = node.tag.rpartition(":")[2]
        # YAML 1.1 reads 1:30:00 as a number of seconds and 010 as eight.
        if kind == "timestamp" or OTHER_BASES.fullmatch(node.value):
            return node.value
        try:
            value = getattr(self, f"construct_yaml_{kind}")(node)
        except (ValueError, KeyError, IndexError) as error:  # such as `0b_`, or `!!bool x`
            raise yaml.constructor.ConstructorError(
                None, None, f"{node.value!r} is no {kind}", node.start_mark
            ) from error
        return Spelled(value, node.value)

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        """Refuses a key that comes twice, of which YAML would drop the first without a word."""
        seen = set[str]()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode) and key.value in seen:
                raise yaml.constructor.ConstructorError(
                    None, None, f"the key {key.value} comes twice", key.start_mark
                )
            seen.add(key.value if isinstance(key, yaml.ScalarNode) else "")
        found: dict[Any, Any] = super().construct_mapping(node, deep)
        return found


for _kind in ("null", "bool", "int", "float", "timestamp"):
    _Loader.add_constructor(f"tag:yaml.org,2002:{_kind}", _Loader.construct_word)


def load_yaml(text: str) -> Any:
    """What YAML text holds, with `Spelled` in it; `meant` takes them out.

    Raises:
        ValueError: it is malformed.
    """
    try:
        return yaml.load(text, _Loader)
    except (yaml.YAMLError, RecursionError) as error:
        raise ValueError(str(error)) from error


def meant(value: Any, annotation: Any) -> Any:
    """What `load_yaml` gave, as a setting of this type means it: text as it is spelled."""
    match value:
        case Spelled(value=plain, text=text):
            if plain is None and (not text or _may_be_none(annotation)):
                return None
            return text if takes_text(annotation) or _takes_names(annotation) else plain
        case dict():
            section, free = section_in(annotation), _argument(annotation, dict, 1)
            kinds = {} if section is None or free is not Any else section.model_fields
            return {
                (name := key.text if isinstance(key, Spelled) else key): meant(
                    item, kinds[name].annotation if name in kinds else free
                )
                for key, item in value.items()
            }
        case list():
            return [meant(item, _argument(annotation, list, 0)) for item in value]
    return value


def read_value(text: str, annotation: Any) -> Any:
    """The value of a setting that a user typed as `key=value`.

    Text and paths stand as they are: `#`, `: ` and brackets are part of them, and quotes are taken
    off where they enclose all of it. A list may be one of its items; numbers, and names of a few,
    may stand between commas without brackets. Everything else is YAML.

    Raises:
        ValueError: it is to be YAML and is none.
    """
    if not takes_text(annotation):
        numbers = _argument(annotation, list, 0) is not Any  # or names, none of which has a comma
        if numbers and text.strip() not in NULLS and not text.lstrip().startswith(("[", "- ")):
            text = f"[{text}]"
        return meant(load_yaml(text), annotation)
    if text.strip() in NULLS and (_may_be_none(annotation) or not text.strip()):
        return None
    collects = section_in(annotation) is not None or _argument(annotation, list, 0) is not Any
    if collects and text.lstrip().startswith(("[", "{", "- ")):
        return meant(load_yaml(text), annotation)
    return _unquoted(text)


def _unquoted(text: str) -> str:
    if not text.startswith(("'", '"')):
        return text
    try:
        node = yaml.compose(text, _Loader)
    except yaml.YAMLError:
        return text
    if isinstance(node, yaml.ScalarNode) and node.end_mark.index == len(text):
        return str(node.value)
    return text


def takes_text(annotation: Any) -> bool:
    """Whether a bare word is text to a setting of this type: a text, a path, or a section, which a
    bare path may stand for."""
    if is_class(annotation) and issubclass(annotation, str | Path | BaseModel):
        return True
    return any(map(takes_text, _alternatives(annotation)))


def _takes_names(annotation: Any) -> bool:
    """Whether a setting is one of several words, or a list of such, among which YAML would take
    `no` for a truth value."""
    if get_origin(annotation) is Literal:
        return all(isinstance(word, str) for word in get_args(annotation))
    alternatives = _alternatives(annotation)
    number = any(is_class(one) and issubclass(one, int | float) for one in alternatives)
    return not number and any(map(_takes_names, alternatives))


def _may_be_none(annotation: Any) -> bool:
    return annotation in (Any, NoneType) or NoneType in _alternatives(annotation)


def _alternatives(annotation: Any) -> tuple[Any, ...]:
    """The types that a bare word may be for: of a union each, of a list its items'."""
    if get_origin(annotation) is Annotated:
        return get_args(annotation)[:1]
    return () if get_origin(annotation) is dict else get_args(annotation)


def _argument(annotation: Any, kind: type, place: int) -> Any:
    """The type of the items of a list, or of the values of a mapping; `Any` where it is neither."""
    if get_origin(annotation) is kind:
        return get_args(annotation)[place]
    found = (_argument(one, kind, place) for one in get_args(annotation))
    return next((one for one in found if one is not Any), Any)

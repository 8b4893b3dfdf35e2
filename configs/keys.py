"""The keys of all settings, with their defaults and what they are, as the schema has them."""

from typing import Any, get_args, get_origin

from pydantic import BaseModel
from rich.table import Table

from headstart.common.console import plain_console
from headstart.configs.settings import Settings


def section_in(annotation: Any) -> type[BaseModel] | None:
    """The section that a setting holds, by itself, in a list or as one of several types."""
    if is_class(annotation) and issubclass(annotation, BaseModel):
        section: type[BaseModel] = annotation
        return section
    return next(filter(None, map(section_in, get_args(annotation))), None)


def is_class(annotation: Any) -> bool:
    """Whether a type is a class by itself, no list or mapping of others."""
    return isinstance(annotation, type) and get_origin(annotation) is None  # not list[str]


def known_keys(model: type[BaseModel] = Settings, prefix: str = "") -> list[str]:
    """The dotted keys of all settings, those of sections before what is in them."""
    found = []
    for name, field in model.model_fields.items():
        found.append(f"{prefix}{name}")
        section = section_in(field.annotation)
        # A source is written as its path, which it has to have.
        if section and not any(one.is_required() for one in section.model_fields.values()):
            found += known_keys(section, f"{prefix}{name}.")
    return found


def section_at(key: str, model: type[BaseModel] = Settings) -> type[BaseModel]:
    """The section of a dotted key within `model`; of an empty key that itself."""
    section = model
    for name in filter(None, key.split(".")):
        if not name.isdigit():  # an item of a list: its section is known already
            section = section_in(section.model_fields[name].annotation) or section
    return section


def describe_setting(key: str) -> tuple[str, str]:
    """The default of a setting as YAML, and what it is."""
    parent, _, leaf = key.rpartition(".")
    field = section_at(parent).model_fields[leaf]
    text = " ".join((field.description or "").split())
    default = field.get_default(call_default_factory=True)
    match default:
        case BaseModel():
            shown = "..."
        case list():
            shown = f"[{', '.join(str(getattr(one, 'path', one)) for one in default)}]"
        case None | bool():
            shown = str(default).lower().replace("none", "null")
        case _:
            shown = str(default)
    return shown, text


def print_keys(section: str | None) -> None:
    """Print the keys of all settings, or of one section, with defaults and what they are.

    Raises:
        ValueError: there is no such section.
    """
    keys = known_keys()
    table = Table("key=default", "what it is")
    shown = [k for k in keys if section is None or k == section or k.startswith(f"{section}.")]
    if not shown:
        sections = ", ".join(key for key in keys if any(k.startswith(f"{key}.") for k in keys))
        raise ValueError(f"no section {section}; there are {sections}")
    for key in shown:
        if not any(other.startswith(f"{key}.") for other in keys):  # a section has no value
            default, text = describe_setting(key)
            table.add_row(f"{key}={default}", text)
    plain_console().print(table)

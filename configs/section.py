"""What every section of a configuration is built on, and the kinds of places that one may name."""

from pathlib import Path
from typing import Annotated, Any, get_args, get_origin

from pydantic import AfterValidator, BaseModel, ConfigDict, model_validator

from headstart.common.files import expand_home

Folder = Annotated[Path, AfterValidator(lambda path: Path(expand_home(str(path))))]
"""A path of this machine, with `~` for the home folder."""
Place = Annotated[str, AfterValidator(expand_home)]
"""A path of this machine, with `~` for the home folder, or a name that needs none: built in, or of
the Hub."""

BUILTIN = "builtin:"
"""Begins the names of the prompts and conversations that come with Headstart: no file of that name
is looked for."""


class Section(BaseModel):
    """Base of every section: unknown keys are errors, values never change after loading, and no
    number is infinite or none."""

    model_config = ConfigDict(
        extra="forbid",
        frozen=True,
        use_attribute_docstrings=True,
        validate_default=True,
        allow_inf_nan=False,
    )

    @model_validator(mode="before")
    @classmethod
    def _one_of_a_list(cls, values: Any) -> Any:
        """A list of one may be written as that one."""
        if not isinstance(values, dict):
            return values
        lists = {k for k, field in cls.model_fields.items() if _is_list(field.annotation)}
        return {k: [v] if k in lists and not _many(v) else v for k, v in values.items()}


def _is_list(annotation: Any) -> bool:
    return get_origin(annotation) is list or any(map(_is_list, get_args(annotation)))


def _many(value: Any) -> bool:
    return value is None or isinstance(value, list | tuple)

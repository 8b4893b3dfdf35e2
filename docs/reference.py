"""What the documents say of commands, settings, recipes and memory: from the code itself."""

from collections.abc import Callable
from functools import cache
from typing import Any, Literal, get_args, get_origin

from pydantic import BaseModel

from docs.tables import rows_of
from docs.tables_limits import limits_h100
from headstart.cli.arguments import FLAGS, Argument, Command, setting_row
from headstart.cli.main import COMMANDS
from headstart.configs.keys import describe_setting, known_keys, section_at
from headstart.configs.loader import load_config
from headstart.configs.recipes import OF_ACCELERATE, describe_recipe, recipe_names


def cell(text: str) -> str:
    """A text as it may stand in a cell."""
    return " ".join(text.split()).replace("|", "\\|")


def commands() -> str:
    """A section for each command."""
    return "\n\n".join(map(_command, COMMANDS))


def _command(command: Command) -> str:
    parts = [
        f"## {command.name}",
        f"*{command.summary[0].upper()}{command.summary[1:]}.*",
        cell(command.description).replace("\\|", "|"),
        f"```text\n{command.usage()}\n```",
    ]
    rows = [(f"`{a.name}`", cell(a.help + _choices(a))) for a in command.arguments]
    shown = dict(command.defaults + command.unnamed)
    shown |= dict.fromkeys(command.required, "")
    for key in command.settings:
        name, text = setting_row(key, shown)
        needed = " (required)" if key in command.required else ""
        if key.endswith(".*"):
            section = key.removesuffix(".*")
            text = f"all others of [{section}](configuration.md#{section})"
        rows.append((f"`{cell(_value(name, shown.get(key)))}`{needed}", cell(text)))
    rows += [(f"`{flag}{' FILE' if flag == '--json' else ''}`", FLAGS[flag].removeprefix("FILE: "))
             for flag in command.flags]  # fmt: skip
    if rows:
        parts.append(rows_of("argument, setting or flag | what it is", rows))
    parts.append(f"```sh\n{command.example}\n```")
    return "\n\n".join(parts)


def _value(row: str, default: Any) -> str:
    """`key=default`, where the default is an argument named by it."""
    return f"{row.partition('=')[0]}={default.name}" if isinstance(default, Argument) else row


def _choices(argument: Argument) -> str:
    return (
        f": {', '.join(f'`{choice}`' for choice in argument.choices)}" if argument.choices else ""
    )


def configuration() -> str:
    """A table for each section, those without one first."""
    keys = known_keys()
    sections = [key for key in keys if any(other.startswith(f"{key}.") for other in keys)]
    parts = ["## Top level", _settings([k for k in keys if "." not in k and k not in sections])]
    for section in sections:
        parts.append(f"{'#' * (2 + section.count('.'))} {section}")
        model = section_at(section)
        if model.__doc__ and model.__doc__ != BaseModel.__doc__:
            parts.append(" ".join(model.__doc__.split()))
        own = [k for k in keys if k.rpartition(".")[0] == section and k not in sections]
        parts.append(_settings(own))
    parts += ["## Sources", "What an entry of `data.prompts` or `adapt.general_prompts` may hold."]
    source = section_at("adapt.general_prompts")
    rows = []
    for name, field in source.model_fields.items():
        default = (
            "required"
            if field.is_required()
            else f"`{field.get_default(call_default_factory=True)}`"
        )
        rows.append([f"`{name}`", _type(field.annotation), default, cell(field.description or "")])
    parts.append(rows_of(SETTINGS, rows))
    return "\n\n".join(parts)


SETTINGS = "key | values | default | what it is"


def _settings(keys: list[str]) -> str:
    rows = []
    for key in keys:
        parent, _, leaf = key.rpartition(".")
        model = section_at(parent)
        default, text = map(cell, describe_setting(key))
        values = _type(model.model_fields[leaf].annotation)
        rows.append([f"`{key}`", values, f"`{default}`", text])
    return rows_of(SETTINGS, rows)


def _type(annotation: Any) -> str:
    """The values that a setting takes, in words."""
    origin, parts = get_origin(annotation), get_args(annotation)
    if origin is Literal:
        return ", ".join(f"`{str(value).lower() if value is None else value}`" for value in parts)
    if origin is list:
        return f"list: {_type(parts[0])}"
    if origin is dict:
        return "mapping"
    if parts and hasattr(annotation, "__metadata__"):
        return _type(parts[0])
    if parts:  # one of several
        return ", ".join(dict.fromkeys(_type(part) for part in parts if part is not type(None)))
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return "source" if "path" in annotation.model_fields else "section"
    names = {bool: "`true`, `false`", int: "whole number", float: "number", str: "text"}
    return names.get(annotation, "path" if annotation.__name__ == "Path" else "text")


def recipes() -> str:
    """The recipes that come with Headstart, and the files for several processes."""
    names = recipe_names()
    first = [name for name in names if not name.startswith(OF_ACCELERATE)]
    last = [name for name in names if name.startswith(OF_ACCELERATE)]
    return rows_of("name | what it is for", [
        [f"`{name}`", cell(describe_recipe(name))] for name in (*first, *last)
    ])  # fmt: skip


@cache  # seconds, whichever copy of the documents is looked at
def memory() -> str:
    """What a GPU holds at most with the recipe of each published Gemma 4, by the arithmetic of
    `headstart train --plan`."""
    from headstart.heads.describe import SHAPES
    from headstart.train.memory import CHECK, peaks
    from headstart.train.plan import LAUNCHES, run_shapes

    rows = []
    for name in (shape.replace("gemma-4", "gemma4").lower() for shape in SHAPES):
        told = ["target.dtype=bfloat16", "train.mixed_precision=bf16", "eval.fp32_check_prompts=4"]
        config = load_config(name, told)
        shapes = run_shapes(config)
        alone, ddp, fsdp = (dict(peaks(config, shapes, how)) for how in LAUNCHES.values())
        counts = [one["answering"] for one in (alone, ddp)]
        counts += [one["training"] for one in (alone, ddp, fsdp)]
        counts += [alone[CHECK], ddp["loading"]]
        rows.append([f"`{name}`", *(f"{count / 2**30:.1f}" for count in counts)])
    header = (
        "recipe, each GiB | answering, alone | in each of 8 | training, alone | by DDP over 8 | by "
        "FSDP2 over 8 | the float32 check | loading, in each"
    )
    return rows_of(header, rows)


@cache
def plan_lora() -> str:
    """What `headstart train --plan` says of an adapter for Google's head for E4B."""
    from headstart.train.plan import plan

    start = ["head.init_from=google/gemma-4-E4B-it-assistant", "head.lora={}"]
    lines = plan(
        load_config("gemma4-e4b", [*start, "target.dtype=bfloat16", "train.mixed_precision=bf16"])
    )
    shown = ("head", "parameters trained", "in training", "tokens", "activation store")
    return rows_of("of the plan | what it says", [[name, lines[name]] for name in shown])


REFERENCE: dict[str, Callable[[], str]] = {
    "commands": commands,
    "configuration": configuration,
    "recipes": recipes,
    "memory": memory,
    "plan-lora": plan_lora,
    "limits-h100": limits_h100,
}
"""Block -> what makes it."""

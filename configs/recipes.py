"""The recipes that come with Headstart, by name: found, listed, shown."""

import difflib
from pathlib import Path

from rich.table import Table

from headstart.common.console import plain_console, print_once

SHIPPED = Path(__file__).parent
OF_ACCELERATE = "accelerate-"  # begins the names of those that `accelerate launch` reads


def recipe_names() -> list[str]:
    """The names of all recipes, and of the files for `accelerate launch`."""
    return sorted(path.stem for path in SHIPPED.glob("*.yaml"))


def find_config(name: str | Path) -> Path:
    """The file that `--config` names.

    What has a folder or an ending is a path. A bare name is that of a recipe, unless the current
    folder has a file of that name, with the ending .yaml or without one: this file is taken then,
    and a line says so.

    Raises:
        ValueError: a bare name is that of no recipe and of no file.
    """
    path, text = Path(name), str(name)
    if text != path.stem:
        return path
    own = next((file for file in (path, Path(f"{text}.yaml")) if file.is_file()), None)
    if text not in recipe_names():
        if own is None:
            known = [n for n in recipe_names() if not n.startswith(OF_ACCELERATE)]
            near = "".join(f" (near: {n})" for n in difflib.get_close_matches(text, known, n=1))
            raise ValueError(
                f"no configuration file {text}, and no recipe of that name{near}: "
                f"{', '.join(known)}"
            )
        return own
    if own is None:
        return SHIPPED / f"{text}.yaml"
    print_once(f"{own} of the current folder is read, not the recipe {text} of Headstart")
    return own


def read_config_text(name: str) -> str:
    """The text of the file that `--config` names.

    Raises:
        ValueError: there is none.
    """
    path = find_config(name)
    if not path.is_file():
        raise ValueError(f"no configuration file {path}")
    return path.read_text(encoding="utf-8")


def describe_recipe(name: str) -> str:
    """The first sentence of the comment that a recipe begins with."""
    lines = (SHIPPED / f"{name}.yaml").read_text(encoding="utf-8").splitlines()
    comment = []
    for line in lines:
        if not line.startswith("#"):
            break
        comment.append(line.removeprefix("#").strip())
    return " ".join(comment).partition(". ")[0].rstrip(".")


def print_recipes() -> None:
    """Print one table: what `--config` takes by name, and what `accelerate launch` can be given."""
    table = Table(title="Recipes: headstart train --config NAME", title_justify="left")
    table.add_column("name", no_wrap=True)
    table.add_column("what it is for")
    names = recipe_names()
    recipes = [name for name in names if not name.startswith(OF_ACCELERATE)]
    for name in recipes:
        table.add_row(name, describe_recipe(name))
    plain_console().print(table)
    others = ", ".join(name for name in names if name.startswith(OF_ACCELERATE))
    print_once(f"For several processes (accelerate launch --config_file FILE): {others}")
    print_once("headstart configs show NAME prints one, to be kept as a file and changed.")

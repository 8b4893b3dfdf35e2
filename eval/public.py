"""What of a run may be seen by all: ids of the Hub, and no path of the machine that it ran on."""

import re
from pathlib import Path
from typing import Any

from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id

from headstart.data.sources import is_hub_dataset

REVISION = re.compile(r"\w[\w./-]*")
OURS = Path("data/prompts")  # of every checkout: its prompt sets are named so


def is_hub_id(name: str) -> bool:
    """Whether a name has the form ORG/NAME of the Hub, or ORG/NAME@REVISION."""
    repo, at, revision = name.partition("@")
    try:
        validate_repo_id(repo)
    except HFValidationError:
        return False
    return repo.count("/") == 1 and (not at or REVISION.fullmatch(revision) is not None)


def check_hub_id(name: str, what: str, fix: str) -> None:
    """Raise `ValueError` unless a name can only be meant for a repository of the Hub: a folder of
    this machine may have one of the same form.

    Args:
        name: that is to stand on a card.
        what: it names, in the message.
        fix: what to do, in the message.
    """
    here = Path(name).exists()
    if here or not is_hub_id(name):
        why = "a path of this machine" if here else "not of the form ORG/NAME"
        raise ValueError(f"{what} {name} is no repository of the Hub ({why}): {fix}")


def is_private(name: str) -> bool:
    """Whether a name is a path that tells of the machine."""
    return name.startswith(("/", "~", "../")) or Path(name).is_absolute()


def is_local(name: str) -> bool:
    """Whether what names a file, a folder or a repository of the Hub is a path that tells of the
    folders it lies in, here or where a run was made."""
    if is_private(name):
        return True
    on_the_hub = is_hub_dataset(name.partition("@")[0])  # models are named alike
    return "/" in name and not on_the_hub and Path(name).parent != OURS


def without_paths(value: Any, names: dict[str, str]) -> Any:
    """JSON without the paths of this machine, in its keys too.

    Args:
        value: of a report, of settings, or a text.
        names: path -> what others know it by. Of another one that stands alone its last part is
            left; within texts the working folder is left out and the home folder is `~`.
    """
    match value:
        case dict():
            return {without_paths(k, names): without_paths(v, names) for k, v in value.items()}
        case list():
            return [without_paths(item, names) for item in value]
        case str():
            return _without_paths(value, names)
    return value


def _without_paths(text: str, names: dict[str, str]) -> str:
    if text in names:
        return names[text]
    for path in sorted((name for name in names if "/" in name), key=len, reverse=True):
        text = text.replace(path, names[path])
    if is_private(text) and "\n" not in text and len(Path(text).parts) > 1:
        return Path(text).name
    return text.replace(f"{Path.cwd()}/", "").replace(f"{Path.home()}/", "~/")

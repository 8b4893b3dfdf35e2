"""Names of folders of the time being, which tell who made them: whatever a killed process left
behind is known by its name, and nothing else is ever removed."""

import os
import platform
import re
import secrets
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

HOST = re.sub(r"[^\w.-]", "_", platform.node())
COPY = ".copy"  # ends the names of folders in the system's place for those of the time being
TOKEN = secrets.token_hex(4)  # of this process: another machine, or a container, may have its id
NAME = re.compile(r".*\.(?P<host>[\w.-]*)\.(?P<pid>\d+)\.(?P<token>[0-9a-f]{8})")


def own_name(name: str, suffix: str = "") -> str:
    """`NAME.HOST.PID.TOKEN` and a suffix, which no other process has and nobody can guess."""
    return f"{name}.{HOST}.{os.getpid()}.{TOKEN}{suffix}"


def made_here(folder: Path, suffix: str) -> list[Path]:
    """The folders with such names in `folder`, of whichever process and machine; links are none."""
    return [
        path
        for path in folder.iterdir()
        if path.name.endswith(suffix)
        and NAME.fullmatch(path.name.removesuffix(suffix))
        and path.is_dir()
        and not path.is_symlink()
    ]


def remove_left_behind(folder: Path, suffix: str) -> None:
    """Remove what processes of this machine made in `folder` that are gone; another machine's may
    be at work."""
    for path in made_here(folder, suffix) if folder.is_dir() else []:
        if _is_gone(path.name.removesuffix(suffix)):
            shutil.rmtree(path, ignore_errors=True)


@contextmanager
def temporary_folder() -> Iterator[Path]:
    """Gives a folder of the time being, which nobody else can read; what killed processes left of
    theirs goes first: it may be the copy of a target."""
    place = Path(tempfile.gettempdir())
    remove_left_behind(place, COPY)
    folder = place / own_name(f"headstart-{secrets.token_hex(4)}", COPY)
    folder.mkdir(mode=0o700)
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _is_gone(name: str) -> bool:
    found = NAME.fullmatch(name)
    assert found is not None
    # The greedy start of the pattern may take a part of the host's name.
    if not name.endswith(f".{HOST}.{found['pid']}.{found['token']}"):
        return False
    pid = int(found["pid"])
    if pid == os.getpid():  # reused: that of a container is often 1
        return found["token"] != TOKEN
    try:
        os.kill(pid, 0)
    except (ProcessLookupError, OverflowError):
        return True
    except PermissionError:
        pass  # another user's
    return False

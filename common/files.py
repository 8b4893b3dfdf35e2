"""Files and folders that are there whole or not at all, and locks on folders.

Strangers may have made what stands here: no link is followed to where it points, and nothing is
removed that this program did not make.
"""

import errno
import fcntl
import hashlib
import json
import os
import re
import shutil
import stat
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any

from safetensors import SafetensorError

from headstart.common.children import made_here, own_name, remove_left_behind
from headstart.common.console import one_line, print_once

PART = ".part"  # ends the name of a folder that is not yet whole
WORK = ".writing"  # ends that of a folder of files that are not yet whole
EARLIER = ".earlier"  # ends that of one whose place is being taken
HOME = re.compile(r"(?:^|(?<=[+=]))~[^/+=]*(?=/|$)")


def expand_home(text: str) -> str:
    """A path with the home folder in place of `~` or `~NAME` at its beginning, where a shell leaves
    it: in quotes, and after the sign in HEAD+ADAPTER and NAME=FILE."""
    return HOME.sub(lambda found: os.path.expanduser(found.group()), text)


def write_atomically(path: Path, text: str) -> None:
    """Write a text file: a reader, or a crash, finds the earlier content or the new one."""
    with atomic_file(path) as work:
        work.write_text(text, encoding="utf-8")


@contextmanager
def atomic_folder(folder: Path) -> Iterator[Path]:
    """Gives a folder to write into, which then takes the place of `folder`.

    No file system replaces a folder that is not empty in one step: a crash between the two
    renames leaves the earlier folder beside its place, where `put_back` finds it.

    Raises:
        ValueError: `folder` is a link, which leads to a folder of somebody else's.
        OSError: with what to do, when the disk is full; the earlier folder is kept.
    """
    refuse_link(folder)
    folder = folder.resolve()  # "." has no name
    put_back(folder)
    # Of the process's own, so that two may work on the same.
    work = folder.with_name(own_name(folder.name, PART))
    shutil.rmtree(work, ignore_errors=True)
    try:
        work.mkdir(parents=True)
        yield work
        for path in [*work.rglob("*"), work]:
            _sync(path)
        _take_place(work, folder)
    except BaseException as error:
        shutil.rmtree(work, ignore_errors=True)
        if isinstance(error, OSError | SafetensorError):
            raise _unwritten(folder, error) from error
        raise


def drop_remote_code(folder: Path) -> None:
    """Take out of a folder that is being written what would have its readers run the code of
    whoever made the checkpoint that it came from: `auto_map`, and the modules that it names."""
    for path in folder.glob("*.py"):
        path.unlink()
    for path in folder.glob("*config.json"):
        content = json.loads(path.read_text(encoding="utf-8"))
        if content.pop("auto_map", None) is not None:
            path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def _take_place(work: Path, folder: Path) -> None:
    """Let `work` be `folder`; what was there goes once the disk knows of the new one."""
    earlier = folder.with_name(own_name(f".{folder.name}", EARLIER))
    while True:
        shutil.rmtree(earlier, ignore_errors=True)
        if folder.exists():
            folder.rename(earlier)
        try:
            work.rename(folder)
            break
        except OSError as error:  # somebody put the earlier one back, or wrote it too
            if error.errno not in (errno.EEXIST, errno.ENOTEMPTY):
                raise
    _sync(folder.parent)
    shutil.rmtree(earlier, ignore_errors=True)


def put_back(folder: Path) -> None:
    """Put the earlier content of a folder back, where a crash came between its leaving its place
    and the new one's taking it."""
    if folder.exists() or not folder.parent.is_dir():
        return
    left = [p for p in made_here(folder.parent, EARLIER) if p.name.startswith(f".{folder.name}.")]
    if left:
        newest = max(left, key=lambda path: path.stat().st_mtime)
        newest.rename(folder)
        print_once(f"{folder}: a crash left it as {newest.name}; it is put back")


def refuse_link(path: Path) -> None:
    """Raise `ValueError` where something of ours is to be written to a link of somebody else's."""
    if path.is_symlink():
        raise ValueError(
            f"{path} is a link to {os.readlink(path)}, whose content would be replaced: name the "
            "folder itself, or delete the link"
        )


def plain_name(name: object, told_by: Path) -> str:
    """A file's name that another file tells of; it stays within the folder of that one, or raises
    `ValueError`."""
    if not isinstance(name, str) or name != Path(name).name or name in ("", "..") or "\0" in name:
        raise ValueError(f"{told_by} names {name!r}, which is no file of its folder")
    return name


def _opener(name: str | Path, flags: int) -> int:
    """The descriptor of a file that we made or are to make: no link, no pipe."""
    path = Path(name)
    if path.is_symlink() or (path.exists() and not path.is_file()):
        raise ValueError(f"{path} is a link or no file, and would be written to: delete it")
    descriptor = os.open(path, flags | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, 0o666)
    assert stat.S_ISREG(os.fstat(descriptor).st_mode)
    return descriptor


def open_own(path: Path, mode: str) -> IO[Any]:
    """`path.open(mode)` of a file that we made or are to make; `ValueError`: it is a link or a
    pipe."""
    return open(path, mode, encoding=None if "b" in mode else "utf-8", opener=_opener)


def check_empty(folder: Path) -> None:
    """Raise `ValueError` where a folder that is to be written holds something."""
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ValueError(f"{folder} is not empty: name another folder, output_dir=DIR")


def _sync(path: Path) -> None:
    """After this a power cut cannot leave a file or folder without its content."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


NO_WAY_IN = {errno.ENOENT, errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR}
"""Errors of a place that cannot be written to, however much room there is."""


def _unwritten(path: Path, error: Exception) -> OSError:
    cure = "make room, then run the same command again"
    if getattr(error, "errno", None) in NO_WAY_IN:
        cure = "name a place that can be written to"
    return OSError(f"{path} could not be written ({error}); finished files are kept: {cure}")


def file_sha256(path: Path) -> str:
    """SHA-256 of a file, in hex."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


PIECES, PIECE = 1024, 4096


def weights_sha256(place: Path) -> str:
    """SHA-256 of a file of weights, or of those of a folder, by their names, their sizes and many
    small pieces: of any size in a moment, and another one after weights were tuned."""
    digest = hashlib.sha256()
    inside = (path for kind in ("*.safetensors", "*.bin") for path in place.glob(kind))
    for path in sorted(inside) if place.is_dir() else [place]:
        size = path.stat().st_size
        digest.update(f"{path.name} {size} ".encode())
        with path.open("rb") as file:
            for start in range(0, size, max(PIECE, size // PIECES)):
                file.seek(start)
                digest.update(file.read(PIECE))
    return digest.hexdigest()


def content_sha256(content: dict[str, Any]) -> str:
    """SHA-256 of what can be written as JSON, in hex; of its own entry `sha256` apart."""
    rest = {key: value for key, value in content.items() if key != "sha256"}
    return hashlib.sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()


@contextmanager
def atomic_file(path: Path) -> Iterator[Path]:
    """Gives a place to write to; what was written there then appears at `path` in one step.

    Raises:
        OSError: with what to do, when the disk is full.
    """
    # A folder of this process's own, which it can take away again.
    work = path.parent / own_name("", WORK) / path.name
    try:
        work.parent.mkdir(exist_ok=True)
        yield work
        _sync(work)
        work.replace(path)
        _sync(path.parent)
    except (OSError, SafetensorError) as error:
        work.unlink(missing_ok=True)
        raise _unwritten(path, error) from error
    finally:
        with suppress(OSError):  # it holds another file that is being written
            work.parent.rmdir()


# Held by the process that works in a folder; it goes with the process. Nothing is ever written to
# it: a folder of a stranger's may have a hard link to a file of the user's.
LOCK = ".lock"


@contextmanager
def lock_folder(folder: Path, other: str | None = None) -> Iterator[None]:
    """Work in a folder, made where it is missing, while other processes that would do so wait.

    What a killed process left half-written there is cleared away. The lock goes with the process
    that holds it, however that ends.

    Args:
        folder: to work in.
        other: how to name another folder, where this process is not to wait for another one.

    Raises:
        ValueError: the lock is a link, or no file; or another process works there, with `other`.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with open_own(folder / LOCK, "ab") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            busy = f"another process works in {folder}"
            if other is not None:
                fix = f"wait for its end, or name another folder, {other}"
                raise ValueError(f"{busy}: {fix}") from error
            print(one_line(f"{busy}, waiting for it"), file=sys.stderr)
            fcntl.flock(lock, fcntl.LOCK_EX)
        remove_left_behind(folder, WORK)
        yield


def is_locked(folder: Path) -> bool:
    """Whether a process works in a folder, by `lock_folder`.

    Raises:
        ValueError: the lock is a link, or no file.
    """
    if not os.path.lexists(folder / LOCK):
        return False
    with open_own(folder / LOCK, "rb") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
    return False


def cache_dir() -> Path:
    """The user's cache folder for converted weights, conversations and activations."""
    root = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(os.environ.get("HEADSTART_CACHE") or Path(root) / "headstart")


def write_figures(content: dict[str, Any], out: Path | None) -> None:
    """Write the figures of a benchmark as JSON, where `out` names a file; its folder is made."""
    if out is not None:
        out.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(out, json.dumps(content, indent=2) + "\n")
        print_once(f"Written: {out}")


class StageCache:
    """Findings by stage in a JSON file, with the seconds that each stage took.

    Args:
        path: of the file.
        settings: that all of it stands for.

    Raises:
        ValueError: the file is of other settings.
    """

    def __init__(self, path: Path, settings: dict[str, Any]):
        self.path = path
        self.found: dict[str, Any] = {"settings": settings, "seconds": {}}
        if path.is_file():
            self.found = json.loads(path.read_text(encoding="utf-8"))
        there = self.found["settings"]
        for key in settings | there:
            if settings.get(key) != there.get(key):
                raise ValueError(
                    f"{path.parent} was begun with {key}={there.get(key)}, now "
                    f"{settings.get(key)}: give it back, or name another folder, output_dir=DIR"
                )

    def run_once(self, stage: str, work: Callable[[], Any]) -> Any:
        """What `work` returns (it must go into JSON); the first time it is done and noted."""
        if stage not in self.found:
            began = time.monotonic()
            found = work()
            self.found["seconds"][stage] = time.monotonic() - began
            self.found[stage] = found
            write_atomically(self.path, json.dumps(self.found) + "\n")
        return self.found[stage]

    @property
    def seconds(self) -> dict[str, float]:
        """Stage -> how long it took."""
        seconds: dict[str, float] = self.found["seconds"]
        return seconds

"""Files and folders that are there whole or not at all."""

import fcntl
import hashlib
import json
import os
import platform
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

LOCK = ".lock"  # held by the process that works in a folder; it goes with the process
PART = ".part"  # ends the name of a folder that is not yet whole
WRITING = ".writing"  # begins the name of a folder of files that are not yet whole


def write_atomically(path: Path, text: str) -> None:
    """Write a text file: a reader, or a crash, finds the earlier content or the new one."""
    with whole_file(path) as work:
        work.write_text(text, encoding="utf-8")


@contextmanager
def whole_folder(folder: Path) -> Iterator[Path]:
    """Gives a folder to write into, which then takes the place of `folder`.

    No file system replaces a folder that is not empty in one step: a crash between the two
    renames leaves the earlier folder beside its place, as `.NAME.earlier`.

    Raises:
        OSError: with what to do, when the disk is full; the earlier folder is kept.
    """
    folder = folder.resolve()  # "." has no name
    # Of the process's own, so that two may work on the same.
    work = folder.with_name(f"{folder.name}.{os.getpid()}{PART}")
    shutil.rmtree(work, ignore_errors=True)
    try:
        work.mkdir(parents=True)
        yield work
        for path in work.rglob("*"):
            if path.is_file():
                _sync(path)
        earlier = folder.with_name(f".{folder.name}.earlier")
        shutil.rmtree(earlier, ignore_errors=True)
        if folder.exists():
            folder.rename(earlier)
        work.rename(folder)
        shutil.rmtree(earlier, ignore_errors=True)
    except BaseException as error:
        shutil.rmtree(work, ignore_errors=True)
        if isinstance(error, OSError | SafetensorError):
            raise OSError(_unwritten(folder, error)) from error
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


def check_empty(folder: Path) -> None:
    """Raise `ValueError` where a folder that is to be written holds something."""
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ValueError(f"{folder} is not empty: name another folder, --out DIR")


def _sync(path: Path) -> None:
    """After this a power cut cannot leave a new name without its content."""
    with path.open("rb") as file:
        os.fsync(file.fileno())


def _unwritten(path: Path, error: Exception) -> str:
    return (
        f"{path} could not be written ({error}); finished files are kept: make room, then run the "
        "same command again"
    )


def file_sha256(path: Path) -> str:
    """SHA-256 of a file, in hex."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def content_sha256(content: dict[str, Any]) -> str:
    """SHA-256 of what can be written as JSON, in hex; of its own entry `sha256` apart."""
    rest = {key: value for key, value in content.items() if key != "sha256"}
    return hashlib.sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()


@contextmanager
def alone_in(folder: Path) -> Iterator[None]:
    """Work in a folder while other processes that would do so wait.

    What a killed process left half-written there is cleared away. The lock goes with the process
    that holds it, however that ends.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / LOCK).open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            print(f"{folder}: another process works there, waiting for it", file=sys.stderr)
            fcntl.flock(lock, fcntl.LOCK_EX)
        for half_written in folder.glob(f"{WRITING}.*"):
            shutil.rmtree(half_written, ignore_errors=True)
        yield


@contextmanager
def only_one_in(folder: Path) -> Iterator[None]:
    """Work in a folder unless another process does.

    Raises:
        ValueError: it does.
    """
    with (folder / LOCK).open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise ValueError(
                f"another process works in {folder}: wait for its end, or name another folder, "
                "run.dir=PATH"
            ) from error
        yield


def is_held(folder: Path) -> bool:
    """Whether a process works in a folder, by `alone_in` or `only_one_in`."""
    if not (folder / LOCK).is_file():
        return False
    with (folder / LOCK).open("r") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
    return False


@contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """Gives a place to write to; what was written there then appears at `path` in one step.

    Raises:
        OSError: with what to do, when the disk is full.
    """
    # A folder of this process's own, which it can take away again.
    work = path.parent / f"{WRITING}.{platform.node()}.{os.getpid()}" / path.name
    try:
        work.parent.mkdir(exist_ok=True)
        yield work
        _sync(work)
        work.replace(path)
    except (OSError, SafetensorError) as error:
        work.unlink(missing_ok=True)
        raise OSError(_unwritten(path, error)) from error
    finally:
        with suppress(OSError):  # it holds another file that is being written
            work.parent.rmdir()

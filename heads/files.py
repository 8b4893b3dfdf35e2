"""Files and folders that are there whole or not at all."""

import fcntl
import os
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from safetensors import SafetensorError

WRITING = ".writing"  # the folder of files that are not yet whole


def part_name(path: Path) -> Path:
    """Where a process writes before the rename; of its own, so that two may work on the same."""
    return path.with_name(f"{path.name}.{os.getpid()}.part")


def write_atomically(path: Path, text: str) -> None:
    """Write a text file: a reader, or a crash, finds the earlier content or the new one."""
    with whole_file(path) as work:
        work.write_text(text, encoding="utf-8")


def replace_folder(work: Path, folder: Path) -> None:
    """Put the finished folder `work` in the place of `folder`.

    No file system replaces a folder that is not empty in one step: a crash between the two
    renames leaves the earlier folder beside its place, as `.NAME.earlier`.
    """
    earlier = folder.with_name(f".{folder.name}.earlier")
    shutil.rmtree(earlier, ignore_errors=True)
    if folder.exists():
        folder.rename(earlier)
    work.rename(folder)
    shutil.rmtree(earlier, ignore_errors=True)


@contextmanager
def alone_in(folder: Path) -> Iterator[None]:
    """Work in a folder while other processes that would do so wait.

    What a killed process left half-written there is cleared away. The lock goes with the process
    that holds it, however that ends.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / ".lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            print(f"{folder}: another process works there, waiting for it", file=sys.stderr)
            fcntl.flock(lock, fcntl.LOCK_EX)
        shutil.rmtree(folder / WRITING, ignore_errors=True)
        try:
            yield
        finally:
            shutil.rmtree(folder / WRITING, ignore_errors=True)


@contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """Gives a place to write to; what was written there then appears at `path` in one step.

    Raises:
        OSError: with what to do, when the disk is full.
    """
    work = path.parent / WRITING / f"{os.getpid()}-{path.name}"
    try:
        work.parent.mkdir(exist_ok=True)
        yield work
        with work.open("rb") as file:
            # After this a power cut cannot leave the new name without its content.
            os.fsync(file.fileno())
        work.replace(path)
    except (OSError, SafetensorError) as error:
        work.unlink(missing_ok=True)
        raise OSError(
            f"{path} could not be written ({error}); finished files are kept: make room, then run "
            "the same command again"
        ) from error
    with suppress(OSError):  # another file is being written there
        work.parent.rmdir()

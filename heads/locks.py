"""Folders that one process works in at a time."""

import fcntl
import os
import stat
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from headstart.heads.files import WORK
from headstart.heads.leftovers import remove_left_behind
from headstart.heads.text import one_line

LOCK = ".lock"  # held by the process that works in a folder; it goes with the process


@contextmanager
def _opened(folder: Path, flags: int) -> Iterator[int]:
    """The descriptor of a folder's lock. It is never written to, and a link is not followed: a
    folder of a stranger's may have one to a file of the user's.

    Raises:
        ValueError: it is a link, or no file.
    """
    path = folder / LOCK
    if path.is_symlink() or (path.exists() and not path.is_file()):
        raise ValueError(f"{path} is a link or no file, and no lock of ours: delete it")
    descriptor = os.open(path, flags | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, 0o666)
    try:
        assert stat.S_ISREG(os.fstat(descriptor).st_mode)
        yield descriptor
    finally:
        os.close(descriptor)


@contextmanager
def alone_in(folder: Path) -> Iterator[None]:
    """Work in a folder while other processes that would do so wait.

    What a killed process left half-written there is cleared away. The lock goes with the process
    that holds it, however that ends.

    Raises:
        ValueError: the lock is a link, or no file.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with _opened(folder, os.O_RDWR | os.O_CREAT) as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            waiting = one_line(f"{folder}: another process works there, waiting for it")
            print(waiting, file=sys.stderr)
            fcntl.flock(lock, fcntl.LOCK_EX)
        remove_left_behind(folder, WORK)
        yield


@contextmanager
def only_one_in(folder: Path, other: str = "run.dir=PATH") -> Iterator[None]:
    """Work in a folder unless another process does.

    Args:
        folder: made where it is missing.
        other: how to name another folder.

    Raises:
        ValueError: it does; or the lock is a link, or no file.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with _opened(folder, os.O_RDWR | os.O_CREAT) as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise ValueError(
                f"another process works in {folder}: wait for its end, or name another folder, "
                f"{other}"
            ) from error
        remove_left_behind(folder, WORK)
        yield


def is_held(folder: Path) -> bool:
    """Whether a process works in a folder, by `alone_in` or `only_one_in`.

    Raises:
        ValueError: the lock is a link, or no file.
    """
    if not os.path.lexists(folder / LOCK):
        return False
    with _opened(folder, os.O_RDONLY) as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
    return False

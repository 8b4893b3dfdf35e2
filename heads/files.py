"""Files and folders that are there whole or not at all."""

import os
import shutil
from pathlib import Path


def part_name(path: Path) -> Path:
    """Where a process writes before the rename; of its own, so that two may work on the same."""
    return path.with_name(f"{path.name}.{os.getpid()}.part")


def write_atomically(path: Path, text: str) -> None:
    """Write a text file: a reader, or a crash, finds the earlier content or the new one."""
    work = part_name(path)
    work.write_text(text, encoding="utf-8")
    work.replace(path)


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


def clear_leftovers(folder: Path) -> None:
    """Delete what killed processes left behind while they wrote into `folder`.

    Only where nobody else is writing. safetensors writes under a hidden name of its own first.
    """
    for pattern in ("*.part", ".tmp*"):
        for path in folder.glob(pattern):
            path.unlink(missing_ok=True)

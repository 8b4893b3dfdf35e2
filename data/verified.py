"""Which shards of a store have been verified, by whatever process, and not been touched since.

To verify a shard takes as long as to read it whole, which for a large store is minutes in each
process of each run. So what was verified is noted in the store's folder, with what the file system
says of the file then: size, times of change and inode. A copy of the store, or a file that somebody
wrote to, is verified anew.
"""

import json
from pathlib import Path

NAME = "verified.jsonl"


class Verified:
    """Notes of the verified files of a folder; other processes may add to them at the same time.

    Args:
        folder: of the store; where it cannot be written to, only this object remembers.
    """

    def __init__(self, folder: Path):
        self.path = folder / NAME
        self._known = set[bytes]()
        self._read = 0  # bytes of the file

    def has(self, file: Path, sha256: str) -> bool:
        """Whether the file was verified to be of this checksum, as it is."""
        note = _note(file, sha256)
        if note not in self._known:
            self._read_on()
        return note in self._known

    def add(self, file: Path, sha256: str) -> None:
        """Note that the file is of this checksum."""
        note = _note(file, sha256)
        self._known.add(note)
        try:
            with self.path.open("ab") as notes:
                notes.write(note + b"\n")
        except OSError:
            pass  # of a store that others made, or on a disk that is full: verified again next time

    def _read_on(self) -> None:
        """Take in what was added since."""
        try:
            with self.path.open("rb") as notes:
                notes.seek(self._read)
                added = notes.read()
        except OSError:
            return
        whole = added[: added.rfind(b"\n") + 1]  # a line may be on its way
        self._known.update(whole.splitlines())
        self._read += len(whole)


def _note(file: Path, sha256: str) -> bytes:
    found = file.stat()
    state = [found.st_size, found.st_mtime_ns, found.st_ctime_ns, found.st_ino]
    return json.dumps([file.name, sha256, *state]).encode()

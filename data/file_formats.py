"""What a data file is by its first bytes, whatever its name says: compressed, encoded, no data."""

import codecs
import gzip
import io
from collections.abc import Iterator
from pathlib import Path
from typing import IO, AnyStr

HEAD = 4096  # bytes that are looked at
LONGEST = 1 << 27  # bytes or characters of a line: a thousandth of that is a long conversation
WHOLE = 1 << 30  # characters of a file that is read at once,
UNPACKED = 50  # or so many times the bytes that it has on the disk: text compresses to a tenth
GZIP = b"\x1f\x8b"
POINTER = b"version https://git-lfs.github.com/spec/"
FOREIGN = {
    b"PAR1": "a Parquet file: rename it to end in .parquet",
    b"ARROW1": "an Arrow file: rename it to end in .arrow",
    b"PK\x03\x04": "a ZIP archive: unpack it (unzip)",
    b"\x28\xb5\x2f\xfd": "compressed by zstd: unpack it (zstd -d)",
    b"BZh": "compressed by bzip2: unpack it (bunzip2)",
    b"\xfd7zXZ\x00": "compressed by xz: unpack it (unxz)",
}
"""First bytes of files that are not read as text -> what they are, and the fix."""
MARKS = {
    codecs.BOM_UTF8: "utf-8-sig",
    codecs.BOM_UTF32_LE: "utf-32",  # before UTF-16, whose mark it begins with
    codecs.BOM_UTF32_BE: "utf-32",
    codecs.BOM_UTF16_LE: "utf-16",
    codecs.BOM_UTF16_BE: "utf-16",
}
"""Byte order marks -> encodings that read and drop them."""


def open_bytes(path: Path) -> IO[bytes]:
    """The bytes of a file, decompressed where it is one of gzip's, with or without the ending."""
    with path.open("rb") as file:
        zipped = file.read(len(GZIP)) == GZIP
    return gzip.open(path) if zipped else path.open("rb")  # type: ignore[return-value]


def open_text(path: Path, newline: str, errors: str = "strict") -> io.TextIOWrapper:
    """The text of a file in the encoding of its byte order mark, or in UTF-8; `newline` and
    `errors` as in `open`."""
    return io.TextIOWrapper(
        open_bytes(path), encoding=encoding_of(path), errors=errors, newline=newline
    )


def bounded_lines(file: IO[AnyStr]) -> Iterator[AnyStr]:
    """The lines of a file, a compressed one of zeros among them, of which one fills any memory.

    Raises:
        ValueError: one is longer than a row can be.
    """
    while line := file.readline(LONGEST + 1):
        if len(line) > LONGEST:
            raise ValueError(f"a line is longer than {LONGEST:,} bytes, as no row is: split it")
        yield line


def read_whole(path: Path, file: IO[str]) -> str:
    """The text of a file, unless it was compressed so much that it is made to fill the memory.

    Raises:
        ValueError: it was.
    """
    most = max(WHOLE, UNPACKED * path.stat().st_size)
    text = file.read(most + 1)
    if len(text) > most:
        raise ValueError(
            f"it unpacks to more than {most:,} characters: unpack it, and give one row a line "
            "(.jsonl)"
        )
    return text


def encoding_of(path: Path) -> str:
    """What the byte order mark of a file says; UTF-8 where there is none."""
    head = _head(path)
    return next((name for mark, name in MARKS.items() if head.startswith(mark)), "utf-8")


def check_file(path: Path, kind: str) -> None:
    """Refuse a file that is not what its name says.

    Args:
        path: of a data file.
        kind: how it is to be read: json, csv, text, parquet or arrow.

    Raises:
        ValueError: with the fix.
    """
    if kind == "parquet":
        _check_parquet(path)
    head = _head(path)
    if head.startswith(POINTER):
        raise ValueError(
            "it is a Git LFS pointer, the data is not there: run `git lfs pull`, or download it"
        )
    if kind in ("parquet", "arrow"):
        return
    if fault := next((what for magic, what in FOREIGN.items() if head.startswith(magic)), None):
        raise ValueError(f"it is {fault}")
    if kind != "text" and head.lstrip()[:14].lower().startswith((b"<!doctype html", b"<html")):
        raise ValueError("it is a web page: the download went wrong, download it again")
    if encoding_of(path) == "utf-8" and head.count(0) > len(head) // 4:
        raise ValueError(
            "it looks like UTF-16 without a byte order mark: convert it (iconv -f "
            f"UTF-16{'LE' if head[0] else 'BE'} -t UTF-8 {path.name})"
        )


def _head(path: Path) -> bytes:
    with open_bytes(path) as file:
        return file.read(HEAD)


def _check_parquet(path: Path) -> None:
    """`datasets` says neither that a file is compressed nor that it ends too early."""
    with path.open("rb") as file:
        begins = file.read(HEAD)
        file.seek(max(0, path.stat().st_size - 4))
        ends = file.read()
    if begins.startswith(GZIP):
        raise ValueError("it is compressed by gzip, as Parquet is not: unpack it (gunzip)")
    if begins.startswith(POINTER):
        return
    if not begins.startswith(b"PAR1"):
        raise ValueError("it is no Parquet file: rename it to what it is, or download it again")
    if ends != b"PAR1":
        raise ValueError("it is cut short: download it again")

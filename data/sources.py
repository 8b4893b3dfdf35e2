"""Raw rows from any source: local files of several kinds, folders, globs, Hugging Face datasets,
and the prompts that come with Headstart.

A row is a dict, or a string: the reason why this row is unusable. One bad row never fails its
file; a file that cannot be read at all is a `ValueError`. Nothing is held in memory but the row
in hand (and the row group of a Parquet file).
"""

import codecs
import csv
import fnmatch
import glob
import gzip
import io
import json
import re
import zlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import IO, Any, TextIO

from headstart.common.console import print_once
from headstart.common.files import cache_dir
from headstart.configs.schema import SourceConfig
from headstart.configs.section import BUILTIN

Row = dict[str, Any] | str
"""The columns of a row, or the reason why it is unusable."""

FILES = {
    ".jsonl": "json", ".ndjson": "json", ".json": "json", ".parquet": "parquet", ".arrow": "arrow",
    ".csv": "csv", ".tsv": "csv", ".txt": "text", ".md": "text",
}  # fmt: skip
"""How each kind of file is read. JSON, CSV and text may be compressed: `.jsonl.gz`."""
METADATA = {
    "dataset_dict.json", "dataset_info.json", "dataset_infos.json", "metadata.json", "state.json",
}  # fmt: skip
"""Files that `datasets` and others write beside the data."""
DELIMITERS = ",;\t|"
"""Of a CSV file, likelier ones first: where numbers have a decimal comma, Excel writes `;`."""

IN_CHECKOUT = Path("data/prompts")
"""Where a checkout has them. Runs made before they had names tell of them by these paths."""

HUB_ID = re.compile(r"[\w-][\w.-]*(/[\w-][\w.-]*)?")
SURROGATE = re.compile(rb"\\u[dD][89a-fA-F]")


@dataclass(frozen=True)
class Place:
    """Where a row stands; as a string `prompts.jsonl:3`, or `train.parquet[17]` without lines."""

    name: str
    """The file, or the id of the Hub dataset."""
    number: int
    """Line, from 1; or row, from 0."""
    is_line: bool = False

    def __str__(self) -> str:
        return f"{self.name}:{self.number}" if self.is_line else f"{self.name}[{self.number}]"

    @property
    def id(self) -> str:
        """An id for the row if it has none of its own, such as `prompts-00003`."""
        return f"{Path(self.name.removesuffix('.gz')).stem}-{self.number:05d}"


def read_rows(source: SourceConfig) -> Iterator[tuple[Place, Row]]:
    """The rows of a source, in order, each with its place.

    `builtin:NAME` are prompts that come with Headstart; a name may be a pattern, of several.
    A path that exists is read from disk: a file by its ending, a folder of `save_to_disk`, or the
    files of known endings under a folder or that a glob matches, sorted, without hidden ones and
    `METADATA`, which are counted. Anything else that does not look like a path is the id of a
    Hugging Face dataset. Code of a dataset is never run.

    Raises:
        ValueError: a source that is missing, of an unknown kind, or that cannot be loaded; or a
            setting of Hub datasets for what is none.
    """
    check_there(source.path)
    path = Path(source.path)
    _check_settings(source, path)
    if source.path.startswith(BUILTIN):
        yield from _builtin_rows(source.path)
    elif _is_saved(path):
        yield from _saved_rows(path, source.split)
    elif path.exists() or glob.has_magic(source.path):
        for file in _files(path):
            yield from _file_rows(file)
    else:
        yield from _hub_rows(source)


def _check_settings(source: SourceConfig, path: Path) -> None:
    """Raise `ValueError` where a source on disk has settings that choose a part of a dataset of the
    Hub: all of its rows would be read."""
    if not (source.path.startswith(BUILTIN) or path.exists() or glob.has_magic(source.path)):
        return
    asked = source.model_dump(
        include={"name", "split", "revision", "streaming"}, exclude_defaults=True
    )
    if _is_saved(path) and (path / "dataset_dict.json").is_file():
        asked.pop("split", None)
    for setting, value in asked.items():
        raise ValueError(
            f"{source.path} is here on disk, and {setting}={value} is of Hub datasets: leave it "
            "out, and name the files that are to be read"
        )


def check_there(path: str) -> None:
    """Raise `ValueError` where a source's path is that of nothing here and cannot be a dataset's
    id; the Hub is not asked, and no row is read."""
    if path.startswith(BUILTIN):
        builtin_files(path)
    elif not (Path(path).exists() or glob.glob(path, recursive=True) or is_hub_dataset(path)):
        name = builtin_name(path)
        hint = "" if name == path else f": {name} comes with Headstart"
        if glob.has_magic(path):
            hint = f": nothing there that ends in {', '.join(FILES)}"
        raise ValueError(f"no prompt file {path}{hint}")


def builtin_sets() -> list[str]:
    """The names of the prompts that come with Headstart, such as `builtin:chat_train`."""
    files = (file.name for file in _shipped_prompts().iterdir())
    return sorted(BUILTIN + Path(name).stem for name in files if name.endswith(".jsonl"))


def builtin_name(path: str) -> str:
    """The name of prompts that a path in a checkout stands for; any other path as it is, and that
    of a file which holds something else there."""
    file = Path(path)
    name = BUILTIN + file.stem
    if file != IN_CHECKOUT / f"{file.stem}.jsonl" or name not in builtin_sets():
        return path
    own = file.is_file() and file.read_bytes() != (_shipped_prompts() / file.name).read_bytes()
    return path if own else name


def _shipped_prompts() -> Any:
    return resources.files("headstart.data") / "prompts"


def builtin_files(name: str) -> list[Any]:
    """The files of the built-in prompts of a name, or pattern; `ValueError`: there are none."""
    chosen = fnmatch.filter(builtin_sets(), name)
    if not chosen:
        raise ValueError(f"no built-in prompts {name}: there are {', '.join(builtin_sets())}")
    return [_shipped_prompts() / f"{one.removeprefix(BUILTIN)}.jsonl" for one in chosen]


def _builtin_rows(name: str) -> Iterator[tuple[Place, Row]]:
    for file in builtin_files(name):
        with resources.as_file(file) as path:
            yield from _file_rows(path)


def is_hub_dataset(path: str) -> bool:
    """Whether a source's path is read as the id of a Hugging Face dataset."""
    there = Path(path)
    return not there.exists() and not _kind(there) and HUB_ID.fullmatch(path) is not None


def _kind(path: Path) -> str | None:
    return FILES.get(Path(path.name.removesuffix(".gz")).suffix)


def _is_saved(path: Path) -> bool:
    """Whether `save_to_disk` of `datasets` wrote a folder; others have a state.json too."""
    if (path / "dataset_dict.json").is_file():
        return True
    try:
        state = json.loads((path / "state.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return isinstance(state, dict) and "_data_files" in state


def _files(path: Path) -> list[Path]:
    if path.is_file():
        if _kind(path):
            return [path]
        raise ValueError(f"{path}: unknown kind of file; rename or convert it: {', '.join(FILES)}")
    if path.is_dir():
        files = sorted(file for file in path.rglob("*") if file.is_file() and _kind(file))
        files = _without_stray(path, files)
        # README.md and LICENSE.txt stand beside many a data set, and are no prompts.
        beside = [file for file in files if _kind(file) != "text"]
        if texts := len(files) - len(beside) if beside else 0:
            print_once(f"{path}: {texts} text files beside others passed over: a glob names them")
        files = beside or files
    else:
        matches = sorted(map(Path, glob.glob(str(path), recursive=True)))
        files = [file for file in matches if file.is_file() and _kind(file)]
        files = _without_stray(path, files)
    if not files:
        raise ValueError(f"no prompt file {path}: nothing there that ends in {', '.join(FILES)}")
    return files


def _without_stray(folder: Path, files: list[Path]) -> list[Path]:
    """The files but for hidden ones and `METADATA` among what was found; says how many those are.

    Hidden are `.name`, of Macs `._name`, and all in a hidden folder or in `__MACOSX`; but not what
    the user named himself.
    """
    named = len([part for part in folder.parts if not glob.has_magic(part)])

    def stray(file: Path) -> bool:
        own = file.parts[named:]
        return file.name in METADATA or any(p.startswith(".") or p == "__MACOSX" for p in own)

    passed = [file for file in files if stray(file)]
    if passed:
        print_once(
            f"{folder}: {len(passed)} hidden or metadata files passed over, first {passed[0]}"
        )
    return [file for file in files if not stray(file)]


def _file_rows(path: Path) -> Iterator[tuple[Place, Row]]:
    kind = _kind(path)
    assert kind is not None
    try:
        check_file(path, kind)
        match kind:
            case "json" if not _is_array(path):
                yield from _lines(path, _json_row)
            case "json":
                yield from _numbered(path, _array_rows(path))
            case "text":
                yield from _lines(path, lambda line: {"prompt": line.decode()})
            case "csv":
                yield from _numbered(path, _csv_rows(path))
            case _:
                yield from _numbered(path, _columnar_rows(path, kind))
    # EOFError and zlib.error: a damaged .gz.
    except (EOFError, zlib.error, json.JSONDecodeError, csv.Error) as error:
        raise ValueError(
            f"cannot read {path}: {_one_line(error)}; if it is cut short, download it again"
        ) from error
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"cannot read {path}: {_one_line(error)}") from error


def _numbered(path: Path, rows: Iterable[Row]) -> Iterator[tuple[Place, Row]]:
    for number, row in enumerate(rows):
        yield Place(str(path), number), row


def _lines(path: Path, parse: Callable[[bytes], Any]) -> Iterator[tuple[Place, Row]]:
    with open_text(path, newline="\n") as file:
        for number, text in enumerate(bounded_lines(file), start=1):
            if line := text.encode(errors="surrogateescape").strip():
                yield Place(str(path), number, is_line=True), _parsed(line, parse)


def _parsed(line: bytes, parse: Callable[[bytes], Any]) -> Row:
    try:
        row = parse(line)
    except UnicodeDecodeError:
        return "not UTF-8"
    except UnicodeError:
        return "half a surrogate pair"
    except json.JSONDecodeError as error:
        return f"not JSON ({error.msg} at column {error.colno})"
    except (ValueError, RecursionError) as error:  # an endless number, endless nesting
        return f"not JSON ({error})"
    return row if isinstance(row, dict) else 'not an object such as {"prompt": ...}'


def _json_row(line: bytes) -> Any:
    row = json.loads(line.decode())
    if SURROGATE.search(line):
        _check_text(row)
    return row


def _check_text(row: Any) -> None:
    """Raises UnicodeError for half a surrogate pair: a str may hold it, but no tokenizer."""
    json.dumps(row, ensure_ascii=False).encode()


def _is_array(path: Path) -> bool:
    """Whether a `.json` file is one array of rows, as Alpaca's and ShareGPT's are."""
    if Path(path.name.removesuffix(".gz")).suffix != ".json":
        return False
    with open_text(path, newline="\n") as file:
        return file.read(4096).lstrip().startswith("[")


def _array_rows(path: Path) -> Iterator[Row]:
    with open_text(path, newline="\n") as file:
        rows = json.loads(read_whole(path, file))
    for row in rows:
        yield _parsed(json.dumps(row).encode(), _json_row)


def _csv_rows(path: Path) -> Iterator[Row]:
    """Cells as they stand: `datasets` reads through pandas, which makes 7 of 007, None of NA."""
    csv.field_size_limit(LONGEST)  # Python's limit of 131,072 characters is below a long prompt
    with open_text(path, newline="") as file:
        delimiter = _delimiter(path, file)
        # Strict: a stray quote would otherwise swallow the rest of the file as one cell.
        for row in csv.DictReader(bounded_lines(file), delimiter=delimiter, strict=True):
            try:
                _check_text(row)
                yield "more cells than columns" if None in row else row
            except UnicodeError:
                yield "not UTF-8"


def _delimiter(path: Path, file: TextIO) -> str:
    """What separates the columns of the first line; the file is left at the line of their names."""
    usual = "\t" if ".tsv" in path.suffixes else ","
    line = file.readline(LONGEST)
    if line.startswith("sep=") and len(line.strip("\r\n")) == 5:  # what Excel is told by
        return line[4]
    file.seek(0)
    counts = {d: len(next(csv.reader([line], delimiter=d), [])) for d in usual + DELIMITERS}
    delimiter = usual if counts[usual] > 1 else max(counts, key=lambda d: counts[d])
    if counts[delimiter] < 2:
        return usual
    if delimiter != usual:
        print_once(f"{path}: columns are separated by {delimiter!r}")
    return delimiter


def _columnar_rows(path: Path, kind: str) -> Iterator[Row]:
    import datasets

    datasets.disable_progress_bars()
    # Escaped, since `datasets` takes file names for patterns.
    files = glob.escape(str(path))
    # Streaming caches nothing, yet `datasets` makes the folder of its cache: not in the user's
    # home, which may be read-only.
    cache = str(cache_dir() / "datasets")
    for row in datasets.load_dataset(
        kind, data_files=files, split="train", streaming=True, cache_dir=cache
    ):
        yield without_nulls(row)


def _saved_rows(path: Path, split: str) -> Iterator[tuple[Place, Row]]:
    import datasets

    try:
        rows = datasets.load_from_disk(str(path))
    except (OSError, ValueError) as error:
        raise ValueError(f"cannot read {path}: {_one_line(error)}") from error
    if isinstance(rows, datasets.DatasetDict):
        if split not in rows:
            raise ValueError(f"{path} has no split {split}: set `split`, one of {list(rows)}")
        rows = rows[split]
    yield from _numbered(path, map(without_nulls, rows))


def _hub_rows(source: SourceConfig) -> Iterator[tuple[Place, Row]]:
    import datasets

    datasets.disable_progress_bars()
    try:
        rows = datasets.load_dataset(
            source.path, source.name, split=source.split, revision=source.revision,
            streaming=source.streaming,
        )  # fmt: skip
        for number, row in enumerate(rows):
            yield Place(source.path, number), without_nulls(row)
    # RuntimeError: the dataset is a script.
    except (OSError, ValueError, RuntimeError, datasets.exceptions.DatasetsError) as error:
        raise ValueError(
            f"cannot load the dataset {source.path} from the Hugging Face Hub: "
            f"{_one_line(error)}; check its spelling, the source's `name` and `split` (slices do "
            "not stream: use `limit`) and the network, and for a private or gated one run `hf auth "
            "login`; code of a dataset is never run: download its data files and name those"
        ) from error


def _one_line(error: Exception) -> str:
    """The message without the line breaks and the examples that follow it."""
    return " ".join(str(error).split("\nExample")[0].split()).rstrip(".")


def without_nulls(row: dict[str, Any]) -> dict[str, Any]:
    """A row without the keys that Arrow adds, as None, to structs that lack them; a column that is
    None stays."""
    return {column: _without_nulls(value) for column, value in row.items()}


def _without_nulls(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_nulls(v) for key, v in value.items() if v is not None}
    return [_without_nulls(v) for v in value] if isinstance(value, list) else value


HEAD = 4096  # bytes that are looked at
LONGEST = 1 << 27  # characters of a line: a thousandth of that is a long conversation
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


def open_text(path: Path, newline: str) -> io.TextIOWrapper:
    """The text of a file in the encoding of its byte order mark, or in UTF-8, of which wrong bytes
    come as surrogates: they are one bad row, and fail nothing else. `newline` as in `open`."""
    encoding = encoding_of(path)
    errors = "surrogateescape" if encoding.startswith("utf-8") else "strict"
    return io.TextIOWrapper(open_bytes(path), encoding=encoding, errors=errors, newline=newline)


def bounded_lines(file: TextIO) -> Iterator[str]:
    """The lines of a file, a compressed one of zeros among them, of which one fills any memory.

    Raises:
        ValueError: one is longer than a row can be.
    """
    while line := file.readline(LONGEST + 1):
        if len(line) > LONGEST:
            raise ValueError(
                f"a line is longer than {LONGEST:,} characters, as no row is: split it"
            )
        yield line


def read_whole(path: Path, file: TextIO) -> str:
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
    """Refuse a file that is not of the kind (of `FILES`) that its name says.

    Raises:
        ValueError: with the fix.
    """
    head = _head(path)
    if head.startswith(POINTER):
        raise ValueError(
            "it is a Git LFS pointer, the data is not there: run `git lfs pull`, or download it"
        )
    if kind == "parquet":
        _check_parquet(path)
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
        begins = file.read(4)
        file.seek(max(0, path.stat().st_size - 4))
        ends = file.read()
    if begins.startswith(GZIP):
        raise ValueError("it is compressed by gzip, as Parquet is not: unpack it (gunzip)")
    if not begins.startswith(b"PAR1"):
        raise ValueError("it is no Parquet file: rename it to what it is, or download it again")
    if ends != b"PAR1":
        raise ValueError("it is cut short: download it again")

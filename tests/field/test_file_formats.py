"""Data files that are other than their names say: read as what they are, or refused."""

import bz2
import gzip
import json
import lzma
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from headstart.data.prompts import load_prompts

ROWS = [{"prompt": "one", "id": "a"}, {"prompt": "zwei, drei\u2028vier; ä", "id": "b"}]
JSONL = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in ROWS)
POINTER = (
    b"version https://git-lfs.github.com/spec/v1\n"
    b"oid sha256:4d7a214614ab2935c943f9e0ff69d22eadbb8f32b1258daaa5e2ca24d17e2393\nsize 12345\n"
)


def prompts(path: Path) -> list[tuple[str, str]]:
    return [(prompt.id, prompt.text) for prompt in load_prompts(path)]


EXPECTED = [(row["id"], row["prompt"]) for row in ROWS]


@pytest.mark.parametrize("delimiter", [";", "\t", "|", ","])
@pytest.mark.parametrize("named", [False, True])
@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
def test_a_csv_as_excel_writes_it_is_read(
    delimiter: str, named: bool, encoding: str, tmp_path: Path
) -> None:
    first = f"sep={delimiter}\r\n" if named else ""
    text = f'{first}prompt{delimiter}id\r\none{delimiter}a\r\n"{ROWS[1]["prompt"]}"{delimiter}b\r\n'
    (tmp_path / "a.csv").write_bytes(text.encode(encoding))
    assert prompts(tmp_path / "a.csv") == EXPECTED


def test_another_delimiter_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "a.csv").write_text("prompt;id\none;a\n")
    (tmp_path / "b.tsv").write_text("prompt,id\none,a\n")
    (tmp_path / "c.csv").write_text("prompt\none; and two\n")
    assert prompts(tmp_path / "a.csv") == prompts(tmp_path / "b.tsv") == EXPECTED[:1]
    assert [text for _, text in prompts(tmp_path / "c.csv")] == ["one; and two"]
    said = capsys.readouterr().out
    assert "a.csv: columns are separated by ';'" in said
    assert "b.tsv: columns are separated by ','" in said
    assert "c.csv: columns" not in said


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16", "utf-32"])
@pytest.mark.parametrize("zipped", [False, True])
def test_a_byte_order_mark_says_how_a_file_is_read(
    encoding: str, zipped: bool, tmp_path: Path
) -> None:
    contents = {
        "a.jsonl": JSONL,
        "a.json": json.dumps(ROWS, ensure_ascii=False, indent=1),
        "a.txt": "one\r\nzwei, drei\u2028vier; ä\r\n",
    }
    for name, text in contents.items():
        raw = text.encode(encoding)
        (tmp_path / name).write_bytes(gzip.compress(raw, mtime=0) if zipped else raw)
        assert [text for _, text in prompts(tmp_path / name)] == [text for _, text in EXPECTED]


@pytest.mark.parametrize("encoding", ["utf-16-le", "utf-16-be"])
@pytest.mark.parametrize("name", ["a.jsonl", "a.csv"])
def test_utf_16_without_a_mark_is_refused_with_the_fix(
    encoding: str, name: str, tmp_path: Path
) -> None:
    text = "prompt,id\none,a\n" if name == "a.csv" else JSONL
    (tmp_path / name).write_bytes(text.encode(encoding))
    code = encoding.upper().replace("-LE", "LE").replace("-BE", "BE")
    with pytest.raises(ValueError, match=rf"{name}: .*iconv -f {code} -t UTF-8 {name}"):
        load_prompts(tmp_path / name)


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz", "a.csv", "a.txt", "a.json"])
def test_gzip_is_known_by_its_first_bytes_and_its_absence_too(name: str, tmp_path: Path) -> None:
    text = {"a.csv": "prompt,id\none,a\n", "a.txt": "one\n", "a.json": json.dumps(ROWS[:1])}
    raw = text.get(name, json.dumps(ROWS[0])).encode()
    for content in (gzip.compress(raw, mtime=0), raw):
        (tmp_path / name).write_bytes(content)
        assert [text for _, text in prompts(tmp_path / name)] == ["one"]


def parquet(rows: list[dict[str, Any]]) -> bytes:
    out = pa.BufferOutputStream()
    pq.write_table(pa.Table.from_pylist(rows), out)
    return bytes(out.getvalue().to_pybytes())


HTML = b"<!DOCTYPE html>\n<html><body>Sign in</body></html>"


@pytest.mark.parametrize(
    ("name", "content", "fix"),
    [
        *((f"a{end}", POINTER, "git lfs pull")
          for end in (".jsonl", ".json", ".parquet", ".arrow", ".csv", ".txt", ".jsonl.gz")),
        ("a.parquet", parquet(ROWS)[:-9], "cut short: download it again"),
        ("a.parquet", b"", "download it again"),
        ("a.parquet", gzip.compress(parquet(ROWS), mtime=0), "gunzip"),
        ("a.parquet.gz", gzip.compress(parquet(ROWS), mtime=0), "gunzip"),
        ("a.parquet", JSONL.encode(), "rename"),
        ("a.jsonl", parquet(ROWS), r"\.parquet"),
        ("a.jsonl", bz2.compress(JSONL.encode()), "bunzip2"),
        ("a.jsonl", lzma.compress(JSONL.encode()), "unxz"),
        ("a.csv", b"PK\x03\x04" + b"\0" * 60, "unzip"),
        ("a.jsonl", b"\x28\xb5\x2f\xfd" + b"x" * 60, "zstd -d"),
        ("a.jsonl", HTML, "web page"),
        ("a.csv", HTML, "web page"),
        ("a.json", json.dumps(ROWS)[:-9].encode(), "cut short, download"),
        ("a.jsonl", gzip.compress(JSONL.encode(), mtime=0)[:-9], "cut short, download"),
        ("a.csv", b'prompt,id\n"one,a\n', "cut short, download"),
    ],
)  # fmt: skip
def test_a_file_that_holds_no_data_is_refused_with_its_name_and_the_fix(
    name: str, content: bytes, fix: str, tmp_path: Path
) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=rf"cannot read .*/{name}: .*{fix}") as error:
        load_prompts(tmp_path / name, max_bad_rows=0.9)
    assert "\n" not in str(error.value)


def test_one_pointer_among_the_files_of_a_folder_is_named(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text(JSONL)
    (tmp_path / "b.parquet").write_bytes(POINTER)
    with pytest.raises(ValueError, match=r"b\.parquet: .*git lfs pull"):
        load_prompts(tmp_path)


def test_a_text_about_pointers_or_web_pages_is_text(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(HTML)
    (tmp_path / "b.jsonl").write_text(json.dumps({"prompt": POINTER.decode() + HTML.decode()}))
    assert len(load_prompts(tmp_path / "a.txt")) == 2
    assert len(load_prompts(tmp_path / "b.jsonl")) == 1

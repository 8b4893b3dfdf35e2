import gzip
import json
import time
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from headstart.configs.schema import SourceConfig
from headstart.data.sources import Row, read_rows

ROWS = [{"prompt": "one", "id": "007"}, {"prompt": "zwei, drei", "id": "NA"}]
TURNS = [
    {"messages": [{"role": "user", "content": "hi"}]},
    {
        "messages": [
            {"role": "user", "content": "weather?"},
            {"role": "assistant", "tool_calls": [{"function": {"name": "w", "arguments": "{}"}}]},
        ]
    },
]


def rows_of(path: Path | str, **settings: Any) -> list[tuple[str, Row]]:
    source = SourceConfig(path=str(path), **settings)
    return [(str(place), row) for place, row in read_rows(source)]


def jsonl(path: Path, rows: list[Any]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def write(path: Path) -> None:
    """`ROWS` as a file of the kind that its name says."""
    table = pa.Table.from_pylist(ROWS)
    match "".join(path.suffixes):
        case ".jsonl" | ".json":
            jsonl(path, ROWS)
        case ".jsonl.gz":
            path.write_bytes(gzip.compress("".join(json.dumps(r) + "\n" for r in ROWS).encode()))
        case ".parquet":
            pq.write_table(table, path)
        case ".arrow":
            with pa.OSFile(str(path), "wb") as file, pa.ipc.new_file(file, table.schema) as writer:
                writer.write_table(table)
        case ".csv":
            path.write_text('\ufeffprompt,id\none,007\n"zwei, drei",NA\n')
        case ".tsv":
            path.write_text("prompt\tid\none\t007\nzwei, drei\tNA\n")


@pytest.mark.parametrize(
    "name", ["a.jsonl", "a.json", "a.jsonl.gz", "a.parquet", "a.arrow", "a.csv", "a.tsv"]
)
def test_every_kind_of_file_gives_the_same_rows(name: str, tmp_path: Path) -> None:
    path = tmp_path / name
    write(path)
    places = [":1", ":2"] if ".json" in name else ["[0]", "[1]"]
    assert rows_of(path) == [(f"{path}{places[i]}", row) for i, row in enumerate(ROWS)]


def test_a_text_file_has_one_prompt_a_line(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"one\r\n\n\xff\nzwei, \xc3\xa4")
    assert rows_of(tmp_path / "a.txt") == [
        (f"{tmp_path}/a.txt:1", {"prompt": "one"}),
        (f"{tmp_path}/a.txt:3", "not UTF-8"),
        (f"{tmp_path}/a.txt:4", {"prompt": "zwei, ä"}),
    ]


def test_a_json_file_may_be_one_array_of_rows(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text(json.dumps([*ROWS, 1], indent=2))
    assert [row for _, row in rows_of(tmp_path / "a.json")][:2] == ROWS
    assert rows_of(tmp_path / "a.json")[2][0].endswith("a.json[2]")
    assert "not an object" in str(rows_of(tmp_path / "a.json")[2][1])


def test_a_row_of_an_array_that_is_not_utf_8_fails_no_other_row(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_bytes(b'[{"prompt": "\xff"}, {"prompt": "one"}]')
    rows = [row for _, row in rows_of(tmp_path / "a.json")]
    assert rows == ["half a surrogate pair", {"prompt": "one"}]


@pytest.mark.parametrize("kind", ["parquet", "arrow", "saved", "saved splits"])
def test_columns_that_arrow_fills_with_nulls_leave_no_trace_in_the_turns(
    kind: str, tmp_path: Path
) -> None:
    path = tmp_path / f"a.{kind}"
    if kind == "parquet":
        pq.write_table(pa.Table.from_pylist(TURNS), path)
    elif kind == "arrow":
        with pa.OSFile(str(path), "wb") as file:
            table = pa.Table.from_pylist(TURNS)
            with pa.ipc.new_stream(file, table.schema) as writer:
                writer.write_table(table)
    else:
        saved = datasets.Dataset.from_list(TURNS)
        splits = datasets.DatasetDict({"train": saved, "test": saved.select([0])})
        (splits if kind == "saved splits" else saved).save_to_disk(str(path))
    assert [row for _, row in rows_of(path)] == TURNS
    if kind == "saved splits":
        assert [row for _, row in rows_of(path, split="test")] == TURNS[:1]
        with pytest.raises(ValueError, match=r"has no split dev: set `split`, one of .*'test'"):
            rows_of(path, split="dev")


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        (b'{"prompt": "a"', "not JSON (Expecting ',' delimiter at column 15)"),
        (b'{"prompt": "\xff"}', "not UTF-8"),
        (b'{"prompt": "\\ud83d"}', "half a surrogate pair"),
        (b"[1]", 'not an object such as {"prompt": ...}'),
        (b"1" * 5000, "not JSON ("),
        (b"[" * 100_000, "not JSON ("),
    ],
)
def test_a_malformed_line_is_one_bad_row_and_fails_nothing_else(
    line: bytes, reason: str, tmp_path: Path
) -> None:
    good = b'{"prompt": "\\ud83d\\ude00"}'
    (tmp_path / "a.jsonl").write_bytes(good + b"\n\n" + line + b"\n" + good)
    (_, first), (place, bad), (_, last) = rows_of(tmp_path / "a.jsonl")
    assert first == last == {"prompt": "😀"}
    assert place == f"{tmp_path}/a.jsonl:3"
    assert str(bad).startswith(reason)


def test_a_csv_row_that_does_not_fit_is_one_bad_row(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_bytes(b"prompt,id\na,1,2\n\xff,3\nb\n" + b"c" * 200_000 + b",4\n")
    rows = [row for _, row in rows_of(tmp_path / "a.csv")]
    assert rows[:3] == ["more cells than columns", "not UTF-8", {"prompt": "b", "id": None}]
    assert rows[3] == {"prompt": "c" * 200_000, "id": "4"}


def test_a_folder_or_a_glob_gives_its_files_in_sorted_order(tmp_path: Path) -> None:
    (tmp_path / "sub[1]").mkdir()
    jsonl(tmp_path / "b.jsonl", [{"prompt": "b"}])
    jsonl(tmp_path / "a.jsonl", [{"prompt": "a"}])
    pq.write_table(pa.Table.from_pylist([{"prompt": "c"}]), tmp_path / "sub[1]" / "c*.parquet")
    for stranger in ("README.md", "LICENSE.txt", "script.py"):
        (tmp_path / stranger).write_text("no prompt")
    assert [row for _, row in rows_of(tmp_path)] == [{"prompt": c} for c in "abc"]
    assert [row for _, row in rows_of(tmp_path / "sub[1]")] == [{"prompt": "c"}]
    assert [row for _, row in rows_of(tmp_path / "[ab].*")] == [{"prompt": "a"}, {"prompt": "b"}]
    assert len(rows_of(tmp_path / "**" / "*.parquet")) == 1


def test_a_source_that_is_not_there_says_what_was_looked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for path in ("absent.jsonl", "org/absent.csv.gz", "/absent/folder", "./x", "a/b/c", "a b"):
        with pytest.raises(ValueError, match=f"^no prompt file {path}$"):
            rows_of(path)
    (tmp_path / "data").mkdir()
    for path in ("*.jsonl", "data"):
        with pytest.raises(ValueError, match=r"nothing there that ends in \.jsonl, "):
            rows_of(path)
    (tmp_path / "a.xlsx").touch()
    with pytest.raises(ValueError, match=r"a\.xlsx: unknown kind of file; rename"):
        rows_of("a.xlsx")


@pytest.mark.parametrize(
    "part", [{"split": "test"}, {"name": "main"}, {"revision": "v1"}, {"streaming": True}]
)
def test_a_part_of_what_is_on_disk_is_not_taken_for_the_whole(
    part: dict[str, Any], tmp_path: Path
) -> None:
    (tmp_path / "folder").mkdir()
    for split in ("train", "test"):
        (tmp_path / "folder" / f"{split}.jsonl").write_text('{"prompt": "x"}\n')
    rows = datasets.Dataset.from_list([{"prompt": "x"}])
    rows.save_to_disk(str(tmp_path / "saved"))
    datasets.DatasetDict({"train": rows, "test": rows}).save_to_disk(str(tmp_path / "both"))
    for path in ("folder", "folder/*.jsonl", "folder/test.jsonl", "saved", "both"):
        source = SourceConfig(path=str(tmp_path / path), **part)
        if path == "both" and "split" in part:
            assert len(list(read_rows(source))) == 1
            continue
        with pytest.raises(ValueError, match=rf"{next(iter(part))}=.* is of Hub datasets"):
            list(read_rows(source))
    with pytest.raises(ValueError, match="is of Hub datasets"):
        list(read_rows(SourceConfig(path="builtin:text_eval", **part)))


@pytest.mark.parametrize("name", ["a.parquet", "a.arrow", "a.jsonl.gz", "a.json", "a.csv"])
def test_a_file_that_cannot_be_read_at_all_is_named(name: str, tmp_path: Path) -> None:
    content = b'["prompt\n"open'
    content = gzip.compress(content)[:-8] if name.endswith(".gz") else content
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=f"cannot read .*{name}: "):
        rows_of(tmp_path / name)


def test_a_hub_dataset_is_loaded_as_the_source_says(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []

    def load_dataset(*args: Any, **kwargs: Any) -> list[dict[str, Any]]:
        calls.append((args, kwargs))
        return [{"prompt": "a", "turns": [{"role": "user", "name": None}]}]

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    settings = {"name": "en", "split": "test[:5]", "revision": "v1", "streaming": True}
    rows = rows_of("org/set-1.5", **settings)
    assert rows == [("org/set-1.5[0]", {"prompt": "a", "turns": [{"role": "user"}]})]
    expected = {key: settings[key] for key in ("split", "revision", "streaming")}
    assert calls == [(("org/set-1.5", "en"), expected)]


def test_a_hub_that_cannot_be_reached_says_so_at_once_when_offline(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    start = time.monotonic()
    with pytest.raises(ValueError, match=r"cannot load the dataset org/none .*hf auth login"):
        rows_of("org/none")
    assert time.monotonic() - start < 5


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({}, r"\['a', 'b'\]; check .*`name`"),
        ({"name": "c"}, r"'c' not found. Available: \['a', 'b'\]; check"),
        ({"name": "a", "split": "dev"}, r"one of \['train'\]; check .*`split`"),
        (
            {"name": "a", "split": "train[:1]", "streaming": True},
            r"Available splits: \['train'\]; check .*slices do not stream",
        ),
    ],
)
def test_a_wrong_configuration_or_split_of_a_dataset_names_those_there_are(
    settings: dict[str, Any], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in "ab":
        (tmp_path / f"repo/{name}").mkdir(parents=True)
        jsonl(tmp_path / f"repo/{name}/x.jsonl", ROWS)
    (tmp_path / "repo/README.md").write_text(
        "---\nconfigs:\n- config_name: a\n  data_files: a/*.jsonl\n"
        "- config_name: b\n  data_files: b/*.jsonl\n---\n"
    )
    load_dataset = datasets.load_dataset
    monkeypatch.setattr(
        datasets,
        "load_dataset",
        lambda path, name, **kwargs: load_dataset(
            str(tmp_path / "repo"), name, cache_dir=str(tmp_path / "cache"), **kwargs
        ),
    )
    with pytest.raises(ValueError, match=message) as error:
        rows_of("org/set", **settings)
    assert "\n" not in str(error.value)


def test_a_dataset_that_is_a_script_is_refused_with_a_cure(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def load_dataset(*args: Any, **kwargs: Any) -> None:
        raise RuntimeError("Dataset scripts are no longer supported, but found set.py")

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    with pytest.raises(ValueError, match=r"found set\.py; .*code of a dataset is never run"):
        rows_of("org/set")

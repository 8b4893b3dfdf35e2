"""Stray files in a folder: hidden and metadata files are passed over, and counted in one line."""

import json
from pathlib import Path

import datasets
import pytest

from headstart.configs.schema import SourceConfig
from headstart.data.prompts import load_prompts
from headstart.data.sources import read_rows

STRAY = {
    "._good.jsonl": b"\x00\x05\x16\x07Mac OS X",
    ".hidden/rows.jsonl": b'{"prompt": "hidden"}\n',
    "__MACOSX/good.jsonl": b"\x00\x05\x16\x07",
    "dataset_infos.json": b'{"default": {"features": {"text": {}}}}',
    "dataset_info.json": b'{"features": {}}',
    "metadata.json": b'{"made": "today"}',
    ".cache/huggingface/download/good.jsonl.metadata": b"x",
    ".ipynb_checkpoints/good-checkpoint.jsonl": b'{"prompt": "an older one"}\n',
    "sub/dataset_info.json": b"{}",
}


def good(folder: Path) -> Path:
    (folder / "sub").mkdir(parents=True)
    (folder / "good.jsonl").write_text('{"prompt": "one"}\n{"prompt": "two"}\n')
    (folder / "sub" / "more.csv").write_text("prompt,id\nthree,3\n")
    return folder


def texts(path: Path | str) -> list[str]:
    return [prompt.text for prompt in load_prompts(str(path))]


def put(folder: Path, name: str) -> None:
    (folder / name).parent.mkdir(parents=True, exist_ok=True)
    (folder / name).write_bytes(STRAY[name])


@pytest.mark.parametrize("name", STRAY)
def test_a_folder_with_a_stray_file_gives_its_data_files(name: str, tmp_path: Path) -> None:
    folder = good(tmp_path / "data")
    put(folder, name)
    assert texts(folder) == ["one", "two", "three"]


def test_all_stray_files_together_are_counted_in_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = good(tmp_path / "data")
    for name in STRAY:
        put(folder, name)
    assert texts(folder) == ["one", "two", "three"]
    [line] = capsys.readouterr().out.splitlines()
    # But for the one that is of no kind that is read.
    assert line.startswith(f"{folder}: {len(STRAY) - 1} hidden or metadata files passed over")


def test_a_glob_that_matches_metadata_gives_its_data_files(tmp_path: Path) -> None:
    folder = good(tmp_path / "data")
    put(folder, "dataset_infos.json")
    (folder / "rows.json").write_text('[{"prompt": "four"}]')
    assert texts(folder / "*.json") == ["four"]
    assert texts(folder / "*.json*") == ["one", "two", "four"]
    assert texts(folder / "**" / "*.*") == ["one", "two", "four", "three"]


@pytest.mark.parametrize("state", ['{"step": 3}', "[1]", '{"cut": '])
def test_a_state_of_another_program_makes_no_saved_dataset(state: str, tmp_path: Path) -> None:
    folder = good(tmp_path / "data")
    (folder / "state.json").write_text(state)
    put(folder, "dataset_info.json")
    assert texts(folder) == ["one", "two", "three"]


def test_saved_datasets_are_read_as_before_alone_and_below_a_folder(tmp_path: Path) -> None:
    for name in "ab":
        datasets.Dataset.from_list([{"prompt": name}]).save_to_disk(str(tmp_path / "all" / name))
    assert texts(tmp_path / "all" / "a") == ["a"]
    assert texts(tmp_path / "all") == ["a", "b"]


def test_what_a_user_names_is_read_though_it_is_hidden_or_called_metadata(tmp_path: Path) -> None:
    hidden = good(tmp_path / ".cache" / "data")
    assert texts(hidden) == ["one", "two", "three"]
    assert texts(hidden / "*.jsonl") == ["one", "two"]
    (tmp_path / "metadata.json").write_text(json.dumps([{"prompt": "mine"}]))
    assert texts(tmp_path / "metadata.json") == ["mine"]


def test_a_folder_of_stray_files_alone_holds_no_prompts(tmp_path: Path) -> None:
    put(tmp_path, "._good.jsonl")
    put(tmp_path, "metadata.json")
    with pytest.raises(ValueError, match="no prompt file"):
        list(read_rows(SourceConfig(path=str(tmp_path))))

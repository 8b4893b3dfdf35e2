"""Folders that hold what this program did not make: it stays, whatever its name."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from headstart.common import children
from headstart.common.children import own_name, remove_left_behind
from headstart.common.files import PART, atomic_folder, lock_folder
from headstart.configs.schema import EvalConfig
from headstart.eval.measurements import Measurements
from headstart.eval.report import run_evaluation
from headstart.heads.target import Target
from headstart.serve import publish
from headstart.serve.publish import Publication, build_folder
from headstart.train.checkpoints import checkpoints
from headstart.train.run_folder import RunRefused, open_run
from tests.helpers.runs import tiny_config

GONE = f"{children.HOST}.4194399.0123abcd"  # a process that there is not: ids end before


def folder_with(path: Path, text: str = "mine") -> Path:
    path.mkdir(parents=True)
    (path / "notes.txt").write_text(text)
    return path


@pytest.mark.parametrize("name", ["thesis.part", "film.2024.part", "step-000009.12345.part"])
def test_a_part_folder_of_somebody_elses_survives_a_resumption(name: str, tmp_path: Path) -> None:
    theirs = [folder_with(tmp_path / name), folder_with(tmp_path / "checkpoints" / name)]
    open_run(tiny_config(tmp_path), resume=True, processes=1)
    assert all((path / "notes.txt").read_text() == "mine" for path in theirs)


def test_a_file_that_ends_in_part_ends_no_resumption(tmp_path: Path) -> None:
    (tmp_path / "download.part").write_text("mine")
    open_run(tiny_config(tmp_path), resume=True, processes=1)
    assert (tmp_path / "download.part").read_text() == "mine"


def test_what_a_killed_process_was_writing_is_removed(tmp_path: Path) -> None:
    ours = folder_with(tmp_path / "checkpoints" / f"step-000009.{GONE}.part")
    open_run(tiny_config(tmp_path), resume=True, processes=1)
    assert not ours.exists()


ALIVE = ["other.4194399.0123abcd", f"{children.HOST}.1.aaaaaaaa"]


@pytest.mark.parametrize("suffix", ALIVE)
def test_what_another_machine_or_a_living_process_is_writing_stays(
    suffix: str, tmp_path: Path
) -> None:
    theirs = folder_with(tmp_path / f"export.{suffix}.part")
    remove_left_behind(tmp_path, PART)
    assert theirs.exists()


def test_two_machines_with_one_process_id_write_beside_each_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with atomic_folder(tmp_path / "head") as ours:
        (ours / "a").write_text("ours")
        monkeypatch.setattr(children, "HOST", "other")
        monkeypatch.setattr(children, "TOKEN", "fedcba98")
        with atomic_folder(tmp_path / "head") as theirs:
            assert ours != theirs
            (theirs / "b").write_text("theirs")
        assert (ours / "a").read_text() == "ours"
    assert [path.name for path in (tmp_path / "head").iterdir()] == ["a"], "the last one counts"


def test_a_link_with_the_name_of_a_left_folder_takes_nothing_with_it(tmp_path: Path) -> None:
    users = folder_with(tmp_path / "home")
    (tmp_path / f"head.{GONE}.part").symlink_to(users)
    remove_left_behind(tmp_path, PART)
    assert (users / "notes.txt").read_text() == "mine"


def test_folders_that_only_begin_as_checkpoints_are_none(tmp_path: Path) -> None:
    folder = tmp_path / "checkpoints"
    for name in ("step-by-step-notes", "step-000004-keep", "step-000008"):
        folder_with(folder / name)
    (folder / "step-000010").symlink_to(folder / "step-by-step-notes")
    assert [path.name for path in checkpoints(folder)] == ["step-000008"]


def test_an_earlier_folder_of_somebody_elses_survives_a_new_head(tmp_path: Path) -> None:
    theirs = folder_with(tmp_path / ".head.earlier")
    for text in ("first", "second"):
        with atomic_folder(tmp_path / "head") as work:
            (work / "notes.txt").write_text(text)
    assert (theirs / "notes.txt").read_text() == "mine"
    assert (tmp_path / "head" / "notes.txt").read_text() == "second"


@pytest.mark.parametrize(
    "theirs", [".git/HEAD", "thesis.tex", "evaluation/notes.txt", "evaluation/old/x.json"]
)
def test_publishing_replaces_no_folder_that_holds_something_else(
    theirs: str, tmp_path: Path
) -> None:
    out = tmp_path / "clone"
    (out / publish.EVALUATION).mkdir(parents=True)
    (out / publish.SETTINGS).touch()
    (out / theirs).parent.mkdir(exist_ok=True)
    (out / theirs).write_text("mine")
    with pytest.raises(ValueError, match="would be lost"):
        build_folder(Publication(tmp_path / "run", "org/head"), out)
    assert (out / theirs).read_text() == "mine"


def test_hours_of_measurements_are_moved_aside_and_not_wiped(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "measurements.jsonl"
    for texts in (3, 2, 0, 1):  # the third was stopped before its first text
        kept = Measurements(path, {"texts": texts}, resume=False)
        for number in range(texts):
            kept.add({"id": str(number)})
    lines = {one.name: len(one.read_text().splitlines()) - 1 for one in tmp_path.iterdir()}
    assert lines == {"measurements.1.jsonl": 3, "measurements.2.jsonl": 2, "measurements.jsonl": 1}
    assert "measurements.2.jsonl" in capsys.readouterr().out


def test_two_evaluations_do_not_mix_their_lines(tiny: Target, tmp_path: Path) -> None:
    (tmp_path / "p.jsonl").write_text(json.dumps({"prompt": "xyz"}) + "\n")
    chosen = EvalConfig(
        prompts=str(tmp_path / "p.jsonl"), num_assistant_tokens=[2], max_new_tokens=4,
        decoders=["lookup"],
    )  # fmt: skip
    path = tmp_path / "out" / "measurements.jsonl"
    kept = Measurements(path, {}, resume=False)
    kept.add({"id": "of the first"})
    before = path.read_text()
    with lock_folder(path.parent), pytest.raises(ValueError, match="another process works in"):
        run_evaluation(tiny, {}, chosen, path.parent)
    assert path.read_text() == before


def test_half_written_files_of_a_living_process_survive_another_at_work(tmp_path: Path) -> None:
    script = (
        "import sys; from pathlib import Path; from headstart.common.files import atomic_file\n"
        "with atomic_file(Path(sys.argv[1])) as work:\n"
        "    work.write_text('whole'); print('ready', flush=True); sys.stdin.read()"
    )
    path = tmp_path / "index.json"
    command = [sys.executable, "-c", script, str(path)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as writer:
        assert writer.stdout is not None
        assert writer.stdout.readline() == b"ready\n"
        with lock_folder(tmp_path):
            pass
        writer.communicate(b"")
    assert writer.returncode == 0
    assert path.read_text() == "whole"


def test_names_of_the_time_being_tell_process_and_machine() -> None:
    name = own_name("head", PART)
    assert name == f"head.{children.HOST}.{os.getpid()}.{children.TOKEN}.part"


@pytest.mark.parametrize("name", ["head/main.py", "config.yaml"])
def test_a_run_replaces_nothing_that_is_of_no_run(name: str, tmp_path: Path) -> None:
    """The folder of a project: its `head` was deleted when the training had one to write."""
    theirs = tmp_path / name
    theirs.parent.mkdir(exist_ok=True)
    theirs.write_text("mine: 1\n")
    with pytest.raises(RunRefused, match="main" if "main" in name else "config"):
        open_run(tiny_config(tmp_path), resume=False, processes=1)
    assert theirs.read_text() == "mine: 1\n"


def test_a_place_that_cannot_be_written_to_is_not_called_full(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    refused = pytest.raises(OSError, match=r"file/run could not be written.* name a place")
    with refused, atomic_folder(tmp_path / "file" / "run"):
        pass

"""Links that a stranger's folder brings: none is followed to where something would be written."""

import json
import os
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from headstart.common.files import (
    atomic_file,
    atomic_folder,
    content_sha256,
    is_locked,
    lock_folder,
    write_atomically,
)
from headstart.data.store import ActivationStore
from headstart.eval.measurements import Measurements
from headstart.heads.loading import load_target_config
from headstart.train.checkpoints import check_checkpoint
from headstart.train.run_folder import (
    RunRefused,
    append_metrics,
    find_runs,
    open_run,
    read_status,
    run_folder,
)
from tests.helpers.checkpoints import checkpoint, family
from tests.helpers.runs import tiny_config

KEPT = "what the user wrote"


@pytest.fixture
def users(tmp_path: Path) -> Path:
    """A file of the user's, outside every folder that this program is to work in."""
    path = tmp_path / "home" / "notes.txt"
    path.parent.mkdir()
    path.write_text(KEPT)
    return path


def test_a_lock_that_is_a_link_empties_no_file(tmp_path: Path, users: Path) -> None:
    run = tmp_path / "run"
    run.mkdir()
    (run / ".lock").symlink_to(users)
    with pytest.raises(ValueError, match=r"\.lock"), lock_folder(run):
        pass
    assert users.read_text() == KEPT


def test_a_lock_that_is_a_hard_link_empties_no_file(tmp_path: Path, users: Path) -> None:
    run = tmp_path / "run"
    run.mkdir()
    os.link(users, run / ".lock")
    with lock_folder(run):
        assert is_locked(run)
    assert users.read_text() == KEPT


def test_a_lock_that_is_a_pipe_holds_nobody_up(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / ".lock")
    with pytest.raises(ValueError, match=r"\.lock"), lock_folder(tmp_path):
        pass


def test_a_lock_that_is_a_dangling_link_makes_no_file(tmp_path: Path) -> None:
    run = tmp_path / "run"
    run.mkdir()
    (run / ".lock").symlink_to(tmp_path / "authorized_keys")
    with pytest.raises(ValueError, match=r"\.lock"), lock_folder(run):
        pass
    assert not (tmp_path / "authorized_keys").exists()


def test_one_run_with_a_linked_lock_hides_no_other(tmp_path: Path, users: Path) -> None:
    for name in ("good", "bad"):
        with run_folder(tmp_path / name, "training"):
            pass
    status = json.loads((tmp_path / "bad" / "status.json").read_text()) | {"state": "running"}
    (tmp_path / "bad" / "status.json").write_text(json.dumps(status))
    (tmp_path / "bad" / ".lock").unlink()
    (tmp_path / "bad" / ".lock").symlink_to(users)
    views, damaged = find_runs(tmp_path)
    assert [view.folder.name for view in views] == ["good"]
    assert [folder.name for folder in damaged] == ["bad"]
    with pytest.raises(ValueError, match=r"\.lock"):
        read_status(tmp_path / "bad")


def test_a_configuration_that_is_a_link_is_not_written_through(tmp_path: Path, users: Path) -> None:
    run = tmp_path / "run"
    run.mkdir()
    (run / "config.yaml").symlink_to(users)
    with pytest.raises(RunRefused, match=r"config\.yaml"):
        open_run(tiny_config(run), resume=False, processes=1)
    users.write_text(of_a_run := "train: {steps: 1}\n")  # such a one is replaced
    open_run(tiny_config(run), resume=False, processes=1)
    assert users.read_text() == of_a_run
    assert not (run / "config.yaml").is_symlink()


def test_a_folder_of_the_time_being_cannot_be_laid_out_beforehand(
    tmp_path: Path, users: Path
) -> None:
    host = os.uname().nodename
    (tmp_path / f".writing.{host}.{os.getpid()}").symlink_to(users.parent)
    (tmp_path / f"head.{os.getpid()}.part").symlink_to(users.parent)
    write_atomically(tmp_path / "notes.txt", "new")
    with atomic_file(tmp_path / "more.txt") as work:
        assert work.resolve().parent != users.parent
        work.write_text("new")
    with atomic_folder(tmp_path / "head") as folder:
        (folder / "notes.txt").write_text("new")
    assert users.read_text() == KEPT
    assert [path.name for path in users.parent.iterdir()] == [users.name]


def test_a_folder_to_replace_that_is_a_link_keeps_what_it_points_to(
    tmp_path: Path, users: Path
) -> None:
    (tmp_path / "head").symlink_to(users.parent)
    with pytest.raises(ValueError, match="head is a link"), atomic_folder(tmp_path / "head"):
        pass
    assert users.read_text() == KEPT


@pytest.mark.parametrize("name", ["checkpoints", "head", "metrics.jsonl"])
def test_a_run_folder_with_a_link_in_it_is_refused_before_anything_is_written(
    name: str, tmp_path: Path, users: Path
) -> None:
    run, other = tmp_path / "run", users.parent / "step-000001"
    run.mkdir()
    other.mkdir()
    (run / name).symlink_to(users if name == "metrics.jsonl" else users.parent)
    with pytest.raises(ValueError, match=f"{name} is a link"):
        open_run(tiny_config(run), resume=True, processes=1)
    assert not (run / "config.yaml").exists()
    assert other.is_dir()


def test_no_line_is_appended_through_a_link(tmp_path: Path, users: Path) -> None:
    (tmp_path / "metrics.jsonl").symlink_to(users)
    with pytest.raises(ValueError, match=r"metrics\.jsonl"):
        append_metrics(tmp_path, {"step": 1, "loss": 1.0})
    kept = Measurements(tmp_path / "measurements.jsonl", {}, resume=False)
    kept.path.unlink()
    kept.path.symlink_to(users)
    with pytest.raises(ValueError, match=r"measurements\.jsonl"):
        kept.add({"id": "x"})
    assert users.read_text() == KEPT


@pytest.mark.parametrize("name", ["../../secret", "/etc/passwd", "a/b", "..", "", None, 7, "a\0b"])
def test_an_index_that_names_a_path_reads_no_file_of_it(name: object, tmp_path: Path) -> None:
    index = {"format": 2, "shards": [{"file": name, "sha256": "0", "documents": []}]}
    index["sha256"] = content_sha256(index)
    (tmp_path / "index.json").write_text(json.dumps(index))
    with pytest.raises(ValueError, match=r"index\.json names"):
        ActivationStore(tmp_path)


def test_a_state_that_names_a_path_reads_no_file_of_it(tmp_path: Path, users: Path) -> None:
    folder = tmp_path / "checkpoints" / "step-000001"
    folder.mkdir(parents=True)
    state: dict[str, Any] = {"files": {f"../../../{users.parent.name}/{users.name}": "0"}}
    state |= {"sha256": content_sha256(state)}
    (folder / "state.json").write_text(json.dumps(state))
    with pytest.raises(ValueError, match=r"state\.json names"):
        check_checkpoint(folder)


def test_an_index_of_weights_that_names_a_path_is_refused(tmp_path: Path) -> None:
    from headstart.heads.loading import load_target_config, tiny_target

    folder = checkpoint(tmp_path / "target", tiny_target("tiny-gemma4"))
    index = {"metadata": {}, "weight_map": {"model.norm.weight": "../../other.safetensors"}}
    (tmp_path / "target" / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(ValueError, match=r"index\.json"):
        load_target_config(folder)


def test_an_index_of_any_length_names_files_of_its_own_folder_alone(tmp_path: Path) -> None:
    """A padded one was passed over, and the weights outside were read."""
    folder = Path(checkpoint(tmp_path / "target", family("gemma4")))
    keys = load_file(folder / "model.safetensors").keys()
    (folder / "model.safetensors").rename(tmp_path / "outside.safetensors")
    index = {"metadata": {}, "weight_map": dict.fromkeys(keys, "../outside.safetensors")}
    text = " " * 2**20 + json.dumps(index)
    (folder / "model.safetensors.index.json").write_text(text)
    with pytest.raises(ValueError, match="outside"):
        load_target_config(str(folder))

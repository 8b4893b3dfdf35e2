"""A crash, or a power cut, between any two steps of a replacement: one whole content is found."""

import os
from pathlib import Path
from typing import Any

import pytest
import torch

from headstart.common import files
from headstart.common.children import HOST
from headstart.common.files import atomic_file, atomic_folder
from headstart.configs.loader import save_config
from headstart.configs.schema import HeadConfig
from headstart.eval.asked import asked_by_heads
from headstart.heads.loading import byte_tokenizer, load_target, tiny_target
from headstart.heads.pairing import build_assistant
from headstart.heads.saving import load_assistant, save_assistant
from headstart.heads.target import Target
from headstart.serve import publish
from tests.helpers.checkpoints import checkpoint
from tests.helpers.runs import tiny_config


class Crash(BaseException):
    """The process ends here; nothing is tidied up."""


def write(folder: Path, text: str) -> None:
    with atomic_folder(folder) as work:
        (work / "x").write_text(text)


def crash_at(monkeypatch: pytest.MonkeyPatch, wanted: str) -> None:
    """The process of the next replacement ends before its folder gets the name `wanted`."""
    rename = Path.rename

    def ending(self: Path, to: Path) -> Path:
        if Path(to).name == wanted:
            monkeypatch.setattr(files.shutil, "rmtree", lambda *args, **kwargs: None)
            raise Crash
        return rename(self, to)

    monkeypatch.setattr(Path, "rename", ending)


def test_a_head_that_a_crash_left_aside_is_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = Target(tiny_target("tiny-gemma4"), byte_tokenizer(), "tiny-gemma4")
    fresh: Any = build_assistant(target, HeadConfig())
    save_assistant(fresh, target.table, tmp_path / "head", 4, torch.float32)
    wanted = load_assistant(tmp_path / "head", torch.float32).state_dict()
    with monkeypatch.context() as patch:
        crash_at(patch, "head")
        with pytest.raises(Crash):
            save_assistant(fresh, target.table, tmp_path / "head", 4, torch.float32)
    assert not (tmp_path / "head").exists()
    found = load_assistant(tmp_path / "head", torch.float32).state_dict()
    assert all(torch.equal(found[name], tensor) for name, tensor in wanted.items())


def test_a_target_that_a_crash_left_aside_is_found(tmp_path: Path) -> None:
    folder = Path(checkpoint(tmp_path / "target", tiny_target("tiny-gemma4")))
    folder.rename(tmp_path / f".target.{HOST}.4194399.0123abcd.earlier")
    assert load_target(str(folder)).table.shape[0] > 0


def test_the_next_writing_puts_the_earlier_content_back_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(tmp_path / "head", "first")
    with monkeypatch.context() as patch:
        crash_at(patch, "head")
        with pytest.raises(Crash):
            write(tmp_path / "head", "second")
    with pytest.raises(OSError, match="could not be written"), atomic_folder(tmp_path / "head"):
        raise OSError("no space left")
    assert (tmp_path / "head" / "x").read_text() == "first"


def test_another_process_that_puts_it_back_does_not_fail_the_writer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(tmp_path / "head", "first")
    rename, calls = Path.rename, []

    def meeting(self: Path, to: Path) -> Path:
        calls.append(to)
        if len(calls) == 2:  # between the two renames
            files.put_back(tmp_path / "head")
        return rename(self, to)

    monkeypatch.setattr(Path, "rename", meeting)
    write(tmp_path / "head", "second")
    assert (tmp_path / "head" / "x").read_text() == "second"


def test_the_disk_knows_of_a_new_folder_before_the_earlier_one_goes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(tmp_path / "head", "first")
    steps: list[str] = []
    sync, remove = os.fsync, files.shutil.rmtree

    def synced(descriptor: int) -> None:
        steps.append(f"sync {Path(os.readlink(f'/proc/self/fd/{descriptor}')).name}")
        sync(descriptor)

    def removed(path: Path, **kwargs: Any) -> None:
        if Path(path).is_dir():
            steps.append(f"remove {path.name.split('.')[-1]}")
        remove(path, **kwargs)

    monkeypatch.setattr(os, "fsync", synced)
    monkeypatch.setattr(files.shutil, "rmtree", removed)
    write(tmp_path / "head", "second")
    assert steps[-2:] == [f"sync {tmp_path.name}", "remove earlier"]
    assert steps[0] == "sync x"
    assert steps[1].endswith(".part"), "names within the folder too"


def test_the_disk_knows_the_name_of_a_new_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    synced: list[str] = []
    monkeypatch.setattr(
        os, "fsync", lambda d: synced.append(Path(os.readlink(f"/proc/self/fd/{d}")).name)
    )
    with atomic_file(tmp_path / "index.json") as work:
        work.write_text("{}")
    assert synced == ["index.json", tmp_path.name]


def test_a_head_that_a_crash_left_aside_is_found_by_all_that_ask_for_it(tmp_path: Path) -> None:
    """publish saw no finished head, and an evaluation not how the head was asked."""
    run = tmp_path / "run"
    run.mkdir()
    save_config(tiny_config(run), run / "config.yaml")
    aside = run / f".head.{HOST}.4194399.0123abcd.earlier"
    write(aside, "first")
    (aside / "config.json").write_text("{}")
    (run / "summary.json").write_text("{}")
    publish._Run(run)  # looks for the head
    assert (run / "head" / "x").read_text() == "first"
    (run / "head").rename(aside)
    with pytest.raises(ValueError, match="head"):  # it is none: but it was looked at
        asked_by_heads([str(run / "head")])
    assert (run / "head" / "x").read_text() == "first"

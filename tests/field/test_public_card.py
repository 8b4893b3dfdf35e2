"""What is published names repositories of the Hub, and no path of the machine it was made on."""

import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from huggingface_hub import ModelCard

from headstart.cli.main import main
from headstart.configs.loader import load_config
from tests.helpers.checkpoints import make_adapter
from tests.helpers.runs import REPO, write_tuned_run

PRIVATE = "somebody"  # the name of a user, in all paths of the run


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A home folder with a target, an adapter of it, prompts, and a finished run."""
    home = tmp_path_factory.mktemp("home") / PRIVATE
    write_tuned_run(home)
    return home


BASE = "publish.base_models=org/tiny"


def publish(home: Path, out: Path, *settings: str, repo_id: str = REPO) -> int:
    return main(["publish", str(home / "run"), repo_id, "--plan", f"output_dir={out}", *settings])


@pytest.mark.parametrize(
    "name",
    ["HOME/model", "~/model", "model", "org/", "org/a/b", "./model", "org/model@/x", "a b/c"],
)
@pytest.mark.parametrize("is_base", [True, False], ids=["base", "repository"])
def test_a_path_for_an_id_is_refused_before_anything_is_written(
    is_base: bool, name: str, home: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    name = name.replace("HOME", str(home))
    if is_base:
        assert publish(home, tmp_path / "out", f"publish.base_models={name}") == 1
    else:
        assert publish(home, tmp_path / "out", BASE, repo_id=name) == 1
    assert ("publish.base_models=" if is_base else "give ") + "ORG/NAME" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_relative_folder_is_no_id(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """It looks like one: PARENT/NAME."""
    monkeypatch.chdir(home.parent)
    assert publish(home, tmp_path / "out", f"publish.base_models={PRIVATE}/model") == 1
    assert "a path of this machine" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_the_second_base_model_is_checked_too(
    home: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    both = f"publish.base_models=[org/tiny, {home / 'model'}]"
    assert publish(home, tmp_path / "out", both) == 1
    assert "publish.base_models" in capsys.readouterr().err


def test_no_file_that_is_published_has_a_path_of_the_machine(home: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert publish(home, out, BASE) == 0
    held = [path for path in out.rglob("*") if path.is_file() and PRIVATE in text_of(path)]
    assert held == []
    card = ModelCard.load(out / "README.md")
    assert card.data.base_model == ["org/tiny"]
    assert "prompts from train.jsonl" in card.text
    report = json.loads((out / "evaluation" / "report.json").read_text())
    original = json.loads((home / "run" / "eval" / "report.json").read_text())
    assert report["environment"]["target"] == "org/tiny"
    assert report["environment"]["prompt_set"]["name"] == "eval.jsonl"
    assert {r["head"] for r in report["results"]} == {REPO}
    figures = [[r["speedup"] for r in one["results"]] for one in (report, original)]
    assert figures[0] == figures[1]
    settings = yaml.safe_load((out / "training_config.yaml").read_text())
    assert (settings["output_dir"], settings["target"]["name"]) == ("run", "org/tiny")
    assert load_config(out / "training_config.yaml").train.max_steps == 6
    noted = json.loads((out / "config.json").read_text())["headstart_target"]
    assert noted["name"] == "org/tiny"


def text_of(path: Path) -> str:
    return path.read_bytes().decode("latin-1")


def test_a_damaged_report_is_named(
    home: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for content in (b"", b"\xff\xfe", b"[]"):
        (tmp_path / "report.json").write_bytes(content)
        assert publish(home, tmp_path / "out", BASE, f"publish.report={tmp_path}") == 1
        assert str(tmp_path / "report.json") in capsys.readouterr().err


def test_the_revision_of_a_base_model_is_no_part_of_its_name(home: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert publish(home, out, f"{BASE}@v1.0") == 0
    card = ModelCard.load(out / "README.md")
    assert card.data.base_model == ["org/tiny"]
    assert 'from_pretrained("org/tiny", dtype="auto", revision="v1.0")' in card.text


def test_a_repository_may_have_the_name_of_a_folder(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As that of the plan before."""
    monkeypatch.chdir(tmp_path)
    for _ in range(2):
        assert publish(home, Path(REPO), BASE) == 0


@pytest.fixture
def moved(home: Path) -> Any:
    """The target and its adapter under other names, for as long as a test runs."""
    for name in ("model", "lora"):
        (home / name).rename(home / f"{name}-renamed")
    yield home
    for name in ("model", "lora"):
        (home / f"{name}-renamed").rename(home / name)


def test_a_run_whose_target_moved_is_published_from_where_it_is(
    moved: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    assert publish(moved, out, BASE) == 1
    assert "target.name=DIR" in capsys.readouterr().err
    now = (f"target.name={moved}/model-renamed", f"target.adapters={moved}/lora-renamed")
    assert publish(moved, out, BASE, *now) == 0
    assert (out / "tokenizer.json").is_file()
    assert [path for path in out.rglob("*") if path.is_file() and PRIVATE in text_of(path)] == []


def test_another_target_is_not_taken_for_the_one_that_moved(
    moved: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Nor the same one with another adapter."""
    renamed = f"target.name={moved}/model-renamed"
    other = f"target.adapters={make_adapter(tmp_path / 'other', seed=1)}"
    assert publish(moved, tmp_path / "out", BASE, renamed, other) == 1
    assert "is not the target of the report" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()

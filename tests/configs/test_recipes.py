"""Recipes by name: which file is read, what a name may hide, and what the commands print."""

import re
from pathlib import Path

import pytest

from headstart.cli.main import main
from headstart.configs.loader import load_config
from headstart.configs.recipes import (
    OF_ACCELERATE,
    SHIPPED,
    describe_recipe,
    find_config,
    recipe_names,
)
from headstart.data.prompts import load_prompt_set, load_prompts
from headstart.train.memory import Launch, peaks
from headstart.train.plan import run_shapes

OWN = "train: {max_steps: 7, warmup_steps: 2}\n"
RECIPES = [name for name in recipe_names() if not name.startswith(OF_ACCELERATE)]


@pytest.fixture(autouse=True)
def empty(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current folder of each test, in which nothing is."""
    (tmp_path / "empty").mkdir()
    monkeypatch.chdir(tmp_path / "empty")
    return tmp_path / "empty"


def test_every_file_of_configs_is_found_by_its_name() -> None:
    assert {find_config(name) for name in recipe_names()} == set(SHIPPED.glob("*.yaml"))


@pytest.mark.parametrize("name", RECIPES)
def test_no_recipe_depends_on_the_current_folder(name: str) -> None:
    config = load_config(name)
    assert config == load_config(SHIPPED / f"{name}.yaml")
    assert config.output_dir == Path("runs") / name
    for source in config.data.prompts:
        assert len(load_prompts(source.model_copy(update={"limit": 2}))) == 2
    assert config.eval is not None
    assert load_prompt_set(config.eval.prompts)


@pytest.mark.parametrize("file", ["tiny.yaml", "tiny"])
def test_a_file_of_the_current_folder_wins_over_the_recipe_of_its_name_and_is_named(
    file: str, empty: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (empty / file).write_text(OWN)
    assert load_config("tiny").train.max_steps == 7
    assert capsys.readouterr().out.startswith(f"{file} of the current folder is read, not")


def test_a_path_to_a_run_file_is_read_without_a_word(
    empty: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (empty / "tiny.yaml").write_text(OWN)
    for path in ("tiny.yaml", "./tiny.yaml", empty / "tiny.yaml"):
        assert load_config(path).train.max_steps == 7
    assert capsys.readouterr().out == ""


def test_a_file_of_no_recipes_name_is_read_by_its_name_too(
    empty: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (empty / "mine.yaml").write_text(OWN)
    assert load_config("mine").train.max_steps == 7
    assert capsys.readouterr().out == ""


def test_a_folder_of_a_recipes_name_hides_no_recipe(empty: Path) -> None:
    (empty / "tiny").mkdir()
    assert find_config("tiny") == SHIPPED / "tiny.yaml"


@pytest.mark.parametrize("name", ["tinny", "", ".."])
def test_an_unknown_recipe_is_refused_with_the_names_of_all(name: str) -> None:
    with pytest.raises(ValueError, match=r"no configuration file .*tiny"):
        load_config(name)


def test_configs_list_names_every_recipe_and_what_it_is_for(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert main(["configs", "list"]) == 0
    said = capsys.readouterr().out
    assert [name for name in recipe_names() if name not in said] == []
    assert "A tiny random Gemma 4" in said


def test_configs_show_prints_the_file_that_the_name_reads(
    empty: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["configs", "show", "tiny"]) == 0
    assert capsys.readouterr().out == (SHIPPED / "tiny.yaml").read_text()
    (empty / "tiny.yaml").write_text(OWN)
    assert main(["configs", "show", "tiny"]) == 0
    output = capsys.readouterr()
    assert output.out == OWN, "it can be kept as a file"
    assert "tiny.yaml of the current folder" in output.err
    assert main(["configs", "show", "absent.yaml"]) == 1
    assert "no configuration file absent.yaml" in capsys.readouterr().err


def test_a_run_is_planned_by_the_name_of_a_recipe(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", "--config", "tiny", "--plan"]) == 0
    assert "rows in all" in capsys.readouterr().out


HARDWARE = re.compile(r"(?:one GPU|one node of (\d+) GPUs) of (\d+) GB(?: \((DDP|FSDP2)\))?")


@pytest.mark.parametrize("name", [name for name in RECIPES if name.startswith("gemma4-")])
def test_a_recipe_of_gemma_4_fits_the_hardware_that_it_names(name: str) -> None:
    """By its plan. A card of 80 GB has 79.6 GiB: what the 74.5 GiB of 80 decimal GB leave is for
    CUDA and for what an allocator loses."""
    said = HARDWARE.search(describe_recipe(name))
    assert said is not None, "the first sentence of its comment names the hardware"
    launch = Launch(int(said[1] or 1), said[3] == "FSDP2")
    config = load_config(name, ["target.dtype=bfloat16", "train.mixed_precision=bf16"])
    found = dict(peaks(config, run_shapes(config), launch))
    assert {"answering", "training"} <= set(found)
    over = {phase: count / 1e9 for phase, count in found.items() if count > int(said[2]) * 1e9}
    assert over == {}

import re
from pathlib import Path

import pytest
import yaml
from accelerate.commands.config.config_args import load_config_from_file

from headstart.configs.loader import dump_config, load_config, load_saved
from headstart.configs.schema import Config

CONFIGS = Path(__file__).resolve().parents[2] / "configs"


ACCELERATE = sorted(CONFIGS.glob("accelerate-*.yaml"))
RECIPES = sorted(set(CONFIGS.glob("*.yaml")) - set(ACCELERATE))


@pytest.mark.parametrize("path", ACCELERATE, ids=lambda p: p.stem)
def test_every_shipped_accelerate_configuration_loads(path: Path) -> None:
    """By accelerate itself, which refuses keys that it does not know."""
    assert load_config_from_file(str(path)).num_processes == 8


@pytest.mark.parametrize("path", RECIPES, ids=lambda p: p.stem)
def test_every_shipped_recipe_loads_and_survives_a_round_trip(path: Path) -> None:
    config = load_config(path)
    assert Config.model_validate(yaml.safe_load(dump_config(config))) == config


def test_overrides_win_over_the_file_and_are_typed() -> None:
    config = load_config(CONFIGS / "tiny.yaml", ["train.max_steps=7", "train.warmup_steps=2"])
    assert (config.train.max_steps, config.train.warmup_steps) == (7, 2)
    assert load_config(CONFIGS / "tiny.yaml", ["eval=null"]).eval is None


@pytest.mark.parametrize(
    ("override", "message"),
    [
        (
            "train.lerning_rate=1",
            "no key train.lerning_rate; the nearest valid key is train.learning_rate",
        ),
        ("trian.steps=1", "no key trian; the nearest valid key is train"),
        ("train.max_steps=many", "train.max_steps: Input should be a valid integer"),
        ("train.warmup_steps=600", "warmup_steps=600 must be below max_steps=60"),
        ("data.temperatures=[-1]", "data: temperatures needs"),
        ("train.max_steps", "not of the form section.key=value"),
    ],
)
def test_a_bad_key_or_value_is_named_with_its_cure(override: str, message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        load_config(CONFIGS / "tiny.yaml", [override])


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"no configuration file .*absent\.yaml"):
        load_config(tmp_path / "absent.yaml")


def test_a_typo_inside_a_source_of_a_list_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"nearest valid key is data.prompts.0.weight"):
        load_config(None, ["data.prompts=[{path: a, wieght: 1}]"])


def test_a_section_that_is_off_is_opened_by_an_override() -> None:
    assert load_config(None).eval is None
    config = load_config(None, ["eval.prompts=held_out.jsonl"])
    assert config.eval is not None
    assert str(config.eval.prompts) == "held_out.jsonl"


def test_one_source_needs_no_list() -> None:
    assert [s.path for s in load_config(None, ["data.prompts=a.jsonl"]).data.prompts] == ["a.jsonl"]


def test_a_run_made_while_a_setting_was_there_is_read_where_it_changed_nothing(
    tmp_path: Path,
) -> None:
    config = load_config(CONFIGS / "tiny.yaml")
    tree = config.model_dump(mode="json")
    tree["train"]["trap"], tree["head"]["tie_start"] = None, "data"
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(tree), encoding="utf-8")
    assert load_saved(path) == config
    tree["train"]["trap"] = "own_key"
    path.write_text(yaml.safe_dump(tree), encoding="utf-8")
    with pytest.raises(ValueError, match=r"train\.trap"):
        load_saved(path)

import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from accelerate.commands.config.config_args import load_config_from_file

from headstart.configs.loader import dump_config, load_config, load_saved
from headstart.configs.renamed import RENAMED, VALUES
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
    hundred = load_config(CONFIGS / "tiny.yaml", ["data.num_conversations=0100"])
    assert hundred.data.num_conversations == 100, "and not 64, as YAML 1.1 has it"


@pytest.mark.parametrize(
    ("override", "message"),
    [
        (
            "train.lerning_rate=1",
            "no key train.lerning_rate; the nearest valid key is train.learning_rate",
        ),
        ("trian.steps=1", "no key trian; the nearest valid key is train"),
        ("train.max_steps=many", "train.max_steps: Input should be a valid integer"),
        ("train.max_minutes=1:30:00", "train.max_minutes: Input should be a valid number"),
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


def move(tree: dict[str, Any], key: str, to: str, values: dict[Any, Any]) -> None:
    """Put what stands at one key of a tree at another, under the other name of its value."""
    *sections, leaf = key.split(".")
    node = tree
    for section in sections:
        if (node := node[section]) is None:
            return
    value = node.pop(leaf)
    *sections, leaf = to.split(".")
    node = tree
    for section in sections:
        node = node.setdefault(section, {})
    node[leaf] = next((before for before, now in values.items() if now == value), value)


LORA = "head.lora={r: 3, lora_alpha: 5, target_modules: [q_proj]}"


@pytest.mark.parametrize(
    ("offset", "precision", "trained"),
    [(0, "bf16", LORA), (-1, "no", LORA), ("mixed", "no", "head.trainable_modules=[mlp]")],
)
def test_a_record_under_the_names_of_before_is_read_as_the_same_run(
    offset: int | str, precision: str, trained: str, tmp_path: Path
) -> None:
    """All of them, each with a value that is not its default."""
    other = [
        f"output_dir={tmp_path}", "seed=3", "head.init_from=org/head",
        "head.on_existing_clusters=rebuild", trained,
        f"data.store={tmp_path}", "data.filter={temperatures: [0.0], categories: [a]}",
        "data.filter.num_conversations=9", "train.max_steps=70", "train.max_packed_length=4096",
        "train.max_anchors=9", "train.multi_step_anchors=3", "train.num_speculative_steps=5",
        "train.step_loss_decay=0.5", f"train.draft_position_offset={offset}",
        "train.early_stopping_patience=4", f"train.mixed_precision={precision}",
        "train.eval_steps=7", "train.save_steps=8", "train.save_total_limit=9",
        "eval.fp32_check_prompts=7",
    ]  # fmt: skip
    config = load_config(CONFIGS / "tiny.yaml", other)
    tree = yaml.safe_load(dump_config(config))
    for before, now in RENAMED.items():
        move(tree, now, before, VALUES.get(before, {}))
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(tree), encoding="utf-8")
    assert load_saved(path) == config
    with pytest.raises(ValueError, match=r"run\.dir is called output_dir now"):
        load_config(path)

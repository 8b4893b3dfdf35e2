"""Conversations that come with Headstart: what they answer, and which runs take them."""

import json
from pathlib import Path
from typing import Any

import pytest

from headstart.cli.main import main
from headstart.configs.loader import load_config
from headstart.configs.recipes import SHIPPED
from headstart.configs.schema import Config, DataConfig, FilterConfig
from headstart.configs.settings import ServerConfig
from headstart.data import conversations
from headstart.data.contamination import remove_contaminated
from headstart.data.conversations import (
    MANIFEST,
    answer_sets,
    find_answers,
    read_folder,
    read_manifest,
    taken_answers,
)
from headstart.data.inspection import inspect_path
from headstart.data.prepare import (
    deal_prompts,
    deal_sampling,
    load_sources,
    prepare_documents,
    run_extract,
    run_regenerate,
    stream_folder,
)
from headstart.data.prompts import load_prompt_set, load_prompts
from headstart.data.regenerate import conversation_settings, make_jobs
from headstart.data.store import ActivationStore
from headstart.heads.loading import load_target, load_target_tokens
from headstart.heads.target import Target
from headstart.serve.card import _prompts
from headstart.train.plan import plan
from tests.helpers.runs import ROOT, tiny_config


@pytest.mark.parametrize("name", answer_sets())
def test_shipped_answers_are_whole_and_no_copies_of_evaluation_prompts(name: str) -> None:
    """Every part is there under its digest, and of each conversation both halves."""
    folder, recipe = find_answers(name), load_config(SHIPPED / f"{name.partition(':')[2]}.yaml")
    assert str(recipe.data.conversations) == name
    rows = list(read_folder(folder))
    assert len(rows) == recipe.data.num_conversations == read_manifest(folder)["conversations"]
    assert {row.temperature for row in rows} == set(recipe.data.temperatures)
    assert all(0 < row.trained <= recipe.data.max_new_tokens for row in rows)
    prompts = {p.id: p for source in recipe.data.prompts for p in load_prompts(source)}
    asked = [prompts[row.id.partition("#")[0]] for row in rows]
    assert recipe.eval is not None
    assert len(remove_contaminated(asked, load_prompt_set(recipe.eval.prompts))[0]) == len(rows)


@pytest.mark.real
@pytest.mark.parametrize("name", answer_sets())
def test_shipped_answers_are_what_their_recipe_asks_for(name: str) -> None:
    """The prompts, their token ids, how each was sampled: as the command that makes them anew."""
    recipe = load_config(SHIPPED / f"{name.partition(':')[2]}.yaml")
    made, data = read_manifest(find_answers(name)), recipe.data
    assert recipe.eval is not None
    tokens = load_target_tokens(recipe.target)
    prompts = deal_prompts(load_sources(data, recipe.eval.prompts), data, recipe.seed)
    jobs = make_jobs(prompts, deal_sampling(data, tokens, prompts), tokens, data)
    asked = conversation_settings(jobs, tokens, data, recipe.seed, extract=False)
    keys = asked.keys() - {"config", "fingerprint", "chat_template_kwargs"}
    assert {key: made[key] for key in keys} == {key: asked[key] for key in keys}


@pytest.mark.real
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_target_of_a_recipe_wrote_its_answers_in_either_dtype(dtype: str) -> None:
    recipe = load_config(SHIPPED / "quickstart.yaml")
    target = load_target(recipe.target.name, dtype)
    assert taken_answers(target, recipe.data).conversations == find_answers("builtin:quickstart")
    rows = stream_folder(find_answers("builtin:quickstart"), target)
    assert {row.temperature for row in rows} == set(recipe.data.temperatures)


@pytest.fixture
def mine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Config:
    """A recipe `mine` with answers of its own, of a checkpoint in bfloat16 that wrote in float32:
    as a machine without instructions for bfloat16 makes them."""
    checkpoint = load_target("tiny-gemma4", "bfloat16")
    checkpoint.model.save_pretrained(tmp_path / "model")
    checkpoint.tokenizer.save_pretrained(tmp_path / "model")
    few = ["data.num_conversations=8", "data.validation_conversations=2", "data.max_new_tokens=6"]
    config = tiny_config(
        tmp_path / "run", f"target.name={tmp_path / 'model'}", *few,
        f"data.cache_dir={tmp_path / 'cache'}",
    )  # fmt: skip
    for folder in ("recipes", "answers"):
        (tmp_path / folder).mkdir()
    asked = config.model_dump(mode="json")
    (tmp_path / "recipes" / "mine.yaml").write_text(json.dumps(asked))
    to_answers = config.model_copy(update={"output_dir": tmp_path / "answers" / "mine"})
    run_regenerate(to_answers, ServerConfig(), extracting=False, device="cpu")
    monkeypatch.setattr(conversations, "SHIPPED", tmp_path / "recipes")
    monkeypatch.setattr(conversations, "_shipped_answers", lambda: tmp_path / "answers")
    return _with(config, conversations=Path("builtin:mine"))


def _with(config: Config, **settings: Any) -> Config:
    data = DataConfig.model_validate(config.data.model_dump() | settings)
    return config.model_copy(update={"data": data})


def _taken(config: Config, target: Target) -> bool:
    return taken_answers(target, config.data).conversations is not None


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_answers_of_the_same_weights_are_taken_in_either_dtype_greedy_ones_to_validate_on(
    dtype: str, mine: Config, capsys: pytest.CaptureFixture[str]
) -> None:
    target = load_target(mine.target.name, dtype)
    training, validation = prepare_documents(target, mine.data, 0, None)
    written = {row.id: row for row in read_folder(find_answers("builtin:mine"))}
    assert {entry.temperature for entry in validation.entries} == {0.0}
    assert {e.id for e in [*training.entries, *validation.entries]} <= written.keys()
    assert {e.source for e in training.entries}.isdisjoint(e.source for e in validation.entries)
    said = capsys.readouterr().out
    assert ("the same weights in float32; here they are bfloat16" in said) == (dtype == "bfloat16")
    assert "answers data.prompts itself" not in said


def test_weights_have_one_fingerprint_a_dtype_wherever_they_are_loaded(mine: Config) -> None:
    """Also the way round: what bfloat16 wrote is known in float32. One weight more, and nothing
    is."""
    loaded = {dtype: load_target(mine.target.name, dtype) for dtype in ("float32", "bfloat16")}
    for target in loaded.values():
        assert [target.dtype_of(other.fingerprint) for other in loaded.values()] == list(loaded)
    other = load_target(mine.target.name, "float32")
    other.layers[0].mlp.up_proj.weight[0, 0] += 1
    assert [loaded[dtype].dtype_of(other.fingerprint) for dtype in loaded] == [None, None]
    assert other.dtype_of(loaded["bfloat16"].fingerprint) is None


def test_another_target_answers_the_prompts_itself_and_says_why(
    mine: Config, capsys: pytest.CaptureFixture[str]
) -> None:
    other = load_target("tiny-gemma4", "float32")  # whose weights were not rounded
    training, _ = prepare_documents(other, mine.data, 0, None)
    assert len(training.entries) == mine.data.num_conversations
    assert "the weights of the target" in capsys.readouterr().out
    vocabulary = load_target("tiny-gemma3", "float32")
    vocabulary.__dict__["tokenizer_hash"] = "another"
    assert not _taken(mine, vocabulary)


@pytest.mark.parametrize(
    "settings",
    [
        {"prompts": ["builtin:chat_train"]},
        {"num_conversations": 4},
        {"max_prompt_tokens": 8},
        {"max_new_tokens": 4},
        {"temperatures": [0.0]},
        {"chat_template_kwargs": {"enable_thinking": True}},
    ],
)
def test_a_setting_that_asks_for_other_answers_is_not_passed_over(
    settings: dict[str, Any], mine: Config, capsys: pytest.CaptureFixture[str]
) -> None:
    target = load_target(mine.target.name, "float32")
    assert not _taken(_with(mine, **settings), target)
    assert f"data.{next(iter(settings))}" in capsys.readouterr().out
    with pytest.raises(ValueError, match=r"data\.filter"):
        _taken(_with(mine, **settings, filter=FilterConfig(num_conversations=1)), target)


def test_what_changes_no_answer_keeps_them(mine: Config) -> None:
    target = load_target(mine.target.name, "float32")
    other = {
        "validation_conversations": 1,
        "teacher_top_k": 4,
        "filter": FilterConfig(num_conversations=2),
    }
    assert _taken(_with(mine, **other), target)
    target.eos_ids = [*target.eos_ids, 9]
    assert not _taken(mine, target)


def test_a_store_goes_before_shipped_answers(mine: Config, tmp_path: Path) -> None:
    to_store = mine.model_copy(update={"output_dir": tmp_path / "store"})
    run_extract(to_store, "builtin:mine", "cpu")
    assert len(ActivationStore(tmp_path / "store").entries) == 8
    stored = _with(mine, store=tmp_path / "store")
    target = load_target(mine.target.name, "float32")
    training, validation = prepare_documents(target, stored.data, 0, None)
    assert training.entries
    assert len(validation.entries) == 2


def test_a_plan_tells_shipped_answers_from_those_that_will_be_written(mine: Config) -> None:
    written = sum(len(row.ids) for row in read_folder(find_answers("builtin:mine")))
    assert plan(mine)["tokens"].startswith(f"{written:,} of builtin:mine")
    assert plan(_with(mine, max_new_tokens=4))["tokens"].startswith("at most ")
    other = mine.model_copy(
        update={"target": mine.target.model_copy(update={"name": "tiny-gemma4"})}
    )
    assert plan(other)["tokens"].startswith("at most ")


def test_an_unknown_name_is_refused_with_those_that_there_are(mine: Config) -> None:
    target, unknown = load_target("tiny-gemma4", "float32"), Path("builtin:quickest")
    for use in (plan, lambda config: taken_answers(target, config.data)):
        with pytest.raises(ValueError, match=r"no built-in conversations builtin:quickest: .*mine"):
            use(_with(mine, conversations=unknown))


def test_shipped_answers_are_inspected_by_their_name(
    mine: Config, capsys: pytest.CaptureFixture[str]
) -> None:
    inspect_path("builtin:mine", examples=0)
    assert "8 of 8" in capsys.readouterr().out


def test_the_folder_of_the_answers_holds_nothing_else() -> None:
    for folder in (ROOT / "data" / "answers").iterdir():
        names = {path.name for path in folder.iterdir()}
        assert MANIFEST in names
        assert all(name == MANIFEST or name.endswith(".parquet") for name in names)


def test_a_card_names_the_prompts_that_shipped_answers_are_to(mine: Config) -> None:
    assert _prompts(mine) == [source.path for source in mine.data.prompts] != []
    assert _prompts(_with(mine, conversations=Path("conversations"))) == []


def test_extract_answers_other_prompts_than_those_of_the_recipe_itself(
    mine: Config, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """As training does: the settings of a recipe name its conversations, and its prompts."""
    (tmp_path / "own.jsonl").write_text('{"prompt": "of my own"}\n' * 2)
    path = tmp_path / "recipe.yaml"
    path.write_text(json.dumps(mine.model_dump(mode="json")))
    command = ["extract", "--config", str(path), "eval=null"]
    for name, more, said in (
        ("theirs", [], False), ("own", [f"data.prompts=[{tmp_path / 'own.jsonl'}]"], True)
    ):  # fmt: skip
        assert main([*command, f"output_dir={tmp_path / name}", *more]) == 0
        assert ("answers data.prompts itself" in capsys.readouterr().out) == said

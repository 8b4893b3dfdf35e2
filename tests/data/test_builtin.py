"""Prompts that come with Headstart, by name."""

import shutil
import sys
from pathlib import Path

import pytest

from headstart.configs.loader import load_config, load_saved
from headstart.configs.schema import DataConfig, SourceConfig
from headstart.data.contamination import remove_contaminated
from headstart.data.prepare import load_sources
from headstart.data.prompts import load_prompt_set, load_prompts
from headstart.data.sources import builtin_name, builtin_sets
from headstart.eval.recorded import is_local, without_paths
from headstart.train.run_folder import RunRefused, open_run, what_differs
from tests.helpers.runs import ROOT, load_script

PROMPTS = ROOT / "data" / "prompts"


@pytest.fixture(autouse=True)
def empty(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current folder of each test, in which nothing is."""
    (tmp_path / "empty").mkdir()
    monkeypatch.chdir(tmp_path / "empty")
    return tmp_path / "empty"


def test_every_file_of_prompts_is_a_builtin_set_of_the_same_rows() -> None:
    assert builtin_sets() == sorted(f"builtin:{path.stem}" for path in PROMPTS.glob("*.jsonl"))
    for name in ("text_eval", "chat_eval"):
        assert load_prompts(f"builtin:{name}") == load_prompts(PROMPTS / f"{name}.jsonl")


def test_later_passages_are_what_the_example_cuts_out_of_the_training_texts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "passages.jsonl"
    monkeypatch.setattr(sys, "argv", ["later_passages.py", str(out)])
    load_script(ROOT / "examples" / "later_passages.py").main()
    assert out.read_bytes() == (PROMPTS / "passages_train.jsonl").read_bytes()
    training = {prompt.source for prompt in load_prompts("builtin:text_train")}
    passages = load_prompts(out)
    assert all(prompt.raw and prompt.source in training for prompt in passages)
    kept, found = remove_contaminated(passages, load_prompts("builtin:text_eval"))
    assert (len(kept), found.exact, found.near) == (len(passages), 0, 0)


def test_a_pattern_reads_all_builtin_sets_that_it_matches() -> None:
    names = ("chat_eval", "text_eval")
    all_sets = [prompt for name in names for prompt in load_prompt_set(f"builtin:{name}")]
    assert load_prompt_set("builtin:*_eval") == all_sets
    assert load_prompt_set("builtin:*_eval") == load_prompt_set(str(PROMPTS / "*_eval.jsonl"))


def test_a_builtin_set_takes_the_settings_of_any_source() -> None:
    assert len(load_prompts(SourceConfig(path="builtin:chat_train", limit=3))) == 3


@pytest.mark.parametrize("name", ["builtin:txt_eval", "builtin:", "builtin:../prompts/text_eval"])
def test_an_unknown_builtin_set_is_refused_with_the_names_of_all(name: str) -> None:
    for load in (load_prompts, load_prompt_set):
        with pytest.raises(ValueError, match=f"no built-in prompts {name}: .*builtin:text_eval"):
            load(name)


def test_a_bare_name_of_no_set_is_refused_with_the_names_of_all() -> None:
    with pytest.raises(ValueError, match=r"no prompt set: spec-bench, .*builtin:text_eval"):
        load_prompt_set("text_eval")


def test_a_path_in_a_checkout_that_is_not_here_is_refused_with_the_name_of_its_set() -> None:
    with pytest.raises(ValueError, match="builtin:text_train comes with Headstart"):
        load_prompts("data/prompts/text_train.jsonl")


def test_copies_of_builtin_evaluation_prompts_leave_the_training(
    capsys: pytest.CaptureFixture[str],
) -> None:
    data = DataConfig(prompts=[SourceConfig(path="builtin:*_eval")])
    [(kept, _)] = load_sources(data, "builtin:text_eval")
    assert {prompt.id for prompt in kept}.isdisjoint(
        prompt.id for prompt in load_prompt_set("builtin:text_eval")
    )
    said = capsys.readouterr().out
    assert "builtin:*_eval against builtin:text_eval: Contamination: 80 exact and" in said


@pytest.mark.parametrize(
    ("path", "name"),
    [
        ("data/prompts/text_train.jsonl", "builtin:text_train"),
        ("data/prompts/mine.jsonl", "data/prompts/mine.jsonl"),
        ("my/data/prompts/text_train.jsonl", "my/data/prompts/text_train.jsonl"),
        ("data/prompts/text_train.jsonl.gz", "data/prompts/text_train.jsonl.gz"),
        ("builtin:text_train", "builtin:text_train"),
    ],
)
def test_only_the_paths_of_a_checkout_have_builtin_names(path: str, name: str) -> None:
    assert builtin_name(path) == name


def test_a_run_that_names_its_prompts_by_path_goes_on_by_their_builtin_name(empty: Path) -> None:
    shutil.copytree(ROOT / "tests" / "compat" / "e034597" / "run", empty / "run")
    config = load_saved(Path("run/config.yaml"))
    assert [source.path for source in config.data.prompts] == ["data/prompts/text_train.jsonl"]

    def asking(name: str) -> None:
        data = config.data.model_copy(update={"prompts": [SourceConfig(path=name)]})
        open_run(config.model_copy(update={"data": data}), resume=True, processes=1)

    with pytest.raises(RunRefused, match="builtin:text_train"):
        asking("builtin:chat_train")
    asking("builtin:text_train")
    asking("data/prompts/text_train.jsonl")


def test_an_adaptation_begun_before_the_sets_had_names_goes_on() -> None:
    """Its prompts are in a store; those that its settings name are the default of their time."""
    before = load_config(None, ["data.prompts=data/prompts/text_train.jsonl", "data.store=answers"])
    assert what_differs(before, 1, load_config(None, ["data.store=answers"]), 1) == ""


def test_a_builtin_name_is_published_as_it_is() -> None:
    for name in (*builtin_sets(), "builtin:*_eval"):
        assert not is_local(name)
        assert without_paths({"prompts": name}, {"runs/mine": "mine"}) == {"prompts": name}


def test_a_file_of_other_prompts_at_the_path_of_shipped_ones_is_no_built_in_set(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A run that began with it may not go on with ours."""
    monkeypatch.chdir(tmp_path)
    path = "data/prompts/text_train.jsonl"
    assert builtin_name(path) == "builtin:text_train"
    Path("data/prompts").mkdir(parents=True)
    Path(path).write_text('{"prompt": "mine"}\n', encoding="utf-8")
    assert builtin_name(path) == path

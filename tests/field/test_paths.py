"""Paths and other texts arrive as they were given, whatever YAML would make of them."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from headstart.cli import main as cli
from headstart.configs.loader import load_config
from headstart.configs.schema import Config
from headstart.eval import asked
from headstart.heads.loading import noted_target
from headstart.train import adapt as adapting
from tests.helpers.runs import ROOT

TINY = ROOT / "configs" / "tiny.yaml"


def setting(override: str) -> Any:
    """What one override comes to."""
    found: Any = load_config(TINY, [override])
    for part in override.partition("=")[0].split("."):
        found = getattr(found, part)
    return found


@pytest.mark.parametrize(
    "path", ["runs/a #2", "runs/a: b", "runs/[a]", "runs/a, {b}", "2026-11-27", "007", "on", "1_0"]
)
def test_a_run_works_in_the_folder_that_was_named(path: str) -> None:
    assert setting(f"output_dir={path}") == Path(path)
    assert setting(f"target.name={path}") == path
    assert [source.path for source in setting(f"data.prompts={path}")] == [path]


@pytest.mark.parametrize("text", ["2026-11-27", "0123456", "1e5", "1.50", "12:30:45", "no", "0x1F"])
def test_a_revision_keeps_its_spelling(text: str, tmp_path: Path) -> None:
    assert setting(f"target.revision={text}") == text
    path = tmp_path / "run.yaml"
    path.write_text(
        f"target: {{name: {text}, revision: {text}, adapters: [{text}]}}\n"
        f"data:\n  prompts: {text}\n  store: {text}\n  only_categories: [{text}]\n"
        f"head:\n  start: {text}\nrun:\n  dir: {text}\n"
    )
    c = load_config(path)
    assert (c.target.name, c.target.revision, c.target.adapters) == (text, text, [text])
    assert (c.data.prompts[0].path, c.data.filter.categories) == (text, [text])
    assert (c.head.init_from, c.output_dir) == (text, Path(text))


@pytest.mark.parametrize("text", ["null", "None", "~", ""])
def test_an_empty_value_is_none_where_a_setting_may_be_none(text: str) -> None:
    assert setting(f"target.revision={text}") is None
    assert setting(f"data.store={text}") is None


def test_quotes_around_all_of_a_value_are_taken_off() -> None:
    assert setting("output_dir='runs/a #2'") == Path("runs/a #2")
    assert setting('output_dir="runs/a #2"') == Path("runs/a #2")
    assert setting("output_dir=it's") == Path("it's")
    assert setting("""output_dir='a' #2""") == Path("'a' #2")


def test_lists_and_sections_are_still_yaml() -> None:
    assert setting("target.adapters=[a, 'b #2', 007]") == ["a", "b #2", "007"]
    assert [s.path for s in setting("data.prompts=[x.jsonl, {path: y.jsonl}]")] == [
        "x.jsonl", "y.jsonl",
    ]  # fmt: skip
    config = load_config(TINY, ["eval={prompts: 2026-11-27, limit: 3}", "train.warmup_steps=0x2"])
    assert config.eval is not None
    assert (config.eval.prompts, config.eval.limit) == ("2026-11-27", 3)
    assert config.train.warmup_steps == 2


def test_a_date_for_the_chat_template_is_text() -> None:
    kwargs = setting("data.chat_template_kwargs={today: 2024-07-26, enable_thinking: true, n: 7}")
    assert kwargs == {"today": "2024-07-26", "enable_thinking": True, "n": 7}
    assert json.dumps(kwargs)


def test_an_empty_path_is_not_the_working_folder(tmp_path: Path) -> None:
    for override in ("output_dir=", "target.name="):
        with pytest.raises(ValueError, match=r"run\.dir|target\.name"):
            load_config(TINY, [override])
    path = tmp_path / "run.yaml"
    path.write_text("run:\n  dir:\n")
    with pytest.raises(ValueError, match=r"run\.dir"):
        load_config(path)


def test_a_key_that_comes_twice_is_not_dropped(tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text("train: {steps: 700}\ndata: {online: true}\ntrain: {rounds: 3}\n")
    with pytest.raises(ValueError, match=r"run\.yaml .*train comes twice"):
        load_config(path)


@pytest.mark.parametrize("steps", ["0b_", "!!bool x", "!!timestamp x", "&a [*a]", "[" * 3000])
def test_odd_yaml_is_refused_with_the_files_name(steps: str, tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(f"train:\n  steps: {steps}\n")
    with pytest.raises(ValueError, match=r"run\.yaml"):
        load_config(path)


def test_a_file_in_another_encoding_is_named(tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_bytes("run: {dir: größe}".encode("latin-1"))
    with pytest.raises(ValueError, match=r"run\.yaml"):
        load_config(path)


def test_a_number_that_is_none_is_refused() -> None:
    for override in ("data.temperatures=[.nan]", "train.max_minutes=.inf"):
        with pytest.raises(ValueError, match="finite"):
            load_config(TINY, [override])


def adapted_config(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> Config:
    """The configuration that `headstart adapt` comes to."""
    found: list[Config] = []

    def seen(a: object, config: Config) -> None:
        found.append(config)
        raise ValueError("seen")

    monkeypatch.setattr(adapting, "split_prompts", seen)
    monkeypatch.setattr(adapting, "check_before", lambda a: None)  # there need be no such files
    assert cli.main(["adapt", *map(str, arguments)]) == 1
    return found[0]


def test_adapt_trains_the_head_that_was_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Beside one of a shorter name."""
    head = SimpleNamespace(use_ordered_embeddings=True)
    for module in (adapting, asked):
        monkeypatch.setattr(module, "load_assistant_config", lambda path: head)
    out = tmp_path / "out: 1 #3"
    found = adapted_config(
        monkeypatch, "--target", "tiny-gemma4", "--revision", "2026-11-27",
        "--head", tmp_path / "head #2", "--prompts", "p.jsonl", "--out", out,
    )  # fmt: skip
    assert found.head.init_from == str(tmp_path / "head #2")
    assert (found.output_dir, found.data.store) == (out / "run", out / "answers")
    assert found.target.revision == "2026-11-27"
    capsys.readouterr()


def test_home_is_found_wherever_a_path_is_given(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A shell leaves `~` in `key=~/x`, in quotes and after `+`."""
    monkeypatch.setenv("HOME", str(tmp_path))
    assert setting("output_dir=~/runs/a") == tmp_path / "runs" / "a"
    assert setting("target.name=~/model") == f"{tmp_path}/model"
    assert setting("head.init_from=~/a/head") == f"{tmp_path}/a/head"
    assert setting("data.prompts=~/p.jsonl")[0].path == f"{tmp_path}/p.jsonl"
    assert setting("eval.prompts=spec-bench=~/q.jsonl") == f"spec-bench={tmp_path}/q.jsonl"
    args = cli._parse([
        "eval", "--target", "~/model", "--head", "~/a+~/b", "--prompts", "gsm8k=~/g.jsonl",
        "--out", "~/out",
    ])  # fmt: skip
    assert (args.target, args.out) == (f"{tmp_path}/model", tmp_path / "out")
    assert args.head == [f"{tmp_path}/a+{tmp_path}/b"]
    assert args.prompts == f"gsm8k={tmp_path}/g.jsonl"
    assert setting("output_dir=runs/~x") == Path("runs/~x")


@pytest.mark.parametrize("ignored", ["target.dtype=float32", "head.init_from=x", "data.store=y"])
def test_adapt_passes_no_setting_over(ignored: str, capsys: pytest.CaptureFixture[str]) -> None:
    argv = ["adapt", "--target", "tiny-gemma4", "--head", "h", "--prompts", "p", "--out", "o"]
    assert cli.main([*argv, ignored]) == 1
    assert f"{ignored.partition('=')[0]} is given to adapt by --" in capsys.readouterr().err


def test_a_base_whose_folder_has_a_plus_is_that_folder(tmp_path: Path) -> None:
    """Beside one of a shorter name, though reports put adapters behind a plus."""
    for name in ("target", "target + v2"):
        (tmp_path / name).mkdir()
    note = {"name": f"{tmp_path}/target + v2", "revision": None}
    assert noted_target(note).name == f"{tmp_path}/target + v2"

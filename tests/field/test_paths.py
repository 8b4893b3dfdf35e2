"""Paths and other texts arrive as they were given, whatever YAML would make of them."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from headstart.cli import main as cli
from headstart.cli.arguments import read_settings
from headstart.configs.loader import load_config
from headstart.eval import asked
from headstart.heads.loading import noted_target
from headstart.train import adapt as adapting
from headstart.train import adaptation
from headstart.train.adaptation import Adaptation
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
        f"data:\n  prompts: {text}\n  store: {text}\n\n"
        f"  filter: {{categories: [{text}]}}\nhead:\n  init_from: {text}\noutput_dir: {text}\n"
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
        with pytest.raises(ValueError, match=r"output_dir|target\.name"):
            load_config(TINY, [override])
    path = tmp_path / "run.yaml"
    path.write_text("output_dir:\n")
    with pytest.raises(ValueError, match="output_dir"):
        load_config(path)


def test_a_key_that_comes_twice_is_not_dropped(tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text("train: {max_steps: 700}\ndata: {online: true}\ntrain: {compile: true}\n")
    with pytest.raises(ValueError, match=r"run\.yaml .*train comes twice"):
        load_config(path)


@pytest.mark.parametrize("steps", ["0b_", "!!bool x", "!!timestamp x", "&a [*a]", "[" * 3000])
def test_odd_yaml_is_refused_with_the_files_name(steps: str, tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(f"train:\n  max_steps: {steps}\n")
    with pytest.raises(ValueError, match=r"run\.yaml"):
        load_config(path)


def test_a_file_in_another_encoding_is_named(tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_bytes("output_dir: größe".encode("latin-1"))
    with pytest.raises(ValueError, match=r"run\.yaml"):
        load_config(path)


def test_a_number_that_is_none_is_refused() -> None:
    for override in ("data.temperatures=[.nan]", "train.max_minutes=.inf"):
        with pytest.raises(ValueError, match="finite"):
            load_config(TINY, [override])


@pytest.fixture
def any_head(monkeypatch: pytest.MonkeyPatch) -> None:
    """The configuration of a head is there, whatever its name."""
    head = SimpleNamespace(use_ordered_embeddings=True, model_type="gemma4_assistant")
    for module in (adaptation, asked):
        monkeypatch.setattr(module, "load_assistant_config", lambda path: head)


def adapted(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> Adaptation:
    """What `headstart adapt` comes to."""
    found: list[Adaptation] = []

    def seen(a: Adaptation) -> None:
        found.append(a)
        raise ValueError("seen")

    monkeypatch.setattr(adapting, "load_kinds", seen)
    assert cli.main(["adapt", *map(str, arguments)]) == 1
    return found[0]


@pytest.mark.usefixtures("any_head")
def test_adapt_trains_the_head_that_was_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Beside one of a shorter name."""
    out = tmp_path / "out: 1 #3"
    found = adapted(
        monkeypatch, tmp_path / "head #2", "target.name=tiny-gemma4",
        "target.revision=2026-11-27", "data.prompts=p.jsonl", f"output_dir={out}",
    )  # fmt: skip
    c = found.config
    assert found.head == c.head.init_from == str(tmp_path / "head #2")
    assert (found.out, c.output_dir, c.data.store) == (out, out / "run", out / "answers")
    assert c.target.revision == "2026-11-27"


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
    args = cli._parse(["eval", "~/a+~/b", "eval.prompts=gsm8k=~/g.jsonl", "output_dir=~/out"])
    settings = read_settings(args)
    assert args.head == [f"{tmp_path}/a+{tmp_path}/b"]
    assert settings.output_dir == tmp_path / "out"
    assert settings.eval is not None
    assert settings.eval.prompts == f"gsm8k={tmp_path}/g.jsonl"
    assert setting("output_dir=runs/~x") == Path("runs/~x")


@pytest.mark.usefixtures("any_head")
@pytest.mark.parametrize(
    "ignored",
    [
        "head.init_from=x", "data.store=y", "data.conversations=z", "data.online=true",
        "eval.num_assistant_tokens=2,4", "data.prompts=[{path: p, weight: 2}]",
    ],
)  # fmt: skip
def test_adapt_passes_no_setting_over(
    ignored: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    argv = ["adapt", "h", "target.name=tiny-gemma4", "data.prompts=p", f"output_dir={tmp_path}/o"]
    assert cli.main([*argv, ignored]) == 1
    assert ignored.partition("=")[0] in capsys.readouterr().err
    assert not (tmp_path / "o").exists()


@pytest.mark.usefixtures("any_head")
def test_adapt_passes_nothing_over_that_a_file_says_of_an_evaluation(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "run.yaml"
    file.write_text(
        f"target: {{name: tiny-gemma4}}\ndata: {{prompts: p}}\noutput_dir: {tmp_path / 'o'}\n"
        "eval: {limit: 3}\n"
    )
    assert cli.main(["adapt", "h", "--config", str(file)]) == 1
    assert "eval.limit" in capsys.readouterr().err


def test_a_base_whose_folder_has_a_plus_is_that_folder(tmp_path: Path) -> None:
    """Beside one of a shorter name, though reports put adapters behind a plus."""
    for name in ("target", "target + v2"):
        (tmp_path / name).mkdir()
    note = {"name": f"{tmp_path}/target + v2", "revision": None}
    assert noted_target(note).name == f"{tmp_path}/target + v2"


def test_a_chat_template_may_lie_in_the_home_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/me")
    assert setting("target.chat_template=~/t.jinja") == Path("/home/me/t.jinja")

"""The grammar of the command line: every command's help, every retired name, what is read."""

import re
from pathlib import Path

import pytest
import yaml

from headstart.cli import retired
from headstart.cli.arguments import Argument, Command, setting_row
from headstart.cli.main import COMMANDS, main
from headstart.configs.keys import describe_setting, known_keys
from headstart.configs.loader import load_config, load_settings
from headstart.configs.renamed import RENAMED, VALUES

CONFIGURED = [command for command in COMMANDS if command.settings]


@pytest.mark.parametrize("command", COMMANDS, ids=lambda c: c.name)
def test_the_help_of_a_command_fits_a_screen(
    command: Command, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "100")
    with pytest.raises(SystemExit):
        main([command.name, "--help"])
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) <= 40
    assert lines[-1] == f"example: {command.example}"
    assert max(map(len, lines[:-1])) <= 100
    flags = {word for line in lines for word in re.findall(r"--[a-z]+", line)}
    assert flags <= {"--resume", "--plan", "--json", "--config", "--debug", "--help"}


@pytest.mark.parametrize("command", CONFIGURED, ids=lambda c: c.name)
def test_a_command_reads_keys_that_exist_and_shows_their_defaults(command: Command) -> None:
    keys = known_keys()
    for key in command.settings:
        assert key in keys or key.removesuffix(".*") in keys, key
    for key, _ in command.defaults:
        assert key in keys, key
    assert set(command.required) <= {*command.settings, "--config"}


def test_the_default_that_help_shows_is_the_one_that_holds() -> None:
    for key in known_keys():
        if any(other.startswith(f"{key}.") for other in known_keys()):
            continue  # a section
        shown, text = describe_setting(key)
        assert text, key
        if shown == "...":
            continue
        settings = load_settings(None, [f"{key.partition('.')[0]}={{}}"] if "." in key else [])
        there = load_settings(None, [f"{key}={shown}"]) if needs_nothing(key) else settings
        assert at(there, key) == at(settings, key) or "auto" in shown, key


def needs_nothing(key: str) -> bool:
    """Whether a setting may be given alone, without one that it belongs to."""
    return not key.startswith(("server.", "adapt.general_share", "head.lora."))


def at(settings: object, key: str) -> object:
    for part in key.split("."):
        settings = getattr(settings, part, None)
    return settings


@pytest.mark.parametrize("flag", retired.FLAGS)
def test_a_flag_of_before_is_refused_with_what_it_is_now(
    flag: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(["eval", flag, "x"])
    assert stopped.value.code == 2
    now = retired.FLAGS[flag]
    assert f"{flag} is now {now}" in capsys.readouterr().err
    keys = re.findall(r"\b([a-z_]+(?:\.[a-z_0-9]+)*)=", now)
    names = {command.name for command in COMMANDS}
    assert set(keys) <= set(known_keys())
    assert keys or now == "--plan" or set(re.findall(r"headstart ([a-z-]+)", now)) <= names


@pytest.mark.parametrize("before", retired.COMMANDS)
def test_a_command_of_before_is_refused_with_its_name_now(
    before: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        main([*before.split(), "x"])
    assert f"is now headstart {retired.COMMANDS[before]}" in capsys.readouterr().err
    assert retired.COMMANDS[before] in {command.name for command in COMMANDS}


@pytest.mark.parametrize("old", RENAMED)
def test_a_key_of_before_is_refused_with_its_name_now(old: str, tmp_path: Path) -> None:
    new = RENAMED[old]
    assert new in known_keys()
    section, _, leaf = old.rpartition(".")
    path = tmp_path / "mine.yaml"
    tree: dict[str, object] = {leaf: 1}
    for part in reversed(section.split(".")):
        tree = {part: tree}
    path.write_text(yaml.safe_dump(tree))
    for config, overrides in ((None, [f"{old}=1"]), (path, [])):
        with pytest.raises(ValueError, match=rf"{re.escape(old)} is called {re.escape(new)} now"):
            load_config(config, overrides)
    for value in VALUES.get(old, {}).values():
        load_config(None, [f"{new}={value}"])


@pytest.mark.parametrize("command", CONFIGURED, ids=lambda c: c.name)
def test_a_setting_that_a_command_does_not_read_is_refused(
    command: Command, capsys: pytest.CaptureFixture[str]
) -> None:
    odd = (
        "train.max_steps" if command.name not in ("train", "adapt", "bench") else "publish.private"
    )
    words = [a.choices[0] if a.choices else "x" for a in command.arguments if a.many == "1"]
    with pytest.raises(SystemExit):
        main([command.name, *words, f"{odd}=3"])
    assert f"{command.name} does not read {odd}" in capsys.readouterr().err


@pytest.mark.parametrize(
    "words",
    [
        ["bench", "limits", "target.name=tiny-gemma3"],
        ["bench", "draft", "head", "head.hidden_size=32"],
        ["bench", "draft", "head", "train={batch_size: 2}"],
        ["export", "head", "llama.cpp", "export.target_gguf=t.gguf", "target.name=t"],
        ["export", "head", "vllm", "target.eos_token_ids=[1]", "target.name=tiny-gemma3"],
    ],
    ids=" ".join,
)
def test_what_one_of_several_does_not_read_is_refused(
    words: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = [] if words[0] == "bench" else [f"output_dir={tmp_path / 'out'}"]
    with pytest.raises(SystemExit) as end:
        raise SystemExit(main([*words, *out]))
    assert end.value.code
    said = capsys.readouterr().err
    assert words[2 if words[1] == "limits" else 3].partition("=")[0] in said
    assert "leave it out" in said or "does not read" in said


def test_a_section_given_whole_may_hold_nothing_that_is_not_read(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    words = ["serve-check", "head", "vllm", f"output_dir={tmp_path / 'out'}"]
    assert main([*words, "eval={limit: 8, temperatures: [1.0]}"]) == 1
    assert "serve-check does not read eval.temperatures" in capsys.readouterr().err


def test_adapt_reads_its_own_defaults_from_the_first(capsys: pytest.CaptureFixture[str]) -> None:
    """A warm-up that its 20,000 steps allow and the schema's 600 do not."""
    words = ["adapt", "./no-head", "target.name=tiny-gemma4", "data.prompts=x", "output_dir=y"]
    assert main([*words, "train.warmup_steps=700"]) == 1
    assert "warmup_steps" not in capsys.readouterr().err


def test_languages_of_a_card_are_codes() -> None:
    assert load_settings(None, ["publish.languages=de"]).publish.languages == ["de"]
    with pytest.raises(ValueError, match=r"publish\.languages\.0"):
        load_settings(None, ["publish.languages=en,de"])


def test_a_misspelled_command_is_refused_with_the_one_that_is_spelled_like_it(
    capsys: pytest.CaptureFixture[str],
) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(["trian", "--config", "tiny"])
    assert stopped.value.code == 2
    assert "train" in capsys.readouterr().err.splitlines()[-1]


def test_a_bare_key_is_refused_with_its_section() -> None:
    with pytest.raises(ValueError, match=r"no key max_steps: it is train\.max_steps"):
        load_config(None, ["max_steps=3"])


@pytest.mark.parametrize(
    ("text", "value"),
    [("2,4", [2, 4]), ("[2, 4]", [2, 4]), ("3", [3]), ("[3]", [3])],
)
def test_a_list_may_stand_without_brackets(text: str, value: list[int]) -> None:
    settings = load_settings(None, [f"eval.num_assistant_tokens={text}"])
    assert settings.eval is not None
    assert settings.eval.num_assistant_tokens == value


def test_a_path_with_a_comma_is_one_path() -> None:
    settings = load_settings(None, ["target.adapters=a,b", "data.prompts=x,y.jsonl"])
    assert settings.target.adapters == ["a,b"]
    assert [source.path for source in settings.data.prompts] == ["x,y.jsonl"]


def test_help_names_what_has_to_be_given() -> None:
    assert setting_row("output_dir", {"output_dir": "(to be named)"})[0].endswith("(to be named)")


@pytest.mark.parametrize("command", CONFIGURED, ids=lambda c: c.name)
def test_what_help_says_of_a_key_that_nobody_named_is_not_its_value(command: Command) -> None:
    given = [(k, "x" if isinstance(v, Argument) else v) for k, v in command.defaults]
    settings = load_settings(None, [], given)
    assert not settings.given([key for key, _ in command.unnamed])


def test_more_texts_at_once_than_there_are_prompts_are_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("headstart.serve.engines.engine_python", lambda engine: tmp_path)
    monkeypatch.setattr("headstart.serve.engines.check_served", lambda engine, head: None)
    words = ["serve-check", "head", "vllm", "target.name=tiny-gemma4", f"output_dir={tmp_path}"]
    assert main([*words, "eval.concurrency=1,64", "eval.limit=16"]) == 1
    assert "64" in (told := capsys.readouterr().err)
    assert "raise eval.limit" in told

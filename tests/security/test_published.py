"""What is published is what was meant to be: no file behind a link, none that merely lay in the
folder, and no path of the machine."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml

from headstart.cli.main import main
from headstart.configs.loader import load_config
from headstart.configs.schema import TargetConfig
from headstart.heads.loading import noted_target
from headstart.serve.publish import public_config
from tests.helpers.runs import PUBLISH, ROOT, write_tuned_run

CLIENT = "acme-merger"  # a folder whose name is nobody's business


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The current folder of a finished run, all of whose paths are relative."""
    work = tmp_path_factory.mktemp("work")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(work)
        write_tuned_run(Path(CLIENT))
        yield work


@pytest.fixture
def folder(work: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """That run, to spoil; the current folder is its own."""
    monkeypatch.chdir(work)
    return Path(shutil.copytree(work / CLIENT / "run", tmp_path / "run"))


def publish(folder: Path, out: Path) -> int:
    return main(["publish", str(folder), *PUBLISH, "--plan", f"output_dir={out}"])


def held(out: Path, text: str) -> list[Path]:
    files = [path for path in out.rglob("*") if path.is_file()]
    return [path for path in files if text.encode() in path.read_bytes()]


SECRET = "AKIA-not-for-all"


@pytest.mark.parametrize("name", ["head/notes.txt", "head/generation_config.json"])
def test_a_link_to_a_secret_in_the_folder_of_a_head_does_not_publish_it(
    name: str, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "credentials").write_text(json.dumps({"num_assistant_tokens": 2, "x": SECRET}))
    (folder / name).unlink(missing_ok=True)
    (folder / name).symlink_to(tmp_path / "credentials")
    out = tmp_path / "out"
    if publish(folder, out) == 0:  # of a name that nobody asked for
        assert name in capsys.readouterr().out
        assert held(out, SECRET) == []
    else:
        assert name in capsys.readouterr().err
        assert not out.exists()


def test_the_paths_of_an_adaptation_stay_at_home(folder: Path, tmp_path: Path) -> None:
    """Those of its command, its target and its first head, escaped in Markdown or not."""
    content = json.loads((ROOT / "docs" / "results" / "adapt-code-given.json").read_text())
    content["commands"] = [
        f"headstart adapt h --config /mnt/{SECRET}/a.yaml 'data.prompts=[{{path: ~/{SECRET}}}]'"
    ]
    content["head"] = f"clients/_{SECRET}/head"
    content["target"]["name"] = f"clients/{SECRET}/model + /mnt/{SECRET}/lora"
    (folder / "adapt.json").write_text(json.dumps(content))
    assert publish(folder, tmp_path / "out") == 0
    assert held(tmp_path / "out", SECRET) == []
    told = (tmp_path / "out" / "evaluation" / "adapt.md").read_text()
    assert "Head: head." in told
    assert "```" not in told


def test_names_that_a_report_alone_has_stay_at_home(folder: Path, tmp_path: Path) -> None:
    """Of a target that lay elsewhere when it was measured again, and of other heads' targets."""
    path = folder / "eval" / "report.json"
    report = json.loads(path.read_text())
    report["environment"]["target"] = f"clients/{SECRET}/model + /mnt/{SECRET}/lora"
    report["warnings"] = {"old": f"this head was trained for clients/{SECRET}/base, not for this"}
    path.write_text(json.dumps(report))
    assert publish(folder, tmp_path / "out") == 0
    assert held(tmp_path / "out", SECRET) == []


@pytest.mark.parametrize("name", ["adapt.json", "progress.png"])
def test_a_link_in_place_of_what_a_run_tells_is_refused(
    name: str, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "id_rsa").write_text(SECRET)
    (folder / name).unlink(missing_ok=True)
    (folder / name).symlink_to(tmp_path / "id_rsa")
    assert publish(folder, tmp_path / "out") == 1
    assert name in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_files_that_lie_beside_a_head_stay_at_home_and_are_listed(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (folder / "head" / ".env").write_text(SECRET)
    (folder / "head" / "modeling_evil.py").write_text(f"print('{SECRET}')")
    (folder / "head" / "old").mkdir()
    (folder / "head" / "old" / "config.json").write_text(SECRET)
    out = tmp_path / "out"
    assert publish(folder, out) == 0
    said = capsys.readouterr().out
    assert held(out, SECRET) == []
    left = said[said.index("Left out") :]
    assert all(name in left for name in ("head/.env", "head/modeling_evil.py", "head/old/"))
    assert "metrics.jsonl" in left
    assert "head/config.json" not in left


def check_paths(out: Path) -> None:
    assert held(out, CLIENT) == []
    settings = yaml.safe_load((out / "training_config.yaml").read_text())
    assert settings["output_dir"] == "run"
    assert settings["target"]["name"] == "org/tiny"
    assert settings["eval"]["prompts"] == "eval.jsonl"
    assert load_config(out / "training_config.yaml").train.max_steps == 6
    report = json.loads((out / "evaluation" / "report.json").read_text())
    assert report["environment"]["prompt_set"]["name"] == "eval.jsonl"


def test_no_relative_path_is_published(folder: Path, tmp_path: Path) -> None:
    assert publish(folder, tmp_path / "out") == 0
    check_paths(tmp_path / "out")


def test_no_relative_path_is_published_from_elsewhere(
    work: Path, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where the folders that they name are not there to be seen."""
    monkeypatch.chdir(tmp_path)
    client = work / CLIENT
    where = [f"target.name={client / 'model'}", f"target.adapters={client / 'lora'}"]
    out = tmp_path / "out"
    command = ["publish", str(folder), *PUBLISH, "--plan", f"output_dir={out}", *where]
    assert main(command) == 0
    check_paths(out)


def test_a_published_head_turns_on_no_code_of_a_strangers(folder: Path, tmp_path: Path) -> None:
    """Where the target's was trusted when it was trained."""
    path = folder / "config.yaml"
    path.write_text(path.read_text().replace("trust_remote_code: false", "trust_remote_code: true"))
    assert "trust_remote_code: true" in path.read_text()
    assert publish(folder, tmp_path / "out") == 0
    published = load_config(tmp_path / "out" / "training_config.yaml")
    assert published.target.trust_remote_code is False


def test_a_link_in_the_folder_of_a_tokenizer_is_not_published(
    work: Path, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """What it led to went out as the chat template."""
    target = Path(shutil.copytree(work / CLIENT / "model", tmp_path / "model"))
    (tmp_path / "id_rsa").write_text(SECRET)
    for name in ("chat_template.jinja", "additional_chat_templates/other.jinja"):
        link = target / name
        link.parent.mkdir(exist_ok=True)
        link.symlink_to(tmp_path / "id_rsa")
        where = [f"target.name={target}", f"target.adapters={work / CLIENT / 'lora'}"]
        command = ["publish", str(folder), *PUBLISH, "--plan", f"output_dir={tmp_path / 'out'}"]
        assert main([*command, *where]) == 1
        assert link.name in capsys.readouterr().err
        assert not (tmp_path / "out").exists()
        link.unlink()


def test_a_folder_of_a_head_that_is_a_link_is_not_published(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (folder / "head").rename(tmp_path / "private")
    (folder / "head").symlink_to(tmp_path / "private")
    assert publish(folder, tmp_path / "out") == 1
    assert "head is a link" in capsys.readouterr().err


def test_paths_that_a_tokenizer_notes_are_not_published(
    work: Path, folder: Path, tmp_path: Path
) -> None:
    """As trainers leave them in tokenizer_config.json."""
    target = Path(shutil.copytree(work / CLIENT / "model", tmp_path / "model"))
    path = target / "tokenizer_config.json"
    noted = {"trained_on": f"/mnt/{CLIENT}/rows.jsonl", "how": {"by": f"/mnt/{CLIENT}/train.py"}}
    path.write_text(json.dumps(json.loads(path.read_text()) | noted))
    where = [f"target.name={target}", f"target.adapters={work / CLIENT / 'lora'}"]
    out = tmp_path / "out"
    assert main(["publish", str(folder), *PUBLISH, "--plan", f"output_dir={out}", *where]) == 0
    assert held(out, CLIENT) == []
    assert json.loads((out / path.name).read_text())["how"] == {"by": "train.py"}


def test_a_published_head_notes_the_target_that_others_load() -> None:
    """A --base-model has the adapters of the run in it; their folders are of nobody else's."""
    tuned, lora = "/home/me/tuned", "/home/me/lora"
    config = {"name": tuned, "adapters": [lora], "revision": None}
    note: dict[str, Any] = {"name": f"{tuned} + {lora}", "config": config}
    names = {tuned: "org/tiny", lora: "lora", f"{tuned} + {lora}": "org/tiny"}
    served = TargetConfig(name="org/tiny", revision="v1.0")
    public = public_config({"headstart_target": note, "path": tuned}, names, served)
    assert noted_target(public["headstart_target"]) == served
    assert "/home" not in json.dumps(public)
    known = {"headstart_target": note | {"config": config | {"name": "org/a", "adapters": []}}}
    assert public_config(known, names, served)["headstart_target"]["config"]["name"] == "org/a"
    assert public_config({"path": "/home/me/x"}, names, served) == {"path": "x"}


def test_a_file_that_a_runs_settings_call_a_chat_template_is_not_published_unasked(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Somebody else may have written them."""
    (tmp_path / "id_rsa").write_text(SECRET)
    path = folder / "config.yaml"
    settings = yaml.safe_load(path.read_text())
    settings["target"]["chat_template"] = str(tmp_path / "id_rsa")
    path.write_text(yaml.safe_dump(settings))
    assert publish(folder, tmp_path / "out") == 1
    assert f"target.chat_template={tmp_path / 'id_rsa'}" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
    (tmp_path / "mine.jinja").write_text("{{ messages[0].content }}")
    wanted = f"target.chat_template={tmp_path / 'mine.jinja'}"
    command = ["publish", str(folder), *PUBLISH, "--plan", f"output_dir={tmp_path / 'out'}"]
    assert main([*command, wanted]) == 0
    assert held(tmp_path / "out", SECRET) == []
    assert (tmp_path / "out" / "chat_template.jinja").read_text() == "{{ messages[0].content }}"


def test_templates_of_a_tokenizer_are_of_an_earlier_publication_and_no_other_files(
    work: Path, folder: Path, tmp_path: Path
) -> None:
    target = Path(shutil.copytree(work / CLIENT / "model", tmp_path / "model"))
    for name in ("chat_template.jinja", "additional_chat_templates/tool_use.jinja"):
        (target / name).parent.mkdir(exist_ok=True)
        (target / name).write_text("{{ messages[0].content }}")
    out = tmp_path / "out"
    where = [f"target.name={target}", f"target.adapters={work / CLIENT / 'lora'}"]
    command = ["publish", str(folder), *PUBLISH, "--plan", f"output_dir={out}", *where]
    assert [main(command), main(command)] == [0, 0]
    assert (out / "additional_chat_templates" / "tool_use.jinja").is_file()
    (out / "additional_chat_templates" / "notes.txt").write_text("mine")
    assert main(command) == 1

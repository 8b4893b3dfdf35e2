"""A damaged file of one run is named, and the other runs are listed all the same."""

import json
from pathlib import Path

import pytest

from headstart.cli.main import main
from headstart.configs.loader import save_config
from tests.helpers.runs import tiny_config

CONFIG, METRICS, STATUS = "config.yaml", "metrics.jsonl", "status.json"

HALF = b'{"step": 2, "loss": 1.'
DAMAGE = {
    "an empty configuration": (CONFIG, b""),
    "half a configuration": (CONFIG, b"run:\n  dir: runs/x\n  seed: 0\ntarget:\n  name: tin"),
    "a configuration in Latin-1": (CONFIG, "run: {dir: größe}".encode("latin-1")),
    "a configuration of zeros": (CONFIG, bytes(64)),
    "a configuration that is a list": (CONFIG, b"- train\n"),
    "an empty status": (STATUS, b""),
    "half a status": (STATUS, b'{"doing": "training", "sta'),
    "a status in UTF-16": (STATUS, '{"state": "finished"}'.encode("utf-16")),
    "a status without a state": (STATUS, b"{}"),
    "a status that is a list": (STATUS, b"[]"),
    "a metric cut in the middle": (METRICS, HALF + b"\n" + b'{"step": 3, "loss": 1.0}\n'),
    "metrics of zeros": (METRICS, bytes(64) + b"\n"),
    "metrics in Latin-1": (METRICS, b'{"step": 1, "loss": 2.0, "note": "\xf6"}\n'),
    "a metric without a loss": (METRICS, b'{"step": 1}\n'),
}


def write_run(folder: Path) -> None:
    """A run that has done two steps."""
    folder.mkdir()
    save_config(tiny_config(folder), folder / CONFIG)
    status = {"state": "finished", "doing": "training", "started": "2026-01-01T00:00:00+00:00"}
    (folder / STATUS).write_text(json.dumps(status))
    rows = [{"step": n, "loss": 2.5, "batch_acceptance_length": 1.2} for n in (1, 2)]
    (folder / METRICS).write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.mark.parametrize("damage", DAMAGE)
def test_one_damaged_run_hides_no_other(
    damage: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", "400")
    for name in ("sound", "spoilt"):
        write_run(tmp_path / name)
    file, content = DAMAGE[damage]
    (tmp_path / "spoilt" / file).write_bytes(content)
    assert main(["runs", "list", str(tmp_path)]) == 0
    lines = capsys.readouterr().out.splitlines()
    (sound,) = [line for line in lines if " sound " in line]
    (spoilt,) = [line for line in lines if " spoilt " in line]
    assert "2 / 60" in sound
    assert "2.500" in sound
    assert "damaged" in spoilt
    assert file in spoilt
    assert main(["runs", "show", str(tmp_path / "spoilt")]) == 1
    assert str(tmp_path / "spoilt" / file) in capsys.readouterr().err
    assert main(["runs", "show", str(tmp_path / "sound")]) == 0


def test_a_line_that_is_being_written_is_no_damage(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_run(tmp_path / "run")
    with (tmp_path / "run" / METRICS).open("ab") as file:
        file.write(HALF + "ö".encode()[:1])
    assert main(["runs", "list", str(tmp_path)]) == 0
    assert "damaged" not in capsys.readouterr().out


@pytest.mark.parametrize("cut", [0, 200, -200, -3])
def test_a_configuration_that_was_cut_short_is_not_published_with_the_defaults(
    cut: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Whose target is Gemma 3 270M."""
    run = tmp_path / "run"
    write_run(run)
    (run / "head").mkdir()
    (run / "head" / "config.json").write_text("{}")
    (run / CONFIG).write_text((run / CONFIG).read_text()[:cut])
    command = ["publish", str(run), "org/head", "publish.base_models=org/target"]
    assert main([*command, "--plan", f"output_dir={tmp_path / 'out'}"]) == 1
    assert str(run / CONFIG) in capsys.readouterr().err
    assert not (tmp_path / "out").exists()

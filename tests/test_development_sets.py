"""The development sets are those that were measured on, or none are written."""

import urllib.error
import urllib.request
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from tests.helpers.runs import ROOT, load_script


@pytest.fixture
def script() -> ModuleType:
    return load_script(ROOT / "examples" / "development_sets.py")


def other_source(script: ModuleType, source: Any, _: Path) -> list[Any]:
    """Of the form of a source, with other content."""
    if source == script.GSM8K:
        return [{"question": f"question {n}", "answer": ""} for n in range(1319)]
    if source == script.IFEVAL:
        return [{"key": key, "prompt": f"prompt {key}"} for key in script.IFEVAL_KEYS]
    return [{"question_id": n, "category": "generic", "turns": [f"turn {n}"]} for n in range(1, 81)]


def test_without_a_network_one_line_says_where_the_file_goes(
    script: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def unreachable(*_: object, **__: object) -> None:
        raise urllib.error.URLError("no route")

    monkeypatch.setattr(urllib.request, "urlopen", unreachable)
    with pytest.raises(SystemExit) as told:
        script.build_sets(tmp_path / "out")
    line = str(told.value)
    assert script.GSM8K.url in line
    assert str(tmp_path / "out" / "sources" / script.GSM8K.name) in line
    assert not (tmp_path / "out").exists()


def test_a_source_of_other_content_is_refused_by_name(script: ModuleType, tmp_path: Path) -> None:
    path = tmp_path / "sources" / script.GSM8K.name
    path.parent.mkdir()
    path.write_text('{"question": "another"}\n')
    with pytest.raises(SystemExit, match="SHA-256") as told:
        script.build_sets(tmp_path)
    assert str(path) in str(told.value)
    assert not list(tmp_path.glob("*.jsonl"))


def test_rows_have_ids_of_their_own_and_a_set_of_other_rows_is_not_written(
    script: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        script, "read_source", lambda source, folder: other_source(script, source, folder)
    )
    every = (script.GSM8K, script.IFEVAL, script.VICUNA)
    sources = {one: other_source(script, one, tmp_path) for one in every}
    for make, count in ((script.external_rows, 160), (script.vicuna_rows, 78)):
        rows = list(make(sources))
        assert len({row["id"] for row in rows}) == len({row["prompt"] for row in rows}) == count
        assert {row["licence"] for row in rows} <= {"MIT", "Apache-2.0"}
    with pytest.raises(SystemExit, match=r"dev_external_160\.jsonl"):
        script.build_sets(tmp_path)
    assert not list(tmp_path.glob("*.jsonl"))

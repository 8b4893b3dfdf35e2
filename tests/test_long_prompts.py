"""Long prompts have the tokens that they are meant to have, of documents that no head has read."""

import json
import sys
from pathlib import Path
from types import ModuleType

import pytest

from headstart.data.prompts import load_prompts
from headstart.data.templates import encode_prompts
from headstart.heads.loading import byte_tokenizer
from tests.helpers.runs import ROOT, load_script

LENGTHS = (64, 200)


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    module = load_script(ROOT / "examples" / "long_prompts.py")
    monkeypatch.setattr(module, "LENGTHS", LENGTHS)
    return module


@pytest.fixture
def folders(tmp_path: Path) -> list[str]:
    """Documents of which some are trained on: chapters 1 and 2, and the library's abc."""
    words = " ".join(f"word{n}, it{n}" for n in range(60))
    for name in (
        "library/array",
        "reference/one",
        "reference/two",
        "c-api/a",
        "c-api/b",
        "c-api/c",
        "c-api/d",
    ):
        path = tmp_path / "doc" / f"{name}.rst.txt"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"{name}\n\n{words}\n", encoding="utf-8")
    (tmp_path / "novel").mkdir()
    for number in (1, 2, 4, 16, 23, 24, 27, 45, 48):
        text = f"CHAPTER {number}.\n\n" + " ".join(f"n{number}-{n}" for n in range(25)) + "\n"
        (tmp_path / "novel" / f"chapter_{number}.txt").write_text(text)
    return ["--documentation", str(tmp_path / "doc"), "--novel", str(tmp_path / "novel")]


def test_prompts_of_each_length_end_at_the_same_place_of_a_document_not_trained_on(
    script: ModuleType, folders: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "long.jsonl"
    monkeypatch.setattr(sys, "argv", ["script", *folders, "--target", "tiny-gemma4", str(out)])
    script.main()
    prompts, rows = load_prompts(out), [json.loads(line) for line in out.read_text().splitlines()]
    assert len(prompts) == 8 * len(LENGTHS)
    encoded = encode_prompts(prompts, byte_tokenizer())
    for prompt, ids in zip(prompts, encoded, strict=True):
        assert f"-{len(ids)}" == prompt.id[prompt.id.rindex("-") :]
    for short, long in zip(prompts[::2], prompts[1::2], strict=True):
        assert long.text.endswith(short.text)
        assert not long.text[-1].isspace()
    told = " ".join(row["source"] for row in rows)
    for name in ("library/array", "chapter_1,", "chapter_2,"):
        assert name not in told
    assert rows[-1]["source"].count("chapter") > 1, "whole chapters are joined"


def test_too_few_documents_are_refused(
    script: ModuleType, folders: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "doc" / "c-api" / "a.rst.txt").unlink()
    out = tmp_path / "long.jsonl"
    monkeypatch.setattr(sys, "argv", ["script", *folders, "--target", "tiny-gemma4", str(out)])
    with pytest.raises(SystemExit, match="--documentation: 5 texts"):
        script.main()
    assert not out.exists()

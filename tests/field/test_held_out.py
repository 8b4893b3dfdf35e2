"""Held-out prompts in training: the split is by text as well as by source."""

import json
import random
from pathlib import Path
from typing import Any

import pytest

from headstart.configs.schema import DataConfig, SourceConfig
from headstart.data.conversations import Conversation, answered
from headstart.data.documents import Documents
from headstart.data.extraction import extract
from headstart.data.prepare import prepare_documents
from headstart.heads.loading import load_target
from headstart.heads.target import Target


@pytest.fixture(scope="module")
def target() -> Target:
    return load_target("tiny-gemma4", "float32")


def written(path: Path, rows: list[dict[str, Any]]) -> SourceConfig:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return SourceConfig(path=str(path))


def data_of(tmp_path: Path, **settings: Any) -> DataConfig:
    small = {"max_new_tokens": 2, "temperatures": [0.0], "teacher_top_k": 4}
    return DataConfig(cache_dir=tmp_path / "cache", **{**small, **settings})


def asked(documents: Documents, target: Target) -> list[str]:
    found = documents.read(range(len(documents.entries)))
    return [target.tokenizer.decode(d.ids[~d.loss_mask][1:]) for d in found]


def normal(texts: list[str]) -> set[str]:
    return {"".join(filter(str.isalnum, text.lower())) for text in texts}


NAMES = ["Ada", "Bo", "Cy", "Dee", "Eve", "Flo"]


@pytest.mark.parametrize(
    "copy",
    [
        lambda i, name: {"id": f"second-{i}", "prompt": f"Who is {name}?"},
        lambda i, name: {"id": f"first-{i}", "prompt": f"Who is {name}?", "source": f"other-{i}"},
        lambda i, name: {"id": f"second-{i}", "prompt": f"  WHO is {name} !\n"},
        lambda i, name: {"messages": [{"role": "user", "content": f"Who is {name}?"}]},
        lambda i, name: {"instruction": "Who is", "input": f"{name}?"},
        lambda i, name: {"prompt": f"Who is {name}?", "response": f"My answer {i}"},
    ],
    ids=["another id", "another source", "another form", "messages", "instruction", "answered"],
)
def test_a_held_out_prompt_that_stands_there_twice_is_not_trained_on(
    copy: Any, target: Target, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [{"id": f"first-{i}", "prompt": f"Who is {name}?"} for i, name in enumerate(NAMES)]
    sources = [
        written(tmp_path / "first.jsonl", rows),
        written(tmp_path / "second.jsonl", [copy(i, name) for i, name in enumerate(NAMES)]),
    ]
    data = data_of(tmp_path, prompts=sources, validation_conversations=3)
    training, validation = prepare_documents(target, data, 0, None)
    held, trained = asked(validation, target), asked(training, target)
    assert len(held) == 3
    assert trained
    assert not normal(held) & normal(trained)
    assert normal(held) | normal(trained) == {f"whois{name.lower()}" for name in NAMES}
    assert "exact" in capsys.readouterr().out


def test_prompts_without_words_are_compared_as_they_are(target: Target, tmp_path: Path) -> None:
    rows = [{"id": i, "prompt": text} for i, text in enumerate(["+ -", "+-", "* /", "% ^", "!?"])]
    data = data_of(
        tmp_path, prompts=[written(tmp_path / "a.jsonl", rows)], validation_conversations=2
    )
    training, validation = prepare_documents(target, data, 0, None)
    held = {text.replace(" ", "") for text in asked(validation, target)}
    trained = {text.replace(" ", "") for text in asked(training, target)}
    assert held | trained == {"+-", "*/", "%^", "!?"}
    assert not held & trained


def test_inputs_without_copies_are_split_and_dealt_as_they_were(
    target: Target, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [{"id": f"r{i}", "prompt": f"Who is {name}?"} for i, name in enumerate(NAMES)]
    data = data_of(
        tmp_path, prompts=[written(tmp_path / "a.jsonl", rows)], validation_conversations=2
    )
    training, validation = prepare_documents(target, data, 0, None)
    # The seeded choice itself: whole sources, dealt over the one category.
    held = random.Random(0).sample(sorted(f"r{i}" for i in range(6)), 6)[:2]
    assert {entry.id for entry in validation.entries} == set(held)
    assert {entry.id for entry in training.entries} == {f"r{i}" for i in range(6)} - set(held)
    assert "duplicates" not in capsys.readouterr().out.replace("Contamination: not", "")


def stored(target: Target, tmp_path: Path, temperature: float | None) -> Path:
    """Six prompts, each under two sources, and their answers."""
    rows: list[Conversation] = []
    for part in ("first", "second"):
        for i, name in enumerate(NAMES):
            ids = target.tokenizer(f"Who is {name}?")["input_ids"]
            names = {"id": f"{part}-{i}", "source": f"{part}-{i}", "category": "c"}
            rows.append(answered(ids, [70 + i, 80, 1], temperature=temperature, **names))
    tokens = sum(len(row.ids) for row in rows)
    extract(target, rows, tokens, data_of(tmp_path), tmp_path / "store")
    return tmp_path / "store"


def test_stored_work_is_split_by_text_too(target: Target, tmp_path: Path) -> None:
    data = data_of(tmp_path, store=stored(target, tmp_path, 0.0), validation_conversations=3)
    training, validation = prepare_documents(target, data, 0, None)
    held, trained = asked(validation, target), asked(training, target)
    assert len(held) == 3
    assert trained
    assert not set(held) & set(trained)


def test_stored_text_of_others_is_split_by_text_from_the_prompts_it_is_validated_on(
    target: Target, tmp_path: Path
) -> None:
    rows = [{"id": f"p{i}", "prompt": f"who is {name}"} for i, name in enumerate(NAMES)]
    data = data_of(
        tmp_path,
        store=stored(target, tmp_path, None),
        prompts=[written(tmp_path / "a.jsonl", rows)],
        validation_conversations=3,
    )
    training, validation = prepare_documents(target, data, 0, None)
    held, trained = normal(asked(validation, target)), normal(asked(training, target))
    assert len(held) == 3
    assert len(trained) == 3
    assert not held & trained


def test_a_set_that_is_one_prompt_many_times_is_refused(target: Target, tmp_path: Path) -> None:
    rows = [{"prompt": "Who is Ada?"}] * 6
    data = data_of(
        tmp_path, prompts=[written(tmp_path / "a.jsonl", rows)], validation_conversations=2
    )
    with pytest.raises(ValueError, match=r"no training prompts are left.*validation_conv"):
        prepare_documents(target, data, 0, None)
    assert not (tmp_path / "cache").exists()

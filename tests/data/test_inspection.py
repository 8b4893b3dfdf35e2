"""What `headstart inspect` says of a data set is what is in it."""

import io
import json
import re
import shutil
import time
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

import pytest
import torch

from headstart.configs.schema import DataConfig, SourceConfig
from headstart.data.conversations import (
    MANIFEST,
    Conversation,
    answered,
    claim_folder,
    finished_parts,
    part_path,
    read_part,
    write_part,
)
from headstart.data.documents import Entry
from headstart.data.extraction import extract
from headstart.data.inspection import (
    Summary,
    inspect_conversations,
    inspect_path,
    inspect_source,
    inspect_store,
)
from headstart.data.regenerate import regenerate
from headstart.data.store import (
    shard_path,
    shard_settings,
    write_index,
    write_shard,
)
from headstart.heads.loading import load_target
from tests.helpers.prompts import conversations, jobs

TARGET = load_target("tiny-gemma4", "float32")
CONFIG = DataConfig(max_new_tokens=6, generation_batch_size=2, teacher_top_k=3)
MADE = {
    "target": "tiny-gemma4",
    "revision": None,
    "fingerprint": "0123456789abcdef",
    "tokenizer": TARGET.tokenizer_hash,
    "max_new_tokens": 9,
    "seed": 4,
}


def ids(text: str) -> list[int]:
    """One token a byte, without <bos>."""
    return list(TARGET.tokenizer(text, add_special_tokens=False)["input_ids"])


def said(asked: str, answer: str, temperature: float = 0.0, **names: Any) -> Conversation:
    names = {"id": "x", "category": "c", "source": "s", "finish_reason": "stop", **names}
    return answered([2, *ids(asked)], [*ids(answer), 1], temperature=temperature, **names)


def make_folder(folder: Path, rows: list[Conversation], **changes: Any) -> Path:
    claim_folder(folder, {**MADE, "conversations": len(rows), **changes}, 1)
    write_part(part_path(folder, 0), rows, TARGET.tokenizer, "tiny-gemma4", None)
    return folder


def make_store(folder: Path, texts: list[Conversation], masses: list[float]) -> Path:
    """A store whose tensors are zeros but for ids and mask."""
    n = sum(len(c.ids) for c in texts)
    mask = [any(a <= i < b for a, b in c.spans) for c in texts for i in range(len(c.ids))]
    tensors = {
        "ids": torch.tensor([i for c in texts for i in c.ids], dtype=torch.int32),
        "loss_mask": torch.tensor(mask),
        "hidden": torch.zeros(n, 2),
        "teacher_ids": torch.zeros(n, 3, dtype=torch.int32),
        "teacher_logprobs": torch.zeros(n, 3),
    }
    entries = [
        Entry(c.id, c.category, c.source, len(c.ids), c.trained, c.temperature, mass)
        for c, mass in zip(texts, masses, strict=True)
    ]
    settings = shard_settings(TARGET, 3, "target")
    folder.mkdir(parents=True, exist_ok=True)
    write_shard(shard_path(folder, 0), tensors, entries, settings)
    write_index(folder, [shard_path(folder, 0)], settings)
    return folder


def printed(path: Path | str, **options: Any) -> str:
    with redirect_stdout(io.StringIO()) as out:
        inspect_path(path, **options)
    return out.getvalue()


def texts_of(summary: Summary) -> list[list[tuple[str, bool]]]:
    return [summary.pieces(c) for c in summary.examples]


def source_summary(path: Path, tokens: bool = False, **settings: Any) -> Summary:
    source = SourceConfig(path=str(path), **settings)
    return inspect_source(source, 3, TARGET if tokens else None, DataConfig())


@pytest.fixture(scope="module")
def regenerated(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Five answers at two temperatures in three parts, and their activations."""
    folder = tmp_path_factory.mktemp("regenerated")
    asked = jobs(TARGET, [0.0, 0.7, 0.0, 0.7, 0.0], CONFIG)
    regenerate(TARGET, asked, CONFIG, 0, folder, extract=True)
    return folder


def test_the_counts_of_a_regenerated_folder_are_those_by_hand(regenerated: Path) -> None:
    answers = [c.trained for part in finished_parts(regenerated) for c in read_part(part)]
    summary = inspect_conversations(regenerated, 3)
    prompts = [16, 13, 10, 7, 4]  # <bos> and i + 1 times "abc", longest first
    assert summary.lengths["prompt"] == prompts
    assert summary.lengths["trained"] == answers
    total = [5, sum(prompts) + sum(answers), sum(answers)]
    assert summary.groups["all"][""] == summary.groups["category"]["c"] == total
    documents, _, trained = summary.groups["temperature"]["0"]
    assert documents == 3
    assert trained == answers[0] + answers[2] + answers[4]
    assert sum(documents for documents, *_ in summary.groups["finish"].values()) == 5
    assert summary.facts["sources"].startswith("5 ")
    assert summary.unit == "tokens"
    assert summary.facts["conversations"] == "5 of 5, in 3 of 3 parts"
    assert summary.facts["fingerprint"] == TARGET.fingerprint
    assert "examples" not in summary.facts
    text = printed(regenerated)
    assert f"{sum(answers) / total[1]:.1%}" in text
    assert text.count("⟦") == text.count("⟧") == 3, "each text is shown once"
    assert f"Conversations in {regenerated}" in text
    assert f"Activation store in {regenerated}" in text


def test_the_store_of_the_same_forwards_has_the_same_counts(regenerated: Path) -> None:
    texts, store = inspect_conversations(regenerated, 5), inspect_store(regenerated, 5)
    assert store.lengths == texts.lengths
    assert store.facts["repeats"] == texts.facts["repeats"]
    assert store.groups["temperature"] == texts.groups["temperature"]
    assert texts_of(store) == texts_of(texts)
    size = sum(path.stat().st_size for path in regenerated.glob("shard-*"))
    assert (
        f"{size / sum(store.lengths['all']):,.0f} bytes a token, 3 shards" in store.facts["on disk"]
    )
    kept = "hidden states, keys and values"
    assert store.facts["stored"] == f"float32, storage=target, top k 3, {kept}"
    assert store.facts["checksums"] == "verified"


def test_in_a_log_a_reading_of_some_length_ends_and_is_not_stopped(
    regenerated: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def slowly(path: Path) -> list[Conversation]:
        time.sleep(0.3)  # longer than one refresh of a bar
        return read_part(path)

    monkeypatch.setattr("headstart.data.inspection.read_part", slowly)
    inspect_conversations(regenerated, examples=0)
    said = capsys.readouterr().out
    assert "ended" in said
    assert "stopped" not in said


def test_unfinished_folders_are_read_as_far_as_they_go(regenerated: Path, tmp_path: Path) -> None:
    shutil.copytree(regenerated, tmp_path, dirs_exist_ok=True)
    (tmp_path / "index.json").unlink()
    part_path(tmp_path, 1).unlink()
    shard_path(tmp_path, 2).unlink()
    texts, store = inspect_conversations(tmp_path, 0), inspect_store(tmp_path, 0)
    assert (len(texts.lengths["all"]), len(store.lengths["all"])) == (3, 4)
    assert texts.facts["conversations"] == "3 of 5, in 2 of 3 parts"
    assert "2 shards so far: unfinished" in store.facts["on disk"]
    for path in tmp_path.glob("part-*"):
        path.unlink()
    assert inspect_conversations(tmp_path, 3).lengths["all"] == []
    assert "0 of 3 parts" in printed(tmp_path)


def test_duplicates_of_documents_and_of_prompts_are_counted(tmp_path: Path) -> None:
    rows = [
        said("one", "yes"),
        said("one", "yes"),
        said("one", "yes", 0.7),
        said("one", "no", 0.7),
        said("two", "yes", 0.7),
        said("two", "yes", 0.7),
        said("two", "other"),
        said("", "yes"),
        said("", "no"),
    ]
    # <bos> alone is no prompt.
    expected = "3 documents equal an earlier one, 5 have the prompt of one"
    assert inspect_conversations(make_folder(tmp_path, rows), 0).facts["repeats"] == expected


def test_marks_stand_exactly_around_the_trained_tokens(tmp_path: Path) -> None:
    turns = [ids("Hi"), ids("yes"), ids("more?"), ids("no")]
    text = [2, *turns[0], *turns[1], *turns[2], *turns[3]]
    two = Conversation("two", "c", "s", text, [(3, 6), (11, 13)])
    make_store(tmp_path / "store", [two], [0.5])
    assert "\n<bos>Hi⟦yes⟧more?⟦no⟧\n" in printed(tmp_path / "store")


def test_no_text_is_taken_for_markup_or_moves_the_cursor(tmp_path: Path) -> None:
    odd = "[bold]a[/] [/red] :smile: \\[x] \x1b[2J\r\x9b1m" + "wide " * 21 + "end"
    row = said("a\nb", odd, category="[/] [bold]", id="[red]")
    make_folder(tmp_path, [row])
    text = printed(tmp_path)
    assert "[bold]a[/] [/red] :smile: \\[x] ␛[2J␍\ufffd1m" in text
    assert "[/] [bold]" in text.partition("[red]: [/] [bold], ")[0], "in the table of counts"
    assert "\x1b[2J" not in text
    assert "wide " * 21 + "end" in text, "a text is not folded"
    assert "<bos>a↵\nb⟦[bold]a" in printed(tmp_path)


def test_a_long_text_is_cut_within_its_pieces(tmp_path: Path) -> None:
    make_folder(tmp_path, [said("a" * 1000, "b" * 1000)])
    ((asked, answer),) = texts_of(inspect_conversations(tmp_path, 1))
    assert asked == ("<bos>" + "a" * 74 + " … 851 tokens … " + "a" * 75, False)
    assert answer == ("b" * 75 + " … 851 tokens … " + "b" * 74 + "<eos>", True)


@pytest.mark.parametrize("wrong", ["target", "tokenizer"])
def test_without_the_tokenizer_token_ids_are_shown(wrong: str, tmp_path: Path) -> None:
    make_folder(tmp_path, [said("a", "b")], **{wrong: str(tmp_path / "moved")})
    text = printed(tmp_path)
    assert f"\n2 {ids('a')[0]} ⟦{ids('b')[0]} 1 ⟧\n" in text
    assert "token ids in place of text" in text
    with pytest.raises(ValueError, match="nowhere/at/all"):
        printed(tmp_path, tokenizer_of="nowhere/at/all")
    if wrong == "target":
        assert "\n<bos>a⟦b" in printed(tmp_path, tokenizer_of="tiny-gemma4")


def test_the_teachers_mass_is_given_by_mean_low_percentile_and_minimum(tmp_path: Path) -> None:
    masses = [0.99] * 38 + [0.5, 0.25]
    make_store(tmp_path, [said("a", "b")] * 40, masses)
    mean = f"{sum(masses) / 40:.2%} of the teacher's mass, mean over documents"
    assert f"{mean} (5th percentile 50.00%, minimum 25.00%)" in printed(tmp_path)


def test_damage_is_found_in_small_stores_and_large_ones_are_not_verified(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    extract(TARGET, conversations(3), 60, CONFIG, tmp_path)
    path = shard_path(tmp_path, 0)
    content = bytearray(path.read_bytes())
    content[-5] ^= 1
    path.write_bytes(bytes(content))
    with pytest.raises(ValueError, match=r"shard-00000.*delete it, then run the command"):
        printed(tmp_path)
    index = (tmp_path / "index.json").read_text()
    (tmp_path / "index.json").unlink()
    with pytest.raises(ValueError, match=r"shard-00000.*delete it, then run the command"):
        printed(tmp_path)
    (tmp_path / "index.json").write_text(index)
    monkeypatch.setattr("headstart.data.inspection.VERIFIED_BELOW", 1)
    assert "not verified" in inspect_store(tmp_path, 0).facts["checksums"]
    path.unlink()
    with pytest.raises(ValueError, match=r"shard-00000\.safetensors is missing"):
        printed(tmp_path)


def prompt_file(folder: Path) -> Path:
    rows = [
        {"prompt": "How are you?", "response": "Very well, thank you.", "category": "chat"},
        {"prompt": "How are you?", "category": "chat"},
        {"text": "Once upon a time", "source": "tale"},
        {"messages": [{"role": "user", "content": "a b"}, {"role": "bot", "content": "c"}] * 2},
        {"prompt": ""},
        {"prompt": " "},
        {"messages": [{"role": "nobody", "content": "x"}]},
    ]
    path = folder / "some.jsonl"
    path.write_text("\n".join([*map(json.dumps, rows), "{"]))
    return path


def test_rows_of_prompts_are_counted_in_words_and_bad_ones_by_reason(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = prompt_file(tmp_path)
    summary = source_summary(path)
    assert summary.unit == "words"
    assert summary.groups["all"][""] == [4, 7 + 3 + 4 + 6, 4 + 0 + 4 + 2]
    assert summary.groups["category"]["chat"][0] == 2
    assert summary.facts["repeats"].endswith(" 1 have the prompt of one")
    skipped = capsys.readouterr().err
    assert f"4 rows, 4 skipped (2 empty prompt, first {path}:5; " in skipped
    assert f"1 unknown role 'nobody', first {path}:7" in skipped
    text = printed(path)
    assert "user: How are you?↵\n⟦Very well, thank you.⟧" in text or "⟦Once upon a time⟧" in text


def test_with_a_tokenizer_rows_are_counted_in_tokens(tmp_path: Path) -> None:
    path = prompt_file(tmp_path)
    summary = source_summary(path, tokens=True)
    whole = [1 + 12 + 21 + 1, 1 + 12, 1 + 16, 1 + len("a b\nc\na b") + 1 + 1]
    assert summary.lengths["all"] == whole
    assert summary.lengths["trained"] == [22, 0, 16, 2]
    assert "trained tokens" in printed(path, tokenizer_of="tiny-gemma4")


def test_the_settings_of_a_source_are_heeded(tmp_path: Path) -> None:
    path = tmp_path / "odd.jsonl"
    path.write_text('{"q": "a b c"}\n' * 5)
    source = SourceConfig(path=str(path), columns={"prompt": "q"}, limit=2)
    text = printed(path, config=DataConfig(prompts=[source]), examples=1)
    assert "user: a b c" in text
    assert source_summary(path, columns={"prompt": "q"}, limit=2).groups["all"][""] == [2, 6, 0]


def test_the_examples_are_a_seeded_draw_from_all_documents(tmp_path: Path) -> None:
    path = tmp_path / "many.jsonl"
    path.write_text("\n".join(json.dumps({"prompt": f"p{i}", "id": f"p{i}"}) for i in range(200)))
    numbers = [int(c.id[1:]) for c in source_summary(path).examples]
    assert numbers == [int(c.id[1:]) for c in source_summary(path).examples]
    assert numbers == sorted(numbers)
    assert max(numbers) > 50, "not the first ones"


@pytest.mark.parametrize("name", ["nothing/here/at-all", "empty"])
def test_a_path_that_is_nothing_is_an_error(name: str, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="no prompt file"):
        printed(tmp_path / name)


def test_an_empty_file_holds_no_prompts(tmp_path: Path) -> None:
    (tmp_path / "empty.jsonl").write_text("\n")
    with pytest.raises(ValueError, match=r"empty\.jsonl holds no prompts$"):
        printed(tmp_path / "empty.jsonl")


def test_of_prompts_alone_nothing_is_counted_as_trained(tmp_path: Path) -> None:
    path = tmp_path / "asked.jsonl"
    row = {"prompt": "who are you?"}
    path.write_text(json.dumps(row) + "\n")
    alone = printed(path)
    assert "trained" not in alone
    assert "coverage" not in alone
    path.write_text(json.dumps(row) + "\n" + json.dumps(row | {"response": "a head"}) + "\n")
    assert "trained words" in printed(path)


def test_lengths_are_given_by_nearest_rank(tmp_path: Path) -> None:
    path = tmp_path / "lengths.jsonl"
    path.write_text("".join(json.dumps({"text": "a " * n}) + "\n" for n in range(1, 101)))
    (row,) = [line for line in printed(path, examples=0).splitlines() if "│ trained" in line]
    assert re.findall(r"\d+", row) == ["5", "25", "50", "75", "95", "100", "100"]


def test_parts_that_no_manifest_accounts_for_are_not_taken_in(tmp_path: Path) -> None:
    """Of other settings, perhaps, or another target."""
    folder = make_folder(tmp_path, [said("a", "b")])
    (folder / MANIFEST).unlink()
    with pytest.raises(ValueError, match=r"conversations\.json does not say which: delete"):
        claim_folder(folder, {**MADE, "conversations": 1}, 1)


@pytest.mark.parametrize("first", [{"kv": False, "layers": []}, None])
def test_a_folder_of_another_kind_of_head_is_not_gone_on_with(
    first: dict[str, Any] | None, tmp_path: Path
) -> None:
    told = [{} if kept is None else {"kept": kept} for kept in (first, {"kv": True, "layers": [1]})]
    make_folder(tmp_path, [said("a", "b")], **told[0])
    claim_folder(tmp_path, {**MADE, "conversations": 1, **told[0]}, 1)
    for other in (told[1], {} if told[0] else {"kept": {"kv": False, "layers": []}}):
        with pytest.raises(ValueError, match="made with kept="):
            claim_folder(tmp_path, {**MADE, "conversations": 1, **other}, 1)

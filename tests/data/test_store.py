"""The store: a round trip, and every way in which a file can be wrong."""

import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from headstart.configs.schema import DataConfig
from headstart.data.documents import Entry
from headstart.data.extraction import extract
from headstart.data.store import (
    ActivationStore,
    Shard,
    bytes_per_token,
    check_space,
    describe_store,
    shard_path,
    shard_settings,
    write_index,
    write_shard,
)
from headstart.heads.target import KEYS_AND_VALUES, Inputs, Target
from tests.helpers.models import make_target
from tests.helpers.prompts import conversations

TARGET = make_target("gemma4")
SETTINGS = shard_settings(TARGET, 3, "target")


def tensors_of(lengths: list[int], seed: int = 0) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    n = sum(lengths)
    return {
        "ids": torch.randint(0, 300, (n,), generator=generator, dtype=torch.int32),
        "loss_mask": torch.rand(n, generator=generator) > 0.5,
        "hidden": torch.randn(n, 8, generator=generator),
        "full_attention.keys": torch.randn(n, 2, 4, generator=generator),
        "full_attention.values": torch.randn(n, 2, 4, generator=generator),
        "teacher_ids": torch.randint(0, 300, (n, 3), generator=generator, dtype=torch.int32),
        "teacher_logprobs": -torch.rand(n, 3, generator=generator),
    }


def entries_for(lengths: list[int], shard: int = 0) -> list[Entry]:
    return [Entry(f"d{shard}-{i}", "c", "s", n, n, 0.0, 0.9) for i, n in enumerate(lengths)]


def make_store(folder: Path, shards: list[list[int]]) -> ActivationStore:
    folder.mkdir(parents=True, exist_ok=True)
    for number, lengths in enumerate(shards):
        path = shard_path(folder, number)
        write_shard(path, tensors_of(lengths, number), entries_for(lengths, number), SETTINGS)
    write_index(folder, [shard_path(folder, i) for i in range(len(shards))], SETTINGS)
    return ActivationStore(folder, TARGET)


@settings(max_examples=30, deadline=None)
@given(st.lists(st.lists(st.integers(1, 9), min_size=1, max_size=5), min_size=1, max_size=4))
def test_every_document_comes_back_as_it_was_written(
    tmp_path_factory: pytest.TempPathFactory, shards: list[list[int]]
) -> None:
    store = make_store(tmp_path_factory.mktemp("store"), shards)
    places = [(s, d) for s, lengths in enumerate(shards) for d in range(len(lengths))]
    assert len(store) == len(places)
    order = torch.randperm(len(places)).tolist()
    for i, document in zip(order, store.read(order), strict=True):
        shard, number = places[i]
        start = sum(shards[shard][:number])
        rows = slice(start, start + shards[shard][number])
        wanted = {name: t[rows] for name, t in tensors_of(shards[shard], shard).items()}
        assert document.id == f"d{shard}-{number}"
        assert torch.equal(document.ids, wanted["ids"].long())
        assert torch.equal(document.loss_mask, wanted["loss_mask"])
        assert torch.equal(document.hidden, wanted["hidden"])
        keys, values = document.shared_kv["full_attention"]
        assert torch.equal(keys, wanted["full_attention.keys"])
        assert torch.equal(values, wanted["full_attention.values"])
        assert torch.equal(document.teacher_ids, wanted["teacher_ids"])
        assert torch.equal(document.teacher_logprobs, wanted["teacher_logprobs"])


def test_int8_is_off_by_half_a_step_of_each_row_at_most(tmp_path: Path) -> None:
    made_with = shard_settings(TARGET, 3, "int8")
    tensors = tensors_of([20])
    tensors["hidden"][3] *= 1000  # a loud row costs the others nothing
    tensors["hidden"][4] = 0
    write_shard(shard_path(tmp_path, 0), tensors, entries_for([20]), made_with)
    write_index(tmp_path, [shard_path(tmp_path, 0)], made_with)
    (document,) = ActivationStore(tmp_path, TARGET).read([0])
    for name, got in (
        ("hidden", document.hidden),
        ("full_attention.keys", document.shared_kv["full_attention"][0]),
    ):
        step = tensors[name].abs().amax(-1, keepdim=True) / 127
        assert ((got - tensors[name]).abs() <= step * 0.501).all()
    assert torch.equal(document.teacher_logprobs, tensors["teacher_logprobs"])


STATES = Inputs(kv=False)
LAYERS = Inputs(kv=False, layers=(0, 2))


@pytest.mark.parametrize("inputs", [KEYS_AND_VALUES, STATES, LAYERS])
@pytest.mark.parametrize("storage", ["target", "int8"])
@pytest.mark.parametrize("family", ["gemma3", "gemma4-moe", "gemma4-kv-sharing"])
def test_the_predicted_size_is_the_size_on_disk(
    family: str, storage: str, inputs: Inputs, tmp_path: Path
) -> None:
    target, rows = make_target(family), conversations(40)
    tokens = sum(len(row.ids) for row in rows)
    config = DataConfig(teacher_top_k=16, storage=storage)  # type: ignore[arg-type]
    extract(target, rows, tokens, config, tmp_path, inputs=inputs)
    each = bytes_per_token(target.config, 4, 16, storage, inputs)  # type: ignore[arg-type]
    predicted = tokens * each
    headers = 40 * 250
    assert predicted <= shard_path(tmp_path, 0).stat().st_size <= predicted + headers


@pytest.mark.parametrize("inputs", [KEYS_AND_VALUES, STATES, LAYERS])
def test_a_store_is_read_for_heads_that_read_no_more_than_it_holds(
    inputs: Inputs, tmp_path: Path
) -> None:
    extract(TARGET, conversations(2), 100, DataConfig(teacher_top_k=3), tmp_path, inputs=inputs)
    for asked in (KEYS_AND_VALUES, STATES, LAYERS, Inputs(kv=False, layers=(1,))):
        if (asked.kv and not inputs.kv) or set(asked.layers) - set(inputs.layers):
            with pytest.raises(ValueError, match="holds no"):
                ActivationStore(tmp_path, TARGET, asked)
        else:
            ActivationStore(tmp_path, TARGET, asked)
    for other in (KEYS_AND_VALUES, STATES, LAYERS):
        settings = shard_settings(TARGET, 3, "target", other)
        if other == inputs:
            Shard(shard_path(tmp_path, 0), settings)
        else:
            with pytest.raises(ValueError, match="of another store: its kept"):
                Shard(shard_path(tmp_path, 0), settings)


def test_few_shards_are_open_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("headstart.data.store.OPEN_SHARDS", 2)
    store = make_store(tmp_path, [[2], [3], [4], [5]])
    for i in (0, 1, 2, 3, 0, 3, 1):
        assert len(store.read([i])[0].ids) == i + 2
        assert store.shard.cache_info().currsize <= 2


def damage(path: Path, at: int) -> None:
    content = bytearray(path.read_bytes())
    content[at] ^= 1
    path.write_bytes(bytes(content))


def test_one_flipped_bit_anywhere_is_found(tmp_path: Path) -> None:
    make_store(tmp_path / "whole", [[3, 4]])
    size = shard_path(tmp_path / "whole", 0).stat().st_size
    for at in range(0, size, 7):
        shutil.rmtree(tmp_path / "cut", ignore_errors=True)
        shutil.copytree(tmp_path / "whole", tmp_path / "cut")
        damage(shard_path(tmp_path / "cut", 0), at)
        with pytest.raises(ValueError, match=r"shard-00000\.safetensors|of another store"):
            ActivationStore(tmp_path / "cut").read([0])


@pytest.mark.parametrize("share", [0.0, 0.01, 0.3, 0.9, 0.999])
def test_a_truncated_shard_is_named_with_its_cure(share: float, tmp_path: Path) -> None:
    store = make_store(tmp_path, [[3], [4]])
    path = shard_path(tmp_path, 1)
    path.write_bytes(path.read_bytes()[: int(share * path.stat().st_size)])
    assert len(store.read([0])) == 1, "the other shard is as good as before"
    with pytest.raises(ValueError, match=r"shard-00001.*delete it, then run the command"):
        store.read([1])


def test_a_missing_and_a_swapped_shard_are_named(tmp_path: Path) -> None:
    make_store(tmp_path, [[3], [4]])
    shutil.copy(shard_path(tmp_path, 0), shard_path(tmp_path, 1))
    with pytest.raises(ValueError, match=r"shard-00001.*is not the shard that the index names"):
        ActivationStore(tmp_path).shard(1)
    shard_path(tmp_path, 1).unlink()
    with pytest.raises(ValueError, match=r"shard-00001.safetensors is missing"):
        ActivationStore(tmp_path).shard(1)


def test_a_store_of_another_target_is_refused_with_both_names(tmp_path: Path) -> None:
    make_store(tmp_path, [[3]])
    with pytest.raises(ValueError, match=r"was made for gemma4 with fingerprint .*gemma3, has"):
        ActivationStore(tmp_path, make_target("gemma3"))
    other = make_target("gemma4")
    other.tokenizer.add_tokens(["hello"])
    with pytest.raises(ValueError, match="with tokenizer"):
        ActivationStore(tmp_path, other)
    half = make_target("gemma4", torch.bfloat16)
    half.__dict__["fingerprint"] = TARGET.fingerprint
    with pytest.raises(ValueError, match="with dtype float32, and this target, gemma4, has bfloat"):
        ActivationStore(tmp_path, half)


def test_a_foreign_shard_is_not_taken_for_finished_work(tmp_path: Path) -> None:
    make_store(tmp_path, [[3]])
    with pytest.raises(ValueError, match="is of another store: its teacher_top_k is 3, this one's"):
        Shard(shard_path(tmp_path, 0), shard_settings(TARGET, 4, "target"))
    shard_path(tmp_path, 0).write_bytes(b"no safetensors at all")
    with pytest.raises(ValueError, match="is cut short or no shard"):
        Shard(shard_path(tmp_path, 0))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "is damaged"),
        ("[]", "is damaged"),
        ('{"format": 1, "sha256": ""}', "is of format 1, this version reads"),
    ],
)
def test_a_damaged_index_is_an_error_with_its_cure(text: str, message: str, tmp_path: Path) -> None:
    make_store(tmp_path, [[3]])
    (tmp_path / "index.json").write_text(text)
    with pytest.raises(ValueError, match=message):
        ActivationStore(tmp_path)
    (tmp_path / "index.json").unlink()
    with pytest.raises(ValueError, match="is unfinished: run the command"):
        ActivationStore(tmp_path)
    with pytest.raises(ValueError, match="holds no activation store"):
        ActivationStore(tmp_path / "nothing")


def test_one_changed_figure_of_the_index_is_found(tmp_path: Path) -> None:
    make_store(tmp_path, [[3, 2]])
    path = tmp_path / "index.json"
    text = path.read_text()
    assert '"length": 3' in text
    path.write_text(text.replace('"length": 3', '"length": 2'))
    with pytest.raises(ValueError, match=r"index.json is damaged; .*: its SHA-256 does not match"):
        ActivationStore(tmp_path)


def test_the_index_names_target_shapes_and_checksums(tmp_path: Path) -> None:
    make_store(tmp_path, [[3, 2]])
    index = json.loads((tmp_path / "index.json").read_text())
    assert index["fingerprint"] == TARGET.fingerprint
    assert index["tokenizer"] == TARGET.tokenizer_hash
    assert index["tensors"]["hidden"] == {"dtype": "F32", "shape": [8]}
    (shard,) = index["shards"]
    assert len(shard["sha256"]) == 64
    assert shard["bytes"] == shard_path(tmp_path, 0).stat().st_size
    assert [d["length"] for d in shard["documents"]] == [3, 2]


def test_more_than_the_disk_holds_is_refused_before_the_start(tmp_path: Path) -> None:
    check_space(tmp_path, 1)
    with pytest.raises(ValueError, match=r"needs up to .* MiB and its disk has .* make room"):
        check_space(tmp_path, 1 << 60)


def test_a_fingerprint_follows_an_adapter(tmp_path: Path) -> None:
    """The weights of an adapter are among those that are hashed."""
    adapted = make_target("gemma4")
    adapted.model.model.layers[0].self_attn.lora = torch.nn.Linear(4, 4)
    assert Target(adapted.model, adapted.tokenizer, "x").fingerprint != TARGET.fingerprint


def test_what_a_store_is_said_to_hold_is_what_its_files_hold(tmp_path: Path) -> None:
    """The mass that the top k keep is a mean over answer tokens, not over documents."""
    path = shard_path(tmp_path, 0)
    entries = [Entry("a", "c", "s", 10, 1, 0.0, 0.5), Entry("b", "c", "s", 30, 9, 0.0, 1.0)]
    write_shard(path, tensors_of([10, 30]), entries, SETTINGS)
    write_index(tmp_path, [path], SETTINGS)
    size = path.stat().st_size / 40
    assert describe_store(ActivationStore(tmp_path, TARGET)) == (
        f"Activations: 2 documents, 40 tokens, {size:,.0f} bytes a token; "
        "the teacher's top 3 keep 95.00% of the mass"
    )


def test_a_shard_that_changes_while_it_is_verified_is_not_noted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_store(tmp_path, [[3], [4]])
    verify = Shard.verify

    def overtaken(self: Shard) -> None:
        verify(self)
        damage(self.path, self.path.stat().st_size - 3)

    with monkeypatch.context() as patch:
        patch.setattr(Shard, "verify", overtaken)
        ActivationStore(tmp_path).read([0])
    with pytest.raises(ValueError, match="its SHA-256 does not match"):
        ActivationStore(tmp_path).read([0])


def test_a_shard_is_verified_once_a_store_and_again_when_it_was_touched(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_store(tmp_path / "a", [[3], [4]])
    checked: list[str] = []
    verify = Shard.verify

    def noted(self: Shard) -> None:
        checked.append(f"{self.path.parent.name} {self.path.name[6:11]}")
        verify(self)

    monkeypatch.setattr(Shard, "verify", noted)
    early = ActivationStore(tmp_path / "a")  # opened before the others have verified anything
    for _ in range(2):
        assert len(ActivationStore(tmp_path / "a").read([0, 1])) == 2
    early.read([0, 1])
    assert checked == ["a 00000", "a 00001"]
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    ActivationStore(tmp_path / "b").read([0])
    assert checked[2:] == ["b 00000"], "a copy is another file"
    path = shard_path(tmp_path / "a", 1)
    times = path.stat()
    damage(path, path.stat().st_size - 3)
    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))
    with pytest.raises(ValueError, match="its SHA-256 does not match"):
        ActivationStore(tmp_path / "a").read([1])

"""The activation store: what training reads of the target, on disk, verified and random-access.

A store is a folder of shards (`data/shards.py`) and an `index.json`. Whatever shards are there are
finished work; the index is drawn up from their headers at the end.
"""

import json
import shutil
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, Protocol

import torch
from pydantic import TypeAdapter

from headstart.configs.schema import DataConfig
from headstart.data.shards import FORMAT, Document, Entry, Shard, Storage, refusal, shard_paths
from headstart.heads.admission import reading
from headstart.heads.files import content_sha256, plain_name, write_atomically
from headstart.heads.progress import say
from headstart.heads.targets import Target, source_layers

ENTRIES = TypeAdapter(list[Entry])
OPEN_SHARDS = 32  # memory maps held at once
SAID_ABOVE = 1 << 20  # bytes


class Documents(Protocol):
    """Activations of documents, wherever they come from."""

    entries: Sequence[Entry]

    def read(self, which: Sequence[int]) -> list[Document]:
        """The documents with these indices."""


def bytes_per_token(config: Any, width: int, top_k: int, storage: Storage) -> int:
    """Bytes that a store takes for each token, but for headers.

    Args:
        config: the target's text configuration.
        width: bytes of one value in the target's dtype.
        top_k: teacher tokens.
        storage: of hidden states, keys and values.
    """
    kv = [config.per_layer_config[i] for i in source_layers(config).values()]
    rows = [(1, config.hidden_size)] + [(2 * c.num_key_value_heads, c.head_dim) for c in kv]
    activations = sum(n * (d + 4 if storage == "int8" else d * width) for n, d in rows)
    return activations + 8 * top_k + 5  # token id and loss mask


def stored_bytes(target: Target, data: DataConfig) -> int:
    """Bytes a token of what `target` would store as `data` says."""
    width = target.table.element_size()
    return bytes_per_token(target.config, width, data.teacher_top_k, data.storage)


def check_space(folder: Path, needed: int, at_least: int | None = None) -> None:
    """Say how many bytes are to be written; raise `ValueError` where the disk has fewer free.

    Args:
        folder: to write into.
        needed: bytes, or an upper bound of them.
        at_least: a lower bound, where the size is not known: the disk must have that much.
    """
    free = shutil.disk_usage(folder).free
    if needed > SAID_ABOVE:
        say(
            f"{folder}: up to {needed / 2**20:,.0f} MiB to write, {free / 2**20:,.0f} MiB free"
        )  # fmt: skip
    if (needed if at_least is None else at_least) > free:
        raise ValueError(
            f"{folder} needs up to {needed / 2**20:,.0f} MiB and its disk has "
            f"{free / 2**20:,.0f} MiB free: make room, name another folder, or store less "
            "(data.storage=int8, a smaller data.teacher_top_k, fewer conversations, or "
            "data.online=true, which stores nothing)"
        )


def write_index(folder: Path, shards: list[Path], settings: dict[str, Any]) -> None:
    """Draw up `index.json` from the headers of finished shards.

    Raises:
        ValueError: one of them is damaged or of another store.
    """
    rows = []
    shapes: dict[str, Any] = {}
    for path in shards:
        shard = Shard(path, settings)
        shapes = shard.tensor_shapes()
        rows.append(
            {
                "file": path.name,
                "bytes": path.stat().st_size,
                "sha256": shard.sha256,
                "documents": [asdict(e) for e in shard.entries],
            }
        )
    content = {**settings, "tensors": shapes, "shards": rows}
    content["sha256"] = content_sha256(content)
    write_atomically(folder / "index.json", json.dumps(content) + "\n")


class ActivationStore:
    """Random access to the documents of a finished store.

    Tensors are memory-mapped, a bounded number of shards at a time. Each shard is verified against
    its checksum when it is first read.

    Args:
        folder: of the store.
        target: the target that the store must have been made for; None: any.

    Raises:
        ValueError: the store is missing, unfinished, damaged or of another target.
    """

    def __init__(self, folder: Path, target: Target | None = None):
        self.folder = folder
        self.index = read_index(folder)
        if target is not None:
            check_made_for(self.index, target, folder)
        self.settings = {
            k: v for k, v in self.index.items() if k not in ("tensors", "shards", "sha256")
        }  # fmt: skip
        entries: list[Entry] = []
        self._places: list[tuple[int, int]] = []  # shard number, first token
        with reading(str(folder / "index.json"), "is damaged"):
            for number, shard in enumerate(self.index["shards"]):
                start = 0
                for entry in ENTRIES.validate_python(shard.pop("documents")):
                    entries.append(entry)
                    self._places.append((number, start))
                    start += entry.length
        self.entries: Sequence[Entry] = entries
        self._open: OrderedDict[int, Shard] = OrderedDict()
        self._verified: set[int] = set()

    def __len__(self) -> int:
        return len(self.entries)

    def read(self, which: Sequence[int]) -> list[Document]:
        """The documents with these indices."""
        documents = []
        for i in which:
            number, start = self._places[i]
            documents.append(self.shard(number).read(start, self.entries[i]))
        return documents

    def prompts(self) -> Iterator[list[int]]:
        """The token ids of each document that the target did not write, in order."""
        for row in self.index["shards"]:
            shard = Shard(self.folder / row["file"], self.settings)
            ids, mask, start = torch.tensor(shard.read_ids()), shard.read_mask(), 0
            for entry in shard.entries:
                span = slice(start, start + entry.length)
                yield ids[span][~mask[span]].tolist()
                start += entry.length

    def verify(self) -> None:
        """Raise `ValueError` unless every shard is whole."""
        for number in range(len(self.index["shards"])):
            self.shard(number)

    def shard(self, number: int) -> Shard:
        """One of the shards, verified; the files stay open, a bounded number of them."""
        if number in self._open:
            self._open.move_to_end(number)
            return self._open[number]
        row = self.index["shards"][number]
        path = self.folder / row["file"]
        if not path.is_file():
            raise ValueError(f"{path} is missing: run the command that made the store again")
        shard = Shard(path, self.settings)
        if number not in self._verified:
            if shard.sha256 != row["sha256"]:
                raise ValueError(refusal(path, "is not the shard that the index names"))
            shard.verify()
            self._verified.add(number)
        self._open[number] = shard
        if len(self._open) > OPEN_SHARDS:
            self._open.popitem(last=False)
        return shard


def read_index(folder: Path) -> dict[str, Any]:
    """The content of `index.json`.

    Raises:
        ValueError: there is none, or it cannot be read.
    """
    path = folder / "index.json"
    if not path.is_file():
        state = "is unfinished: run the command that makes it again, which goes on where it stopped"
        if not shard_paths(folder):
            state = "holds no activation store: make one with `headstart extract`"
        raise ValueError(f"{folder} {state}")
    try:
        index: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        made_of = index["format"]
        intact = content_sha256(index) == index["sha256"]
    except (ValueError, LookupError, TypeError, AttributeError) as error:
        raise ValueError(
            f"{path} is damaged ({error}): delete it and run the command that made it again"
        ) from error
    if made_of != FORMAT:
        raise ValueError(
            f"{path} is of format {made_of}, this version reads {FORMAT}: extract again"
        )
    if not intact:
        raise ValueError(
            f"{path} is damaged (its SHA-256 does not match): delete it and run the command that "
            "made it again"
        )
    with reading(str(path), "is damaged"):
        for row in index["shards"]:
            plain_name(row["file"], path)
    return index


def check_made_for(index: dict[str, Any], target: Target, folder: Path) -> None:
    """Raise `ValueError`, naming both, unless the store was made for `target`."""
    dtype = str(target.table.dtype).removeprefix("torch.")
    for key, wanted in (
        ("fingerprint", target.fingerprint),
        ("tokenizer", target.tokenizer_hash),
        ("dtype", dtype),
    ):
        if index[key] != wanted:
            raise ValueError(
                f"{folder} was made for {index['target']} with {key} {index[key][:12]}, and this "
                f"target, {target.name}, has {wanted[:12]}: extract a store for it"
            )

"""The activation store: what training reads of the target, on disk, verified and random-access.

A store is a folder of shards and an `index.json`. A shard holds documents with their activations in
one safetensors file; it describes itself: its header names the target, the tokenizer and its
documents, and holds a SHA-256 over all of that and every tensor. It appears whole or not at all.
Whatever shards are there are finished work; the index is drawn up from their headers at the end.

Letters: N tokens of a shard, T tokens of a document, D target width, k teacher tokens.
"""

import hashlib
import json
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import TypeAdapter
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from headstart.common.console import print_once
from headstart.common.files import atomic_file, content_sha256, plain_name, write_atomically
from headstart.configs.schema import DataConfig
from headstart.data.documents import PLAIN, SCALE, Document, Entry, prompt_tokens
from headstart.heads.admission import is_finite, reading
from headstart.heads.target import KEYS_AND_VALUES, Inputs, Target, source_layers

FORMAT = 2  # raise it when a shard comes to hold something else
Storage = Literal["target", "int8"]


NOTED = {"target", "config", "chat_template_kwargs"}
"""What a store says of itself and a shard need not: a name may change, its fingerprint not; and the
tokens are what variables of the template have made of them."""


KEPT = "kept"
"""What is stored beside last hidden states and teachers, in settings that say so."""


def kept_settings(inputs: Inputs) -> dict[str, Any]:
    """What settings say of what is stored for such heads. Nothing, where it is keys and values
    alone: that is what stores hold that do not say."""
    if inputs.kv and not inputs.layers and not inputs.prompts:
        return {}
    prompts = {"prompts": True} if inputs.prompts else {}
    return {KEPT: {"kv": inputs.kv, "layers": list(inputs.layers), **prompts}}


def check_kept(settings: dict[str, Any], inputs: Inputs, folder: Path) -> None:
    """Raise `ValueError`, naming what is missing, where a store of these settings does not hold
    what such heads read; more than that does no harm."""
    there = settings.get(KEPT, {"kv": True, "layers": []})
    missing = ["keys and values"] if inputs.kv and not there["kv"] else []
    missing += [f"outputs of layer {i}" for i in inputs.layers if i not in there["layers"]]
    if missing:
        raise ValueError(
            f"{folder} was made for heads of other kinds and holds no {', no '.join(missing)}: "
            "name another store, or make one with the head.kind that is trained"
        )
    if inputs.prompts and not there.get("prompts"):
        raise ValueError(
            f"{folder} does not hold what the target says within prompts: extract one with "
            "data.completion_only_loss=false, or leave that out here"
        )


def describe_kept(settings: dict[str, Any]) -> str:
    """What a store of these settings holds of the target, in words."""
    there = settings.get(KEPT, {"kv": True, "layers": []})
    more = ["keys and values"] if there["kv"] else []
    more += [f"outputs of layer {i}" for i in there["layers"]]
    more += ["teachers within prompts"] if there.get("prompts") else []
    return ", ".join(["hidden states", *more])


def shard_settings(
    target: Target, top_k: int, storage: Storage, inputs: Inputs = KEYS_AND_VALUES
) -> dict[str, Any]:
    """What a shard must have been made with to belong to a store."""
    return {
        "format": FORMAT,
        "target": target.name,
        "config": target.settings,
        "fingerprint": target.fingerprint,
        "tokenizer": target.tokenizer_hash,
        "dtype": str(target.table.dtype).removeprefix("torch."),
        "storage": storage,
        "teacher_top_k": top_k,
        **kept_settings(inputs),
    }


def to_int8(rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Symmetric int8 with a scale for each last-axis row.

    Args:
        rows: [..., n].

    Returns:
        int8 [..., n] and float32 scales [..., 1]: rows ~ int8 * scale, off by half a scale at most.
    """
    scale = rows.float().abs().amax(-1, keepdim=True).clamp_min(1e-12) / 127
    return (rows.float() / scale).round().to(torch.int8), scale


def on_cpu(name: str, tensor: torch.Tensor, storage: Storage) -> dict[str, torch.Tensor]:
    """A tensor of a shard in the machine's memory, as it is stored: quantized where it was, so that
    fewer bytes leave the device."""
    if storage == "int8" and name not in PLAIN:
        values, scale = to_int8(tensor)
        return {name: values.cpu(), name + SCALE: scale.cpu()}
    return {name: tensor.cpu()}


def shard_path(folder: Path, number: int) -> Path:
    return folder / f"shard-{number:05d}.safetensors"


def shard_paths(folder: Path) -> list[Path]:
    """The shards of a folder, finished ones alone, in order."""
    return sorted(folder.glob("shard-*.safetensors"))


def write_shard(
    path: Path, tensors: dict[str, torch.Tensor], entries: list[Entry], settings: dict[str, Any]
) -> None:
    """Write one shard, whole or not at all.

    Args:
        path: from `shard_path`.
        tensors: name -> [N, ...], in the target's dtype, or as `on_cpu` gives them; see `Document`
            for the names, keys and values being called `TYPE.keys` and `TYPE.values`.
        entries: of the documents, in the order of their tokens.
        settings: from `shard_settings`.

    Raises:
        ValueError: a tensor holds NaN or infinity.
        OSError: with what to do, when the disk is full.
    """
    stored = {}
    for name, tensor in tensors.items():
        if tensor.dtype == torch.int8 or name.endswith(SCALE):  # quantized before
            stored[name] = tensor
        else:
            stored |= on_cpu(name, tensor, settings["storage"])
        if not is_finite(tensor):  # the scale of a row tells too
            raise ValueError(
                f"{path} is not written: its {name.removesuffix(SCALE)}, out of the target, hold "
                "NaN or infinity. "
                "`headstart check` says more of the target; in bfloat16 try target.dtype=float32"
            )
    stored = {name: tensor.contiguous() for name, tensor in stored.items()}
    header = json.dumps({"settings": settings, "documents": [asdict(e) for e in entries]})
    with atomic_file(path) as work:
        # One entry alone: safetensors writes several in an order that changes from run to run.
        save_file(stored, work, metadata={"headstart": f"{_digest(stored, header)} {header}"})


def _digest(tensors: dict[str, torch.Tensor], header: str) -> str:
    digest = hashlib.sha256(header.encode())
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        flat = tensor.contiguous().view(-1)
        digest.update(flat.view(torch.uint8).numpy().data if flat.numel() else b"")
    return digest.hexdigest()


class Shard:
    """One opened shard, memory-mapped.

    Args:
        path: of the file.
        settings: what the shard must have been made with; None: whatever it says.

    Raises:
        ValueError: the file is cut short, damaged, no shard, or of another store.
    """

    def __init__(self, path: Path, settings: dict[str, Any] | None = None):
        self.path = path
        try:
            self._file = safe_open(path, framework="pt")
            metadata = self._file.metadata() or {}
            self.sha256, _, self._header = metadata["headstart"].partition(" ")
            header = json.loads(self._header)
            self.settings: dict[str, Any] = header["settings"]
            self.entries = [Entry(**entry) for entry in header["documents"]]
        except (OSError, SafetensorError, ValueError, KeyError, TypeError) as e:
            raise ValueError(refusal(path, f"is cut short or no shard ({e})")) from e
        if settings is not None:
            for key in (settings.keys() | {KEPT}) - NOTED:
                wanted = settings.get(key)
                if (found := self.settings.get(key)) != wanted:
                    raise ValueError(
                        f"{path} is of another store: its {key} is {found}, this one's {wanted}; "
                        "move it away, or name another folder"
                    )
        self.names = sorted(self._file.keys())

    @cached_property
    def _tensors(self) -> dict[str, torch.Tensor]:
        """By name, memory-mapped."""
        return {name: self._file.get_tensor(name) for name in self.names}

    def verify(self) -> None:
        """Raise `ValueError` unless header and tensors are those that were written."""
        if _digest(self._tensors, self._header) != self.sha256:
            raise ValueError(refusal(self.path, "is damaged (its SHA-256 does not match)"))
        if wrong := [name for name, tensor in self._tensors.items() if not is_finite(tensor)]:
            raise ValueError(refusal(self.path, f"holds NaN or infinity in {', '.join(wrong)}"))

    def read(self, start: int, entry: Entry) -> Document:
        """The document whose tokens begin at `start`."""
        span = slice(start, start + entry.length)
        tensors = {name: tensor[span] for name, tensor in self._tensors.items()}
        return Document.of(tensors, entry.id, getattr(torch, self.settings["dtype"]))

    def texts(self) -> Iterator[tuple[Entry, torch.Tensor, torch.Tensor]]:
        """Each document's entry, token ids and loss mask, [T] each."""
        ids, mask = self._file.get_tensor("ids"), self._file.get_tensor("loss_mask")
        start = 0
        for entry in self.entries:
            span = slice(start, start + entry.length)
            yield entry, ids[span], mask[span]
            start += entry.length

    def shapes(self) -> dict[str, dict[str, Any]]:
        """Name -> dtype and shape of one token's values."""
        parts = [(name, self._file.get_slice(name)) for name in self.names]
        return {n: {"dtype": str(p.get_dtype()), "shape": p.get_shape()[1:]} for n, p in parts}


def refusal(path: Path, what: str) -> str:
    return (
        f"{path} {what}: delete it, then run the command that made it again, which redoes it alone"
    )


ENTRIES = TypeAdapter(list[Entry])
OPEN_SHARDS = 32  # memory maps held at once
SAID_ABOVE = 1 << 20  # bytes


def bytes_per_token(
    config: Any, width: int, top_k: int, storage: Storage, inputs: Inputs = KEYS_AND_VALUES
) -> int:
    """Bytes that a store takes for each token, but for headers.

    Args:
        config: the target's text configuration.
        width: bytes of one value in the target's dtype.
        top_k: teacher tokens.
        storage: of hidden states, keys and values.
        inputs: of the heads that it is for.
    """
    kv = [config.per_layer_config[i] for i in source_layers(config).values()] * inputs.kv
    rows = [(1 + len(inputs.layers), config.hidden_size)]
    rows += [(2 * c.num_key_value_heads, c.head_dim) for c in kv]
    activations = sum(n * (d + 4 if storage == "int8" else d * width) for n, d in rows)
    return activations + 8 * top_k + 5  # token id and loss mask


def stored_bytes(target: Target, data: DataConfig, inputs: Inputs = KEYS_AND_VALUES) -> int:
    """Bytes a token of what `target` would store as `data` says."""
    width = target.table.element_size()
    return bytes_per_token(target.config, width, data.teacher_top_k, data.storage, inputs)


def check_space(folder: Path, needed: int, at_least: int | None = None) -> None:
    """Say how many bytes are to be written; raise `ValueError` where the disk has fewer free.

    Args:
        folder: to write into.
        needed: bytes, or an upper bound of them.
        at_least: a lower bound, where the size is not known: the disk must have that much.
    """
    free = shutil.disk_usage(folder).free
    if needed > SAID_ABOVE:
        print_once(
            f"{folder}: up to {needed / 2**20:,.0f} MiB to write, {free / 2**20:,.0f} MiB free"
        )
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
        shapes = shard.shapes()
        row = {"file": path.name, "bytes": path.stat().st_size, "sha256": shard.sha256}
        rows.append({**row, "documents": [asdict(e) for e in shard.entries]})
    content = {**settings, "tensors": shapes, "shards": rows}
    content["sha256"] = content_sha256(content)
    write_atomically(folder / "index.json", json.dumps(content) + "\n")


VERIFIED = "verified.jsonl"


class Verified:
    """Notes of which shards of a store have been verified, by whatever process, and not been
    touched since; other processes may add to them at the same time.

    To verify a shard takes as long as to read it whole, which for a large store is minutes in each
    process of each run. So what was verified is noted in the store's folder, with what the file
    system says of the file then: size, times of change and inode. A copy of the store, or a file
    that somebody wrote to, is verified anew.

    Args:
        folder: of the store; where it cannot be written to, only this object remembers.
    """

    def __init__(self, folder: Path):
        self.path = folder / VERIFIED
        self._known = set[bytes]()
        self._read = 0  # bytes of the file

    def verify(self, file: Path, sha256: str, verify: Callable[[], None]) -> None:
        """Have a file verified to be of this checksum, if it was not, and note it; not where
        somebody changed the file meanwhile."""
        note = _note(file, sha256)
        if note not in self._known:
            self._read_on()
        if note in self._known:
            return
        verify()
        if _note(file, sha256) != note:
            return
        self._known.add(note)
        try:
            with self.path.open("ab") as notes:
                notes.write(note + b"\n")
        except OSError:
            pass  # of a store that others made, or on a disk that is full: verified again next time

    def _read_on(self) -> None:
        """Take in what was added since."""
        try:
            with self.path.open("rb") as notes:
                notes.seek(self._read)
                added = notes.read()
        except OSError:
            return
        whole = added[: added.rfind(b"\n") + 1]  # a line may be on its way
        self._known.update(whole.splitlines())
        self._read += len(whole)


def _note(file: Path, sha256: str) -> bytes:
    found = file.stat()
    state = [found.st_size, found.st_mtime_ns, found.st_ctime_ns, found.st_ino]
    return json.dumps([file.name, sha256, *state]).encode()


class ActivationStore:
    """Random access to the documents of a finished store.

    Tensors are memory-mapped, a bounded number of shards at a time. Each shard is verified against
    its checksum when it is first read (`Verified`).

    Args:
        folder: of the store.
        target: the target that the store must have been made for; None: any.
        inputs: of the heads that will read it, for which it must hold enough; None: of any.

    Raises:
        ValueError: the store is missing, unfinished, damaged or of another target.
    """

    def __init__(self, folder: Path, target: Target | None = None, inputs: Inputs | None = None):
        self.folder = folder
        self.index = read_index(folder)
        if target is not None:
            check_made_for(self.index, target, folder)
        if inputs is not None:
            check_kept(self.index, inputs, folder)
        beside = ("tensors", "shards", "sha256")
        self.settings = {k: v for k, v in self.index.items() if k not in beside}
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
        self._verified = Verified(folder)
        self.shard = lru_cache(OPEN_SHARDS)(self._open)
        """One of the shards by its number, verified; a bounded number of files stays open."""

    def __len__(self) -> int:
        return len(self.entries)

    def read(self, which: Sequence[int]) -> list[Document]:
        """The documents with these indices."""
        documents = []
        for i in which:
            (number, start), entry = self._places[i], self.entries[i]
            shard = self.shard(number)
            try:
                documents.append(shard.read(start, entry))
            except (OSError, SafetensorError) as e:
                what = f"cannot be read at the document {entry.id} ({e})"
                raise ValueError(refusal(shard.path, what)) from e
        return documents

    def prompts(self) -> Iterator[list[int]]:
        """The token ids of each document's prompt, in order."""
        for row in self.index["shards"]:
            for _, ids, mask in Shard(self.folder / row["file"], self.settings).texts():
                yield prompt_tokens(ids, mask)

    def _open(self, number: int) -> Shard:
        row = self.index["shards"][number]
        path = self.folder / row["file"]
        if not path.is_file():
            raise ValueError(f"{path} is missing: run the command that made the store again")
        shard = Shard(path, self.settings)
        if shard.sha256 != row["sha256"]:
            raise ValueError(refusal(path, "is not the shard that the index names"))
        self._verified.verify(path, shard.sha256, shard.verify)
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
    with reading(str(path), "is damaged; delete it and run the command that made it again"):
        index: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        if index["format"] != FORMAT:
            raise ValueError(
                f"{path} is of format {index['format']}, this version reads {FORMAT}: extract again"
            )
        if content_sha256(index) != index["sha256"]:
            raise ValueError("its SHA-256 does not match")
        for row in index["shards"]:
            plain_name(row["file"], path)
    return index


def check_made_for(index: dict[str, Any], target: Target, folder: Path) -> None:
    """Raise `ValueError`, naming both, unless the store was made for `target`."""
    ours = shard_settings(target, 0, "target")
    for key in ("fingerprint", "tokenizer", "dtype"):
        if index[key] != (wanted := ours[key]):
            raise ValueError(
                f"{folder} was made for {index['target']} with {key} {index[key][:12]}, and this "
                f"target, {target.name}, has {wanted[:12]}: extract a store for it"
            )


def describe_store(store: ActivationStore) -> str:
    """One line: documents, tokens, bytes a token, and the share of mass that the top k keep."""
    kept = [(e.top_k_mass, e.trained) for e in store.entries if e.top_k_mass is not None]
    mass = sum(m * n for m, n in kept) / max(sum(n for _, n in kept), 1)
    tokens = sum(e.length for e in store.entries)
    size = sum(shard["bytes"] for shard in store.index["shards"])
    return (
        f"Activations: {len(store):,} documents, {tokens:,} tokens, {size / tokens:,.0f} bytes a "
        f"token; the teacher's top {store.index['teacher_top_k']} keep {mass:.2%} of the mass"
    )

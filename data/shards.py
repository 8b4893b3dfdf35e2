"""One shard of the activation store: documents with their activations, in one safetensors file.

A shard describes itself: its header names the target, the tokenizer and its documents, and holds a
SHA-256 over all of that and every tensor. It appears whole or not at all.

Letters: N tokens of a shard, T tokens of a document, D target width, k teacher tokens.
"""

import hashlib
import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from headstart.heads.files import whole_file
from headstart.heads.finite import is_finite
from headstart.heads.gemma3 import SharedKV
from headstart.heads.targets import Target

FORMAT = 2  # raise it when a shard comes to hold something else
Storage = Literal["target", "int8"]
PLAIN = ("ids", "loss_mask", "teacher_ids", "teacher_logprobs")
"""Tensors that int8 storage leaves as they are."""


@dataclass(frozen=True)
class Document:
    """One conversation with its activations; T tokens."""

    id: str
    ids: torch.Tensor
    """[T] int64."""
    loss_mask: torch.Tensor
    """[T] bool: tokens that the target wrote, which the head learns to draft."""
    hidden: torch.Tensor
    """[T, D] post-norm hidden states."""
    shared_kv: SharedKV
    """Layer type -> (keys, values), each [T, kv heads, head_dim]."""
    teacher_ids: torch.Tensor
    """[T, k] int32: the target's top tokens after position t, best first."""
    teacher_logprobs: torch.Tensor
    """[T, k] float32 at temperature 1. Rows before which nothing is to be learnt hold zeros: those
    whose next token `loss_mask` leaves out.

    Of a text recorded while it was written the last row of all activations holds zeros too: the
    target never ran on its last token, and no training row reads it.
    """

    @staticmethod
    def of(tensors: dict[str, torch.Tensor], document_id: str) -> "Document":
        """From the tensors of its tokens, named as in a shard."""
        types = sorted(name.removesuffix(".keys") for name in tensors if name.endswith(".keys"))
        return Document(
            id=document_id,
            ids=tensors["ids"].long(),
            loss_mask=tensors["loss_mask"],
            hidden=tensors["hidden"],
            shared_kv={t: (tensors[f"{t}.keys"], tensors[f"{t}.values"]) for t in types},
            teacher_ids=tensors["teacher_ids"],
            teacher_logprobs=tensors["teacher_logprobs"],
        )


@dataclass(frozen=True)
class Entry:
    """What the index says of a document, without its tensors."""

    id: str
    category: str
    source: str
    """Where the text comes from; documents of one source never straddle training and held-out."""
    length: int
    """T."""
    trained: int
    """Tokens in the loss mask."""
    temperature: float | None
    """At which the target wrote it; 0 greedy, None not known."""
    top_k_mass: float | None
    """Mean probability that the stored top k tokens hold, over the taught rows; None: not known,
    or no row is taught."""


NOTED = {"target", "chat_template_kwargs"}
"""What a store says of itself and a shard need not: a name may change, its fingerprint not; and the
tokens are what variables of the template have made of them."""


def shard_settings(target: Target, top_k: int, storage: Storage) -> dict[str, Any]:
    """What a shard must have been made with to belong to a store."""
    return {
        "format": FORMAT,
        "target": target.name,
        "fingerprint": target.fingerprint,
        "tokenizer": target.tokenizer_hash,
        "dtype": str(target.table.dtype).removeprefix("torch."),
        "storage": storage,
        "teacher_top_k": top_k,
    }


def quantise(rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Symmetric int8 with a scale for each last-axis row.

    Args:
        rows: [..., n].

    Returns:
        int8 [..., n] and float32 scales [..., 1]: rows ~ int8 * scale, off by half a scale at most.
    """
    scale = rows.float().abs().amax(-1, keepdim=True).clamp_min(1e-12) / 127
    return (rows.float() / scale).round().to(torch.int8), scale


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
        tensors: name -> [N, ...], in the target's dtype; see `Document` for the names, keys and
            values being called `TYPE.keys` and `TYPE.values`.
        entries: of the documents, in the order of their tokens.
        settings: from `shard_settings`.

    Raises:
        ValueError: a tensor holds NaN or infinity.
        OSError: with what to do, when the disk is full.
    """
    stored = {}
    for name, tensor in tensors.items():
        if settings["storage"] == "int8" and name not in PLAIN:
            stored[name], stored[f"{name}.scale"] = quantise(tensor)
        else:
            stored[name] = tensor
        if not is_finite(tensor):
            raise ValueError(
                f"{path} is not written: its {name}, out of the target, hold NaN or infinity. "
                "`headstart check` says more of the target; in bfloat16 try target.dtype=float32"
            )
    stored = {name: tensor.contiguous() for name, tensor in stored.items()}
    header = json.dumps({"settings": settings, "documents": [asdict(e) for e in entries]})
    with whole_file(path) as work:
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
        except (
            OSError,
            SafetensorError,
            json.JSONDecodeError,
            UnicodeDecodeError,
            KeyError,
            TypeError,
        ) as e:
            raise ValueError(refusal(path, f"is cut short or no shard ({e})")) from e
        if settings is not None:
            for key in settings.keys() - NOTED:
                wanted = settings[key]
                if (found := self.settings.get(key)) != wanted:
                    raise ValueError(
                        f"{path} is of another store: its {key} is {found}, this one's {wanted}; "
                        "move it away, or name another folder"
                    )
        self.names = sorted(self._file.keys())

    def verify(self) -> None:
        """Raise `ValueError` unless header and tensors are those that were written."""
        tensors = {name: self._file.get_tensor(name) for name in self.names}
        if _digest(tensors, self._header) != self.sha256:
            raise ValueError(refusal(self.path, "is damaged (its SHA-256 does not match)"))
        if wrong := [name for name, tensor in tensors.items() if not is_finite(tensor)]:
            raise ValueError(refusal(self.path, f"holds NaN or infinity in {', '.join(wrong)}"))

    def read(self, start: int, entry: Entry) -> Document:
        """The document whose tokens begin at `start`."""
        span = slice(start, start + entry.length)
        tensors = {n: self._file.get_slice(n)[span] for n in self.names if ".scale" not in n}
        if self.settings["storage"] == "int8":
            dtype = getattr(torch, self.settings["dtype"])
            for name in [n for n in tensors if f"{n}.scale" in self.names]:
                scale = self._file.get_slice(f"{name}.scale")[span]
                tensors[name] = (tensors[name].float() * scale).to(dtype)
        return Document.of(tensors, entry.id)

    def read_ids(self) -> list[int]:
        """The token ids of all its documents, one after the other."""
        ids: list[int] = self._file.get_tensor("ids").tolist()
        return ids

    def read_mask(self) -> torch.Tensor:
        """The loss masks of all its documents, [N] bool."""
        mask: torch.Tensor = self._file.get_tensor("loss_mask")
        return mask

    def tensor_shapes(self) -> dict[str, dict[str, Any]]:
        """Name -> dtype and shape of one token's values."""
        parts = {name: self._file.get_slice(name) for name in self.names}
        return {
            name: {"dtype": str(part.get_dtype()), "shape": part.get_shape()[1:]}
            for name, part in parts.items()
        }


def refusal(path: Path, what: str) -> str:
    return (
        f"{path} {what}: delete it, then run the command that made it again, which redoes it alone"
    )

"""What training reads of the target, stored once: a token costs a copy, not a forward.

One safetensors shard holds the concatenated tokens of a few conversations; `index.json` says
where each begins. Letters: N tokens of a shard, D target width, k teacher tokens, V vocabulary.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file

from headstart.configs.schema import DataConfig
from headstart.data.conversations import Conversation, batch_files, read_batch, stable_hash
from headstart.data.progress import progress_bar
from headstart.data.recording import top_logprobs
from headstart.heads.demo import cache_dir
from headstart.heads.files import part_name, write_atomically
from headstart.heads.gemma3 import SharedKV
from headstart.heads.targets import Target

FORMAT = 1  # of the cache: raise it when the same settings come to store something else
BATCH = 8  # conversations a forward and a shard
LOGIT_ROWS = 128  # rows of V float32 logits held at once


@dataclass(frozen=True)
class Document:
    """One conversation with its activations; T tokens."""

    id: str
    prompt_len: int
    ids: torch.Tensor
    """[T] int64."""
    hidden: torch.Tensor
    """[T, D] post-norm hidden states, in the target's dtype."""
    shared_kv: SharedKV
    """Layer type -> (keys, values), each [T, kv heads, head_dim]."""
    teacher_ids: torch.Tensor
    """[T, k] int32: the target's top tokens after position t, best first."""
    teacher_logprobs: torch.Tensor
    """[T, k] float32 at temperature 1. Rows of the prompt but its last hold zeros.

    Of a text recorded while it was written the last row of every tensor but `ids` holds zeros:
    the target never ran on its last token, and no training row reads it.
    """


class ActivationStore(Sequence[Document]):
    """Random access to stored documents; tensors are memory-mapped until they are read."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.entries: list[dict[str, Any]] = json.loads((folder / "index.json").read_text())[
            "documents"
        ]
        self._shards: dict[str, safe_open] = {}

    def __len__(self) -> int:
        return len(self.entries)

    def __getitem__(self, i: int) -> Document:  # type: ignore[override]
        entry = self.entries[i]
        shard = self._shards.get(entry["shard"])
        if shard is None:
            shard = safe_open(self.folder / entry["shard"], framework="pt")
            self._shards[entry["shard"]] = shard
        span = slice(entry["start"], entry["start"] + entry["length"])
        tensors = {name: shard.get_slice(name)[span] for name in shard.keys()}  # noqa: SIM118
        types = sorted(name.removesuffix(".keys") for name in tensors if name.endswith(".keys"))
        return Document(
            id=entry["id"],
            prompt_len=entry["prompt_len"],
            ids=tensors["ids"].long(),
            hidden=tensors["hidden"],
            shared_kv={t: (tensors[f"{t}.keys"], tensors[f"{t}.values"]) for t in types},
            teacher_ids=tensors["teacher_ids"],
            teacher_logprobs=tensors["teacher_logprobs"],
        )

    def with_response_of(self, tokens: int) -> list[int]:
        """Indices of the documents whose response has at least so many tokens."""
        return [i for i, e in enumerate(self.entries) if e["length"] - e["prompt_len"] >= tokens]


def open_recorded(folder: Path) -> ActivationStore:
    """The activations that `generate_batches` recorded, in the order of its batches."""
    if not (folder / "index.json").is_file():
        shards = {
            path.with_suffix(".safetensors").name: read_batch(path) for path in batch_files(folder)
        }
        _write_index(folder, shards)
    return ActivationStore(folder)


def _write_index(folder: Path, shards: dict[str, list[Conversation]]) -> None:
    documents = []
    for shard, conversations in shards.items():
        start = 0
        for c in conversations:
            length = len(c.prompt_ids) + len(c.response_ids)
            documents.append(
                {
                    "id": c.id,
                    "shard": shard,
                    "start": start,
                    "length": length,
                    "prompt_len": len(c.prompt_ids),
                }
            )
            start += length
    write_atomically(folder / "index.json", json.dumps({"documents": documents}))


def extract_activations(
    target: Target, conversations: list[Conversation], config: DataConfig, description: str
) -> ActivationStore:
    """Run the target over the conversations once and store what the head will see.

    Shards appear whole or not at all, and an interrupted call goes on where it stopped.
    """
    ids = [c.prompt_ids + c.response_ids for c in conversations]
    prompt_lens = [len(c.prompt_ids) for c in conversations]
    key = stable_hash(FORMAT, target.fingerprint, ids, prompt_lens, config.teacher_top_k, BATCH)
    folder = (config.cache_dir or cache_dir()) / "activations" / key
    folder.mkdir(parents=True, exist_ok=True)
    shards = {
        f"shard-{i:05d}.safetensors": conversations[i : i + BATCH]
        for i in range(0, len(conversations), BATCH)
    }
    with progress_bar() as bar:
        task = bar.add_task(description, total=len(ids), status="")
        for name, batch in shards.items():
            if not (folder / name).is_file():
                work = part_name(folder / name)
                save_file(_extract(target, batch, config.teacher_top_k), work)
                work.replace(folder / name)
            bar.update(task, advance=len(batch))
    _write_index(folder, shards)
    return ActivationStore(folder)


@torch.inference_mode()
def _extract(
    target: Target, conversations: list[Conversation], top_k: int
) -> dict[str, torch.Tensor]:
    """Tensors of one shard, [N, ...] over the concatenated tokens of the conversations."""
    rows = [torch.tensor(c.prompt_ids + c.response_ids) for c in conversations]
    padded = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)
    lengths = torch.tensor([len(row) for row in rows])
    kept = torch.arange(padded.shape[1]) < lengths[:, None]
    activations = target.activations(padded.to(target.device), kept.long().to(target.device))
    kept_there = kept.to(target.device)
    tensors = {"ids": torch.cat(rows).int(), "hidden": activations.hidden[kept_there]}
    for layer_type, (keys, values) in activations.shared_kv.items():
        tensors[f"{layer_type}.keys"] = keys.transpose(1, 2)[kept_there]
        tensors[f"{layer_type}.values"] = values.transpose(1, 2)[kept_there]
    taught = torch.cat(
        [
            torch.arange(len(r)) >= len(c.prompt_ids) - 1
            for r, c in zip(rows, conversations, strict=True)
        ]
    )
    tensors["teacher_ids"] = torch.zeros(len(taught), top_k, dtype=torch.int32)
    tensors["teacher_logprobs"] = torch.zeros(len(taught), top_k)
    for chunk in taught.nonzero()[:, 0].split(LOGIT_ROWS):
        logits = target.logits(tensors["hidden"][chunk.to(target.device)])
        best_ids, logprobs = top_logprobs(logits, top_k)
        tensors["teacher_ids"][chunk] = best_ids.int().cpu()
        tensors["teacher_logprobs"][chunk] = logprobs.cpu()
    return {name: tensor.contiguous().cpu() for name, tensor in tensors.items()}

"""Batches of training rows, each a function of the seed and its number alone.

Letters: B conversations, R anchors (rows) of each, K rounds, T positions (padded), D target width,
k teacher tokens.
"""

from dataclasses import dataclass, fields

import torch

from headstart.data.activations import ActivationStore, Document
from headstart.heads.gemma3 import SharedKV


@dataclass
class Batch:
    """Rows to train, gathered from whole conversations; KV stays whole."""

    document_ids: list[str]
    rows: torch.Tensor
    """[B, R] row index t."""
    hidden: torch.Tensor
    """[B, R, D] the target's h_t."""
    tokens: torch.Tensor
    """[B, R, K] x_{t+1} .. x_{t+K}."""
    teacher_ids: torch.Tensor
    """[B, R, K, k] what the target says after x_{<= t+k}."""
    teacher_logprobs: torch.Tensor
    """[B, R, K, k]."""
    weights: torch.Tensor
    """[B, R, K] 1 where the predicted token is part of the response, else 0."""
    shared_kv: SharedKV
    """Layer type -> (keys, values), each [B, kv heads, T, head_dim], zero-padded."""

    def to(self, device: torch.device) -> "Batch":
        """The same batch on another device."""
        moved = {}
        for field in fields(self):
            value = getattr(self, field.name)
            if isinstance(value, torch.Tensor):
                value = value.to(device, non_blocking=True)
            elif isinstance(value, dict):
                value = {t: (k.to(device), v.to(device)) for t, (k, v) in value.items()}
            moved[field.name] = value
        return Batch(**moved)


def candidate_rows(document: Document) -> torch.Tensor:
    """Rows from which the decoder may draft: x_{t+1} is a token of the response, and a token
    follows it to be predicted."""
    return torch.arange(document.prompt_len - 1, len(document.ids) - 2)


def gather_rows(documents: list[Document], rows: list[torch.Tensor], rounds: int) -> Batch:
    """Collate chosen rows of some documents; shorter row lists are filled with weight 0."""
    count = max(len(r) for r in rows)
    longest = max(len(d.ids) for d in documents)
    per_document = []
    for document, chosen in zip(documents, rows, strict=True):
        filled = torch.cat([chosen, chosen.new_zeros(count - len(chosen))])
        real = torch.arange(count) < len(chosen)
        # Position of draft k's teacher: t + k. It counts where x_{t+k+1} exists in the response.
        at = filled[:, None] + torch.arange(1, rounds + 1)
        last = len(document.ids) - 1
        weights = ((at < last) & real[:, None]).float()
        at = at.clamp_max(last)
        per_document.append(
            {
                "rows": filled,
                "hidden": document.hidden[filled],
                "tokens": document.ids[at],
                "teacher_ids": document.teacher_ids[at].long(),
                "teacher_logprobs": document.teacher_logprobs[at],
                "weights": weights,
            }
        )
    stacked = {name: torch.stack([d[name] for d in per_document]) for name in per_document[0]}
    shared_kv = {
        layer_type: (
            _pad_kv([d.shared_kv[layer_type][0] for d in documents], longest),
            _pad_kv([d.shared_kv[layer_type][1] for d in documents], longest),
        )
        for layer_type in documents[0].shared_kv
    }
    return Batch(document_ids=[d.id for d in documents], shared_kv=shared_kv, **stacked)


def _pad_kv(tensors: list[torch.Tensor], length: int) -> torch.Tensor:
    """[T_i, heads, dim] each -> [B, heads, length, dim]."""
    padded = tensors[0].new_zeros(len(tensors), length, *tensors[0].shape[1:])
    for i, tensor in enumerate(tensors):
        padded[i, : len(tensor)] = tensor
    return padded.transpose(1, 2)


class AnchorLoader:
    """Draws batches of conversations without replacement within an epoch, and anchors in each.

    `batch(n)` depends on nothing but the arguments, so that a resumed run needs no state: it
    asks for the next number.

    Args:
        store: the conversations.
        batch_size: B, a process.
        anchors: R.
        rounds: K.
        seed: of the order and the anchors.
        rank, world_size: each process reads its own share of every global batch.
    """

    def __init__(
        self,
        store: ActivationStore,
        batch_size: int,
        anchors: int,
        rounds: int,
        seed: int,
        rank: int = 0,
        world_size: int = 1,
    ):
        self.store = store
        self.usable = store.with_response_of(2)
        if not self.usable:
            raise ValueError(
                "no conversation has a response of two tokens or more: nothing to train"
            )
        self.batch_size, self.anchors, self.rounds = batch_size, anchors, rounds
        self.seed, self.rank, self.world_size = seed, rank, world_size
        self._epoch, self._documents = -1, list[int]()

    def batch(self, number: int) -> Batch:
        """Batch `number` (from 0) of this process."""
        first = (number * self.world_size + self.rank) * self.batch_size
        documents, rows = [], []
        for position in range(first, first + self.batch_size):
            epoch, offset = divmod(position, len(self.usable))
            document = self.store[self._order(epoch)[offset]]
            generator = torch.Generator().manual_seed(self.seed * 1_000_003 + position)
            candidates = candidate_rows(document)
            shuffled = torch.randperm(len(candidates), generator=generator)
            documents.append(document)
            rows.append(candidates[shuffled[: self.anchors]].sort().values)
        return gather_rows(documents, rows, self.rounds)

    def _order(self, epoch: int) -> list[int]:
        """Document indices in the order of an epoch; the last epoch asked for is remembered."""
        if epoch != self._epoch:
            generator = torch.Generator().manual_seed(self.seed * 7_919 + epoch)
            shuffled = torch.randperm(len(self.usable), generator=generator).tolist()
            self._epoch, self._documents = epoch, [self.usable[i] for i in shuffled]
        return self._documents

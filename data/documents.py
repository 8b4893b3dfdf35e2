"""Conversations with their activations, as training reads them, wherever they come from.

Letters: T tokens of a document, D target width, k teacher tokens.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple, Protocol

import torch

from headstart.heads.target import SharedKV

PLAIN = ("ids", "loss_mask", "teacher_ids", "teacher_logprobs")
"""Tensors that int8 storage leaves as they are."""
SCALE = ".scale"  # ends the name of the scales of an int8 tensor


class Stored(NamedTuple):
    """Rows of activations as a store keeps them."""

    values: torch.Tensor
    """[..., n] in the target's dtype, or int8."""
    scale: torch.Tensor | None
    """[..., 1] float32, of int8 values; None: they are the rows."""
    dtype: torch.dtype
    """The target's."""

    def at(self, places: torch.Tensor) -> "Stored":
        """The rows at these places of the first axis."""
        scale = None if self.scale is None else self.scale.index_select(0, places)
        return Stored(self.values.index_select(0, places), scale, self.dtype)

    def rows(self) -> torch.Tensor:
        """[..., n] in the target's dtype, computed where the values are."""
        if self.scale is None:
            return self.values
        return (self.values.float() * self.scale).to(self.dtype)


@dataclass(frozen=True)
class Document:
    """One conversation with its activations; T tokens."""

    id: str
    ids: torch.Tensor
    """[T] int64."""
    loss_mask: torch.Tensor
    """[T] bool: tokens that the target wrote, which the head learns to draft."""
    activations: dict[str, Stored]
    """`hidden` [T, D], the post-norm hidden states; where heads that read them are trained, of each
    layer type `TYPE.keys` and `TYPE.values`, [T, kv heads, head_dim] each, and of a decoder layer
    `layer.NUMBER` [T, D], its output."""
    teacher_ids: torch.Tensor
    """[T, k] int32: the target's top tokens after position t, best first."""
    teacher_logprobs: torch.Tensor
    """[T, k] float32 at temperature 1. Rows from which nothing is to be learned hold zeros: those
    whose next token `loss_mask` leaves out.

    Of a text recorded while it was written the last row of all activations holds zeros too: the
    target never ran on its last token, and no training row reads it.
    """

    @staticmethod
    def of(
        tensors: dict[str, torch.Tensor], document_id: str, dtype: torch.dtype | None = None
    ) -> "Document":
        """From the tensors of its tokens, named as in a shard; `dtype` is the target's, where they
        are int8 with `NAME.scale` beside them."""
        names = [name for name in tensors if name not in PLAIN and not name.endswith(SCALE)]
        return Document(
            id=document_id,
            ids=tensors["ids"].long(),
            loss_mask=tensors["loss_mask"],
            activations={
                name: Stored(values, tensors.get(name + SCALE), dtype or values.dtype)
                for name in names
                for values in [tensors[name]]
            },
            teacher_ids=tensors["teacher_ids"],
            teacher_logprobs=tensors["teacher_logprobs"],
        )

    @property
    def hidden(self) -> torch.Tensor:
        """[T, D] post-norm hidden states, computed from what is stored."""
        return self.activations["hidden"].rows()

    @property
    def shared_kv(self) -> SharedKV:
        """Layer type -> (keys, values), each [T, kv heads, head_dim], likewise."""
        return {
            t: (self.activations[f"{t}.keys"].rows(), self.activations[f"{t}.values"].rows())
            for t in self.layer_types
        }

    @property
    def layer_types(self) -> list[str]:
        """Those whose keys and values are there."""
        ends = [name for name in self.activations if name.endswith(".keys")]
        return sorted(name.removesuffix(".keys") for name in ends)


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
    """Mean probability that the stored top k tokens hold, over the rows whose next token the target
    wrote; None: not known, or there is no such row."""


def prompt_tokens(ids: torch.Tensor, loss_mask: torch.Tensor) -> list[int]:
    """The prompt of a text [T]: the tokens that the target did not write; the text itself where it
    is trained on from its second token on, as one without any answer is."""
    given = ids[~loss_mask]
    return (given if len(given) > 1 else ids).tolist()


class Documents(Protocol):
    """Activations of documents, wherever they come from."""

    entries: Sequence[Entry]

    def read(self, which: Sequence[int]) -> list[Document]:
        """The documents with these indices."""


class Chosen:
    """Some of the documents of a larger collection."""

    def __init__(self, documents: Documents, which: Sequence[int]):
        self.documents, self.which = documents, which
        self.entries: Sequence[Entry] = [documents.entries[i] for i in which]

    def read(self, which: Sequence[int]) -> list[Document]:
        """The documents with these indices among the chosen ones."""
        return self.documents.read([self.which[i] for i in which])


class WithPrompts:
    """Documents whose prompts are trained on too: every token but the first of each."""

    def __init__(self, documents: Documents):
        self.documents = documents
        self.entries: Sequence[Entry] = [
            replace(entry, trained=entry.length - 1) for entry in documents.entries
        ]

    def read(self, which: Sequence[int]) -> list[Document]:
        """The documents with these indices."""
        found = self.documents.read(which)
        return [replace(d, loss_mask=torch.arange(len(d.ids)) > 0) for d in found]

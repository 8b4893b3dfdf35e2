"""Cutting long conversations and packing short ones, document boundaries respected."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace

from headstart.data.conversations import Conversation


def cut(conversation: Conversation, max_tokens: int) -> list[Conversation]:
    """Cut a conversation into pieces of at most `max_tokens`, each with context before it.

    Every token that is drafted first in a round is so in exactly one piece; later drafts end with
    their piece. Each later piece begins with the conversation's first token (<bos>) and about half
    its length of context, on which nothing is trained.

    Args:
        conversation: any.
        max_tokens: 8 or more.
    """
    ids = conversation.ids
    if len(ids) <= max_tokens:
        return [conversation]
    pieces = []
    start, trained_from = 0, 0
    while True:
        lead = ids[:1] if start else []
        end = min(start + max_tokens - len(lead), len(ids))
        shift = len(lead) - start
        # A draft reads an assistant's token and predicts the one after it, so the last token that
        # the piece before trained is needed here as the first that is read.
        kept = [(max(a, trained_from - 1), min(b, end)) for a, b in conversation.spans]
        spans = [(a + shift, b + shift) for a, b in kept if a < b]
        if any(b - a > 1 for a, b in spans):
            name = f"{conversation.id}@{start}"
            pieces.append(replace(conversation, id=name, ids=lead + ids[start:end], spans=spans))
        if end == len(ids):
            return pieces
        trained_from = end
        start = end - max_tokens // 2


def trainable(conversations: Iterable[Conversation], max_tokens: int) -> Iterator[Conversation]:
    """The pieces of conversations that something can be drafted in: two tokens of one answer."""
    for conversation in conversations:
        for piece in cut(conversation, max_tokens):
            if any(end - start > 1 for start, end in piece.spans):
                yield piece


def length_when_cut(length: int, max_tokens: int) -> int:
    """Tokens in all pieces of a conversation of `length` tokens, at most."""
    if length <= max_tokens:
        return length
    steps = -(-(length - max_tokens) // (max_tokens - 1 - max_tokens // 2))
    return length + steps * (max_tokens // 2 + 1)


def pack(lengths: Sequence[int], capacity: int) -> list[list[int]]:
    """First-fit decreasing: which documents share a row.

    Args:
        lengths: of the documents.
        capacity: tokens that a row holds; a longer document gets a row of its own.

    Returns:
        Indices into `lengths`, row by row; each index once.
    """
    rows: list[list[int]] = []
    free: list[int] = []
    for i in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        row = next((r for r, room in enumerate(free) if lengths[i] <= room), len(rows))
        if row == len(rows):
            rows.append([])
            free.append(capacity)
        rows[row].append(i)
        free[row] -= lengths[i]
    return rows

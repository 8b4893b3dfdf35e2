"""Batches of anchors, the rows of conversations that drafts begin from in training; each batch is a
function of the seed and its number alone.

Whatever depends on the texts, such as which drafts count, is settled here, on the CPU: a training
step then has shapes that the host knows, and does not wait for its device.

Letters: B rows of keys and values, each of one conversation or of several that are packed,
R anchors in each, S of them drafted from beyond the first round, K rounds, T positions (padded), M
of them (padded) whose hidden states are read, N drafts that count, P positions that teach them, k
teacher tokens.
"""

from collections.abc import Mapping, Sequence
from functools import lru_cache
from itertools import accumulate
from types import MappingProxyType
from typing import Any, NamedTuple

import torch

from headstart.configs.schema import Config
from headstart.data.documents import Document, Documents, Stored
from headstart.heads.kinds import Rows, Texts, select
from headstart.heads.target import KEYS_AND_VALUES, Inputs


class StoredTexts(NamedTuple):
    """What a step reads of the texts, zero-padded, as it is stored."""

    hidden: Stored
    """[B, M, D] hidden states of the positions that anchors or their teachers stand at, or of all
    T where the head reads whole texts."""
    kv: dict[str, tuple[Stored, Stored]]
    """Layer type -> (keys, values), each [B, T, kv heads, head_dim]; none where the head reads
    none."""
    ids: torch.Tensor | None = None
    """[B, T], where the head reads whole texts."""
    starts: torch.Tensor | None = None
    """[B, T] position at which the text of each position begins, where the head reads whole texts
    and a row holds several."""
    layers: Mapping[int, Stored] = MappingProxyType({})
    """Number of a decoder layer that the head reads -> its outputs, as `hidden` has positions."""

    def computed_in(self, dtype: torch.dtype) -> Texts:
        """The rows, on the device where they are; keys and values in `dtype`."""
        kv = {
            t: (k.rows().to(dtype).transpose(1, 2), v.rows().to(dtype).transpose(1, 2))
            for t, (k, v) in self.kv.items()
        }
        layers = {i: stored.rows() for i, stored in self.layers.items()}
        return Texts(self.hidden.rows(), kv, self.ids, self.starts, layers)


class CountedDrafts(NamedTuple):
    """The N drafts of a batch that count, in the order of rounds, conversations and anchors."""

    round: torch.Tensor
    """[N] from 0."""
    anchor: torch.Tensor
    """[N] index into the B x R anchors."""
    state: torch.Tensor
    """[N] index of its state among those of all rounds, B x R and then K - 1 times B x S."""
    positions: torch.Tensor
    """[P] which of the B x M hidden states are some draft's teacher."""
    teacher: torch.Tensor
    """[N] which of the P positions is the teacher of each draft."""
    of_round: tuple[int, ...]
    """K counts."""


class Batch(NamedTuple):
    """Anchors to train on, and the whole conversations that they are rows of."""

    document_ids: list[list[str]]
    """B lists: the conversations of each row of keys and values."""
    texts: StoredTexts
    rows: Rows
    """The anchors. Round k of one learns what the target says at row `at + k`."""
    teacher_ids: torch.Tensor
    """[B, R, K, k] what the target says after x_{<= t+k}."""
    teacher_logprobs: torch.Tensor
    """[B, R, K, k]."""
    weights: torch.Tensor
    """[B, R, K] 1 where the predicted token is part of the response and the anchor goes on to
    that round, else 0."""
    drafts: CountedDrafts


def candidate_rows(document: Document) -> torch.Tensor:
    """Rows t from which the decoder may draft: the target wrote x_{t+1} and x_{t+2}."""
    return (document.loss_mask[1:-1] & document.loss_mask[2:]).nonzero()[:, 0]


def gather_rows(
    documents: list[Document],
    rows: list[torch.Tensor],
    rounds: int,
    max_packed_length: int | None = None,
    later: list[torch.Tensor] | None = None,
    inputs: Inputs = KEYS_AND_VALUES,
) -> Batch:
    """Collate chosen rows of some documents, the anchors; what fills shorter lists up has weight 0.

    Args:
        documents: any.
        rows: of each document, from `candidate_rows`.
        rounds: K.
        max_packed_length: documents share rows of so many tokens, longest first; None: a row each.
        later: of each document, which of its chosen rows go on beyond the first round, by their
            place among them, ascending; None: all.
        inputs: what the head reads; nothing else is collated.
    """
    later = [torch.arange(len(chosen)) for chosen in rows] if later is None else later
    packs = [[i] for i in range(len(documents))]
    if max_packed_length is not None:
        packs = pack([len(d.ids) for d in documents], max_packed_length)
    packed = [[documents[i] for i in members] for members in packs]
    order = [i for members in packs for i in members]
    # All texts one after another: a few operations do for all of them, however many there are.
    ids, mask, teacher_ids, teacher_logprobs = (
        torch.cat([getattr(documents[i], name) for i in order])
        for name in ("ids", "loss_mask", "teacher_ids", "teacher_logprobs")
    )
    lengths, counts = [len(documents[i].ids) for i in order], [len(rows[i]) for i in order]
    place = _places(packs, lengths, counts)
    at = torch.cat([rows[i] for i in order]) + place.text
    goes_on = torch.zeros(len(at), dtype=torch.bool)
    goes_on[torch.cat([later[i] + n for i, n in zip(order, _before(counts), strict=True)])] = True
    # Position of draft k's teacher: t + k.
    teacher = at[:, None] + torch.arange(1, rounds + 1)
    # It counts where the target wrote x_{t+k+1} and all between.
    written = mask[(teacher + 1).minimum(place.last)] & (teacher < place.last)
    # And where the anchor goes on beyond the first round.
    written[:, 1:] &= goes_on[:, None]
    weights = written.long().cumprod(-1).float()
    teacher = teacher.minimum(place.last)
    # Of the hidden states h_t and those that teach are read, and no others.
    read = torch.cat([at, teacher[weights > 0]]).unique()
    whole: dict[str, torch.Tensor] = {}
    if inputs.whole_texts:
        read = torch.arange(len(ids))
        whole["ids"] = _zero_padded([[d.ids for d in row] for row in packed])
        if len(packed) < len(documents):
            whole["starts"] = _zero_padded(_starts_of(packed))
    texts = StoredTexts(
        hidden=_states_of("hidden", packed, read),
        kv=_kv_of(packed) if inputs.kv else {},
        layers={i: _states_of(f"layer.{i}", packed, read) for i in inputs.layers},
        **whole,
    )
    size = max(1, int(place.slot.max()) + 1 if len(at) else 1)

    def dealt(values: torch.Tensor) -> torch.Tensor:
        """[n, ...] of all anchors -> [B, R, ...]."""
        table = values.new_zeros(len(packs), size, *values.shape[1:])
        table[place.row, place.slot] = values
        return table

    # Where an anchor only fills up, all of its drafts read the first token: they have weight 0.
    places = dealt(teacher)
    anchors = Rows(
        at=dealt(at - place.row_start),
        hidden=dealt(torch.searchsorted(read, at) - torch.searchsorted(read, place.row_start)),
        starts=dealt(place.text - place.row_start),
        tokens=ids[places],
        multi_step=_multi_step(place, goes_on, len(packs)),
    )
    in_row = torch.searchsorted(read, teacher) - torch.searchsorted(read, place.row_start)[:, None]
    weights = dealt(weights)
    return Batch(
        document_ids=[[d.id for d in row] for row in packed],
        texts=texts,
        rows=anchors,
        teacher_ids=teacher_ids[places].long(),
        teacher_logprobs=teacher_logprobs[places],
        weights=weights,
        drafts=_counted(weights, anchors, dealt(in_row), texts.hidden.values.shape[1]),
    )


class _Places(NamedTuple):
    """Where the n anchors of texts that lie one after another belong."""

    row: torch.Tensor
    """[n] which of the B rows."""
    slot: torch.Tensor
    """[n] which of its R anchors."""
    row_start: torch.Tensor
    """[n] position at which that row begins."""
    text: torch.Tensor
    """[n] position at which the anchor's text begins."""
    last: torch.Tensor
    """[n, 1] last position of that text."""


def _places(packs: list[list[int]], lengths: list[int], counts: list[int]) -> _Places:
    """Of texts in the order of `packs`, with so many tokens and anchors each."""
    of = torch.repeat_interleave(torch.tensor(counts))
    row = torch.tensor([b for b, members in enumerate(packs) for _ in members])
    lead = torch.tensor(_before([len(members) for members in packs]))[row]
    text, anchors = torch.tensor(_before(lengths)), torch.tensor(_before(counts))
    last = text + torch.tensor(lengths) - 1
    slot = torch.arange(len(of)) - anchors[lead][of]
    return _Places(row[of], slot, text[lead][of], text[of], last[of, None])


def _before(sizes: list[int]) -> list[int]:
    """The sum of all sizes before each."""
    return [0, *accumulate(sizes)][:-1]


def _multi_step(place: _Places, goes_on: torch.Tensor, rows: int) -> torch.Tensor:
    """[B, S] which of the R anchors of each row go on; filled with -1: a place of its own, so that
    no anchor counts twice."""
    row, slot = place.row[goes_on], place.slot[goes_on]
    each = torch.bincount(row, minlength=rows)
    rank = torch.arange(len(row)) - (each.cumsum(0) - each)[row]
    table = torch.full((rows, max(1, int(each.max()))), -1)
    table[row, rank] = slot
    return table


def _states_of(name: str, packed: list[list[Document]], read: torch.Tensor) -> Stored:
    """Activations `name` at the positions `read` of all texts, ascending."""
    edges = torch.tensor([0, *accumulate(len(d.ids) for row in packed for d in row)])
    own = iter(read.tensor_split(torch.searchsorted(read, edges[1:-1])))
    starts = iter(edges.tolist())
    return _padded(
        [[d.activations[name].at(next(own) - next(starts)) for d in row] for row in packed]
    )


def _counted(
    weights: torch.Tensor, rows: Rows, teacher: torch.Tensor, hidden_states: int
) -> CountedDrafts:
    """The drafts with a weight [B, R, K], taught at the places `teacher` [B, R, K] among the
    `hidden_states` of their text."""
    anchors = torch.arange(weights[..., 0].numel()).view(weights.shape[:2])
    of_anchor, states, before = [], [], 0
    for k in range(weights.shape[-1]):
        which, kept = anchors, weights[..., k] > 0
        if k:
            # Places that only fill up repeat anchor 0 and do not count.
            which = select(anchors, rows.multi_step)
            kept = select(kept, rows.multi_step) & (rows.multi_step >= 0)
        of_anchor.append(which[kept])
        states.append(kept.flatten().nonzero()[:, 0] + before)
        before += kept.numel()
    anchor = torch.cat(of_anchor)
    round_ = torch.cat([torch.full_like(one, k) for k, one in enumerate(of_anchor)])
    text = torch.arange(len(teacher))[:, None, None] * hidden_states
    # Once a position, not once a draft: the rounds of neighboring anchors learn from the same.
    positions, at = (text + teacher).flatten(0, 1)[anchor, round_].unique(return_inverse=True)
    return CountedDrafts(
        round_, anchor, torch.cat(states), positions, at, tuple(map(len, of_anchor))
    )


def _starts_of(packed: list[list[Document]]) -> list[list[torch.Tensor]]:
    """Of each document [T], T times the position in its row at which it begins."""
    lengths = [[len(d.ids) for d in row] for row in packed]
    return [
        [torch.full((n,), start) for n, start in zip(row, _before(row), strict=True)]
        for row in lengths
    ]


def _kv_of(packed: list[list[Document]]) -> dict[str, tuple[Stored, Stored]]:
    def padded(name: str) -> Stored:
        return _padded([[document.activations[name] for document in row] for row in packed])

    types = packed[0][0].layer_types
    return {t: (padded(f"{t}.keys"), padded(f"{t}.values")) for t in types}


def _padded(rows: list[list[Stored]]) -> Stored:
    """B lists of [T_i, ...], each list one row -> [B, T, ...], zero-padded."""
    first = rows[0][0]
    scale = None
    if first.scale is not None:
        scale = _zero_padded([[one.scale for one in row if one.scale is not None] for row in rows])
    return Stored(_zero_padded([[one.values for one in row] for row in rows]), scale, first.dtype)


def _zero_padded(rows: list[list[torch.Tensor]]) -> torch.Tensor:
    """B lists of [T_i, ...], each list one row -> [B, T, ...], zeros after the shorter ones. One
    operation copies all of it, while which other threads run."""
    lengths = [sum(len(part) for part in row) for row in rows]
    longest, shape = max(1, *lengths), rows[0][0].shape[1:]
    zeros = rows[0][0].new_zeros(longest - min(lengths), *shape)
    parts = [
        part
        for row, length in zip(rows, lengths, strict=True)
        for part in (*row, zeros[: longest - length])
    ]
    return torch.cat(parts).view(len(rows), longest, *shape)


def broken_documents(batch: Batch) -> list[str]:
    """Ids of the documents in rows of the batch whose activations are not all finite."""
    whole = torch.ones(len(batch.weights), dtype=torch.bool, device=batch.weights.device)
    stored = [batch.texts.hidden, *batch.texts.layers.values()]
    stored += [one for pair in batch.texts.kv.values() for one in pair]
    for tensor in (batch.teacher_logprobs, *(one.rows() for one in stored)):
        whole &= tensor.flatten(1).isfinite().all(1)
    rows = zip(batch.document_ids, whole.tolist(), strict=True)
    return [name for names, fine in rows if not fine for name in names]


def usable(documents: Documents) -> list[int]:
    """Which conversations have a response of two tokens or more.

    Raises:
        ValueError: none has.
    """
    found = [i for i, entry in enumerate(documents.entries) if entry.trained >= 2]
    if not found:
        raise ValueError("no conversation has a response of two tokens or more: nothing to train")
    return found


class AnchorLoader:
    """Draws batches of conversations without replacement within an epoch, and anchors in each.

    `batch(n)` depends on nothing but the arguments, so that a resumed run needs no state: it
    asks for the next number.

    Args:
        documents: the conversations' activations.
        batch_size: conversations a batch, of a process.
        max_anchors: drawn of each conversation; fewer where it has fewer rows to draft from.
        num_speculative_steps: K, the rounds.
        seed: of the order and the anchors.
        max_packed_length: conversations share rows of so many tokens; None: a row each.
        rank, world_size: each process reads its own share of every global batch.
        multi_step_anchors: how many of them go on beyond the first round; None: all.
        inputs: what the head reads; nothing else is collated.
    """

    def __init__(
        self,
        documents: Documents,
        batch_size: int,
        max_anchors: int,
        num_speculative_steps: int,
        seed: int,
        max_packed_length: int | None = None,
        rank: int = 0,
        world_size: int = 1,
        multi_step_anchors: int | None = None,
        inputs: Inputs = KEYS_AND_VALUES,
    ):
        self.documents = documents
        self.usable = usable(documents)
        self.batch_size, self.max_anchors = batch_size, max_anchors
        self.num_speculative_steps = num_speculative_steps
        self.max_packed_length, self.multi_step_anchors = max_packed_length, multi_step_anchors
        self.seed, self.rank, self.world_size = seed, rank, world_size
        self.inputs = inputs
        self._order = lru_cache(2)(self._shuffled)  # batches of two epochs may be made at once

    def batch(self, number: int) -> Batch:
        """Batch `number` (from 0) of this process."""
        first = (number * self.world_size + self.rank) * self.batch_size
        positions = range(first, first + self.batch_size)
        places = [divmod(position, len(self.usable)) for position in positions]
        documents = self.documents.read([self._order(epoch)[offset] for epoch, offset in places])
        rows, later = [], []
        for position, document in zip(positions, documents, strict=True):
            generator = torch.Generator().manual_seed(self.seed * 1_000_003 + position)
            candidates = candidate_rows(document)
            shuffled = torch.randperm(len(candidates), generator=generator)
            ordered = shuffled[: self.max_anchors].sort()
            rows.append(candidates[ordered.values])
            # The first of the shuffled ones: as random as the rest.
            goes_on = ordered.indices < (self.multi_step_anchors or self.max_anchors)
            later.append(goes_on.nonzero()[:, 0])
        return gather_rows(
            documents, rows, self.num_speculative_steps, self.max_packed_length, later,
            self.inputs,
        )  # fmt: skip

    def _shuffled(self, epoch: int) -> Sequence[int]:
        """Document indices in the order of an epoch."""
        generator = torch.Generator().manual_seed(self.seed * 7_919 + epoch)
        order = torch.randperm(len(self.usable), generator=generator).tolist()
        return [self.usable[i] for i in order]


def run_loader(
    documents: Documents, config: Config, inputs: Inputs, **changes: int | None
) -> AnchorLoader:
    """The batches that a run of this configuration trains on in one process, for a head that reads
    `inputs`; `changes` are arguments of `AnchorLoader` that are to be otherwise."""
    c = config.train
    settings: dict[str, Any] = {
        "batch_size": c.batch_size,
        "max_anchors": c.max_anchors,
        "num_speculative_steps": c.num_speculative_steps,
        "seed": config.seed,
        "max_packed_length": c.max_packed_length,
        "multi_step_anchors": c.multi_step_anchors,
    }
    return AnchorLoader(documents, inputs=inputs, **settings | changes)


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

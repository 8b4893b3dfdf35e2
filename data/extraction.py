"""What the head will see of the target: recorded while it generates, or in one pass over
conversations.

Letters: B batch, W padded prompt length, S steps generated, N tokens of a shard, T positions,
D target width, k teacher tokens, V vocabulary.
"""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState

from headstart.common.console import progress_bar
from headstart.common.processes import in_step, is_mine, processes_in
from headstart.common.versions import check_rows
from headstart.configs.schema import DataConfig
from headstart.data.background import BackgroundWriter
from headstart.data.conversations import MANIFEST, Conversation, trainable
from headstart.data.documents import Document, Entry, prompt_tokens
from headstart.data.kv_cache import generation_cache
from headstart.data.store import (
    ActivationStore,
    Shard,
    Storage,
    check_space,
    on_cpu,
    read_index,
    shard_path,
    shard_paths,
    shard_settings,
    stored_bytes,
    write_index,
    write_shard,
)
from headstart.heads.kernels import fast_kernels
from headstart.heads.target import KEYS_AND_VALUES, Inputs, Target


def top_logprobs(logits: torch.Tensor, k: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The k best tokens of [N, V] logits and their log-probabilities, best first.

    Returns:
        ids [N, k] int64, logprobs [N, k] float32 of the softmax over all V.
    """
    best = logits.topk(k)
    # Row by row a CPU keeps the V values in its cache: a third of the time of all rows at once.
    # Elsewhere some at a time, so that their float32 takes less than the logits did before.
    rows = logits.split(1 if logits.device.type == "cpu" else NORMALIZED_ROWS)
    normalizer = torch.cat([row.float().logsumexp(-1, keepdim=True) for row in rows])
    return best.indices, best.values.float() - normalizer


class Recorder:
    """Keeps hidden states, keys, values and the teacher's top tokens of one batch that `answer`
    writes.

    It brings the cache, which keeps every row of the two layers that a head may attend to, and the
    windows of other sliding layers.

    Args:
        room: tokens that will run of each text, padding included.
        inputs: of the heads that will be trained on it.
    """

    def __init__(self, target: Target, top_k: int, room: int, inputs: Inputs = KEYS_AND_VALUES):
        self.target, self.top_k, self.inputs = target, top_k, inputs
        self.kept = target.source_layers["sliding_attention"] if inputs.kv else None
        self.cache = generation_cache(target.config, room, keeps_all=self.kept)
        self.hidden: list[torch.Tensor] = []
        self.layers: dict[int, list[torch.Tensor]] = {}
        self.teacher: list[tuple[torch.Tensor, torch.Tensor]] = []

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Within, the forwards of the target run that it is to record."""
        with self.target.layer_outputs(self.inputs.layers) as self.layers:
            yield

    def note(self, hidden: torch.Tensor, tokens: int) -> None:
        """Keep what one forward gave.

        Args:
            hidden: [B, T, D] of its tokens.
            tokens: W + S, all that have run of each text.

        Raises:
            RuntimeError: the target left out rows.
        """
        self.hidden.append(hidden)
        for blocks in (self.hidden, *self.layers.values()):
            check_rows(sum(block.shape[1] for block in blocks), tokens)

    def note_teacher(self, logits: torch.Tensor) -> None:
        """Keep what the target says next: logits [B, V], as it emits them."""
        self.teacher.append(top_logprobs(logits, self.top_k))

    def tensors(
        self,
        prompt_ids: list[list[int]],
        responses: list[list[int]],
        storage: Storage = "target",
    ) -> dict[str, torch.Tensor]:
        """The tensors of one shard (`data/documents.py`), documents in the order of the batch.

        The target never ran on the last token of a response: its row holds zeros, and no training
        row reads it.
        """
        width = sum(block.shape[1] for block in self.hidden) + 1 - len(self.teacher)
        states = {"hidden": torch.cat(self.hidden, dim=1)}  # [B, W + S - 1, D]
        # Behind them are those of idle forwards, while other processes' texts went on.
        for i, blocks in self.layers.items():
            states[f"layer.{i}"] = torch.cat(blocks[: len(self.hidden)], dim=1)
        ids = torch.stack([ids for ids, _ in self.teacher], dim=1)  # [B, S, k]
        logprobs = torch.stack([logprobs for _, logprobs in self.teacher], dim=1)
        sources = {
            layer_type: self.cache.layers[i].rows()
            for layer_type, i in self.target.source_layers.items()
            if self.inputs.kv
        }
        shards: dict[str, list[torch.Tensor]] = {}
        prompts = self._within_prompts(states["hidden"], prompt_ids, width)
        for b, (prompt, response) in enumerate(zip(prompt_ids, responses, strict=True)):
            length, steps = len(prompt) + len(response), len(response)
            seen = slice(width - len(prompt), width - len(prompt) + length - 1)
            document = {
                "ids": torch.tensor(prompt + response, dtype=torch.int32),
                "loss_mask": torch.arange(length) >= len(prompt),
                **{name: _padded(rows[b, seen], 0, length) for name, rows in states.items()},
                "teacher_ids": _padded(ids[b, :steps].int(), len(prompt) - 1, length),
                "teacher_logprobs": _padded(logprobs[b, :steps], len(prompt) - 1, length),
            }
            for name, found in prompts.items():
                document[name][: len(prompt) - 1] = found[b]
            for layer_type, pair in sources.items():
                for what, rows in zip(("keys", "values"), pair, strict=True):
                    ours = rows[b, :, seen].transpose(0, 1)
                    document[f"{layer_type}.{what}"] = _padded(ours, 0, length)
            for name, tensor in document.items():
                for stored, there in on_cpu(name, tensor, storage).items():
                    shards.setdefault(stored, []).append(there)
        return {name: torch.cat(parts) for name, parts in shards.items()}

    def _within_prompts(
        self, hidden: torch.Tensor, prompt_ids: list[list[int]], width: int
    ) -> dict[str, Sequence[torch.Tensor]]:
        """What the target says after all tokens of each prompt but the last: tensor of a shard ->
        its rows [n, k] of each text. Empty where nobody reads them.

        Args:
            hidden: [B, T, D] of all tokens that ran.
            prompt_ids: of the texts.
            width: tokens of a prompt with its padding, which is on its left.
        """
        if not self.inputs.prompts:
            return {}
        counts = [len(ids) - 1 for ids in prompt_ids]
        first = [b * hidden.shape[1] + width - len(ids) for b, ids in enumerate(prompt_ids)]
        places = [torch.arange(at, at + n) for at, n in zip(first, counts, strict=True)]
        with fast_kernels(self.target.model, small_batch=False):  # around the LM head
            ids, logprobs = _teachers(
                self.target, hidden.flatten(0, 1), torch.cat(places), self.top_k
            )
        return {"teacher_ids": ids.split(counts), "teacher_logprobs": logprobs.split(counts)}


def _padded(tensor: torch.Tensor, before: int, length: int) -> torch.Tensor:
    """`tensor` [n, ...] as rows `before` .. of [length, ...], zeros elsewhere."""
    rows = tensor.new_zeros(length, *tensor.shape[1:])
    rows[before : before + len(tensor)] = tensor
    return rows


SHARD = 64  # conversations a shard, at most
SHARD_TOKENS = 65_536  # likewise, but for a longer conversation
BATCH_TOKENS = 2048  # tokens a forward, padding included
LOGIT_ROWS = 128  # rows of V logits held at once
NORMALIZED_ROWS = 32  # of them in float32


def extract(
    target: Target,
    conversations: Iterable[Conversation],
    tokens: int,
    config: DataConfig,
    folder: Path,
    variables: dict[str, Any] | None = None,
    inputs: Inputs = KEYS_AND_VALUES,
) -> ActivationStore:
    """Run the target over the conversations once and store what the head will see.

    Shards appear whole or not at all, and a call that was cut short goes on where it stopped.
    Conversations are read as they are needed: memory does not grow with their number. Those with
    nothing to draft (no answer of two tokens) are left out.

    Args:
        conversations: in an order that is the same each time.
        tokens: in all of them (`tokens_when_cut`): for the progress bar and the size.
        config: the teacher's top k, the storage, and the length at which conversations are cut.
        variables: of the chat template, with which the conversations were asked: for the index.
        inputs: of the heads that will be trained on it.

    Raises:
        ValueError: the folder holds something else, a damaged shard, the disk is too small, there
            is nothing to train on, or prompts are trained on and a conversation would be cut.
        OSError: the disk is full; finished shards are kept.
    """
    settings = shard_settings(target, config.teacher_top_k, config.storage, inputs)
    index = folder / "index.json"
    count = 0

    def mine() -> Iterator[tuple[Path, list[Conversation]]]:
        nonlocal count
        for count, pieces in enumerate(
            _chunks(trainable(conversations, config.max_tokens, inputs.prompts)), 1
        ):
            path = shard_path(folder, count - 1)
            if is_mine(count - 1):
                if path.is_file():
                    _check_same(Shard(path, settings), pieces)
                else:
                    yield path, pieces
            bar.update(task, advance=sum(len(piece.ids) for piece in pieces))

    with processes_in(folder), progress_bar() as bar:
        if PartialState().is_main_process:
            if (folder / MANIFEST).is_file():
                raise ValueError(f"{folder} holds conversations: name another folder for the store")
            there = sum(path.stat().st_size for path in shard_paths(folder))
            check_space(folder, stored_bytes(target, config, inputs) * tokens - there)
        task = bar.add_task("Extracting (tokens)", total=tokens, status="")
        with BackgroundWriter() as writer:
            for pending in in_step(mine(), target.sharded):
                path, pieces = pending or (folder, [])
                tensors = extract_tensors(
                    target, pieces, config.teacher_top_k, config.storage, inputs
                )
                if pieces:
                    index.unlink(missing_ok=True)
                    entries = entries_of(pieces, tensors)
                    writer.put(partial(write_shard, path, tensors, entries, settings))
        PartialState().wait_for_everyone()
        if PartialState().is_main_process:
            noted = {"chat_template_kwargs": variables} if variables else {}
            _finish(folder, count, settings | noted)
    return ActivationStore(folder, target)


def _finish(folder: Path, count: int, settings: dict[str, Any]) -> None:
    """Draw up the index over `count` shards, unless it is there and says the same."""
    paths = [shard_path(folder, number) for number in range(count)]
    if not paths:
        raise ValueError("no conversation has an answer of two tokens: nothing to train on")
    if surplus := sorted(set(shard_paths(folder)) - set(paths)):
        raise ValueError(
            f"{surplus[0]} and {len(surplus) - 1} more are of other conversations: delete "
            "them, or name another folder"
        )
    there = read_index(folder) if (folder / "index.json").is_file() else {}
    if there.get("chat_template_kwargs") != settings.get("chat_template_kwargs") or not there:
        write_index(folder, paths, settings)


def _check_same(shard: Shard, pieces: list[Conversation]) -> None:
    """Raise `ValueError` unless a finished shard is of just these pieces."""
    theirs = [(replace(e, top_k_mass=None), i.tolist(), m.tolist()) for e, i, m in shard.texts()]
    if theirs != [(_entry(p, None), p.ids, _loss_mask(p).tolist()) for p in pieces]:
        raise ValueError(
            f"{shard.path} holds other conversations: name another folder, or delete this one"
        )


def _chunks(pieces: Iterable[Conversation]) -> Iterator[list[Conversation]]:
    """The pieces of each shard: a function of them alone."""
    chunk: list[Conversation] = []
    tokens = 0
    for piece in pieces:
        if chunk and (len(chunk) == SHARD or tokens + len(piece.ids) > SHARD_TOKENS):
            yield chunk
            chunk, tokens = [], 0
        chunk.append(piece)
        tokens += len(piece.ids)
    if chunk:
        yield chunk


class OnlineActivations:
    """Documents whose activations are computed when they are read; nothing is stored.

    Args:
        target: the model that runs, inside the training step.
        conversations: the documents; longer ones than `config.max_tokens` are cut.
        config: for the teacher's top k.
        inputs: of the heads that will read them.
    """

    def __init__(
        self,
        target: Target,
        conversations: list[Conversation],
        config: DataConfig,
        inputs: Inputs = KEYS_AND_VALUES,
    ):
        self.target, self.top_k, self.inputs = target, config.teacher_top_k, inputs
        self.pieces = list(trainable(conversations, config.max_tokens, inputs.prompts))
        self.entries: Sequence[Entry] = [_entry(piece, None) for piece in self.pieces]

    def read(self, which: Sequence[int]) -> list[Document]:
        """The documents with these indices, from forwards over them now."""
        pieces = [self.pieces[i] for i in which]
        tensors = extract_tensors(self.target, pieces, self.top_k, inputs=self.inputs)
        starts = torch.tensor([0] + [len(p.ids) for p in pieces]).cumsum(0).tolist()
        return [
            Document.of({n: t[a:b] for n, t in tensors.items()}, piece.id)
            for piece, (a, b) in zip(pieces, pairwise(starts), strict=True)
        ]

    def prompts(self) -> Iterator[list[int]]:
        """The token ids of each document's prompt, in order."""
        for piece in self.pieces:
            yield prompt_tokens(torch.tensor(piece.ids), _loss_mask(piece))


def entries_of(conversations: list[Conversation], tensors: dict[str, torch.Tensor]) -> list[Entry]:
    """The index entries of one shard's documents."""
    entries, start = [], 0
    for c in conversations:
        rows = slice(start, start + len(c.ids))
        mass = tensors["teacher_logprobs"][rows][_teacher_rows(c)].exp().sum(-1)
        entries.append(_entry(c, float(mass.mean()) if len(mass) else None))
        start += len(c.ids)
    return entries


def _entry(c: Conversation, top_k_mass: float | None) -> Entry:
    return Entry(
        c.id, c.category, c.source,
        length=len(c.ids), trained=c.trained, temperature=c.temperature, top_k_mass=top_k_mass,
    )  # fmt: skip


@torch.no_grad()  # a split target keeps buffers of its first forward: no inference tensors
def extract_tensors(
    target: Target,
    conversations: list[Conversation],
    top_k: int,
    storage: Storage = "target",
    inputs: Inputs = KEYS_AND_VALUES,
) -> dict[str, torch.Tensor]:
    """Tensors of one shard (`data/documents.py`), [N, ...] over the tokens of the conversations.

    The LM head runs on rows whose next token the assistant wrote alone, unless `inputs` are of
    prompts too: the others teach nothing.
    """
    parts: list[dict[str, torch.Tensor]] = [{} for _ in conversations]
    with fast_kernels(target.model, small_batch=False):  # around the LM head too
        for batch in in_step(forward_batches(conversations), target.sharded):
            if batch is None:
                target.idle()
                continue
            ran = _run(target, [conversations[i] for i in batch], top_k, storage, inputs)
            for i, part in zip(batch, ran, strict=True):
                parts[i] = part
    if not parts:
        return {}
    return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}


def forward_batches(conversations: list[Conversation]) -> Iterator[list[int]]:
    """Indices of conversations that run together, of like lengths and `BATCH_TOKENS` at most."""
    by_length = sorted(range(len(conversations)), key=lambda i: -len(conversations[i].ids))
    while by_length:
        size = max(1, BATCH_TOKENS // len(conversations[by_length[0]].ids))
        yield by_length[:size]
        by_length = by_length[size:]


def _run(
    target: Target,
    conversations: list[Conversation],
    top_k: int,
    storage: Storage,
    inputs: Inputs,
) -> list[dict[str, torch.Tensor]]:
    """The tensors of each conversation, from one padded forward."""
    rows = [torch.tensor(c.ids) for c in conversations]
    lengths = [len(row) for row in rows]
    padded = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)
    kept = torch.arange(padded.shape[1]) < torch.tensor(lengths)[:, None]
    ids, mask = padded.to(target.device), kept.long().to(target.device)
    seen = target.activations(ids, mask, inputs.layers)
    wanted = torch.cat([_teacher_rows(c, inputs.prompts) for c in conversations])
    places = kept.flatten().nonzero()[:, 0]
    teachers = _teachers(target, seen.hidden.flatten(0, 1), places[wanted], top_k)
    # One copy of each for all conversations: a GPU waits for each.
    there = places.to(target.device)
    tensors = on_cpu("hidden", seen.hidden.flatten(0, 1)[there], storage)
    for i, outputs in seen.layers.items():
        tensors |= on_cpu(f"layer.{i}", outputs.flatten(0, 1)[there], storage)
    for layer_type, pair in seen.shared_kv.items() if inputs.kv else ():
        for what, heads in zip(("keys", "values"), pair, strict=True):
            of_tokens = heads.transpose(1, 2).flatten(0, 1)[there]
            tensors |= on_cpu(f"{layer_type}.{what}", of_tokens, storage)
    for name, found in zip(("teacher_ids", "teacher_logprobs"), teachers, strict=True):
        tensors[name] = found.new_zeros(len(places), top_k)
        tensors[name][wanted] = found
    tensors["ids"] = torch.cat(rows).int()
    tensors["loss_mask"] = torch.cat([_loss_mask(c) for c in conversations])
    split = {name: tensor.split(lengths) for name, tensor in tensors.items()}
    return [{name: parts[b] for name, parts in split.items()} for b in range(len(rows))]


def _teachers(
    target: Target, hidden: torch.Tensor, places: torch.Tensor, top_k: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Of hidden states [N, D], while they are on the device: the ids [n, k] int32 and
    log-probabilities [n, k] of the target's best tokens after those at `places` [n], on the CPU."""
    ids = [hidden.new_zeros(0, top_k, dtype=torch.int32)]
    logprobs = [hidden.new_zeros(0, top_k, dtype=torch.float32)]
    for rows in hidden[places.to(hidden.device)].split(LOGIT_ROWS):
        # Not in float32: it would cost as much as the best tokens do.
        best_ids, best = top_logprobs(target.own_logits(rows), top_k)
        ids.append(best_ids.int())
        logprobs.append(best)
    return torch.cat(ids).cpu(), torch.cat(logprobs).cpu()


def _loss_mask(c: Conversation) -> torch.Tensor:
    """[T] bool: tokens that the assistant wrote."""
    mask = torch.zeros(len(c.ids), dtype=torch.bool)
    for start, end in c.spans:
        mask[start:end] = True
    return mask


def _teacher_rows(c: Conversation, prompts: bool = False) -> torch.Tensor:
    """[T] bool: rows whose next token the assistant wrote, or anybody."""
    mask = _loss_mask(c) | prompts
    return torch.cat([mask[1:], mask.new_zeros(1)])

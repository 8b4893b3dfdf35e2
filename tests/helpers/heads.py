"""Draft heads: random, ordered, finished, and trained on a single text."""

from copy import deepcopy
from pathlib import Path
from typing import Any

import torch
from transformers import Gemma4AssistantForCausalLM, PreTrainedModel

from headstart.configs.schema import DataConfig, HeadConfig, TrainConfig
from headstart.data.conversations import answered
from headstart.data.documents import Document
from headstart.data.extraction import OnlineActivations
from headstart.data.loader import Batch, candidate_rows, gather_rows
from headstart.eval.decoding import decode
from headstart.heads.assistant import assistant_config
from headstart.heads.loading import VOCAB_SIZE
from headstart.heads.ordered import (
    TeacherSamples,
    set_order,
    token_usage,
    with_clusters,
)
from headstart.heads.pairing import build_assistant
from headstart.heads.saving import load_assistant, save_assistant
from headstart.heads.target import Inputs, Target
from headstart.heads.unroll import DraftHead
from headstart.train.losses import Candidates
from headstart.train.step import batch_sums, learning_rate, step_candidates


def candidates_of(batch: Batch, c: TrainConfig, seed: int) -> Candidates | None:
    """As the loop draws them, where no token is known to be likely."""
    likely = torch.zeros(VOCAB_SIZE, dtype=torch.bool)
    return step_candidates([batch], likely, c, seed, lambda kept: kept)


# What was trained or searched for already, by the weights of the target and all that was asked.
_documents: dict[Any, tuple[list[int], Document]] = {}
_heads: dict[Any, tuple[DraftHead, torch.Tensor]] = {}


def _weights(target: Target) -> str:
    """The fingerprint as of now: the property remembers its first value."""
    return Target(target.model, target.tokenizer, target.name).fingerprint


def greedy_document(target: Target, tokens: int = 24) -> tuple[list[int], Document]:
    """A prompt whose greedy continuation is varied and does not end early, and its activations."""
    key = (_weights(target), tokens)
    if key not in _documents:
        _documents[key] = _search_document(target, tokens)
    return deepcopy(_documents[key])


def _search_document(target: Target, tokens: int) -> tuple[list[int], Document]:
    for seed in range(100):
        generator = torch.Generator().manual_seed(seed)
        prompt = torch.randint(4, 260, (6,), generator=generator).tolist()
        text = decode(target, prompt, tokens).tokens
        if len(text) == tokens and len(set(text)) > 0.6 * tokens:
            break
    else:
        raise AssertionError("no varied text in 100 tries")
    conversation = answered(prompt, text, id="c", category="c", source="c")
    # What heads of any kind may read.
    inputs = Inputs(layers=tuple(range(target.config.num_hidden_layers - 1)))
    seen = OnlineActivations(target, [conversation], DataConfig(teacher_top_k=16), inputs)
    return prompt, seen.read([0])[0]


def overfit(
    target: Target,
    document: Document,
    steps: int,
    rounds: int,
    shift: int = 0,
    kind: str = "assistant",
) -> DraftHead:
    """Train a head on one text; `shift` pairs tokens with later hidden states."""
    key = (_weights(target), tuple(document.ids.tolist()), steps, rounds, shift, kind)
    if key not in _heads:
        head = _train_on(target, document, steps, rounds, shift, kind)
        _heads[key] = head, torch.get_rng_state()
    head, state = _heads[key]
    torch.set_rng_state(state)  # as if it had been trained now
    return deepcopy(head)


def _train_on(
    target: Target, document: Document, steps: int, rounds: int, shift: int, kind: str
) -> DraftHead:
    torch.manual_seed(0)
    head = DraftHead(build_assistant(target, HeadConfig(kind=kind), rounds))
    batch = gather_rows([document], [candidate_rows(document)], rounds, inputs=head.inputs)

    def later(module: Any, args: Any) -> Any:
        texts, *others = args
        return texts._replace(hidden=torch.roll(texts.hidden, -shift, dims=1)), *others

    handle = head.register_forward_pre_hook(later)
    c = TrainConfig(
        num_speculative_steps=rounds,
        step_loss_decay=1.0,
        negatives=64,
        mixed_precision="no",
        draft_position_offset=0,
    )
    optimizer = torch.optim.AdamW(head.trainable().values(), lr=3e-3)
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, steps, 10, 3e-3)
        sums = batch_sums(head, target, batch, c, candidates_of(batch, c, step))
        (sums["loss_sum"] / batch.weights.sum()).backward()
        torch.nn.utils.clip_grad_norm_(head.trainable().values(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    handle.remove()
    return head


def noisy_head(target: Target, **head: Any) -> DraftHead:
    """A head whose every path matters: no weight at its tidy start."""
    torch.manual_seed(1)
    assistant = build_assistant(target, HeadConfig(**head))
    with torch.no_grad():
        for parameter in assistant.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn_like(parameter))
    return DraftHead(assistant).eval()


def ordered_head(target_config: Any, top_k: int = 4, **head: Any) -> Gemma4AssistantForCausalLM:
    """A tiny random head with 20 clusters of 16 neighboring tokens."""
    config = assistant_config(target_config, HeadConfig(**head))
    config.use_ordered_embeddings = True
    config.num_centroids, config.centroid_intermediate_top_k = 20, top_k
    config.text_config.initializer_range = 0.2  # as the target's: its drafts differ
    torch.manual_seed(0)
    assistant = Gemma4AssistantForCausalLM(config).eval()
    assistant.masked_embedding.token_ordering.copy_(torch.arange(320))
    return assistant


def order_by_target(assistant: PreTrainedModel, target: Target, table: torch.Tensor) -> None:
    """Clusters from what the target says, for a head whose own states do not matter."""
    said = said_by(target)
    usage = token_usage(target.logits, said)
    states = said.hidden[:, : table.shape[1]]
    set_order(assistant.masked_embedding, states, usage, table)


def said_by(target: Target) -> TeacherSamples:
    """What a target says after 60 random tokens."""
    ids = torch.randint(4, 260, (1, 60), generator=torch.Generator().manual_seed(3))
    hidden = target.activations(ids).hidden[0]
    best = target.logits(hidden).log_softmax(-1).topk(8)
    return TeacherSamples(hidden, best.indices, best.values)


def half_trained_head(target: Target) -> PreTrainedModel:
    """A head that is accepted now and then on the text that it was trained on."""
    return overfit(target, greedy_document(target)[1], steps=25, rounds=3).eval().assistant


NARROW, FULL = 24, None


def finished(target: Target, folder: Path, width: int | None) -> Path:
    """A head of three layers in the native format; the narrow one has clusters and a table of its
    own."""
    head = noisy_head(target, num_hidden_layers=3, hidden_size=width).assistant
    table: torch.Tensor = target.table
    torch.manual_seed(2)
    if width is not None:
        table = torch.randn(len(target.table), width) * 0.2
        save_assistant(head, table, folder / "dense", 4, torch.float32)
        dense = load_assistant(folder / "dense", torch.float32)
        head = with_clusters(dense, 20, 20)  # all are read: a draft is the dense one
        head.masked_embedding.token_ordering.copy_(torch.randperm(len(target.table)))
        torch.nn.init.normal_(head.masked_embedding.centroids.weight)
    save_assistant(head, table, folder / "head", 4, torch.float32)
    return folder / "head"

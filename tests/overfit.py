"""A head trained on a single greedy text: the smallest head that is really accepted."""

import torch

from headstart.configs.schema import DataConfig, HeadConfig, TrainConfig
from headstart.data.conversations import answered
from headstart.data.extraction import OnlineActivations
from headstart.data.loader import Batch, candidate_rows, gather_rows
from headstart.data.store import Document
from headstart.eval.decoding import decode
from headstart.heads.assistant import build_assistant
from headstart.heads.loading import VOCAB_SIZE
from headstart.heads.target import Target
from headstart.heads.unroll import DraftHead
from headstart.train.losses import Candidates
from headstart.train.step import batch_sums, learning_rate, step_candidates


def candidates_of(batch: Batch, c: TrainConfig, seed: int) -> Candidates | None:
    """As the loop draws them, where no token is known to be likely."""
    likely = torch.zeros(VOCAB_SIZE, dtype=torch.bool)
    return step_candidates([batch], likely, c, seed, lambda kept: kept)


def greedy_document(target: Target, tokens: int = 24) -> tuple[list[int], Document]:
    """A prompt whose greedy continuation is varied and does not end early, and its activations."""
    for seed in range(100):
        generator = torch.Generator().manual_seed(seed)
        prompt = torch.randint(4, 260, (6,), generator=generator).tolist()
        text = decode(target, prompt, tokens).tokens
        if len(text) == tokens and len(set(text)) > 0.6 * tokens:
            break
    else:
        raise AssertionError("no varied text in 100 tries")
    conversation = answered(prompt, text, id="c", category="c", source="c")
    seen = OnlineActivations(target, [conversation], DataConfig(teacher_top_k=16))
    return prompt, seen.read([0])[0]


def overfit(
    target: Target,
    document: Document,
    steps: int,
    rounds: int,
    shift: int = 0,
) -> DraftHead:
    """Train a head on one text; `shift` pairs tokens with later hidden states."""
    torch.manual_seed(0)
    head = DraftHead(build_assistant(target, HeadConfig()))
    batch = gather_rows([document], [candidate_rows(document)], rounds)
    batch.hidden = torch.roll(batch.hidden, -shift, dims=1)
    c = TrainConfig(
        rounds=rounds, round_decay=1.0, negatives=64, precision="float32", rope_position="newest"
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
    return head

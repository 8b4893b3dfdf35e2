"""Objectives as pure functions of tensors.

Letters: B conversations, R rows of each, K rounds, D target width, N rows flattened, C candidates,
k teacher tokens, V vocabulary.
"""

from dataclasses import dataclass

import torch

from headstart.data.loader import Batch
from headstart.heads.targets import Target


@dataclass(frozen=True)
class Candidates:
    """The tokens over which a batch's softmax runs, shared by all its rows."""

    ids: torch.Tensor
    """[C] every token that some row's teacher ranks high, then random negatives."""
    log_weights: torch.Tensor
    """[C] added to the logits inside the normaliser: 0 for the former, log(V / n) for n
    negatives drawn from all V, -inf for negatives that are among the former."""
    slots: torch.Tensor
    """Shape of the teacher ids given: where each stands in `ids`."""


def draw_candidates(
    teacher_ids: torch.Tensor, vocab_size: int, negatives: int, generator: torch.Generator
) -> Candidates:
    """All teachers' top tokens, plus uniform negatives that stand in for the rest of V.

    With these weights the normaliser sum(exp(logit + log_weight)) is unbiased for the one over
    all V tokens (importance sampling, Bengio & Senecal 2008).

    Args:
        teacher_ids: [..., k] int64.
        vocab_size: V.
        negatives: n, drawn with replacement.
        generator: on the CPU, so that the draw is the same on every device.
    """
    top, slots = torch.unique(teacher_ids, return_inverse=True)
    drawn = torch.randint(vocab_size, (negatives,), generator=generator).to(top.device)
    weight = torch.tensor(vocab_size / negatives, device=top.device).log()
    clashes = torch.isin(drawn, top)
    return Candidates(
        ids=torch.cat([top, drawn]),
        log_weights=torch.cat(
            [torch.zeros(len(top), device=top.device), weight.masked_fill(clashes, -torch.inf)]
        ),
        slots=slots,
    )


def sparse_forward_kl(
    logits: torch.Tensor,
    log_weights: torch.Tensor,
    slots: torch.Tensor,
    teacher_logprobs: torch.Tensor,
) -> torch.Tensor:
    """KL(teacher || draft) over the teacher's top k tokens and one bucket for all others.

    Args:
        logits: [N, C] the draft's logits of the candidates.
        log_weights: [C] from `draw_candidates`.
        slots: [N, k] where each row's teacher tokens stand among the candidates.
        teacher_logprobs: [N, k] of the full softmax; what is missing to 1 is the tail bucket.

    Returns:
        [N] float32, in nats.
    """
    logits = logits.float()
    log_normaliser = torch.logsumexp(logits + log_weights, dim=-1, keepdim=True)
    log_q = logits.gather(-1, slots) - log_normaliser
    p = teacher_logprobs.exp()
    tail_p = (1 - p.sum(-1)).clamp_min(1e-6)
    # Rounding can bring the sum of the top tokens above 1.
    tail_q = (1 - log_q.exp().sum(-1)).clamp_min(1e-6)
    return (p * (teacher_logprobs - log_q)).sum(-1) + tail_p * (tail_p / tail_q).log()


def batch_sums(
    model: torch.nn.Module,
    target: Target,
    batch: Batch,
    round_weights: torch.Tensor,
    negatives: int,
    seed: int,
    bfloat16: bool,
) -> dict[str, torch.Tensor]:
    """Forward the head over a batch and sum its loss and acceptance.

    Args:
        model: a `DraftHead`, wrapped or not.
        target: for its embeddings and table.
        batch: B conversations, R rows of each, K rounds.
        round_weights: [K].
        negatives: n, drawn with `seed`.
        seed: of the negatives.
        bfloat16: compute under autocast, the weights staying float32.

    Returns:
        Scalars: `loss_sum` (weighted by round), `accepted` (drafts matched in a row from the
        first, over the candidates), `rows`.
    """
    # [B, R, K, ...] -> [K, B, R, ...], the order of the head's states.
    teacher_ids = batch.teacher_ids.permute(2, 0, 1, 3)
    teacher_logprobs = batch.teacher_logprobs.permute(2, 0, 1, 3)
    kept = batch.weights.permute(2, 0, 1)
    generator = torch.Generator().manual_seed(seed)
    candidates = draw_candidates(teacher_ids, len(target.table), negatives, generator)
    dtype = torch.bfloat16 if bfloat16 else torch.float32
    shared_kv = {t: (k.to(dtype), v.to(dtype)) for t, (k, v) in batch.shared_kv.items()}
    with torch.autocast(batch.rows.device.type, torch.bfloat16, enabled=bfloat16):
        embeds = target.embed(batch.tokens).float()
        states = model(
            batch.hidden.float(), embeds, batch.rows, shared_kv, batch.starts
        )  # [K, B, R, D]
        table = target.table[candidates.ids].to(dtype)
        logits = torch.nn.functional.linear(states.flatten(0, 2), table)  # [K*B*R, C]
    loss = sparse_forward_kl(
        logits,
        candidates.log_weights,
        candidates.slots.flatten(0, 2),
        teacher_logprobs.flatten(0, 2),
    ).view(kept.shape)
    with torch.no_grad():
        hit = logits.argmax(-1).view(kept.shape) == candidates.slots[..., 0]
        accepted = (hit & kept.bool()).long().cumprod(dim=0).sum()
    return {
        "loss_sum": (loss * kept * round_weights[:, None, None]).sum(),
        "accepted": accepted.float(),
        "rows": kept[0].sum(),
    }

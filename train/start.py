"""The head at step 0: what it takes from the target and from a sample of the training text."""

from typing import Literal

import torch

from headstart.configs.schema import Config, TrainConfig
from headstart.data.store import Documents
from headstart.heads.assistant import build_assistant, warm_assistant
from headstart.heads.lora import add_lora
from headstart.heads.ordered import Taught, cluster_count, token_usage
from headstart.heads.progress import say
from headstart.heads.targets import Target
from headstart.heads.ties import low_rank_agreement, low_rank_start, plain_svd_start
from headstart.heads.unroll import DraftHead

START_ROWS = 1 << 16  # rows of the training text that starts are drawn up from
AGREEMENT_ROWS = 2048  # held-out rows on which a low-rank tie is judged


def build_head(
    target: Target, config: Config, taught: Taught, validation: Documents, resumed: bool
) -> DraftHead:
    """The head at step 0, with a dense LM head: clusters are made of a head that is trained.

    A narrow head starts its low-rank tie from what the target said in the training text. A finished
    head (`config.head.start`) goes on as it is.

    Args:
        target: frozen.
        config: the whole run.
        taught: what the target said in the training text, from `taught_rows`.
        validation: read to say how good the start of a low-rank tie is.
        resumed: a checkpoint is about to fill the head, so that nothing needs a start.

    Raises:
        ValueError: the clusters that the finished head is to get cannot be.
    """
    h = config.head
    if h.warm:
        head = DraftHead(warm_assistant(target, h.start))
        if h.lora is not None:
            add_lora(head.assistant, h.lora)
        return train_only(head, h.trains)
    if h.use_ordered_embeddings:
        cluster_count(len(target.table), h.num_centroids, h.centroid_intermediate_top_k)
    dense = h.model_copy(update={"use_ordered_embeddings": False, "num_centroids": None})
    assistant = build_assistant(target, dense)
    width = assistant.config.text_config.hidden_size
    projection: torch.Tensor | None = None
    if width < target.config.hidden_size:
        if resumed:
            projection = torch.zeros(target.config.hidden_size, width)
        else:
            projection = _start_tie(target, config, taught, validation, width)
    return train_only(DraftHead(assistant, projection).to(target.device), h.trains)


def train_only(head: DraftHead, parts: list[str]) -> DraftHead:
    """Freeze all but the parameters that have one of `parts` in their names; none named: nothing.

    Raises:
        ValueError: a part is in no name.
    """
    names = list(head.trainable())
    if odd := [part for part in parts if not any(part in name for name in names)]:
        raise ValueError(f"head.trains: {odd[0]!r} is in none of the names {', '.join(names)}")
    if parts:
        for name, parameter in head.trainable().items():
            parameter.requires_grad_(any(part in name for part in parts))
    return head


def _start_tie(
    target: Target, config: Config, taught: Taught, validation: Documents, width: int
) -> torch.Tensor:
    start = tie_start(target, config.head.tie_start, taught, width)
    unseen = taught_rows(validation, target.device, AGREEMENT_ROWS).hidden
    agreement = low_rank_agreement(target.table, start, unseen)
    say(
        f"Low-rank tie of width {width}, start from {config.head.tie_start}: it keeps the target's "
        f"best token on {agreement:.1%} of held-out rows"
    )
    return start[0]


def tie_start(
    target: Target, kind: Literal["data", "svd"], taught: Taught, width: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """P [D, H] and Q [H, D] of a low-rank tie's start; `low_rank_start` says what they are."""
    if kind == "svd":
        return plain_svd_start(target.table, taught.hidden, width)
    weights = taught.token_weights(len(target.table)) + 1e-9
    return low_rank_start(target.table, taught.hidden, weights, width)


def likely_tokens(target: Target, taught: Taught, c: TrainConfig) -> torch.Tensor:
    """[V] bool: the `c.likely_tokens` that the target finds likeliest in the training text; none
    where the objective runs over all tokens anyway."""
    likely = torch.zeros(len(target.table), dtype=torch.bool, device=target.device)
    if c.vocabulary == "sparse":
        usage = token_usage(target.logits, taught)
        likely[usage.topk(min(c.likely_tokens, len(usage))).indices] = True
    return likely


def taught_rows(documents: Documents, device: torch.device, limit: int = START_ROWS) -> Taught:
    """What the target said at up to `limit` rows, of documents from anywhere in the collection."""
    hidden, ids, logprobs, count = [], [], [], 0
    shuffled = torch.randperm(len(documents.entries), generator=torch.Generator().manual_seed(0))
    for i in shuffled.tolist():
        (document,) = documents.read([i])
        rows = document.loss_mask.nonzero()[:, 0] - 1  # the target wrote the next token
        rows = rows[rows >= 0][: limit - count]
        hidden.append(document.hidden[rows])
        ids.append(document.teacher_ids[rows].long())
        logprobs.append(document.teacher_logprobs[rows])
        count += len(rows)
        if count == limit:
            break
    return Taught(*(torch.cat(parts).to(device) for parts in (hidden, ids, logprobs)))

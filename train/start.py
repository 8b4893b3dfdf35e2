"""The head at step 0: what it takes from the target and from a sample of the training text.

Letters: D target width, H head width, V vocabulary, N tokens.
"""

import hashlib
import math
from typing import Any

import torch
from accelerate import Accelerator

from headstart.common.console import phase, print_once
from headstart.common.processes import full_tensor
from headstart.configs.schema import Config, HeadConfig, TrainConfig
from headstart.data.conversations import stable_hash
from headstart.data.documents import Documents
from headstart.heads.kinds import kind_of
from headstart.heads.ordered import TeacherSamples, cluster_count, token_usage, with_clusters
from headstart.heads.pairing import build_assistant, set_table, warm_assistant
from headstart.heads.saving import add_lora, load_assistant_config
from headstart.heads.target import Target
from headstart.heads.unroll import DraftHead
from headstart.train.checkpoints import (
    Average,
    Progress,
    RunState,
    checkpoints,
    load_checkpoint,
)

LOGIT_ROWS = 128  # rows of V logits held at once


def low_rank_start(
    table: torch.Tensor, hidden: torch.Tensor, token_weights: torch.Tensor, rank: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Data-aware start of the projection P of a low-rank tie `table @ P`.

    Minimizes E ||(table - mean) h - (table - mean) P Q h||^2 over tokens weighted by their
    probability and hidden states h with the measured second moment: with S that moment and G the
    weighted covariance of the table, P = S^(1/2) U and Q = U' S^(-1/2), where U are the leading
    eigenvectors of S^(1/2) G S^(1/2).

    Args:
        table: [V, D] the target's table.
        hidden: [N, D] post-norm hidden states of the target.
        token_weights: [V] probability of each token, any scale.
        rank: H, columns kept.

    Returns:
        P [D, H] float32, scaled so that head states Q h have unit second moment, and Q [H, D].
    """
    weights = (token_weights / token_weights.sum()).float()
    mean = weights @ table.float()
    centered = table.float() - mean
    covariance = centered.T @ (weights[:, None] * centered)
    moment = hidden.float().T @ hidden.float() / len(hidden)
    values, vectors = torch.linalg.eigh(moment)
    # Directions that the target never takes are left out of the inverse.
    roots = values.clamp_min(1e-7 * values.max()).sqrt()
    root, inverse = (vectors * r @ vectors.T for r in (roots, 1 / roots))
    leading = torch.linalg.eigh(root @ covariance @ root)[1].flip(-1)[:, :rank]
    return root @ leading, leading.T @ inverse


@torch.no_grad()
def low_rank_agreement(
    table: torch.Tensor, start: tuple[torch.Tensor, torch.Tensor], hidden: torch.Tensor
) -> float:
    """How often `table @ P @ Q h` and `table @ h` have the same best token.

    Args:
        table: [V, D].
        start: P [D, H] and Q [H, D].
        hidden: [N, D] states of the target that the start was not made of.
    """
    agreed = 0
    for rows in hidden.float().split(LOGIT_ROWS):
        pair = (rows, rows @ start[1].T @ start[0].T)
        best, kept = ((states.to(table.dtype) @ table.T).argmax(-1) for states in pair)
        agreed += int((best == kept).sum())
    return agreed / max(len(hidden), 1)


START_ROWS = 1 << 16  # rows of the training text that starts are drawn up from
AGREEMENT_ROWS = 2048  # held-out rows on which a low-rank tie is judged


def count_steps(c: TrainConfig, conversations: int, processes: int) -> TrainConfig:
    """The settings with the `max_steps` that `num_epochs` comes to, where that is given.

    Raises:
        ValueError: the warm-up would last longer.
    """
    if c.num_epochs is None:
        return c
    each = c.batch_size * c.gradient_accumulation_steps * processes
    steps = max(1, math.ceil(c.num_epochs * conversations / each))
    if c.warmup_steps >= steps:
        raise ValueError(
            f"train.num_epochs={c.num_epochs:g} comes to max_steps={steps}, each of {each} "
            f"conversations, and train.warmup_steps={c.warmup_steps} must be below that: lower it"
        )
    return c.model_copy(update={"max_steps": steps})


def start_run(
    config: Config,
    target: Target,
    training: Documents,
    validation: Documents,
    prompts_sha256: str,
    accelerator: Accelerator,
    resume: bool,
) -> tuple[RunState, torch.Tensor]:
    """The state of a run at step 0, or as its newest checkpoint has it.

    Args:
        config: the whole run.
        target: frozen.
        training, validation: read for what a head starts from.
        prompts_sha256: of the prompts that the target answers; empty: texts were there.
        accelerator: of the launch; it wraps head and optimizer.
        resume: go on from the newest checkpoint where there is one.

    Returns:
        The state, and `likely_tokens`.

    Raises:
        ValueError: the head cannot be built, or the checkpoint is damaged or of another run.
    """
    c, run = config.train, config.output_dir
    saved = checkpoints(run / "checkpoints") if resume else []
    with phase("Starting the head"):
        samples = sample_teacher_rows(training, target.device)
        head = build_head(target, config, samples, validation, resumed=bool(saved))
        likely = likely_tokens(target, samples, c)
    optimizer = make_optimizer(head, c)
    head.assistant.train()  # of one that was loaded no layer would be checkpointed
    if c.activation_checkpointing:
        head.assistant.gradient_checkpointing_enable({"use_reentrant": False})
    if c.compile:
        for layer in kind_of(head.assistant.config).layers(head.assistant):
            layer.compile(dynamic=True)
    model, optimizer = accelerator.prepare(head, optimizer)
    average = Average(head.trainable(), c.ema_decay)
    origin = {
        "prompts": prompts_sha256,
        "texts": texts_sha256(training, validation),
    }
    if config.head.warm:
        origin["weights that are not trained"] = frozen_sha256(head)
    state = RunState(head, model, optimizer, average, Progress(), origin, not config.head.warm)
    if saved:
        load_checkpoint(state, saved[-1], target)
        print_once(f"Resuming {run} after step {state.progress.step}")
    return state, likely


def texts_sha256(training: Documents, validation: Documents) -> str:
    """Of which texts are trained on and held out, by their prompts: what the target answers may
    differ in rounding from machine to machine."""
    both = (training.entries, validation.entries)
    return stable_hash([[[e.id, e.source, e.length - e.trained] for e in own] for own in both])


def frozen_sha256(head: DraftHead) -> str:
    """Of the weights that a checkpoint does not hold, such as those under an adapter; all processes
    must call it."""
    digest = hashlib.sha256()
    for name, parameter in head.named_parameters():
        if not parameter.requires_grad:
            weights = full_tensor(parameter.detach()).cpu().contiguous()
            digest.update(name.encode())
            digest.update(weights.view(torch.uint8).numpy().data if weights.numel() else b"")
    return digest.hexdigest()


FUSED = ("cpu", "cuda", "mps", "xpu")  # devices on which torch has AdamW as one kernel


def make_optimizer(head: DraftHead, c: TrainConfig) -> torch.optim.AdamW:
    """AdamW in one pass over the weights: matrices decay, norms do not."""
    parameters = list(head.trainable().values())
    groups = [
        {"params": [p for p in parameters if p.ndim > 1], "weight_decay": c.weight_decay},
        {"params": [p for p in parameters if p.ndim == 1], "weight_decay": 0.0},
    ]
    fused = all(p.device.type in FUSED for p in parameters)
    return torch.optim.AdamW(groups, lr=c.learning_rate, fused=fused)


def build_head(
    target: Target, config: Config, samples: TeacherSamples, validation: Documents, resumed: bool
) -> DraftHead:
    """The head at step 0, with a dense LM head: clusters are made of a head that is trained.

    A narrow head starts its low-rank tie from what the target said in the training text. A finished
    head (`config.head.init_from`) goes on as it is.

    Args:
        target: frozen.
        config: the whole run.
        samples: what the target said in the training text, from `sample_teacher_rows`.
        validation: read to say how good the start of a low-rank tie is.
        resumed: a checkpoint is about to fill the head, so that nothing needs a start.

    Raises:
        ValueError: the clusters that the finished head is to get cannot be.
    """
    h = config.head
    if h.warm:
        head = DraftHead(warm_assistant(target, h.init_from))
        if h.lora is not None:
            add_lora(head.assistant, h.lora)
        return train_only(head, h.trainable_modules)
    if h.use_ordered_embeddings:
        cluster_count(len(target.table), h.num_centroids, h.clusters_read)
    dense = h.model_copy(update={"use_ordered_embeddings": False, "num_centroids": None})
    assistant = build_assistant(target, dense, config.train.num_speculative_steps)
    width = assistant.config.get_text_config().hidden_size
    projection: torch.Tensor | None = None
    if width < target.config.hidden_size:
        if resumed:
            projection = torch.zeros(target.config.hidden_size, width)
        else:
            projection, down = _start_tie(target, samples, validation, width)
            with torch.no_grad():
                kind_of(assistant.config).init_narrow(assistant, down)
    return train_only(DraftHead(assistant, projection).to(target.device), h.trainable_modules)


def clusters_wanted(h: HeadConfig, vocab_size: int) -> tuple[int, int]:
    """Clusters of a head that goes on from a finished one, and how many of them a draft reads:
    where the settings say nothing those of that head, where it has any.

    Raises:
        ValueError: a draft would read more than there are, or they do not divide the vocabulary.
    """
    there = load_assistant_config(h.init_from)
    clusters, read = h.num_centroids, h.clusters_read
    if there.use_ordered_embeddings and clusters is None:
        clusters = there.num_centroids
        read = h.centroid_intermediate_top_k or there.centroid_intermediate_top_k
    return cluster_count(vocab_size, clusters, read), read


def untrained_assistant(target: Target, h: HeadConfig, drafts: int) -> Any:
    """A head of the shape that a run's will be served in, in float32, to see what it costs: of what
    weights and of which clusters does not matter to that; `drafts` is K.

    Raises:
        ValueError: it cannot be built.
    """
    if not h.warm:
        assistant = build_assistant(target, h, drafts)
        if not len(assistant.lm_head.weight):  # a narrow head goes by a projection in training
            table = torch.zeros(len(target.table), assistant.lm_head.weight.shape[1])
            set_table(assistant, torch.nn.Parameter(table.to(target.device), requires_grad=False))
    else:
        assistant = warm_assistant(target, h.init_from)
        if h.use_ordered_embeddings:
            assistant = with_clusters(assistant, *clusters_wanted(h, len(target.table)))
    if assistant.masked_embedding is not None:
        ordering = assistant.masked_embedding.token_ordering
        ordering.copy_(torch.arange(len(ordering)))
    return assistant


def train_only(head: DraftHead, parts: list[str]) -> DraftHead:
    """Freeze all but the parameters that have one of `parts` in their names; none named: nothing.

    Raises:
        ValueError: a part is in no name.
    """
    names = list(head.trainable())
    if odd := [part for part in parts if not any(part in name for name in names)]:
        raise ValueError(
            f"head.trainable_modules: {odd[0]!r} is in none of the names {', '.join(names)}"
        )
    if parts:
        for name, parameter in head.trainable().items():
            parameter.requires_grad_(any(part in name for part in parts))
    return head


def _start_tie(
    target: Target, samples: TeacherSamples, validation: Documents, width: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """[D, H] the projection that a low-rank tie starts from, and [H, D] that of hidden states."""
    weights = samples.token_weights(len(target.table)) + 1e-9
    start = low_rank_start(target.table, samples.hidden, weights, width)
    unseen = sample_teacher_rows(validation, target.device, AGREEMENT_ROWS).hidden
    agreement = low_rank_agreement(target.table, start, unseen)
    print_once(
        f"Low-rank tie of width {width}: its start keeps the target's best token on "
        f"{agreement:.1%} of held-out rows"
    )
    return start


def likely_tokens(target: Target, samples: TeacherSamples, c: TrainConfig) -> torch.Tensor:
    """[V] bool: the `c.likely_tokens` that the target finds likeliest in the training text; none
    where the objective runs over all tokens anyway."""
    likely = torch.zeros(len(target.table), dtype=torch.bool, device=target.device)
    if c.vocabulary == "sparse":
        usage = token_usage(target.logits, samples)
        likely[usage.topk(min(c.likely_tokens, len(usage))).indices] = True
    return likely


def sample_teacher_rows(
    documents: Documents, device: torch.device, limit: int = START_ROWS
) -> TeacherSamples:
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
    return TeacherSamples(*(torch.cat(parts).to(device) for parts in (hidden, ids, logprobs)))

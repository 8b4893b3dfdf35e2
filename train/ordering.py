"""Ordered embeddings for a trained head: clusters made, and centroids learned, from its own drafts.

The trunk stays as it is. The order comes after it because both the clusters and their scores are of
the states that the head really has.

Letters: N drafts, n of them, C clusters, L likely tokens, k teacher tokens, V vocabulary, H width
of the head's table.
"""

import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState

from headstart.common.console import phase, print_once, progress_bar
from headstart.common.files import check_empty
from headstart.configs.schema import Config, HeadConfig
from headstart.data.background import to_device
from headstart.data.documents import Documents
from headstart.data.loader import run_loader
from headstart.data.prepare import prepare_documents
from headstart.eval.acceptance import RecallCounts
from headstart.eval.asked import as_the_head_was
from headstart.eval.replay import simulate_acceptance
from headstart.heads.kinds import check_drafts, inputs_of
from headstart.heads.ordered import (
    TeacherSamples,
    cluster_count,
    set_order,
    token_usage,
    with_clusters,
)
from headstart.heads.pairing import check_pair
from headstart.heads.saving import (
    ADAPTER,
    draft_position_offset,
    kept_notes,
    load_assistant,
    load_assistant_config,
    save_assistant,
)
from headstart.heads.target import Target
from headstart.heads.unroll import DraftHead, served_position
from headstart.train.run_folder import summary_text
from headstart.train.start import clusters_wanted
from headstart.train.step import draft_batch, learning_rate

DRAFTS = 1 << 17  # of the training text at most, that clusters and centroids are made from
LEAST_DRAFTS = 1 << 15  # that clusters are made from, however few the centroids learn from
DOCUMENTS = 8  # drafted from at once
LIKELY_TOKENS = 24_576  # tokens whose mass the centroids learn
STEP_DRAFTS = 256
LEARNING_RATE = 2e-3
TEMPERATURE = 1.3
"""Of the mass: 32 clusters are read, so the less likely ones count too."""
LEAST_MASS = 1e-7  # so that no cluster is ruled out because these drafts never needed it


def drafts_needed(steps: int) -> int:
    """How many drafts are made for so many steps of learning: each is read about once."""
    return min(DRAFTS, max(LEAST_DRAFTS, steps * STEP_DRAFTS))


@torch.no_grad()
def drafts_of(
    head: DraftHead, target: Target, training: Documents, config: Config, wanted: int
) -> TeacherSamples:
    """States of the head at drafts of the training text, all rounds, and what the target said
    there.

    Args:
        head: with a table of its own, of width H.
        target: that it drafts for.
        training: the text.
        config: the seed, and of `train` the anchors and rounds.
        wanted: N, or as many as two passes over the text give.

    Returns:
        `hidden` [N, H] of the head; `ids`, `logprobs` [N, k] of the target.
    """
    # Not the run's batch size: the same drafts however the run was dealt over processes.
    loader = run_loader(training, config, head.inputs, batch_size=DOCUMENTS, max_packed_length=None)
    position = config.train.draft_position_offset
    batches = 2 * -(-len(training.entries) // DOCUMENTS)  # anchors are drawn anew each time
    parts: list[tuple[torch.Tensor, ...]] = []
    count = 0
    with progress_bar() as bar:
        task = bar.add_task("Drafting (drafts)", total=wanted, status="")
        for number in range(batches):
            batch = to_device(loader.batch(number), target.device)
            drafts = draft_batch(head, target, batch, torch.float32, position)
            teacher = drafts.teacher
            parts.append((drafts.states, teacher.ids.long(), teacher.logprobs))
            count += len(drafts.states)
            expected = min(wanted, count * batches // (number + 1))
            bar.update(task, completed=min(count, wanted), total=expected)
            if count >= wanted:
                break
    return TeacherSamples(*(torch.cat(part)[:wanted] for part in zip(*parts, strict=True)))


def learn_centroids(
    head: DraftHead,
    drafted: TeacherSamples,
    usage: torch.Tensor,
    table: torch.Tensor,
    steps: int,
    seed: int,
) -> None:
    """Fit the centroids: the softmax over their scores to the mass that the head itself gives the
    clusters.

    Not to the teacher's mass: a draft through the clusters is to be the dense one, and the head's
    own distribution is a function of its state, where single teachers are noise that centroids
    learn by heart (docs/explanation/ordered-embeddings.md).

    Args:
        head: with ordered embeddings.
        drafted: its states, and the teacher's tokens to tell the recall by.
        usage: [V] how likely each token is.
        table: [V, H] whose product with the states is the draft's logits.
        steps: of `STEP_DRAFTS` drafts each.
        seed: of which drafts.
    """
    head.requires_grad_(False)
    embedder, cluster_of = head.assistant.masked_embedding, head.cluster_of
    assert cluster_of is not None
    centroids = embedder.centroids.weight.requires_grad_()
    likely = usage.topk(min(LIKELY_TOKENS, len(usage))).indices
    likely = likely[torch.argsort(cluster_of[likely])]  # neighbors are added up faster
    rows, clusters = table[likely], cluster_of[likely]
    optimizer = torch.optim.AdamW([centroids], lr=LEARNING_RATE, weight_decay=0.0)
    generator = torch.Generator().manual_seed(seed)
    with progress_bar() as bar:
        task = bar.add_task("Learning centroids", total=steps, status="")
        for step in range(steps):
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(step, steps, min(20, steps - 1), LEARNING_RATE)
            drawn = torch.randint(len(drafted.ids), (STEP_DRAFTS,), generator=generator)
            drawn = drawn.to(table.device)
            states = drafted.hidden[drawn]
            scores = embedder.centroids(states)
            mass = cluster_mass(states @ rows.T, clusters, len(centroids))
            loss = -(mass * scores.log_softmax(-1)).sum(-1).mean()
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            of_teacher = cluster_of[drafted.ids[drawn]]
            recall = RecallCounts.of(scores.detach(), of_teacher, drafted.logprobs[drawn])
            shares = "/".join(f"{share:.2f}" for share in recall.describe()["argmax"].values())
            status = f"loss {float(loss.detach()):.3f} recall {shares}"
            bar.update(task, advance=1, status=status)
    centroids.requires_grad_(False)


@torch.no_grad()
def cluster_mass(logits: torch.Tensor, clusters: torch.Tensor, count: int) -> torch.Tensor:
    """[n, count] the mass of a softmax in each cluster, flattened by `TEMPERATURE`.

    Args:
        logits: [n, L] of likely tokens.
        clusters: [L] the cluster of each.
        count: C, clusters in all.
    """
    # Tokens first: whole rows are then added, which is many times as fast.
    mass = logits.new_zeros(count, len(logits))
    mass = mass.index_add_(0, clusters, logits.softmax(-1).T.contiguous()).T
    flat = mass.clamp_min(LEAST_MASS) ** (1 / TEMPERATURE)
    return flat / flat.sum(-1, keepdim=True)


REBUILD = "head.on_existing_clusters=rebuild"
RECORD = "order.json"  # beside an ordered head: what the order keeps


@dataclass(frozen=True)
class Order:
    """What is asked of `order_head`."""

    rebuild: bool
    """True: cluster the vocabulary anew. False: keep the clusters, learn their centroids on."""
    num_centroids: int | None
    """Clusters of a rebuilt order. None: as many as the head has, or 128 tokens in each."""
    centroid_intermediate_top_k: int | None
    """Clusters whose tokens a draft is chosen from. None: as many as the head says."""
    steps: int
    """Steps of learning; 0: centroids stay as they are, of new clusters the means."""


def order_best(
    config: Config, target: Target, training: Documents, validation: Documents
) -> dict[str, Any]:
    """Give the best head of a run, in head/, ordered embeddings, where it has none yet.

    All processes of the launch do the same; the main one writes. A run that is killed here begins
    the order anew, which takes some minutes: the dense head stays in place until it is whole.

    Returns:
        `after` of what `order_head` finds.
    """
    PartialState().wait_for_everyone()  # the main process may still be writing the head
    folder, h = config.output_dir / "head", config.head
    if not (folder / RECORD).is_file():
        order = Order(True, h.num_centroids, h.clusters_read, h.centroid_steps)
        assistant = load_assistant(str(folder), torch.float32, target.device)
        if h.warm:
            assistant, order = _with_earlier_clusters(assistant, h, order)
        assistant, found = order_head(assistant, target, training, validation, config, order)
        if PartialState().is_main_process:
            _save(assistant, target, config, {"head": "this run's", **found}, folder)
        PartialState().wait_for_everyone()
    after: dict[str, Any] = json.loads((folder / RECORD).read_text(encoding="utf-8"))["after"]
    return after


def reorder(path: str, target: Target, config: Config, order: Order, out: Path) -> dict[str, Any]:
    """Give a head in the native format clusters, or better centroids.

    Args:
        path: folder or Hub id of the head.
        target: that it drafts for.
        config: the texts (`data`), the seed, and of `train` the anchors and rounds.
        order: what is asked.
        out: folder of the new head.

    Returns:
        What `order_head` found; also written to `out`/order.json.

    Raises:
        ValueError: the head does not fit its target, has no clusters to refine, the clusters asked
            for cannot be, or `out` holds something.
    """
    assistant = load_assistant(path, torch.float32, target.device)
    check_pair(target, assistant)
    check_empty(out)
    if not assistant.config.use_ordered_embeddings and not order.rebuild:
        raise ValueError(f"{path} has no ordered embeddings to refine: give {REBUILD}")
    if order.num_centroids is not None and not order.rebuild:
        raise ValueError(f"head.num_centroids makes other clusters: give {REBUILD} too")
    _shape(assistant.config, order)
    check_drafts(
        assistant.config, [config.train.num_speculative_steps], "train.num_speculative_steps"
    )
    its_own = config.train.model_copy(
        update={"draft_position_offset": draft_position_offset(assistant.config)}
    )
    config = config.model_copy(update={"train": its_own})
    data = as_the_head_was(config.data, path)
    inputs = inputs_of(assistant.config)
    training, validation = prepare_documents(target, data, config.seed, None, inputs)
    assistant, found = order_head(assistant, target, training, validation, config, order)
    found = {"head": path, "chat_template_kwargs": data.chat_template_kwargs, **found}
    _save(assistant, target, config, found, out)
    return found


def order_head(
    assistant: Any,
    target: Target,
    training: Documents,
    validation: Documents,
    config: Config,
    order: Order,
) -> tuple[Any, dict[str, Any]]:
    """A head with ordered embeddings, made from its own drafts of the training text.

    Args:
        assistant: float32, with its own table; its centroids may change in place.
        target: that it drafts for.
        training, validation: drafted from, and judged on.
        config: the seed, and of `train` the anchors and rounds.
        order: what is asked.

    Returns:
        The head; and `before` (where it had clusters) and `after`: acceptance length through the
        clusters and dense, by replaying rounds over held-out texts, and the recall of the clusters.
    """

    def judged(assistant: Any) -> dict[str, Any]:
        everything, k = range(len(validation.entries)), config.train.num_speculative_steps
        position = served_position(config.train.draft_position_offset)
        with phase("Replaying held-out texts"):
            found = simulate_acceptance(
                DraftHead(assistant), target, validation, k, everything, position
            )
        return {
            "acceptance_length": found.acceptance.acceptance_length,
            "dense_acceptance_length": found.dense.acceptance_length,
            "recall": found.recall.describe(),
        }

    found: dict[str, Any] = {"rebuilt": order.rebuild, "steps": order.steps}
    if assistant.config.use_ordered_embeddings:
        found["before"] = judged(assistant)
    clusters, top_k = _shape(assistant.config, order)
    if not order.rebuild:
        assistant.config.centroid_intermediate_top_k = top_k
        assistant.masked_embedding.centroid_intermediate_top_k = top_k
        if not order.steps:
            return assistant, found | {"after": judged(assistant)}
    wanted = drafts_needed(order.steps)
    drafted = drafts_of(DraftHead(assistant), target, training, config, wanted)
    table = assistant.lm_head.weight
    usage = token_usage(lambda states: states @ table.T, drafted)
    if order.rebuild:
        assistant = with_clusters(assistant, clusters, top_k)
        with phase(f"Ordering {len(target.table):,} tokens in {clusters:,} clusters"):
            set_order(assistant.masked_embedding, drafted.hidden, usage, table)
    learn_centroids(DraftHead(assistant), drafted, usage, table, order.steps, config.seed)
    return assistant, found | {"after": judged(assistant)}


def _shape(config: Any, order: Order) -> tuple[int, int]:
    """Clusters, and how many of them a draft reads."""
    top_k = order.centroid_intermediate_top_k or config.centroid_intermediate_top_k
    known = config.num_centroids if config.use_ordered_embeddings else None
    return cluster_count(
        config.get_text_config().vocab_size, order.num_centroids or known, top_k
    ), top_k


def _with_earlier_clusters(assistant: Any, h: HeadConfig, order: Order) -> tuple[Any, Order]:
    """A trained head with the clusters of the head that it started from, which stay or learn on;
    unchanged where that one had none or new ones are asked for."""
    config = load_assistant_config(h.init_from)
    if not config.use_ordered_embeddings:
        return assistant, order
    how = h.on_existing_clusters or ("keep" if h.lora else "refine")
    clusters, read = clusters_wanted(h, config.get_text_config().vocab_size)
    if how == "rebuild" or h.num_centroids is not None:
        return assistant, Order(True, clusters, read, order.steps)
    earlier = load_assistant(h.init_from, torch.float32, assistant.device)
    assistant = with_clusters(assistant, clusters, read)
    assistant.masked_embedding.load_state_dict(earlier.masked_embedding.state_dict())
    steps = 0 if how == "keep" else order.steps
    if how == "keep":
        print_once("The clusters stay as they are (head.on_existing_clusters=keep)")
    return assistant, Order(False, None, read, steps)


def _save(assistant: Any, target: Target, config: Config, found: dict[str, Any], out: Path) -> None:
    tokens = assistant.generation_config.num_assistant_tokens or config.train.num_speculative_steps

    def beside(work: Path) -> None:
        (work / RECORD).write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")
        if (out / ADAPTER).is_dir():
            shutil.copytree(out / ADAPTER, work / ADAPTER)

    save_assistant(
        assistant, assistant.lm_head.weight, out, tokens, target.table.dtype,
        notes=kept_notes(assistant.config, target.identity), beside=beside,
    )  # fmt: skip


def print_order(found: dict[str, Any]) -> None:
    """Print what `reorder` found, before and after."""
    for when in ("before", "after"):
        if when in found:
            print(f"{when}: {summary_text(found[when])}")

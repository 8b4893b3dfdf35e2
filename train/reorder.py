"""Clusters and centroids for a finished head: `headstart heads order`."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from headstart.configs.schema import Config
from headstart.data.loader import AnchorLoader
from headstart.data.prepare import prepare_documents
from headstart.data.progress import progress_bar, say
from headstart.data.store import Documents
from headstart.eval.simulate import Simulated, simulate_acceptance
from headstart.heads.assistant import check_pair, load_assistant, save_assistant
from headstart.heads.ordered import cluster_count, set_order
from headstart.heads.targets import Target
from headstart.heads.unroll import DraftHead
from headstart.train.loop import is_centroid, learning_rate
from headstart.train.objectives import cluster_cross_entropy
from headstart.train.start import likely_tokens, taught_rows
from headstart.train.step import draft_batch
from headstart.train.summary import summary_text
from headstart.train.vocabulary import draw_candidates, sparse_mass


@dataclass(frozen=True)
class Order:
    """What is asked of `reorder`."""

    rebuild: bool
    """True: cluster the vocabulary anew. False: keep the clusters, learn their centroids on."""
    num_centroids: int | None
    """Clusters of a rebuilt order. None: as many as the head has, or 128 tokens in each."""
    centroid_intermediate_top_k: int | None
    """Clusters whose tokens a draft is chosen from. None: as many as the head says."""
    steps: int
    """Steps of learning."""


def reorder(path: str, target: Target, config: Config, order: Order, out: Path) -> dict[str, Any]:
    """Give a head in the native format clusters, or better centroids; its trunk stays as it is.

    Args:
        path: folder or Hub id of the head.
        target: that it drafts for.
        config: the texts (`data`), seed, and of `train` the batch size, anchors, rounds, negatives
            and learning rate.
        order: what is asked.
        out: folder of the new head.

    Returns:
        Before (where the head had clusters) and after: acceptance length through the clusters and
        dense, by walking rounds over held-out texts, and the recall of the clusters. Also written
        to `out`/order.json.

    Raises:
        ValueError: the head does not fit its target, has no clusters to refine, the clusters asked
            for cannot be, or `out` holds something.
    """
    assistant = load_assistant(path, torch.float32, target.device)
    check_pair(target, assistant)
    had_clusters = bool(assistant.config.use_ordered_embeddings)
    if out.exists() and any(out.iterdir()):
        raise ValueError(f"{out} is not empty: name another folder, --out DIR")
    if not had_clusters and not order.rebuild:
        raise ValueError(f"{path} has no ordered embeddings to refine: give --rebuild")
    if order.num_centroids is not None and not order.rebuild:
        raise ValueError("--num-centroids makes other clusters: give --rebuild too")
    shape = _shape(assistant.config, order)
    training, validation = prepare_documents(target, config.data, config.run.seed, None)
    rounds, everything = config.train.rounds, range(len(validation.entries))
    found: dict[str, Any] = {"head": path, "rebuilt": order.rebuild, "steps": order.steps}
    if had_clusters:
        before = simulate_acceptance(DraftHead(assistant), target, validation, rounds, everything)
        found["before"] = describe_simulated(before)
    taught = taught_rows(training, target.device)
    if order.rebuild:
        assistant = _with_clusters(assistant, *shape)
        say(f"Ordering {len(target.table):,} tokens in {assistant.config.num_centroids:,} clusters")
        set_order(assistant.masked_embedding, target, taught, assistant.lm_head.weight)
    else:
        assistant.config.centroid_intermediate_top_k = shape[1]
        assistant.masked_embedding.centroid_intermediate_top_k = shape[1]
    head = DraftHead(assistant)
    likely = likely_tokens(target, taught, config.train)
    learn_centroids(head, target, training, config, likely, order.steps)
    after = simulate_acceptance(head, target, validation, rounds, everything)
    found["after"] = describe_simulated(after)
    tokens = assistant.generation_config.num_assistant_tokens or rounds
    save_assistant(assistant, assistant.lm_head.weight, out, tokens, target.table.dtype)
    (out / "order.json").write_text(json.dumps(found, indent=2) + "\n")
    return found


def describe_simulated(found: Simulated) -> dict[str, Any]:
    """Acceptance lengths and recall, divided."""
    return {
        "acceptance_length": found.acceptance.acceptance_length,
        "dense_acceptance_length": found.dense.acceptance_length,
        "recall": found.recall.describe(),
    }


def _shape(config: Any, order: Order) -> tuple[int, int]:
    """Clusters, and how many of them a draft reads."""
    top_k = order.centroid_intermediate_top_k or config.centroid_intermediate_top_k
    known = config.num_centroids if config.use_ordered_embeddings else None
    return cluster_count(config.text_config.vocab_size, order.num_centroids or known, top_k), top_k


def _with_clusters(assistant: PreTrainedModel, clusters: int, top_k: int) -> PreTrainedModel:
    """The same head with room for clusters, which hold nothing yet."""
    config = assistant.config
    config.use_ordered_embeddings = True
    config.num_centroids, config.centroid_intermediate_top_k = clusters, top_k
    weights = assistant.state_dict()
    larger = type(assistant)(config).to(assistant.device).eval()
    own = {k: v for k, v in weights.items() if not is_centroid(k)}
    missing, unexpected = larger.load_state_dict(own, strict=False)
    assert not unexpected
    assert all(is_centroid(name) for name in missing)
    larger.generation_config = assistant.generation_config
    return larger


def learn_centroids(
    head: DraftHead,
    target: Target,
    training: Documents,
    config: Config,
    likely: torch.Tensor,
    steps: int,
) -> None:
    """Fit the centroids to the mass that the head itself gives each cluster."""
    c, seed = config.train, config.run.seed
    head.requires_grad_(False)
    centroids = head.assistant.masked_embedding.centroids.weight.requires_grad_()
    optimizer = torch.optim.AdamW([centroids], lr=c.learning_rate, weight_decay=0.0)
    loader = AnchorLoader(
        training, c.batch_size, c.anchors, c.rounds, seed, later_anchors=c.later_anchors
    )
    cluster_of, table = head.cluster_of, head.draft_table(target.table)
    assert cluster_of is not None
    with progress_bar() as bar:
        task = bar.add_task("Learning centroids", total=steps, status="")
        for step in range(steps):
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(step, steps, min(10, steps - 1), c.learning_rate)
            batch = loader.batch(step).to(target.device)
            drafts = draft_batch(head, target, batch, torch.float32)
            kept = likely.clone()
            kept[drafts.teacher.ids] = True
            generator = torch.Generator().manual_seed(seed * 1_000_003 + step)
            candidates = draw_candidates(kept, c.negatives, generator)
            mass = sparse_mass(drafts.states, table, candidates, cluster_of)
            assert drafts.cluster_logits is not None
            loss = cluster_cross_entropy(drafts.cluster_logits, mass).mean()
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            bar.update(task, advance=1, status=f"loss {float(loss.detach()):.3f}")
    centroids.requires_grad_(False)


def print_order(found: dict[str, Any]) -> None:
    """Print what `reorder` found, before and after."""
    for when in ("before", "after"):
        if when in found:
            print(f"{when}: {summary_text(found[when])}")

"""Centroids that score the clusters of a head as the head itself would.

Letters: N drafts, n of them, C clusters, L likely tokens, k teacher tokens, V vocabulary, H width
of the head's table.
"""

import torch

from headstart.configs.schema import Config
from headstart.data.loader import AnchorLoader
from headstart.data.store import Documents
from headstart.eval.recall import RecallCounts
from headstart.heads.ordered import Taught
from headstart.heads.progress import progress_bar
from headstart.heads.targets import Target
from headstart.heads.unroll import DraftHead
from headstart.train.schedule import learning_rate
from headstart.train.step import draft_batch

DRAFTS = 1 << 17  # of the training text, that clusters and centroids are made from
DOCUMENTS = 8  # drafted from at once
LIKELY_TOKENS = 24_576  # tokens whose mass the centroids learn
STEP_DRAFTS = 256
LEARNING_RATE = 2e-3
TEMPERATURE = 1.3
"""Of the mass: 32 clusters are read, so the less likely ones count too."""
LEAST_MASS = 1e-7  # so that no cluster is ruled out because these drafts never needed it


@torch.no_grad()
def drafts_of(head: DraftHead, target: Target, training: Documents, config: Config) -> Taught:
    """States of the head at up to `DRAFTS` drafts of the training text, all rounds, and what the
    target said there.

    Args:
        head: with a table of its own, of width H.
        target: that it drafts for.
        training: the text.
        config: the seed, and of `train` the anchors and rounds.

    Returns:
        `hidden` [N, H] of the head; `ids`, `logprobs` [N, k] of the target.
    """
    c = config.train
    # Not `c.batch_size`: the same drafts however the run was dealt over processes.
    loader = AnchorLoader(
        training, DOCUMENTS, c.anchors, c.rounds, config.run.seed, later_anchors=c.later_anchors
    )
    batches = 2 * -(-len(training.entries) // DOCUMENTS)  # anchors are drawn anew each time
    parts: list[tuple[torch.Tensor, ...]] = []
    count = 0
    with progress_bar() as bar:
        task = bar.add_task("Drafting (drafts)", total=DRAFTS, status="")
        for number in range(batches):
            batch = loader.batch(number).to(target.device)
            drafts = draft_batch(head, target, batch, torch.float32, c.rope_position)
            teacher = drafts.teacher
            parts.append((drafts.states, teacher.ids.long(), teacher.logprobs))
            count += len(drafts.states)
            expected = min(DRAFTS, count * batches // (number + 1))
            bar.update(task, completed=min(count, DRAFTS), total=expected)
            if count >= DRAFTS:
                break
    return Taught(*(torch.cat(part)[:DRAFTS] for part in zip(*parts, strict=True)))


def learn_centroids(
    head: DraftHead,
    drafted: Taught,
    usage: torch.Tensor,
    table: torch.Tensor,
    steps: int,
    seed: int,
) -> None:
    """Fit the centroids: the softmax over their scores to the mass that the head itself gives the
    clusters.

    Not to the teacher's mass: a draft through the clusters is to be the dense one, and the head's
    own distribution is a function of its state, where single teachers are noise that centroids
    learn by heart (docs/training.md).

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
    likely = likely[torch.argsort(cluster_of[likely])]  # neighbours are added up faster
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
            bar.update(task, advance=1, status=f"loss {float(loss.detach()):.3f} {_told(recall)}")
    centroids.requires_grad_(False)


def _told(recall: RecallCounts) -> str:
    return "recall " + "/".join(f"{share:.2f}" for share in recall.describe()["argmax"].values())


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

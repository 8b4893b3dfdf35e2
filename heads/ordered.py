"""Ordered embeddings: the vocabulary in equal clusters, so that a draft reads a few of them.

The format is transformers' own (`Gemma4AssistantMaskedEmbedder`): `centroids` score the clusters,
`token_ordering` lists their tokens one cluster after the other, and the LM head runs over the
tokens of the best `centroid_intermediate_top_k`. What is not among them cannot be drafted, so
tokens are clustered with others that are as likely and alike, and the centroids are then learned.

Letters: V vocabulary, D target width, H head width, C clusters of V / C tokens, N rows, n points,
k teacher tokens.
"""

import copy
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from transformers.initialization import no_init_weights

CLUSTER_TOKENS = 128  # tokens a cluster, where nobody says how many clusters
KMEANS_ROUNDS = 8
MEAN_TOKENS = 32  # tokens a cluster that a round reads, of a band of more than
WHOLE_BAND = 16_384  # tokens: likely ones are few, and all are read
USAGE_ROWS = 1024  # rows whose whole softmax tells how likely each token is
CHUNK_ROWS = 128  # of them at once
BANDS = tuple(2.0**-n for n in range(8, -1, -1))
"""Where the vocabulary, most likely tokens first, is cut before it is clustered: each band holds as
many tokens as all before it. A cluster of likely tokens is worth ten of others; mixed ones would
all have to be read."""


@dataclass(frozen=True)
class TeacherSamples:
    """What was said at N rows of a target's own text."""

    hidden: torch.Tensor
    """[N, D] the target's post-norm hidden states, or [N, H] a head's."""
    ids: torch.Tensor
    """[N, k] the target's best tokens there, best first."""
    logprobs: torch.Tensor
    """[N, k] of its full softmax."""

    def token_weights(self, vocab_size: int) -> torch.Tensor:
        """[V] float32: the mean probability of each token, as far as it was stored."""
        weights = torch.zeros(vocab_size, device=self.ids.device)
        mass = self.logprobs.float().exp() / len(self.ids)
        return weights.index_add_(0, self.ids.long().flatten(), mass.flatten())


@torch.no_grad()
def token_usage(
    logits_of: Callable[[torch.Tensor], torch.Tensor], samples: TeacherSamples
) -> torch.Tensor:
    """[V] float32: how likely each token is, from all stored rows and a whole softmax of some.

    The stored top tokens alone say nothing of nearly all of the vocabulary: on Gemma 3 270M they
    leave out tokens that the target's whole softmax over a thousand rows ranks well. `logits_of`
    makes logits [n, V] of hidden states [n, width].
    """
    step = max(1, len(samples.hidden) // USAGE_ROWS)
    rows = samples.hidden[::step][:USAGE_ROWS]
    usage = sum(logits_of(chunk).softmax(-1).sum(0) for chunk in rows.split(CHUNK_ROWS)) / len(rows)
    assert isinstance(usage, torch.Tensor)
    return usage + samples.token_weights(len(usage))


@torch.no_grad()
def token_features(table: torch.Tensor, usage: torch.Tensor, hidden: torch.Tensor) -> torch.Tensor:
    """Points [V, D] float32: two are near where the logits of their tokens move together.

    The rows of the table [V, D] less their mean by usage [V] (which moves all logits alike),
    multiplied by the root of the covariance of the states [N, D] that really occur, and scaled to
    length 1: the product of two is the correlation of their tokens' logits over those states.
    """
    states = hidden.float() - hidden.float().mean(0)
    values, vectors = torch.linalg.eigh(states.T @ states / len(states))
    root = vectors * values.clamp_min(0).sqrt() @ vectors.T
    mean = (usage / usage.sum()) @ table.float()
    return torch.nn.functional.normalize((table.float() - mean) @ root, dim=1)


def cluster_count(vocab_size: int, wanted: int | None, top_k: int) -> int:
    """The number of clusters: `wanted`, or that with about `CLUSTER_TOKENS` tokens in each.

    Raises:
        ValueError: they cannot be equal, or are fewer than the `top_k` that a draft reads.
    """
    near = wanted or max(1, vocab_size // CLUSTER_TOKENS)
    divisors = [n for n in range(1, vocab_size + 1) if vocab_size % n == 0]
    nearest = min(divisors, key=lambda n: abs(n - near))
    if wanted is not None and nearest != wanted:
        raise ValueError(
            f"num_centroids={wanted} does not divide the vocabulary of {vocab_size:,} tokens into "
            f"equal clusters: the nearest number that does is {nearest}"
        )
    if nearest < top_k:
        raise ValueError(
            f"head.centroid_intermediate_top_k={top_k} is above the {nearest} clusters of this "
            "vocabulary: set head.use_ordered_embeddings=false, which it is too small for, or "
            "give more clusters, head.num_centroids=N"
        )
    return nearest


@torch.no_grad()
def order_vocabulary(features: torch.Tensor, usage: torch.Tensor, clusters: int) -> torch.Tensor:
    """Cluster the vocabulary: equal clusters, of tokens that are about as likely and alike.

    The tokens are sorted by how likely they are, cut into bands, and each band is clustered by
    balanced k-means. Rare and unused ids so end up together. On a CPU the same arguments give the
    same clusters; some accelerators add in an order of their own.

    Args:
        features: [V, D] of the tokens, from `token_features`.
        usage: [V] how likely each token is.
        clusters: C, a divisor of V.

    Returns:
        [V] int64 `token_ordering`: the tokens of the first cluster, then those of the next.
    """
    assert len(features) % clusters == 0  # `cluster_count`
    size = len(features) // clusters
    by_usage = torch.argsort(usage, descending=True, stable=True)
    ordering = []
    for count, band in zip(
        counts := band_sizes(clusters), by_usage.split([n * size for n in counts]), strict=True
    ):
        owner = balanced_kmeans(features[band], count)
        ordering.append(band[torch.argsort(owner, stable=True)])
    return torch.cat(ordering)


def band_sizes(clusters: int) -> list[int]:
    """How many of the clusters each band has, that of the likeliest tokens first."""
    edges = sorted({0, *(max(1, round(share * clusters)) for share in BANDS)})
    return [last - first for first, last in pairwise(edges)]


def balanced_kmeans(points: torch.Tensor, clusters: int) -> torch.Tensor:
    """The cluster [n] int64 of each of the points [n, D] float32 by k-means, whose last assignment
    makes all clusters equal; n is a multiple of c."""
    size = len(points) // clusters
    # Evenly spaced points: of every part of the band, and the same each time.
    means = points[::size][:clusters].clone()
    sample = points[:: max(1, min(size // MEAN_TOKENS, len(points) // WHOLE_BAND))]
    for _ in range(KMEANS_ROUNDS):
        nearest = _closeness(sample, means).argmax(1)
        counts = torch.bincount(nearest, minlength=clusters)
        sums = torch.zeros_like(means).index_add_(0, nearest, sample)
        means = torch.where(counts[:, None] > 0, sums / counts.clamp_min(1)[:, None], means)
    return balanced_assignment(_closeness(points, means), size)


def _closeness(points: torch.Tensor, means: torch.Tensor) -> torch.Tensor:
    """[n, c]: half the negative squared distance, but for a term of the point's own."""
    return torch.addmm(-0.5 * means.square().sum(1), points, means.T)


PREFERRED = 16  # clusters of a point that are looked up at a time
ROUNDS = 100  # of asking; the few points that are without a cluster then take what room is left


def balanced_assignment(scores: torch.Tensor, size: int) -> torch.Tensor:
    """Clusters of equal size: each point asks its best cluster that has not refused it yet, and a
    cluster keeps the `size` points that score highest (deferred acceptance, Gale & Shapley 1962),
    for `ROUNDS` rounds: of 131,072 points 3% have no cluster then, and would take as long again.

    Args:
        scores: [n, c] float, n at most c * size. Changed in place.
        size: points a cluster.

    Returns:
        [n] int64. Ties go to the lower index, so that the same scores give the same clusters.
    """
    n, c = scores.shape
    owner = torch.full((n,), -1, device=scores.device)
    held = torch.full((n,), -torch.inf, device=scores.device)
    values, wanted = _preferred(scores)
    asked = torch.zeros(n, dtype=torch.long, device=scores.device)  # of `wanted`
    for _ in range(ROUNDS):
        free = (owner < 0).nonzero()[:, 0]
        if not len(free):
            return owner
        spent = free[asked[free] == wanted.shape[1]]
        if len(spent):
            scores[spent[:, None], wanted[spent]] = -torch.inf
            values[spent], wanted[spent] = _preferred(scores[spent])
            asked[spent] = 0
        owner[free], held[free] = wanted[free, asked[free]], values[free, asked[free]]
        asked[free] += 1
        # Few clusters hold too many in the end: sorting all points each time took most of the time.
        too_many = torch.bincount(owner, minlength=c) > size
        judged = too_many[owner].nonzero()[:, 0]
        order = judged[torch.argsort(held[judged], descending=True, stable=True)]
        order = order[torch.argsort(owner[order], stable=True)]
        first = torch.searchsorted(owner[order], torch.arange(c, device=scores.device))
        places = torch.arange(len(order), device=scores.device)
        refused = order[places - first[owner[order]] >= size]
        owner[refused] = -1
    free = (owner < 0).nonzero()[:, 0]
    room = size - torch.bincount(owner[owner >= 0], minlength=c)
    places = torch.repeat_interleave(torch.arange(c, device=scores.device), room)
    owner[free] = places[: len(free)]
    return owner


def _preferred(scores: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The best few of each row of scores [n, c], best first, and their clusters."""
    values, clusters = scores.topk(min(PREFERRED, scores.shape[1]), dim=1)
    # Of equal scores that of the lower cluster: topk leaves open which comes first.
    by_cluster = torch.argsort(clusters, dim=1)
    values, clusters = values.gather(1, by_cluster), clusters.gather(1, by_cluster)
    by_value = torch.argsort(values, dim=1, descending=True, stable=True)
    return values.gather(1, by_value), clusters.gather(1, by_value)


def token_clusters(token_ordering: torch.Tensor, clusters: int) -> torch.Tensor:
    """[V] the cluster of each token, from the tokens of each cluster."""
    token_ordering = token_ordering.long()
    size = len(token_ordering) // clusters
    places = torch.arange(len(token_ordering), device=token_ordering.device)
    return torch.empty_like(token_ordering).scatter_(0, token_ordering, places // size)


@torch.no_grad()
def mean_centroids(
    table: torch.Tensor, usage: torch.Tensor, token_ordering: torch.Tensor, clusters: int
) -> torch.Tensor:
    """[C, D] float32: the mean row of each cluster, weighted by how likely its tokens are."""
    # Of tokens that are never said, the plain mean.
    weights = (usage + usage.sum() * 1e-9)[token_ordering].view(clusters, -1, 1)
    rows = table[token_ordering].float().view(clusters, -1, table.shape[1])
    return (weights * rows).sum(1) / weights.sum(1)


@torch.no_grad()
def set_order(
    embedder: Any, states: torch.Tensor, usage: torch.Tensor, draft_table: torch.Tensor
) -> None:
    """Order the vocabulary and give the `masked_embedding` of a head its clusters and mean
    centroids, from states [N, H] of the head, usage [V], and the table [V, H] whose product with
    the states is the draft's logits."""
    features = token_features(draft_table, usage, states)
    ordering = order_vocabulary(features, usage, embedder.num_centroids)
    embedder.token_ordering.copy_(ordering)
    centroids = mean_centroids(draft_table, usage, ordering, embedder.num_centroids)
    embedder.centroids.weight.copy_(centroids)


def with_clusters(assistant: Any, clusters: int, top_k: int) -> Any:
    """The same head with room for clusters, which hold nothing yet."""
    config = copy.deepcopy(assistant.config)
    config.use_ordered_embeddings = True
    config.num_centroids, config.centroid_intermediate_top_k = clusters, top_k
    weights = assistant.state_dict()
    with no_init_weights():  # all of them are loaded; a random table takes seconds
        larger = type(assistant)(config).to(assistant.device).eval()
    own = {k: v for k, v in weights.items() if not is_of_clusters(k)}
    missing, unexpected = larger.load_state_dict(own, strict=False)
    assert not unexpected
    assert all(is_of_clusters(name) for name in missing)
    larger.generation_config = assistant.generation_config
    return larger


def is_of_clusters(name: str) -> bool:
    """Whether a tensor of a head is the order of its tokens, or a centroid."""
    return "masked_embedding." in name

"""Clusters: equal, the same each time, of tokens that are as likely and alike."""

from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from headstart.configs.schema import HeadConfig
from headstart.eval.acceptance import RecallCounts
from headstart.eval.decoding import decode
from headstart.heads.assistant import assistant_config
from headstart.heads.ordered import (
    balanced_assignment,
    balanced_kmeans,
    mean_centroids,
    order_vocabulary,
    token_clusters,
    token_features,
    token_usage,
)
from headstart.heads.saving import load_assistant, save_assistant
from headstart.heads.target import Target
from headstart.heads.unroll import DraftHead
from tests.helpers.heads import noisy_head, order_by_target, said_by
from tests.helpers.models import make_target

V, C = 320, 20
ORDERED: dict[str, Any] = {"use_ordered_embeddings": True, "num_centroids": C}


@given(st.integers(1, 6), st.integers(1, 7), st.integers(0, 1000))
@settings(max_examples=40, deadline=None)
def test_assignments_are_balanced_and_nobody_would_swap(c: int, size: int, seed: int) -> None:
    """Deferred acceptance is stable: no point and cluster both prefer one another to what they
    have."""
    n = c * size
    scores = torch.randn(n, c, generator=torch.Generator().manual_seed(seed))
    owner = balanced_assignment(scores.clone(), size)
    assert torch.bincount(owner, minlength=c).tolist() == [size] * c
    held = scores.gather(1, owner[:, None])[:, 0]
    for cluster in range(c):
        worst = held[owner == cluster].min()
        would_come = scores[:, cluster] > held
        assert not (would_come & (scores[:, cluster] > worst)).any()


def test_points_that_lie_together_are_clustered_together() -> None:
    generator = torch.Generator().manual_seed(0)
    centres = 10 * torch.randn(6, 8, generator=generator)
    truth = torch.arange(6).repeat_interleave(16)
    points = centres[truth] + 0.1 * torch.randn(96, 8, generator=generator)
    owner = balanced_kmeans(points, 6)
    assert all(len(owner[truth == i].unique()) == 1 for i in range(6))


def test_an_order_is_of_all_tokens_and_the_same_each_time_with_rare_ones_together() -> None:
    generator = torch.Generator().manual_seed(0)
    table, usage = torch.randn(V, 8, generator=generator), torch.zeros(V)
    said = torch.randperm(V, generator=generator)[:100]
    usage[said] = torch.rand(100, generator=generator) + 0.1
    ordering = order_vocabulary(table, usage, C)
    assert sorted(ordering.tolist()) == list(range(V))
    assert torch.equal(ordering, order_vocabulary(table, usage, C))
    clusters = token_clusters(ordering, C)
    assert torch.equal(torch.bincount(clusters), torch.full((C,), V // C))
    for cluster in range(C):
        assert set(ordering.view(C, -1)[cluster].tolist()) == set(
            (clusters == cluster).nonzero()[:, 0].tolist()
        )
    # 100 of 320 tokens are said: they fill the first clusters, and none lies among the last half.
    assert (usage[ordering[V // 2 :]] == 0).all()


def test_usage_counts_tokens_that_the_stored_ones_leave_out(target: Target) -> None:
    """As the target says them, soft cap included."""
    taught = said_by(target)
    usage = token_usage(target.logits, taught)
    whole = target.logits(taught.hidden).softmax(-1).mean(0)
    stored = torch.zeros(V).index_add_(0, taught.ids.flatten(), taught.logprobs.exp().flatten())
    torch.testing.assert_close(usage, whole + stored / len(taught.ids), atol=1e-6, rtol=1e-4)


def test_centroids_are_the_means_of_their_tokens_weighted_by_usage() -> None:
    table = torch.tensor([[0.0], [1.0], [2.0], [4.0]])
    usage = torch.tensor([0.0, 1.0, 3.0, 0.0])
    found = mean_centroids(table, usage, torch.tensor([1, 2, 0, 3]), 2)
    torch.testing.assert_close(found, torch.tensor([[1.75], [2.0]]), atol=1e-4, rtol=0)


def test_recall_counts_what_a_sort_would() -> None:
    generator = torch.Generator().manual_seed(0)
    scores = torch.randn(30, 100, generator=generator)
    clusters = torch.randint(100, (30, 4), generator=generator)
    logprobs = torch.randn(30, 4, generator=generator).log_softmax(-1) - 0.5
    counts = RecallCounts.of(scores, clusters, logprobs) + RecallCounts()
    shares = counts.describe()
    place = scores.argsort(1, descending=True).argsort(1).gather(1, clusters)
    for n in (8, 16, 32, 64):
        assert shares["argmax"][str(n)] == pytest.approx(float((place[:, 0] < n).float().mean()))
        mass = (logprobs.exp() * (place < n)).sum() / logprobs.exp().sum()
        assert shares["mass"][str(n)] == pytest.approx(float(mass), abs=1e-6)


def test_clusters_that_cannot_be_equal_are_refused_with_the_nearest_number() -> None:
    config = make_target("gemma4").config
    with pytest.raises(ValueError, match="nearest number that does is 20"):
        assistant_config(config, HeadConfig(use_ordered_embeddings=True, num_centroids=21,
                                            centroid_intermediate_top_k=4))  # fmt: skip
    with pytest.raises(ValueError, match="is above the 2 clusters of this vocabulary"):
        assistant_config(config, HeadConfig(use_ordered_embeddings=True))


def ordered_head(target: Target, top_k: int, **head: Any) -> DraftHead:
    """A noisy head whose clusters come from its table."""
    made = noisy_head(target, **ORDERED, centroid_intermediate_top_k=top_k, **head)
    order_by_target(made.assistant, target, made.table(target.table))
    return made


def test_tokens_whose_logits_move_together_lie_near_one_another() -> None:
    """Their features' product is the correlation of their logits over the states that occur."""
    generator = torch.Generator().manual_seed(0)
    table = torch.randn(50, 8, generator=generator) + 3
    hidden = torch.randn(4000, 8, generator=generator) * torch.logspace(0.5, -1, 8) + 1
    usage = torch.rand(50, generator=generator)
    features = token_features(table, usage, hidden)
    logits = hidden @ (table - (usage / usage.sum()) @ table).T
    torch.testing.assert_close(features @ features.T, torch.corrcoef(logits.T), atol=1e-3, rtol=0)


@torch.no_grad()
def test_an_exported_ordered_head_is_loaded_whole_and_keeps_generates_text(
    target: Target, tmp_path: Path
) -> None:
    """In every family: token_ordering stays of integers, and text equals plain greedy text."""
    head = ordered_head(target, 4)
    save_assistant(head.assistant, head.table(target.table), tmp_path / "h", 3, torch.float32)
    loaded = load_assistant(tmp_path / "h", torch.float32)
    for name, tensor in head.assistant.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], tensor), name
    save_assistant(head.assistant, head.table(target.table), tmp_path / "b", 3, torch.bfloat16)
    rounded = load_assistant(tmp_path / "b", torch.bfloat16).masked_embedding.token_ordering
    assert torch.equal(rounded, head.assistant.masked_embedding.token_ordering)
    prompt = torch.randint(4, 260, (6,)).tolist()
    plain = decode(target, prompt, 20).tokens
    assert decode(target, prompt, 20, loaded, 3).tokens == plain

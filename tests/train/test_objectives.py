"""Objectives: what the sparse form keeps of the exact one, and what each is at its ends."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch

from headstart.heads.target import Target
from headstart.train.losses import (
    OBJECTIVES,
    Candidates,
    Teacher,
    acceptance,
    cross_entropy,
    draw_candidates,
    exact_losses,
    forward_kl,
    lk_hybrid,
    sparse_losses,
    teacher_log_p,
    total_variation,
)
from tests.helpers.models import make_target

V, N, TOP = 320, 12, 16
ONES = torch.ones(V)
NO_TOKENS = torch.empty(0, dtype=torch.long)


def case(target: Target, top: int = TOP) -> tuple[torch.Tensor, Teacher]:
    """Draft states [N, D], and what the target says at N rows, some at the same position."""
    generator = torch.Generator().manual_seed(0)
    hidden = target.activations(torch.randint(4, 260, (1, 40), generator=generator)).hidden[0]
    positions, at = hidden[10:18], torch.arange(N) % 8
    best = target.logits(positions[at]).log_softmax(-1).topk(top)
    states = (hidden[20 : 20 + N] + 0.5 * positions[at]).detach()
    return states, Teacher(positions, at, best.indices, best.values)


def gradient_of(losses: Callable[[torch.Tensor], Any], states: torch.Tensor) -> torch.Tensor:
    leaf = states.clone().requires_grad_()
    losses(leaf).losses.sum().backward()
    assert leaf.grad is not None
    return leaf.grad


def drawn_for(
    teacher: Teacher, negatives: int, seed: int, likely: torch.Tensor = NO_TOKENS
) -> Candidates:
    kept = torch.zeros(V, dtype=torch.bool)
    kept[teacher.ids] = kept[likely] = True
    return draw_candidates(kept, negatives, seed)


def sparse(
    target: Target, teacher: Teacher, negatives: int, seed: int = 0, temperature: float = 1.0,
    objective: Any = forward_kl, likely: torch.Tensor = NO_TOKENS,
) -> Callable[[torch.Tensor], Any]:  # fmt: skip
    candidates = drawn_for(teacher, negatives, seed, likely)
    return lambda states: sparse_losses(
        states, target, teacher, candidates, objective, temperature, torch.float32, target.table
    )


def exact(
    target: Target, teacher: Teacher, temperature: float = 1.0, objective: Any = forward_kl
) -> Callable[[torch.Tensor], Any]:
    return lambda states: exact_losses(
        states, target, teacher, objective, temperature, torch.float32, target.table
    )


@pytest.mark.parametrize("temperature", [1.0, 0.6])
@pytest.mark.parametrize("name", OBJECTIVES)
@pytest.mark.parametrize("family", ["gemma3", "gemma4"])  # gemma4 caps its logits
def test_with_every_token_as_candidate_the_sparse_objective_is_the_exact_one(
    family: str, name: Any, temperature: float
) -> None:
    target = make_target(family)
    states, teacher = case(target)
    options: dict[str, Any] = {"temperature": temperature, "objective": OBJECTIVES[name]}
    ours = sparse(target, teacher, negatives=V, **options)
    theirs = exact(target, teacher, **options)
    found, wanted = ours(states), theirs(states)
    torch.testing.assert_close(found.losses, wanted.losses, atol=1e-5, rtol=1e-5)
    assert torch.equal(found.drafts, wanted.drafts)
    torch.testing.assert_close(
        gradient_of(ours, states), gradient_of(theirs, states), atol=1e-5, rtol=1e-4
    )


@pytest.mark.parametrize(("name", "bound"), [("forward_kl", 0.02), ("lk_hybrid", 0.1)])
def test_the_gradient_over_sampled_negatives_is_that_of_the_full_softmax(
    name: Any, bound: float
) -> None:
    """In expectation, to 2%, where 40% of the teacher's mass lies outside the top tokens stored;
    and its variance shrinks with the number of negatives. Total variation turns where p = q, and
    a sampled normalizer turns with it, so that it is not as exact."""
    target = make_target("gemma4")
    states, teacher = case(target, top=4)
    states, teacher = 0.5 * states, Teacher(
        0.3 * teacher.hidden, teacher.at, teacher.ids,
        target.logits(0.3 * teacher.hidden[teacher.at]).log_softmax(-1).gather(1, teacher.ids),
    )  # fmt: skip
    assert teacher.logprobs.exp().sum(-1).mean() < 0.6
    wanted = gradient_of(exact(target, teacher, objective=OBJECTIVES[name]), states)

    def drawn(negatives: int) -> torch.Tensor:
        options: dict[str, Any] = {"objective": OBJECTIVES[name]}
        return torch.stack(
            [
                gradient_of(sparse(target, teacher, negatives, seed, **options), states)
                for seed in range(400)
            ]
        )

    few, many = drawn(32), drawn(128)
    # What the mean of 400 draws is off, less what chance alone makes of it.
    squared = (many.mean(0) - wanted).square().sum() - many.var(0).sum() / len(many)
    assert squared < (bound * wanted.norm()) ** 2
    assert many.var(0).sum() / len(many) < (0.03 * wanted.norm()) ** 2, "too noisy to tell"
    assert many.var(0).sum() < 0.5 * few.var(0).sum()

    # A fair test: without the correction for sampling the same draws are far off.
    def uncorrected(seed: int) -> torch.Tensor:
        drawn = drawn_for(teacher, 128, seed)
        plain = replace(drawn, weights=torch.ones(len(drawn.ids)))
        return gradient_of(
            lambda s: sparse_losses(
                s, target, teacher, plain, OBJECTIVES[name], 1.0, torch.float32, target.table
            ),
            states,
        )

    wrong = torch.stack([uncorrected(seed) for seed in range(50)]).mean(0)
    assert (wrong - wanted).norm() > 1.5 * bound * wanted.norm()


def test_likely_tokens_that_are_always_there_make_the_gradient_less_noisy() -> None:
    """As many candidates in all, half of them the likeliest tokens, against all of them drawn;
    over a target that finds the same tokens likely at all rows, as real ones do."""
    target = make_target("gemma3")
    states, teacher = case(target)
    hidden = 2 * teacher.hidden[:1] + 0.6 * teacher.hidden
    best = target.logits(hidden[teacher.at]).log_softmax(-1).topk(4)
    states, teacher = (
        hidden[teacher.at] + 0.3 * states,
        Teacher(hidden, teacher.at, best.indices, best.values),
    )
    likely = target.logits(hidden).softmax(-1).sum(0).topk(32).indices
    wanted = gradient_of(exact(target, teacher), states)

    def drawn(negatives: int, likely: torch.Tensor) -> torch.Tensor:
        return torch.stack(
            [
                gradient_of(sparse(target, teacher, negatives, seed, likely=likely), states)
                for seed in range(200)
            ]
        )

    ours, uniform = drawn(32, likely), drawn(64, NO_TOKENS)
    assert ours.var(0).sum() < 0.3 * uniform.var(0).sum()
    assert (ours.mean(0) - wanted).norm() < 0.03 * wanted.norm()


def test_negatives_are_drawn_once_each_from_the_tokens_that_no_teacher_ranks_high() -> None:
    kept = torch.zeros(50, dtype=torch.bool)
    kept[[3, 5, 9]] = True
    candidates = draw_candidates(kept, 20, 0)
    assert candidates.ids[candidates.weights == 1].tolist() == [3, 5, 9]
    assert len(candidates.ids.unique()) == len(candidates.ids) == 23
    assert torch.equal(candidates.slot_of[candidates.ids], torch.arange(23))
    assert (candidates.slot_of < 0).sum() == 27
    assert candidates.weights.sum() == pytest.approx(50)
    everything = draw_candidates(kept, 100, 0)
    assert sorted(everything.ids.tolist()) == list(range(50))
    assert torch.equal(everything.weights, torch.ones(50))


def test_the_normalizer_over_the_vocabulary_follows_from_the_stored_tokens() -> None:
    """From logits of some tokens: the stored ones as stored, all others at their place."""
    logits = torch.randn(N, V, generator=torch.Generator().manual_seed(0))
    log_p = logits.log_softmax(-1)
    best = log_p.topk(4)
    some = torch.cat([best.indices.unique(), torch.arange(40)]).unique()
    slots = (best.indices[..., None] == some).long().argmax(-1)
    found = teacher_log_p(logits[:, some] + 3, slots, best.values)
    torch.testing.assert_close(found, log_p[:, some], atol=1e-5, rtol=0)
    # Where the states are rounded, as in int8 stores, the stored tokens stay exact.
    noisy = teacher_log_p(logits[:, some] + 0.1 * torch.randn(N, len(some)), slots, best.values)
    torch.testing.assert_close(noisy.gather(1, slots), best.values)
    assert not torch.allclose(noisy, log_p[:, some], atol=1e-2)


def test_each_objective_has_its_known_values_at_its_ends() -> None:
    torch.manual_seed(0)
    log_p, log_q = ((2 * torch.randn(N, V)).log_softmax(-1) for _ in range(2))
    far = torch.full((1, V), -60.0)
    far[0, 0] = 0.0
    other = far.roll(1, dims=1)
    for objective in (forward_kl, total_variation, lk_hybrid):
        assert objective(log_p, log_p, ONES).abs().max() < 1e-5
        assert (objective(log_q, log_p, ONES) > 0.01).all()
    assert total_variation(far, other, ONES) == pytest.approx(1)
    torch.testing.assert_close(
        total_variation(log_q, log_p, ONES), 1 - acceptance(log_q, log_p, ONES)
    )
    torch.testing.assert_close(
        cross_entropy(log_q, log_p, ONES),
        torch.nn.functional.nll_loss(log_q, log_p.argmax(-1), reduction="none"),
    )
    # Nothing accepted: all KL, the warm-up. Nearly all accepted: nearly all total variation.
    torch.testing.assert_close(lk_hybrid(far, other, ONES), forward_kl(far, other, ONES))
    near = (log_p + 0.01 * torch.randn(N, V)).log_softmax(-1)
    mix = torch.exp(-3 * acceptance(near, log_p, ONES))
    assert (mix < 0.06).all()
    torch.testing.assert_close(
        lk_hybrid(near, log_p, ONES),
        mix * forward_kl(near, log_p, ONES) + (1 - mix) * total_variation(near, log_p, ONES),
    )


def test_the_gradient_vanishes_where_the_draft_agrees_with_the_teacher() -> None:
    """Without a soft cap draft states that are the target's own give its own logits."""
    target = make_target("gemma3")
    _, teacher = case(target)
    losses = sparse(target, teacher, V)
    assert gradient_of(losses, teacher.hidden[teacher.at]).abs().max() < 1e-4

"""Rules that end drafts: they stop where more would cost more than it brings."""

import random

import pytest

from headstart.heads.decoder import CostRule, Heuristic

V = [1.0, 1.1, 1.15, 1.2, 1.25, 1.3]


def play(rule: CostRule, acceptance: float, rounds: int, seed: int = 0) -> tuple[float, float]:
    """Rounds whose drafts are each accepted with the same chance, and known to be.

    Returns:
        Tokens a target step, and drafts a round, over the second half.
    """
    rng = random.Random(seed)
    tokens, cost, drafts = 0.0, 0.0, 0
    for number in range(rounds):
        confidences: list[float] = []
        if rule.limit():
            while len(confidences) < rule.longest:
                confidences.append(acceptance)
                if not rule.goes_on(confidences):
                    break
        k = len(confidences)
        accepted = next((i for i in range(k) if rng.random() > acceptance), k)
        rule.update(confidences, k, accepted)
        if number >= rounds // 2:
            tokens, drafts = tokens + 1 + accepted, drafts + k
            cost += k * rule.c + rule.v[k]
    return tokens / cost, drafts / (rounds - rounds // 2)


@pytest.mark.parametrize("acceptance", [0.3, 0.6, 0.9])
@pytest.mark.parametrize("c", [0.05, 0.3])
def test_the_cost_rule_is_as_good_as_the_best_fixed_length(acceptance: float, c: float) -> None:
    fixed = [
        sum(acceptance**i for i in range(k + 1)) / (k * c + V[k]) for k in range(len(V))
    ]  # what is expected, by hand
    rate, _ = play(CostRule(c, V), acceptance, 4000)
    assert rate > 0.97 * max(fixed)


def test_the_cost_rule_looks_beyond_a_bump_in_the_cost_of_verification() -> None:
    """Two tokens cost more to verify than four do on some machines: a rule that looks one draft
    ahead alone would stop there."""
    rate, drafts = play(CostRule(0.05, [1.0, 1.9, 2.5, 1.6, 1.6]), 0.95, 1000)
    assert drafts > 3.5
    assert rate > 2


def test_no_draft_is_made_where_none_pays_but_it_is_tried_again() -> None:
    rule = CostRule(0.1, [1.0, 1.3, 1.5])
    rate, drafts = play(rule, 0.2, 4000)
    assert rate > 0.95
    assert 0 < drafts < 0.3


def test_confidence_decides_within_a_round() -> None:
    """Half of the drafts are sure, half are hopeless, and the head knows."""
    rule, rng = CostRule(0.1, V), random.Random(0)
    for _ in range(2000):
        sure = rng.random() < 0.5
        confidences = [0.9 if sure else 0.1]
        rule.update(confidences, 1, int(rng.random() < confidences[0]))
    assert rule.goes_on([0.9])
    assert not rule.goes_on([0.1])


def test_drafts_that_a_head_cannot_make_promise_nothing() -> None:
    """They are never tried, so that what is assumed of them would stay."""
    rules = CostRule(0.02, [1.0, *[1.9] * 8], most=2), CostRule(0.02, [1.0, 1.9, 1.9])
    assert rules[0].expected_tokens() == rules[1].expected_tokens()
    assert play(rules[0], 0.4, 2000) == play(rules[1], 0.4, 2000)
    assert rules[0].limit() in (0, 2)


def test_costs_have_to_begin_with_a_plain_step() -> None:
    with pytest.raises(ValueError, match=r"begin with v\(0\) = 1"):
        CostRule(0.1, [1.1, 1.2])


def test_the_heuristic_is_that_of_transformers() -> None:
    rule = Heuristic(2)
    for drafted, accepted, limit in [(2, 2, 4), (4, 1, 3), (3, 0, 2), (2, 0, 1), (1, 0, 1)]:
        rule.update([], drafted, accepted)
        assert rule.limit() == limit

import torch

from headstart.eval.acceptance import AcceptanceCounts, walk_rounds, zero_counts


def test_rounds_are_walked_and_not_averaged() -> None:
    """By hand: row 0 accepts 1 and jumps to row 2, which accepts 0; row 3 accepts 2 of 2 judged."""
    matches = torch.tensor([[1, 0, 1], [1, 1, 1], [0, 1, 1], [1, 1, 0], [1, 1, 1]]).bool()
    judged = torch.tensor([[1, 1, 1], [1, 1, 1], [1, 1, 1], [1, 1, 0], [1, 0, 0]]).bool()
    counts = walk_rounds(matches, judged)
    assert counts == AcceptanceCounts(rounds=3, drafted=8, reached=(3, 2, 0), accepted=(2, 1, 0))
    assert counts.acceptance_length == 1 + 3 / 3
    assert counts.acceptance_rate == 3 / 8
    assert counts.conditional_acceptance_rate == [2 / 3, 1 / 2, 0]


def test_counts_add_up_and_divide_once() -> None:
    a = AcceptanceCounts.of_rounds([(2, 2), (2, 0)], 2)
    b = AcceptanceCounts.of_rounds([(1, 1), (0, 0)], 2)
    total = a + b + zero_counts(2)
    assert total == AcceptanceCounts.of_rounds([(2, 2), (2, 0), (1, 1), (0, 0)], 2)
    assert total.acceptance_length == 1 + 3 / 4


def test_the_product_of_conditional_rates_is_the_joint_prefix() -> None:
    rounds = [(3, 3), (3, 1), (3, 0), (3, 2), (3, 3)]
    counts = AcceptanceCounts.of_rounds(rounds, 3)
    a1, a2, a3 = counts.conditional_acceptance_rate
    assert abs(1 + a1 + a1 * a2 + a1 * a2 * a3 - counts.acceptance_length) < 1e-12

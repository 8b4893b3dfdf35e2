from itertools import pairwise

import pytest
import torch

from headstart.eval.acceptance import AcceptanceCounts, replay_rounds, zero_counts


def test_rounds_are_walked_and_not_averaged() -> None:
    """By hand: row 0 accepts 1 and jumps to row 2, which accepts 0; row 3 accepts 2 of 2 judged."""
    matches = torch.tensor([[1, 0, 1], [1, 1, 1], [0, 1, 1], [1, 1, 0], [1, 1, 1]]).bool()
    judged = torch.tensor([[1, 1, 1], [1, 1, 1], [1, 1, 1], [1, 1, 0], [1, 0, 0]]).bool()
    counts = replay_rounds(matches, judged)
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


def rounds_of(accepted: list[int], k: int) -> AcceptanceCounts:
    """Rounds of K drafts from how many of them accepted draft 1, 2 and so on."""
    exactly = [a - b for a, b in pairwise([*accepted, 0])]
    lengths = [n for n, count in enumerate(exactly) for _ in range(count)]
    return AcceptanceCounts.of_rounds([(k, n) for n in lengths], k)


def test_the_definitions_are_those_of_vllm() -> None:
    """A log of vLLM, from pull request 24127 of vllm-project/vllm (vllm/v1/spec_decode/metrics.py
    computes it): 59 rounds of 5 drafts."""
    counts = rounds_of([59, 58, 56, 54, 52, 42], 5)
    assert (sum(counts.accepted), counts.drafted) == (262, 295)
    assert f"{counts.acceptance_rate:.1%}" == "88.8%"
    assert f"{counts.acceptance_length:.2f}" == "5.44"
    rates = ", ".join(f"{a:.3f}" for a in counts.cumulative_acceptance_rate)
    assert rates == "0.983, 0.949, 0.915, 0.881, 0.712"


def test_the_definitions_are_those_of_llama_cpp() -> None:
    """A log of llama.cpp, from pull request 24536 of ggml-org/llama.cpp: 87 rounds of 3 drafts, the
    last of which had fewer."""
    counts = rounds_of([86, 70, 55, 42], 3) + AcceptanceCounts.of_rounds([(1, 0)], 3)
    assert (sum(counts.accepted), counts.drafted, counts.rounds) == (167, 259, 87)
    assert f"{counts.acceptance_length:.2f}" == "2.92"
    assert f"{counts.acceptance_rate:.5f}" == "0.64479"
    rates = ", ".join(f"{a:.3f}" for a in counts.cumulative_acceptance_rate)
    assert rates == "0.805, 0.632, 0.483"


def test_the_acceptance_length_is_the_mean_accepted_tokens_of_spec_bench() -> None:
    """hemingkx/Spec-Bench notes the tokens that each round added, bonus token included, and
    evaluation/speed.py takes the mean over the rounds of all prompts."""
    prompts = [[(4, 4), (4, 0)], [(4, 2)], [(4, 1), (4, 3), (1, 1)]]
    accept_lengths = [1 + n for rounds in prompts for _, n in rounds]
    total = sum((AcceptanceCounts.of_rounds(rounds, 4) for rounds in prompts), zero_counts(4))
    assert total.acceptance_length == pytest.approx(sum(accept_lengths) / len(accept_lengths))
    assert total.accepted_histogram == [1, 2, 1, 1, 1]

"""The bound of the test that says whether a head has gone stale, and what it takes to reach it."""

from itertools import pairwise, product

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from headstart.eval.compare import read_report
from headstart.serve.published import choose_published, likeness
from headstart.serve.staleness import GAP, Rounds, StaleTest
from tests.helpers.metrics import ROOT, Traffic, measured_rates

RATE = st.floats(0.02, 0.98)


@settings(max_examples=200, deadline=None)
@given(
    st.lists(st.tuples(RATE, RATE), min_size=1, max_size=6),
    st.booleans(),
    st.sampled_from([1.0, 3.5]),
)
def test_no_bettor_gains_by_a_round_of_a_head_that_keeps_to_its_rates(
    pairs: list[tuple[float, float]], positions: bool, design_effect: float
) -> None:
    """In expectation over the outcomes of one round, each of them exactly: what makes the bound."""
    held, rates = [min(pair) for pair in pairs], [max(pair) for pair in pairs]
    k = len(held)
    reached = np.cumprod([1.0, *rates])
    chances = reached * np.append(1 - np.array(rates), 1.0)
    assert chances.sum() == pytest.approx(1)
    gained = np.zeros((1 + k) * 5)
    for accepted, chance in enumerate(chances):
        test = StaleTest(held, 0.01)
        before = test._money[0].copy()
        by_position = tuple(int(accepted > i) for i in range(k)) if positions else None
        test.observe(Rounds(1, accepted, by_position), design_effect)
        gained += chance * np.exp(test._money[0] - before)
    assert (gained <= 1 + 1e-9).all()


def test_all_beginnings_share_one_unit() -> None:
    test = StaleTest([0.6, 0.5], 0.01)
    staked = 0.0
    for restart in range(30):
        for _ in range(30):
            test.observe(Rounds(GAP, 0, (0, 0)), 1e12)  # nothing is gained
        staked = float(np.exp(test.evidence))
        assert staked < 1, restart
        test.restart()
    assert staked > 0.9


def test_heads_that_are_just_good_enough_are_called_stale_as_seldom_as_is_said() -> None:
    """The worst case: acceptance is exactly what the head is held to, round by round."""
    held, alpha, watches = [0.6, 0.6, 0.7], 0.2, 200
    alarms = 0
    for seed in range(watches):
        accepted = np.array(Traffic(held, seed, spread=0.0).next(2000))
        test = StaleTest(held, alpha)
        for start in range(0, 2000, 40):
            some = accepted[start : start + 40]
            by_position = tuple(int((some > i).sum()) for i in range(3))
            test.observe(Rounds(40, int(some.sum()), by_position), 1.0)
            if test.is_stale:
                alarms += 1
                break
    # 40 are expected at most; 60 or more of 200 at 0.2 each have a chance of 0.0006.
    assert alarms < 60


def test_drafts_that_were_never_proposed_are_not_held_against_a_head() -> None:
    """Every other round is cut off after its first draft, and the head is as good as it says."""
    held = [0.7, 0.7, 0.7, 0.7]
    accepted = np.array(Traffic(held, 0, spread=0.0).next(4000))
    cut = np.where(np.arange(4000) % 2, accepted, np.minimum(accepted, 1))
    by_position = tuple(int((cut > i).sum()) for i in range(4))
    missing = 2000 * 3
    lacking = (0.0, missing / 3, missing / 2, missing / 1)
    blind, told = StaleTest(held, 0.01), StaleTest(held, 0.01)
    blind.observe(Rounds(4000, int(cut.sum()), by_position), 1.0)
    told.observe(Rounds(4000, int(cut.sum()), by_position, lacking, float(missing)), 1.0)
    assert blind.is_stale
    assert not told.is_stale


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("positions", [True, False])
def test_one_draft_or_all_that_went_stale_late_are_found(seed: int, positions: bool) -> None:
    good, stale = measured_rates()
    held = [0.9 * rate for rate in good]
    test = StaleTest(held, 0.01)
    for rates, rounds, alarm in ((good, 10_000, False), (stale, 200, True)):
        traffic = Traffic(rates, seed, spread=0.0)
        for _ in range(0, rounds, 20):
            some = np.array(traffic.next(20))
            by_position = tuple(int((some > i).sum()) for i in range(4)) if positions else None
            test.observe(Rounds(20, int(some.sum()), by_position), 1.0)
        assert test.is_stale == alarm
    began, draft = test.strongest
    assert began >= 9_900
    assert 0 <= draft <= 4


def test_the_likeness_of_rounds_of_a_text_is_found() -> None:
    """Zero where rounds are independent, and where each text is all or nothing, one."""
    independent = Traffic([0.6, 0.6], 0, spread=0.0)
    texts = [independent.text() for _ in range(400)]
    histogram = np.bincount([n for text in texts for n in text], minlength=3)
    found = likeness([len(t) for t in texts], [sum(t) for t in texts], histogram.tolist())
    assert found == pytest.approx(0, abs=0.03)
    halves = [[2] * 10 if i % 2 else [0] * 10 for i in range(400)]
    assert likeness([10] * 400, [sum(t) for t in halves], [2000, 0, 2000]) == pytest.approx(
        1, abs=0.01
    )
    assert likeness([10] * 4, [5] * 4, [20, 20, 0]) == 1, "four texts tell nothing"


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("name", ["eval-64-newest", "eval-k", "eval-300", "quickstart"])
def test_texts_that_were_really_decoded_are_as_alike_as_the_test_takes_them(
    name: str, seed: int
) -> None:
    """Whole texts of a measured report, drawn with replacement for 10,000 rounds: no alarm."""
    report = read_report(ROOT / "docs" / "results" / f"{name}.json")
    head = next(r["head"] for r in report["results"] if r["head"])
    published = choose_published(report, head, 4)
    k = len(published.rates)
    columns = report["per_text_columns"]
    result = next(
        r for r in report["results"]
        if r["decoder"] == "exact" and r["num_assistant_tokens"] == k and "per_text" in r
    )  # fmt: skip
    texts = [[row[columns.index(n)] for n in ("rounds", "accepted")] for row in result["per_text"]]
    held = [0.9 * low for low in published.lower]
    test, generator, worst = StaleTest(held, 0.01), np.random.default_rng(seed), -np.inf
    while test.rounds < 10_000:
        rounds, accepted = texts[generator.integers(len(texts))]
        test.observe(Rounds(rounds, accepted), published.design_effect(None))
        worst = max(worst, test.evidence)
    assert worst < np.log(10), "a tenth of an alarm, and no more"
    assert published.design_effect(None) > 1.2


def test_rounds_of_a_text_are_not_taken_for_independent() -> None:
    """Where texts differ much, as much as in reports of Gemma 3 270M and more, taking each round by
    itself calls most good heads stale within 10,000 rounds, and the design effect none."""
    rates = [0.61, 0.61, 0.71, 0.74]
    sample = Traffic(rates, 99, rounds=27, spread=1.0)
    texts = [sample.text() for _ in range(2000)]
    drawn = np.array([n for text in texts for n in text])
    reached = [len(drawn), *(int((drawn > k).sum()) for k in range(4))]
    held = [0.9 * after / before for before, after in pairwise(reached)]
    alike = likeness(
        [len(t) for t in texts], [sum(t) for t in texts], np.bincount(drawn, minlength=5).tolist()
    )
    alarms = {1.0: 0, 1 + 26 * alike: 0}
    for seed, design_effect in product(range(10), alarms):
        traffic, test = Traffic(rates, seed, rounds=27, spread=1.0), StaleTest(held, 0.01)
        while test.rounds < 10_000 and not test.is_stale:
            some = np.array(traffic.next(50))
            by_position = tuple(int((some > k).sum()) for k in range(4))
            test.observe(Rounds(50, int(some.sum()), by_position), design_effect)
        alarms[design_effect] += test.is_stale
    naive, ours = alarms.values()
    assert naive >= 5
    assert ours == 0


def test_a_few_long_texts_among_short_ones_call_no_good_head_stale() -> None:
    """Most rounds are of long texts, whose ups and downs the mean length would not tell."""

    def texts(seed: int, count: int) -> list[list[int]]:
        generator = np.random.default_rng(seed)
        lengths = np.where(generator.random(count) < 0.1, 500, 20)
        rates = generator.beta(0.45 * 6, 0.55 * 6, count)
        pairs = zip(lengths, rates, strict=True)
        return [(generator.random(n) < p).astype(int).tolist() for n, p in pairs]

    report = texts(99, 1000)
    rounds, accepted = map(len, report), map(sum, report)
    drawn = np.bincount([n for text in report for n in text]).tolist()
    result = {
        "head": "h", "decoder": "exact", "temperature": 0.0, "num_assistant_tokens": 1,
        "per_text": list(zip(rounds, accepted, strict=True)), "accepted_histogram": drawn,
        "conditional_acceptance_rate": [0.45],
        "conditional_acceptance_rate_interval": [[0.45, 0.45]],
    }  # fmt: skip
    content = {"per_text_columns": ["rounds", "accepted"], "results": [result]}
    published = choose_published(content, "h", 1)
    assert published.unevenness > 3
    alarms = 0
    for seed in range(30):
        test = StaleTest([0.45], 0.01)
        for text in texts(seed, 200):
            seen = Rounds(len(text), sum(text), (sum(text),))
            test.observe(seen, published.design_effect(None))
        alarms += test.is_stale
    assert alarms == 0

"""What texts come to: sums, intervals, what was predicted, and the verdict in words."""

from dataclasses import replace
from typing import Any

import pytest

from headstart.eval.decoding import Decoded
from headstart.eval.draft_cost import Costs
from headstart.eval.figures import noise, summarize
from headstart.eval.measurements import Text
from headstart.eval.statistics import (
    ends_in_loop,
    interval,
    least_verification,
    resampled,
    verdict,
)


def test_a_text_that_ends_in_a_loop_is_told_from_one_that_does_not() -> None:
    assert ends_in_loop([1, 2, 3, 4, *[7, 8] * 4])
    assert ends_in_loop([5] * 8)
    assert not ends_in_loop([1, 2, 3, 4, 1, 2, 3, 4]), "a period of half the text is no loop yet"
    assert not ends_in_loop([*[7, 8] * 5, 1])
    assert not ends_in_loop([])


@pytest.mark.parametrize(
    ("interval", "says"),
    [((1.2, 1.6), "Use the exact decoder with K = 4"), ((0.9, 1.3), "Within the noise"),
     ((0.5, 0.8), "Decode plainly")],
)  # fmt: skip
def test_the_verdict_follows_from_the_interval(interval: tuple[float, float], says: str) -> None:
    result = {
        "decoder": "exact", "num_assistant_tokens": 4, "category": "all", "prompts": 9, "loops": 2,
        "head": "h", "temperature": 0, "looping_texts": "with",
        "speedup": sum(interval) / 2, "speedup_interval": list(interval),
    }  # fmt: skip
    slower = result | {"decoder": "transformers", "speedup": 0.1}
    straight = {"looping_texts": "without", "speedup": 0.77, "speedup_interval": [0.7, 0.8]}
    lookup = result | straight | {"decoder": "lookup", "head": None, "speedup": 0.9}
    text = verdict([slower, result, result | straight, lookup])
    assert text.startswith(says)
    assert "2 of the texts end in loops" in text
    straight_best = "prompt lookup, without a head, with K = 4, 0.90 (0.70 to 0.80)"
    assert f"without them the quickest is {straight_best}" in text


EXACT = {
    "decoder": "exact", "num_assistant_tokens": 4, "category": "all", "prompts": 9, "loops": 0,
    "head": "h", "temperature": 0.7, "looping_texts": "with",
    "speedup": 1.2, "speedup_interval": [1.1, 1.3],
}  # fmt: skip


def test_speeds_of_a_device_that_waits_for_python_are_called_host_bound() -> None:
    assert "host-bound: in a plain step the device worked 23%" in verdict([EXACT], 0.23)
    assert not verdict([EXACT | {"prompts": 4}]).startswith("Use"), "chance has no part in so few"
    assert verdict([EXACT], 0.9) == verdict([EXACT], None) == verdict([EXACT])


def test_a_baseline_slower_than_a_verification_is_said_to_be_slow() -> None:
    costs: dict[str, dict[str, dict[str, Any]]] = {
        "h": {"transformers": {"c": 0.1, "v": [1.0, 0.97, 1.2]}, "exact": {"c": 0.1, "v": [1.0]}}
    }
    assert least_verification({}) is None
    assert verdict([EXACT], None, least_verification(costs)) == verdict([EXACT])
    costs["h"]["exact"]["v"] = [1.0, 1.1, 0.76]
    found = verdict([EXACT], None, least_verification(costs))
    assert found.startswith(verdict([EXACT]))
    assert "not at this machine's best: verifying drafts took 0.76 of a plain step" in found


def test_a_decoder_that_changes_the_distribution_is_not_advised() -> None:
    stock = EXACT | {"decoder": "transformers", "speedup": 2.0, "speedup_interval": [1.9, 2.1]}
    text = verdict([stock, EXACT])
    assert "does not keep to the target's distribution" in text
    assert "Use the exact decoder" in text
    assert "Measure the exact decoder" in verdict([stock])
    greedy = [r | {"temperature": 0} for r in (stock, EXACT)]
    assert verdict(greedy).startswith("Use the stock decoder")


def decoded(rounds: list[tuple[int, int]], prompt_len: int, seconds: float) -> Decoded:
    """A text of these (proposed, accepted) rounds."""
    forwards, cached = [(0, prompt_len)], prompt_len
    for proposed, accepted in rounds:
        forwards.append((cached, proposed + 1))
        cached += accepted + 1
    tokens = list(range(cached - prompt_len + 1))
    drafts = [[0] * proposed for proposed, _ in rounds]
    return Decoded(tokens, seconds, 0.5, None, forwards, drafts)


def text(name: str, rounds: list[tuple[int, int]], plain: float, seconds: float) -> Text:
    assisted = decoded(rounds, 3, seconds)
    slow = decoded([(0, 0)] * (len(assisted.tokens) - 1), 3, plain)
    spans = ["prose" if i < 3 else "code" for i in range(len(assisted.tokens))]
    return Text(name, 0, "c", 3, slow, assisted, None, plain * 1.1, None, spans)


def test_the_figures_are_sums_over_texts_divided_once() -> None:
    """By hand: 3 and 2 rounds, 4 and 1 drafts accepted, the long text weighing more."""
    texts = [text("a", [(3, 3), (3, 1), (2, 0)], 8.0, 4.0), text("b", [(1, 1), (0, 0)], 4.0, 4.0)]
    found = summarize(texts, 3, Costs(0.1, [1.0, 1.2, 1.4, 1.5]))
    assert found["rounds"] == 5
    assert found["acceptance_length"] == 1 + 5 / 5
    assert found["new_tokens"] == (1 + 7) + (1 + 3)
    assert found["speedup"] == 12 / 8
    assert found["speedup_interval"] == pytest.approx((1.0, 2.0)), "one text alone, twice"
    assert found["time_to_first_token"] == 0.5
    costs = 2 * (0.3 + 1.5) + (0.2 + 1.4) + (0.1 + 1.2) + 1
    assert found["predicted_decode_speedup"] == pytest.approx(10 / costs)
    copied = replace(texts[0], assisted=replace(texts[0].assisted, looked_up=3))
    found = summarize([copied, *texts[1:]], 3, Costs(0.1, [1.0, 1.2, 1.4, 1.5]))
    assert found["predicted_decode_speedup"] == pytest.approx(10 / (costs - 3 * 0.1))
    assert found["decode_speedup"] == pytest.approx((12 - 1) / (8 - 1))
    assert found["accepted_histogram"] == [2, 2, 0, 1]
    assert found["by_position"] == [{"from": 0, "rounds": 5, "acceptance_length": 2.0}]
    again = noise(texts)
    assert again is not None
    assert again["speedup"] == pytest.approx(1 / 1.1)


def test_each_draft_belongs_to_the_span_where_it_stands_and_each_round_to_that_of_its_first() -> (
    None
):
    """By hand: the first three tokens are prose; the round from token 1 on drafts 1 to 3."""
    costs = Costs(0.1, [1.0, 1.2, 1.4, 1.5])
    texts = [text("a", [(3, 3), (3, 1)], 8.0, 4.0)]
    prose, code = (
        {name: value for name, value in span.items() if value is not None}
        for span in sorted(summarize(texts, 3, costs)["by_span"], key=lambda s: -s["tokens"])[::-1]
    )
    assert (prose["span"], prose["tokens"], prose["rounds"], prose["drafted"]) == ("prose", 3, 1, 2)
    assert (code["span"], code["tokens"], code["rounds"], code["drafted"]) == ("code", 4, 1, 4)
    assert (prose["reached"], prose["accepted"]) == ([1, 1, 0], [1, 1, 0])
    assert (code["reached"], code["accepted"]) == ([1, 1, 1], [1, 0, 1])
    assert (prose["acceptance_length"], code["acceptance_length"]) == (4.0, 2.0)
    assert prose["predicted_decode_speedup"] == pytest.approx(4 / 1.8)
    assert prose["saved_share"] == pytest.approx((4 - 1.8) / (6 - 3.6))
    assert code["saved_share"] == pytest.approx((2 - 1.8) / (6 - 3.6))


def test_rounds_are_grouped_by_context_and_speeds_by_prompt() -> None:
    long = replace(text("b", [(3, 0)], 6.0, 2.0), prompt_len=600)
    moved = [(0, 600), *((600 + cached - 3, n) for cached, n in long.assisted.forwards[1:])]
    long = replace(long, assisted=replace(long.assisted, forwards=moved))
    found = summarize([text("a", [(3, 3), (3, 1)], 8.0, 4.0), long], 3, None)["by_context"]
    assert [(c["from"], c["rounds"], c["texts"]) for c in found] == [(0, 2, 1), (512, 1, 1)]
    assert [c["acceptance_length"] for c in found] == [3.0, 1.0]
    assert [c["speedup"] for c in found] == [2.0, 3.0]


def test_a_round_beyond_the_measured_costs_goes_on_as_they_did_last() -> None:
    costs = Costs(0.1, [1.0, 1.2, 1.5])
    assert costs.of_round(2) == pytest.approx(1.7)
    assert costs.of_round(4) == pytest.approx(0.4 + 1.5 + 2 * 0.3)


def test_the_turns_of_a_prompt_are_drawn_together() -> None:
    """Twenty turns of one prompt are one draw: the interval is that of one prompt, no width."""
    seconds = [1.0 + i % 2 for i in range(20)]
    one, apart = ["a"] * 20, [str(i) for i in range(20)]
    assert interval(resampled(one, seconds) / resampled(one, [1] * 20)) == (1.5, 1.5)
    low, high = interval(resampled(apart, seconds) / resampled(apart, [1] * 20))
    assert 1.2 < low < 1.4 < 1.6 < high < 1.8

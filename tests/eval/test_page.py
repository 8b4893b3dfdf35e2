"""The page says what the report says, needs nothing but itself, and runs nothing of the prompts."""

import re
from functools import cache
from html import unescape
from html.parser import HTMLParser
from typing import Any

import pytest

from headstart.eval.page import cells, page
from headstart.eval.plots import COLORS, figures
from headstart.eval.statistics import OWN_LENGTH
from tests.helpers.reports import HOSTILE, one_result, report, usual

VOID = ("meta", "br", "hr", "img", "link", "input")


def panels(content: dict[str, Any], name: str, temperature: float | None = None) -> list[Any]:
    return list(figures(content, temperature)[name].axes)


@cache
def usual_page() -> str:
    return page(usual())


class Strict(HTMLParser):
    """Fails on a tag that is not closed, or closed out of turn; notes tags, ids and text."""

    def __init__(self, text: str):
        super().__init__()
        self.open: list[str] = []
        self.found: list[tuple[str, dict[str, str | None]]] = []
        self.marked: list[tuple[str, str]] = []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] in ("span", "del"):
            self.marked.append((self.open[-1], data))


def test_the_page_is_well_formed_and_needs_nothing_but_itself() -> None:
    text = usual_page()
    tags = Strict(text).found
    assert not {"script", "link", "img", "iframe"} & {tag for tag, _ in tags}
    assert "@import" not in text
    assert all(target.startswith("#") for target in re.findall(r"url\(([^)]*)\)", text))
    pointers = [a[key] or "" for _, a in tags for key in ("href", "src", "xlink:href") if key in a]
    ids = [attributes["id"] for _, attributes in tags if "id" in attributes]
    assert len(set(ids)) == len(ids) > 0
    pointers += re.findall(r"url\(([^)]*)\)", text)
    assert {pointer.removeprefix("#") for pointer in pointers} <= set(ids)
    assert page(usual()) == text


def test_prompts_and_names_stay_text_in_the_page() -> None:
    content = usual()
    for result in content["results"]:
        result["head"] = result["head"] and HOSTILE
    content["environment"]["target"] = content["environment"]["heads"][0] = HOSTILE
    text = page(content)
    assert "<script" not in text
    assert text.count("&lt;script&gt;") > 3
    Strict(text)


def test_every_result_is_in_the_tables_and_the_verdict_comes_first() -> None:
    content, text = usual(), usual_page()
    rows = [
        [unescape(cell) for cell in re.findall(r"<td[^>]*>(.*?)</td>", row)]
        for row in re.findall(r"<tr.*?</tr>", text)
    ]
    for result in content["results"]:
        assert cells(result) in rows
    body = text[text.index("<body") :]
    assert body.index(content["verdict"]) < min(body.index("Noise"), body.index("<svg"))
    assert ["2.50 GB"] in rows


def test_tokens_are_marked_by_kind_in_their_order() -> None:
    text = usual_page()
    shown = text[text.index("The end of the prompt") :]
    marks = re.findall(r'<(span|del) class="(\w+)">(.*?)</\1>', shown, flags=re.DOTALL)
    assert marks == [
        ("span", "bonus", "Yes"),
        ("span", "accepted", "&lt;b&gt;"),
        ("span", "accepted", "<i>\u21b5</i>\n"),
        ("del", "rejected", "No<i>\u21b5</i>"),
    ]


def test_the_speedup_figure_draws_the_numbers() -> None:
    content = usual()
    axes = panels(content, "speedup")[0]
    lines = {line.get_label(): line for line in axes.lines}
    whole = [r for r in content["results"] if r["category"] == "all"]
    whole = [r for r in whole if r["looping_texts"] == "with"]
    ticks = [label.get_text() for label in axes.get_xticklabels()]
    assert ticks == ["K = 2", "K = 4", "cost"]
    for decoder in ("transformers", "exact", "cost", "lookup"):
        own = [r for r in whole if r["decoder"] == decoder]
        assert list(lines[decoder].get_ydata()) == [r["speedup"] for r in own]
        places = [
            ticks.index(decoder if decoder in OWN_LENGTH else f"K = {r['num_assistant_tokens']}")
            for r in own
        ]
        assert list(lines[decoder].get_xdata()) == pytest.approx(places, abs=0.3)
    assert list(lines["plain decoding"].get_ydata()) == [1, 1]
    hollow = [line for line in axes.lines if line.get_markerfacecolor() == "none"]
    predicted = [p for line in hollow for p in line.get_ydata()]
    wanted = [r["predicted_decode_speedup"] for r in whole if r["decoder"] != "lookup"]
    assert sorted(predicted) == sorted(wanted)
    bars = [[y for _, y in path] for c in axes.collections for path in c.get_segments()]
    assert sorted(bars) == sorted(r["speedup_interval"] for r in whole)
    (band,) = axes.patches
    assert [band.get_y(), band.get_y() + band.get_height()] == pytest.approx([0.97, 1.04])


def test_the_histograms_are_shares_of_the_rounds() -> None:
    found = panels(usual(), "accepted")
    assert [axes.get_title() for axes in found] == [
        "transformers, K = 4", "exact, K = 4", "cost", "lookup, K = 2",
    ]  # fmt: skip
    for axes, k in zip(found, (4, 4, 8, 2), strict=True):
        assert [bar.get_height() for bar in axes.patches] == [0.5, 0.5, *[0.0] * (k - 1)]


def test_the_time_of_a_token_is_told_apart_where_it_is_known() -> None:
    axes = panels(usual(), "time")[0]
    rows = [label.get_text() for label in axes.get_yticklabels()]
    parts = {
        bars.get_label(): dict(zip(rows, [bar.get_width() for bar in bars], strict=True))
        for bars in axes.containers
    }
    total = 1000 / 11.4
    assert {name: widths["exact, K = 4"] for name, widths in parts.items()} == pytest.approx({
        "prefill": 25,
        "drafting": total / 4,
        "verifying, or plain steps": total * 3 / 4 - 25,
        "drafting and verifying, not told apart": 0,
    })  # fmt: skip
    assert parts["drafting and verifying, not told apart"]["cost"] == pytest.approx(1000 / 13 - 25)
    assert parts["prefill"]["plain decoding"] == pytest.approx(20)


def test_only_drafts_that_were_reached_have_an_acceptance() -> None:
    for axes in panels(usual(), "acceptance"):
        for line in axes.lines:
            assert list(line.get_ydata()) == [0.5, 0.0]


@pytest.mark.parametrize("decoder", ["lookup", "exact", "cost"])
def test_the_least_content_has_a_page(decoder: str) -> None:
    few = {"prompts": 1, "texts": 1, "by_position": [], "speedup_interval": [1.0, 1.0]}
    # The value lies outside its interval, as it may where one is resampled.
    content = report([one_result(decoder, 1, 1.2, **few)], noise=None, costs={})
    assert set(figures(content)) == {"speedup", "acceptance", "accepted", "time"}
    Strict(page(content))
    never = {"rounds": 0, "reached": [0], "accepted_histogram": [0], "drafting_share": None}
    never |= {"baseline_decode_tokens_per_second": None}
    assert set(figures(report([one_result(decoder, 1, 1.2, **few | never)]))) == {"speedup", "time"}


def test_many_sides_and_temperatures_are_all_drawn_apart() -> None:
    results = [
        one_result(decoder, k, 1 + k / 10, head=head, temperature=t)
        for t in (0.0, 0.7)
        for head in ("a", "b")
        for decoder in COLORS
        for k in [8 if decoder in OWN_LENGTH else 2]
    ]
    content = report(results)
    text = page(content)
    ids = [attributes["id"] for _, attributes in Strict(text).found if "id" in attributes]
    assert len(set(ids)) == len(ids)
    assert text.count("<figure>") == 10
    assert len(panels(content, "accepted", 0.7)) == 8

"""A server that is watched while it serves: acceptance since its start and lately, beside the
report that its head was published with, and whether the head is stale (`headstart watch`)."""

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.table import Column, Table

from headstart.common.console import one_line, plain_console, print_once, progress_bar
from headstart.common.files import write_figures
from headstart.common.signals import Ended
from headstart.configs.settings import ServerConfig, WatchConfig
from headstart.serve.metrics import MetricsPage, Reading, rounds_between
from headstart.serve.published import Published, choose_published, published_report
from headstart.serve.staleness import Rounds, StaleTest

SCHEMA = 1  # of the figures; it rises when a key changes
LATELY = 500  # rounds
TEXTS = 5  # finished ones, from which on their length is the server's own


@dataclass
class Watched:
    """What was seen of a server so far.

    Args:
        report: content of the head's report.json, and its name; None: nothing to compare with.
        chosen: margin and false alarms.
    """

    report: tuple[dict[str, Any], str] | None
    chosen: WatchConfig
    published: Published | None = None
    """From the first draft on, which tells K."""
    test: StaleTest | None = None
    newest: Reading | None = None
    rounds = 0
    """Since the watch began."""
    restarts = 0
    stale: dict[str, Any] | None = None
    """What made the test end, once it has."""

    def __post_init__(self) -> None:
        self._lately: list[Rounds] = []
        self._before: Reading | None = None  # up to which all is in the test
        self.k = 0

    def take(self, reading: Reading) -> None:
        """Take in a reading of the server."""
        first = self.newest is None
        if self.newest is not None and not reading.follows(self.newest):
            self.restarts += 1
            print_once("The server was started again: its counters began anew")
            self._before = None
            if self.test is not None:
                self.test.restart()
        self.newest = reading
        if not reading.rounds:
            return
        if not self.k:
            self._begin(reading)
        if reading.k is not None and reading.k < self.k:
            raise ValueError(
                f"the server drafts {reading.k} tokens now and drafted {self.k} or more before: "
                "watch it anew"
            )
        seen = rounds_between(reading, self._before, self.k)
        # Counters are read one after another, while the server goes on.
        if not seen.is_possible or not seen.rounds:
            return
        self._before = reading
        if not first:
            self.rounds += seen.rounds
        if not first or seen.rounds <= LATELY:  # else it is of long before the watch
            self._lately.append(seen)
        while sum(s.rounds for s in self._lately[1:]) >= LATELY:
            del self._lately[0]
        if self.test is not None and self.stale is None:
            self.test.observe(seen, self.design_effect)
            if self.test.is_stale:
                self.stale = self._alarm()

    def _begin(self, reading: Reading) -> None:
        """K is known: find what the head is held to."""
        if self.report is None:
            self.k = reading.k or 1
            return
        chosen = self.chosen
        published = choose_published(*self.report, reading.k, chosen.head, chosen.temperature)
        there = len(published.rates)
        if reading.by_position is None and reading.k is not None and reading.k > there:
            raise ValueError(
                f"{reading.engine} tells nothing by position, and drafts {reading.k} tokens where "
                f"the report has {there} at most: measure the head with "
                f"eval.num_assistant_tokens={reading.k}"
            )
        self.k = min(reading.k or there, there)
        if reading.k not in (None, there):
            print_once(
                f"The server drafts {reading.k} tokens, the report's {there}: drafts 1 to {self.k} "
                "are compared"
            )
        self.published = published.up_to(self.k)
        if published.greedy and chosen.temperature is None:
            print_once(
                "The report is of greedy texts. A good head is accepted less where the server "
                "samples: measure it with eval.temperatures=model for such a server, or say "
                "watch.temperature=0"
            )
        held = [(1 - self.chosen.margin) * low for low in self.published.lower]
        self.test = StaleTest(held, self.chosen.false_alarms)
        print_once(
            f"Compared with {one_line(published.name)}. Rounds of one text are alike: "
            f"{self.design_effect:.1f} count as one. Half of that acceptance would be told after "
            f"about {self.test.rounds_to_tell(0.5, self.design_effect):,} rounds"
        )

    @property
    def design_effect(self) -> float:
        """Rounds that count as one, by the report's texts and the length of the server's."""
        assert self.published is not None
        assert self.newest is not None
        texts = self.newest.texts
        length = self.newest.rounds / texts if texts is not None and texts >= TEXTS else None
        return max(1.0, self.published.design_effect(length))

    def _alarm(self) -> dict[str, Any]:
        assert self.test is not None
        began, draft = self.test.strongest
        return {"rounds": self.test.rounds, "since_round": began, "draft": draft or None}

    def since_start(self) -> Rounds:
        """All of the server's rounds since its start."""
        if self.newest is None or not self.newest.rounds:
            return Rounds(0, 0)
        return rounds_between(self.newest, None, self.k)

    def lately(self) -> Rounds:
        """The newest `LATELY` rounds, and as many as came with them; of those before the watch only
        where they are no more."""
        if not self._lately:
            return Rounds(0, 0)
        found = self._lately[0]
        for seen in self._lately[1:]:
            found = found + seen
        return found

    def status(self) -> str:
        """How it is, in a few words."""
        seen, when = self.lately(), "lately"
        if not seen.rounds:
            seen, when = self.since_start(), "since its start"
        if not seen.rounds:
            return "no drafts yet"
        said = f"{seen.acceptance_length:.2f} tokens a round {when}"
        if self.published is not None and self.test is not None:
            most = 1 / self.chosen.false_alarms
            said += (
                f", published {published_length(self.published):.2f}; evidence against the head "
                f"{_money(self.test.evidence_factor)} of {_money(most)}"
            )
        return said

    def content(self) -> dict[str, Any]:
        """All figures."""
        published = self.published
        return {
            "schema": SCHEMA,
            "engine": None if self.newest is None else self.newest.engine,
            "num_assistant_tokens": None if self.newest is None else self.newest.k,
            "rounds": self.rounds,
            "restarts": self.restarts,
            "since_start": _figures(self.since_start()),
            "lately": _figures(self.lately()),
            "published": None
            if published is None
            else {
                "name": published.name,
                "acceptance_length": published_length(published),
                "cumulative_acceptance_rate": published_by_position(published),
            },
            "margin": self.chosen.margin,
            "false_alarms": self.chosen.false_alarms,
            "design_effect": None if published is None else self.design_effect,
            "evidence": None if self.test is None else self.test.evidence_factor,
            "stale": None if self.test is None else self.stale is not None,
            "alarm": self.stale,
        }


def published_by_position(published: Published) -> list[float]:
    """[K] share of rounds that accepted draft k, where all drafts were proposed."""
    found = [1.0]
    for rate in published.rates:
        found.append(found[-1] * rate)
    return found[1:]


def published_length(published: Published) -> float:
    """Acceptance length by the rates, where all drafts were proposed."""
    return 1 + sum(published_by_position(published))


def _figures(seen: Rounds) -> dict[str, Any] | None:
    if not seen.rounds:
        return None
    return {
        "rounds": seen.rounds,
        "acceptance_length": seen.acceptance_length,
        "cumulative_acceptance_rate": seen.acceptance_by_position,
    }


def watch(
    server: ServerConfig, head: str | None, chosen: WatchConfig, out: Path | None = None
) -> dict[str, Any]:
    """Read a server's metrics until the head is stale, the limits are reached or somebody stops it.

    Args:
        server: with its address.
        head: whose report it is held to, as `published_report` takes it; None: none.
        chosen: how often, how long, and when to call it stale.
        out: JSON file for all figures, however the watch ends; None: no file.

    Returns:
        All figures; `stale` tells whether the head is, None where no report was named.

    Raises:
        ValueError: the server has no metrics of drafts, or the report cannot be compared with it.
        Ended: (after the summary) the process was asked to end.
    """
    report = None if head is None else (published_report(head), head)
    page, watched = MetricsPage(server), Watched(report, chosen)
    start, ended = time.monotonic(), None
    try:
        watched.take(_first(page))
        with progress_bar() as bar:
            task = bar.add_task(
                "Watching (rounds)", total=chosen.rounds, completed=0, status=watched.status()
            )
            while watched.stale is None and (left := _left(watched, chosen, start)) > 0:
                time.sleep(min(left, chosen.interval))
                take_next(page, watched)
                bar.update(task, completed=watched.rounds, status=watched.status())
    except KeyboardInterrupt as stop:
        ended = stop
    content = {
        "url": page.url, "model": page.model, "seconds": time.monotonic() - start,
        **watched.content(),
    }  # fmt: skip
    print_watch(content)
    write_figures(content, out)
    if isinstance(ended, Ended):
        raise ended
    return content


def _first(page: MetricsPage) -> Reading:
    try:
        return page.read()
    except ConnectionError as error:
        raise ValueError(str(error)) from error


def _left(watched: Watched, chosen: WatchConfig, start: float) -> float:
    """Seconds until the end by the limits, as far as they tell."""
    if chosen.rounds is not None and watched.rounds >= chosen.rounds:
        return 0.0
    if chosen.seconds is None:
        return float("inf")
    return chosen.seconds - (time.monotonic() - start)


def take_next(page: MetricsPage, watched: Watched) -> None:
    """One more reading. A server that does not answer may be about to come back."""
    try:
        reading = page.read()
    except ConnectionError as error:
        print_once(f"{error}; asked again in {watched.chosen.interval:g} seconds")
        return
    watched.take(reading)


def print_watch(content: dict[str, Any]) -> None:
    """The table and the verdict, for a terminal."""
    k = content["num_assistant_tokens"]
    table = Table(
        "", *(Column(name, justify="right") for name in
              ("rounds", "acceptance length", "accepted at draft 1 ..")),
        title=one_line(
            f"{content['engine']} at {content['url']}" + (f", K = {k}" if k is not None else "")
        ),
    )  # fmt: skip
    published = content["published"]
    rows = {"the report": published, "since the start": content["since_start"]}
    rows["lately"] = lately = content["lately"]
    for label, row in rows.items():
        if row is not None:
            rounds = f"{row['rounds']:,}" if "rounds" in row else ""
            table.add_row(label, rounds, *_cells(row, "{:.2f}"))
    label = "since the start" if lately is None else "lately"
    if published is not None and (newest := rows[label]) is not None:
        change = _cells(_change(published, newest), "{:+.2f}")
        table.add_row(f"{label} - the report", "", *change)
    plain_console().print(table)
    print_once(verdict(content))


def _change(before: dict[str, Any], after: dict[str, Any]) -> dict[str, Any]:
    by = after["cumulative_acceptance_rate"]
    return {
        "acceptance_length": after["acceptance_length"] - before["acceptance_length"],
        "cumulative_acceptance_rate": by
        and [a - b for a, b in zip(by, before["cumulative_acceptance_rate"], strict=True)],
    }


def _cells(row: dict[str, Any], shape: str) -> tuple[str, str]:
    by_position = row["cumulative_acceptance_rate"] or []
    return shape.format(row["acceptance_length"]), " ".join(map(shape.format, by_position))


def verdict(content: dict[str, Any]) -> str:
    """Whether the head is stale, in a sentence or two."""
    if content["since_start"] is None:
        return "The server has drafted nothing yet: there is nothing to judge"
    if content["stale"] is None:
        return "No head or report was named, so that these figures are compared with none"
    most, margin = 1 / content["false_alarms"], content["margin"]
    bound = (
        f"A head that accepts at each draft {1 - margin:.0%} of what the report is sure of, or "
        f"more, is called stale with a chance of {content['false_alarms']:.2g} at most, however "
        "long it is watched"
    )
    if not content["stale"]:
        return (
            f"Not stale: the evidence is {_money(content['evidence'])} of {_money(most)}. {bound}"
        )
    alarm = content["alarm"]
    where = "over all drafts" if alarm["draft"] is None else f"at draft {alarm['draft']}"
    return (
        f"Stale: after {alarm['rounds']:,} rounds the evidence is {_money(content['evidence'])} of "
        f"{_money(most)}, most of it {where} from round {alarm['since_round']:,} on. {bound}. The "
        "next step is headstart adapt"
    )


def _money(evidence: float) -> str:
    """To two figures."""
    return f"{evidence:,.0f}" if 10 <= evidence < 1e6 else f"{evidence:.2g}"

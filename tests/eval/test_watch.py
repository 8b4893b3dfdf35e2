"""`headstart watch` against real HTTP servers that count rounds as engines do.

Rounds are drawn from acceptance that was measured (docs/results). In reality rounds of one text are
alike, and so they are here: each text has its own rates, in the report and on the server; what the
test counts as one round follows from the report's texts.
"""

import signal
import threading
from pathlib import Path
from typing import Any

import huggingface_hub.constants
import pytest
from prometheus_client import CollectorRegistry, Counter, Gauge, generate_latest

from headstart.cli.main import main
from headstart.configs.settings import ServerConfig, WatchConfig
from headstart.serve.metrics import MetricsPage, Reading, reading_of, rounds_between
from headstart.serve.published import choose_published, published_report
from headstart.serve.watch import Watched, take_next
from tests.helpers.hub import Hub, Repository
from tests.helpers.metrics import (
    Traffic,
    VllmCounters,
    measured_rates,
    metrics_server,
    run_json,
    write_report,
)
from tests.helpers.servers import stranger

A_READING = 20  # rounds between two of them
QUICK = "watch.interval=0.001"


class Server:
    """Serves some rounds between one reading and the next, and counts them as vLLM does."""

    def __init__(self, traffic: Traffic, engines: int = 1):
        self.traffic, self.engines = traffic, engines
        self.counters = VllmCounters(len(traffic.rates), engines=engines)
        self.served = 0
        """Rounds, over all starts."""

    def swap(self, traffic: Traffic, restart: bool) -> None:
        """Another head."""
        self.traffic = traffic
        if restart:
            self.counters = VllmCounters(len(traffic.rates), engines=self.engines)

    def metrics(self) -> str:
        before = self.traffic.finished
        self.counters.count(self.traffic.next(A_READING), 0)
        self.counters.count([], self.traffic.finished - before)
        self.served += A_READING
        return self.counters.text()


@pytest.fixture
def figures(tmp_path: Path) -> Path:
    return tmp_path / "watch.json"


def watch(url: str, report: Path | None, figures: Path, *more: str) -> int:
    head = [] if report is None else [str(report)]
    return main(["watch", url, *head, QUICK, *more, "--json", str(figures)])


@pytest.mark.parametrize("seed", [0, 1])
def test_a_good_head_is_not_called_stale_in_10000_rounds(
    seed: int, tmp_path: Path, figures: Path
) -> None:
    good, _ = measured_rates()
    report = write_report(Traffic(good, 100 + seed), tmp_path / "report")
    server = Server(Traffic(good, seed), engines=2)
    with metrics_server(server.metrics) as url:
        assert watch(url, report, figures, "watch.rounds=10000") == 0
    content = run_json(figures)
    assert content["rounds"] >= 10_000
    assert content["stale"] is False
    assert content["design_effect"] > 1.5, "texts that are not alike would prove nothing"
    assert content["lately"]["rounds"] >= 500
    assert content["since_start"]["acceptance_length"] == pytest.approx(
        content["published"]["acceptance_length"], rel=0.15
    )


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize(("after", "restart"), [(0, False), (10_000, False), (10_000, True)])
def test_a_head_that_was_swapped_for_a_stale_one_is_reported_within_200_rounds(
    seed: int, after: int, restart: bool, tmp_path: Path, figures: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    good, stale = measured_rates()
    report = write_report(Traffic(good, 100 + seed), tmp_path / "report")
    server = Server(Traffic(good, seed))

    def metrics() -> str:
        if server.served == after:
            server.swap(Traffic(stale, 10 + seed), restart)
        return server.metrics()

    with metrics_server(metrics) as url:
        assert watch(url, report, figures, f"watch.rounds={after + 400}") == 3
    content = run_json(figures)
    assert content["stale"] is True
    assert after < content["alarm"]["rounds"] <= after + 200
    assert content["alarm"]["since_round"] >= max(0, after - 100)
    assert content["restarts"] == int(restart)
    printed = capsys.readouterr().out
    assert "Stale: after" in printed
    assert ("started again" in printed) == restart


def test_one_reading_judges_all_rounds_since_the_servers_start(
    tmp_path: Path, figures: Path
) -> None:
    """As cron would have it: `watch.seconds=0`."""
    good, stale = measured_rates()
    report = write_report(Traffic(good, 2), tmp_path / "report")
    for rates, code in ((good, 0), (stale, 3)):
        server = Server(Traffic(rates, 3))
        server.counters.count(server.traffic.next(400), 25)
        with metrics_server(server.metrics) as url:
            assert watch(url, report, figures, "watch.seconds=0") == code
        assert run_json(figures)["since_start"]["rounds"] == 400 + A_READING


def test_without_a_report_the_figures_are_shown_and_nothing_is_judged(
    figures: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    server = Server(Traffic([0.5, 0.5], 0))
    with metrics_server(server.metrics) as url:
        assert watch(url, None, figures, "watch.rounds=60") == 0
    content = run_json(figures)
    assert content["stale"] is None
    assert content["num_assistant_tokens"] == 2
    assert "compared with none" in capsys.readouterr().out


def test_another_k_than_the_reports_is_compared_where_both_have_drafts(
    tmp_path: Path, figures: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    good, _ = measured_rates()
    report = write_report(Traffic(good, 1), tmp_path / "report")
    for k in (2, 6):
        rates = (good + good)[:k]
        with metrics_server(Server(Traffic(rates, 0)).metrics) as url:
            assert watch(url, report, figures, "watch.rounds=100") == 0
        shared = min(k, 4)
        assert f"drafts {k} tokens, the report's 4: drafts 1 to {shared}" in capsys.readouterr().out
        content = run_json(figures)
        assert len(content["published"]["cumulative_acceptance_rate"]) == shared
        assert len(content["lately"]["cumulative_acceptance_rate"]) == shared


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_watch_that_is_ended_leaves_a_summary_and_its_figures(
    number: signal.Signals, tmp_path: Path, figures: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    good, _ = measured_rates()
    report = write_report(Traffic(good, 1), tmp_path / "report")
    server, readings = Server(Traffic(good, 0)), iter(range(10**6))

    def metrics() -> str:
        if next(readings) == 3:
            signal.pthread_kill(threading.main_thread().ident or 0, number)
        return server.metrics()

    # A background process has the signal ignored.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with metrics_server(metrics) as url:
            code = watch(url, report, figures, "watch.seconds=60")
            assert code == (0 if number == signal.SIGINT else 128 + number)
    finally:
        signal.signal(signal.SIGINT, before)
    assert next(readings) < 1000, "the time ended it"
    assert "Not stale" in capsys.readouterr().out
    assert run_json(figures)["since_start"]["rounds"] > 0


def test_a_server_that_is_away_is_waited_for_but_in_the_beginning(
    figures: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    server = Server(Traffic([0.5, 0.5], 0))
    with metrics_server(server.metrics) as url:
        page = MetricsPage(ServerConfig(url=url))
        watched = Watched(None, WatchConfig())
        watched.take(page.read())
    take_next(page, watched)
    assert "no server answers" in capsys.readouterr().out
    assert watched.newest is not None
    assert watched.newest.rounds == A_READING
    assert watch(url, None, figures) == 1
    assert "no server answers" in capsys.readouterr().err


# What engines say


SGLANG = """\
# HELP sglang:num_requests_total Number of requests processed.
# TYPE sglang:num_requests_total counter
sglang:num_requests_total{model_name="gemma"} 10.0
# HELP sglang:generation_tokens_total Number of generation tokens processed.
# TYPE sglang:generation_tokens_total counter
sglang:generation_tokens_total{model_name="gemma",is_streaming="false"} 500.0
sglang:generation_tokens_total{model_name="gemma",is_streaming="true"} 140.0
# HELP sglang:spec_verify_calls_total Number of speculative decoding verification calls.
# TYPE sglang:spec_verify_calls_total counter
sglang:spec_verify_calls_total{model_name="gemma"} 210.0
# HELP sglang:spec_num_draft_tokens Number of draft tokens.
# TYPE sglang:spec_num_draft_tokens gauge
sglang:spec_num_draft_tokens{model_name="gemma",tp_rank="0"} 5.0
"""
LLAMACPP = """\
# HELP llamacpp:tokens_predicted_total Number of generation tokens processed.
# TYPE llamacpp:tokens_predicted_total counter
llamacpp:tokens_predicted_total 64
# HELP llamacpp:spec_decode_num_draft_tokens_total Total draft tokens
# TYPE llamacpp:spec_decode_num_draft_tokens_total counter
llamacpp:spec_decode_num_draft_tokens_total 77
# HELP llamacpp:spec_decode_num_drafts_total Verification steps
# TYPE llamacpp:spec_decode_num_drafts_total counter
llamacpp:spec_decode_num_drafts_total 20
# HELP llamacpp:spec_decode_num_accepted_tokens_per_pos_total Accepted tokens per draft position
# TYPE llamacpp:spec_decode_num_accepted_tokens_per_pos_total counter
llamacpp:spec_decode_num_accepted_tokens_per_pos_total{position="0"} 17
llamacpp:spec_decode_num_accepted_tokens_per_pos_total{position="1"} 12
llamacpp:spec_decode_num_accepted_tokens_per_pos_total{position="2"} 9
llamacpp:spec_decode_num_accepted_tokens_per_pos_total{position="3"} 6
"""


def test_what_sglang_counts_adds_up_to_acceptance() -> None:
    """10 texts: 640 tokens are 10 of prefills and 210 rounds with 420 drafts accepted."""
    reading = reading_of(SGLANG)
    assert (reading.rounds, reading.accepted, reading.by_position, reading.k) == (210, 420, None, 4)
    seen = rounds_between(reading, None, 4)
    assert seen.acceptance_length == 3.0
    assert seen.uncounted == 40, "as many as the last rounds of the texts may have brought beside"


def test_what_llama_cpp_counts_is_read_with_the_drafts_that_were_not_proposed() -> None:
    reading = reading_of(LLAMACPP)
    assert (reading.engine, reading.k) == ("llama.cpp", 4)
    seen = rounds_between(reading, None, 4)
    assert seen.by_position == (17, 12, 9, 6)
    assert seen.lacking == (0.0, 1.0, 1.5, 3.0)
    assert seen.uncounted == 3


def test_engines_of_one_server_are_added_up() -> None:
    counters = VllmCounters(2, engines=3)
    counters.count([2, 1, 0, 2, 2, 0, 1], 4)
    reading = reading_of(counters.text())
    assert (reading.rounds, reading.by_position, reading.texts) == (7, (5, 3), 4)
    assert reading.drafted == 14
    assert reading.started is not None


def test_a_server_that_was_started_again_is_told_by_its_counters_or_by_its_start() -> None:
    before = Reading("vLLM", 100, 80, 200, (50, 30), 2, started=1.0)
    more = Reading("vLLM", 120, 100, 240, (60, 40), 2, started=1.0)
    assert more.follows(before)
    assert not before.follows(more)
    assert not Reading("vLLM", 120, 100, 240, (60, 40), 2, started=2.0).follows(before)
    fewer = Reading("llama.cpp", 120, 100, 240, (40, 40), 2)
    assert not fewer.follows(Reading("llama.cpp", 100, 80, 200, (50, 30), 2))


def vllm(**more: float) -> str:
    registry = CollectorRegistry()
    for name, value in more.items():
        Gauge(f"vllm:{name}", "x", registry=registry).set(value)
    return generate_latest(registry).decode()


def two_models() -> str:
    registry = CollectorRegistry()
    counter = Counter("vllm:spec_decode_num_drafts", "x", ["model_name"], registry=registry)
    for name in ("gemma", "other"):
        counter.labels(model_name=name).inc()
    return generate_latest(registry).decode()


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("<html><body>hello</body></html>", "Prometheus"),
        ("", "no metrics of vLLM, SGLang or llama.cpp"),
        ("python_info 1\n", "no metrics of vLLM, SGLang or llama.cpp"),
        (vllm(num_requests_running=1.0), "without speculative decoding"),
        (two_models(), "serves gemma, other: name one, server.model=NAME"),
        ("llamacpp:tokens_predicted_total 5\n", "counts no drafts"),
        (
            "llamacpp:tokens_predicted_total 500\nllamacpp:spec_decode_num_drafts_total 0\n",
            "500 tokens without a draft",
        ),
        (
            "sglang:generation_tokens_total 500\nsglang:num_requests_total 3\n",
            "verified no drafts",
        ),
        (LLAMACPP.replace('"1"} 12', '"1"} 18'), "contradict"),
        (LLAMACPP.replace('position="2"', 'position="7"'), "positions"),
        (LLAMACPP.replace('position="2"', 'place="2"'), "positions"),
        ("llamacpp:spec_decode_num_drafts_total 5\n", "nothing by position"),
        (LLAMACPP.replace('"1"} 12', '"1"} +Inf'), "no count"),
        (LLAMACPP.replace("drafts_total 20", "drafts_total NaN"), "no count"),
    ],
)
def test_metrics_that_tell_nothing_of_drafts_are_refused_in_one_line(text: str, said: str) -> None:
    with pytest.raises(ValueError, match=said) as error:
        reading_of(text)
    assert len(str(error.value)) < 300
    assert str(error.value).isprintable()


@pytest.mark.parametrize(
    ("status", "said"),
    [
        (404, "--enable-metrics"),
        (501, "--metrics"),
        (401, "HEADSTART_SERVER_API_KEY"),
        (503, "is not ready"),
    ],
)
def test_a_server_without_metrics_is_refused_with_what_to_do(
    status: int, said: str, figures: Path, capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.delenv("HEADSTART_SERVER_API_KEY", raising=False)
    with metrics_server(lambda: "", status) as url:
        assert watch(url, None, figures) == 1
    assert said in capsys.readouterr().err


def test_the_key_goes_to_the_server_alone(
    figures: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HEADSTART_SERVER_API_KEY", "secret-key")
    with stranger() as there, stranger() as elsewhere:
        there.redirect = elsewhere.url
        assert watch(there.url, None, figures) == 1
        assert "Bearer secret-key" in there.heard
        assert elsewhere.headers == []
    printed = capsys.readouterr()
    assert "redirects" in printed.err
    assert "secret-key" not in printed.err + printed.out
    assert watch("http://me:secret-key@127.0.0.1:1", None, figures) == 1
    assert "secret-key" not in capsys.readouterr().err


def test_metrics_without_end_are_broken_off(
    figures: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("headstart.serve.metrics.LONGEST", 2**20)
    with metrics_server(lambda: "# HELP a b\n" * 2**20) as url:
        assert watch(url, None, figures) == 1
    assert "does not end" in capsys.readouterr().err


@pytest.mark.parametrize("address", ["localhost:8000", "ftp://localhost", "http://", "runs/mine"])
def test_an_address_that_is_none_is_refused(
    address: str, figures: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert watch(address, None, figures) == 1
    assert "is no address of a server" in capsys.readouterr().err


# Reports


@pytest.fixture
def report(tmp_path: Path) -> Path:
    return write_report(Traffic([0.5, 0.5], 0), tmp_path / "runs" / "mine" / "eval")


def test_the_report_is_found_from_its_run_and_from_its_head(report: Path) -> None:
    run = report.parent
    (run / "head").mkdir()
    for named in (report / "report.json", report, run, run / "head"):
        assert published_report(str(named))["results"]
    published = run.parent / "published"
    write_report(Traffic([0.5, 0.5], 0), published / "evaluation")
    assert published_report(str(published))["results"]
    # Of an adaptation, whose run lies within; another run's neighbor is none.
    (run / "run" / "head").mkdir(parents=True)
    assert published_report(str(run / "run" / "head"))["results"]
    (run / "other" / "head").mkdir(parents=True)
    (run.parent / "empty").mkdir()
    for wrong in (run.parent / "empty", "no-such-thing", run / "other" / "head"):
        with pytest.raises(ValueError, match=r"no report\.json|is no file"):
            published_report(str(wrong))


def test_the_report_of_a_published_head_is_read_from_the_hub(
    hub: Hub, report: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    files = {"evaluation/report.json": (report / "report.json").read_bytes()}
    hub.repositories["org/mine"] = Repository("public", revisions={"main": files, "bare": {}})
    for name in ("org/mine", "org/mine@main"):
        assert published_report(name)["results"]
    for name in ("org/mine@bare", "org/other"):
        with pytest.raises(ValueError, match=r"on the Hub has no evaluation/report\.json") as error:
            published_report(name)
        assert "\n" not in str(error.value)


def test_the_variant_that_is_compared_drafts_as_the_server_does() -> None:
    base = {
        "head": "h", "decoder": "exact", "temperature": 0.0, "per_text": [[4, 2]] * 6,
        "accepted_histogram": [3, 1], "conditional_acceptance_rate": [0.5],
        "conditional_acceptance_rate_interval": [[0.4, 0.6]],
    }  # fmt: skip

    def result(k: int, **more: Any) -> dict[str, Any]:
        return base | {"num_assistant_tokens": k} | more

    results = [
        result(2), result(4), result(4, decoder="transformers"), result(8),
        result(4, decoder="cost"), result(4, head=None, decoder="lookup"),
    ]  # fmt: skip
    report = {"per_text_columns": ["rounds", "accepted"], "results": results}
    chosen = {k: choose_published(report, "x", k).name for k in (1, 2, 3, 4, 5, 8, 9, None)}
    wanted = {1: 2, 2: 2, 3: 4, 4: 4, 5: 8, 8: 8, 9: 8, None: 8}
    assert chosen == {k: f"h, exact, K = {drafts}" for k, drafts in wanted.items()}
    sampled = report | {"results": [*results, result(4, temperature=1.0)]}
    warm, cold = (choose_published(sampled, "x", 4, temperature=t) for t in (None, 0.0))
    assert (warm.greedy, cold.greedy) == (False, True)
    with pytest.raises(ValueError, match=r"watch\.temperature=0\.7 is not in the report"):
        choose_published(sampled, "x", 4, temperature=0.7)
    several = report | {"results": [result(2), result(2, head="other")]}
    with pytest.raises(ValueError, match=r"h, other: name one with watch\.head"):
        choose_published(several, "x", 2)
    assert choose_published(several, "other", 2).name.startswith("other")
    assert choose_published(several, "x", 2, head="other").name.startswith("other")
    with pytest.raises(ValueError, match=r"watch\.head=mine is not in the report"):
        choose_published(several, "x", 2, head="mine")
    with pytest.raises(ValueError, match=r"eval\.decoders=exact"):
        choose_published(report | {"results": [result(2, decoder="cost")]}, "x", 2)

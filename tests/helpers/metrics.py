"""A server's `/metrics` over rounds that are drawn, and the report of a head that drafts so."""

import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from typing import Any

import numpy as np
from prometheus_client import CollectorRegistry, Counter, generate_latest

from headstart.eval.acceptance import AcceptanceCounts
from headstart.eval.figures import _acceptance
from headstart.eval.page import SCHEMA
from tests.helpers.servers import JsonHandler, serving

ROOT = Path(__file__).resolve().parents[2]


def measured_rates() -> tuple[list[float], list[float]]:
    """Conditional acceptance of a head on its target, and on that target after 100 steps of tuning,
    for which the head is stale: as docs/results has them."""
    text = (ROOT / "docs" / "results" / "adapt-math-100.json").read_text(encoding="utf-8")
    domain = json.loads(text)["acceptance"]["domain"]
    reference, stale = (
        domain[name]["conditional_acceptance_rate"] for name in ("reference", "unadapted")
    )
    return reference, stale


class Traffic:
    """Texts whose rounds are alike: each text has its own acceptance, around the same rates.

    Args:
        rates: [K] conditional acceptance of a text in the middle.
        seed: of what is drawn.
        rounds: of a text, in the mean.
        spread: standard deviation, over texts, of the log-odds of each rate.
    """

    def __init__(self, rates: Sequence[float], seed: int, rounds: int = 16, spread: float = 0.5):
        self.rates, self.rounds, self.spread = rates, rounds, spread
        self.generator = np.random.default_rng(seed)
        self.finished = 0
        """Texts."""
        self._left: list[int] = []

    def text(self) -> list[int]:
        """Drafts that each round of one text accepted."""
        rates = np.array(self.rates)
        odds = np.log(rates / (1 - rates)) + self.spread * self.generator.standard_normal()
        many = 1 + int(self.generator.poisson(self.rounds - 1))
        accepts = self.generator.random((many, len(rates))) < 1 / (1 + np.exp(-odds))
        return [int(n) for n in accepts.cumprod(axis=1).sum(axis=1)]

    def next(self, many: int) -> list[int]:
        """Of so many rounds, one text after another."""
        while len(self._left) < many:
            self._left += self.text()
            self.finished += 1
        found, self._left = self._left[:many], self._left[many:]
        return found


def write_report(traffic: Traffic, folder: Path, texts: int = 64) -> Path:
    """A report.json of so many texts, with the fields that a watch reads."""
    k = len(traffic.rates)
    drawn = [traffic.text() for _ in range(texts)]
    counts = [AcceptanceCounts.of_rounds([(k, n) for n in text], k) for text in drawn]
    total = sum(counts[1:], counts[0])
    result = {
        "head": "runs/mine/head", "decoder": "exact", "num_assistant_tokens": k, "category": "all",
        "looping_texts": "with", "temperature": 0.0, "texts": texts,
        **_acceptance([str(i) for i in range(texts)], counts, total),
        "accepted_histogram": total.accepted_histogram,
        "per_text": [[c.rounds, sum(c.accepted)] for c in counts],
    }  # fmt: skip
    content = {"schema": SCHEMA, "per_text_columns": ["rounds", "accepted"], "results": [result]}
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "report.json").write_text(json.dumps(content))
    return folder


class VllmCounters:
    """Counters with vLLM's names, written by the library that writes vLLM's."""

    def __init__(self, k: int, model: str = "gemma", engines: int = 1):
        self.k, self.labels = k, {"model_name": model}
        self.engines = engines
        self.registry = CollectorRegistry()
        names, registry = ["model_name", "engine"], self.registry
        self.drafts = Counter("vllm:spec_decode_num_drafts", "Drafts.", names, registry=registry)
        self.tokens = Counter(
            "vllm:spec_decode_num_draft_tokens", "Tokens.", names, registry=registry
        )
        self.by_position = Counter(
            "vllm:spec_decode_num_accepted_tokens_per_pos", "Accepted.", [*names, "position"],
            registry=registry,
        )  # fmt: skip
        self.texts = Counter("vllm:request_success", "Requests.", names, registry=registry)
        self.count([], 0)

    def count(self, accepted: Sequence[int], texts: int) -> None:
        """Rounds that accepted so many drafts, dealt to the engines in turn."""
        for engine in range(self.engines):
            its = accepted[engine :: self.engines]
            labels = self.labels | {"engine": str(engine)}
            self.drafts.labels(**labels).inc(len(its))
            self.tokens.labels(**labels).inc(self.k * len(its))
            for position in range(self.k):
                counter = self.by_position.labels(**labels, position=str(position))
                counter.inc(sum(n > position for n in its))
            self.texts.labels(**labels).inc(texts if engine == 0 else 0)

    def text(self) -> str:
        """As `/metrics` has it."""
        return generate_latest(self.registry).decode()


@contextmanager
def metrics_server(answer: Callable[[], str], status: int = 200) -> Iterator[str]:
    """The address of a server whose `/metrics` is what `answer` gives; up within `with`."""

    class Handler(JsonHandler):
        def do_GET(self) -> None:
            if self.path != "/metrics":
                self.send(404, {})
                return
            data = answer().encode()
            self.send_response(status)
            self.send_header("content-type", "text/plain; version=0.0.4; charset=utf-8")
            self.send_header("content-length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

    assert issubclass(Handler, BaseHTTPRequestHandler)
    with serving(Handler) as url:
        yield url


def run_json(path: Path) -> dict[str, Any]:
    """What `--json` wrote."""
    content: dict[str, Any] = json.loads(path.read_text())
    return content

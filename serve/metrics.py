"""What a server of an engine counts of its drafts, from its `/metrics` (Prometheus' text format).

- vLLM and llama.cpp (from August 2026 on) count rounds, drafts and accepted tokens, by position
  too, under the same names; so do the programs beside this file that serve mlx-vlm and LiteRT-LM.
- SGLang has no counters of drafts, and nothing by position; its gauges `spec_accept_length` and
  `spec_accept_rate` are of the newest moments alone. What it counts adds up all the same, at the
  end of each request: a request's tokens are one of the prefill and, of each verification, what it
  accepted and one more. Drafts beyond the end of a text are not among them.
"""

import http.client
import re
import time
import urllib.error
import urllib.request
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

from prometheus_client.parser import text_string_to_metric_families

from headstart.configs.settings import ServerConfig
from headstart.data.server import SERVER_KEY, server_key
from headstart.serve.staleness import Rounds

ENGINES = {
    "vllm": "vLLM", "llamacpp": "llama.cpp", "sglang": "SGLang", "mlx": "mlx-vlm",
    "litert": "LiteRT-LM",
}  # fmt: skip
"""What the names of an engine's metrics begin with -> its name."""
LONGEST = 2**24  # bytes of metrics
PATIENCE = 20.0  # seconds for all of them
LOADING = (429, 500, 502, 503, 504)  # statuses that may pass, such as of one that loads weights
PLENTY = 64  # tokens, after which a server that drafts has drafted

Samples = dict[str, list[tuple[Mapping[str, str], float]]]


@dataclass(frozen=True)
class Reading:
    """The counters of a server since its start, all of its engines together."""

    engine: str
    """Its name."""
    rounds: int
    """With drafts."""
    accepted: int
    """Tokens of drafts, as far as they are in texts."""
    drafted: int | None = None
    """Tokens proposed; None: it does not tell."""
    by_position: tuple[int, ...] | None = None
    """[K] rounds that accepted draft k; None: it does not tell, or has not drafted yet."""
    k: int | None = None
    """K, drafts of a round; None: it does not tell."""
    texts: int | None = None
    """Requests that are finished; None: it does not tell."""
    started: float | None = None
    """When, in seconds since 1970; None: it does not tell."""

    def follows(self, earlier: "Reading") -> bool:
        """Whether it is of the same run of the server: counters only grow."""
        if self.started != earlier.started or self.k != (earlier.k or self.k):
            return False
        pairs = [(self.rounds, earlier.rounds), (self.texts or 0, earlier.texts or 0)]
        pairs += zip(self.by_position or (), earlier.by_position or (), strict=False)
        return all(now >= before for now, before in pairs)


def samples_of(metrics: str) -> Samples:
    """All samples by name: labels and values.

    Raises:
        ValueError: it is no text of Prometheus.
    """
    found: Samples = {}
    try:
        for family in text_string_to_metric_families(metrics):
            for sample in family.samples:
                found.setdefault(sample.name, []).append((sample.labels, float(sample.value)))
    except (ValueError, KeyError, IndexError, TypeError) as error:
        raise ValueError(f"not in Prometheus' text format ({str(error)[:80]!r})") from error
    return found


def reading_of(metrics: str, model: str | None = None) -> Reading:
    """What `/metrics` says of drafts.

    Args:
        metrics: in Prometheus' text format.
        model: of those that it names, the one to read; None: there is one.

    Raises:
        ValueError: it is of none of `ENGINES`, has no speculative decoding or is too old to count
            it, serves several models or not this one, or its counters contradict each other.
    """
    samples = samples_of(metrics)
    prefixes = {name.partition(":")[0] for name in samples if ":" in name}
    engine = next((prefix for prefix in ENGINES if prefix in prefixes), None)
    if engine is None:
        raise ValueError("it has no metrics of vLLM, SGLang or llama.cpp")
    if engine == "sglang":
        found = _of_sglang(_of_model(samples, "sglang:generation_tokens_total", model))
    else:
        found = drafts_counted(engine, _of_model(samples, f"{engine}:{DRAFTS}_total", model))
        if found.rounds and found.by_position is None:
            raise ValueError(f"it counts {found.rounds} rounds, and nothing by position")
        written = _sum(samples, f"{engine}:tokens_predicted_total") or 0  # llama.cpp's
        if not found.rounds and written >= PLENTY:
            raise ValueError(
                f"it has written {written:,.0f} tokens without a draft: start it with a head "
                "(docs/how-to/llama-cpp.md)"
            )
    falling = (found.rounds, *(found.by_position or ()))
    if list(falling) != sorted(falling, reverse=True) or found.accepted < 0:
        raise ValueError(
            f"its counters contradict each other: {found.rounds} rounds accepted "
            f"{found.accepted} tokens, at draft 1, 2, .. {list(falling[1:])}"
        )
    return found


def _of_model(samples: Samples, name: str, model: str | None) -> Samples:
    """The samples of one model, where a server names several."""
    names = sorted({labels["model_name"] for labels, _ in samples.get(name, ())
                    if "model_name" in labels})  # fmt: skip
    if model is not None and names and model not in names:
        raise ValueError(f"it serves no model {model}, but {', '.join(names)}")
    if model is None and len(names) > 1:
        raise ValueError(f"it serves {', '.join(names)}: name one, server.model=NAME")
    wanted = model or (names[0] if names else None)
    return {
        name: [(labels, v) for labels, v in some if labels.get("model_name", wanted) == wanted]
        for name, some in samples.items()
    }


DRAFTS = "spec_decode_num_drafts"
NONE = {
    "vllm": "it serves without speculative decoding: start it with --speculative-config "
    "(docs/how-to/vllm.md)",
    "llamacpp": "this llama.cpp counts no drafts: take a release of August 2026 or later",
}
"""What it means that rounds are not counted."""


def drafts_counted(engine: str, samples: Samples) -> Reading:
    """What an engine that counts by position has counted.

    Args:
        engine: of `ENGINES`, as its metrics begin.
        samples: by `samples_of`.

    Raises:
        ValueError: it counts no rounds, or not each position.
    """
    name = f"{engine}:spec_decode_num"
    rounds = _sum(samples, f"{engine}:{DRAFTS}_total")
    if rounds is None:
        raise ValueError(NONE.get(engine, f"it has no {engine}:{DRAFTS}_total"))
    accepted = f"{name}_accepted_tokens_per_pos_total"
    found = {labels.get("position", "") for labels, _ in samples.get(accepted, ())}
    if found != {str(k) for k in range(len(found))}:
        raise ValueError(f"{accepted} counts positions {sorted(found)[:9]}, not 0, 1, .. K-1")
    drafted = _sum(samples, f"{name}_draft_tokens_total")
    by_position = tuple(
        int(_sum(samples, accepted, position=str(k)) or 0) for k in range(len(found))
    )
    created = [value for _, value in samples.get(f"{engine}:{DRAFTS}_created", ())]
    return Reading(
        ENGINES[engine], int(rounds), sum(by_position), None if drafted is None else int(drafted),
        by_position or None, len(by_position) or None,
        _whole(_sum(samples, f"{engine}:request_success_total")),  # vLLM's
        min(created, default=None),
    )  # fmt: skip


def _of_sglang(samples: Samples) -> Reading:
    tokens, texts, rounds = (
        _whole(_sum(samples, f"sglang:{name}_total")) or 0
        for name in ("generation_tokens", "num_requests", "spec_verify_calls")
    )
    if not rounds and tokens >= PLENTY:
        raise ValueError(
            f"it has written {tokens:,} tokens and verified no drafts: start it with a head "
            "(docs/how-to/sglang.md)"
        )
    # The target's own row is among those that are verified together.
    verified = [value for _, value in samples.get("sglang:spec_num_draft_tokens", ())]
    k = int(max(verified)) - 1 if verified and max(verified) > 1 else None
    return Reading("SGLang", rounds, max(tokens - texts - rounds, 0), k=k, texts=texts)


def _sum(samples: Samples, name: str, **wanted: str) -> float | None:
    """Of all samples of a name with these labels, those of several engines; None: there is none."""
    values = [v for labels, v in samples.get(name, ()) if wanted.items() <= labels.items()]
    if any(value != value or value < 0 or value == float("inf") for value in values):
        raise ValueError(f"{name} is no count: {values}")
    return sum(values) if values else None


def _whole(value: float | None) -> int | None:
    return None if value is None else int(value)


def rounds_between(now: Reading, before: Reading | None, k: int) -> Rounds:
    """What came after an earlier reading, of drafts 1 .. K.

    Args:
        now, before: of one run of the server; before None: since its start.
        k: K, at most as many as the server drafts.
    """
    before = before or Reading(now.engine, 0, 0, 0, (0,) * (now.k or 0) or None, now.k, 0)
    rounds = now.rounds - before.rounds
    if now.by_position is None:
        # A text's last round may have brought more than there is of it in the text.
        ended = (now.texts or 0) - (before.texts or 0)
        return Rounds(rounds, now.accepted - before.accepted, None, (), float(k * ended))
    earlier = before.by_position or (0,) * len(now.by_position)
    by_position = tuple(a - b for a, b in zip(now.by_position, earlier, strict=True))[:k]
    missing = 0.0
    if now.drafted is not None:
        missing = max(0, len(now.by_position) * rounds - (now.drafted - (before.drafted or 0)))
    # A round without draft k lacks the later ones too, and none is without the first.
    lacking = [0.0, *(missing / (len(now.by_position) - i) for i in range(1, k))]
    return Rounds(rounds, sum(by_position), by_position, tuple(lacking), min(missing, sum(lacking)))


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    def redirect_request(self, *args: Any) -> None:
        """It would take the key to a server that nobody named."""


class MetricsPage:
    """The `/metrics` of a server.

    Args:
        server: where it is, with or without `/metrics` or `/v1`, the model's name there, and the
            variable of its key.

    Raises:
        ValueError: the address is none, or the variable of the key is not set.
    """

    def __init__(self, server: ServerConfig):
        assert server.url is not None, "the caller asks a server that is named"
        self.url = re.sub(r"/(metrics|v1)$", "", server.url.rstrip("/"))
        there = urlsplit(self.url)
        if there.scheme not in ("http", "https") or not there.hostname or "@" in there.netloc:
            raise ValueError(
                f"{self._shown(there.netloc, server.url)} is no address of a server: give one such "
                "as http://localhost:8000, and a key by server.api_key_env"
            )
        self.model, self.key_variable = server.model, server.api_key_env or SERVER_KEY
        key = server_key(server)
        self._headers = {"Authorization": f"Bearer {key}"} if key else {}
        # Metrics are asked for within a network: no proxy stands before them.
        self._opener = urllib.request.build_opener(urllib.request.ProxyHandler({}), _NoRedirect)

    @staticmethod
    def _shown(netloc: str, url: str) -> str:
        """Without a user and a password."""
        return url.replace(netloc, netloc.rpartition("@")[2]) if "@" in netloc else url

    def read(self) -> Reading:
        """The counters now.

        Raises:
            ValueError: they cannot be had there, and why.
            ConnectionError: nobody answers, or not yet.
        """
        try:
            text = self._get().decode("utf-8")
        except urllib.error.HTTPError as error:
            error.close()
            if error.code in LOADING:
                raise ConnectionError(
                    f"{self.url} is not ready: it answers HTTP {error.code}"
                ) from None
            raise ValueError(self._refusal(error.code)) from None  # it quotes what was sent
        except (OSError, http.client.HTTPException) as error:
            reason = " ".join(str(error).split()) or type(error).__name__
            raise ConnectionError(f"no server answers at {self.url}: {reason[:200]}") from error
        except UnicodeDecodeError as error:
            raise ValueError(f"{self.url}/metrics is no text: {error}") from error
        try:
            return reading_of(text, self.model)
        except ValueError as error:
            raise ValueError(f"{self.url}/metrics: {error}") from error

    def _get(self) -> bytes:
        request = urllib.request.Request(f"{self.url}/metrics", headers=self._headers)
        deadline, parts, size = time.monotonic() + PATIENCE, list[bytes](), 0
        with self._opener.open(request, timeout=PATIENCE) as response:
            while part := response.read1(2**16):
                parts.append(part)
                size += len(part)
                if size > LONGEST or time.monotonic() > deadline:
                    raise ValueError(
                        f"{self.url}/metrics does not end: {size:,} bytes in "
                        f"{PATIENCE + time.monotonic() - deadline:.0f} seconds"
                    )
        return b"".join(parts)

    def _refusal(self, status: int) -> str:
        if status in (401, 403):
            there = "refuses the key in" if self._headers else "wants a key: put it into"
            return f"{self.url} {there} {self.key_variable}"
        if status in (301, 302, 303, 307, 308):
            return f"{self.url}/metrics redirects, which is not followed: name the server itself"
        return (
            f"{self.url}/metrics answers HTTP {status}: llama.cpp has metrics with --metrics, "
            "SGLang with --enable-metrics, vLLM always"
        )

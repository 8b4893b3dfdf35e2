"""A serving engine on loopback, with a target and with a head where there is one.

It is started, asked, and stopped by process id. All engines speak HTTP, and count rounds and
accepted drafts by position for all requests together (`/metrics`). llama.cpp, mlx-vlm and LiteRT-LM
are served by programs beside this file.
"""

import http.client
import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from headstart.common.children import child_environment, home_of, python_command
from headstart.common.console import counted
from headstart.common.files import open_own
from headstart.data.server import PLAIN_SAMPLING
from headstart.serve.engines import Engine, engine_python, errors_of, server_arguments
from headstart.serve.metrics import DRAFTS, ENGINES, drafts_counted, samples_of

# Between this process and an engine: when the pipe between them ends, because this process ended in
# whatever way, SIGKILL included, so does the engine with all processes of its session.
WATCH = """
import os, signal, subprocess, sys, threading, time
signal.signal(signal.SIGTERM, lambda *_: None)
engine = subprocess.Popen(sys.argv[1:], stdin=subprocess.DEVNULL)
def watch():
    os.read(0, 1)  # nothing is ever written: it is the pipe's end
    os.killpg(0, signal.SIGTERM)
    time.sleep(10)
    os.killpg(0, signal.SIGKILL)
threading.Thread(target=watch, daemon=True).start()
sys.exit(engine.wait())
"""
STARTING = 1800.0  # seconds that an engine may take to load and answer
# No proxy stands before loopback.
OWN = urllib.request.build_opener(urllib.request.ProxyHandler({}))
WARM_UP = 8  # tokens of a request before the clock runs


@dataclass(frozen=True)
class Counts:
    """What an engine says of its drafts."""

    rounds: int = 0
    """With drafts: a last token that is not worth any is none."""
    by_position: list[int] = field(default_factory=list)
    """Accepted tokens at draft 1 .. K."""

    def __sub__(self, earlier: "Counts") -> "Counts":
        """What came after an earlier reading."""
        before = earlier.by_position or [0] * len(self.by_position)
        by_position = [a - b for a, b in zip(self.by_position, before, strict=True)]
        return Counts(self.rounds - earlier.rounds, by_position)


@dataclass(frozen=True)
class Answer:
    """One greedy text."""

    tokens: list[int]
    """Without the token that ends a text: engines differ in whether they hand it out."""
    ended: bool
    """Whether it ended before there were as many as asked for."""
    seconds: float
    """Wall time of the request."""

    @classmethod
    def of(cls, tokens: list[int], stop_ids: Sequence[int], asked: int, seconds: float) -> "Answer":
        """From the tokens as they came, with the one that ends the text or without."""
        kept = tokens[:-1] if tokens and tokens[-1] in stop_ids else tokens
        return cls(kept, len(kept) < asked, seconds)

    @property
    def written(self) -> int:
        """Tokens that the target said, that which ends the text included."""
        return len(self.tokens) + self.ended


class EngineServer:
    """An engine with a target, and with a head where there is one; up within `with`.

    Args:
        engine: installed by `headstart install`.
        target, head: folders, for llama.cpp GGUF files. head None: plain decoding.
        num_assistant_tokens: K.
        context: tokens of the longest prompt and its answer together.
        stop_ids: tokens that end a text.
        log: file that keeps what the engine says.
        dtype: of vLLM's weights.
        threads: of the processor.
        at_once: texts that vLLM may work on together.

    Raises:
        RuntimeError: (on entering) it did not come up; the message has the end of its log.
    """

    def __init__(
        self,
        engine: Engine,
        target: Path,
        head: Path | None,
        num_assistant_tokens: int,
        context: int,
        stop_ids: Sequence[int],
        log: Path,
        dtype: str,
        threads: int,
        at_once: int = 1,
    ):
        self.engine, self.log, self.stop_ids = engine, log, list(stop_ids)
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port: int = free.getsockname()[1]
        self.url = f"http://127.0.0.1:{port}"
        # Without keys: an engine runs on local files, and asks nobody.
        self.environment = child_environment()
        self.environment |= {"OMP_NUM_THREADS": str(threads), "HF_HUB_OFFLINE": "1"}
        python = engine_python(engine)
        self.folder = home_of(python)
        """Where it runs: the current folder may hold anything."""
        if engine == "vllm":
            self.environment |= {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_NO_USAGE_STATS": "1"}
        arguments = server_arguments(
            engine, target, head, num_assistant_tokens, port, context, dtype, threads, at_once
        )
        self.command = python_command(python, *arguments)

    def __enter__(self) -> "EngineServer":
        with open_own(self.log, "wb") as log:
            # A session of its own, so that the engine's own processes can be stopped with it.
            self.process = subprocess.Popen(
                [sys.executable, "-I", "-c", WATCH, *self.command], stdin=subprocess.PIPE,
                stdout=log, stderr=subprocess.STDOUT, env=self.environment, cwd=self.folder,
                start_new_session=True,
            )  # fmt: skip
        try:
            deadline = time.monotonic() + STARTING
            while self.process.poll() is None and time.monotonic() < deadline:
                if self._is_up():
                    return self
                time.sleep(0.2)
            raise RuntimeError(
                f"{self.engine} did not come up: ... {self._end_of_log()} (all of it: {self.log})"
            )
        except BaseException:  # Ctrl-C too: the engine does not get it
            self.stop()
            raise

    def _is_up(self) -> bool:
        try:
            OWN.open(f"{self.url}/health", timeout=5).close()
        except (OSError, http.client.HTTPException):
            return False
        return True

    def __exit__(self, *error: object) -> None:
        self.stop()

    def stop(self) -> None:
        """End the engine and its processes."""
        for wanted in (signal.SIGTERM, signal.SIGKILL):
            try:
                os.killpg(self.process.pid, wanted)
                self.process.wait(timeout=10)
            except (ProcessLookupError, subprocess.TimeoutExpired):
                continue
        assert self.process.stdin is not None
        self.process.stdin.close()

    def _end_of_log(self) -> str:
        return errors_of(self.log.read_text(encoding="utf-8", errors="replace"), lines=4)

    def answer(self, prompt: Sequence[int], max_new_tokens: int) -> Answer:
        """The greedy continuation of a prompt's ids."""
        asked = PLAIN_SAMPLING | {"prompt": list(prompt), "temperature": 0.0}
        if self.engine == "vllm":
            asked |= {"model": "target", "max_tokens": max_new_tokens, "return_token_ids": True}
            content, seconds = self._post("/v1/completions", asked)
            tokens = content["choices"][0]["token_ids"]
        else:
            asked |= {"n_predict": max_new_tokens, "return_tokens": True, "stop_ids": self.stop_ids}
            content, seconds = self._post("/completion", asked)
            tokens = content["tokens"]
        return Answer.of(tokens, self.stop_ids, max_new_tokens, seconds)

    def read_counts(self) -> Counts:
        """Of all answers since the start."""
        with OWN.open(f"{self.url}/metrics", timeout=30) as response:
            return counts_of_metrics(response.read().decode())

    def _post(self, path: str, content: dict[str, Any]) -> tuple[dict[str, Any], float]:
        request = urllib.request.Request(
            self.url + path, json.dumps(content).encode(), {"Content-Type": "application/json"}
        )
        start = time.perf_counter()
        try:
            with OWN.open(request, timeout=600) as response:
                found = json.loads(response.read())
        except urllib.error.HTTPError as error:
            raise RuntimeError(
                f"{self.engine} refuses a prompt ({error.code}): {error.read().decode()[:700]}"
            ) from error
        except (OSError, http.client.HTTPException) as error:
            raise RuntimeError(
                f"{self.engine} stopped answering: ... {self._end_of_log()} (all of it: {self.log})"
            ) from error
        return found, time.perf_counter() - start


def counts_of_metrics(metrics: str) -> Counts:
    """Of `/metrics`, in Prometheus' text format; zero where the engine counts no drafts."""
    samples = samples_of(metrics)
    for engine in ENGINES:
        if f"{engine}:{DRAFTS}_total" in samples:
            found = drafts_counted(engine, samples)
            return Counts(found.rounds, list(found.by_position or ()))
    return Counts()


@dataclass(frozen=True)
class Asked:
    """What an engine answered."""

    answers: list[Answer]
    """In the order of the prompts."""
    counts: Counts
    """Of its drafts meanwhile."""
    seconds: float
    """Wall time of all."""

    @property
    def tokens_per_second(self) -> float:
        """Of all texts together."""
        return sum(answer.written for answer in self.answers) / self.seconds


def ask(
    server: EngineServer,
    ids: Sequence[list[int]],
    max_new_tokens: int,
    what: str,
    at_once: int = 1,
) -> Asked:
    """All prompts, so many at once.

    Args:
        server: up.
        ids: of the prompts.
        max_new_tokens: of each text.
        what: for the progress.
        at_once: requests under way.
    """
    server.answer(ids[0], WARM_UP)
    before, start = server.read_counts(), time.perf_counter()
    with ThreadPoolExecutor(at_once) as pool:
        coming = [pool.submit(server.answer, prompt, max_new_tokens) for prompt in ids]
        found = [one.result() for one in counted(coming, f"{what} (texts)")]
    return Asked(found, server.read_counts() - before, time.perf_counter() - start)

"""Real serving engines on loopback, with a head and without: started, asked, stopped by process id.

All speak HTTP. vLLM and llama.cpp count rounds and accepted drafts by position for all requests
together (`/metrics`). mlx-vlm's own server takes text alone, so that its decoding loop is served by
a few lines here, which pass on what each round accepted.
"""

import http.client
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from headstart.common.children import child_environment, home_of, python_command
from headstart.common.files import open_own
from headstart.data.server import PLAIN_SAMPLING
from headstart.serve.engines import Engine, engine_python

# llama.cpp's server as the wheel brings it.
LLAMA = """
import sys, threading, xllamacpp
p = xllamacpp.CommonParams()
p.model.path, p.port, p.n_parallel, p.n_ctx = sys.argv[1], int(sys.argv[2]), 1, int(sys.argv[3])
p.cpuparams.n_threads = p.cpuparams_batch.n_threads = int(sys.argv[4])
p.warmup = p.fit_params = p.cache_prompt = False
p.endpoint_metrics = True
if len(sys.argv) > 5:
    s = p.speculative
    s.types = [xllamacpp.common_speculative_type.COMMON_SPECULATIVE_TYPE_DRAFT_MTP]
    s.draft.mparams.path, s.draft.n_max = sys.argv[5], int(sys.argv[6])
    s.draft.cpuparams.n_threads = s.draft.cpuparams_batch.n_threads = int(sys.argv[4])
server = xllamacpp.Server(p)
threading.Event().wait()
"""
MLX = """
import json, sys
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
import mlx.core as mx
from mlx_vlm.generate.ar import generate_step
from mlx_vlm.speculative.drafters import load_drafter
from mlx_vlm.utils import load_model
model, draft = load_model(Path(sys.argv[1])), {}
if len(sys.argv) > 3:
    head, kind = load_drafter(sys.argv[3])
    head.prefer_requested_block_size = True  # else K is raised only where the drafts are right
    draft = {"draft_model": head, "draft_kind": kind, "draft_block_size": int(sys.argv[4]) + 1}
class Handler(BaseHTTPRequestHandler):
    def do_GET(self):
        self.answer({"status": "ok"})
    def do_POST(self):
        asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        tokens = []
        if draft:
            draft["draft_model"].accept_lens = []
        for token, _ in generate_step(
            mx.array([asked["prompt"]]), model, None, None, max_tokens=asked["n_predict"],
            temperature=0.0, **draft,
        ):
            tokens.append(int(token))
            if tokens[-1] in asked["stop_ids"] or len(tokens) == asked["n_predict"]:
                break
        rounds = [int(n) for n in draft["draft_model"].accept_lens] if draft else []
        self.answer({"tokens": tokens, "accepted": rounds})
    def answer(self, content):
        text = json.dumps(content).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        self.wfile.write(text)
HTTPServer(("127.0.0.1", int(sys.argv[2])), Handler).serve_forever()
"""
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


@dataclass
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


def drafts_at_most(engine: Engine, k: int, left: int) -> int:
    """How many drafts an engine proposes, and counts, where a text lacks `left` tokens of what was
    asked for. vLLM goes beyond the end; llama.cpp leaves a place for the target's own token, as
    transformers does; mlx-vlm does not."""
    match engine:
        case "llama.cpp":
            return min(k, left - 1)
        case "mlx":
            return min(k, left)
    return k


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
        engine: installed by `headstart engines install`.
        target, head: folders, for llama.cpp GGUF files. head None: plain decoding.
        num_assistant_tokens: K.
        context: tokens of the longest prompt and its answer together.
        stop_ids: tokens that end a text.
        log: file that keeps what the engine says.
        dtype: of vLLM's weights.
        threads: of the processor.

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
    ):
        self.engine, self.log, self.counts = engine, log, Counts()
        self.stop_ids, self.k = list(stop_ids), num_assistant_tokens
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port: int = free.getsockname()[1]
        self.url = f"http://127.0.0.1:{port}"
        # Without keys: an engine runs on local files, and asks nobody.
        self.environment = child_environment()
        self.environment |= {"OMP_NUM_THREADS": str(threads), "HF_HUB_OFFLINE": "1"}
        python, target = engine_python(engine), target.absolute()
        head = None if head is None else head.absolute()
        self.folder = home_of(python)
        """Where it runs: the current folder may hold anything."""
        if engine == "llama.cpp":
            self.command = python_command(
                python, "-c", LLAMA, str(target), str(port), str(context), str(threads)
            )
            if head is not None:
                self.command += [str(head), str(num_assistant_tokens)]
            return
        if engine == "mlx":
            self.command = python_command(python, "-c", MLX, str(target), str(port))
            if head is not None:
                self.command += [str(head), str(num_assistant_tokens)]
            return
        self.environment |= {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_NO_USAGE_STATS": "1"}
        self.command = python_command(
            python, "-m", "vllm.entrypoints.openai.api_server", "--model", str(target),
            "--served-model-name", "target", "--host", "127.0.0.1", "--port", str(port),
            "--dtype", dtype, "--max-model-len", str(context), "--max-num-seqs", "1",
            "--no-enable-prefix-caching",
        )  # fmt: skip
        if head is not None:
            speculative = {
                "method": "mtp", "model": str(head), "num_speculative_tokens": num_assistant_tokens,
            }  # fmt: skip
            self.command += ["--speculative-config", json.dumps(speculative)]

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
        lines = self.log.read_text(encoding="utf-8", errors="replace").splitlines()
        telling = [line for line in lines if re.search(r"rror|assert|fail", line)] or lines
        return " ".join(" ".join(telling[-4:]).split())[-700:]

    def answer(self, prompt: Sequence[int], max_new_tokens: int) -> Answer:
        """The greedy continuation of a prompt's ids."""
        asked = PLAIN_SAMPLING | {"prompt": list(prompt), "temperature": 0.0}
        if self.engine == "vllm":
            asked |= {"model": "target", "max_tokens": max_new_tokens, "return_token_ids": True}
            content, seconds = self._post("/v1/completions", asked)
            tokens = content["choices"][0]["token_ids"]
            return Answer.of(tokens, self.stop_ids, max_new_tokens, seconds)
        asked |= {"n_predict": max_new_tokens, "return_tokens": True}
        content, seconds = self._post("/completion", asked | {"stop_ids": self.stop_ids})
        if self.engine == "mlx":
            self._count(content["accepted"])
        return Answer.of(content["tokens"], self.stop_ids, max_new_tokens, seconds)

    def _count(self, accepted: Sequence[int]) -> None:
        """Of each round, how many drafts were accepted."""
        self.counts.rounds += len(accepted)
        before = self.counts.by_position or [0] * self.k
        self.counts.by_position = [
            b + sum(n >= k for n in accepted) for k, b in enumerate(before, start=1)
        ]

    def read_counts(self) -> Counts:
        """Of all answers since the start."""
        if self.engine == "mlx":
            return replace(self.counts)
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
    """Of `/metrics` of vLLM or llama.cpp, in Prometheus' text format."""
    name = r"^(?:vllm|llamacpp):spec_decode_num_"
    rounds = re.findall(name + r"drafts_total(?:{[^}]*})? (\S+)$", metrics, re.M)
    accepted = re.findall(
        name + r'accepted_tokens_per_pos_total{[^}]*position="(\d+)"[^}]*} (\S+)$', metrics, re.M
    )
    by_position = {int(position): int(float(value)) for position, value in accepted}
    return Counts(int(sum(map(float, rounds))), [by_position[k] for k in sorted(by_position)])

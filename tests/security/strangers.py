"""A server of somebody else's, which keeps what it is sent."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from tests.servers import JsonHandler, serving


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

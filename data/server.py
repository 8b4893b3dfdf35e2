"""Answers of a server that runs the target behind the OpenAI API: vLLM, SGLang, llama.cpp.

Prompts go out as token ids, so that no second tokenizer sees them, and token ids come back where
the server has them: several sequences of ids spell one text. `/v1/completions` gives them, the
end-of-sequence token included, as

- `choices[0].token_ids`, asked for by `return_token_ids`: vLLM since August 2025 and SGLang since
  July 2026 (https://github.com/vllm-project/vllm/pull/22587,
  https://github.com/sgl-project/sglang/pull/30917);
- `__verbose.tokens`, asked for by `verbose` and `return_tokens`: llama.cpp since June 2026
  (https://github.com/ggml-org/llama.cpp/pull/24864);
- log-probabilities, which carry an `id` (llama.cpp) or `token_id:N` as their text (vLLM).

All three ignore fields that they do not know, so one request fits them all.
"""

import asyncio
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import urljoin

from openai import (
    APIConnectionError,
    APIError,
    APIStatusError,
    AsyncOpenAI,
    BadRequestError,
    DefaultAsyncHttpxClient,
    NotFoundError,
    Timeout,
    UnprocessableEntityError,
)
from transformers import PreTrainedTokenizerBase

from headstart.common.console import print_once, progress_bar
from headstart.common.files import lock_folder
from headstart.configs.schema import DataConfig
from headstart.configs.settings import ServerConfig
from headstart.data.conversations import claim_folder, part_path, write_part
from headstart.data.regenerate import (
    Job,
    batches_of,
    conversation_settings,
    conversations_of,
    cut_after,
    is_done,
)
from headstart.heads.tokens import Sampling, TargetTokens

SHOWN = 40  # characters of what a server says that go into a message
KEPT = "What is finished is kept: start the server and give the same command again"


def read_answer(
    body: dict[str, Any], tokenizer: PreTrainedTokenizerBase, eos_ids: list[int], limit: int
) -> tuple[list[int], bool]:
    """The token ids in the first choice of a response of `/v1/completions`, and whether the server
    gave text alone, so that the target may have written other ids.

    The ids end with one of `eos_ids`, unless the answer was cut off: after `limit` tokens, at the
    end of the server's context, or by a stop rule of the server's that is none of the target's.
    What is raised is as of `AnswerServer.answer`.
    """
    try:
        return _read(body, tokenizer, eos_ids, limit)
    except (LookupError, TypeError, AttributeError) as error:
        raise ValueError(
            f"the server's answer is none of /v1/completions ({type(error).__name__}: "
            f"{str(error)[:SHOWN]}): is it an OpenAI-compatible server?"
        ) from error


def _read(
    body: dict[str, Any], tokenizer: PreTrainedTokenizerBase, eos_ids: list[int], limit: int
) -> tuple[list[int], bool]:
    choice = body["choices"][0]
    stopped = choice["finish_reason"] == "stop"
    if not stopped and choice["finish_reason"] != "length":
        raise RuntimeError(
            f"the server broke an answer off ({str(choice['finish_reason'])[:SHOWN]}). {KEPT}"
        )
    given = server_ids(body)
    if given is not None and len(given) > limit:
        raise ValueError(f"the server gave {len(given):,} tokens where {limit:,} were asked for")
    if given is None and len(choice["text"]) > limit * max(map(len, tokenizer.get_vocab())):
        raise ValueError(
            f"the server gave {len(choice['text']):,} characters where {limit:,} tokens were asked "
            "for, which no tokens of the target are long enough for"
        )
    ids = given or tokenizer(choice["text"], add_special_tokens=False)["input_ids"]
    if stopped and not set(eos_ids) & set(ids) and (given is None or _written(body) != len(ids)):
        # vLLM names a stop token other than the model's first, SGLang any; a text is a stop word.
        stop = choice.get("stop_reason", choice.get("matched_stop"))
        if not isinstance(stop, str):
            ids = [*ids, eos_ids[0] if stop is None else stop]
    vocabulary = len(tokenizer)
    for i in ids:
        if type(i) is not int or not 0 <= i < vocabulary:  # True is an int, and no token
            raise ValueError(
                f"the server runs another model: its token {repr(i)[:SHOWN]} is outside the "
                f"target's vocabulary of {vocabulary}"
            )
    # The server may know fewer end tokens, and write on.
    return cut_after(ids, eos_ids), given is None


def server_ids(body: dict[str, Any]) -> list[int] | None:
    """The token ids in a response; None: it has none, or fewer than it says were written."""
    choice = body["choices"][0]
    logprobs = choice.get("logprobs") or {}
    ids = choice.get("token_ids") or (body.get("__verbose") or {}).get("tokens")
    if not ids and logprobs.get("content"):
        ids = [entry["id"] for entry in logprobs["content"] if "id" in entry]
    if not ids and logprobs.get("tokens"):
        ids = [
            int(n) if (n := t.partition(":")[2]).isdecimal() else n
            for t in logprobs["tokens"]
            if t.startswith("token_id:")
        ]
    if not ids:
        return None
    missing = (_written(body) or len(ids)) - len(ids)
    # An end token may be counted and yet be left out.
    whole = missing == 0 or (missing == 1 and choice["finish_reason"] == "stop")
    return list(ids) if whole else None


def _written(body: dict[str, Any]) -> int | None:
    count: int | None = (body.get("usage") or {}).get("completion_tokens")
    return count


SERVER_KEY = "HEADSTART_SERVER_API_KEY"  # in the environment: the key of the server


def server_key(server: ServerConfig) -> str | None:
    """The key of a server, of the environment; None: there is none, and none is sent.

    Raises:
        ValueError: the variable that was named is not set.
    """
    key = os.environ.get(server.api_key_env or SERVER_KEY)
    if server.api_key_env is not None and not key:
        raise ValueError(
            f"server.api_key_env={server.api_key_env}: there is no such variable, or no key"
        )
    return key or None


MAX_RETRIES = 45
"""Of each request. openai waits 0.5, 1, 2, 4 and from then on 8 seconds, less up to a quarter
drawn at random: about five minutes, time to start a server again and to load its weights."""
TIMEOUT_SECONDS = 3600
"""For a whole answer, of which nothing is heard before it is complete; it may queue for long."""
PROBE = "A café sells 12 naïve cups, 日本語.\n"
"""What both tokenizers are asked for, and the prompt of the first request."""

PLAIN_SAMPLING: dict[str, Any] = {
    # Servers have defaults of their own (llama.cpp: top 40, min-p 0.05) or take the model's (Gemma:
    # top 64, top-p 0.95), but wanted is the model's own distribution.
    "top_k": -1,  # off: SGLang and older vLLM refuse 0, llama.cpp makes it 0
    "min_p": 0.0, "ignore_eos": False, "add_special_tokens": False,
    "repetition_penalty": 1.0, "skip_special_tokens": False,  # vLLM, SGLang
    # llama.cpp
    "samplers": ["temperature", "top_k", "top_p"], "mirostat": 0, "dynatemp_range": 0.0,
    # With llama.cpp's cache an answer also depends on what its slot computed before
    # (https://github.com/ggml-org/llama.cpp/issues/2838).
    "cache_prompt": False,
}  # fmt: skip
WITH_IDS = PLAIN_SAMPLING | {"return_token_ids": True, "return_tokens": True, "verbose": True}
# Not from the start: they made llama.cpp a quarter slower (270M, CPU), and it drops them where a
# text ends inside a character.
WITH_LOGPROBS = WITH_IDS | {"logprobs": 1, "return_tokens_as_token_ids": True}


class AnswerServer:
    """A client of the server: `check` it first; `async with` closes its connections.

    It sends no key of the user's but the one that is meant for this server, and follows no
    redirect, which would take key and prompts to a server that nobody named. What may pass (no
    connection, HTTP 408, 409, 429, 5xx: llama.cpp says 503 while it loads) is tried again for about
    five minutes.

    Args:
        server: where it is, with or without `/v1`, the target's name there, and so on.
        tokenizer: the target's.
        eos_ids: the target's end-of-sequence tokens; the first stands for one that the server
            does not name.

    Raises:
        ValueError: the variable of the key is not set.
    """

    def __init__(
        self,
        server: ServerConfig,
        tokenizer: PreTrainedTokenizerBase,
        eos_ids: list[int],
    ):
        assert server.url is not None, "the caller asks a server that is named"
        address = server.url.rstrip("/").removesuffix("/v1")
        self.url = re.sub(r"(?<=://)[^/]*@", "", address)
        """As messages name it: without a user and a password."""
        self.key_variable = server.api_key_env or SERVER_KEY
        key = server_key(server)
        self.model, self.concurrency = server.model, server.concurrency
        self.tokenizer, self.eos_ids = tokenizer, eos_ids
        self.retokenized = 0
        """Answers so far that came as text alone."""
        self._extras = WITH_IDS
        self._slots = asyncio.Semaphore(server.concurrency)
        self._answered = 0  # prompts
        self._gone: RuntimeError | None = None  # why no more are asked
        self._tokenize = f"{address}/tokenize"
        with _without_openai_settings():
            self._client = AsyncOpenAI(
                base_url=f"{address}/v1",
                api_key=key or "none",
                max_retries=MAX_RETRIES,
                timeout=Timeout(TIMEOUT_SECONDS, connect=10),
                http_client=DefaultAsyncHttpxClient(follow_redirects=False),
            )
            # A copy reads the environment too.
            self._with_little_patience = self._client.with_options(max_retries=2)

    async def __aenter__(self) -> "AnswerServer":
        return self

    async def __aexit__(self, *error: object) -> None:
        await self._client.close()

    async def check(self) -> None:
        """Find the model and how to ask it for ids, and see that it is the target.

        Raises:
            ValueError: nothing answers at the URL (within seconds); no such model, or several; the
                server refuses a short request, adds tokens to it, or tokenizes otherwise than the
                target.
            RuntimeError: a server is there, but did not come up in five minutes.
        """
        with self._explained():
            self.model = await self._find_model()
            await self._compare_tokenizers()
            await self._choose_extras()

    async def answer(
        self, prompt_ids: list[int], sampling: Sampling, seed: int, max_new_tokens: int
    ) -> list[int]:
        """The target's answer to one prompt, sampled from its own distribution.

        Args:
            prompt_ids: the whole prompt, <bos> included.
            sampling: greedy, or its temperature, top-k and top-p.
            seed: its lower 31 bits are sent, which every server takes. It makes an answer
                repeatable as far as the server does: floats differ with the batch that a request
                falls into, and SGLang heeds seeds only with deterministic inference on.
            max_new_tokens: limit of the response, its end-of-sequence token included.

        Raises:
            ValueError: the server refuses the request, or its answer is none: ids outside the
                vocabulary, more than were asked for, or another format.
            RuntimeError: the server stayed away for five minutes, or broke the answer off.
        """
        async with self._slots:
            if self._gone is not None:  # each request has patience of its own
                raise self._gone
            answered = self._answered
            try:
                with self._explained():
                    body = await self._complete(prompt_ids, sampling, seed, max_new_tokens)
            except RuntimeError as error:
                if self._answered == answered:  # nor was any other prompt, all that time
                    self._gone = error
                raise
            self._answered += 1
        ids, retokenized = read_answer(body, self.tokenizer, self.eos_ids, max_new_tokens)
        self.retokenized += retokenized
        return ids

    async def _complete(
        self, ids: list[int], sampling: Sampling, seed: int, limit: int
    ) -> dict[str, Any]:
        assert self.model is not None, "check() comes first"
        extras = self._extras
        if sampling.top_k is not None:
            extras = extras | {"top_k": sampling.top_k}
        completion = await self._client.completions.create(
            model=self.model, prompt=ids, max_tokens=limit, temperature=sampling.temperature,
            top_p=sampling.top_p, seed=seed % 2**31, extra_body=extras,
        )  # fmt: skip
        return completion.to_dict(warnings=False)  # llama.cpp's types are not quite openai's

    async def _find_model(self) -> str:
        try:
            await self._with_little_patience.models.list()
        except APIConnectionError as error:
            raise ValueError(
                f"no OpenAI-compatible server answers at {self.url}: {error.__cause__ or error}; "
                "start one with e.g. `vllm serve TARGET` or `llama-server -m TARGET.gguf`"
            ) from error
        except APIStatusError:
            pass  # somebody is there, perhaps loading weights: from here on with patience
        try:
            served = [model.id async for model in self._client.models.list()]
        except NotFoundError:
            served = []  # it does not list its models
        names = ", ".join(served) or "no model"
        if self.model is None and len(served) != 1:
            raise ValueError(f"name the model: {self.url} lists {names}")
        if self.model is not None and served and self.model not in served:
            raise ValueError(f"{self.url} does not serve {self.model!r}; it lists {names}")
        return self.model or served[0]

    async def _compare_tokenizers(self) -> None:
        vllm = {"model": self.model, "prompt": PROBE, "add_special_tokens": False}  # and SGLang
        llama_cpp = {"content": PROBE, "add_special": False}
        try:
            body: Any = await self._with_little_patience.post(
                self._tokenize, cast_to=object, body=vllm | llama_cpp
            )
        except APIError:
            return  # not offered
        theirs = body.get("tokens") if isinstance(body, dict) else None
        ours = self.tokenizer(PROBE, add_special_tokens=False)["input_ids"]
        if theirs is not None and theirs != ours:
            made = str(theirs)[:200]
            raise ValueError(
                f"{self.url} runs another model: its tokenizer makes {made} of {PROBE!r}, the "
                f"target's makes {ours}"
            )

    async def _choose_extras(self) -> None:
        prompt_ids = self.tokenizer(PROBE)["input_ids"]
        for extras in (WITH_IDS, WITH_LOGPROBS):
            self._extras = extras
            try:
                body = await self._complete(prompt_ids, Sampling(0.0), 0, 1)
            except (BadRequestError, UnprocessableEntityError):
                if extras is WITH_IDS:
                    raise
                break  # it refuses log-probabilities alone
            counted = (body.get("usage") or {}).get("prompt_tokens", len(prompt_ids))
            if counted != len(prompt_ids):
                raise ValueError(f"{self.url} makes {counted} tokens of {len(prompt_ids)} ids")
            read_answer(body, self.tokenizer, self.eos_ids, 1)
            if server_ids(body) is not None:
                return
        self._extras = WITH_IDS
        print_once("the server gives text alone, which is tokenized again")

    @contextmanager
    def _explained(self) -> Iterator[None]:
        """openai's errors as ours, in one line."""
        try:
            yield
        except (APIConnectionError, APIStatusError) as error:
            status = error.status_code if isinstance(error, APIStatusError) else None
            if status in (401, 403):
                raise ValueError(self._refused_key()) from None
            if isinstance(error, APIStatusError) and "location" in error.response.headers:
                location = self._without_key(error.response.headers["location"])
                there = urljoin(f"{self.url}/", location)
                raise ValueError(
                    f"{self.url} redirects to {there!r}, which is not followed: if you trust it, "
                    "name it in server.url"
                ) from error
            said = error.body.get("message") if isinstance(error.body, dict) else error.body
            said = self._without_key(str(said or error.__cause__ or error))
            reason = " ".join(said.split())[:400]
            if status is None or status >= 500 or status in (408, 409, 429):
                raise RuntimeError(
                    f"{self.url} gave no answer in {MAX_RETRIES + 1} attempts ({reason}). {KEPT}"
                ) from error
            raise ValueError(f"{self.url} refuses with HTTP {status}: {reason}") from error

    def _without_key(self, said: str) -> str:
        """What a server says, which may quote the key that it was sent."""
        key = os.environ.get(self.key_variable)
        return said.replace(key, "(the key)") if key else said

    def _refused_key(self) -> str:
        if os.environ.get(self.key_variable):
            return f"{self.url} refuses the key in {self.key_variable}"
        other = "OPENAI_API_KEY"  # which earlier versions sent to every server
        known = f" (server.api_key_env={other} sends that one)" if os.environ.get(other) else ""
        return f"{self.url} wants a key: put it into {self.key_variable}{known}"


@contextmanager
def _without_openai_settings() -> Iterator[None]:
    """Within, the environment has none of the variables from which openai's client takes keys, an
    organization, a project and headers: they are for OpenAI, not for whichever server is named."""
    kept = {name: value for name, value in os.environ.items() if name.startswith("OPENAI_")}
    for name in kept:
        del os.environ[name]
    try:
        yield
    finally:
        os.environ.update(kept)


def regenerate_by_server(
    server: AnswerServer,
    tokens: TargetTokens,
    jobs: list[Job],
    config: DataConfig,
    seed: int,
    folder: Path,
) -> None:
    """Let a server answer; otherwise as `regenerate`.

    Several batches are under way at once, so that one long answer holds up none of the others.

    Raises:
        ValueError, RuntimeError: what `AnswerServer` raises; finished parts are kept.
    """
    batches = batches_of(jobs, config)
    # Enough batches under way to keep the server busy, and no more: a kill loses those.
    at_once = asyncio.Semaphore(1 + -(-server.concurrency // config.generation_batch_size))

    tokens_written = 0

    async def write(number: int) -> None:
        nonlocal tokens_written
        async with at_once:
            first = seed + number * config.generation_batch_size
            answers = (
                server.answer(job.prompt_ids, job.sampling, first + i, config.max_new_tokens)
                for i, job in enumerate(batches[number])
            )
            ids = await asyncio.gather(*answers)
            written = conversations_of(batches[number], ids, tokens.eos_ids)
            path = part_path(folder, number)
            write_part(path, written, tokens.tokenizer, tokens.name, tokens.revision)
            tokens_written += sum(c.trained for c in written)
            bar.update(task, advance=len(written), status=f"{tokens_written:,} tokens")

    async def write_all() -> None:
        async with server:
            if missing:
                await server.check()
            # What is under way is finished and kept, whatever becomes of one request, as long as
            # the server answers.
            ends = await asyncio.gather(*map(write, missing), return_exceptions=True)
        for error in filter(None, ends):
            raise error

    with lock_folder(folder), progress_bar() as bar:
        settings = conversation_settings(jobs, tokens, config, seed, extract=False)
        claim_folder(folder, settings, len(batches))
        missing = [i for i in range(len(batches)) if not is_done(folder, i, extract=False)]
        there = len(jobs) - sum(len(batches[number]) for number in missing)
        task = bar.add_task("Generating", total=len(jobs), completed=there, status="")
        asyncio.run(write_all())
    if server.retokenized:
        print_once(f"{server.retokenized} answers came as text alone and were tokenized again")

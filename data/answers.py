"""What a response of `/v1/completions` holds: the answer's token ids, as each server gives them."""

from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedTokenizerBase

SHOWN = 40  # characters of what a server says that go into a message
KEPT = "What is finished is kept: start the server and give the same command again"


@dataclass(frozen=True)
class Answer:
    """One response of the target."""

    ids: list[int]
    """Ends with an end-of-sequence token where `finish_reason` is `stop`."""
    finish_reason: str
    """`stop`, or `length`: cut off after `max_new_tokens`, at the end of the server's context, or
    by a stop rule of the server's that is none of the target's."""
    retokenised: bool
    """The server gave text alone: the target may have written other ids."""


def read_answer(
    body: dict[str, Any], tokenizer: PreTrainedTokenizerBase, eos_ids: list[int], limit: int
) -> Answer:
    """The first choice of a response of `/v1/completions`; `limit`, and what is raised, as of
    `AnswerServer.answer`."""
    try:
        return _read(body, tokenizer, eos_ids, limit)
    except (LookupError, TypeError, AttributeError) as error:
        raise ValueError(
            f"the server's answer is none of /v1/completions ({type(error).__name__}: "
            f"{str(error)[:SHOWN]}): is it an OpenAI-compatible server?"
        ) from error


def _read(
    body: dict[str, Any], tokenizer: PreTrainedTokenizerBase, eos_ids: list[int], limit: int
) -> Answer:
    choice = body["choices"][0]
    stopped = choice["finish_reason"] == "stop"
    if not stopped and choice["finish_reason"] != "length":
        raise RuntimeError(
            f"the server broke an answer off ({str(choice['finish_reason'])[:SHOWN]}). {KEPT}"
        )
    given = server_ids(body)
    retokenised = given is None
    if given is not None and len(given) > limit:
        raise ValueError(f"the server gave {len(given):,} tokens where {limit:,} were asked for")
    if given is None and len(choice["text"]) > limit * max(map(len, tokenizer.get_vocab())):
        raise ValueError(
            f"the server gave {len(choice['text']):,} characters where {limit:,} tokens were asked "
            "for, which no tokens of the target are long enough for"
        )
    ids = given or tokenizer(choice["text"], add_special_tokens=False)["input_ids"]
    if stopped and not set(eos_ids) & set(ids) and (retokenised or _written(body) != len(ids)):
        # vLLM names a stop token other than the model's first, SGLang any; a text is a stop word.
        stop = choice.get("stop_reason", choice.get("matched_stop"))
        if not isinstance(stop, str):
            ids = [*ids, eos_ids[0] if stop is None else stop]
    _check_ids(ids, len(tokenizer))
    # The server may know fewer end tokens than the target has, and write on.
    ends = [i for i, token in enumerate(ids) if token in eos_ids]
    if ends:
        return Answer(ids[: ends[0] + 1], "stop", retokenised)
    return Answer(ids, "length", retokenised)


def _check_ids(ids: list[Any], vocabulary: int) -> None:
    """Raise `ValueError` unless all are ids of a vocabulary."""
    for i in ids:
        if type(i) is not int or not 0 <= i < vocabulary:  # True is an int, and no token
            raise ValueError(
                f"the server runs another model: its token {repr(i)[:SHOWN]} is outside the "
                f"target's vocabulary of {vocabulary}"
            )


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

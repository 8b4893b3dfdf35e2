"""What a chat template marks turns with, found in what it makes of a few probes."""

import json
import os
import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

from headstart.heads.limits import time_limit

RENDERED_IN = 30.0  # seconds, of one conversation; templates take a thousandth of that

Messages = list[dict[str, Any]]

# Contents of the conversations that are rendered to find a template's marks.
ASKED, _WROTE, _AGAIN, _RETURNED = "probeasked", "probewrote", "probeagain", "probereturned"


@dataclass(frozen=True)
class TurnFormat:
    """The text by which a chat template marks what the assistant wrote."""

    opening: str
    """Stands before an assistant's turn in a rendered conversation: `<start_of_turn>model\\n`."""
    generation: str
    """The generation prompt: the opening and what may follow it, such as an empty thought."""
    end: str
    """The control token with which the assistant ends its turn."""
    only_turns: bool
    """True: between an end and the next mark there is nothing but white space."""
    pause: str | None
    """The control token with which it waits for a tool; None: tools answer in their own turns."""
    resume: str | None
    """The control token after a tool's response, where it goes on writing in the same turn."""
    marks: tuple[str, ...]
    """All of these and the other control tokens around turns, longest first."""


@lru_cache(maxsize=16)
def turn_format(
    tokenizer: PreTrainedTokenizerBase,
    template: str,
    kwargs_json: str,
    stop_ids: tuple[int, ...],
    with_tools: bool,
) -> TurnFormat:
    """Derive the marks from what the template makes of a few probes."""
    kwargs = json.loads(kwargs_json)
    known = tokenizer.added_tokens_decoder.keys() | stop_ids

    def controls(text: str) -> list[str]:
        tokens = [tokenizer.decode([i]) for i in token_ids(text, tokenizer) if i in known]
        return [token for token in tokens if token.strip()]  # Gemma's newlines are added tokens

    def render(*more: dict[str, Any], **extra: Any) -> str:
        return render_chat(tokenizer, template, kwargs | extra, [user, *more])

    user = {"role": "user", "content": ASKED}
    answer = [{"role": "assistant", "content": _WROTE}, {"role": "user", "content": _AGAIN}]
    asked, prompted, whole = render(), render(add_generation_prompt=True), render(*answer)
    # What stands before an answer in the history, and where the target writes one.
    history = _between(whole, ASKED, _WROTE).removeprefix(asked.partition(ASKED)[2])
    generation = prompted.removeprefix(asked) or history
    opening = min(generation, history, key=len)
    if not (opening and history.startswith(opening) and generation.startswith(opening)):
        raise ValueError(
            f"the chat template begins assistant turns with {history!r}, but its generation "
            f"prompt is {generation!r}"
        )
    closing = _between(whole, _WROTE, _AGAIN)
    if not controls(closing):
        raise ValueError(f"no control token in {closing!r}, the end of an assistant turn")
    end, *others = controls(closing)
    pause, resume = _tool_marks(render, controls, opening, answer) if with_tools else (None, None)
    stops = (tokenizer.decode([i]) for i in stop_ids)
    marks = {opening, *controls(opening), end, *others, pause, resume, *stops}
    return TurnFormat(
        opening=opening,
        generation=generation,
        end=end,
        only_turns=bool(others) and not closing.partition(end)[2].partition(others[0])[0].strip(),
        pause=pause,
        resume=resume,
        marks=tuple(sorted(filter(None, marks), key=len, reverse=True)),
    )


@lru_cache(maxsize=16)
def known_turns(
    tokenizer: PreTrainedTokenizerBase, template: str, kwargs_json: str, with_tools: bool
) -> TurnFormat | None:
    """None: the template marks turns in no way that is known, but can still be prompted with."""
    try:
        return turn_format(tokenizer, template, kwargs_json, (), with_tools)
    except ValueError:
        return None


@lru_cache(maxsize=16)
def plain_borders(
    tokenizer: PreTrainedTokenizerBase, template: str, kwargs_json: str
) -> tuple[str, ...]:
    """What stands between two turns of a template that marks them with plain letters: `</turn>` and
    the next `[user]`. Whoever writes that, writes a turn."""
    user = {"role": "user", "content": ASKED}
    answer = [{"role": "assistant", "content": _WROTE}, {"role": "user", "content": _AGAIN}]
    try:
        whole = render_chat(tokenizer, template, json.loads(kwargs_json), [user, *answer])
        borders = (_between(whole, ASKED, _WROTE), _between(whole, _WROTE, _AGAIN))
    except ValueError:
        return ()
    # White space, or a sign as of a list, is no turn.
    return tuple(b.rstrip() for b in borders if re.search(r"[^\W\d_]{3}", b))


def _tool_marks(
    render: Callable[..., str],
    controls: Callable[[str], list[str]],
    opening: str,
    answer: Messages,
) -> tuple[str | None, str | None]:
    """`pause` and `resume` of a template."""
    function = {"name": "f", "arguments": {"a": "b"}}
    call = {"type": "function", "id": "call00001", "function": function}
    called = {"role": "assistant", "content": "", "tool_calls": [call]}
    returned = {"role": "tool", "name": "f", "tool_call_id": "call00001", "content": _RETURNED}
    whole = render(called, returned, *answer)
    response = _between(whole, _RETURNED, _WROTE)
    if opening in response:
        return None, None
    # These are texts: the assistant's own part ends where the response could be missing.
    before = controls(os.path.commonprefix([render(called), whole]))  # noqa: RUF071
    after = controls(response)
    if not before or not after:
        raise ValueError(f"no control token around the response of a tool in {whole!r}")
    return before[-1], after[-1]


def _between(text: str, left: str, right: str) -> str:
    if left not in text or right not in text.partition(left)[2]:
        raise ValueError(f"the chat template leaves a turn out: {left} or {right} of {text!r}")
    return text.partition(left)[2].partition(right)[0]


def render_chat(
    tokenizer: PreTrainedTokenizerBase,
    template: str,
    kwargs: dict[str, Any],
    messages: Messages,
    tools: list[dict[str, Any]] | None = None,
) -> str:
    """What a template makes of one conversation.

    Raises:
        ValueError: it refuses the conversation, or makes nothing of it.
        TooSlow: it does not come to its end: no row would fare better.
    """
    try:
        with time_limit(RENDERED_IN, "the chat template takes too long (target.chat_template)"):
            text: str = tokenizer.apply_chat_template(
                messages, tools=tools, chat_template=template, tokenize=False, **kwargs
            )
    # Templates are programs: say, one that adds None to a text, or calls itself without end.
    except (
        TemplateError, TypeError, ValueError, LookupError, AttributeError, ArithmeticError,
        RecursionError, MemoryError,
    ) as error:  # fmt: skip
        reason = str(error) or type(error).__name__
        raise ValueError(f"the chat template refuses the conversation: {reason}") from error
    if not text.strip():
        raise ValueError("the chat template makes nothing of the conversation")
    return text


def token_ids(text: str, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Without <bos>: where a target wants it, it stands in the text of its template."""
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])

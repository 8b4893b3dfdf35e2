"""What is known of a target without its weights: its tokenizer, what its chat template marks turns
with, how it ends and samples texts."""

import hashlib
import json
import math
import os
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any

from jinja2 import TemplateError
from transformers import GenerationConfig, PreTrainedTokenizerBase

from headstart.common.console import print_once
from headstart.common.signals import time_limit
from headstart.heads.admission import reading

CHAT_NAME = re.compile(r"(^|[-_.])(it|instruct|chat)([-_.]|$)", re.IGNORECASE)
"""In the name of a checkpoint: Google's are called -it, others' -instruct or -chat."""


@dataclass(frozen=True)
class Sampling:
    """How a target chooses its next token."""

    temperature: float
    """0: greedy."""
    top_k: int | None = None
    """Only the k most likely tokens; None: all."""
    top_p: float = 1.0
    """Only the most likely tokens that hold this much probability together."""


class TargetTokens:
    """What is known of a target without its weights: enough to ask a server that holds them.

    Args:
        tokenizer: of the target.
        name: what reports call it.
        revision: commit on the Hub, where it comes from there.
        generation: the generation settings of its checkpoint.
        eos_token_ids: tokens that end a text, in place of those of the checkpoint.

    Raises:
        ValueError: nothing says how a text ends, or a token that it has not or never writes.
    """

    fingerprint: str | None = None
    settings: dict[str, Any] | None = None
    """The `TargetConfig` that it was loaded by, as JSON: of it what others need to load it again.
    None: it was built otherwise."""

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        name: str,
        revision: str | None,
        generation: GenerationConfig,
        eos_token_ids: Sequence[int] | None = None,
    ):
        self.tokenizer = tokenizer
        self.name = name
        self.revision = revision
        self.generation = generation
        self.eos_ids = _eos_ids(self, eos_token_ids)
        """Tokens with which the target ends a text."""
        _tell_beginning(self)

    @property
    def is_chat_model(self) -> bool:
        """Whether the target is known to answer turns: by its name, or by a control token of its
        own that ends its texts."""
        ends = {self.tokenizer.convert_ids_to_tokens(token) for token in self.eos_ids}
        turn_ends = ends & self.tokenizer.get_added_vocab().keys() - {self.tokenizer.eos_token}
        folder = self.name.partition(" + ")[0].rstrip("/").rpartition("/")[2]
        return bool(turn_ends) or CHAT_NAME.search(folder) is not None

    @property
    def own_sampling(self) -> Sampling:
        """What the target's checkpoint says of sampling; plain where it says nothing.

        Raises:
            ValueError: it says what cannot be.
        """
        g = self.generation
        if g.do_sample is False:
            return Sampling(0.0)
        temperature = 1.0 if g.temperature is None else g.temperature
        top_p = 1.0 if g.top_p is None else g.top_p
        top_k = 0 if g.top_k in (None, -1) else g.top_k  # -1: all, as vLLM has it
        sound = (
            isinstance(temperature, int | float) and 0 <= temperature < math.inf
            and isinstance(top_p, int | float) and 0 < top_p <= 1
            and isinstance(top_k, int) and top_k >= 0
        )  # fmt: skip
        if not sound:
            raise ValueError(
                f"{self.name}: its generation_config.json samples with temperature="
                f"{temperature!r}, top_k={top_k!r}, top_p={top_p!r}, which cannot be: mend it, or "
                "give numbers in data.temperatures or eval.temperatures in place of model"
            )
        return Sampling(temperature, top_k or None, top_p)

    @cached_property
    def tokenizer_hash(self) -> str:
        """SHA-256 over the vocabulary: equal hashes, ids that mean the same."""
        vocabulary = sorted(self.tokenizer.get_vocab().items())
        return hashlib.sha256(json.dumps(vocabulary).encode()).hexdigest()


def _eos_ids(tokens: TargetTokens, given: Sequence[int] | None) -> list[int]:
    t, name = tokens.tokenizer, tokens.name
    mend = "mend eos_token_id in its generation_config.json, or give target.eos_token_ids"
    eos: Any = tokens.generation.eos_token_id if given is None else list(given)
    eos = t.eos_token_id if eos in (None, []) else eos
    ids: list[Any] = eos if isinstance(eos, list) else [eos]
    known = set(t.get_vocab().values())
    if unknown := [token for token in ids if type(token) is not int or token not in known]:
        raise ValueError(
            f"{name}: its texts would end with the token {unknown[0]!r}, which its tokenizer does "
            f"not have: {mend}"
        )
    ids = _with_turn_end(tokens, ids, given is not None)
    unwritten = {t.pad_token_id, t.bos_token_id, t.unk_token_id} - {t.eos_token_id}
    if unwritten.issuperset(ids):
        raise ValueError(
            f"{name}: its texts would end with {_listed(t, ids)} alone, which no target writes: "
            f"{mend}"
        )
    # Gemma's tokenizers hold newlines among the added tokens too.
    added = {token for text, token in t.get_added_vocab().items() if text.strip()}
    known_ends = (added | {t.eos_token_id}) - unwritten
    if odd := [token for token in ids if token not in known_ends]:
        print_once(
            f"{name}: {_listed(t, odd)} among its end tokens is no end of a text (padding, a "
            f"beginning, ordinary text); if not meant, {mend}"
        )
    return ids


def _listed(tokenizer: PreTrainedTokenizerBase, ids: list[int]) -> str:
    return ", ".join(f"{tokenizer.convert_ids_to_tokens(i)!r} ({i})" for i in ids)


def _with_turn_end(tokens: TargetTokens, ids: list[int], given: bool) -> list[int]:
    """The tokens with which the target's texts end, the one that ends an assistant's turn included:
    without it a chat model writes on, and invents what the user says next.

    Raises:
        ValueError: the ids were given by the user, and it is not among them.
    """
    if not tokens.tokenizer.chat_template:
        return ids
    try:
        template = tokens.tokenizer.get_chat_template()
        end = turn_format(tokens.tokenizer, template, "{}", tuple(ids), with_tools=False).end
    except ValueError as error:
        print_once(
            f"{tokens.name}: how an assistant's turn ends cannot be read from its chat template "
            f"({error}); its texts end with the tokens {ids}, or with target.eos_token_ids"
        )
        return ids
    token = tokens.tokenizer.convert_tokens_to_ids(end)
    assert isinstance(token, int)
    if token in ids:
        return ids
    lacks = f"its chat template ends a turn with {end} ({token}), which is not among {ids}"
    if given:
        raise ValueError(f"target.eos_token_ids of {tokens.name}: {lacks}: add it")
    print_once(
        f"{tokens.name}: {lacks}: its texts end with it too; add it to its generation_config.json"
    )
    return [*ids, token]


def _tell_beginning(tokens: TargetTokens) -> None:
    """Say where a chat template begins with no <bos>, or with several: its texts stay as it has
    them, since a server renders them so too."""
    tokenizer, bos = tokens.tokenizer, tokens.tokenizer.bos_token
    if not (tokenizer.chat_template and bos):
        return
    try:
        text = render_chat(tokenizer, tokenizer.get_chat_template(), {}, _USER)
    except ValueError:
        return  # whatever it refuses is told of each row
    count = 0
    while text.startswith(bos, count * len(bos)):
        count += 1
    if count != 1:
        print_once(
            f"{tokens.name}: its chat template begins with {count} {bos}, where a Gemma expects "
            "one; chats are asked so here, as a server asks them. Unless the target was tuned so, "
            "give one that is right in target.chat_template"
        )


def _unnamed_bos(tokenizer: PreTrainedTokenizerBase, config: Any) -> str | None:
    """The token that a tokenizer begins texts with, or that the model's configuration names, where
    the tokenizer does not say that it is <bos>."""
    others = {tokenizer.pad_token_id, tokenizer.eos_token_id, tokenizer.unk_token_id}
    controls = set(tokenizer.get_added_vocab().values()) - others
    named = config.get_text_config().bos_token_id
    for candidate in (*tokenizer("a")["input_ids"][:1], named):
        if candidate in controls:
            return str(tokenizer.convert_ids_to_tokens(candidate))
    return None


def complete_tokenizer(
    tokenizer: PreTrainedTokenizerBase, config: Any, name: str, chat_template: Path | None = None
) -> None:
    """Make a target's tokenizer begin plain text with <bos>, end it with nothing, and pad; in
    place, and said where something was lacking.

    A Gemma that reads text without <bos> is lost, and one that reads <eos> after its prompt has
    ended; checkpoints written by other programs often come so.

    Args:
        tokenizer: of the target `name`.
        config: of the model, which knows <bos> too.
        chat_template: file of a template in place of the tokenizer's.

    Raises:
        ValueError: it puts something else around a text, or there is no such file.
    """
    if chat_template is not None:
        if not chat_template.is_file():
            raise ValueError(f"target.chat_template: there is no file {chat_template}")
        tokenizer.chat_template = chat_template.read_text(encoding="utf-8")
    with reading(name, "has a tokenizer that does not run"):
        _complete(tokenizer, config, name)


def _complete(tokenizer: PreTrainedTokenizerBase, config: Any, name: str) -> None:
    if tokenizer.bos_token is None and (token := _unnamed_bos(tokenizer, config)):
        tokenizer.bos_token = token
    if tokenizer.pad_token_id is None:  # padding is masked: any token will do
        tokenizer.pad_token = tokenizer.eos_token or tokenizer.bos_token
    if tokenizer.bos_token_id is None:
        print_once(f"{name}: its tokenizer has no <bos>: plain text begins without one")
        return
    wanted = [tokenizer.bos_token_id, *tokenizer("a", add_special_tokens=False)["input_ids"]]
    before = tokenizer("a")["input_ids"]
    if before == wanted:
        return
    tokenizer.add_bos_token, tokenizer.add_eos_token = True, False
    if tokenizer("a")["input_ids"] != wanted:
        raise ValueError(
            f"the tokenizer of {name} reads plain text as {before} where <bos> and the text are "
            f"{wanted}: mend the post-processor in its tokenizer.json"
        )
    print_once(
        f"{name}: its tokenizer read plain text as {before}; from here on as {wanted}, after <bos>"
    )


RENDERED_IN = 30.0  # seconds, of one conversation; templates take a thousandth of that

Messages = list[dict[str, Any]]

# Of the conversations that are rendered to find a template's marks.
ASKED, _WROTE, _AGAIN, _RETURNED = "probeasked", "probewrote", "probeagain", "probereturned"
_USER: Messages = [{"role": "user", "content": ASKED}]
_ANSWER: Messages = [
    {"role": "assistant", "content": _WROTE}, {"role": "user", "content": _AGAIN},
]  # fmt: skip


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


@lru_cache(maxsize=4)  # each holds a tokenizer
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
        return render_chat(tokenizer, template, kwargs | extra, [*_USER, *more])

    asked, prompted, whole = render(), render(add_generation_prompt=True), render(*_ANSWER)
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
    pause, resume = _tool_marks(render, controls, opening) if with_tools else (None, None)
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


@lru_cache(maxsize=4)  # each holds a tokenizer
def known_turns(
    tokenizer: PreTrainedTokenizerBase, template: str, kwargs_json: str, with_tools: bool
) -> TurnFormat | None:
    """None: the template marks turns in no way that is known, but can still be prompted with."""
    try:
        return turn_format(tokenizer, template, kwargs_json, (), with_tools)
    except ValueError:
        return None


@lru_cache(maxsize=4)  # each holds a tokenizer
def plain_borders(
    tokenizer: PreTrainedTokenizerBase, template: str, kwargs_json: str
) -> tuple[str, ...]:
    """What stands between two turns of a template that marks them with plain letters: `</turn>` and
    the next `[user]`. Whoever writes that, writes a turn."""
    try:
        whole = render_chat(tokenizer, template, json.loads(kwargs_json), [*_USER, *_ANSWER])
        borders = (_between(whole, ASKED, _WROTE), _between(whole, _WROTE, _AGAIN))
    except ValueError:
        return ()
    # White space, or a sign as of a list, is no turn.
    return tuple(b.rstrip() for b in borders if re.search(r"[^\W\d_]{3}", b))


def _tool_marks(
    render: Callable[..., str], controls: Callable[[str], list[str]], opening: str
) -> tuple[str | None, str | None]:
    """`pause` and `resume` of a template."""
    function = {"name": "f", "arguments": {"a": "b"}}
    call = {"type": "function", "id": "call00001", "function": function}
    called = {"role": "assistant", "content": "", "tool_calls": [call]}
    returned = {"role": "tool", "name": "f", "tool_call_id": "call00001", "content": _RETURNED}
    whole = render(called, returned, *_ANSWER)
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

"""Token ids of prompts and conversations for a target, and which of them it wrote."""

import json
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import chain, pairwise
from typing import Any

from transformers import PreTrainedTokenizerBase

from headstart.common.console import print_once
from headstart.data.marks import left_open, refuse_marks, spoken, thought_in, without_beginning
from headstart.data.prompts import Prompt
from headstart.data.rows import turn_text
from headstart.heads.tokens import (
    ASKED,
    Messages,
    TargetTokens,
    TurnFormat,
    known_turns,
    plain_borders,
    render_chat,
    token_ids,
    turn_format,
)

Spans = list[tuple[int, int]]
TAGS = re.compile(r"(?:<[^<>\s]+>|\[gMASK\])+")
"""What tokenizers begin a text with: `<s>`, `<|begin_of_text|>`, `[gMASK]<sop>`."""


class NoAnswer(ValueError):
    """A conversation that was to be encoded has no turn of the assistant."""


def encode_prompt(
    prompt: Prompt,
    tokenizer: PreTrainedTokenizerBase,
    chat_template_kwargs: dict[str, Any] | None = None,
) -> list[int]:
    """Token ids of a prompt, ready for the target to continue.

    The chat template is used where the tokenizer has one and the prompt is not raw; otherwise
    the plain text. An answer at the end is left out, since the target is to write its own; earlier
    ones stay. A raw text that holds turns of the template is taken as the template's own work.
    `chat_template_kwargs` are variables of the template, such as `enable_thinking`.

    Raises:
        ValueError: the template refuses the conversation or leaves out what it says, there is
            nothing before the answer, or a text holds a mark of a template or a control token.
    """
    if not prompt.question:
        raise ValueError("there is nothing before the assistant's answer")
    kwargs = chat_template_kwargs or {}
    if rendered := _as_rendered(prompt, tokenizer, kwargs):
        return token_ids(_rendered_question(*rendered), tokenizer)
    if prompt.raw or not tokenizer.chat_template:
        refuse_marks(prompt, tokenizer)
        return _plain_ids(prompt.text, tokenizer, ended=False)
    template = tokenizer.get_chat_template(tools=prompt.tools)
    key, tools = json.dumps(kwargs, sort_keys=True), _with_tools(prompt.messages)
    known = known_turns(tokenizer, template, key, tools)
    marks = known.marks if known else plain_borders(tokenizer, template, key)
    refuse_marks(prompt, tokenizer, marks)
    kwargs = {**kwargs, "add_generation_prompt": True}
    text = render_chat(tokenizer, template, kwargs, prompt.question, prompt.tools)
    _check_nothing_left_out(text, prompt.question, prompt.tools)
    return token_ids(text, tokenizer)


def encode_prompts(
    prompts: Iterable[Prompt],
    tokenizer: PreTrainedTokenizerBase,
    chat_template_kwargs: dict[str, Any] | None = None,
) -> list[list[int]]:
    """Token ids of prompts that must all be usable, as those of an evaluation must.

    Raises:
        ValueError: one of them is not; its id is named.
    """
    encoded = []
    for prompt in prompts:
        try:
            encoded.append(encode_prompt(prompt, tokenizer, chat_template_kwargs))
        except ValueError as error:
            raise ValueError(f"the prompt {prompt.id} cannot be used: {error}") from error
    return encoded


def shortened(ids: list[int], max_tokens: int) -> list[int]:
    """The first token (<bos>) and the last ones, `max_tokens` at most."""
    if len(ids) <= max_tokens:
        return ids
    return [ids[0], *ids[len(ids) - max_tokens + 1 :]]


def encode_conversation(
    prompt: Prompt,
    tokenizer: PreTrainedTokenizerBase,
    stop_ids: list[int],
    chat_template_kwargs: dict[str, Any] | None = None,
) -> tuple[list[int], Spans]:
    """Token ids of a whole conversation, and the half-open spans that the assistant wrote.

    A span begins after the generation prompt and ends with the control token by which the
    assistant ends its turn or waits for a tool. What a tool returned is in none, nor is the
    newline that a template adds after a turn. Each span is tokenized by itself, as it is when the
    target decodes: Gemma's tokenizer would merge a newline of the template with those of the text.

    Before the last turn stands the whole generation prompt, as when the target writes that turn:
    Gemma 4's larger models have an empty thought there, which the template leaves out of the
    history (https://ai.google.dev/gemma/docs/core/prompt-formatting-gemma4).

    Raw prompts, and all where the tokenizer has no template, are plain text: the span is the
    answer and <eos> (or what ends the target's texts in its place), or all after <bos> of a raw
    prompt without an answer. A raw text that holds turns of the template is taken as its work: it
    has the spans that its messages would have.

    Raises:
        ValueError: no assistant turn; the template refuses the conversation or does not mark its
            turns; a text holds a mark of a template or a control token; or turns are missing in
            what it renders.
    """
    messages, kwargs = prompt.messages, chat_template_kwargs or {}
    if rendered := _as_rendered(prompt, tokenizer, kwargs):
        return _encode_rendered(prompt, *rendered, tokenizer)
    if prompt.raw or not tokenizer.chat_template:
        refuse_marks(prompt, tokenizer)
        return _encode_plain(prompt, tokenizer, stop_ids)
    if not any(turn["role"] == "assistant" for turn in messages):
        raise NoAnswer("no assistant turn")
    template = tokenizer.get_chat_template(tools=prompt.tools)
    text = render_chat(tokenizer, template, kwargs, messages, prompt.tools)
    _check_nothing_left_out(text, messages, prompt.tools)
    key = json.dumps(kwargs, sort_keys=True)
    turns = turn_format(tokenizer, template, key, tuple(stop_ids), _with_tools(messages))
    refuse_marks(prompt, tokenizer, turns.marks)
    written = _find_written(text, turns)
    _check_number(written, messages)
    if messages[-1]["role"] == "assistant":
        text, written = _restore_thought(text, written, turns, messages[-1])
        text, written = _complete_generation_prompt(text, written, turns)
    return _in_pieces(text, written, tokenizer)


def _check_nothing_left_out(
    text: str, messages: Messages, tools: list[dict[str, Any]] | None
) -> None:
    """Raise `ValueError` where what a turn or a tool's schema says is not in what the template
    rendered: the target would be asked something else, or answer something else, than the row says.
    Thoughts of an assistant are no part of this: templates drop them from the history on purpose.
    """
    squeezed = "".join(text.split())
    plain: list[str] = []  # what stands in the rendered text as it is
    for turn in messages:
        said = spoken(turn_text(turn)) if turn["role"] == "assistant" else turn_text(turn)
        if turn["role"] == "tool":  # a template may render the JSON in it anew
            said = max(re.findall(r"(?<![\\\w])[A-Za-z]+", said), key=len, default="")
        if "".join(said.split()) not in squeezed:
            article = "an" if turn["role"] == "assistant" else "a"
            raise ValueError(
                f"the chat template leaves out what {article} {turn['role']} turn says"
            )
        plain.append(said)
    calls = [call for turn in messages for call in turn.get("tool_calls") or []]
    for name, times in Counter(filter(None, map(_function_name, calls))).items():
        if text.count(name) < times + sum(said.count(name) for said in plain):
            raise ValueError(f"the chat template leaves out calls of the tool {name}")
    for tool in tools or []:
        if (_function_name(tool) or "") not in text:
            raise ValueError("the chat template leaves out the tools")


def _function_name(called: dict[str, Any]) -> str | None:
    """Of a tool or a call of it, in OpenAI's form or without the outer object."""
    function = called.get("function", called)
    name = function.get("name") if isinstance(function, dict) else function
    return name if isinstance(name, str) else None


def _with_tools(messages: Messages) -> bool:
    # Rows of a table hold None where others hold calls.
    return any(
        turn["role"] == "tool" or turn.get("tool_calls") or turn.get("tool_responses")
        for turn in messages
    )


def _in_pieces(
    text: str, written: Spans, tokenizer: PreTrainedTokenizerBase
) -> tuple[list[int], Spans]:
    """Token ids of a rendered text, cut where the assistant begins and ends to write, and its spans
    in tokens."""
    ids: list[int] = []
    spans = []
    for i, (start, end) in enumerate(pairwise([0, *chain(*written), len(text)])):
        piece = token_ids(text[start:end], tokenizer)
        if i % 2:
            spans.append((len(ids), len(ids) + len(piece)))
        ids += piece
    return ids, spans


def _encode_plain(
    prompt: Prompt, tokenizer: PreTrainedTokenizerBase, stop_ids: list[int]
) -> tuple[list[int], Spans]:
    eos = tokenizer.eos_token_id
    answered = len(prompt.question) < len(prompt.messages)
    ids = _plain_ids(prompt.text, tokenizer, ended=not answered)
    if answered:
        start = len(ids)
        ids += token_ids(turn_text(prompt.messages[-1]), tokenizer)
        # The target may end its texts with another token than the tokenizer's <eos>.
        ends = [i for i in stop_ids if i not in (tokenizer.pad_token_id, tokenizer.bos_token_id)]
        end = eos if eos in stop_ids or not ends else ends[0]
        # Many a data set ends its answers with <eos> itself.
        ids = ids[:-1] if ids[start:][-1:] in ([eos], [end]) else ids
        ids.append(end)
    elif prompt.raw:
        start = int(ids[:1] == [tokenizer.bos_token_id])
    else:
        raise NoAnswer("no assistant turn")
    if start == len(ids):
        raise ValueError("the text is empty")
    return ids, [(start, len(ids))]


def _plain_ids(text: str, tokenizer: PreTrainedTokenizerBase, ended: bool) -> list[int]:
    """Of a plain text, with one <bos> where it holds its own and the tokenizer adds another; an
    <eos> at its end stays where the text has `ended`."""
    ids = list(tokenizer(text)["input_ids"])
    first = next((n for n, i in enumerate(ids) if i != tokenizer.bos_token_id), len(ids))
    ids = ids[max(0, first - 1) :]
    return ids if ended or ids[-1:] != [tokenizer.eos_token_id] else ids[:-1]


def _find_written(text: str, turns: TurnFormat) -> Spans:
    """The spans of characters that the assistant wrote."""
    spans = []
    start = ended = None  # where the assistant began to write; where its last turn ended
    pattern = "|".join([*map(re.escape, turns.marks), r"\Z"])  # \Z: the end of the text
    for match in re.finditer(pattern, text):
        mark, (left, right) = match.group(), match.span()
        if ended is not None and turns.only_turns and text[ended:left].strip():
            cut = text[ended:left][:80]
            raise ValueError(f"the chat template ends an assistant turn too early: before {cut!r}")
        ended = None
        if start is not None:
            # A pause alone is the template's own: it stands before a second tool's response.
            if mark == turns.end or (mark == turns.pause and text[start:left].strip()):
                spans.append((start, right))
                ended = right if mark == turns.end else None
            start = None
        elif mark == turns.resume:
            start = right
        if mark == turns.opening:
            longer = text.startswith(turns.generation, left)
            start = left + len(turns.generation if longer else turns.opening)
    return spans


def _check_number(written: Spans, messages: Messages) -> None:
    """A template may leave turns out, or hold examples of its own."""
    turns = [turn for turn in messages if turn["role"] == "assistant"]
    # Google's form: the call, its response and what was written after it are one message.
    twofold = [turn for turn in turns if turn.get("tool_responses") and turn.get("content")]
    number = len(turns) + len(twofold)
    if len(written) != number:
        raise ValueError(f"the chat template renders {len(written)} of {number} assistant turns")


def _restore_thought(
    text: str, written: Spans, turns: TurnFormat, answer: dict[str, Any]
) -> tuple[str, Spans]:
    """Put the thought in the text of the last answer back where the template has dropped it, as it
    does in the history: when the target writes that turn, it writes its thought too. Without
    thinking (the generation prompt holds an empty thought) it writes none, and none is put back."""
    *earlier, (start, end) = written
    thought = thought_in(turn_text(answer))
    rendered = text[start:end]
    dropped = thought and not answer.get("tool_calls") and not thought_in(rendered)
    if not dropped or thought_in(turns.generation):
        return text, written
    whole = thought + rendered.lstrip()
    return text[:start] + whole + text[end:], [*earlier, (start, start + len(whole))]


def _complete_generation_prompt(text: str, written: Spans, turns: TurnFormat) -> tuple[str, Spans]:
    """Put what the history lacks of the generation prompt before the last turn.

    Raises:
        ValueError: it opens a thought, and the answer has none: it would stand within the thought.
    """
    *earlier, (start, end) = written
    opened = text.endswith(turns.opening, 0, start)  # not so after the response of a tool
    lacking = turns.generation[len(turns.opening) :]
    thought = lacking.partition("\n")[0]
    answer = text[start:end]
    if not opened or not lacking:
        return text, written
    if closing := left_open(lacking):
        if closing not in answer:
            raise ValueError(
                f"the chat template's generation prompt opens a thought ({lacking.strip()!r}), and "
                f"an answer has none that the template keeps (give it in `content`, up to "
                f"{closing!r}, let the target write answers with `headstart regenerate`, or turn "
                "thinking off in data.chat_template_kwargs)"
            )
        repeated = lacking if answer.startswith(lacking) else lacking.strip()
        answer = answer.removeprefix(repeated)
    elif thought and answer.startswith(thought):
        return text, written  # an answer with a thought of its own needs no empty one
    begin = start + len(lacking)
    return text[:start] + lacking + answer + text[end:], [*earlier, (begin, begin + len(answer))]


def check_template(prompts: Sequence[Prompt], tokens: TargetTokens) -> None:
    """Say that a target without a chat template reads chat turns as plain text.

    Raises:
        ValueError: it is a chat model, to which turns without their marks are not turns.
    """
    turns = sum(not prompt.raw for prompt in prompts)
    if not turns or tokens.tokenizer.chat_template:
        return
    cure = "give target.chat_template=FILE, or put chat_template.jinja into the checkpoint's folder"
    if tokens.is_chat_model:
        raise ValueError(
            f"{tokens.name} is a chat model and its tokenizer has no chat template, which {turns} "
            f"of {len(prompts)} prompts need: {cure}"
        )
    print_once(
        f"{tokens.name} has no chat template: {turns} of {len(prompts)} prompts are read as plain "
        f"text, as is right for a base model; for a chat model {cure}"
    )


@dataclass(frozen=True)
class RenderedFormat:
    """How a text looks that the template of this tokenizer rendered."""

    turns: TurnFormat
    beginning: str
    """<bos>, or nothing."""
    leading: str
    """What the template itself writes between that and its first mark."""
    unwanted: tuple[str, ...]
    """Control tokens that stand nowhere after the beginning."""
    ending: str
    """From the end of what a user says to the end of the generation prompt."""


def _as_rendered(
    prompt: Prompt, tokenizer: PreTrainedTokenizerBase, kwargs: dict[str, Any]
) -> tuple[str, RenderedFormat] | None:
    """The text of a raw prompt that holds turns of the template, after one <bos>, and how to read
    it; None: it holds none.

    Raises:
        ValueError: it holds a second <bos>, or padding, or begins as those of another tokenizer.
    """
    if not (prompt.raw and tokenizer.chat_template):
        return None
    template = tokenizer.get_chat_template(tools=prompt.tools)
    found = _format_of_rendered(tokenizer, template, json.dumps(kwargs, sort_keys=True))
    if found is None:
        return None
    text = without_beginning(prompt.text, tokenizer.bos_token or "")
    if not any(m in text for m in found.turns.marks if m != tokenizer.eos_token):
        return None
    if token := next((token for token in found.unwanted if token in text), None):
        raise ValueError(f"a rendered text holds {token!r} (a row is one conversation, unpadded)")
    leading = _before_marks(text, found.turns)
    if leading != found.leading and TAGS.fullmatch(leading):
        raise ValueError(
            f"a rendered text begins with {leading!r}, which is no token of this tokenizer's "
            "template (delete it, or give the turns as `messages`)"
        )
    return (tokenizer.bos_token if text != prompt.text else found.beginning) + text, found


@lru_cache(maxsize=4)  # each holds a tokenizer
def _format_of_rendered(
    tokenizer: PreTrainedTokenizerBase, template: str, kwargs_json: str
) -> RenderedFormat | None:
    # The marks around tools, where the template can render them.
    turns = known_turns(tokenizer, template, kwargs_json, True)
    turns = turns or known_turns(tokenizer, template, kwargs_json, False)
    if turns is None:
        return None
    kwargs = {**json.loads(kwargs_json), "add_generation_prompt": True}
    prompted = render_chat(tokenizer, template, kwargs, [{"role": "user", "content": ASKED}])
    bos, pad, eos = tokenizer.bos_token or "", tokenizer.pad_token, tokenizer.eos_token
    return RenderedFormat(
        turns,
        bos if prompted.startswith(bos) else "",
        _before_marks(without_beginning(prompted, bos), turns),
        tuple(token for token in (bos, pad) if token and token != eos),
        prompted.partition(ASKED)[2],
    )


def _before_marks(text: str, turns: TurnFormat) -> str:
    return re.split("|".join(map(re.escape, turns.marks)), text, maxsplit=1)[0].strip()


def _rendered_question(text: str, rendered: RenderedFormat) -> str:
    """A rendered text up to where the target is to write: its last answer left out, the generation
    prompt added where it is missing."""
    turns = rendered.turns
    written = _find_in_rendered(text, turns)
    if written and not text[written[-1][1] :].strip():
        text = text[: written[-1][0]]
    text = text.rstrip()
    if turns.resume and text.endswith(turns.resume):  # it goes on after a tool's response
        return text
    for prompted in (turns.generation, turns.opening):
        if text.endswith(prompted.rstrip()):
            return text.removesuffix(prompted.rstrip()) + turns.generation
    asked_end = rendered.ending.partition(turns.opening)[0].strip()
    return text.removesuffix(asked_end) + rendered.ending


def _encode_rendered(
    prompt: Prompt, text: str, rendered: RenderedFormat, tokenizer: PreTrainedTokenizerBase
) -> tuple[list[int], Spans]:
    turns = rendered.turns
    if len(prompt.question) < len(prompt.messages):  # an answer in a column of its own
        answer = turn_text(prompt.messages[-1])
        text = _rendered_question(text, rendered) + answer
        text += "" if turns.end in answer else turns.end
    written = _find_in_rendered(text, turns)
    if not written:
        raise NoAnswer("no assistant turn")
    if not text[written[-1][1] :].strip():
        text, written = _complete_generation_prompt(text, written, turns)
    return _in_pieces(text, written, tokenizer)


def _find_in_rendered(text: str, turns: TurnFormat) -> Spans:
    """As `_find_written`; an answer at the end may lack its end mark."""
    written = _find_written(text + turns.end, turns)
    if written and written[-1][1] > len(text):
        start, _ = written.pop()
        written += [(start, len(text))] if text[start:].strip() else []
    return written

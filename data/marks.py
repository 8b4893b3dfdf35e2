"""What only a chat template may write: control tokens, and turns, found in the texts of a row; and
thoughts in what an assistant wrote.

A tokenizer makes a control token of its text wherever that stands. A user who writes one would end
a turn or begin another, and no mask could tell who wrote what.
"""

import json
import re
from collections.abc import Iterator, Sequence
from functools import lru_cache
from typing import Any

from transformers import PreTrainedTokenizerBase

from headstart.data.prompts import Prompt
from headstart.data.rows import turn_text

TURNS = re.compile(
    r"<\|im_start\|>(?:system|user|assistant|tool)\b"  # ChatML
    r"|<\|im_(?:system|user|assistant)\|>"  # Kimi
    r"|<\|start_header_id\|>\w+<\|end_header_id\|>|<\|header_start\|>\w+<\|header_end\|>"  # Llama
    r"|<start_of_turn>(?:user|model)\b|<\|turn>(?:system|user|model)\b"  # Gemma to 3, and 4
    r"|\[/INST\]"  # Llama 2, Mistral
    r"|<\uff5c(?:\w+_)?(?:User|Assistant)\uff5c>"  # DeepSeek, Hunyuan
    r"|<\|start\|>(?:system|developer|user|assistant)\b[^<]*"  # gpt-oss
    r"(?:<\|channel\|>[^<]*)?<\|message\|>"
    r"|<\|START_OF_TURN_TOKEN\|><\|\w+_TOKEN\|>"  # Command R
    r"|<\|start_of_role\|>\w+<\|end_of_role\|>"  # Granite
    r"|<extra_id_[01]>(?:System|User|Assistant)\b"  # Nemotron
    r"|\[\|(?:system|user|assistant|Human|AI)\|\]"  # EXAONE, Baize
    r"|^<\|(?:system|user|assistant)\|>\r?\n",  # Zephyr, Phi 3
    re.MULTILINE,
)
"""What stands at turns of the common chat templates."""
IN_ONE_LINE = [
    (re.compile(r"^<\|(?:system|user|prompter)\|>", re.MULTILINE), re.compile(r"<\|assistant\|>"))
]
"""The same of OpenAssistant, where a mark counts with another one after it: as two patterns, since
one would look for the second from each of the first anew."""
HEADINGS = [
    (re.compile(asked, re.MULTILINE), re.compile(answered, re.MULTILINE))
    for asked, answered in (
        (r"(?i:^### ?(?:Human|User|Instruction):)", r"(?i:### ?(?:Assistant|Response):)"),
        (r"\bUSER:", r"\bASSISTANT:"),  # Vicuna
        (r"^(?:Human|User):", r"^Assistant:"),  # Anthropic's HH, DeepSeek to 2.5
        (r"\bGPT4 (?:Correct )?User:", r"\bGPT4 (?:Correct )?Assistant:"),  # OpenChat
        (r"^<human>:", r"^<bot>:"),  # OpenChatKit
    )
]
"""The same without control tokens, in a text that is all one (first: Alpaca, Guanaco): what stands
before a question, and before the answer after it. As part of what a user says they are harmless."""


def refuse_marks(
    prompt: Prompt, tokenizer: PreTrainedTokenizerBase, marks: tuple[str, ...] = ()
) -> None:
    """Refuse a row whose texts hold what only a template may write.

    Of plain text, <bos> at its beginning and <eos> at its end are no fault. What an assistant wrote
    under a template may hold control tokens that mark no turn, such as those around a thought.
    `marks` are those by which the target's chat template marks turns.

    Raises:
        ValueError: with the text that was found.
    """
    whole = [turn_text(turn) for turn in prompt.messages]  # a mark may stand across two parts
    contents = as_json([prompt.messages, prompt.tools, prompt.later_turns, whole])
    if mark := next((mark for mark in marks if as_json(mark)[1:-1] in contents), None):
        raise ValueError(_holds(mark))
    for text in _texts(prompt, tokenizer):
        pairs = IN_ONE_LINE + (HEADINGS if prompt.raw else [])
        if found := TURNS.search(text) or _first_of_two(text, pairs):
            raise ValueError(
                f"a text holds {found[0]!r}, a turn of another chat template than the tokenizer's "
                "(give the turns as `messages`)"
            )
        if token := _control_token(text, tokenizer):
            raise ValueError(_holds(token))


def _first_of_two(
    text: str, pairs: Sequence[tuple[re.Pattern[str], re.Pattern[str]]]
) -> re.Match[str] | None:
    for asked, answered in pairs:
        if (found := asked.search(text)) and answered.search(text, found.end()):
            return found
    return None


def _holds(mark: str) -> str:
    return (
        f"a text holds {mark!r}, which only the chat template may write (a text that is rendered "
        "already is read from the column `text`: columns={text: NAME})"
    )


def as_json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False, default=str)


def _texts(prompt: Prompt, tokenizer: PreTrainedTokenizerBase) -> Iterator[str]:
    """What the assistant did not write, and of plain text its last answer too."""
    plain = prompt.raw or not tokenizer.chat_template
    bos, eos = tokenizer.bos_token or "", tokenizer.eos_token or ""
    for i, turn in enumerate(prompt.messages, start=1):
        text = turn_text(turn)
        if plain:
            text = without_beginning(text, bos) if i == 1 else text
            text = text.removesuffix(eos) if i >= len(prompt.question) else text
        if turn["role"] != "assistant" or (plain and i == len(prompt.messages)):
            yield text
        for key in ("tool_calls", "tool_responses"):
            if turn.get(key):
                yield as_json(turn[key])
    yield from prompt.later_turns
    if prompt.tools:
        yield as_json(prompt.tools)


def without_beginning(text: str, bos: str) -> str:
    """The text without the <bos> that it begins with, however many they are."""
    start = 0
    while bos and text.startswith(bos, start):
        start += len(bos)
    return text[start:]


@lru_cache(maxsize=4)  # each holds a tokenizer
def _control_tokens(tokenizer: PreTrainedTokenizerBase) -> dict[int, str]:
    added = tokenizer.added_tokens_decoder.items()
    return {i: token.content for i, token in added if token.special and token.content.strip()}


def _control_token(text: str, tokenizer: PreTrainedTokenizerBase) -> str | None:
    """The first control token that the tokenizer makes of a text."""
    controls = _control_tokens(tokenizer)
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    # <unk> may also stand for what the vocabulary lacks.
    unknown = tokenizer.unk_token_id
    found = (i for i in ids if i in controls and (i != unknown or controls[i] in text))
    return next((controls[i] for i in found), None)


MARKS = {
    **{f"<{name}>": f"</{name}>" for name in ("think", "thinking", "thought", "reasoning")},
    "<seed:think>": "</seed:think>",  # Seed-OSS
    "[THINK]": "[/THINK]",  # Magistral
    "<|channel>": "<channel|>",  # Gemma 4
    "<unused94>": "<unused95>",  # MedGemma
    "<|START_THINKING|>": "<|END_THINKING|>",  # Command A
    "<|begin_of_thought|>": "<|end_of_thought|>",  # Sky-T1, OpenThoughts
}
"""What opens a thought -> what closes it, in the models that think and in their data sets."""
_OPENING = re.compile("|".join(map(re.escape, MARKS)))
_CLOSING = re.compile("|".join(map(re.escape, MARKS.values())))


def left_open(prompt: str) -> str | None:
    """What would close the thought that a generation prompt opens; None: it leaves none open."""
    *_, last = [None, *_OPENING.finditer(prompt)]
    if last is None or MARKS[last[0]] in prompt[last.end() :]:
        return None
    return MARKS[last[0]]


def thought_in(text: str) -> str:
    """A text up to what it says after its last thought; empty: it holds none that ends."""
    said = spoken(text)
    return text[: len(text) - len(said)].lstrip() if len(said) < len(text) else ""


def spoken(text: str) -> str:
    """What a text says after its last thought, without the white space between them."""
    *_, last = [None, *_CLOSING.finditer(text)]
    return text if last is None else text[last.end() :].lstrip()


def said_to_user(prompt_ids: list[int], ids: list[int], tokenizer: PreTrainedTokenizerBase) -> str:
    """The text of an answer as its user has it, and as a later prompt repeats it: what comes after
    its last thought, without control tokens. Of a thought that was cut off nothing."""
    asked, text = tokenizer.decode(prompt_ids), tokenizer.decode(ids)
    *_, turn = [None, *TURNS.finditer(asked)]
    if turn and (closing := left_open(asked[turn.end() :])) and closing not in text:
        return ""
    said = spoken(text)
    # Others stand where an answer speaks of them.
    opened = _OPENING.search(said)
    if opened and (opened.start() == 0 or opened[0] in tokenizer.all_special_tokens):
        said = said[: opened.start()]
    if said == text:
        return str(tokenizer.decode(ids, skip_special_tokens=True))
    for mark in tokenizer.all_special_tokens:
        said = said.replace(mark, "")
    return said


def lost_thought(prompt: Prompt, ids: list[int], tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether the tokens that were made of a row lack a thought of the assistant's, which the row
    has in the text of an answer or beside it."""
    thoughts = [
        thought
        for turn in prompt.messages
        if turn["role"] == "assistant"
        for thought in _thoughts(turn)
    ]
    if not thoughts:
        return False
    squeezed = "".join(tokenizer.decode(ids).split())
    return any("".join(thought.split()) not in squeezed for thought in thoughts)


def _thoughts(turn: dict[str, Any]) -> list[str]:
    """The thoughts of a turn, without what opens and closes them."""
    beside = [str(turn[key]) for key in ("reasoning", "reasoning_content") if turn.get(key)]
    within = [_OPENING.split(part)[-1] for part in _CLOSING.split(turn_text(turn))[:-1]]
    return beside + within

"""Thoughts in what an assistant wrote: where they begin and end, and which a template dropped."""

import re
from typing import Any

from transformers import PreTrainedTokenizerBase

from headstart.data.prompts import Prompt
from headstart.data.rows import turn_text

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

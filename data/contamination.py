"""Training prompts that repeat an evaluation prompt, found and removed.

An exact duplicate is equal once case, form, spaces and punctuation are gone. A near one shares
word n-grams ("shingles") with an evaluation prompt, by an inverted index over the evaluation
prompts' shingles. The index is exact: evaluation prompts are few, so there is no need for the
approximations (MinHash) that comparing all pairs of millions of texts needs. Time is linear in the
training text.

Prompts made from one template share most of their words and ask something different. So shingles
that many training prompts hold say nothing, and a prompt made mostly of such shingles is near only
to one that holds it whole.
"""

import re
import unicodedata
from collections import Counter, defaultdict
from dataclasses import dataclass, field

from headstart.common.console import print_once
from headstart.configs.schema import DataConfig
from headstart.data.conversations import PIECE
from headstart.data.documents import Chosen
from headstart.data.extraction import OnlineActivations
from headstart.data.prompts import Prompt, load_prompt_set
from headstart.data.rows import turn_text
from headstart.data.store import ActivationStore
from headstart.data.templates import encode_prompts
from headstart.heads.target import Target

NOT_CHECKED = "Contamination: not checked, there are no evaluation prompts (eval.prompts)"

# Chosen on `data/prompts`. With one word in 20 changed, prompts of 20 words and more are found in
# 159 of 163 cases; shingles of 8 words find 61, and shingles of 4 take strangers for near.
WORDS = 5
"""Words a shingle."""
SHARE = 0.7
"""Of an evaluation prompt's telling shingles, in a training prompt that is near it."""
COMMON = 10
"""A shingle in more training prompts than this is a template's, and not telling."""
TELLING = 0.5
"""Least part of an evaluation prompt's shingles that must be telling for a near match."""
SHOWN = 5

# A word is a run of letters and digits; of Chinese and Japanese, which put no spaces, a character.
_CJK = "\u3040-\u30ff\u3400-\u9fff"
_WORD = re.compile(rf"[{_CJK}]|[^\W_{_CJK}]+")

Shingle = tuple[str, ...]


@dataclass
class Contamination:
    """What was removed."""

    exact: int = 0
    near: int = 0
    pairs: list[tuple[str, str, float]] = field(default_factory=list)
    """Training id, evaluation id and the share of shingles in common, of the first few."""

    def describe(self, of: str = "evaluation") -> str:
        """One line, also where nothing was found; `of` says which prompts are repeated."""
        line = (
            f"Contamination: {self.exact} exact and {self.near} near duplicates of {of} "
            "prompts removed from the training prompts"
        )
        pairs = [f"{ours} = {theirs} ({share:.0%})" for ours, theirs, share in self.pairs]
        return f"{line}; first: {', '.join(pairs)}" if pairs else line


def remove_contaminated(
    prompts: list[Prompt], held_out: list[Prompt], near: bool = True
) -> tuple[list[Prompt], Contamination]:
    """The training prompts without those that repeat an evaluation prompt.

    What users write is compared, turn by turn; a system prompt, which a whole data set may share,
    and answers are not. A prompt of fewer than `WORDS` words is only ever an exact duplicate, and
    so are all without `near`.

    Returns:
        The prompts kept, in order, and what was removed.
    """
    exact = {_key(prompt): prompt.id for prompt in held_out}
    index = _Index(held_out if near else [])
    found = [index.look_up(prompt) if near else frozenset[Shingle]() for prompt in prompts]
    # Equal prompts count once: copies make no template.
    index.drop_common({_key(p): shingles for p, shingles in zip(prompts, found, strict=True)})
    kept, removed = [], Contamination()
    for prompt, shingles in zip(prompts, found, strict=True):
        repeated = _exact(prompt, exact)
        match = (repeated, 1.0) if repeated is not None else index.nearest(shingles)
        if match is None:
            kept.append(prompt)
            continue
        if repeated is not None:
            removed.exact += 1
        else:
            removed.near += 1
        if len(removed.pairs) < SHOWN:
            removed.pairs.append((prompt.id, *match))
    return kept, removed


class _Index:
    """Shingles of the user turns of the evaluation prompts; an entry is one turn."""

    def __init__(self, held_out: list[Prompt]):
        self.ids: list[str] = []
        self.sizes: list[int] = []
        self.entries: dict[Shingle, list[int]] = defaultdict(list)
        self.common: set[Shingle] = set()
        self.telling: list[int] = []
        for prompt in held_out:
            # Turns of a few words are anybody's.
            later = [turn for turn in map(_words, prompt.later_turns) if len(turn) >= 2 * WORDS]
            for turn in [*turn_words(prompt), *later]:
                if shingles := _shingles(turn):
                    for shingle in shingles:
                        self.entries[shingle].append(len(self.ids))
                    self.ids.append(prompt.id)
                    self.sizes.append(len(shingles))

    def look_up(self, prompt: Prompt) -> frozenset[Shingle]:
        """The shingles of a training prompt that an evaluation prompt has too."""
        return frozenset(s for s in shingles_of(prompt) if s in self.entries)

    def drop_common(self, found: dict[str, frozenset[Shingle]]) -> None:
        """Learn from all training prompts which shingles are a template's."""
        times = Counter(shingle for shingles in found.values() for shingle in shingles)
        self.common = {shingle for shingle, n in times.items() if n > COMMON}
        self.telling = self.sizes.copy()
        for shingle in self.common:
            for entry in self.entries[shingle]:
                self.telling[entry] -= 1

    def nearest(self, shingles: frozenset[Shingle]) -> tuple[str, float] | None:
        """The evaluation prompt that these repeat, and the share of its shingles among them."""
        held = Counter(entry for s in shingles for entry in self.entries[s])
        telling = Counter(entry for s in shingles - self.common for entry in self.entries[s])
        near = [
            (count / self.sizes[entry], self.ids[entry])
            for entry, count in held.items()
            if count == self.sizes[entry]
            or (
                self.telling[entry] >= TELLING * self.sizes[entry]
                and telling[entry] >= SHARE * self.telling[entry]
            )
        ]
        if not near:
            return None
        share, prompt_id = max(near)
        return prompt_id, share


def shingles_of(prompt: Prompt) -> frozenset[Shingle]:
    """Those of what users write in a prompt, in any turn: runs of `WORDS` words, case, form and
    punctuation aside."""
    return frozenset(s for turn in turn_words(prompt) for s in _shingles(turn))


def _exact(prompt: Prompt, keys: dict[str, str]) -> str | None:
    """Id of the evaluation prompt that equals this one, or one of its turns."""
    turns = turn_words(prompt)
    for key in (_key(prompt), *("".join(turn) for turn in turns)):
        if key and key in keys:
            return keys[key]
    return None


def _key(prompt: Prompt) -> str:
    """What is equal of duplicates: all words, or the text itself where it has none ("+ - ?")."""
    words = "".join("".join(turn) for turn in turn_words(prompt))
    return words or "".join("".join(map(turn_text, prompt.messages)).split())


def turn_words(prompt: Prompt) -> list[list[str]]:
    """The words of each user turn, case and form aside."""
    return [_words(turn_text(turn)) for turn in prompt.messages if turn["role"] == "user"]


def _words(text: str) -> list[str]:
    return _WORD.findall(unicodedata.normalize("NFKC", text).casefold())


def _shingles(words: list[str]) -> set[Shingle]:
    return {tuple(words[i : i + WORDS]) for i in range(len(words) - WORDS + 1)}


def without_contaminated(
    stored: ActivationStore | OnlineActivations,
    asked: list[Prompt],
    target: Target,
    data: DataConfig,
    held_out: str | None,
) -> Chosen:
    """The documents whose prompt, of those `asked`, is no copy of an evaluation prompt, and that
    are no later piece of a conversation that has one; prints how many are."""
    if held_out is None:
        print_once(NOT_CHECKED)
        return Chosen(stored, range(len(stored.entries)))
    evaluation = also_rendered(load_prompt_set(held_out), target, data)
    kept, found = remove_contaminated(asked, evaluation)
    print_once(f"Conversations against {held_out}: {found.describe()}")
    left = set(map(id, kept))
    whole = [(entry.source, _whole(entry.id)) for entry in stored.entries]
    removed = {one for one, prompt in zip(whole, asked, strict=True) if id(prompt) not in left}
    own = [i for i, prompt in enumerate(asked) if id(prompt) in left]
    which = [i for i in own if not (PIECE in asked[i].id and whole[i] in removed)]
    if later := len(own) - len(which):
        print_once(f"Contamination: {later} later pieces of the same conversations removed too")
    return Chosen(stored, which)


def _whole(document: str) -> str:
    """The id of the conversation of which a document is a piece, or all."""
    before, mark, start = document.rpartition(PIECE)
    return before if mark and start.isdecimal() else document


def stored_prompts(stored: ActivationStore | OnlineActivations, target: Target) -> list[Prompt]:
    """What is stored are tokens, so a document's prompt is the text of all that the target did not
    write, marks of the chat template included."""
    decode = target.tokenizer.decode
    texts = (decode(ids, skip_special_tokens=True) for ids in stored.prompts())
    return [_as_prompt(entry.id, text) for entry, text in zip(stored.entries, texts, strict=True)]


def also_rendered(prompts: list[Prompt], target: Target, data: DataConfig) -> list[Prompt]:
    """The prompts as they are and as the template renders them: in both forms a stored one may
    repeat them."""
    encoded = encode_prompts(prompts, target.tokenizer, data.chat_template_kwargs)
    texts = [target.tokenizer.decode(ids, skip_special_tokens=True) for ids in encoded]
    return [*prompts, *(_as_prompt(p.id, t) for p, t in zip(prompts, texts, strict=True))]


def _as_prompt(prompt_id: str, text: str) -> Prompt:
    return Prompt(prompt_id, "", "", [{"role": "user", "content": text}], raw=True)

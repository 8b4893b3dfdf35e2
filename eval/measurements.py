"""Decoding runs, kept prompt by prompt, so that a kill loses one prompt at most."""

import json
import os
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from itertools import count, groupby, islice
from pathlib import Path
from typing import Any

from transformers import LogitsProcessor, PreTrainedTokenizerBase

from headstart.common.console import counted, print_once
from headstart.common.files import open_own, write_atomically
from headstart.common.processes import has_own_device, is_mine
from headstart.data.marks import said_to_user
from headstart.data.prompts import Prompt
from headstart.data.templates import encode_prompt
from headstart.eval.decoding import (
    Decoded,
    DecoderVariant,
    Divergence,
    decode,
    divergence,
    explain_divergence,
    kernels_of,
)
from headstart.eval.spans import spans_of_tokens
from headstart.eval.statistics import ends_in_loop
from headstart.heads.structured import StructuredOutput
from headstart.heads.target import Target
from headstart.heads.tokens import Sampling


@dataclass(frozen=True)
class Asked:
    """What a run says of the prompts of its texts."""

    chat_template_kwargs: dict[str, Any] = field(default_factory=dict)
    """Variables of the target's chat template, such as `enable_thinking`."""
    max_prompt_tokens: int | None = None
    """Longer prompts lost their first tokens in training; None: not known. An evaluation asks them
    whole, as a server would."""

    def encode(self, prompt: Prompt, tokenizer: PreTrainedTokenizerBase) -> list[int]:
        """Token ids of a prompt; `encode_prompt` says what it raises."""
        return encode_prompt(prompt, tokenizer, self.chat_template_kwargs)


WARM_UP_TOKENS = 16
VERSION = 6  # of the file; it rises when a field changes
SEEDS_APART = 1_000_003  # as of train/step.py: prompts of two seeds draw apart
AGAIN_EVERY = 4  # plain decoding is measured twice on each fourth prompt: the noise


@dataclass(frozen=True)
class Text:
    """One text decoded plainly and by one variant."""

    id: str
    """Of the prompt."""
    turn: int
    """0, but for the later turns of a conversation."""
    category: str
    prompt_len: int
    plain: Decoded
    assisted: Decoded
    divergence: Divergence | None
    """Where greedy texts diverge: what the target thinks there."""
    again_seconds: float | None
    """Wall time of a second plain decoding, where there was one."""
    seed: int | None
    """Of the sampling of both; None: greedy."""
    spans: list[str]
    """What each token of the assisted text belongs to, of `SPANS`."""

    @property
    def loops(self) -> bool:
        """Whether the plain text ends in a loop, which flatters drafts of any kind."""
        return ends_in_loop(self.plain.tokens)

    @property
    def diverged_at(self) -> int | None:
        """Index of the first token that differs from plain greedy decoding; None: equal."""
        if self.seed is not None:
            return None
        return divergence(self.plain.tokens, self.assisted.tokens)


MACHINE = "machine"
"""The setting that says where times were taken: those of two machines make no speedup."""
NOT_SAID = (MACHINE, "encoded_sha256", "eos_token_ids", "draft_model_fingerprints")
"""Settings that earlier files do not have."""


class Measurements:
    """A file of one line for the settings and one for each prompt that every variant decoded.

    Where several processes share the prompts, each keeps a file of its own beside that of the main
    process, which takes them in when all are done, or when it opens its own again after a kill.

    Args:
        path: measurements.jsonl of a report's folder.
        settings: what is measured: heads, target, prompts and so on; plain JSON.
        resume: go on with what is there. False: begin anew; measured prompts are moved aside.

    Raises:
        ValueError: other settings, naming both values, or a damaged line, naming it.
    """

    def __init__(self, path: Path, settings: dict[str, Any], resume: bool):
        self.path, self.lines, self.found = path, list[dict[str, Any]](), dict[str, Any]()
        _take_in(path)
        if resume and path.is_file():
            self.lines, self.found = _read(path, settings)
        elif path.is_file():
            _move_aside(path)
        self.done = {line["id"] for line in self.lines}
        """Ids of the prompts that need not be measured any more."""
        path.parent.mkdir(parents=True, exist_ok=True)
        self.settings = settings
        self._write()

    @classmethod
    def beside(cls, path: Path, settings: dict[str, Any], process: int) -> "Measurements":
        """Those of another process than the main one, whose file is `path`."""
        lines, found = _read(path, settings)
        own = cls(path.with_name(f"{path.stem}-process-{process}{path.suffix}"), settings, False)
        own.found, own.done = found, {line["id"] for line in lines}
        return own

    def take_in(self, ids: Sequence[str]) -> None:
        """Add what the other processes measured; prompts then come in the order of these ids."""
        _take_in(self.path)
        places = {name: place for place, name in enumerate(ids)}
        lines, _ = _read(self.path, self.settings)
        self.lines = sorted(lines, key=lambda line: places.get(line["id"], len(places)))
        self._write()

    @property
    def timed(self) -> bool:
        """Whether times were meant to count for all texts: no other process of the launch shared
        the device of one."""
        return not any(line.get("untimed") for line in self.lines)

    def _write(self) -> None:
        # Written anew: the last line may have been cut short by a kill.
        first = {"version": VERSION, "settings": self.settings, "found": self.found}
        text = "".join(json.dumps(line) + "\n" for line in [first, *self.lines])
        write_atomically(self.path, text)

    def find(self, name: str, value: Any) -> None:
        """Keep what was found before decoding began, such as the costs: plain JSON."""
        self.found[name] = value
        self._write()

    def add(self, line: dict[str, Any]) -> None:
        """Keep what all variants made of a prompt."""
        self.lines.append(line)
        with open_own(self.path, "a") as file:
            file.write(json.dumps(line) + "\n")

    def texts(self, variant: DecoderVariant, temperature: float) -> list[Text]:
        """What a variant made of all prompts at a temperature, with every seed."""
        found = []
        for line in self.lines:
            for turn in line["turns"]:
                if turn["temperature"] != temperature:
                    continue
                one = next(s for s in turn["variants"] if s["variant"] == variant.key)
                why = one["divergence"]
                found.append(Text(
                    id=line["id"], turn=turn["turn"], category=line["category"],
                    prompt_len=turn["prompt_len"], plain=Decoded(**turn["plain"]),
                    assisted=Decoded(**one["decoded"]),
                    divergence=None if why is None else Divergence(**why),
                    again_seconds=turn["again_seconds"], seed=turn["seed"],
                    spans=[span for span, count in one["spans"] for _ in range(count)],
                ))  # fmt: skip
        return found


def _move_aside(path: Path) -> None:
    """Keep what was measured before: it may have taken hours."""
    with path.open("rb") as file:
        if len(list(islice(file, 2))) < 2:  # settings alone
            return
    numbers = (f".{number}" for number in count(1))
    aside = next(p for n in numbers if not os.path.lexists(p := path.with_suffix(n + path.suffix)))
    path.rename(aside)
    print_once(
        f"{path} held measurements: they are {aside} now (`headstart eval --resume` goes on)"
    )


def _take_in(path: Path) -> None:
    """Add to a file what other processes of its launch kept beside it, and delete theirs."""
    parts = sorted(path.parent.glob(f"{path.stem}-process-*{path.suffix}"))
    if not parts:
        return
    if path.is_file():
        first, *lines = _whole_lines(path)
        settings = json.loads(first)["settings"]
        for part in parts:
            head, *its = _whole_lines(part)
            if json.loads(head)["settings"] == settings:
                lines += [line for line in its if line not in lines]
        write_atomically(path, "".join(line + "\n" for line in [first, *lines]))
    for part in parts:
        part.unlink()


def _whole_lines(path: Path) -> list[str]:
    """But for a last one that a kill cut short."""
    text = path.read_text(encoding="utf-8")
    return text[: text.rfind("\n") + 1].splitlines()


def _read(path: Path, settings: dict[str, Any]) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    texts = path.read_text(encoding="utf-8").splitlines()
    lines = []
    for number, text in enumerate(texts, start=1):
        try:
            lines.append(json.loads(text))
        except json.JSONDecodeError as error:
            if number < len(texts):
                raise ValueError(f"{path}, line {number} is damaged: {error}") from error
    if not lines:
        return [], {}
    if (version := lines[0].get("version", 1)) != VERSION:
        raise ValueError(
            f"{path} is of version {version}, this Headstart writes {VERSION}: name another "
            "folder, or leave out --resume to begin anew"
        )
    recorded = lines[0].get("settings", {})
    for key, value in settings.items():
        if (earlier := recorded.get(key, value if key in NOT_SAID else None)) != value:
            raise ValueError(
                f"{path} was measured with {key}={earlier}, not {value}: name another folder, or "
                "leave out --resume to begin anew"
            )
    return lines[1:], lines[0].get("found", {})


def drawn_order(prompts: Sequence[Prompt]) -> list[int]:
    """Places of the prompts, in the order in which they are decoded."""
    return random.Random(0).sample(range(len(prompts)), len(prompts))


def measure_prompts(
    target: Target,
    prompts: Sequence[Prompt],
    variants: Mapping[Sampling, Sequence[DecoderVariant]],
    seeds: Sequence[int],
    max_new_tokens: int,
    kept: Measurements,
    asked: Asked,
    together: bool = False,
    timed: bool = True,
    structured: StructuredOutput | None = None,
) -> None:
    """Decode every prompt plainly and by each variant, in an order drawn anew for each text, after
    a warm-up that is thrown away, unless no times are wanted (`timed`); where the target samples,
    once with each seed. The prompts come in a drawn order too, and where the processes of the
    launch work `together` they are dealt over them round robin.

    A prompt with a JSON schema is held to it by `structured`, which may be None where none has one.
    Each turn of a conversation is given its whole text, with plain decoding's own answers, so that
    all variants answer the same question.
    """
    dtype = str(target.table.dtype).removeprefix("torch.")
    todo = [place for place in drawn_order(prompts) if prompts[place].id not in kept.done]
    before = len(prompts) - len(todo)
    alone = {} if timed and (not together or has_own_device()) else {"untimed": True}
    if together:
        todo, before = [place for n, place in enumerate(todo) if is_mine(n)], 0
    every = [variant for own in variants.values() for variant in own]
    with kernels_of(target, every):
        if todo and timed:
            warm = asked.encode(prompts[todo[0]], target.tokenizer)
            short = min(max_new_tokens, WARM_UP_TOKENS)
            pairs = [(sampling, v) for sampling, own in variants.items() for v in (None, *own)]
            for sampling, variant in counted(pairs, "Warming up"):
                _decode(variant, target, warm, short, sampling, 0)
        for place in counted(todo, f"Decoding ({dtype})", done=before):
            prompt, turns = prompts[place], list[dict[str, Any]]()
            for sampling, own in variants.items():
                for seed in seeds if sampling.temperature else [None]:
                    measure = partial(
                        _measure_turn, target, own, sampling, seed, place, max_new_tokens,
                        partial(_constraint, structured, prompt),
                    )  # fmt: skip
                    turns += _converse(target, prompt, asked, measure)
            kept.add({"id": prompt.id, "category": prompt.category, **alone, "turns": turns})


def _converse(
    target: Target, prompt: Prompt, asked: Asked, measure: Callable[[list[int]], dict[str, Any]]
) -> list[dict[str, Any]]:
    """What `measure` gives of all turns of a prompt, one after another."""
    turns, messages = list[dict[str, Any]](), list(prompt.question)
    for number, following in enumerate([*prompt.later_turns, None]):
        ids = asked.encode(replace(prompt, messages=messages), target.tokenizer)
        turns.append({"turn": number} | measure(ids))
        if following is not None:
            # The end of its turn, which not every tokenizer counts among its special tokens.
            said = [i for i in turns[-1]["plain"]["tokens"] if i not in target.eos_ids]
            messages += [
                {"role": "assistant", "content": said_to_user(ids, said, target.tokenizer)},
                {"role": "user", "content": following},
            ]
    return turns


def _constraint(
    structured: StructuredOutput | None, prompt: Prompt, prompt_length: int
) -> list[LogitsProcessor]:
    """What holds one text to the prompt's JSON schema."""
    if prompt.json_schema is None:
        return []
    assert structured is not None, "whoever reads the prompts makes it"
    return [structured.processor(prompt.json_schema, prompt_length)]


def _measure_turn(
    target: Target,
    variants: Sequence[DecoderVariant],
    sampling: Sampling,
    seed: int | None,
    place: int,
    max_new_tokens: int,
    constraint: Callable[[int], list[LogitsProcessor]],
    ids: list[int],
) -> dict[str, Any]:
    again = place % AGAIN_EVERY == 0
    order: list[DecoderVariant | None] = [None, *variants, *([None] if again else [])]
    random.Random(f"{sampling} {seed} {place} {len(ids)}").shuffle(order)
    draws = (seed or 0) * SEEDS_APART + place
    texts = [
        (
            variant,
            _decode(variant, target, ids, max_new_tokens, sampling, draws, constraint(len(ids))),
        )
        for variant in order
    ]
    plain, *repeated = [decoded for variant, decoded in texts if variant is None]
    found = []
    for variant in variants:
        decoded, why = next(decoded for other, decoded in texts if other is variant), None
        if seed is None:
            why = explain_divergence(
                target, ids, plain.tokens, decoded.tokens, constraint(len(ids))
            )
        diverged = None if why is None else asdict(why)
        spans = spans_of_tokens(target.tokenizer, ids, decoded.tokens, target.eos_ids)
        found.append({
            "variant": variant.key, "decoded": asdict(decoded), "divergence": diverged,
            "spans": [(span, len(list(same))) for span, same in groupby(spans)],
        })  # fmt: skip
    return {
        "temperature": sampling.temperature,
        "seed": seed,
        "prompt_len": len(ids),
        "plain": asdict(plain),
        "again_seconds": repeated[0].seconds if repeated else None,
        "variants": found,
    }


def _decode(
    variant: DecoderVariant | None,
    target: Target,
    ids: list[int],
    max_new_tokens: int,
    sampling: Sampling,
    seed: int,
    processors: Sequence[LogitsProcessor] = (),
) -> Decoded:
    if variant is None:
        return decode(
            target, ids, max_new_tokens, sampling=sampling, seed=seed, processors=processors
        )
    return variant.decode(target, ids, max_new_tokens, sampling, seed, processors)

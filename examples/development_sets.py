"""Build the two development sets from their public sources, byte for byte:

    python examples/development_sets.py OUT

| set | rows | source | license |
| --- | --- | --- | --- |
| dev_external_160.jsonl | 80 word problems | GSM8K, test split (openai/grade-school-math) | MIT |
| | 80 instructions | IFEval (google-research/google-research) | Apache-2.0 |
| dev_vicuna_78.jsonl | 78 questions | Vicuna bench (lm-sys/FastChat) | Apache-2.0 |

They are for evaluation alone, and no head is ever trained on them: GSM8K's test split and IFEval
are published benchmarks. So their rows are no part of Headstart. Each source is fetched at a fixed
commit into OUT/sources and held against its SHA-256, and so is each set. Without a network, put the
source files there by hand.
"""

import argparse
import hashlib
import json
import sys
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from headstart.common.files import write_atomically

SECONDS = 60.0  # that a source may take to answer


@dataclass(frozen=True)
class Source:
    """A file of a public repository at a commit."""

    repository: str
    commit: str
    path: str
    sha256: str

    @property
    def name(self) -> str:
        """Of the file in OUT/sources."""
        return f"{self.repository.rpartition('/')[2]}-{Path(self.path).name}"

    @property
    def url(self) -> str:
        """Where it is published."""
        return f"https://github.com/{self.repository}/raw/{self.commit}/{self.path}"


GSM8K = Source(
    "openai/grade-school-math", "3101c7d5072418e28b9008a6636bde82a006892c",
    "grade_school_math/data/test.jsonl",
    "3730d312f6e3440559ace48831e51066acaca737f6eabec99bccb9e4b3c39d14",
)  # fmt: skip
IFEVAL = Source(
    "google-research/google-research", "19638399cc9e03623c5b9087a1d6fa8813974ce9",
    "instruction_following_eval/data/input_data.jsonl",
    "67ffeee0fcb87c317c5b08a2de85557b4a7e96ada6178aa645b4954fe4b53d49",
)  # fmt: skip
VICUNA = Source(
    "lm-sys/FastChat", "0e6d3e4beaab66f4d3f93db72541a4abab8af28d",
    "fastchat/llm_judge/data/vicuna_bench/question.jsonl",
    "c248c5c98ba45bb0c2aadae2f270e643bd32679c6c306a3b2a503ac4254cdaa5",
)  # fmt: skip

# The 80 rows that the set has of the file, from 0, in its order:
GSM8K_ROWS = (
    704, 319, 863, 100, 151, 1168, 196, 795, 1269, 121, 1107, 460, 77, 180, 944, 912, 146, 518,
    189, 1200, 925, 124, 1231, 259, 481, 129, 1255, 1275, 867, 103, 476, 97, 1212, 280, 623,
    914, 306, 1178, 246, 1243, 664, 1220, 383, 215, 1267, 397, 810, 203, 1193, 131, 1228, 125,
    441, 1082, 1157, 931, 682, 1015, 989, 786, 644, 535, 381, 525, 171, 1250, 645, 1144, 1078,
    747, 980, 618, 153, 1117, 349, 744, 322, 1066, 919, 81,
)  # fmt: skip
# And the 80 keys:
IFEVAL_KEYS = (
    1402, 2683, 2820, 286, 3633, 3429, 1367, 152, 2441, 3518, 1342, 1314, 2662, 3380, 2515,
    3073, 2853, 1130, 3445, 2887, 1927, 164, 3624, 1305, 2230, 2532, 168, 2357, 3131, 3091, 143,
    1908, 3401, 3186, 2471, 1739, 3323, 2475, 3243, 2908, 3041, 2275, 1825, 1446, 1964, 2284,
    2292, 1082, 357, 2010, 2404, 2497, 1019, 1800, 3272, 2957, 2716, 1667, 374, 1281, 3098,
    3150, 3112, 1582, 3565, 3166, 1322, 2069, 136, 2180, 3367, 1897, 1609, 1268, 1571, 1000,
    1566, 2921, 1137, 1375,
)  # fmt: skip
VICUNA_LEFT_OUT = (67, 77)


def external_rows(sources: dict[Source, list[Any]]) -> Iterator[dict[str, Any]]:
    """Of dev_external_160.jsonl."""
    for number, row in enumerate(GSM8K_ROWS):
        yield {
            "id": f"gsm8k-{number:03d}", "category": "math",
            "prompt": sources[GSM8K][row]["question"],
            "source": f"{GSM8K.repository} test {GSM8K.commit[:7]}", "licence": "MIT",
        }  # fmt: skip
    asked = {row["key"]: row["prompt"] for row in sources[IFEVAL]}
    for key in IFEVAL_KEYS:
        yield {
            "id": f"ifeval-{key}", "category": "instructions", "prompt": asked[key],
            "source": "google-research instruction_following_eval input_data.jsonl",
            "licence": "Apache-2.0",
        }  # fmt: skip


def vicuna_rows(sources: dict[Source, list[Any]]) -> Iterator[dict[str, Any]]:
    """Of dev_vicuna_78.jsonl."""
    for row in sources[VICUNA]:
        if row["question_id"] not in VICUNA_LEFT_OUT:
            (prompt,) = row["turns"]
            yield {
                "id": f"vicuna-{row['question_id']}", "category": "chat",
                "subcategory": row["category"], "prompt": prompt,
                "source": f"{VICUNA.repository} vicuna_bench {VICUNA.commit[:7]}",
                "licence": "Apache-2.0",
            }  # fmt: skip


SETS = {
    "dev_external_160.jsonl": (
        external_rows, "f110d111e70f33298531c1286834378ee1ebe048dbac14201c2135176428ae2a",
    ),
    "dev_vicuna_78.jsonl": (
        vicuna_rows, "a91c27882d468c5d3bf2fca5dd0ee4d4b4d77a4b7815722d05411884c3350a2b",
    ),
}  # fmt: skip
"""Name of a set -> what makes its rows, and its SHA-256."""


def read_source(source: Source, folder: Path) -> list[Any]:
    """The rows of a source, which is fetched where the folder lacks it.

    Raises:
        SystemExit: it cannot be fetched, or is not the file that was pinned.
    """
    path = folder / source.name
    if not path.is_file():
        print(f"Fetching {source.url}")
        try:
            with urllib.request.urlopen(source.url, timeout=SECONDS) as answer:
                content = answer.read()
        except OSError as error:
            raise SystemExit(
                f"cannot fetch {source.url} ({error}): download it elsewhere and put it at {path}"
            ) from error
    else:
        content = path.read_bytes()
    if (found := hashlib.sha256(content).hexdigest()) != source.sha256:
        where = path if path.is_file() else source.url
        raise SystemExit(
            f"{where} is not the pinned file: its SHA-256 is {found}, not {source.sha256}; "
            f"download {source.url} again and put it at {path}"
        )
    if not path.is_file():
        folder.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    return [json.loads(line) for line in content.decode().splitlines()]


def build_sets(out: Path) -> None:
    """Write both sets into a folder.

    Raises:
        SystemExit: as of `read_source`, or a set does not come out as it was.
    """
    sources = {one: read_source(one, out / "sources") for one in (GSM8K, IFEVAL, VICUNA)}
    for name, (rows, sha256) in SETS.items():
        lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in rows(sources)]
        text = "".join(lines)
        if (found := hashlib.sha256(text.encode()).hexdigest()) != sha256:
            raise SystemExit(f"{name} came out with the SHA-256 {found}, not {sha256}")
        write_atomically(out / name, text)
        print(f"Written: {out / name} ({len(lines)} prompts, SHA-256 {sha256[:12]}...)")


def run() -> int:
    """Read the arguments and build."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("out", type=Path, metavar="OUT", help="folder of the sets")
    build_sets(parser.parse_args().out)
    print("For evaluation alone: never train on them (eval.prompts, not data.prompts)")
    return 0


if __name__ == "__main__":
    sys.exit(run())

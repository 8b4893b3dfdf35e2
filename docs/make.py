"""Write and check the documents: `python -m docs.make write` or `check`, from the root.

What stands between `<!-- BEGIN: NAME -->` and `<!-- END -->` is written here: tables of figures
from the result files (`docs/tables.py`), and what the code says of itself (`docs/reference.py`).
All else is written by hand. `check` changes nothing and prints what is wrong, a line each.
"""

import logging
import re
import sys
from collections.abc import Iterator
from pathlib import Path

import docs.tables_decoding
import docs.tables_training  # noqa: F401  they keep what makes their blocks in TABLES
from docs.checks import dead_pages, documents, problems_of
from docs.reference import REFERENCE
from docs.tables import TABLES, make_table

ROOT = Path(__file__).resolve().parents[1]
BLOCK = re.compile(r"^<!-- BEGIN: (\S+) -->\n(.*?)^<!-- END -->$", re.DOTALL | re.MULTILINE)
MARKER = re.compile(r"^<!-- (?:BEGIN|END)\b.*$", re.MULTILINE)


def fill(text: str, root: Path, page: Path) -> str:
    """The text of a page with its blocks made anew.

    Args:
        root: of the repository.
        page: its path from the root on.

    Raises:
        ValueError: a block has a name that nothing makes, no end, or figures that are not there.
    """
    if len(MARKER.findall(text)) != 2 * len(BLOCK.findall(text)):
        raise ValueError(f"{page}: each <!-- BEGIN: NAME --> needs its <!-- END -->")

    def made(match: re.Match[str]) -> str:
        name = match[1]
        if name not in REFERENCE | TABLES:
            raise ValueError(f"{page}: nothing makes the block {name}")
        body = REFERENCE[name]() if name in REFERENCE else make_table(name, root, page)
        return f"<!-- BEGIN: {name} -->\n\n{body}\n\n<!-- END -->"

    return BLOCK.sub(made, text)


def stale_blocks(root: Path, path: Path) -> Iterator[str]:
    """A line for each block of a page that is not what it would be now."""
    page, text = path.relative_to(root), path.read_text(encoding="utf-8")
    try:
        wanted = fill(text, root, page)
    except ValueError as error:
        yield str(error)
        return
    blocks = zip(BLOCK.finditer(text), BLOCK.finditer(wanted), strict=True)
    for name in (old[1] for old, new in blocks if old[0] != new[0]):
        yield f"{page}: the block {name} is stale: run `make docs`"


def check(root: Path) -> list[str]:
    """What is wrong with the documents, a line each."""
    problems = []
    for path in documents(root):
        problems += [*stale_blocks(root, path), *problems_of(root, path)]
    return [*problems, *dead_pages(root)]


def write(root: Path) -> list[str]:
    """Make the blocks of all pages anew; returns the pages that changed."""
    changed = []
    for path in documents(root):
        text = path.read_text(encoding="utf-8")
        wanted = fill(text, root, path.relative_to(root))
        if wanted != text:
            path.write_text(wanted, encoding="utf-8")
            changed.append(str(path.relative_to(root)))
    return changed


def main(words: list[str]) -> int:
    for chatty in ("torchao", "torch.utils._pytree"):
        logging.getLogger(chatty).setLevel(logging.ERROR)  # they warn at import
    match words:
        case ["write"]:
            print(f"Written anew: {', '.join(write(ROOT)) or 'nothing'}")
            return 0
        case ["check"]:
            problems = check(ROOT)
            print("\n".join(problems) or "The documents are as they should be.")
            return int(bool(problems))
    print(f"{__doc__}", file=sys.stderr)
    return 2


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

"""Conversations about code, as a fine-tune on code has them: functions of Python's own library that
have a docstring, to be completed from it (PSF license).

    python examples/code_set.py code.jsonl

`adapt.conversations=code.jsonl` trains a head on them. A row's source is the file that its function
is in, so that no file is on both sides of a split.
"""

import ast
import json
import sys
import sysconfig
from collections.abc import Iterator
from pathlib import Path

SHORTEST, LONGEST = 200, 1200  # characters of a function
ASKED = "Complete this Python function from its signature and docstring.\n\n```python\n{}\n```"
LEFT_OUT = {"test", "tests", "idlelib", "lib2to3", "site-packages", "pydoc_data"}


def functions(path: Path) -> Iterator[tuple[str, str, str]]:
    """The name of each function of a file, it up to the end of its docstring, and all of it."""
    text = path.read_text(encoding="utf-8", errors="ignore")
    lines = text.splitlines()
    try:
        tree = ast.parse(text)
    except SyntaxError:
        return
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef) and ast.get_docstring(node) and len(node.body) > 1:
            first, asked, last = node.lineno - 1, node.body[0].end_lineno, node.end_lineno
            whole = [line[node.col_offset :] for line in lines[first:last]]
            said = "\n".join(whole[: (asked or 0) - first])
            yield node.name, said, "\n".join(whole)


def main() -> int:
    """Write the rows, in the order of their files."""
    library, out = Path(sysconfig.get_path("stdlib")), Path(sys.argv[1])
    release, count = f"CPython {sys.version_info.major}.{sys.version_info.minor}", 0
    with out.open("w", encoding="utf-8") as file:
        for path in sorted(library.rglob("*.py")):
            place = path.relative_to(library)
            if LEFT_OUT & set(place.parts):
                continue
            for name, said, whole in functions(path):
                if SHORTEST <= len(whole) <= LONGEST:
                    row = {
                        "id": f"{place.as_posix()}:{name}:{count}", "category": "code",
                        "prompt": ASKED.format(said), "response": whole,
                        "source": f"{release} Lib/{place.as_posix()}", "licence": "PSF-2.0",
                    }  # fmt: skip
                    file.write(json.dumps(row) + "\n")
                    count += 1
    print(f"Written: {out} ({count:,} conversations)")
    return 0


if __name__ == "__main__":
    sys.exit(main())

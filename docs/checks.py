"""What is checked of the documents beside their blocks: links, commands, code, settings."""

import ast
import importlib
import importlib.util
import io
import re
import shlex
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import redirect_stderr
from functools import cache
from pathlib import Path
from urllib.parse import unquote

from headstart.cli.arguments import missing
from headstart.cli.main import _parse
from headstart.configs.keys import known_keys
from headstart.configs.loader import load_config, load_settings, load_yaml
from headstart.configs.recipes import recipe_names

OF_ROOT = ("README.md", "CONTRIBUTING.md", "SECURITY.md", "CHANGELOG.md")
CODE = (
    "common", "configs", "heads", "data", "eval", "train", "serve", "api", "cli", "examples",
    "tests", "docs",
)  # fmt: skip
"""Folders whose files may name a page."""
FENCE = re.compile(r"^( *)```(\w*)[^\n]*\n(.*?)^\1```$", re.DOTALL | re.MULTILINE)
INLINE = re.compile(r"(?<!`)`([^`]+)`(?!`)")
LINK = re.compile(r"!?\[[^\]]*\]\(([^)\s]+)\)")
NAMED_PAGE = re.compile(r"(?<![\w/.-])docs/[\w./-]*\.(?:md|json|py|svg|png)(?:#[\w-]+)?")
SETTING = re.compile(r"([a-z]+(?:\.[a-z_0-9]+)+)(?:=.*)?", re.DOTALL)
FILES = (".py", ".json", ".jsonl", ".md", ".yaml", ".html", ".png", ".safetensors")
BLOCK = re.compile(r"^<!-- BEGIN: .*?^<!-- END -->$", re.DOTALL | re.MULTILINE)
VERSIONS = re.compile(r"(?:Python|transformers|torch) \d[\d.]*(?:,? (?:to|and|except) \d[\d.]*)*")
RESULTS_PAGE = Path("docs") / "results.md"


def documents(root: Path) -> list[Path]:
    """All pages."""
    return [
        *(root / name for name in OF_ROOT if (root / name).is_file()),
        *sorted((root / "docs").rglob("*.md")),
    ]


def problems_of(root: Path, path: Path) -> Iterator[str]:
    """A line for each fault of a page.

    Args:
        root: of the repository, or of a copy of it.
        path: of the page.
    """
    page, text = path.relative_to(root), path.read_text(encoding="utf-8")
    problems = [dead_links(path, text)]
    if page.name != "CHANGELOG.md":  # it names commands and settings of before
        problems += [bad_blocks(root, text), bad_code(text)]
    if page in (RESULTS_PAGE, Path("README.md")):
        tables = text if page == RESULTS_PAGE else text + (root / RESULTS_PAGE).read_text("utf-8")
        problems.append(loose_figures(text, tables))
    yield from (f"{page}: {problem}" for found in problems for problem in found)


# Links


def slug(heading: str) -> str:
    """The anchor of a heading, as GitHub and the site make it."""
    text = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading).strip().lower()
    return re.sub(r"[^\w\- ]", "", text).replace(" ", "-")


def anchors(text: str) -> set[str]:
    headings = re.findall(r"^#+ (.*)$", FENCE.sub("", text), re.MULTILINE)
    return {slug(heading) for heading in headings}


def dead_links(path: Path, text: str) -> Iterator[str]:
    """Relative links of a page that lead nowhere; nothing is asked of the network."""
    plain = INLINE.sub("", FENCE.sub("", text))
    for link in LINK.findall(plain):
        place, _, anchor = link.partition("#")
        if re.match(r"[a-z]+:", place):
            continue
        there = path.parent / unquote(place) if place else path
        if not there.exists():
            yield f"the link {link} leads nowhere"
        elif anchor and there.suffix == ".md" and anchor not in anchors(there.read_text("utf-8")):
            yield f"the link {link} leads to no heading of its page"


def dead_pages(root: Path) -> Iterator[str]:
    """Pages and files of docs/ that code, settings or messages name and that are not there."""
    files = [root / name for name in ("Makefile", "pyproject.toml", "mkdocs.yml", *OF_ROOT)]
    for folder in CODE:
        files += (p for e in ("py", "yaml", "jinja", "md") for p in (root / folder).rglob(f"*.{e}"))
    for path in filter(Path.is_file, files):
        for named in NAMED_PAGE.findall(path.read_text(encoding="utf-8")):
            place, _, anchor = named.partition("#")
            there = root / place
            if not there.is_file():
                yield f"{path.relative_to(root)}: there is no {place}"
            elif anchor and anchor not in anchors(there.read_text(encoding="utf-8")):
                yield f"{path.relative_to(root)}: {place} has no heading {anchor}"


# Commands, code and configurations


def bad_blocks(root: Path, text: str) -> Iterator[str]:
    """Fenced blocks that a reader could not run as they stand."""
    for indent, language, body in FENCE.findall(text):
        block = re.sub(rf"^{indent}", "", body, flags=re.MULTILINE)
        match language:
            case "sh":
                yield from bad_shell(root, block)
            case "python":
                yield from bad_python(block)
            case "yaml":
                yield from bad_yaml(block)


def bad_shell(root: Path, block: str) -> Iterator[str]:
    checked = subprocess.run(["bash", "-n"], input=block, capture_output=True, text=True)
    if checked.returncode:
        yield f"no shell takes {block!r}: {checked.stderr.strip()}"
        return
    lines = re.sub(r"\\\n\s*", " ", block).splitlines()
    for line in lines:
        words = shlex.split(line, comments=True)
        match words:
            case ["make", target, *_] if not _is_target(root, target):
                yield f"`{line}`: the Makefile has no {target}"
            case ["python", file, *_] if file.endswith(".py") and not (root / file).is_file():
                yield f"`{line}`: there is no {file}"
        if found := re.match(r"(?:.* -m )?headstart(?:\.cli)? (.*)$", line):
            yield from bad_command(found[1], whole=True)


def _is_target(root: Path, name: str) -> bool:
    makefile = (root / "Makefile").read_text(encoding="utf-8")
    return re.search(rf"^{re.escape(name)}:", makefile, re.MULTILINE) is not None


def bad_command(line: str, whole: bool) -> Iterator[str]:
    """What the parser says against a command line.

    Args:
        line: what follows `headstart`.
        whole: it is one of a block, with all that the command needs.
    """
    try:
        words = shlex.split(line.partition(" > ")[0], comments=True)
        with redirect_stderr(said := io.StringIO()):
            args = _parse([word for word in words if word != "..."])
        if not args.of.settings:
            return
        # A file of the reader's own is not there.
        recipe = args.config if args.config in recipe_names() else None
        if whole and (key := missing(args.of, args.config, args.settings)) is not None:
            yield f"`headstart {line}` needs {key}"
        if args.of.name == "order":
            args.settings += [f"head.init_from={args.head}", "head.use_ordered_embeddings=true"]
        load_settings(recipe, args.settings)
    except ValueError as error:
        yield f"`headstart {line}` does not parse: {error}"
    except SystemExit:  # of argparse, which has said why
        yield f"`headstart {line}` does not parse: {said.getvalue().strip().splitlines()[-1]}"


def bad_code(text: str) -> Iterator[str]:
    """Commands and settings within sentences. Code of one word names a command and calls none."""
    for code in INLINE.findall(FENCE.sub("", text)):
        command, _, line = " ".join(code.split()).partition(" ")
        if command == "headstart" and " " in line and not line.startswith("COMMAND"):
            yield from bad_command(line, whole=False)
        if found := SETTING.fullmatch(code):
            key, keys = found[1], known_keys()
            if key.partition(".")[0] in keys and key not in keys and Path(key).suffix not in FILES:
                yield f"there is no setting {key}"


def bad_python(block: str) -> Iterator[str]:
    try:
        tree = ast.parse(block)
    except SyntaxError as error:
        yield f"python does not take {block!r}: {error}"
        return
    for node in ast.walk(tree):
        match node:
            case ast.Import(names):
                wanted = [(alias.name, "") for alias in names]
            case ast.ImportFrom(str() as module, names):
                wanted = [(module, alias.name) for alias in names]
            case _:
                continue
        yield from (
            f"nothing can be imported as {'.'.join(filter(None, pair))}"
            for pair in wanted
            if not _is_there(*pair)
        )


@cache
def _is_there(module: str, name: str) -> bool:
    """Whether a module has a name; of packages that are not installed nobody can say."""
    top = module.partition(".")[0]
    if top != "headstart" and importlib.util.find_spec(top) is None:
        return True
    try:
        found = importlib.import_module(module)
    except ImportError:
        return False
    return not name or hasattr(found, name) or _is_there(f"{module}.{name}", "")


def bad_yaml(block: str) -> Iterator[str]:
    """What the loader says against a configuration, or against the runs of a sweep."""
    try:
        tree = load_yaml(block)
        if "runs" in tree:  # of examples/ablations/sweep.py
            for overrides in tree["runs"].values():
                load_config(tree["config"], [*tree["overrides"], *overrides])
            return
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "block.yaml"
            path.write_text(block, encoding="utf-8")
            load_settings(path)
    except ValueError as error:
        yield f"{block!r} is no configuration: {error}"


# Figures


def loose_figures(text: str, of: str) -> Iterator[str]:
    """Figures in the sentences of a page, but for versions, that stand in no table of `of`, one
    page or several."""
    tables = " ".join(BLOCK.findall(of))
    prose = text
    for pattern in (BLOCK, FENCE, LINK, INLINE, VERSIONS):  # none of these is a sentence's figure
        prose = pattern.sub("", prose)
    for figure in re.findall(r"(?<![\w.])\d+\.\d{2,}(?![\w.]\d|\w)", prose):
        if not re.search(rf"(?<![\d.]){re.escape(figure)}(?!\d)", tables):
            yield f"{figure} stands in no table"

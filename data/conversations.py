"""Conversations as token ids, and the folder of Parquet files in which regenerated ones are kept.

A folder holds `conversations.json` (with what they were made, and in how many parts) and
`part-NNNNN.parquet`, each of which appears whole or not at all.

Some come with Headstart: `builtin:NAME` are what `headstart regenerate --config NAME` made. A run
takes them where its own settings ask for the same.
"""

import hashlib
import json
import re
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from importlib import resources
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from transformers import PreTrainedTokenizerBase

from headstart.common.console import one_line, print_once
from headstart.common.files import atomic_file, write_atomically
from headstart.configs.loader import load_config
from headstart.configs.recipes import SHIPPED
from headstart.configs.schema import Config, DataConfig
from headstart.configs.section import BUILTIN
from headstart.data.marks import lost_thought
from headstart.data.prompts import Prompt, encode_usable
from headstart.data.store import KEPT, read_index, refusal
from headstart.data.templates import check_template, encode_conversation
from headstart.heads.admission import reading
from headstart.heads.target import Target
from headstart.heads.tokens import TargetTokens

FORMAT = 2  # of the folder: raise it when the same settings come to give other conversations
MANIFEST = "conversations.json"
PIECE = "@"
"""Between the id of a conversation and where a later piece of it begins."""
PART = re.compile(r"part-(\d{5,9})\.parquet")
DIGEST = b"headstart.sha256"  # of the rows, in the metadata of the schema
SCHEMA = pa.schema(
    [
        ("id", pa.string()),
        ("category", pa.string()),
        ("source", pa.string()),
        ("prompt", pa.string()),
        ("response", pa.string()),
        ("prompt_ids", pa.list_(pa.int32())),
        ("response_ids", pa.list_(pa.int32())),
        ("temperature", pa.float64()),
        ("finish_reason", pa.string()),
        ("target", pa.string()),
        ("revision", pa.string()),
    ]
)


@dataclass(frozen=True)
class Conversation:
    """A text as token ids, and which of them the assistant wrote."""

    id: str
    category: str
    source: str
    """Where the text comes from; conversations of one source never straddle training and
    held-out."""
    ids: list[int]
    spans: list[tuple[int, int]]
    """Half-open ranges of the tokens that the assistant wrote, in order."""
    temperature: float | None = None
    """At which the target wrote it; 0 greedy, None not known."""
    finish_reason: str | None = None
    """`stop` (the last token is an end of sequence) or `length`; None: not known."""

    @property
    def trained(self) -> int:
        """Tokens that the assistant wrote."""
        return sum(end - start for start, end in self.spans)


def answered(prompt_ids: list[int], response_ids: list[int], **names: Any) -> Conversation:
    """A prompt and the target's answer to it; `names` are the other fields of `Conversation`."""
    span = (len(prompt_ids), len(prompt_ids) + len(response_ids))
    return Conversation(ids=prompt_ids + response_ids, spans=[span], **names)


def encode_answered(
    prompts: list[Prompt], path: str, tokens: TargetTokens, d: DataConfig
) -> list[Conversation]:
    """Prompts with the answers that they come with, and the tokens of these; `path` is what to call
    them.

    Raises:
        ValueError: more than `data.max_bad_rows` have no answer or do not fit the target's chat
            template.
    """
    check_template(prompts, tokens)
    encoded = encode_usable(
        prompts,
        lambda p: encode_conversation(p, tokens.tokenizer, tokens.eos_ids, d.chat_template_kwargs),
        d.max_bad_rows,
    )
    rows: list[Conversation] = []
    thoughtless: list[str] = []
    for prompt, made in zip(prompts, encoded, strict=True):
        if made is None:
            continue
        ids, spans = made
        rows.append(Conversation(prompt.id, prompt.category, prompt.source, ids, spans))
        if lost_thought(prompt, ids, tokens.tokenizer):
            thoughtless.append(prompt.id)
    if thoughtless:
        line = (
            f"{path}: the chat template leaves thoughts out of {len(thoughtless)} of "
            f"{len(prompts)} conversations, first {thoughtless[0]}: their answers are trained on "
            "without them (it may keep them with a variable of data.chat_template_kwargs)"
        )
        print(one_line(line), file=sys.stderr)
    return rows


def stable_hash(*parts: object) -> str:
    """Sixteen hex digits of the SHA-256 of the parts' JSON."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:16]


def claim_folder(folder: Path, settings: dict[str, Any], parts: int) -> None:
    """Begin a folder of conversations, or make sure that it was begun with the same settings.

    Raises:
        ValueError: it was not, or the folder holds something else.
    """
    path = folder / MANIFEST
    settings = {"format": FORMAT, **settings, "parts": parts}
    if path.is_file():
        there = read_manifest(folder)
        # A fingerprint says more than a name, which may change with the folder.
        names = {"target", "revision"} if settings["fingerprint"] else set()
        # `target` and `prompts` have what these come to.
        names |= {"config", "chat_template_kwargs"}
        kept = {KEPT} & there.keys()  # which settings have where it is not the usual
        for key in [key for key in [*settings, *(kept - settings.keys())] if key not in names]:
            if there.get(key) != settings.get(key):
                raise ValueError(
                    f"{folder} holds conversations made with {key}={there.get(key)}, now "
                    f"{settings.get(key)}: give it back, or name another folder"
                )
        return
    if (folder / "index.json").is_file() or any(folder.glob("*-*.safetensors")):
        raise ValueError(f"{folder} holds an activation store: name another folder")
    if folder.is_dir() and any(PART.fullmatch(one.name) for one in folder.iterdir()):
        raise ValueError(
            f"{folder} holds conversations, and {MANIFEST} does not say which: delete the folder, "
            "or name another one"
        )
    write_atomically(path, json.dumps(settings, indent=2) + "\n")


def read_manifest(folder: Path) -> dict[str, Any]:
    """The settings with which the conversations of a folder were made.

    Raises:
        ValueError: there are none, or the file is damaged.
    """
    path = folder / MANIFEST
    if not path.is_file():
        raise ValueError(f"{folder} holds no conversations of `headstart regenerate`")
    with reading(str(path), "is damaged; delete the folder, and regenerate it"):
        manifest: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        if manifest["format"] != FORMAT:
            raise ValueError(
                f"{path} is of format {manifest['format']}, this version reads {FORMAT}: "
                "regenerate it"
            )
        if type(manifest["parts"]) is not int or manifest["parts"] < 0:
            raise TypeError(f"parts is {manifest['parts']!r}")
    return manifest


def template_variables(data: DataConfig) -> dict[str, Any]:
    """The variables of the chat template with which the texts of a run were asked for: those that
    the folder it reads was made with, else `data.chat_template_kwargs`.

    Raises:
        ValueError: both are there, and differ.
    """
    given, folder = data.chat_template_kwargs, data.store or data.conversations
    if folder is not None and (folder / MANIFEST).is_file():
        found = read_manifest(folder)
    elif folder is not None and (folder / "index.json").is_file():
        found = read_index(folder)
    else:
        return given
    made: dict[str, Any] = found.get("chat_template_kwargs") or {}
    if given not in ({}, made):
        raise ValueError(
            f"data.chat_template_kwargs={given}, but {folder} was asked with {made or 'none'}: "
            "leave it out"
        )
    return made


def part_path(folder: Path, number: int) -> Path:
    return folder / f"part-{number:05d}.parquet"


def part_paths(folder: Path, parts: int) -> list[Path]:
    """Of so many parts those that are there, in order: looked for in the folder, since somebody
    else's manifest may say any number."""
    names = (PART.fullmatch(path.name) for path in folder.iterdir())
    numbers = sorted({int(name[1]) for name in names if name})
    return [path for n in numbers if n < parts and (path := part_path(folder, n)).is_file()]


def write_part(
    path: Path,
    conversations: list[Conversation],
    tokenizer: PreTrainedTokenizerBase,
    target: str,
    revision: str | None,
) -> None:
    """Write answered conversations as one Parquet file, whole or not at all.

    Raises:
        OSError: with what to do, when the disk is full.
    """
    rows = []
    for c in conversations:
        ((start, _),) = c.spans
        rows.append(
            {
                "id": c.id,
                "category": c.category,
                "source": c.source,
                "prompt": tokenizer.decode(c.ids[:start]),
                "response": tokenizer.decode(c.ids[start:], skip_special_tokens=True),
                "prompt_ids": c.ids[:start],
                "response_ids": c.ids[start:],
                "temperature": c.temperature,
                "finish_reason": c.finish_reason,
                "target": target,
                "revision": revision,
            }
        )
    schema = SCHEMA.with_metadata({DIGEST: _digest(rows)})
    with atomic_file(path) as work:
        pq.write_table(pa.Table.from_pylist(rows, schema=schema), work, compression="zstd")


def _digest(rows: list[dict[str, Any]]) -> bytes:
    return hashlib.sha256(json.dumps(rows, sort_keys=True).encode()).hexdigest().encode()


def read_part(path: Path) -> list[Conversation]:
    """The conversations of one Parquet file.

    Raises:
        ValueError: it is cut short or damaged.
    """
    try:
        table = pq.read_table(path)
        rows = table.to_pylist()
        if (table.schema.metadata or {})[DIGEST] != _digest(rows):
            raise ValueError("its SHA-256 does not match")
    except (pa.ArrowException, OSError, KeyError, ValueError, OverflowError) as error:
        raise ValueError(refusal(path, f"is cut short or damaged ({error})")) from error
    names = ("id", "category", "source", "temperature", "finish_reason")
    return [
        answered(row["prompt_ids"], row["response_ids"], **{name: row[name] for name in names})
        for row in rows
    ]


def finished_parts(folder: Path) -> list[Path]:
    """The parts of a finished folder, in order.

    Raises:
        ValueError: the folder is unfinished.
    """
    count = read_manifest(folder)["parts"]
    parts = part_paths(folder, count)
    if len(parts) < count:
        raise ValueError(
            f"{folder} is unfinished: {count - len(parts)} of {count} parts are missing. Run the "
            "`headstart regenerate` command that made it again: it goes on where it stopped"
        )
    return parts


def read_folder(folder: Path) -> Iterator[Conversation]:
    """The conversations of a finished folder, a part at a time; errors as of `finished_parts` and
    `read_part`."""
    for path in finished_parts(folder):
        yield from read_part(path)


def cut(conversation: Conversation, max_tokens: int) -> list[Conversation]:
    """Cut a conversation into pieces of at most `max_tokens`, each with context before it.

    Every token that is drafted first in a round is so in exactly one piece; later drafts end with
    their piece. Each later piece begins with the conversation's first token (<bos>) and about half
    its length of context, on which nothing is trained.

    Args:
        conversation: any.
        max_tokens: 8 or more.
    """
    ids = conversation.ids
    if len(ids) <= max_tokens:
        return [conversation]
    pieces = []
    start, trained_from = 0, 0
    while True:
        lead = ids[:1] if start else []
        end = min(start + max_tokens - len(lead), len(ids))
        shift = len(lead) - start
        # A draft reads an assistant's token and predicts the one after it, so the last token that
        # the piece before trained is needed here as the first that is read.
        kept = [(max(a, trained_from - 1), min(b, end)) for a, b in conversation.spans]
        spans = [(a + shift, b + shift) for a, b in kept if a < b]
        if any(b - a > 1 for a, b in spans):
            name = f"{conversation.id}{PIECE}{start}"
            pieces.append(replace(conversation, id=name, ids=lead + ids[start:end], spans=spans))
        if end == len(ids):
            return pieces
        trained_from = end
        start = end - max_tokens // 2


def trainable(
    conversations: Iterable[Conversation], max_tokens: int, with_prompts: bool = False
) -> Iterator[Conversation]:
    """The pieces of conversations that something can be drafted in: two tokens of one answer.

    Raises:
        ValueError: prompts are trained on too, and a conversation is longer than `max_tokens`: the
            context that its later pieces begin with would be trained on as text of its own.
    """
    for conversation in conversations:
        if with_prompts and len(conversation.ids) > max_tokens:
            raise ValueError(
                f"the conversation {conversation.id} has {len(conversation.ids)} tokens, and "
                f"those above data.max_tokens={max_tokens} are cut, which "
                "data.completion_only_loss=false does not allow: raise that, or leave this out"
            )
        for piece in cut(conversation, max_tokens):
            if any(end - start > 1 for start, end in piece.spans):
                yield piece


def tokens_when_cut(conversations: Iterable[Conversation], max_tokens: int) -> int:
    """Tokens in all of these pieces."""
    return sum(len(piece.ids) for piece in trainable(conversations, max_tokens))


ASKED = (
    "prompts", "max_bad_rows", "chat_template_kwargs", "num_conversations", "max_prompt_tokens",
    "max_new_tokens", "temperatures",
)  # fmt: skip
"""Settings of `data` that say what is answered, and how. The seed is not among them: other answers
to the same prompts would do as well."""


def answer_sets() -> list[str]:
    """The names of the conversations that come with Headstart, such as `builtin:quickstart`."""
    return sorted(BUILTIN + folder.name for folder in _shipped_answers().iterdir())


def find_answers(name: str | Path) -> Path:
    """The folder of the conversations of that name; any other path, or name, as it is."""
    known = str(name) in answer_sets()
    return _shipped_answers() / str(name).removeprefix(BUILTIN) if known else Path(name)


def answers_name(folder: Path) -> str:
    """What a folder of conversations is called: `builtin:NAME` where it came with Headstart."""
    name = BUILTIN + folder.name
    return name if name in answer_sets() and folder == find_answers(name) else str(folder)


def _shipped_answers() -> Path:
    return Path(str(resources.files("headstart.data") / "answers"))


def taken_answers(target: Target, data: DataConfig) -> DataConfig:
    """The same settings with the folder of the built-in conversations that `data.conversations`
    names; without them, and with a line that says why, where this target would be asked something
    else, or is another than wrote them.

    Raises:
        ValueError: there are none of that name, or `data.filter` would choose from some that are
            not taken.
    """
    if data.store is not None or not data.shipped:
        return data
    folder = _named(data)
    made, reasons = read_manifest(folder), _other_settings(data, folder)
    if made["eos_ids"] != target.eos_ids:
        reasons.insert(0, "the tokens that end a text")
    if made["tokenizer"] != target.tokenizer_hash or not target.dtype_of(made["fingerprint"]):
        reasons.insert(0, f"the weights of the target (theirs is {made['target']})")
    if not reasons:
        return data.model_copy(update={"conversations": folder})
    why = f"{data.conversations} is not what this run asks for: it differs in {', '.join(reasons)}"
    if data.chooses:
        raise ValueError(f"{why}; data.filter would choose from it: leave that out")
    print_once(f"{why}. So {target.name} answers data.prompts itself")
    return data.model_copy(update={"conversations": None})


def planned_answers(config: Config) -> DataConfig:
    """What `taken_answers` will come to, as far as it can be told without the target.

    Raises:
        ValueError: there are no conversations of that name.
    """
    data = config.data
    if data.store is not None or not data.shipped:
        return data
    folder = _named(data)
    same = read_manifest(folder)["target"] == config.target.name
    same = same and not _other_settings(data, folder)
    return data.model_copy(update={"conversations": folder if same else None})


def _named(data: DataConfig) -> Path:
    name = str(data.conversations)
    if name not in answer_sets():
        raise ValueError(f"no built-in conversations {name}: there are {', '.join(answer_sets())}")
    return find_answers(name)


def _other_settings(data: DataConfig, folder: Path) -> list[str]:
    """Where `data` asks for something else than the recipe of the conversations in a folder."""
    theirs = load_config(SHIPPED / f"{folder.name}.yaml").data
    return [f"data.{key}" for key in ASKED if getattr(data, key) != getattr(theirs, key)]

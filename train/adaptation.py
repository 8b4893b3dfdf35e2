"""What `headstart adapt` is asked, what it takes where nobody says, and its prompts: those to train
on, and those held out."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from headstart.common.console import print_once
from headstart.configs.defaults import ADAPT
from headstart.configs.schema import Config, DataConfig, EvalConfig, SourceConfig
from headstart.configs.settings import AdaptConfig, Settings
from headstart.data.contamination import remove_contaminated
from headstart.data.prompts import Prompt, encode_usable, load_prompts
from headstart.data.sources import check_there
from headstart.data.splits import cluster, hold_out
from headstart.data.templates import encode_prompt
from headstart.eval.asked import as_the_head_was
from headstart.heads.kinds import check_drafts, kind_of
from headstart.heads.loading import load_target_tokens
from headstart.heads.saving import draft_position_offset, load_assistant_config
from headstart.heads.tokens import TargetTokens

HELD_OUT = "held_out.jsonl"  # in the report's folder: the prompts that are measured on


def adapt_defaults(head: str) -> list[tuple[str, Any]]:
    """Settings of an adaptation of the head, by folder or Hub id, where nobody says otherwise."""
    start = load_assistant_config(head)
    of_head: list[tuple[str, Any]] = [
        ("head.init_from", head),
        ("head.use_ordered_embeddings", start.use_ordered_embeddings),
    ]
    if kind_of(start).has_position:
        of_head.append(("train.draft_position_offset", draft_position_offset(start)))
    if (most := kind_of(start).most_drafts(start)) is not None:
        of_head.append(("train.num_speculative_steps", most))
        of_head.append(("eval.num_assistant_tokens", [min(most, 4)]))
    return [*of_head, *ADAPT]  # of one key the first counts


@dataclass(frozen=True)
class Adaptation:
    """What `headstart adapt` is asked."""

    head: str
    """The head to go on from, by folder or Hub id."""
    config: Config
    """Of the training: `target` is the tuned one, as it is served, and `data.prompts` are of its
    new work."""
    options: AdaptConfig
    """What to measure on, and for how long."""
    num_assistant_tokens: int
    """Draft length K at which the head is measured."""
    out: Path
    """Folder of the report; the head is in `run/head`."""


def read_adaptation(settings: Settings, head: str) -> Adaptation:
    """What the settings ask, of which `adapt_defaults` are the defaults.

    Raises:
        ValueError: a setting would be passed over, or there are several K.
    """
    d = settings.data
    own = {
        "data.store": d.store, "data.conversations": d.conversations, "data.online": d.online,
        "head.init_from": settings.head.init_from != head,
    }  # fmt: skip
    if given := [key for key, value in own.items() if value]:
        raise ValueError(f"{given[0]} is what adapt sees to itself: leave it out")
    if any(source.weight is not None for source in d.prompts):
        raise ValueError("data.prompts: adapt deals its prompts evenly, leave out weight")
    chosen = settings.eval or EvalConfig(num_assistant_tokens=[4])
    if odd := sorted(chosen.model_fields_set - {"num_assistant_tokens"}):
        raise ValueError(
            f"eval.{odd[0]} is not read: adapt measures on prompts of data.prompts that it holds "
            "out; leave it out, or set eval=null where a file has it"
        )
    if len(chosen.num_assistant_tokens) != 1:
        raise ValueError("adapt measures at one draft length: eval.num_assistant_tokens=4")
    start, tokens = load_assistant_config(head), chosen.num_assistant_tokens
    check_drafts(start, tokens, "eval.num_assistant_tokens")
    limited = kind_of(start).most_drafts(start) is not None
    judged = {"num_assistant_tokens": tokens} if limited else {}
    out, data, h = settings.output_dir, as_the_head_was(d, head), settings.head
    if not h.use_ordered_embeddings and h.on_existing_clusters == "keep":  # adapt's default
        h = h.model_copy(update={"on_existing_clusters": None})
    # Training keeps no copy of what is held out.
    update = {
        "output_dir": out / "run",
        "head": h,
        "data": data.model_copy(update={"store": out / "answers"}),
        "eval": EvalConfig.model_validate({"prompts": str(out / HELD_OUT)} | judged),
    }
    config = settings.of_run().model_copy(update=update)
    return Adaptation(head, config, settings.adapt, chosen.num_assistant_tokens[0], out)


Kinds = dict[str, list[tuple[SourceConfig, list[Prompt]]]]
"""`domain`, and where there are some `general` and `conversations` -> sources, and the prompts of
each."""


def load_kinds(a: Adaptation) -> Kinds:
    """Read the prompts; `ValueError`: a set is missing or malformed, or of prompts that the tuned
    target cannot be asked, or conversations have no answer."""
    others = {"general": a.options.general_prompts, "conversations": a.options.conversations}
    sources = {"domain": a.config.data.prompts}
    sources |= {kind: [source] for kind, source in others.items() if source is not None}
    for source in (one for own in sources.values() for one in own):  # before the first is read
        check_there(source.path)
    data, tokens = a.config.data, load_target_tokens(a.config.target)
    found: Kinds = {}
    for kind, own in sources.items():
        read = [(one, load_prompts(one, data.max_bad_rows)) for one in own]
        found[kind] = [
            # Conversations are encoded later, with their answers.
            (one, _answered(one, rows) if kind == "conversations" else _usable(rows, tokens, data))
            for one, rows in read
        ]
    return found


def _usable(prompts: list[Prompt], tokens: TargetTokens, data: DataConfig) -> list[Prompt]:
    """Those that the target can be asked: which are held out is drawn from them."""
    kwargs = data.chat_template_kwargs
    encoded = encode_usable(
        prompts, lambda p: encode_prompt(p, tokens.tokenizer, kwargs), data.max_bad_rows
    )
    return [p for p, ids in zip(prompts, encoded, strict=True) if ids is not None]


def _answered(source: SourceConfig, loaded: list[Prompt]) -> list[Prompt]:
    """Those that end with an answer."""
    kept = [p for p in loaded if not p.raw and p.question is not p.messages]
    without = len(loaded) - len(kept)
    if not kept:
        raise ValueError(
            f"adapt.conversations={source.path}: none of {without:,} ends with an answer: give "
            "them as data.prompts, which the target answers"
        )
    if without:
        print_once(f"{source.path}: {without:,} of {len(loaded):,} end with no answer: left out")
    return kept


Split = dict[str, tuple[list[Prompt], list[Prompt]]]
"""`domain`, and `general` where there is some -> prompts to train on, and held out."""


def split_prompts(a: Adaptation, loaded: Kinds) -> tuple[Split, list[Prompt]]:
    """The prompts of each kind, and the conversations: no source, no cluster of siblings (as far as
    there is such a split) and no copy is both trained on and held out.

    Raises:
        ValueError: a set is too small to hold out from.
    """
    held = a.options.held_out_prompts
    every = {k: [p for _, prompts in own for p in prompts] for k, own in loaded.items()}
    numbers = iter(cluster([prompt for own in every.values() for prompt in own]))
    clusters = {kind: list(islice(numbers, len(own))) for kind, own in every.items()}
    given, kinds = every.pop("conversations", []), every
    splits = {}
    for kind, own in kinds.items():
        try:
            splits[kind] = hold_out(
                own, clusters[kind], held, a.config.seed, "adapt.held_out_prompts"
            )
        except ValueError as error:
            raise ValueError(f"{_paths(loaded[kind])}: {error}") from error
    # Of one kind, siblings of what is held out of the other.
    whole = {kind for kind, split in splits.items() if not split.straddling}
    apart = {kind: {clusters[kind][i] for i in splits[kind].held_out} for kind in whole}
    parts = {}
    for kind, own in kinds.items():
        others = set().union(*(found for name, found in apart.items() if name != kind))
        split = splits[kind].without([i for i, c in enumerate(clusters[kind]) if c in others])
        split.tell(f"{kind} prompts")
        parts[kind] = ([own[i] for i in split.training], [own[i] for i in split.held_out])
    held_out = [prompt for _, own in parts.values() for prompt in own]
    found = {}
    for kind, (training, own) in parts.items():
        kept, copies = remove_contaminated(training, held_out)
        print_once(
            f"{kind}: {len(own)} prompts held out, {len(kept):,} to train on; {copies.describe()}"
        )
        if not (kept or a.options.measure_only) and (kind == "domain" or a.options.general_share):
            raise ValueError(
                f"{_paths(loaded[kind])}: no prompt is left to train on, since all are copies or "
                "siblings of those held out: add prompts, or lower adapt.held_out_prompts"
            )
        found[kind] = (kept, own)
    _check_validation(a, len(found["domain"][0]), _paths(loaded["domain"]))
    if given:
        siblings = set().union(*apart.values())
        numbered = zip(given, clusters["conversations"], strict=True)
        free = [prompt for prompt, number in numbered if number not in siblings]
        given, copies = remove_contaminated(free, held_out)
        print_once(f"conversations: {len(given):,} to train on; {copies.describe()}")
        if not (given or a.options.measure_only):
            raise ValueError(
                f"{_paths(loaded['conversations'])}: all are copies or siblings of prompts that "
                "are held out: give others"
            )
    return found, given


def _check_validation(a: Adaptation, left: int, paths: str) -> None:
    """Raise `ValueError` where conversations are all that is trained on, and too few prompts are
    left to validate on."""
    wanted = a.config.data.validation_conversations
    if not (a.options.answering_share or a.options.measure_only) and left < wanted:
        raise ValueError(
            f"{paths}: with adapt.answering_share=0 the training is validated on {wanted} of the "
            f"prompts that are not held out, and there are {left}: lower "
            "data.validation_conversations"
        )


def _paths(sources: Sequence[tuple[SourceConfig, list[Prompt]]]) -> str:
    return ", ".join(source.path for source, _ in sources)

"""What `headstart adapt` is asked, and what it takes where nobody says."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from headstart.configs.defaults import ADAPT
from headstart.configs.schema import Config, EvalConfig
from headstart.configs.settings import AdaptConfig, Settings
from headstart.eval.asked import as_the_head_was
from headstart.heads.kinds import check_drafts, kind_of
from headstart.heads.saving import draft_position_offset, load_assistant_config

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
    out, data = settings.output_dir, as_the_head_was(d, head)
    # Training keeps no copy of what is held out.
    update = {
        "output_dir": out / "run",
        "data": data.model_copy(update={"store": out / "answers"}),
        "eval": EvalConfig.model_validate({"prompts": str(out / HELD_OUT)} | judged),
    }
    config = settings.of_run().model_copy(update=update)
    return Adaptation(head, config, settings.adapt, chosen.num_assistant_tokens[0], out)

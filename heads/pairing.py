"""A head beside its target: built for it, started from a finished one, and checks that the two
belong together; the same for all kinds.

Letters: D target width, H head width, V vocabulary.
"""

from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from headstart.common.console import print_once
from headstart.configs.schema import HeadConfig
from headstart.heads.kinds import check_drafts, head_kind, kind_of
from headstart.heads.saving import (
    draft_position_offset,
    load_assistant,
    load_assistant_config,
    made_for,
)
from headstart.heads.target import Target

DRAFTS = 4  # K, where nobody says


def head_config(source: Any, head: HeadConfig, drafts: int) -> Any:
    """The configuration of the head that a run trains: that of the finished one which it starts
    from, or one of `head.kind`.

    Args:
        source: the target's text configuration.
        head: what is asked.
        drafts: K.

    Raises:
        ValueError: there is no such head, or it cannot draft K tokens.
    """
    if not head.warm:
        return head_kind(head.kind).configure(source, head, drafts)
    config = load_assistant_config(head.init_from)
    draft_position_offset(config)
    check_drafts(config, [drafts], "train.num_speculative_steps")
    if (most := kind_of(config).most_drafts(config)) not in (None, drafts):
        raise ValueError(
            f"train.num_speculative_steps={drafts} would leave {most - drafts} of the {most} "
            f"drafts of {head.init_from} untrained: train.num_speculative_steps={most}"
        )
    return config


def build_assistant(target: Target, head: HeadConfig, drafts: int = DRAFTS) -> Any:
    """A head of `head.kind` in float32 on the target's device, its table tied to the target's.

    A full-width head holds the target's own table as parameter (frozen, not copied). A narrower
    one holds an empty table: `DraftHead` goes through its projection, and only `save_assistant`
    materializes the product.

    Args:
        target: frozen.
        head: what is asked.
        drafts: K, for which it will be trained.
    """
    kind = head_kind(head.kind)
    config = kind.configure(target.config, head, drafts)
    cls: Any = kind.model_class(config)
    assistant = cls(config).to(target.device)
    width = config.get_text_config().hidden_size
    # Empty rather than meta: accelerate can move an empty tensor, but no meta tensor.
    empty = nn.Parameter(torch.empty(0, width, device=target.device), requires_grad=False)
    set_table(assistant, target.table if width == target.config.hidden_size else empty)
    with torch.no_grad(), target.full_source_layers():
        kind.init_weights(assistant, target, from_target=head.init_from == "target")
    return assistant


def warm_assistant(target: Target, path: str | Path) -> Any:
    """The finished head at `path`, a folder or a Hub id, in float32 to train on, with a dense LM
    head: clusters come after the trunk.

    Its table is frozen: a head as wide as the target is tied to this target's, a narrower one keeps
    its own.

    Raises:
        ValueError: there is no head at `path`, or it does not fit the target.
    """
    assistant: Any = load_assistant(path, torch.float32, target.device)
    check_pair(target, assistant)
    assistant.config.use_ordered_embeddings, assistant.masked_embedding = False, None
    full_width = assistant.config.get_text_config().hidden_size == target.config.hidden_size
    own = nn.Parameter(assistant.lm_head.weight.detach(), requires_grad=False)
    set_table(assistant, target.table if full_width else own)
    return assistant


def set_table(assistant: PreTrainedModel, table: nn.Parameter) -> None:
    """Tie the head's LM head, and embeddings of its own where it has some, to `table` [V, H], or to
    an empty one."""
    for name in kind_of(assistant.config).tables:
        assistant.get_submodule(name.removesuffix(".weight")).weight = table


def check_pair(target: Target, assistant: PreTrainedModel) -> None:
    """Raise `ValueError`, naming both values, where a head cannot belong to the target; say where
    it is only of another class than the heads of such a target."""
    check_shapes(target.config, assistant.config, target.name)
    kinds = [config.model_type for config in (target.config, assistant.config)]
    native = kind_of(assistant.config).engines
    if native and len({kind.startswith("gemma4_unified") for kind in kinds}) > 1:
        print_once(
            f"this head is a {kinds[1]}, and {target.name} a {kinds[0]}: it drafts the same here, "
            "but other engines choose their code by the class; see that it is of this target"
        )


def check_shapes(source: Any, head: Any, name: str) -> None:
    """`check_pair` of the configurations: `source` of the target's text part, `name` what to call
    the target."""
    for key, value, of_target in kind_of(head).mismatches(source, head):
        if value != of_target:
            raise ValueError(
                f"this head does not fit {name}: its {key} is {value}, and the target has "
                f"{of_target} there"
            )


def other_target(target: Target, assistant: PreTrainedModel) -> str | None:
    """A warning, naming both, where a head was made for another target than this one; None: it
    was not, or does not say.

    What it notes of its target is compared, and its table, where it is as wide as the target's and
    so should be the same.
    """
    made, mine = made_for(assistant.config), target.identity
    if made is not None and not _is_of(target, made):
        return (
            f"this head was trained for {made['name']} (fingerprint "
            f"{str(made['fingerprint'])[:12]}, {made['dtype']}), not for {mine['name']} "
            f"({str(mine['fingerprint'])[:12]}, {mine['dtype']}): expect fewer accepted "
            "drafts; `headstart adapt` trains it on"
        )
    if other := _other_rows(target.table, assistant.get_output_embeddings().weight):
        return (
            f"this head is as wide as {target.name}, and {other:,} rows of its table differ from "
            "those of the target: it was made for another, or before the target's table was "
            "trained; expect fewer accepted drafts; `headstart adapt` trains it on with the "
            "target's own"
        )
    return None


def _is_of(target: Target, made: dict[str, Any]) -> bool:
    """Whether what a head notes of its target is of this one, in this dtype or another. Where the
    weights cannot tell (a head of float32 weights, which these may be rounded from, or layers that
    are split over processes), the names have to."""
    mine = target.identity
    if target.dtype_of(made["fingerprint"]) is not None:
        return True
    unknown = made["dtype"] != mine["dtype"] and (made["dtype"] == "float32" or target.sharded)
    return unknown and made["name"] == mine["name"]


@torch.no_grad()
def _other_rows(table: torch.Tensor, own: torch.Tensor) -> int:
    """How many rows of a head's table [V, H] are not those of the target's [V, D]; 0 where it is
    narrower. Either may have been rounded to bfloat16."""
    if table.shape != own.shape:
        return 0
    other = 0
    for some, mine in zip(table.split(8192), own.to(table.device).split(8192), strict=True):
        some, mine = some.bfloat16(), mine.bfloat16()
        equal = torch.isclose(some, mine, rtol=2**-6, atol=1e-6)  # two steps of bfloat16
        other += int((~equal.all(dim=-1)).sum())
    return other

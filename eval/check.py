"""Whether a target, its adapters, heads and prompts are whole and fit together, without a run."""

from collections.abc import Callable, Sequence
from contextlib import redirect_stderr
from dataclasses import dataclass, field
from functools import partial
from io import StringIO
from typing import Any, Literal

from rich.table import Column, Table

from headstart.common.console import kept_lines, plain_console, print_once
from headstart.configs.schema import DataConfig, SourceConfig, TargetConfig
from headstart.data.prompts import (
    Prompt,
    encode_usable,
    load_prompt_set,
    load_prompts,
    schemas_of,
)
from headstart.data.templates import (
    check_template,
    encode_conversation,
    encode_prompt,
    encode_prompts,
)
from headstart.heads.kinds import kind_of
from headstart.heads.loading import load_served
from headstart.heads.pairing import check_pair, other_target
from headstart.heads.saving import load_assistant
from headstart.heads.structured import structured_output
from headstart.heads.target import Target


@dataclass
class Finding:
    """What became of one input."""

    kind: str
    """Target, adapter, tokenizer, head or prompts."""
    name: str
    result: Literal["good", "noted", "refused", "not checked"] = "good"
    """`noted`: it is taken, with what the lines say of it."""
    lines: list[str] = field(default_factory=list)
    """What it is, what was changed, or why it is refused."""
    error: Exception | None = None
    """Of a refusal."""


def check_inputs(
    t: TargetConfig, data: DataConfig, heads: Sequence[str], evaluated: str | None, device: Any
) -> list[Finding]:
    """Admit a target with its adapters, heads and prompts, as a run does; nothing is trained.

    Args:
        t: the target.
        data: with the prompts to train on, if any, and how prompts are asked.
        heads: folders or Hub ids.
        evaluated: the prompts of an evaluation; None: there are none.
        device: where the target is loaded.
    """
    loads: dict[str, Callable[[Target], str]] = {}
    for source in data.prompts:
        loads[source.path] = partial(_to_train_on, source, data)
    if evaluated is not None:
        loads[evaluated] = partial(_to_evaluate, evaluated, data)
    found: list[Finding] = []
    target = _admit(found, Finding("target", t.name), partial(load_served, t, device), _described)
    if target is None and t.adapters:  # which of them is it?
        found.clear()
        alone = t.model_copy(update={"adapters": []})
        _admit(found, Finding("target", t.name), partial(load_served, alone, device), _described)
        for number, adapter in enumerate(t.adapters):
            some = t.model_copy(update={"adapters": t.adapters[: number + 1]})
            if not _admit(found, Finding("adapter", adapter), partial(load_served, some, device)):
                break
    if target is None:
        why = ["the target, or an adapter, was refused"]
        judged = {(finding.kind, finding.name) for finding in found}
        rest = [("adapter", name) for name in t.adapters if ("adapter", name) not in judged]
        rest += [("head", name) for name in heads] + [("prompts", name) for name in loads]
        return found + [Finding(kind, name, "not checked", why) for kind, name in rest]
    found += [Finding("adapter", adapter) for adapter in t.adapters]
    found.append(Finding("tokenizer", target.name, lines=[_reading(target)]))
    for name in heads:
        _admit(found, Finding("head", name), partial(_head, name, target), str)
    for name, load in loads.items():
        _admit(found, Finding("prompts", name), partial(load, target), str)
    return found


def _admit(
    found: list[Finding],
    finding: Finding,
    load: Callable[[], Any],
    describe: Callable[[Any], str] = lambda loaded: "",
) -> Any:
    """What `load` gives, None where it refuses; the finding says which, in `found`."""
    found.append(finding)
    with kept_lines() as lines:
        try:
            loaded = load()
        except (ValueError, RuntimeError, OSError, ModuleNotFoundError) as error:
            finding.result, finding.lines = "refused", [" ".join(str(error).split())]
            finding.error = error
            return None
    finding.lines = [*filter(None, [describe(loaded)]), *lines]
    finding.result = "noted" if lines else "good"
    return loaded


def _described(target: Target) -> str:
    weights = sum(weight.numel() for weight in target.model.parameters())
    dtype = str(target.table.dtype).removeprefix("torch.")
    return (
        f"{type(target.model).__name__}, {weights:,} weights in {dtype}, "
        f"{target.config.num_hidden_layers} layers, fingerprint {target.fingerprint[:12]}"
    )


def _reading(target: Target) -> str:
    ends = [repr(target.tokenizer.convert_ids_to_tokens(token)) for token in target.eos_ids]
    has = "has a chat template" if target.tokenizer.chat_template else "has no chat template"
    return f"{len(target.tokenizer):,} tokens, {has}; texts end with {' or '.join(ends)}"


def _head(name: str, target: Target) -> str:
    """Load a head, hold it against the target, and describe it."""
    head: Any = load_assistant(name, target.table.dtype, target.device)
    check_pair(target, head)
    if warning := other_target(target, head):
        print_once(warning)
    weights = sum(weight.numel() for weight in head.parameters())
    lm_head = "ordered embeddings" if head.config.use_ordered_embeddings else "a full LM head"
    return f"{weights:,} weights, {kind_of(head.config).describe(head.config)}, {lm_head}"


def _to_evaluate(name: str, data: DataConfig, target: Target) -> str:
    """How many prompts there are; `ValueError` where an evaluation refuses one."""
    prompts = load_prompt_set(name)
    _check_forms(prompts, target)
    encode_prompts(prompts, target.tokenizer, data.chat_template_kwargs)
    return f"prompts: {len(prompts):,}"


def _to_train_on(source: SourceConfig, data: DataConfig, target: Target) -> str:
    """How many prompts there are and how many have answers; `ValueError` where more of them than
    `data.max_bad_rows` cannot be read, or the target's template refuses them."""

    def answered(prompt: Prompt) -> bool:
        encode_prompt(prompt, target.tokenizer, data.chat_template_kwargs)
        if prompt.messages[-1]["role"] != "assistant":
            return False
        variables = data.chat_template_kwargs
        encode_conversation(prompt, target.tokenizer, target.eos_ids, variables)
        return True

    with redirect_stderr(StringIO()) as counted:
        prompts = load_prompts(source, data.max_bad_rows)
        _check_forms(prompts, target)
        usable = [
            one for one in encode_usable(prompts, answered, data.max_bad_rows) if one is not None
        ]
    for line in counted.getvalue().splitlines():
        print_once(line)
    return f"prompts: {len(usable):,}, of them with an answer: {sum(usable):,}"


def _check_forms(prompts: Sequence[Prompt], target: Target) -> None:
    check_template(prompts, target)
    structured_output(target, schemas_of(prompts))


def print_findings(found: Sequence[Finding]) -> None:
    """Print one table.

    Raises:
        ValueError: something was refused.
    """
    name, what = (Column(header, overflow="fold") for header in ("name", "what"))
    table = Table("input", name, "result", what, show_lines=True)
    for finding in found:
        lines = "\n".join(f"- {line}" if len(finding.lines) > 1 else line for line in finding.lines)
        table.add_row(finding.kind, finding.name, finding.result, lines)
    plain_console().print(table)
    if refused := [finding for finding in found if finding.result == "refused"]:
        names = ", ".join(f"{finding.kind} {finding.name}" for finding in refused)
        raise ValueError(f"refused: {names}; the table says why") from refused[0].error

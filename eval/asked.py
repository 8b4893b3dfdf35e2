"""How the runs of heads asked their prompts, so that whoever judges the heads asks as they did."""

from collections.abc import Sequence
from pathlib import Path

from headstart.common.console import print_once
from headstart.common.files import put_back
from headstart.configs.loader import load_saved
from headstart.configs.schema import DataConfig
from headstart.data.conversations import template_variables
from headstart.eval.measurements import Asked
from headstart.heads.saving import load_assistant_config, noted_variables, split_pair


def asked_by_run(data: DataConfig) -> Asked:
    """How the run with these settings asked.

    Raises:
        ValueError: it reads texts that were asked with other variables than it names.
    """
    return Asked(template_variables(data), data.max_prompt_tokens)


def asked_by_heads(heads: Sequence[str]) -> Asked:
    """How the runs asked that heads came from, with a line that says so: as a head notes itself,
    else as the configuration of its run says; where there is neither, nothing is known.

    Args:
        heads: RUN/head or a folder of `headstart publish`, HEAD+ADAPTER, or any other name.

    Raises:
        ValueError: two runs asked with different variables, the configuration of one is damaged, or
            there is no head.
    """
    known = {head: asked for head in heads if (asked := _asked(head))}
    if not known:
        return Asked()
    (name, first), *others = known.items()
    for other, its in others:
        if its.chat_template_kwargs != first.chat_template_kwargs:
            raise ValueError(
                f"the run of {name} asked with data.chat_template_kwargs="
                f"{first.chat_template_kwargs}, that of {other} with {its.chat_template_kwargs}: "
                "evaluate them one by one"
            )
    if first.chat_template_kwargs:
        print_once(f"Prompts are asked as in the run of {name}: {first.chat_template_kwargs}")
    lengths = [its.max_prompt_tokens for its in known.values() if its.max_prompt_tokens]
    return Asked(first.chat_template_kwargs, min(lengths, default=None))


def _asked(head: str) -> Asked | None:
    folder = Path(split_pair(head)[0])
    put_back(folder)
    path = _config(head)
    noted = None
    if path is None or (folder / "config.json").is_file():
        noted = noted_variables(load_assistant_config(head))
    if path is None:
        return None if noted is None else Asked(noted)
    data = load_saved(path).data
    # A run says nothing of what its store was asked with, once that is gone.
    return asked_by_run(data) if noted is None else Asked(noted, data.max_prompt_tokens)


def _config(head: str) -> Path | None:
    """The configuration of the run that made a head, or the adapter of HEAD+ADAPTER."""
    whole, adapter = split_pair(head)
    folders = [Path(whole)]
    if adapter is not None:  # of RUN/head/adapter
        folders = [Path(adapter), Path(adapter).parent, *folders]
    for folder in folders:
        if (published := folder / "training_config.yaml").is_file():
            return published
        if folder.name == "head" and (saved := folder.parent / "config.yaml").is_file():
            return saved
    return None


def as_the_head_was(data: DataConfig, head: str) -> DataConfig:
    """Settings for texts that a head is to be trained on or judged by, with the variables of the
    chat template with which its own run asked, where none are given."""
    if "chat_template_kwargs" in data.model_fields_set or not (
        variables := asked_by_heads([head]).chat_template_kwargs
    ):
        return data
    return data.model_copy(update={"chat_template_kwargs": variables})

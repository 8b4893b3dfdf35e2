"""Where in the cache the answers and activations of a run are kept, by all that decides them; heads
that read less take what is there for heads that read more."""

from collections.abc import Callable
from pathlib import Path

from headstart.common.files import cache_dir
from headstart.configs.schema import DataConfig
from headstart.data.conversations import read_manifest, stable_hash
from headstart.data.regenerate import Job, conversation_settings
from headstart.data.store import kept_settings
from headstart.heads.target import KEYS_AND_VALUES, Inputs, Target


def answers_folder(
    target: Target, jobs: list[Job], data: DataConfig, seed: int, inputs: Inputs
) -> tuple[Path, Inputs]:
    """Where the target's answers are kept, with activations for heads that read `inputs` unless
    `data.online`; and what the activations there are of."""

    def folder(inputs: Inputs) -> Path:
        settings = conversation_settings(jobs, target, data, seed, not data.online, inputs)
        # What loads the target again is noted, but names no other conversations.
        named = {key: value for key, value in settings.items() if key != "config"}
        return _cache(data) / "conversations" / stable_hash(named)

    return _with_enough(inputs, folder)


def extraction_folder(target: Target, data: DataConfig, inputs: Inputs) -> tuple[Path, Inputs]:
    """Where the activations of `data.conversations` are kept, likewise."""
    assert data.conversations is not None, "the caller knows"
    settings = [
        read_manifest(data.conversations), target.fingerprint, str(target.table.dtype),
        data.teacher_top_k, data.storage, data.max_tokens,
    ]  # fmt: skip

    def folder(inputs: Inputs) -> Path:
        # Of keys and values alone as before there were heads without them.
        asked = [*settings, *filter(None, [kept_settings(inputs)])]
        return _cache(data) / "activations" / stable_hash(asked)

    return _with_enough(inputs, folder)


def _with_enough(inputs: Inputs, folder: Callable[[Inputs], Path]) -> tuple[Path, Inputs]:
    """The folder of what such heads read, and what is in it: their own, or the finished one of
    heads that read keys and values too."""
    own, fuller = folder(inputs), folder(KEYS_AND_VALUES)
    finished = [(one / "index.json").is_file() for one in (own, fuller)]
    if inputs.layers or inputs.prompts or finished[0] or not finished[1]:
        return own, inputs
    return fuller, KEYS_AND_VALUES


def _cache(data: DataConfig) -> Path:
    return data.cache_dir or cache_dir()

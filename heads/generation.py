"""The generation settings of a checkpoint: which are taken, and the neutral ones in their place.

`generate` fills whatever a call leaves open from the model's own settings. A repetition penalty, a
stop string or `use_cache: false` of a checkpoint would so change greedy text, and what is recorded
of it, without a word. Every target and draft model therefore gets neutral settings when it comes
in, and a call takes from the checkpoint's what it asks for by name.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from transformers import GenerationConfig, PreTrainedModel
from transformers.utils import cached_file

from headstart.heads.progress import say

FILE = "generation_config.json"
TAKEN = ("eos_token_id", "temperature", "top_k", "top_p")
"""What Headstart asks for: how texts end, and the target's own sampling (`TargetTokens`)."""
WITHOUT_EFFECT = (
    "bos_token_id", "pad_token_id", "do_sample", "max_length", "max_new_tokens",
    "cache_implementation", "cache_config", "disable_compile", "num_assistant_tokens",
    "num_assistant_tokens_schedule", "assistant_confidence_threshold", "transformers_version",
    "output_attentions", "output_hidden_states",
)  # fmt: skip
"""What every call says itself, or what changes no text; leaving it out is no news."""


def checkpoint_settings(path: str | Path, revision: str | None, config: Any) -> GenerationConfig:
    """The generation settings of a checkpoint.

    Args:
        path: folder or Hub id.
        revision: Hub revision.
        config: of the model, which may hold such settings where there is no file of them.

    Raises:
        ValueError: its generation_config.json cannot be read. transformers would go on without it,
            and texts would not end.
    """
    file = cached_file(
        str(path), FILE, revision=revision, _raise_exceptions_for_missing_entries=False
    )
    if file is None:
        return GenerationConfig.from_model_config(config)
    try:
        return GenerationConfig.from_pretrained(path, revision=revision)
    except (OSError, ValueError, TypeError, AttributeError) as error:
        reason = " ".join(str(error).split())
        raise ValueError(
            f"{file} cannot be read: {reason}; mend it, or delete it and give target.eos_token_ids"
        ) from error


def left_out(settings: GenerationConfig) -> dict[str, Any]:
    """The settings of a checkpoint that would change a text and are not taken."""
    neutral = GenerationConfig._get_default_generation_params()
    return {
        name: value
        for name, value in settings.to_diff_dict().items()
        if not name.startswith("_")
        and name not in (*TAKEN, *WITHOUT_EFFECT)
        and value is not None
        and value != neutral.get(name)
    }


def neutralize(
    model: PreTrainedModel, name: str, eos_ids: Sequence[int], pad_id: int | None
) -> None:
    """Give a model neutral generation settings, in place: a cache, one beam, greedy, no processors;
    say which of its own are left out.

    Args:
        model: whose `generation_config` is replaced, and whose configuration says that it caches.
        name: of the model, for the line.
        eos_ids: tokens that end a text, and nothing else does.
        pad_id: token that stands for none.
    """
    if dropped := left_out(model.generation_config):
        listed = ", ".join(f"{key}={value!r}" for key, value in dropped.items())
        say(f"{name}: generation settings of the checkpoint that are left out: {listed}")
    model.generation_config = GenerationConfig(
        use_cache=True,
        num_beams=1,
        do_sample=False,
        eos_token_id=list(eos_ids),
        pad_token_id=pad_id,
    )
    for config in (model.config, model.config.get_text_config()):
        config.use_cache = True  # forwards without `generate` read it there

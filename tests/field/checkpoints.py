"""Checkpoints on disk, as users bring them."""

import json
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerFast

from headstart.heads.tiny import byte_tokenizer, random_model
from tests.conftest import FAMILIES

GENERATION = {"eos_token_id": 1, "bos_token_id": 2, "pad_token_id": 0}


def saved_target(
    folder: Path,
    family: str = "gemma3",
    generation: dict[str, Any] | None = None,
    tokenizer: PreTrainedTokenizerFast | None = None,
    **config: Any,
) -> str:
    """A folder with a tiny random target of a family, the same weights each time.

    Args:
        folder: where to.
        family: of `FAMILIES`.
        generation: of generation_config.json, beside `GENERATION`; None: there is none.
        tokenizer: of the folder; None: the byte tokenizer.
        config: put into config.json as it is.
    """
    random_model(FAMILIES[family]).save_pretrained(folder)
    (tokenizer or byte_tokenizer()).save_pretrained(folder)
    file = folder / "generation_config.json"
    file.unlink()
    if generation is not None:
        file.write_text(json.dumps(GENERATION | generation))
    edit_json(folder / "config.json", **config)
    return str(folder)


def edit_json(path: Path, **changes: Any) -> None:
    """Put keys into a JSON file, into its `text_config` too where it has one."""
    content = json.loads(path.read_text())
    content.update(changes)
    if "text_config" in content:
        content["text_config"].update(changes)
    path.write_text(json.dumps(content))

"""Small checkpoints and adapters on disk, and ways to make of them what people have."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import torch
from peft import LoraConfig, get_peft_model
from peft.tuners.lora import LoraLayer
from safetensors.torch import load_file, save_file
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from headstart.configs.schema import HeadConfig
from headstart.heads.loading import byte_tokenizer, random_model, tiny_target
from headstart.heads.pairing import build_assistant
from headstart.heads.saving import save_assistant
from headstart.heads.target import Target
from tests.helpers.models import FAMILIES

IDS = torch.tensor([[2, 70, 71, 72, 73, 74]])
LFS_POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 536223056\n"
LORA: dict[str, Any] = {"r": 2, "target_modules": ["q_proj", "up_proj"]}
TEXT_OF_MULTIMODAL = r".*language_model\.layers\.\d+\.(self_attn\.q_proj|mlp\.up_proj)"


def family(name: str) -> PreTrainedModel:
    """A tiny model of a family of tests/conftest.py, the same each time."""
    return random_model(FAMILIES[name])


def checkpoint(folder: Path, model: PreTrainedModel) -> str:
    """Model and tokenizer in a folder."""
    model.save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return str(folder)


def rewrite(
    folder: str | Path, change: Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]]
) -> str:
    """Change the weights of a folder: of a checkpoint, or of an adapter."""
    path = next(Path(folder).glob("*model.safetensors"))
    tensors = {name: tensor.clone() for name, tensor in change(load_file(path)).items()}
    save_file(tensors, path, metadata={"format": "pt"})
    return str(folder)


def rename(folder: str | Path, change: Callable[[str], str]) -> str:
    """Change the names of the weights of a folder."""
    return rewrite(folder, lambda weights: {change(key): w for key, w in weights.items()})


def configure(folder: str | Path, name: str = "config.json", **changes: Any) -> str:
    """Change what a JSON file of a folder says."""
    path = Path(folder) / name
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    return str(folder)


def logits(model: PreTrainedModel) -> torch.Tensor:
    """[1, T, V] of `IDS`."""
    with torch.no_grad():
        return cast(torch.Tensor, model.eval()(input_ids=IDS).logits)


def adapter(folder: Path, model: PreTrainedModel, **lora: Any) -> tuple[str, torch.Tensor]:
    """A trained adapter in a folder, and peft's own logits of the model with it.

    Args:
        folder: where to.
        model: that it is of; peft's layers are in it afterwards.
        lora: of `LoraConfig`, beside `LORA`.
    """
    torch.manual_seed(0)
    wrapped = get_peft_model(model, LoraConfig(**(LORA | lora)))
    for module in wrapped.modules():
        if isinstance(module, LoraLayer):
            for b in (*module.lora_B.values(), *module.lora_embedding_B.values()):
                torch.nn.init.normal_(b.weight if isinstance(b, torch.nn.Linear) else b, std=0.3)
            for magnitude in module.lora_magnitude_vector.values():
                cast(torch.Tensor, magnitude.weight).data.mul_(1.3)
    wrapped.save_pretrained(str(folder))
    return str(folder), logits(cast(PreTrainedModel, wrapped))


GENERATION = {"eos_token_id": 1, "bos_token_id": 2, "pad_token_id": 0}


def saved_target(
    folder: Path,
    name: str = "gemma3",
    generation: dict[str, Any] | None = None,
    tokenizer: PreTrainedTokenizerFast | None = None,
    **config: Any,
) -> str:
    """A folder with a tiny random target of a family.

    Args:
        folder: where to.
        name: of the family.
        generation: of generation_config.json, beside `GENERATION`; None: there is none.
        tokenizer: of the folder; None: the byte tokenizer.
        config: put into config.json.
    """
    checkpoint(folder, family(name))
    if tokenizer is not None:
        tokenizer.save_pretrained(folder)
    file = folder / "generation_config.json"
    file.unlink()
    if generation is not None:
        file.write_text(json.dumps(GENERATION | generation))
    return configure(folder, **config)


def make_adapter(folder: Path, name: str = "tiny-gemma4", seed: int = 0) -> str:
    """A LoRA adapter whose weights are not zero."""
    torch.manual_seed(seed)
    wrapped = get_peft_model(
        tiny_target(name), LoraConfig(r=2, target_modules=["q_proj", "up_proj"])
    )
    for module in wrapped.modules():
        if isinstance(module, LoraLayer):
            torch.nn.init.normal_(cast(torch.Tensor, module.lora_B["default"].weight), std=0.3)
    wrapped.save_pretrained(str(folder))
    return str(folder)


def saved_head(folder: Path, target: Target, dtype: torch.dtype = torch.float32, **h: Any) -> str:
    head: Any = build_assistant(target, HeadConfig(**h))
    width = head.config.text_config.hidden_size
    table = target.table if width == target.config.hidden_size else torch.randn(320, width)
    save_assistant(head, table, folder, 4, dtype)
    return str(folder)


def text_part(folder: str, **changes: Any) -> str:
    text = json.loads((Path(folder) / "config.json").read_text())["text_config"]
    return configure(folder, text_config=text | changes)

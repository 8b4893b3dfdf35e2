"""Low-rank adapters of a head: trained in place of its weights, saved beside it, added to it.

One base head then serves many tuned targets, each with an adapter of some hundred kilobytes.

Letters: r rank.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import nn

from headstart.configs.schema import LoraConfig
from headstart.heads.export import Assistant

ADAPTER = "adapter"  # its name within the model, and of its folder beside the head
PREFIX = "base_model.model."  # of peft's files: its wrapper's place for the model


def add_lora(assistant: Assistant, lora: LoraConfig) -> None:
    """Put a fresh adapter beside linear layers of a head, in place; it alone is trained then.

    Raises:
        ValueError: the head has no layers of these names.
    """
    from peft import inject_adapter_in_model

    inject_adapter_in_model(_peft_config(lora), assistant, adapter_name=ADAPTER)


def _peft_config(lora: LoraConfig) -> Any:
    from peft import LoraConfig as PeftLora

    alpha: Any = 2 * lora.rank if lora.alpha is None else lora.alpha  # peft takes fractions too
    return PeftLora(r=lora.rank, lora_alpha=alpha, target_modules=list(lora.targets))


def without_lora(
    weights: Mapping[str, torch.Tensor], scalings: Mapping[str, float], dtype: torch.dtype
) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """The weights of a head with its adapter added to them, and the adapter as peft keeps it.

    The adapter is rounded first: what is saved beside the head is then what was added to it. Of
    tensors, and not by peft's own merging, since the head trains on, and its layers may be split
    over processes.

    Args:
        weights: state dict of the head with the adapter in it, whole tensors: of a layer
            [out, in], and beside it A [r, in] and B [out, r].
        scalings: layer -> alpha / r.
        dtype: that the adapter is saved in.
    """
    merged, adapter = {}, {}
    for name, tensor in weights.items():
        if ".lora_" in name:
            adapter[PREFIX + name.replace(f".{ADAPTER}.", ".")] = tensor.to(dtype)
        else:
            merged[name.replace(".base_layer.", ".")] = tensor
    for layer, scaling in scalings.items():
        a, b = (adapter[f"{PREFIX}{layer}.lora_{which}.weight"].float() for which in "AB")
        merged[f"{layer}.weight"] = merged[f"{layer}.weight"].float() + scaling * (b @ a)
    return merged, adapter


def scalings_of(assistant: nn.Module) -> dict[str, float]:
    """Layer -> alpha / r, of the layers that have an adapter; none: the head has no adapter."""
    return {
        name: module.scaling[ADAPTER]
        for name, module in assistant.named_modules()
        if hasattr(module, "lora_A")
    }


def write_adapter(
    head: Path, adapter: dict[str, torch.Tensor], lora: LoraConfig, base: str
) -> None:
    """Write the folder `adapter` beside a head, which peft loads onto the head `base`.

    Args:
        head: folder of the head.
        adapter: of `without_lora`.
        lora: rank, alpha and targets.
        base: folder or Hub id of the head that it is of.
    """
    config = _peft_config(lora)
    config.base_model_name_or_path, config.inference_mode = base, True
    folder = head / ADAPTER
    folder.mkdir()
    config.save_pretrained(folder)
    tensors = {name: tensor.contiguous().cpu() for name, tensor in adapter.items()}
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})

"""Weights that say nothing: NaN or infinity, zeros in a head, codes of a quantization without
scales.

`from_pretrained` casts whatever a file holds to the dtype that it is asked for. Of int8 or fp8
codes it so makes numbers that are off by each row's scale, without a word.
"""

import re
from collections.abc import Collection, Iterable, Mapping
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import nn
from transformers import PreTrainedModel


def is_finite(tensor: torch.Tensor) -> bool:
    """Whether a tensor of any shape holds numbers alone; integers always do."""
    if not tensor.is_floating_point() or not tensor.numel():
        return True
    # The extremes of a tensor with a NaN are NaN; unlike `isfinite` this needs no memory.
    low, high = torch.aminmax(tensor.detach())
    return bool(torch.isfinite(low) and torch.isfinite(high))


def check_weights(model: nn.Module, name: str) -> None:
    """Raise `ValueError`, naming it, where a parameter or buffer of a model that is not quantized
    is no number."""
    for tensor, weight in chain(model.named_parameters(), model.named_buffers()):
        if not is_finite(weight):
            raise ValueError(
                f"{name}: its weight {tensor} holds NaN or infinity: what it says is not to be "
                "trusted. Save it again from a state of the training that was whole, or download "
                "it anew"
            )


def check_alive(head: nn.Module, name: str) -> None:
    """Raise `ValueError`, naming it, where all drafts of a head would be alike, since what every
    one of them passes through is zero: its table, its projections, a norm outside its layers, or
    the factor of a layer."""
    for tensor, weight in chain(head.named_parameters(), head.named_buffers()):
        passed = ".layers." not in tensor or tensor.endswith("layer_scalar")
        if passed and weight.is_floating_point() and not weight.any():
            raise ValueError(
                f"{name}: all of its weight {tensor} is zero, so that its drafts say nothing: it "
                "was saved before its weights were there, or by a process that did not hold them. "
                "Save or download it again"
            )


NUMBERS = ("F64", "F32", "F16", "BF16")  # dtypes of safetensors
WEIGHTS = (".weight", "_proj")  # of a layer, and of all experts of a layer together
# In the names of what says how codes are meant: scales, bitsandbytes' statistics.
SCALES = re.compile(r"scale|absmax|SCB|quant")


def weight_dtypes(folder: Path) -> dict[str, str]:
    """Name of each tensor in the safetensors files of a model or an adapter -> its dtype there."""
    dtypes = {}
    for path in sorted(folder.glob("*model*.safetensors")):
        with safe_open(path, framework="pt") as file:
            for key in file.keys():  # noqa: SIM118
                dtypes[key] = str(file.get_slice(key).get_dtype())
    return dtypes


def check_codes(name: str, dtypes: Mapping[str, str], quantization: Any = None) -> None:
    """Raise `ValueError` where weights are codes with nothing beside them by which they would be
    numbers, or where config.json names a quantization of weights that are none of it, as after
    adapters were merged into the weights before they were quantized.

    Args:
        name: of the checkpoint.
        dtypes: of its tensors, `weight_dtypes`.
        quantization: `quantization_config` of its config.json; None: there is none.
    """
    bare = [key for key in _codes(dtypes) if not _scales(key, dtypes)]
    if bare:
        raise ValueError(
            f"{name}: {len(bare)} of its weights are {dtypes[bare[0]]} and have no scale beside "
            f"them (first: {bare[0]}): they are codes of a quantization, and no numbers. Save it "
            "again in bfloat16 after its quantization was undone, or copy all of its files; if it "
            "was only cast, cast it back"
        )
    if quantization is not None and dtypes and set(dtypes.values()) <= set(NUMBERS):
        raise ValueError(
            f"{name}: its config.json has a quantization_config, and its weights are plain numbers "
            f"({', '.join(sorted(set(dtypes.values())))}): delete it there; how the target is "
            "served is said by target.quantization (--quantization)"
        )


def check_read(
    model: PreTrainedModel, name: str, dtypes: Mapping[str, str], unread: Collection[str]
) -> None:
    """Raise `ValueError` where codes were loaded as numbers, since nobody has read their scales,
    which are among the tensors `unread` of no layer."""
    state = model.state_dict()
    for key in _codes(dtypes):
        scales = _scales(key, unread)
        if scales and key in state and state[key].is_floating_point():
            raise ValueError(
                f"{name}: its weight {key} is {dtypes[key]}, and {scales[0]} beside it is of no "
                "quantization_config that config.json names and transformers reads: copy "
                "config.json from where the weights are from, or save it again in bfloat16 after "
                "its quantization was undone"
            )


def _codes(dtypes: Mapping[str, str]) -> list[str]:
    return [key for key in dtypes if key.endswith(WEIGHTS) and dtypes[key] not in NUMBERS]


def _scales(key: str, others: Iterable[str]) -> list[str]:
    """The tensors that say how the codes in `key` are meant."""
    prefix = key.removesuffix("weight")
    return [k for k in others if k.startswith(prefix) and SCALES.search(k.removeprefix(prefix))]

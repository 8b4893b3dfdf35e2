"""Numbers that say nothing: a NaN or an infinity in weights or logits, weights of a head that are
zero.
"""

from itertools import chain

import torch
from torch import nn

from headstart.heads.targets import Target


def is_finite(tensor: torch.Tensor) -> bool:
    """Whether a tensor of any shape holds numbers alone; integers always do."""
    if not tensor.is_floating_point() or not tensor.numel():
        return True
    # The extremes of a tensor with a NaN are NaN; unlike `isfinite` this needs no memory.
    low, high = torch.aminmax(tensor.detach())
    return bool(torch.isfinite(low) and torch.isfinite(high))


def check_weights(model: nn.Module, name: str) -> None:
    """Raise where a model has a weight that is no number.

    Args:
        model: whose parameters and buffers are read, quantized ones aside.
        name: of the model.

    Raises:
        ValueError: with the name of the tensor.
    """
    for tensor, weight in chain(model.named_parameters(), model.named_buffers()):
        if not is_finite(weight):
            raise ValueError(
                f"{name}: its weight {tensor} holds NaN or infinity: what it says is not to be "
                "trusted. Save it again from a state of the training that was whole, or download "
                "it anew"
            )


def check_alive(head: nn.Module, name: str) -> None:
    """Raise where all drafts of a head would be alike, since what every one of them passes through
    is zero: its table, its projections, a norm outside its layers, or the factor of a layer.

    Args:
        head: in the native format.
        name: of the head.

    Raises:
        ValueError: with the name of the tensor.
    """
    for tensor, weight in chain(head.named_parameters(), head.named_buffers()):
        passed = ".layers." not in tensor or tensor.endswith("layer_scalar")
        if passed and weight.is_floating_point() and not weight.any():
            raise ValueError(
                f"{name}: all of its weight {tensor} is zero, so that its drafts say nothing: it "
                "was saved before its weights were there, or by a process that did not hold them. "
                "Save or download it again"
            )


@torch.no_grad()
def check_logits(target: Target) -> None:
    """Raise where a target's logits after one token are no numbers, though its weights are.

    Raises:
        ValueError: with the target's dtype, in which they overflow.
    """
    first = target.tokenizer.bos_token_id or target.eos_ids[0]
    hidden = target.activations(torch.tensor([[first]], device=target.device)).hidden
    logits = target.logits(hidden)
    if logits.min() == logits.max():
        raise ValueError(
            f"{target.name}: all of its logits are {float(logits.max()):g}: its weights say "
            "nothing. Save or download it again"
        )
    if not is_finite(logits):
        raise ValueError(
            f"{target.name}: its logits are NaN or infinite in {target.table.dtype}, though its "
            "weights are numbers: try target.dtype=float32"
        )

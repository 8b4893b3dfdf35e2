"""Whether weights can be packed on the machine that runs the tests."""

from functools import cache

import torch

from headstart.heads.cpu_linear import Packed


@cache
def packs_here(dtype: torch.dtype) -> bool:
    """oneDNN packs bfloat16 only where the processor has some of the instructions for it."""
    try:
        Packed()(torch.ones(4, 4, dtype=dtype), torch.ones(2, 4, dtype=dtype))
    except RuntimeError:
        return False
    return True

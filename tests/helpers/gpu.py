"""What the sections of tests/gpu_proof.py measure with, and the target that they measure.

Letters: V vocabulary.
"""

import contextlib
import signal
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from transformers import Gemma4ForCausalLM, Gemma4TextConfig

from headstart.common.machine import synchronize
from headstart.data.conversations import Conversation, answered
from headstart.heads.describe import SHAPES
from headstart.heads.loading import byte_tokenizer, gemma4_text_config, random_model
from headstart.heads.target import Target


class Place:
    """Where the proof runs, and how large its models are there.

    Args:
        device: of the proof.
        out: folder of the results.
    """

    def __init__(self, device: torch.device, out: Path):
        self.device, self.out = device, out
        self.real = device.type == "cuda"
        """Whether shapes are those of a published target."""
        self.dtype = torch.bfloat16 if self.real else torch.float32
        self._target: Target | None = None

    def large_target(self) -> Target:
        """A target with random weights: on a GPU in the shape of E4B, elsewhere tiny."""
        if self._target is None:
            config = (
                Gemma4TextConfig(**SHAPES["gemma-4-E4B"]) if self.real else gemma4_text_config()
            )
            config.initializer_range = 0.02
            torch.set_default_dtype(self.dtype)
            try:
                with self.device:
                    model = random_model(lambda: Gemma4ForCausalLM(config))
            finally:
                torch.set_default_dtype(torch.float32)
            self._target = Target(model, byte_tokenizer(), "E4B's shape" if self.real else "tiny")
        return self._target

    def scaled(self, real: int, tiny: int) -> int:
        return real if self.real else tiny


def seconds_of(device: torch.device, call: Callable[[], object], times: int = 5) -> float:
    """Median seconds of a call after one that is thrown away."""
    taken = []
    for _ in range(times + 1):
        synchronize(device)
        began = time.perf_counter()
        call()
        synchronize(device)
        taken.append(time.perf_counter() - began)
    return sorted(taken[1:])[times // 2]


@contextlib.contextmanager
def cudnn_attention(on: bool) -> Iterator[None]:
    before = torch.backends.cuda.cudnn_sdp_enabled()
    torch.backends.cuda.enable_cudnn_sdp(on)
    try:
        yield
    finally:
        torch.backends.cuda.enable_cudnn_sdp(before)


def weights(target: Target) -> int:
    return sum(p.numel() * p.element_size() for p in target.model.parameters())


def kernels(call: Callable[[], object]) -> dict[str, Any]:
    """Kernels of a call, and the share of its time that the device worked."""
    activities = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
    with torch.inference_mode():
        alone = seconds_of(torch.device("cuda"), call)
        with torch.profiler.profile(activities=activities) as profile:
            call()
            torch.cuda.synchronize()
    events = [e for e in profile.events() if e.device_type == torch.autograd.DeviceType.CUDA]
    busy = sum(e.time_range.elapsed_us() for e in events) / 1e6
    return {"kernels": len(events), "busy_seconds": busy, "seconds": alone, "busy": busy / alone}


class OverBudget(Exception):
    """A section takes longer than it may."""


@contextlib.contextmanager
def within(seconds: int) -> Iterator[None]:
    """Raise `OverBudget` within as soon as so many seconds are over and Python runs again."""

    def over(signum: int, frame: object) -> None:
        raise OverBudget(f"it took longer than its {seconds} seconds")

    before = signal.signal(signal.SIGALRM, over)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def random_texts(target: Target, count: int, length: int) -> list[Conversation]:
    vocabulary_size = len(target.table)
    generator = torch.Generator().manual_seed(0)
    rows = torch.randint(
        vocabulary_size // 4, vocabulary_size // 2, (count, length), generator=generator
    ).tolist()
    return [
        answered(row[: length // 4], row[length // 4 :], id=str(i), category="", source=str(i))
        for i, row in enumerate(rows)
    ]


def waits(call: Callable[[], object]) -> dict[str, int]:
    """Places where a call waits for the device, and how often."""
    torch.cuda.set_sync_debug_mode("warn")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        call()
    torch.cuda.set_sync_debug_mode("default")
    places = Counter(f"{Path(w.filename).name}:{w.lineno}" for w in caught)
    return dict(places.most_common())


def figures_of(report: dict[str, Any]) -> dict[str, Any]:
    """Of a report what a comparison needs, without texts and paths."""
    names = (
        "decoder", "num_assistant_tokens", "prompts", "acceptance_length",
        "acceptance_length_interval", "tokens_per_second", "baseline_tokens_per_second", "speedup",
        "speedup_interval", "equal_to_plain", "diverged_share",
    )  # fmt: skip
    rows = [r for r in report["results"] if (r["category"], r["looping_texts"]) == ("all", "with")]
    where = report["environment"]
    return {
        "dtype": where["dtype"],
        "prompt_set": where["prompt_set"],
        "max_new_tokens": where["max_new_tokens"],
        "verdict": report["verdict"],
        "noise": report["noise"],
        "results": [{name: row[name] for name in names} for row in rows],
    }

"""Bytes that the program's own functions hold at once over tensors of real shapes without data, for
the table beside the plan's: `python -m tests.helpers.fake_memory docs/results/memory.json`.

`FakeTensorMode` runs every operation for its shapes alone; `LiveBytes` counts the storages that are
alive. The device is called "cpu", since a torch without CUDA cannot index what is on "cuda";
attention is the one kernel of weight that differs there, and is replaced by what a GPU runs. What
depends on values is decided as if everything counted: all anchors, all positions. What an allocator
loses to rounding and fragments is left out.

Letters: B batch, T positions, R anchors, S of them in later rounds, K rounds, D target width, k
teacher tokens, V vocabulary.
"""

import contextlib
import gc
import json
import sys
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import PreTrainedModel

from headstart.common.machine import environment
from headstart.configs.loader import load_config
from headstart.configs.schema import Config
from headstart.data import regenerate
from headstart.data.conversations import answered
from headstart.data.documents import Stored
from headstart.data.extraction import Recorder, extract_tensors
from headstart.data.loader import Batch, CountedDrafts, StoredTexts
from headstart.data.regenerate import SamplingMixture, generate_tokens
from headstart.heads.describe import SHAPES, published_config
from headstart.heads.kinds import Rows
from headstart.heads.loading import byte_tokenizer
from headstart.heads.pairing import build_assistant
from headstart.heads.target import SUPPORTED, Target
from headstart.heads.tokens import Sampling
from headstart.heads.unroll import DraftHead
from headstart.train import step
from headstart.train.checkpoints import Average, Progress, RunState
from headstart.train.losses import Candidates
from headstart.train.memory import (
    BATCHES,
    StepShape,
    candidate_count,
    forward_length,
    step_shape,
)
from headstart.train.start import make_optimizer

aten = torch.ops.aten


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of the storages that operations within it make, for as long as they live."""

    def __init__(self) -> None:
        super().__init__()
        self.sizes: dict[int, int] = {}
        self.now = self.peak = 0

    @contextlib.contextmanager
    def measured(self) -> Iterator[None]:
        """Within, `peak` begins anew."""
        gc.collect()
        self.peak = self.now
        yield
        gc.collect()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = _decided(func, args, kwargs or {})
        given = [leaf for leaf in tree_leaves(args) if isinstance(leaf, torch.Tensor)]
        counted = not given or any(map(self._counts, given))
        for leaf in tree_leaves(found):
            if isinstance(leaf, torch.Tensor):
                self._add(leaf.untyped_storage(), counted)
        return found

    def _counts(self, tensor: torch.Tensor) -> bool:
        """Whether it is on the device: what is made of tensors of the machine's memory is there."""
        return self.sizes.get(tensor.untyped_storage()._cdata) != 0

    def on_host(self, tensor: torch.Tensor) -> torch.Tensor:
        """In place of `Tensor.cpu`: a copy in the machine's memory, which is not counted."""
        copied = tensor.clone()
        key = copied.untyped_storage()._cdata
        self.now, self.sizes[key] = self.now - self.sizes[key], 0
        return copied

    def _add(self, storage: Any, counted: bool) -> None:
        if storage._cdata not in self.sizes:
            self.sizes[storage._cdata] = storage.nbytes() * counted
            weakref.finalize(storage, self._free, storage._cdata)
            self.now += self.sizes[storage._cdata]
            self.peak = max(self.peak, self.now)

    def _free(self, key: int) -> None:
        self.now -= self.sizes.pop(key)


def _decided(func: Any, args: Any, kwargs: Any) -> Any:
    """The result of an operation; of one whose shape depends on values, the largest."""
    match func:
        case aten._local_scalar_dense.default:
            return args[0].dtype.is_floating_point and 1.0
        case aten.nonzero.default:
            return args[0].new_empty(args[0].numel(), args[0].ndim, dtype=torch.long)
        case aten._unique2.default:
            places = torch.empty_like(args[0], dtype=torch.long)
            return args[0].clone(), places, places.new_empty(0)
        case aten.index.Tensor | aten.index_put.default | aten._index_put_impl_.default:
            indices = [place for index in args[1] for place in _places(index)]
            return func(args[0], indices, *args[2:], **kwargs)
    return func(*args, **kwargs)


def _places(index: torch.Tensor | None) -> list[torch.Tensor | None]:
    """An index as it is; a mask as places: all of them."""
    if index is None or index.dtype != torch.bool:
        return [index]
    return [torch.empty(index.numel(), dtype=torch.long) for _ in range(index.ndim)]


def _attention_of_a_gpu(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attn_mask: torch.Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> torch.Tensor:
    """`scaled_dot_product_attention` as CUDA runs it without cuDNN's: under a mask the
    memory-efficient kernel, which takes it as a bias of the queries' dtype."""
    if attn_mask is None:
        flash = aten._scaled_dot_product_flash_attention
        return flash(query, key, value, dropout_p, is_causal, scale=scale)[0]
    bias = torch.zeros_like(attn_mask, dtype=query.dtype)
    bias = bias.masked_fill_(attn_mask.logical_not(), -torch.inf)
    if over := -bias.shape[-1] % 16:
        bias = F.pad(bias, (0, over))[..., : attn_mask.shape[-1]]
    bias = bias.expand(*query.shape[:3], key.shape[2])
    efficient = aten._scaled_dot_product_efficient_attention
    found = efficient(query, key, value, bias, query.requires_grad, dropout_p, scale=scale)
    return found[0]


_norm_of_a_cpu = F.rms_norm


def _norm_of_a_gpu(x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
    """`rms_norm` as CUDA runs it: one kernel, where a CPU makes three tensors of float32 on the
    way. What its gradient keeps is counted by the CPU's."""
    return _norm_of_a_cpu(x, *args, **kwargs) if torch.is_grad_enabled() else torch.empty_like(x)


@contextlib.contextmanager
def fake_tensors() -> Iterator[LiveBytes]:
    """Within, tensors have no data, and the bytes of those that are made are counted."""
    attention = patch.object(F, "scaled_dot_product_attention", _attention_of_a_gpu)
    norm = patch.object(F, "rms_norm", _norm_of_a_gpu)
    with FakeTensorMode(allow_non_fake_inputs=True), LiveBytes() as live, attention, norm:
        yield live


def fake_target(config: Config) -> Target:
    """The target of a run, one of those whose shapes are published."""
    shape = published_config(config.target.name)
    assert shape is not None
    torch.set_default_dtype(getattr(torch, config.target.dtype))
    try:
        model = SUPPORTED[shape.model_type](shape)
    finally:
        torch.set_default_dtype(torch.float32)
    return Target(model, byte_tokenizer(), config.target.name)


class _Enough(Exception):
    """A token has been chosen: its value would be asked for next."""


def _one_token(target: Target, config: Config, recorder: Recorder, run: int, given: int) -> None:
    """Go on with a batch by one token, half of them sampled: texts of `given` tokens, of which the
    last `run` have yet to run."""
    count, stock = config.data.generation_batch_size, SamplingMixture.__call__
    sampled = ([Sampling(0.0), Sampling(1.0, 64, 0.95)] * count)[:count]

    def once(self: SamplingMixture, logits: torch.Tensor, step: int) -> torch.Tensor:
        stock(self, logits, step)
        raise _Enough

    # Its tensors are of the CPU, and what is asked for is a GPU's memory.
    whole = patch.object(regenerate, "prefill_block", lambda ids: ids.shape[1])
    with patch.object(SamplingMixture, "__call__", once), whole, contextlib.suppress(_Enough):
        mixture = SamplingMixture(sampled, 0, 1, target.device)
        ids, mask = (torch.ones(count, n, dtype=torch.long) for n in (run, given))
        with torch.no_grad():
            generate_tokens(target, ids, mask, mixture, 1, recorder)


def answering_peak(live: LiveBytes, target: Target, config: Config) -> int:
    """Of the prefill and of the last step of a batch whose prompts and answers have the greatest
    length, recorded."""
    d = config.data
    last = d.max_prompt_tokens + d.max_new_tokens - 1
    with live.measured():
        recorder = Recorder(target, d.teacher_top_k, last)
        _one_token(target, config, recorder, d.max_prompt_tokens, d.max_prompt_tokens)
    prefill = live.peak
    recorder, dtype = Recorder(target, d.teacher_top_k, last), target.table.dtype
    own = target.config.num_hidden_layers - getattr(target.config, "num_kv_shared_layers", 0)
    for i in range(own):
        layer = target.config.per_layer_config[i]
        for rows in (last - 2, 1):  # the second lets go of what has left the window
            shape = (d.generation_batch_size, layer.num_key_value_heads, rows, layer.head_dim)
            pair = torch.empty(shape, dtype=dtype), torch.empty(shape, dtype=dtype)
            recorder.cache.update(*pair, i)
    del pair
    before = (d.generation_batch_size, last - 1, target.config.hidden_size)
    recorder.hidden.append(torch.empty(before, dtype=dtype))
    with live.measured():
        _one_token(target, config, recorder, 1, last)
        as_one = torch.cat(recorder.hidden, dim=1)  # as `tensors` begins
        del as_one
    return max(prefill, live.peak)


def extracting_peak(live: LiveBytes, target: Target, config: Config) -> int:
    """Of one forward, and of the logits of its rows."""
    batch, length = forward_length(config.data)
    ids, asked = [1] * length, length // 4
    texts = [answered(ids[:asked], ids[asked:], id="a", category="", source="")] * batch
    with live.measured(), patch.object(torch.Tensor, "cpu", lambda tensor: live.on_host(tensor)):
        extract_tensors(target, texts, config.data.teacher_top_k)
    return live.peak


def training_peak(live: LiveBytes, target: Target, config: Config) -> int:
    """Of the second of two steps: the first makes the optimizer's moments."""
    c, source = config.train, target.config
    dense = {"use_ordered_embeddings": False, "num_centroids": None}
    with patch.object(PreTrainedModel, "to", lambda self, *_: self):  # it is there already
        head = DraftHead(build_assistant(target, config.head.model_copy(update=dense)))
    optimizer = make_optimizer(head, c)
    average = Average(head.trainable(), c.ema_decay)
    state = RunState(head, head, optimizer, average, Progress())
    batches = [_batch(target, config) for _ in range(BATCHES)]
    count = candidate_count(source, c, step_shape(c, config.data))
    drawn = Candidates(
        torch.zeros(count, dtype=torch.long),
        torch.ones(count),
        torch.zeros(source.vocab_size, dtype=torch.long),
    )
    likely = torch.zeros(source.vocab_size, dtype=torch.bool)
    with patch.object(step, "step_candidates", lambda *_: drawn):
        for _ in range(2):
            with live.measured():
                step.optimizer_step(
                    state, batches[:1], likely, target, config, Accelerator(cpu=True)
                )
    return live.peak


def _batch(target: Target, config: Config) -> Batch:
    """The largest batch of a run."""
    c, k, dtype = config.train, config.train.num_speculative_steps, target.table.dtype
    shape = step_shape(c, config.data)
    b, t, top_k = shape.batch, shape.length, config.data.teacher_top_k
    r, s = shape.rounds[0] // b, shape.rounds[1] // b
    read = min(t, r + shape.drafts // b)

    def stored(*size: int) -> Stored:
        if config.data.storage == "target":
            return Stored(torch.empty(size, dtype=dtype), None, dtype)
        scale = torch.empty(*size[:-1], 1)
        return Stored(torch.empty(size, dtype=torch.int8), scale, dtype)

    kv = {}
    for kind, i in target.source_layers.items():
        layer = target.config.per_layer_config[i]
        size = (b, t, layer.num_key_value_heads, layer.head_dim)
        kv[kind] = (stored(*size), stored(*size))
    places = torch.zeros(b, r, dtype=torch.long)
    tokens, later = places.new_zeros(b, r, k), places.new_zeros(b, s)
    return Batch(
        document_ids=[],
        texts=StoredTexts(stored(b, read, target.config.hidden_size), kv),
        rows=Rows(places, places.clone(), places.clone(), tokens, later),
        teacher_ids=places.new_zeros(b, r, k, top_k),
        teacher_logprobs=torch.zeros(b, r, k, top_k),
        weights=torch.ones(b, r, k),
        drafts=_drafts(shape, b * read),
    )


def _drafts(shape: StepShape, positions: int) -> CountedDrafts:
    """All drafts of such a batch, each with a teacher of its own as far as there are any."""
    n = shape.drafts
    numbers, zeros = torch.zeros(n, dtype=torch.long), torch.zeros(n, dtype=torch.long)
    teachers = torch.zeros(min(n, positions), dtype=torch.long)
    return CountedDrafts(
        numbers, zeros, zeros.clone(), teachers, zeros.clone(), tuple(shape.rounds)
    )


PHASES = {
    "answering": answering_peak,
    "extracting": extracting_peak,
    "training": training_peak,
}
"""Phase of `train.memory.peaks` -> what measures it."""


def fake_peaks(config: Config, *phases: str) -> dict[str, int]:
    """Phase -> the most bytes that one process holds in it, of those named or of all; `weights`: of
    the target alone."""
    with fake_tensors() as live:
        target = fake_target(config)
        return {"weights": live.now} | {
            phase: PHASES[phase](live, target, config) for phase in phases or PHASES
        }


SETTINGS = [
    "target.dtype=bfloat16", "train.mixed_precision=bf16", "data.max_new_tokens=512",
    "data.generation_batch_size=32", "train.max_packed_length=4096", "train.multi_step_anchors=32",
]  # fmt: skip
"""Of the table in docs/how-to/many-gpus.md, beside the defaults."""


def main() -> None:
    found = {}
    for name in SHAPES:
        config = load_config(None, [f"target.name=google/{name}-it", *SETTINGS])
        found[name] = fake_peaks(config)
        print(name, found[name], flush=True)
    where = environment(torch.device("cpu"))
    content = {"settings": SETTINGS, "peak_bytes": found, "environment": where}
    Path(sys.argv[1]).write_text(json.dumps(content, indent=2) + "\n")


if __name__ == "__main__":
    main()

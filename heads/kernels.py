"""Kernels that do in one piece what transformers' layers do in many, around a target or a head.

RMSNorm is one kernel of torch's in place of eight or nine operations, which are most of what a step
of decoding starts.

Query heads that share a key head are given to torch's attention as rows over that key head, in
place of a copy of the keys for each of them. From transformers 5.23 on it is done there too, for a
single row under a mask. Without a mask, as in drafts, torch is told to share the keys, and on a CPU
in bfloat16 its kernel packs them for every head all the same (docs/upstream.md).

A long prefill under a mask goes by blocks of rows, each over the keys that some of its rows see: a
sliding layer's work then grows with the length of the text, and not with its square. Norms and MLPs
over many rows go by blocks too on a CPU: what lies between their operations then stays in its cache
and needs no new memory.

Linear layers on a CPU run by the quickest of several forms for their number of rows
(heads/cpu_linear.py). Top-k and top-p there look through the blocks of the vocabulary that have a
token to keep.

Whoever compares decoders puts all of them within: what these kernels gain is no decoder's merit.

Letters: B batch, H query heads, G key heads, R query rows, T rows of keys, D head width.
"""

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from math import gcd
from threading import Lock
from typing import Any, TypeGuard

import torch
import torch.nn.functional as F
from torch import nn
from transformers import (
    LogitsProcessorList,
    PreTrainedModel,
    TopKLogitsWarper,
    TopPLogitsWarper,
)
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from headstart.heads.cpu_linear import has_room_to_pack, linear_forward


@contextmanager
def fast_kernels(
    model: PreTrainedModel, small_batch: bool = True, packs: bool = True
) -> Iterator[None]:
    """Within, a model runs on these kernels, in training too.

    Without `small_batch` linear layers stay as they are over few rows: which form is quicker there
    is tried in each process, and what is stored must have the same bits in all of them. With
    `packs` linear layers may run over copies of their weights that are made within, where memory
    allows: the weights then have to stay as they are, and the context should last.

    The values are those of its own layers up to the rounding of another order of sums; those of the
    norms are the same bit for bit on a CPU. Left alone are layers whose forward somebody replaced,
    linear layers of other classes or with quantized weights, compiled layers (the compiler joins
    operations itself), the attention of models that run another than transformers' `sdpa`, and
    models that are trained with gradient checkpointing, whose layers run again outside.
    """
    if any(m.training and getattr(m, "gradient_checkpointing", False) for m in model.modules()):
        yield
        return
    layers = list(_layers(model))
    packs = packs and has_room_to_pack([m.weight for m in layers if _is_plain_on_cpu(m)])
    with ExitStack() as undo:
        for module in layers:
            if (forward := _fast_forward(module, small_batch, packs)) is not None:
                undo.callback(module.__dict__.pop, "forward", None)  # first: a signal may come
                module.forward = forward
        undo.enter_context(_grouped_heads(model))
        undo.enter_context(_rows_without_gaps(model.get_output_embeddings()))
        undo.enter_context(_quick_warpers(model))
        yield


def _layers(module: nn.Module) -> Iterator[nn.Module]:
    """A module and all within it, but for what is compiled."""
    if module._compiled_call_impl is None:
        yield module
        for child in module.children():
            yield from _layers(child)


def _fast_forward(
    module: nn.Module, small_batch: bool = True, packs: bool = False
) -> Callable[..., torch.Tensor] | None:
    """What the module is to run in place of its own forward; None: it keeps that."""
    if "forward" in module.__dict__:
        return None
    match type(module).__name__:
        case "Gemma4RMSNorm" | "Gemma4UnifiedRMSNorm":
            return partial(gemma4_norm, module)
        case "Gemma3RMSNorm":
            return partial(gemma3_norm, module)
        case "Gemma3MLP" | "Gemma4TextMLP" | "Gemma4UnifiedTextMLP":
            layers = [layer for layer in module.children() if layer is not module.act_fn]
            plain = all(_is_plain_on_cpu(layer) and not _is_watched(layer) for layer in layers)
            # The forward of its class, many rows by blocks.
            return partial(_by_blocks, partial(type(module).forward, module)) if plain else None
    return linear_forward(module, small_batch, packs) if _is_plain_on_cpu(module) else None


def _is_plain_on_cpu(module: nn.Module) -> TypeGuard[nn.Linear]:
    """Whether it is a linear layer on a CPU with weights of its own dtype: torchao keeps the layer
    and changes the weight."""
    return (
        type(module) is nn.Linear
        and type(module.weight) is nn.Parameter
        and module.weight.device.type == "cpu"
    )


def _is_watched(module: nn.Module) -> bool:
    """Whether somebody's own code runs with its forward, and would see blocks of the rows."""
    hooks = module._forward_hooks or module._forward_pre_hooks
    return "forward" in module.__dict__ or bool(hooks)


def _by_blocks(of_rows: Callable[[torch.Tensor], torch.Tensor], x: torch.Tensor) -> torch.Tensor:
    """A function of rows over x [..., width] on a CPU, many of them by blocks where no gradients
    are kept."""
    if x.numel() <= MANY or torch.is_grad_enabled():
        return of_rows(x)
    rows = x.flatten(0, -2)
    return torch.cat([of_rows(block) for block in rows.split(BLOCK)]).view_as(x)


def gemma4_norm(module: Any, x: torch.Tensor) -> torch.Tensor:
    """The forward of a `Gemma4RMSNorm` over [..., width]."""
    return _rms_norm(x, module.weight if module.with_scale else None, module.eps)


def gemma3_norm(module: Any, x: torch.Tensor) -> torch.Tensor:
    """The forward of a `Gemma3RMSNorm` over [..., width], which scales by 1 + weight."""
    return _rms_norm(x, 1.0 + module.weight.float(), module.eps)


def _rms_norm(x: torch.Tensor, scale: torch.Tensor | None, eps: float) -> torch.Tensor:
    of_rows = partial(_norm_of_rows, scale=scale, eps=eps)
    # On a CPU it is made of six operations.
    return _by_blocks(of_rows, x) if x.device.type == "cpu" else of_rows(x)


def _norm_of_rows(x: torch.Tensor, scale: torch.Tensor | None, eps: float) -> torch.Tensor:
    if scale is None or scale.dtype == x.dtype:
        return F.rms_norm(x, x.shape[-1:], scale, eps)
    # torch has no one kernel for two dtypes.
    return F.rms_norm(x.float(), x.shape[-1:], scale.float(), eps).type_as(x)


def best_tokens(logits: torch.Tensor) -> torch.Tensor:
    """`logits.argmax(-1)` of [B, V], the first of equals; on a CPU by way of the best of each
    block: it finds a largest value in a tenth of the time that it takes to find its place."""
    if logits.device.type != "cpu":
        return logits.argmax(-1)
    blocks = logits.unflatten(-1, (-1, gcd(logits.shape[-1], BLOCK)))
    best = blocks.amax(-1).argmax(-1, keepdim=True)  # [B, 1]
    inside = blocks.take_along_dim(best[..., None], 1)[:, 0].argmax(-1)
    return best[:, 0] * blocks.shape[-1] + inside


FEW = 128
"""Blocks of a vocabulary that are looked through in less time than all of it."""


def _at_least(row: torch.Tensor, least: torch.Tensor | float) -> torch.Tensor | None:
    """The places of logits [V] that are not below `least`, in order; None: they lie in more than
    `FEW` blocks."""
    blocks = _blocks(row)
    within = (~(blocks.amax(-1) < least)).nonzero()[:, 0]
    if len(within) > FEW:
        return None
    block, place = (~(blocks[within] < least)).nonzero().unbind(1)
    places = within[block] * BLOCK + place
    return places[places < len(row)]


def _blocks(row: torch.Tensor) -> torch.Tensor:
    """Logits [V] as [blocks, BLOCK], the last one filled up with minus infinity."""
    missing = -len(row) % BLOCK
    return (F.pad(row, (0, missing), value=-torch.inf) if missing else row).view(-1, BLOCK)


class QuickTopK(TopKLogitsWarper):
    """transformers' top-k. On a CPU it looks through the blocks alone that have a token of the k:
    a row of Gemma's takes a quarter of the time."""

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """Logits [B, V] -> the same, minus infinity for tokens outside the top-k."""
        rows = [self._of_row(row) for row in scores] if scores.device.type == "cpu" else [None]
        kept = [row for row in rows if row is not None]
        return torch.stack(kept) if len(kept) == len(rows) else super().__call__(input_ids, scores)

    def _of_row(self, row: torch.Tensor) -> torch.Tensor | None:
        blocks, k = _blocks(row), self.top_k
        if k > min(len(blocks), FEW):
            return None
        # Of k blocks none of which has a best below that of another block.
        best = blocks[blocks.amax(-1).topk(k).indices]
        places = _at_least(row, best.flatten().topk(k).values[-1])
        if places is None:
            return None
        return torch.full_like(row, self.filter_value).index_copy_(0, places, row[places])


class QuickTopP(TopPLogitsWarper):
    """transformers' top-p. On a CPU it looks at the tokens alone that are not ruled out yet, where
    they are few: after a top-k of 64 a row of Gemma's takes a hundredth of the time."""

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """Logits [B, V] -> the same, minus infinity for tokens outside the top-p."""
        if scores.device.type != "cpu":
            return super().__call__(input_ids, scores)
        least = torch.finfo(scores.dtype).min
        places = [_at_least(row, least) for row in scores]
        if any(few is None or not len(few) for few in places):
            return super().__call__(input_ids, scores)
        kept = torch.full_like(scores, self.filter_value)
        for row, of_row, few in zip(kept, scores, places, strict=True):
            row.index_copy_(0, few, super().__call__(input_ids, of_row[few][None])[0])
        return kept


def _quick(one: Any) -> Any:
    if type(one) is TopKLogitsWarper:
        return QuickTopK(one.top_k, one.filter_value, one.min_tokens_to_keep)
    if type(one) is TopPLogitsWarper:
        return QuickTopP(one.top_p, one.filter_value, one.min_tokens_to_keep)
    return one


@contextmanager
def _quick_warpers(model: Any) -> Iterator[None]:
    """Within, `generate` of a model makes its top-k and top-p the quick ones."""
    own = getattr(model, "_get_logits_processor", None)
    if own is None:
        yield
        return

    def processors(*args: Any, **kwargs: Any) -> LogitsProcessorList:
        return LogitsProcessorList(_quick(one) for one in own(*args, **kwargs))

    with _turn:
        ours = "_get_logits_processor" not in model.__dict__
        if ours:
            model._get_logits_processor = processors
    try:
        yield
    finally:
        if ours:
            del model._get_logits_processor


def groups_heads(rows: int, groups: int, width: int) -> bool:
    """Whether so many query rows are attended to by the group: masks [R, T] for each of its heads
    are then smaller than copies of the keys and values [G, T, D]."""
    return rows <= 2 * groups * width


BLOCK = 512
"""Rows of a long prefill that are attended from at once, or run through a norm or an MLP; tokens of
a vocabulary of which the best is found first."""
MANY = 2 << 20
"""Values of rows that take no longer all at once."""


def seen_keys(mask: torch.Tensor) -> slice:
    """The keys from the first to the last that some row of a mask [B or 1, 1, R, T] sees, True in
    it or not at minus infinity; all of them where no row sees any."""
    open_ = mask if mask.dtype == torch.bool else mask > torch.finfo(mask.dtype).min
    seen = open_.flatten(0, 2).any(dim=0).nonzero()
    return slice(int(seen[0]), int(seen[-1]) + 1) if len(seen) else slice(None)


def _in_blocks(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    outputs = []
    for start in range(0, query.shape[2], BLOCK):
        rows = slice(start, start + BLOCK)
        keys = seen_keys(mask[:, :, rows])
        one, _ = grouped_query_attention(
            module, query[:, :, rows], key[:, :, keys], value[:, :, keys], mask[:, :, rows, keys],
            **kwargs,
        )  # fmt: skip
        outputs.append(one)
    return torch.cat(outputs, dim=1), None


def grouped_query_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """transformers' `sdpa_attention_forward`: for queries [B, H, R, D], keys and values
    [B, G, T, D] and a mask [B or 1, 1, R, T] or None, the output [B, R, H, D] and no weights.

    A group's heads are rows, with a mask of their own each, as long as those masks are smaller than
    copies of the keys and values would be. Rows beyond `BLOCK` go by blocks where no gradients are
    kept. Several rows without a mask are left to transformers, which may take them for causal.
    """
    b, heads, rows, width = query.shape
    groups = key.shape[1]
    mask = attention_mask
    shared = rows == 1 if mask is None else mask.shape[1:3] == (1, rows)
    unknown = any(kwargs.get(name) is not None for name in ("position_bias", "softcap"))
    long = shared and rows > BLOCK and not torch.is_grad_enabled()
    if mask is not None and long and not unknown:
        return _in_blocks(
            module, query, key, value, mask, dropout=dropout, scaling=scaling, **kwargs
        )
    if unknown or not (shared and groups_heads(rows, groups, width)):
        return sdpa_attention_forward(
            module, query, key, value, mask, dropout=dropout, scaling=scaling, **kwargs
        )
    grouped = query.reshape(b, groups, heads // groups * rows, width)
    if mask is not None:
        mask = torch.cat([mask] * (heads // groups), dim=2)  # `repeat` takes four times as long
    seen = F.scaled_dot_product_attention(
        grouped, key, value, attn_mask=mask, dropout_p=dropout, scale=scaling
    )
    return seen.reshape(b, heads, rows, -1).transpose(1, 2).contiguous(), None


_grouped = Counter[nn.Module]()
"""Modules of the models whose heads are grouped, and by how many contexts."""
_turn = Lock()  # contexts of several threads may overlap


def _attention(module: nn.Module, *args: Any, **kwargs: Any) -> tuple[torch.Tensor, None]:
    """`grouped_query_attention` in those models, transformers' own in all others."""
    run = grouped_query_attention if module in _grouped else sdpa_attention_forward
    return run(module, *args, **kwargs)


def copied_keys(text: Any, layer: Any) -> bool:
    """Whether attention under a mask copies the keys and values for each query head: not where each
    has its own, and not where all share one, which is looked at as many times."""
    return bool(1 < layer.num_key_value_heads < text.num_attention_heads)


@contextmanager
def _grouped_heads(model: nn.Module) -> Iterator[None]:
    """Within, a model that runs `sdpa` attends by `grouped_query_attention`.

    It takes the place of transformers' function rather than a name of its own: what a model does
    about masks depends on whether it is called `sdpa` (`Gemma4TextModel` of 5.23 and newer would
    lose the order of tokens where it leaves out rows without a mask).
    """
    own = list(model.modules())
    with _turn:
        if not _grouped and ALL_ATTENTION_FUNCTIONS["sdpa"] is sdpa_attention_forward:
            ALL_ATTENTION_FUNCTIONS["sdpa"] = _attention
        _grouped.update(own)
    try:
        yield
    finally:
        with _turn:
            _grouped.subtract(own)
            for module in own:
                if not _grouped[module]:
                    del _grouped[module]
            if not _grouped and ALL_ATTENTION_FUNCTIONS["sdpa"] is _attention:
                ALL_ATTENTION_FUNCTIONS["sdpa"] = sdpa_attention_forward


@contextmanager
def _rows_without_gaps(lm_head: nn.Module | None) -> Iterator[None]:
    """Within, an LM head on a CPU is given its rows without gaps between them.

    A prefill cuts the last row out of each sequence. Over rows that lie apart torch's linear runs
    one product a sequence on a CPU, a minute for 64 prompts of Gemma 3 270M; and over a single one
    that remembers its sequence's stride it takes 40 times as long in bfloat16, half a second. Such
    a row passes for contiguous, so that `contiguous()` would leave it as it is.
    """
    if lm_head is None or next(lm_head.parameters()).device.type != "cpu":
        yield
        return
    hook = lm_head.register_forward_pre_hook(
        lambda module, args: (args[0].clone(memory_format=torch.contiguous_format),)
    )
    try:
        yield
    finally:
        hook.remove()

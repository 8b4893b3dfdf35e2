"""What a draft head is and what a draft of it should cost, from its configuration and the header
of its weights: `headstart heads describe`; and the shapes of Gemma 4 and its assistants as Google
published them, so that a plan needs no network.

Read in public sources, never in the weights: transformers' conversion scripts
(`models/gemma4/convert_gemma4_weights.py`, and for 12B
`models/gemma4_unified/convert_gemma4_unified_weights.py`) hold all fields below, and MaxText's
`configs/models/gemma4-*.yml` agree; google-deepmind/gemma (`gm/nn/gemma4/_gemma4.py`) agrees for
all but 12B, which it lacks. Defaults of transformers 5.22 that match no checkpoint are spelled out.
Sources part in one field, which changes no weight that a plan counts: for 12B the script has
`vocab_size_per_layer_input` 0 and the published config.json 262,144; there are no per-layer inputs.

The assistants' shapes are those of the same scripts in their later versions; the published
config.json was seen quoted for E2B (whole) and 12B (in part), for the others it was not.

Letters: D target width, H head width, V vocabulary, C clusters of M tokens.
"""

import re
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import torch
from rich.filesize import decimal
from rich.table import Table
from safetensors import safe_open
from torch import nn
from transformers import Gemma4TextConfig, Gemma4UnifiedTextConfig, GenerationConfig
from transformers.utils import cached_file

from headstart.common.console import plain_console
from headstart.configs.schema import HeadConfig
from headstart.heads.admission import reading
from headstart.heads.saving import load_assistant_config
from headstart.heads.target import SUPPORTED

WEIGHTS = "model.safetensors"
BUFFERS = ("layer_scalar", "token_ordering")  # stored with the weights, but no parameters
PARTS = {
    "model.embed_tokens.": "table",
    "lm_head.": "table",
    "masked_embedding.centroids.": "centroids",
    "masked_embedding.token_ordering": "token_ordering",
    "pre_projection.": "projections",
    "post_projection.": "projections",
    "": "layers",
}
"""Beginning of a tensor's name -> the part of the head that it belongs to; the first that fits."""


@dataclass(frozen=True)
class _Tensor:
    """One entry of a safetensors header."""

    name: str
    shape: tuple[int, ...]
    dtype: str

    @property
    def part(self) -> str:
        return next(part for start, part in PARTS.items() if self.name.startswith(start))

    @property
    def size(self) -> int:
        return prod(self.shape)

    @property
    def bits(self) -> int:
        """Of one value: `BF16` -> 16, `F8_E4M3` -> 8."""
        found = re.search(r"\d+", self.dtype)
        assert found is not None, f"a head holds no tensor of type {self.dtype}"
        return int(found[0])

    @property
    def bytes(self) -> int:
        return self.size * self.bits // 8


def describe(path: str | Path, target_config: Any | None = None) -> dict[str, Any]:
    """A head's shapes, parameters, bytes and estimated cost; no weights are read.

    The estimate counts each weight of a step once, at batch 1. What it leaves out: the rows of the
    KV cache, activations, the embedding lookup, and the Python around it all. `headstart bench
    draft` measures it.

    Args:
        path: a folder or a Hub id of a head in the native format.
        target_config: of its target (`load_target_config`), for the cost in target steps.

    Returns:
        Sizes in parameters and bytes. `parameters_trained`: without the table, but with the
        projection P [D, H] of a low-rank tie, whose product with the target's table the file holds.
        `bytes_by_part`: part -> dtype -> bytes. `draft_step` and, in the dtype of the head's table,
        `target_step`: bytes of weights read and multiply-adds. `c`: bytes of a draft step / bytes
        of a target step.

    Raises:
        ValueError: no head at `path`, a damaged file, or one that does not fit the target.
    """
    config = load_assistant_config(path)
    with reading(str(path), "is no head that can be described"):
        file, tensors = _header(path)
        text, target_width = config.text_config, config.backbone_hidden_size
        width, vocab_size = text.hidden_size, text.vocab_size
        tied, table = width == target_width, vocab_size * width
        counted = sum(t.size for t in tensors if not t.name.endswith(BUFFERS))
        bytes_by_part: dict[str, dict[str, int]] = {}
        for t in tensors:
            dtypes = bytes_by_part.setdefault(t.part, {})
            dtypes[t.dtype] = dtypes.get(t.dtype, 0) + t.bytes
        num_assistant_tokens = None
        with suppress(OSError):  # there need not be a generation_config.json
            num_assistant_tokens = GenerationConfig.from_pretrained(path).num_assistant_tokens
        figures: dict[str, Any] = {
            "head": str(path),
            "architecture": config.architectures[0],
            "layer_types": list(text.layer_types),
            "hidden_size": width,
            "target_hidden_size": target_width,
            "vocab_size": vocab_size,
            "tie": "full width" if tied else "low-rank",
            "parameters": counted,
            "parameters_trained": counted - table + (0 if tied else target_width * width),
            "parameters_shared": table if tied else 0,
            "parameters_materialised": 0 if tied else table,
            "bytes_on_disk": file.stat().st_size,
            "bytes_by_part": bytes_by_part,
            "num_assistant_tokens": num_assistant_tokens,
            "ordered_embeddings": None,
        }
        if config.use_ordered_embeddings:
            figures["ordered_embeddings"] = {
                "num_centroids": config.num_centroids,
                "tokens_per_centroid": vocab_size // config.num_centroids,
                "centroid_intermediate_top_k": config.centroid_intermediate_top_k,
            }
        figures["draft_step"] = _draft_step(figures, tensors)
        if target_config is not None:
            figures |= _beside_target(figures, tensors, target_config.get_text_config())
    return figures


def _header(path: str | Path) -> tuple[Path, list[_Tensor]]:
    """The file of weights and what its header lists."""
    with reading(f"no readable {WEIGHTS} at {path}"):
        file = Path(cached_file(path, WEIGHTS))
        with safe_open(file, framework="pt") as weights:
            slices = {name: weights.get_slice(name) for name in weights.keys()}  # noqa: SIM118
            return file, [
                _Tensor(name, tuple(s.get_shape()), s.get_dtype()) for name, s in slices.items()
            ]


def _draft_step(figures: dict[str, Any], tensors: list[_Tensor]) -> dict[str, dict[str, int]]:
    """Bytes of weights read and multiply-adds of one draft, part by part."""
    trunk = [t for t in tensors if t.part in ("layers", "projections")]
    bits, dense = _table_bits(tensors), figures["vocab_size"] * figures["hidden_size"]
    step = {
        "trunk": {
            "bytes": sum(t.bytes for t in trunk),
            # A vector scales or norms: its products are lost beside those of the matrices.
            "multiply_adds": sum(t.size for t in trunk if len(t.shape) == 2),
        },
        "lm_head_dense": {"bytes": dense * bits // 8, "multiply_adds": dense},
    }
    if (ordered := figures["ordered_embeddings"]) is not None:
        chosen = ordered["centroid_intermediate_top_k"] * ordered["tokens_per_centroid"]
        read = (ordered["num_centroids"] + chosen) * figures["hidden_size"]
        step["lm_head_ordered"] = {"bytes": read * bits // 8, "multiply_adds": read}
    return step


def _table_bits(tensors: list[_Tensor]) -> int:
    return next(t.bits for t in tensors if t.part == "table")


def _beside_target(
    figures: dict[str, Any], tensors: list[_Tensor], target_text_config: Any
) -> dict[str, Any]:
    for head_key, key in (("vocab_size", "vocab_size"), ("target_hidden_size", "hidden_size")):
        if (mine := figures[head_key]) != (its := getattr(target_text_config, key)):
            raise ValueError(
                f"this head does not fit the target: its {key} is {its}, the head is made for "
                f"{mine}"
            )
    weights, products = target_step_weights(target_text_config)
    # One dtype for both: the decoder loads the head in that of the target.
    target_bytes = weights * _table_bits(tensors) // 8
    draft = figures["draft_step"]
    return {
        "target_step": {"bytes": target_bytes, "multiply_adds": products},
        "c": {
            kind: (draft["trunk"]["bytes"] + draft[f"lm_head_{kind}"]["bytes"]) / target_bytes
            for kind in ("dense", "ordered")
            if f"lm_head_{kind}" in draft
        },
    }


def print_description(figures: dict[str, Any]) -> None:
    """Print what `describe` returns as one table."""
    table = Table(
        title=f"Draft head {figures['head']}",
        show_header=False,
        caption="A step counts each weight once, at batch 1; rows of the KV cache, activations and "
        "Python are left out. `headstart bench draft` measures it.",
    )
    for name, value in _rows(figures):
        table.add_row(name, value)
    plain_console().print(table)


def _rows(figures: dict[str, Any]) -> Iterator[tuple[str, str]]:
    types, ordered = figures["layer_types"], figures["ordered_embeddings"]
    yield "architecture", figures["architecture"]
    yield "layers", f"{len(types)} ({', '.join(types)})"
    yield "width", f"{figures['hidden_size']:,} (target: {figures['target_hidden_size']:,})"
    yield "vocabulary", f"{figures['vocab_size']:,} tokens"
    yield "tie to the target's table", figures["tie"]
    if ordered is not None:
        yield (
            "ordered embeddings",
            f"{ordered['num_centroids']:,} clusters of {ordered['tokens_per_centroid']:,} tokens, "
            f"the best {ordered['centroid_intermediate_top_k']:,} read a draft",
        )
    yield "num_assistant_tokens", str(figures["num_assistant_tokens"] or "not set")
    for kind in ("trained", "shared", "materialised"):
        yield f"parameters {kind}", f"{figures[f'parameters_{kind}']:,}"
    yield "on disk", decimal(figures["bytes_on_disk"])
    for part, dtypes in figures["bytes_by_part"].items():
        yield f"  {part}", ", ".join(f"{decimal(n)} {dtype}" for dtype, n in dtypes.items())
    steps = {f"draft step: {part}": cost for part, cost in figures["draft_step"].items()}
    if "target_step" in figures:
        steps["target step"] = figures["target_step"]
    for name, cost in steps.items():
        products = cost["multiply_adds"] / 1e6
        yield name, f"{decimal(cost['bytes'])} read, {products:,.2f} M multiply-adds"
    for kind, ratio in figures.get("c", {}).items():
        yield f"c by bytes, {kind}", f"{ratio:.3f}"


_ALL: dict[str, Any] = {
    "vocab_size": 262_144, "head_dim": 256, "global_head_dim": 512, "final_logit_softcapping": 30.0,
    "rope_parameters": {
        "full_attention": {
            "rope_type": "proportional", "rope_theta": 1_000_000.0, "partial_rotary_factor": 0.25,
        },
        "sliding_attention": {"rope_type": "default", "rope_theta": 10_000.0},
    },
}  # fmt: skip
_SMALL: dict[str, Any] = _ALL | {
    "num_attention_heads": 8, "sliding_window": 512, "max_position_embeddings": 131_072,
    "hidden_size_per_layer_input": 256, "vocab_size_per_layer_input": 262_144,
}  # fmt: skip
_LARGE: dict[str, Any] = _ALL | {
    "sliding_window": 1024, "max_position_embeddings": 262_144, "hidden_size_per_layer_input": 0,
    "attention_k_eq_v": True, "use_bidirectional_attention": "vision",
}  # fmt: skip


def _layers(sliding: int, repeats: int) -> dict[str, Any]:
    types = ["sliding_attention"] * sliding + ["full_attention"]
    return {"layer_types": types * repeats, "num_hidden_layers": len(types) * repeats}


SHAPES: dict[str, dict[str, Any]] = {
    "gemma-4-E2B": {
        **_SMALL, **_layers(4, 7), "hidden_size": 1536, "intermediate_size": 6144,
        "num_key_value_heads": 1, "num_kv_shared_layers": 20, "use_double_wide_mlp": True,
    },
    "gemma-4-E4B": {
        **_SMALL, **_layers(5, 7), "hidden_size": 2560, "intermediate_size": 10_240,
        "num_key_value_heads": 2, "num_kv_shared_layers": 18,
    },
    "gemma-4-12B": {
        **_LARGE, **_layers(5, 8), "hidden_size": 3840, "intermediate_size": 15_360,
        "num_attention_heads": 16, "num_key_value_heads": 8, "num_global_key_value_heads": 1,
    },
    "gemma-4-26B-A4B": {
        **_LARGE, **_layers(5, 5), "hidden_size": 2816, "intermediate_size": 2112,
        "num_attention_heads": 16, "num_key_value_heads": 8, "num_global_key_value_heads": 2,
        "enable_moe_block": True, "num_experts": 128, "top_k_experts": 8,
        "moe_intermediate_size": 704,
    },
    "gemma-4-31B": {
        **_LARGE, **_layers(5, 10), "hidden_size": 5376, "intermediate_size": 21_504,
        "num_attention_heads": 32, "num_key_value_heads": 16, "num_global_key_value_heads": 4,
    },
}  # fmt: skip
"""Checkpoint without its suffix -> its text configuration."""


def published_head(name: str) -> HeadConfig | None:
    """The shape of `google/gemma-4-NAME-it-assistant`: three sliding layers and a full one, KV
    heads of the target, clusters in the two small ones; None: it is none of the five."""
    checkpoint = name.removeprefix("google/").removesuffix("-it-assistant")
    if checkpoint not in SHAPES or name != f"google/{checkpoint}-it-assistant":
        return None
    small = checkpoint in ("gemma-4-E2B", "gemma-4-E4B")
    width = 256 if small else 1024
    return HeadConfig(
        num_hidden_layers=4,
        hidden_size=width,
        intermediate_size=8 * width,
        num_attention_heads=4 if small else SHAPES[checkpoint]["num_attention_heads"],
        use_ordered_embeddings=small,
    )


def published_config(name: str) -> Gemma4TextConfig | Gemma4UnifiedTextConfig | None:
    """The text configuration of `google/gemma-4-NAME` or `google/gemma-4-NAME-it`; None: it is none
    of the five."""
    shape = SHAPES.get(name.removeprefix("google/").removesuffix("-it"))
    if shape is None or not name.startswith("google/"):
        return None
    if "12B" not in name:
        return Gemma4TextConfig(**shape)
    unified = {k: v for k, v in shape.items() if k != "hidden_size_per_layer_input"}
    return Gemma4UnifiedTextConfig(**unified)


def target_step_weights(config: Any) -> tuple[int, int]:
    """What decoding one token takes of a target, counted without its weights.

    Args:
        config: the target's text configuration.

    Returns:
        Weights read, and multiply-adds: all but the embedding lookups, of the experts of a mixture
        those that one token is sent to, and the LM head V x D once.
    """
    with torch.device("meta"):  # shapes alone: no memory for weights
        model = SUPPORTED[config.model_type](config)
    tables = [m.weight for m in model.modules() if isinstance(m, nn.Embedding)]
    left_out = {id(p) for p in [*tables, model.get_output_embeddings().weight]}
    weights = products = config.vocab_size * config.hidden_size
    for parameter in model.parameters():
        if id(parameter) in left_out:
            continue
        used = parameter.numel()
        if parameter.ndim == 3:  # [experts, out, in]
            used = used * config.top_k_experts // config.num_experts
        weights += used
        products += used if parameter.ndim > 1 else 0
    return weights, products

"""What a draft head is and what a draft of it should cost, from its configuration and the header
of its weights: `headstart describe`; and the shapes of Gemma 4 and its assistants as Google
published them, so that a plan needs no network.

The shapes were read in public sources, never in the weights: transformers' conversion scripts
(`convert_gemma4_weights.py`, and for 12B `convert_gemma4_unified_weights.py`), with which MaxText
and google-deepmind/gemma agree. Defaults of transformers 5.22 that match no checkpoint are spelled
out. Of 12B the published config.json has another `vocab_size_per_layer_input`, which nothing reads
there. Of the assistants the published config.json was seen for E2B, and for 12B in part.

Letters: D target width, H head width, V vocabulary.
"""

import re
from collections import Counter
from collections.abc import Iterator
from contextlib import suppress
from math import prod
from pathlib import Path
from typing import Any, NamedTuple

import torch
from rich.table import Column, Table
from safetensors import safe_open
from torch import nn
from transformers import Gemma4TextConfig, Gemma4UnifiedTextConfig, GenerationConfig
from transformers.utils import cached_file

from headstart.common.console import plain_console
from headstart.configs.schema import HeadConfig
from headstart.heads.adapters import split_revision
from headstart.heads.admission import reading
from headstart.heads.kinds import head_kinds, kind_of
from headstart.heads.pairing import check_shapes
from headstart.heads.saving import load_assistant_config, split_pair
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


class _Tensor(NamedTuple):
    """One entry of a safetensors header."""

    name: str
    dtype: str
    size: int
    bytes: int

    @property
    def part(self) -> str:
        return next(part for start, part in PARTS.items() if self.name.startswith(start))


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
        `target_step`: bytes of weights read. `c`: bytes of a draft step / of a target step.

    Raises:
        ValueError: no head at `path`, a damaged file, or one that does not fit the target.
    """
    config = load_assistant_config(path)
    with reading(str(path), "is no head that can be described"):
        file, tensors = _header(path)
        text, target_width = config.get_text_config(), config.backbone_hidden_size
        width, vocab_size = text.hidden_size, text.vocab_size
        tied, table = width == target_width, vocab_size * width
        counted = sum(t.size for t in tensors if not t.name.endswith(BUFFERS))
        parts: dict[str, Counter[str]] = {}
        for t in tensors:
            parts.setdefault(t.part, Counter())[t.dtype] += t.bytes
        num_assistant_tokens = None
        with suppress(OSError):  # there need not be a generation_config.json
            name, revision = split_revision(split_pair(path)[0])
            settings = GenerationConfig.from_pretrained(name, revision=revision)
            num_assistant_tokens = settings.num_assistant_tokens
        figures: dict[str, Any] = {
            "architecture": config.architectures[0],
            "kind": kind_of(config).name,
            "shape": kind_of(config).describe(config),
            "hidden_size": width,
            "target_hidden_size": target_width,
            "vocab_size": vocab_size,
            "tie": "full width" if tied else "low-rank",
            "parameters": counted,
            "parameters_trained": counted - table + (0 if tied else target_width * width),
            "parameters_shared": table if tied else 0,
            "parameters_materialized": 0 if tied else table,
            "bytes_on_disk": file.stat().st_size,
            "bytes_by_part": parts,
            "num_assistant_tokens": num_assistant_tokens,
        }
        if config.use_ordered_embeddings:
            figures["ordered_embeddings"] = {
                "num_centroids": config.num_centroids,
                "tokens_per_centroid": vocab_size // config.num_centroids,
                "centroid_intermediate_top_k": config.centroid_intermediate_top_k,
            }
        return figures | _cost(config, tensors, target_config)


def _cost(config: Any, tensors: list[_Tensor], target_config: Any | None) -> dict[str, Any]:
    """`draft_step`, `target_step` and `c`."""
    text = config.get_text_config()
    of_table = next(t for t in tensors if t.part == "table")
    # One dtype for head and target: the decoder loads the head in that of the target.
    value = of_table.bytes / of_table.size
    trunk = sum(t.bytes for t in tensors if t.part in ("layers", "projections"))
    draft = {
        "trunk": round(trunk * kind_of(config).draft_share(config)),
        "lm_head_dense": of_table.bytes,
    }
    if config.use_ordered_embeddings:
        chosen = config.centroid_intermediate_top_k * (text.vocab_size // config.num_centroids)
        draft["lm_head_ordered"] = round((config.num_centroids + chosen) * text.hidden_size * value)
    if target_config is None:
        return {"draft_step": draft}
    source = target_config.get_text_config()
    check_shapes(source, config, "the target")
    target = round(target_step_weights(source) * value)
    kinds = [kind for kind in ("dense", "ordered") if f"lm_head_{kind}" in draft]
    c = {kind: (draft["trunk"] + draft[f"lm_head_{kind}"]) / target for kind in kinds}
    return {"draft_step": draft, "target_step": target, "c": c}


def _header(path: str | Path) -> tuple[Path, list[_Tensor]]:
    """The file of weights and what its header lists."""
    with reading(f"no readable {WEIGHTS} at {path}"):
        name, revision = split_revision(split_pair(path)[0])
        file, tensors = Path(cached_file(name, WEIGHTS, revision=revision)), []
        with safe_open(file, framework="pt") as weights:
            for name in weights.keys():  # noqa: SIM118
                entry = weights.get_slice(name)
                dtype, size = entry.get_dtype(), prod(entry.get_shape())
                found = re.search(r"\d+", dtype)  # of bits: `BF16`, `F8_E4M3`
                assert found is not None, f"a head holds no tensor of type {dtype}"
                tensors.append(_Tensor(name, dtype, size, size * int(found[0]) // 8))
        return file, tensors


def print_description(head: str, figures: dict[str, Any]) -> None:
    """Print what `describe` returns of the folder or Hub id `head` as one table."""
    table = Table(
        Column(no_wrap=True),
        Column(),
        title=f"Draft head {head}",
        show_header=False,
        caption="A step reads these bytes of weights, each once, at batch 1; rows of the KV cache, "
        "activations and Python are left out. `headstart bench draft` measures it.",
    )
    for name, value in _rows(figures):
        table.add_row(name, value)
    plain_console().print(table)


def _rows(figures: dict[str, Any], before: str = "") -> Iterator[tuple[str, str]]:
    for key, value in figures.items():
        name = before + key.replace("_", " ")
        if isinstance(value, dict):
            yield from _rows(value, f"{name}: ")
        elif isinstance(value, float):
            yield name, f"{value:.3f}"
        else:
            yield name, f"{value:,}" if isinstance(value, int) else str(value)


def print_kinds() -> None:
    """Print the kinds of heads as one table: what each reads of the target, what a draft of it
    costs, and what serves it beside Headstart's own decoder."""
    table = Table(title="Kinds of draft heads: head.kind=NAME", title_justify="left")
    for column in ("name", "reads of the target", "a draft costs", "served by"):
        table.add_column(column, no_wrap=column == "name")
    for name, kind in head_kinds().items():
        engines = ", ".join(kind.engines) or "Headstart alone: no engine takes one"
        table.add_row(name, kind.reads, kind.costs, engines)
    plain_console().print(table)


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


def target_step_weights(config: Any) -> int:
    """How many weights decoding one token reads of a target, counted without them: all but the
    embedding lookups, of the experts of a mixture those that one token is sent to, and the LM head
    V x D once.

    Args:
        config: the target's text configuration.
    """
    with torch.device("meta"):  # shapes alone: no memory for weights
        model = SUPPORTED[config.model_type](config)
    tables = [m.weight for m in model.modules() if isinstance(m, nn.Embedding)]
    left_out = {id(p) for p in [*tables, model.get_output_embeddings().weight]}
    weights = config.vocab_size * config.hidden_size
    for parameter in model.parameters():
        if id(parameter) not in left_out:
            of_experts = parameter.ndim == 3  # [experts, out, in]
            share = config.top_k_experts / config.num_experts if of_experts else 1
            weights += round(parameter.numel() * share)
    return int(weights)

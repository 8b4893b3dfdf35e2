"""What the models of Headstart's own kinds share: a table tied to the target's, clusters in the
format of transformers' assistants, and a configuration by which the Auto classes find them.

Letters: D target width, H head width, V vocabulary.
"""

from collections.abc import Mapping
from typing import Any, ClassVar, cast

import torch
from huggingface_hub.dataclasses import strict
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    GenerationMixin,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers import (
    initialization as init,
)
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.models.gemma4_assistant.modeling_gemma4_assistant import (
    Gemma4AssistantMaskedEmbedder,
)

from headstart.configs.schema import HeadConfig
from headstart.heads.ordered import cluster_count


@strict
class DraftConfig(PreTrainedConfig):
    """Of a head; a kind adds a `model_type` of its own, `headstart_NAME`, and its shapes."""

    vocab_size: int = 0
    hidden_size: int = 0
    """H."""
    backbone_hidden_size: int = 0
    """D."""
    intermediate_size: int = 0
    num_hidden_layers: int = 1
    num_drafts: int = 1
    """K, the most that it drafts in a round."""
    rms_norm_eps: float = 1e-6
    use_ordered_embeddings: bool = False
    num_centroids: int = 2048
    centroid_intermediate_top_k: int = 32
    tie_word_embeddings: bool = False  # with the target's table, not with one within


def head_width(source: Any, head: HeadConfig) -> int:
    """H: what is asked, or the width of the target's text configuration.

    Raises:
        ValueError: the head is wider than its target: no tie can then reach its table.
    """
    width = head.hidden_size or source.hidden_size
    if width > source.hidden_size:
        raise ValueError(
            f"head.hidden_size={width} is above the target's {source.hidden_size}: the head is "
            "tied to the target's table, so it can be as wide or narrower, not wider"
        )
    return int(width)


def query_heads(source: Any, head: HeadConfig, layers: Mapping[str, Any]) -> int:
    """The number of query heads: what is asked, or the target's.

    Args:
        source: the target's text configuration.
        head: what is asked.
        layers: layer type -> the shapes of the target's layer whose keys and values are like those
            of the head.

    Raises:
        ValueError: it is no multiple of the KV heads.
    """
    heads = head.num_attention_heads or source.num_attention_heads
    for layer_type, shape in layers.items():
        if heads % shape.num_key_value_heads:
            raise ValueError(
                f"head.num_attention_heads={heads} is no multiple of the target's "
                f"{shape.num_key_value_heads} KV heads in its {layer_type} layers"
            )
    return int(heads)


def shapes(source: Any, head: HeadConfig, drafts: int, attention: bool = False) -> dict[str, Any]:
    """Arguments of a `DraftConfig`: what is asked, and the rest from the target's text
    configuration; `attention`: whether the kind has any.

    Raises:
        ValueError: the head is wider than its target, its clusters cannot be equal, or query heads
            are asked of a head without attention.
    """
    width = head_width(source, head)
    if head.num_attention_heads is not None and not attention:
        raise ValueError(
            f"head.num_attention_heads: a {head.kind} head has no attention, leave it out"
        )
    found: dict[str, Any] = {
        "vocab_size": source.vocab_size,
        "hidden_size": width,
        "backbone_hidden_size": source.hidden_size,
        "intermediate_size": head.intermediate_size or width,
        "num_hidden_layers": head.num_hidden_layers or 1,
        "num_drafts": drafts,
        "rms_norm_eps": source.rms_norm_eps,
    }
    if head.use_ordered_embeddings:
        top_k = head.clusters_read
        found |= {"use_ordered_embeddings": True, "centroid_intermediate_top_k": top_k}
        found["num_centroids"] = cluster_count(source.vocab_size, head.num_centroids, top_k)
    return found


class DraftModel(PreTrainedModel, GenerationMixin):
    """An LM head, clusters for it where config.json has some, and below them what a kind adds."""

    config: DraftConfig
    config_class: ClassVar[type[DraftConfig]] = DraftConfig
    supports_gradient_checkpointing = True

    def __init__(self, config: DraftConfig):
        super().__init__(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        ordered = config.use_ordered_embeddings
        embedder: Any = Gemma4AssistantMaskedEmbedder
        self.masked_embedding = embedder(config) if ordered else None
        # The way in of a head that is narrower than its target.
        narrow = config.hidden_size < config.backbone_hidden_size
        sizes = (config.backbone_hidden_size, config.hidden_size)
        self.pre_projection = nn.Linear(*sizes, bias=False) if narrow else nn.Identity()

    def get_output_embeddings(self) -> nn.Module:
        return self.lm_head

    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, Gemma4AssistantMaskedEmbedder):
            init.zeros_(module.token_ordering)


class ResidualBlock(GradientCheckpointingLayer):
    """x + W_2 silu(W_1 norm(x)), over [..., H]."""

    def __init__(self, width: int, inner: int, eps: float):
        super().__init__()
        self.norm = nn.RMSNorm(width, eps)
        self.up_proj = nn.Linear(width, inner, bias=False)
        self.down_proj = nn.Linear(inner, width, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        inner = nn.functional.silu(self.up_proj(self.norm(x)))
        added: torch.Tensor = self.down_proj(inner)
        return x + added


def dense_weight(linear: Any, dtype: torch.dtype) -> torch.Tensor:
    """[out, in] of a linear layer, with its adapters and out of its quantization: what it makes of
    the unit vectors."""
    if type(linear) is nn.Linear and type(linear.weight) is nn.Parameter:
        return linear.weight
    units = torch.eye(linear.in_features, dtype=dtype, device=linear.weight.device)
    return cast(torch.Tensor, linear(units)).T


def make_known(config: type[DraftConfig], model: type[DraftModel]) -> None:
    """Let the Auto classes of transformers load heads of a kind."""
    model.config_class = config
    AutoConfig.register(config.model_type, config, exist_ok=True)
    AutoModelForCausalLM.register(config, model, exist_ok=True)

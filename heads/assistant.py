"""Building, starting, saving and checking native Gemma 4 assistants.

Letters: D target width, H head width, V vocabulary.
"""

from pathlib import Path
from typing import Any, cast

import torch
from torch import nn
from transformers import (
    Gemma4AssistantConfig,
    Gemma4AssistantForCausalLM,
    Gemma4TextConfig,
    Gemma4UnifiedAssistantConfig,
    Gemma4UnifiedAssistantForCausalLM,
    Gemma4UnifiedTextConfig,
    PreTrainedModel,
)

from headstart.common.console import print_once
from headstart.configs.schema import HeadConfig
from headstart.heads.ordered import cluster_count
from headstart.heads.saving import Assistant, load_assistant, made_for
from headstart.heads.target import Target, source_layers

OF_TARGET = (
    "vocab_size", "sliding_window", "max_position_embeddings", "hidden_activation", "rms_norm_eps",
    "bos_token_id", "eos_token_id", "pad_token_id",
)  # fmt: skip
DEPTH = 2  # layers of a head whose depth nobody chose


def assistant_config(source: Any, head: HeadConfig) -> Any:
    """The configuration of a head whose KV heads, head dims, sliding window, rope parameters and
    vocabulary are those of the target's text configuration; width, depth and MLP size come from
    `head`. A `Gemma4Unified` target gets the unified classes.

    Raises:
        ValueError: the query heads are no multiple of the target's KV heads, the head is wider
            than its target (no tie can then reach its table), or its clusters cannot be equal.
    """
    width = head.hidden_size or source.hidden_size
    if width > source.hidden_size:
        raise ValueError(
            f"head.hidden_size={width} is above the target's {source.hidden_size}: the head is "
            "tied to the target's table, so it can be as wide or narrower, not wider"
        )
    kv = {t: source.per_layer_config[i] for t, i in source_layers(source).items()}
    heads = head.num_attention_heads or source.num_attention_heads
    for layer_type, shape in kv.items():
        if heads % shape.num_key_value_heads:
            raise ValueError(
                f"head.num_attention_heads={heads} is no multiple of the target's "
                f"{shape.num_key_value_heads} KV heads in its {layer_type} layers"
            )
    depth = head.num_hidden_layers or DEPTH
    sliding, full = kv["sliding_attention"], kv["full_attention"]
    text: dict[str, Any] = {key: getattr(source, key) for key in OF_TARGET} | {
        "hidden_size": width,
        "intermediate_size": head.intermediate_size
        or (source.intermediate_size if width == source.hidden_size else 4 * width),
        "num_hidden_layers": depth,
        "num_kv_shared_layers": depth,
        "num_attention_heads": heads,
        "num_key_value_heads": sliding.num_key_value_heads,
        "head_dim": sliding.head_dim,
        "per_layer_config": {
            depth - 1: {key: getattr(full, key) for key in ("head_dim", "num_key_value_heads")}
        },
        "layer_types": ["sliding_attention"] * (depth - 1) + ["full_attention"],
        "rope_parameters": {t: dict(source.rope_parameters[t]) for t in kv},
        "final_logit_softcapping": None,  # the assistant classes apply none
    }
    own: dict[str, Any] = {"backbone_hidden_size": source.hidden_size}
    if head.use_ordered_embeddings:
        top_k = head.centroid_intermediate_top_k
        own["use_ordered_embeddings"] = True
        own["num_centroids"] = cluster_count(source.vocab_size, head.num_centroids, top_k)
        own["centroid_intermediate_top_k"] = top_k
    if source.model_type.startswith("gemma4_unified"):
        return Gemma4UnifiedAssistantConfig(text_config=Gemma4UnifiedTextConfig(**text), **own)
    text |= {"hidden_size_per_layer_input": 0, "vocab_size_per_layer_input": 0}
    return Gemma4AssistantConfig(text_config=Gemma4TextConfig(**text), **own)


def build_assistant(target: Target, head: HeadConfig) -> Assistant:
    """A native assistant in float32 on the target's device, its table tied to the target's.

    A full-width head holds the target's own table as parameter (frozen, not copied). A narrower
    one holds an empty table: `DraftHead` goes through its projection, and only `save_assistant`
    materializes the product.
    """
    config = assistant_config(target.config, head)
    unified = isinstance(config, Gemma4UnifiedAssistantConfig)
    cls = Gemma4UnifiedAssistantForCausalLM if unified else Gemma4AssistantForCausalLM
    assistant = cls(config).to(target.device)
    width = config.text_config.hidden_size
    full_width = width == target.config.hidden_size
    # Empty rather than meta: accelerate can move an empty tensor, but no meta tensor.
    empty = nn.Parameter(torch.empty(0, width, device=target.device), requires_grad=False)
    set_table(assistant, target.table if full_width else empty)
    with torch.no_grad(), target.full_source_layers():
        _start(assistant, target, whole=head.init_from == "target" and full_width)
    return assistant


def warm_assistant(target: Target, path: str | Path) -> Assistant:
    """The finished head at `path`, a folder or a Hub id, in float32 to train on, with a dense LM
    head: clusters come after the trunk.

    Its table is frozen: a head as wide as the target is tied to this target's, a narrower one keeps
    its own.

    Raises:
        ValueError: there is no head at `path`, or it does not fit the target.
    """
    assistant: Any = load_assistant(path, torch.float32, target.device)
    check_pair(target, assistant)
    assistant.config.use_ordered_embeddings, assistant.masked_embedding = False, None
    full_width = assistant.config.text_config.hidden_size == target.config.hidden_size
    own = nn.Parameter(assistant.lm_head.weight.detach(), requires_grad=False)
    set_table(assistant, target.table if full_width else own)
    return cast(Assistant, assistant)


def set_table(assistant: Assistant, table: nn.Parameter) -> None:
    """Tie the head's embeddings and LM head to `table` [V, H], or to an empty one."""
    assistant.model.embed_tokens.weight = table
    assistant.lm_head.weight = table


def _scale(norm: nn.Module) -> torch.Tensor:
    """The factor that a norm applies: Gemma 3 stores w of a `1 + w` norm, Gemma 4 the factor."""
    weight = cast(torch.Tensor, norm.weight).float()
    return 1 + weight if type(norm).__name__.startswith("Gemma3") else weight


def _weight(linear: Any, dtype: torch.dtype) -> torch.Tensor:
    """[out, in] of a linear layer, with its adapters and out of its quantization: what it makes of
    the unit vectors."""
    if type(linear) is nn.Linear and type(linear.weight) is nn.Parameter:
        return linear.weight
    units = torch.eye(linear.in_features, dtype=dtype, device=linear.weight.device)
    return cast(torch.Tensor, linear(units)).T


def _start(assistant: Assistant, target: Target, whole: bool) -> None:
    """Give the head the scale of the target's queries; `whole`: also its source layers, the final
    norm, and let the hidden state pass through.

    Tensors whose shapes differ (another MLP size or number of heads) keep their random start.
    """
    # Gemma 4 multiplies scores by 1; Gemma 3 by query_pre_attn_scalar ** -0.5, which has to
    # move into the head's q_norm.
    gemma3 = target.config.model_type == "gemma3_text"
    scale = target.config.query_pre_attn_scalar**-0.5 if gemma3 else 1.0
    for layer_type, layer in zip(
        assistant.config.text_config.layer_types, assistant.model.layers, strict=True
    ):
        source = target.layers[target.source_layers[layer_type]]
        layer.self_attn.q_norm.weight.copy_(_scale(source.self_attn.q_norm) * scale)
        for name, module in layer.named_modules() if whole else ():
            if isinstance(module, nn.Linear):
                weight = _weight(source.get_submodule(name), target.table.dtype)
                if weight.shape == module.weight.shape:
                    module.weight.copy_(weight)
            elif name.endswith("layernorm"):
                module.weight.copy_(_scale(source.get_submodule(name)))
        if whole and hasattr(source, "layer_scalar"):
            layer.layer_scalar.copy_(cast(torch.Tensor, source.layer_scalar))
    if whole:
        assistant.model.norm.weight.copy_(_scale(target.final_norm))
        width = target.config.hidden_size
        identity = torch.eye(width, device=target.device)
        assistant.pre_projection.weight[:, :width].copy_(identity)
        assistant.post_projection.weight.copy_(identity)


def check_pair(target: Target, assistant: PreTrainedModel) -> None:
    """Raise `ValueError`, naming both values, where a head cannot belong to the target; say where
    it is only of another class than the heads of such a target."""
    check_shapes(target.config, assistant.config, target.name)
    kinds = [config.model_type for config in (target.config, assistant.config)]
    if len({kind.startswith("gemma4_unified") for kind in kinds}) > 1:
        print_once(
            f"this head is a {kinds[1]}, and {target.name} a {kinds[0]}: it drafts the same here, "
            "but other engines choose their code by the class; see that it is of this target"
        )


def check_shapes(source: Any, head: Any, name: str) -> None:
    """`check_pair` of the configurations: `source` of the target's text part, `name` what to call
    the target."""
    text, layers = head.text_config, source_layers(source)
    pairs = [
        ("backbone_hidden_size", head.backbone_hidden_size, source.hidden_size),
        ("vocab_size", text.vocab_size, source.vocab_size),
        ("sliding_window", text.sliding_window, source.sliding_window),
    ]
    for i, layer_type in enumerate(text.layer_types):
        of_layers = f"of its {layer_type} layers"
        mine, its = text.per_layer_config[i], source.per_layer_config[layers[layer_type]]
        for key in ("head_dim", "num_key_value_heads"):
            pairs.append((f"{key} {of_layers}", getattr(mine, key), getattr(its, key)))
        # Its queries meet keys that the target has rotated.
        mine, its = (_rotation(config.rope_parameters[layer_type]) for config in (text, source))
        pairs.append((f"rope_parameters {of_layers}", mine, its))
    for key, value, of_target in pairs:
        if value != of_target:
            raise ValueError(
                f"this head does not fit {name}: its {key} is {value}, and the target has "
                f"{of_target} there"
            )


def _rotation(rope: dict[str, Any]) -> dict[str, Any]:
    """Rope parameters with what stands for nothing left out, so that equal ones rotate alike."""
    nothing = {"partial_rotary_factor": (None, 1)}
    return {k: v for k, v in rope.items() if v not in nothing.get(k, (None,))}


def other_target(target: Target, assistant: PreTrainedModel) -> str | None:
    """A warning, naming both, where a head was made for another target than this one; None: it
    was not, or does not say.

    What it notes of its target is compared (weights of another dtype have another fingerprint: the
    names then), and its table, where it is as wide as the target's and so should be the same.
    """
    made, mine = made_for(assistant.config), target.identity
    if made is not None:
        key = "fingerprint" if made["dtype"] == mine["dtype"] else "name"
        if made[key] != mine[key]:
            return (
                f"this head was trained for {made['name']} (fingerprint "
                f"{str(made['fingerprint'])[:12]}, {made['dtype']}), not for {mine['name']} "
                f"({str(mine['fingerprint'])[:12]}, {mine['dtype']}): expect fewer accepted "
                "drafts; `headstart adapt` trains it on"
            )
    if other := _other_rows(target.table, assistant.get_input_embeddings().weight):
        return (
            f"this head is as wide as {target.name}, and {other:,} rows of its table differ from "
            "those of the target: it was made for another, or before the target's table was "
            "trained; expect fewer accepted drafts; `headstart adapt` trains it on with the "
            "target's own"
        )
    return None


@torch.no_grad()
def _other_rows(table: torch.Tensor, own: torch.Tensor) -> int:
    """How many rows of a head's table [V, H] are not those of the target's [V, D]; 0 where it is
    narrower. Either may have been rounded to bfloat16."""
    if table.shape != own.shape:
        return 0
    other = 0
    for some, mine in zip(table.split(8192), own.to(table.device).split(8192), strict=True):
        some, mine = some.bfloat16(), mine.bfloat16()
        equal = torch.isclose(some, mine, rtol=2**-6, atol=1e-6)  # two steps of bfloat16
        other += int((~equal.all(dim=-1)).sum())
    return other

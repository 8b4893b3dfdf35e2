"""What the kinds share whose heads are one Gemma decoder layer with keys and values of its own.

The layer pairs a state with the embedding of the token after it: row t reads h_t (or what the kind
makes of more of the target) and x_{t+1}, and sees the layer's own rows j <= t. The first draft is
what it makes of the target's newest row. Each further draft is a row after that, of the token just
drafted and of the layer's own last state in place of the target's: one layer for every depth, as in
FastMTP (arXiv 2509.18362) and EAGLE (arXiv 2401.15077).

The decoder keeps keys and values from round to round. Rows of drafts are dropped, accepted ones
too, and made anew of the target's own states: a row that a draft sees is either one of the text or
one of its own round. Training computes the same: the layer runs over whole texts, and a later round
of a row sees the text's rows up to it and its own earlier rounds. The layer attends to all of a
text, whatever the target's sliding window.

It is transformers' decoder layer of the target's family, and begins as the target's last
full-attention layer that has keys and values of its own, with the target's final norm, as far as
shapes are equal.

Letters: B rows of texts, T positions, R rows drafted from in each, S of them beyond the first
draft, K drafts, n rows at once, D target width, E width of what is read of a row of the target, H
head width.
"""

from abc import abstractmethod
from dataclasses import field
from inspect import signature
from typing import Any, TypeAlias

import torch
from huggingface_hub.dataclasses import strict
from torch import nn
from transformers import AutoConfig, AutoModel

from headstart.common.versions import CACHE
from headstart.configs.schema import DraftPositionOffset, HeadConfig
from headstart.heads.draft_model import (
    DraftConfig,
    DraftModel,
    dense_weight,
    query_heads,
    shapes,
)
from headstart.heads.kernels import copied_keys
from headstart.heads.kinds import (
    DraftMemory,
    Embed,
    HeadKind,
    Inputs,
    Rows,
    Texts,
    Verified,
    select,
)
from headstart.heads.target import Target, source_layers

FULL = "full_attention"
OF_TARGET = (
    "max_position_embeddings", "hidden_activation", "rms_norm_eps", "attention_bias",
    "query_pre_attn_scalar", "attn_logit_softcapping", "attention_k_eq_v",
)  # fmt: skip
"""What the layer has of the target's text configuration, where that has it."""
WITHOUT = ("hidden_size_per_layer_input", "vocab_size_per_layer_input")
"""What some targets' layers have and this one has not: no inputs but its own."""
Pair: TypeAlias = tuple[torch.Tensor, torch.Tensor]
"""Keys and values, each [B, kv heads, rows, head_dim]."""


@strict
class CausalConfig(DraftConfig):
    layer_config: dict[str, Any] = field(default_factory=dict)
    """Arguments of the text configuration of the target's family, of one layer."""


def layer_config(source: Any, head: HeadConfig, width: int) -> dict[str, Any]:
    """`CausalConfig.layer_config` for a target's text configuration.

    Raises:
        ValueError: more than a layer is asked for, or the query heads are no multiple of the KV
            heads.
    """
    if head.num_hidden_layers not in (None, 1):
        raise ValueError(
            f"head.num_hidden_layers={head.num_hidden_layers}: heads of the kind {head.kind} are "
            "one layer, leave it out; head.intermediate_size makes it larger"
        )
    own = source.per_layer_config[source_layers(source)[FULL]]
    heads = query_heads(source, head, {FULL: own})
    mlp = source.intermediate_size if width == source.hidden_size else 4 * width
    found = {key: getattr(source, key) for key in OF_TARGET if hasattr(source, key)} | {
        "model_type": source.model_type,
        "hidden_size": width,
        "intermediate_size": head.intermediate_size or mlp,
        "num_hidden_layers": 1,
        "layer_types": [FULL],
        "num_attention_heads": heads,
        "num_key_value_heads": own.num_key_value_heads,
        "head_dim": own.head_dim,
        "rope_parameters": {FULL: dict(source.rope_parameters[FULL])},
        "vocab_size": 1,
        **dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id")),  # none of that one
    }
    if hasattr(source, "num_kv_shared_layers"):  # a Gemma 4, whose full layers have a key for it
        found["global_head_dim"] = own.head_dim
    return found | {key: 0 for key in WITHOUT if hasattr(source, key)}


class Appended:
    """Stands in for transformers' cache in a decoder layer's forward: keys and values of new rows
    after those that are there. To run the layer again, as checkpointing does, changes nothing.

    Args:
        before: of the rows that are there.
    """

    def __init__(self, before: Pair | None):
        self.before, self.pair = before, before

    def update(self, keys: torch.Tensor, values: torch.Tensor, *_: Any, **kwargs: Any) -> Pair:
        """As of transformers' caches."""
        pair = (keys, values)
        if self.before is not None:
            keys, values = (torch.cat(both, 2) for both in zip(self.before, pair, strict=True))
        self.pair = keys, values
        return self.pair


class CausalHead(DraftModel):
    """Of `entry` numbers, E, that are read of each row of the target."""

    config: CausalConfig
    _supports_sdpa = True

    def __init__(self, config: CausalConfig, entry: int):
        super().__init__(config)
        width, embedded = config.hidden_size, config.backbone_hidden_size
        self.entry = nn.Linear(entry, width, bias=False) if entry != width else nn.Identity()
        self.embed_norm = nn.RMSNorm(embedded, config.rms_norm_eps)
        self.hidden_norm = nn.RMSNorm(width, config.rms_norm_eps)
        self.pre_projection = nn.Linear(embedded + width, width, bias=False)
        self.model = AutoModel.from_config(AutoConfig.for_model(**config.layer_config))
        self.model.embed_tokens = nn.Identity()  # it reads the target's
        # Arguments are given by position: names and order differ from family to family, and
        # checkpointing drops a cache that it finds by name.
        _, _, *names = signature(type(self.model.layers[0]).forward).parameters
        self.arguments = names[: names.index(CACHE) + 1]

    def run(
        self,
        embeds: torch.Tensor,
        states: torch.Tensor,
        positions: torch.Tensor,
        mask: torch.Tensor | None = None,
        before: Pair | None = None,
    ) -> tuple[torch.Tensor, Pair]:
        """Run the layer over n rows.

        Args:
            embeds: [B, n, D] of the tokens.
            states: [B, n, H] what they are paired with.
            positions: [B, n] or [1, n] in their texts.
            mask: bool [B or 1, 1, n, rows], True where a row is seen; None: a single row sees all
                rows, and several, before which there must be none, those up to their own.
            before: of earlier rows.

        Returns:
            [B, n, H] states, whose product with the table is logits, and keys and values of the
            earlier rows and of these.
        """
        dtype = self.embed_norm.weight.dtype
        pair = [self.embed_norm(embeds.to(dtype)), self.hidden_norm(states.to(dtype))]
        x = self.pre_projection(torch.cat(pair, dim=-1))
        rotary = self.model.rotary_emb(x, positions, FULL)
        rows = Appended(before)
        given = {
            "position_embeddings": rotary, "attention_mask": mask, "shared_kv_states": {},
            CACHE: rows,
        }  # fmt: skip
        x = self.model.layers[0](x, *map(given.get, self.arguments))
        assert rows.pair is not None, "the layer has rows"
        return self.model.norm(x), rows.pair


class CausalState:
    """Keys and values of the text's rows, and the rows that have yet to run: row t needs the token
    after it, which for the newest row is known when a round begins."""

    def __init__(self, model: CausalHead, kind: "CausalKind", embed: Embed, padding: int):
        self.model, self.kind, self.embed = model, kind, embed
        self.padding = padding
        """Tokens of it that are still to come."""
        self.pair: Pair | None = None
        """Of the text's rows, and after them of this round's."""
        self.rows = 0
        """Of the text in `pair`, but for the newest that has run: with another token it would be
        another."""
        self.read: list[torch.Tensor] = []
        self.tokens: list[torch.Tensor] = []
        """[1, n, E] and [1, n] of the rows after those, of each forward of the target."""
        self.state: torch.Tensor | None = None
        """[1, 1, H] of the newest draft; None: the round has none yet."""

    def commit(self, seen: Verified) -> None:
        if self.state is not None:  # the newest row has run, with what is the text's token now
            self.rows, self.read, self.tokens = self.rows + 1, [], []
        self.state = None
        table, valid = self.model.lm_head.weight, seen.tokens.shape[1]
        left = min(self.padding, valid)
        self.padding -= left
        read = self.kind.read_of(self.model.config, seen)[:, left:valid]
        self.read.append(read.to(table.device, table.dtype))
        self.tokens.append(seen.tokens[:, left:].to(table.device))

    def begin(self) -> None:
        self.state = None
        if self.pair is not None:
            self.pair = (self.pair[0][:, :, : self.rows], self.pair[1][:, :, : self.rows])

    def step(self, token: torch.Tensor) -> torch.Tensor:
        device = self.model.lm_head.weight.device
        if self.state is None:
            return self._first(token.to(device))
        assert self.pair is not None, "the newest row has run"
        position = torch.full((1, 1), self.pair[0].shape[2], device=device)
        run = self.model.run(self.embed(token), self.state, position, before=self.pair)
        self.state, self.pair = run
        return self.state

    def _first(self, token: torch.Tensor) -> torch.Tensor:
        """Run the rows that have yet to."""
        read, tokens = torch.cat(self.read, dim=1), torch.cat(self.tokens, dim=1)
        count, before = tokens.shape[1], self.rows
        positions = torch.arange(before, before + count, device=token.device)[None]
        mask = None
        if count > 1 and before:
            mask = torch.arange(before + count, device=token.device) <= positions[..., None]
            mask = mask[:, None]
        states, self.pair = self.model.run(
            self.embed(torch.cat([tokens[:, 1:], token], dim=1)),
            self.model.entry(read), positions, mask, self.pair,
        )  # fmt: skip
        self.rows, self.read, self.tokens = before + count - 1, [read[:, -1:]], [tokens[:, -1:]]
        self.state = states[:, -1:]
        return self.state


class CausalKind(HeadKind):
    """A kind adds names, words, and what it reads of the target."""

    config_class: type[CausalConfig]

    @abstractmethod
    def read_of(self, config: Any, seen: Texts | Verified) -> torch.Tensor:
        """[B, T, E] what a head reads of each row of the target."""

    def configure(self, source: Any, head: HeadConfig, drafts: int) -> CausalConfig:
        found = shapes(source, head, drafts, attention=True)
        layer = layer_config(source, head, found["hidden_size"])
        found |= {"num_hidden_layers": 1, "intermediate_size": layer["intermediate_size"]}
        return self.config_class(**found, layer_config=layer)

    def init_weights(self, model: Any, target: Target, from_target: bool) -> None:
        width = target.config.hidden_size
        if not from_target or model.config.hidden_size < width:
            return
        source, own = target.layers[target.source_layers[FULL]], model.model.layers[0]
        for name, tensor in own.state_dict().items():
            module, _, leaf = name.rpartition(".")
            given = source.get_submodule(module)
            if isinstance(given, nn.Linear) or (leaf == "weight" and hasattr(given, "in_features")):
                value = dense_weight(given, target.table.dtype) if leaf == "weight" else given.bias
            else:
                value = getattr(given, leaf)
            if value.shape == tensor.shape:
                tensor.copy_(value)
        model.model.norm.weight.copy_(target.final_norm.weight)
        # What is left of a token at the start is its embedding, as at the target's own first layer.
        model.pre_projection.weight[:, :width].copy_(torch.eye(width, device=target.device))

    def inputs(self, config: Any) -> Inputs:
        return Inputs(kv=False, whole_texts=True)

    def unroll(
        self, model: Any, texts: Texts, rows: Rows, embed: Embed, position: DraftPositionOffset
    ) -> list[torch.Tensor]:
        assert texts.ids is not None, "it reads whole texts"
        # The token after the last row of a text is none of it: no row is drafted from there.
        tokens = texts.ids.roll(-1, dims=1)
        places = torch.arange(tokens.shape[1], device=tokens.device)  # [T]
        positions, mask = places[None], None
        if texts.starts is not None:
            positions = places - texts.starts
            mask = (places <= places[:, None]) & (places >= texts.starts[..., None])
            mask = mask[:, None]
        dtype = model.pre_projection.weight.dtype
        entered = model.entry(self.read_of(model.config, texts).to(dtype))
        found, pair = model.run(embed(tokens), entered, positions, mask)
        states = [select(found, rows.at)]
        if rows.tokens.shape[2] == 1:
            return states
        later, state = rows.going_on(), select(states[0], rows.multi_step)
        at, starts = later.at[..., None], later.starts[..., None]
        seen = (places <= at) & (places >= starts)  # [B, S, T]
        own = torch.eye(at.shape[1], dtype=torch.bool, device=at.device).expand(len(at), -1, -1)
        for k in range(1, rows.tokens.shape[2]):
            seen = torch.cat([seen, own], dim=-1)
            state, pair = model.run(
                embed(later.tokens[:, :, k]), state, later.at - later.starts + k, seen[:, None],
                pair,
            )  # fmt: skip
            states.append(state)
        return states

    def draft_state(self, model: Any, embed: Embed, padding: int, offset: int) -> CausalState:
        return CausalState(model, self, embed, padding)

    def describe(self, config: Any) -> str:
        layer = config.layer_config
        return (
            f"one decoder layer with {layer['num_attention_heads']} query heads, "
            f"{layer['num_key_value_heads']} KV heads of its own of {layer['head_dim']}, width "
            f"{config.hidden_size}, MLP {config.intermediate_size}"
        )

    def draft_memory(self, config: Any, compute: int) -> DraftMemory:
        layer = AutoConfig.for_model(**config.layer_config)
        d, embedded, mlp = config.hidden_size, config.backbone_hidden_size, config.intermediate_size
        queries = layer.num_attention_heads * layer.head_dim
        kv = 2 * layer.num_key_value_heads * layer.head_dim
        # As of an assistant's layer, and keys and values of its own with their norms.
        each = d * (32 + 2 * compute) + (queries + kv) * (8 + 2 * compute) + 4 * mlp * compute
        # Two norms, each in float32 before and after, what enters the projection, the last norm.
        beside = (embedded + d) * (8 + compute) + d * (8 + compute)
        copied = 2 * queries * compute * copied_keys(layer, layer)
        return DraftMemory([each], beside, [copied], kept_keys=kv * compute)

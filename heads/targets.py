"""Frozen targets behind one small interface.

Letters: B batch, T positions, D target width, V vocabulary.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from transformers import (
    DynamicCache,
    Gemma4ForCausalLM,
    Gemma4ForConditionalGeneration,
    Gemma4UnifiedForCausalLM,
    Gemma4UnifiedForConditionalGeneration,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from headstart.heads.admission import tie_equal_tables
from headstart.heads.gemma3 import Gemma3ForAssistedDecoding, SharedKV
from headstart.heads.generation import neutralize
from headstart.heads.processes import split_layers
from headstart.heads.served import model_fingerprint
from headstart.heads.tokens import TargetTokens
from headstart.heads.versions import CACHE, INSTALLED, check_rows, skips_prefill

SUPPORTED: dict[str, type[PreTrainedModel]] = {
    "gemma3_text": Gemma3ForAssistedDecoding,
    "gemma4": Gemma4ForConditionalGeneration,
    "gemma4_text": Gemma4ForCausalLM,
    "gemma4_unified": Gemma4UnifiedForConditionalGeneration,
    "gemma4_unified_text": Gemma4UnifiedForCausalLM,
}
"""`config.model_type` -> the class that hands out shared KV and takes an assistant."""


@dataclass(frozen=True)
class Activations:
    """What the head sees of the target, for whole sequences."""

    hidden: torch.Tensor
    """[B, T, D] last hidden states, after the final norm."""
    shared_kv: SharedKV
    """Layer type -> (keys, values), each [B, kv heads, T, head_dim]."""


class Target(TargetTokens):
    """A frozen Gemma with what a draft head needs of it.

    Args:
        model: one of the classes in `SUPPORTED`; frozen and put into eval mode here.
        tokenizer: its tokenizer.
        name: what reports call it.
        revision: of the Hub.
        eos_token_ids: tokens that end a text, in place of those of the checkpoint.

    Raises:
        ValueError: the model cannot serve as a target; the message names what it lacks.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        name: str,
        revision: str | None = None,
        eos_token_ids: Sequence[int] | None = None,
    ):
        check_supported(model.config)
        tie_equal_tables(model, name)
        super().__init__(tokenizer, name, revision, model.generation_config, eos_token_ids)
        neutralize(model, name, self.eos_ids, tokenizer.pad_token_id)
        if model.device.type == "cuda":
            # cuDNN's attention plans anew for each length, and no two steps of decoding or batches
            # of training have the same one (docs/scaling.md).
            torch.backends.cuda.enable_cudnn_sdp(False)
        self.model = model.eval().requires_grad_(False)
        self.config = model.config.get_text_config()
        self.sharded = False
        """Whether each process holds a share of each layer, so that forwards need them all."""

    def shard(self) -> None:
        """Keep a share of each decoder layer in each process; embeddings and norms stay whole.

        From here on every forward has to run in all processes at once: `in_step` and `idle`.
        """
        assert self.fingerprint  # of whole weights: it is remembered
        split_layers(self.layers)
        self.sharded = True

    @contextmanager
    def whole_source_layers(self) -> Iterator[None]:
        """Within, the weights of the layers that a head may start from are whole everywhere."""
        layers = [self.layers[i] for i in self.source_layers.values()] if self.sharded else []
        for layer in layers:
            layer.unshard()
        yield
        for layer in layers:
            layer.reshard()

    def idle(self) -> None:
        """Take part in a forward that another process needs, with nothing to run."""
        self.activations(torch.zeros(1, 1, dtype=torch.long, device=self.device))

    @property
    def device(self) -> torch.device:
        return self.model.device

    @property
    def table(self) -> torch.nn.Parameter:
        """[V, D] input embedding table, unscaled; the LM head is tied to it."""
        return self.model.get_input_embeddings().weight

    @property
    def source_layers(self) -> dict[str, int]:
        """Layer type -> index of the layer whose keys and values the head attends to."""
        return source_layers(self.config)

    @property
    def layers(self) -> Any:
        """The decoder layers of the text model."""
        return self._text_model.layers

    @property
    def final_norm(self) -> torch.nn.Module:
        """The norm whose output is the hidden state that the head reads."""
        norm: torch.nn.Module = self._text_model.norm
        return norm

    @property
    def _text_model(self) -> Any:
        decoder: Any = self.model.model
        return decoder.language_model if hasattr(decoder, "language_model") else decoder

    @cached_property
    def fingerprint(self) -> str:  # type: ignore[override]
        """SHA-256 over the text configuration and every weight: equal models, equal prints."""
        return model_fingerprint(self.model, self.config)

    @property
    def identity(self) -> dict[str, str | None]:
        """What a head and a report note of the target: name, revision, dtype, fingerprint."""
        return {
            "name": self.name,
            "revision": self.revision,
            "dtype": str(self.table.dtype).removeprefix("torch."),
            "fingerprint": self.fingerprint,
        }

    @torch.no_grad()
    def embed(self, ids: torch.Tensor) -> torch.Tensor:
        """Embeddings as the decoder feeds them to a head: `ids` [...] -> [..., D], scaled."""
        return self.model.get_input_embeddings()(ids)

    @torch.no_grad()
    def activations(self, ids: torch.Tensor, mask: torch.Tensor | None = None) -> Activations:
        """One forward without the LM head.

        Args:
            ids: [B, T] token ids, padded on the right.
            mask: [B, T] 1 for tokens, 0 for padding; None: no padding.

        Raises:
            RuntimeError: the model left rows out.
        """
        if isinstance(self.model, Gemma3ForAssistedDecoding):
            # A cache without a config keeps every row of the sliding layers too.
            cache = DynamicCache()
            outputs = self.model.model(ids, mask, use_cache=True, **{CACHE: cache})
            shared_kv = self.model.shared_kv_states(cache, ids.shape[1])
        else:
            outputs = self.model.model(
                input_ids=ids, attention_mask=mask, use_cache=False, return_shared_kv_states=True
            )
            shared_kv = dict(outputs.shared_kv_states)
        hidden = outputs.last_hidden_state
        check_rows(hidden.shape[1], ids.shape[1])
        return Activations(hidden, shared_kv)

    @torch.no_grad()
    def logits(self, hidden: torch.Tensor, table: torch.Tensor | None = None) -> torch.Tensor:
        """Logits as the target emits them: `hidden` [..., D] -> float32 [..., V], soft-capped
        where the configuration says so. Costs V floats a row: pass rows in chunks.

        Args:
            hidden: [..., D] post-norm hidden states.
            table: [C, D] some rows of the table, for their logits alone.
        """
        table = self.table if table is None else table
        logits = torch.nn.functional.linear(hidden.to(table.dtype), table)
        # The soft cap comes before the cast, in the target's dtype, as in its own forward.
        if (cap := self.config.final_logit_softcapping) is not None:
            logits = torch.tanh(logits / cap) * cap
        return logits.float()


def source_layers(config: Any) -> dict[str, int]:
    """Layer type -> index of the last layer of that type with keys and values of its own."""
    # Gemma 3 shares no KV and has no such field.
    own = config.num_hidden_layers - getattr(config, "num_kv_shared_layers", 0)
    return {layer_type: i for i, layer_type in enumerate(config.layer_types[:own])}


def check_supported(config: Any) -> None:
    """Raise `ValueError` where a configuration cannot be that of a target; it names what lacks."""
    text = config.get_text_config()
    if config.model_type == "gemma3":
        lacks = "a text-only class: save its language model as Gemma3ForCausalLM and load that"
    elif config.model_type not in SUPPORTED:
        lacks = "an output `shared_kv_states` that a Gemma 4 assistant can attend to"
    elif text.use_bidirectional_attention in (True, "all"):
        lacks = "causal attention (use_bidirectional_attention is set)"
    elif skips_prefill(text) and not text.hidden_size_per_layer_input:
        lacks = (
            f"inputs per layer, without which transformers {INSTALLED} cannot generate where "
            "layers share keys (docs/upstream.md; 5.22 can)"
        )
    elif missing := {"sliding_attention", "full_attention"} - set(source_layers(text)):
        lacks = f"a layer of type {' and '.join(sorted(missing))} with keys and values of its own"
    else:
        return
    raise ValueError(
        f"unsupported target of type {config.model_type!r}: it lacks {lacks}. "
        f"Supported: {', '.join(sorted(SUPPORTED))}"
    )

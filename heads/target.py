"""Frozen targets behind one small interface.

Gemma 3 as a target: transformers gives `shared_kv_states` only from Gemma 4 and refuses every
other class by name. Gemma 3 keeps the same tensors in its cache, so a subclass that reads them
there is enough.

`generate` fills whatever a call leaves open from the model's own settings. A repetition penalty,
a stop string or `use_cache: false` of a checkpoint would so change greedy text, and what is
recorded of it, without a word. Every target and draft model therefore gets neutral settings when
it comes in, and a call takes from the checkpoint's what it asks for by name.

Letters: B batch, T positions, D target width, V vocabulary.
"""

import hashlib
import json
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import cached_property, partial
from inspect import Parameter, Signature, signature
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn
from transformers import (
    DynamicCache,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    Gemma4AssistantForCausalLM,
    Gemma4ForCausalLM,
    Gemma4ForConditionalGeneration,
    Gemma4UnifiedForCausalLM,
    Gemma4UnifiedForConditionalGeneration,
    GenerationConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.generation.candidate_generator import (
    CandidateGenerator,
    SinglePositionMultiTokenCandidateGenerator,
)
from transformers.utils import cached_file

from headstart.common.console import print_once
from headstart.common.processes import split_layers
from headstart.common.versions import CACHE, INSTALLED, check_rows, skips_prefill
from headstart.heads.admission import TOWERS, reading, tie_equal_tables
from headstart.heads.kernels import fast_kernels
from headstart.heads.tokens import TargetTokens

SharedKV = dict[str, tuple[torch.Tensor, torch.Tensor]]


class Inputs(NamedTuple):
    """What a draft head reads of its target, beside the last hidden states and the tokens."""

    kv: bool = True
    """Keys and values of the last layer of each type."""
    layers: tuple[int, ...] = ()
    """Decoder layers whose outputs it reads, by their numbers."""
    whole_texts: bool = False
    """Whether it reads them, and last hidden states, at all positions of a text, and not only at
    those that it drafts from."""
    prompts: bool = False
    """Whether its training reads what the target says within prompts, and not only of answers."""


KEYS_AND_VALUES = Inputs()
"""What an assistant reads, and what a store holds that does not say what it holds."""


def _with_shared_kv(stock: Signature) -> Signature:
    """The signature of a forward with `return_shared_kv_states` before its `**kwargs`."""
    *named, others = stock.parameters.values()
    added = Parameter("return_shared_kv_states", Parameter.KEYWORD_ONLY, default=False)
    return stock.replace(parameters=[*named, added, others])


class Gemma3ForAssistedDecoding(Gemma3ForCausalLM):
    """`Gemma3ForCausalLM` that hands out shared KV and accepts `generate(assistant_model=...)`."""

    config: Gemma3TextConfig

    def shared_kv_states(self, cache: DynamicCache, q_len: int) -> SharedKV:
        """Keys and values of the last layer of each type, as a forward of `q_len` tokens saw them:
        layer type -> (keys, values), each [B, kv heads, rows, head_dim].

        Mirrors what `Gemma4TextAttention` stores: all rows for a full layer, and for a sliding
        layer the `sliding_window - 1` rows before the new tokens and the new tokens.
        """
        types = self.config.layer_types
        shared = {}
        for layer_type in sorted(set(types)):
            layer = cache.layers[len(types) - 1 - types[::-1].index(layer_type)]
            rows = layer.keys.shape[2]
            if layer.is_sliding:
                rows = min(rows, self.config.sliding_window - 1 + q_len)
            shared[layer_type] = (layer.keys[:, :, -rows:], layer.values[:, :, -rows:])
        return shared

    def forward(self, *args: Any, return_shared_kv_states: bool = False, **kwargs: Any) -> Any:
        """As `Gemma3ForCausalLM.forward`; `return_shared_kv_states` adds `shared_kv_states`."""
        outputs = super().forward(*args, **kwargs)
        if return_shared_kv_states:
            given = args[0] if args else kwargs.get("input_ids")
            given = kwargs["inputs_embeds"] if given is None else given
            outputs["shared_kv_states"] = self.shared_kv_states(outputs[CACHE], given.shape[1])
        return outputs

    # `generate` reads the signature to see what it may pass; names differ from release to release.
    forward.__signature__ = _with_shared_kv(  # type: ignore[attr-defined]
        signature(Gemma3ForCausalLM.forward)
    )

    def _get_candidate_generator(self, **kwargs: Any) -> CandidateGenerator:
        assistant = kwargs.get("assistant_model")
        if not isinstance(assistant, Gemma4AssistantForCausalLM):
            return super()._get_candidate_generator(**kwargs)
        return SinglePositionMultiTokenCandidateGenerator(
            assistant_model=assistant,
            target_model_input_embeddings=self.get_input_embeddings(),
            generation_config=kwargs["generation_config"],
        )


FILE = "generation_config.json"
TAKEN = ("eos_token_id", "temperature", "top_k", "top_p")
"""What Headstart asks for: how texts end, and the target's own sampling (`TargetTokens`)."""
WITHOUT_EFFECT = (
    "bos_token_id", "pad_token_id", "do_sample", "max_length", "max_new_tokens",
    "cache_implementation", "cache_config", "disable_compile", "num_assistant_tokens",
    "num_assistant_tokens_schedule", "assistant_confidence_threshold", "transformers_version",
    "output_attentions", "output_hidden_states",
)  # fmt: skip
"""What every call says itself, or what changes no text; leaving it out is no news."""


def checkpoint_settings(path: str | Path, revision: str | None, config: Any) -> GenerationConfig:
    """The generation settings of a checkpoint: of its generation_config.json, or, where it has
    none, of the configuration of its model.

    Raises:
        ValueError: its generation_config.json cannot be read. transformers would go on without it,
            and texts would not end.
    """
    file = cached_file(
        str(path), FILE, revision=revision, _raise_exceptions_for_missing_entries=False
    )
    if file is None:
        return GenerationConfig.from_model_config(config)
    fix = "mend it, or delete it and give target.eos_token_ids"
    with reading(str(file), f"cannot be read; {fix}"):
        return GenerationConfig.from_pretrained(path, revision=revision)


def neutralize(
    model: PreTrainedModel, name: str, eos_ids: Sequence[int], pad_id: int | None
) -> None:
    """Give a model neutral generation settings, in place: a cache, one beam, greedy, no processors,
    texts that end with `eos_ids` alone; say which of its own that would change a text are left out.
    """
    neutral = GenerationConfig._get_default_generation_params()
    dropped = [
        f"{key}={value!r}"
        for key, value in model.generation_config.to_diff_dict().items()
        if not (key.startswith("_") or key in (*TAKEN, *WITHOUT_EFFECT))
        and value not in (None, neutral.get(key))
    ]
    if dropped:
        listed = ", ".join(dropped)
        print_once(f"{name}: generation settings of the checkpoint that are left out: {listed}")
    model.generation_config = GenerationConfig(
        use_cache=True, num_beams=1, do_sample=False, eos_token_id=list(eos_ids),
        pad_token_id=pad_id,
    )  # fmt: skip
    for config in (model.config, model.config.get_text_config()):
        config.use_cache = True  # forwards without `generate` read it there


SUPPORTED: dict[str, type[PreTrainedModel]] = {
    "gemma3_text": Gemma3ForAssistedDecoding,
    "gemma4": Gemma4ForConditionalGeneration,
    "gemma4_text": Gemma4ForCausalLM,
    "gemma4_unified": Gemma4UnifiedForConditionalGeneration,
    "gemma4_unified_text": Gemma4UnifiedForCausalLM,
}
"""`config.model_type` -> the class that hands out shared KV and takes an assistant."""


def drop_towers(model: nn.Module) -> None:
    """Let go of what reads images and sounds, in place: only text is run here."""
    for module in list(model.modules()):
        for name in TOWERS:
            if module._modules.get(name) is not None:
                module._modules[name] = None


@dataclass(frozen=True)
class Activations:
    """What the head sees of the target, for whole sequences."""

    ids: torch.Tensor
    """[B, T] their tokens."""
    hidden: torch.Tensor
    """[B, T, D] last hidden states, after the final norm."""
    shared_kv: SharedKV
    """Layer type -> (keys, values), each [B, kv heads, T, head_dim]."""
    layers: dict[int, torch.Tensor]
    """Number of a decoder layer -> its output, [B, T, D]; of those asked for."""


class Target(TargetTokens):
    """A frozen Gemma with what a draft head needs of it; arguments as in `TargetTokens`.

    Args:
        model: one of the classes in `SUPPORTED`; frozen and put into eval mode here.

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
        drop_towers(model)
        super().__init__(tokenizer, name, revision, model.generation_config, eos_token_ids)
        neutralize(model, name, self.eos_ids, tokenizer.pad_token_id)
        if model.device.type == "cuda":
            # cuDNN's attention plans anew for each length, and no two steps of decoding or batches
            # of training have the same one (docs/upstream.md).
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
        split_layers(self.model.get_decoder(), self.layers)
        self.sharded = True

    @contextmanager
    def full_source_layers(self) -> Iterator[None]:
        """Within, the weights of the layers that a head may start from are whole everywhere."""
        layers = [self.layers[i] for i in self.source_layers.values()] if self.sharded else []
        try:
            for layer in layers:
                layer.unshard()
            yield
        finally:
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
        return self.model.get_decoder().layers

    @property
    def final_norm(self) -> torch.nn.Module:
        """The norm whose output is the hidden state that the head reads."""
        norm: torch.nn.Module = self.model.get_decoder().norm
        return norm

    @cached_property
    def fingerprint(self) -> str:  # type: ignore[override]
        """SHA-256 over the text configuration and every weight: equal models, equal prints."""
        return model_fingerprint(self.model, self.config)

    def dtype_of(self, fingerprint: str) -> str | None:
        """The dtype in which this target's weights have a fingerprint: `bfloat16` or `float32`, or
        that in which they are here; None: in neither, they are other weights.

        A checkpoint of bfloat16 holds the same numbers in both, so that one machine knows what
        another has written in the other dtype. Of float32 weights this one sees what their rounding
        wrote, and not the other way round. A split target knows its own dtype alone.
        """
        if fingerprint == self.fingerprint:
            return str(self.table.dtype).removeprefix("torch.")
        return self._other_fingerprints.get(fingerprint)

    @cached_property
    def _other_fingerprints(self) -> dict[str, str]:
        """Fingerprint -> dtype of the same weights in the dtypes in which they are not here."""
        others = {torch.bfloat16, torch.float32} - {self.table.dtype}
        return {
            model_fingerprint(self.model, self.config, dtype): str(dtype).removeprefix("torch.")
            for dtype in (set() if self.sharded else others)
        }

    @property
    def identity(self) -> dict[str, Any]:
        """What a head notes of the target: name, revision, dtype, fingerprint; and its `config`,
        which loads it again."""
        return {
            "name": self.name,
            "revision": self.revision,
            "dtype": str(self.table.dtype).removeprefix("torch."),
            "fingerprint": self.fingerprint,
            "config": self.settings,
        }

    @torch.no_grad()
    def embed(self, ids: torch.Tensor) -> torch.Tensor:
        """Embeddings as the decoder feeds them to a head: `ids` [...] -> [..., D], scaled."""
        return self.model.get_input_embeddings()(ids)

    @contextmanager
    def layer_outputs(self, layers: Sequence[int]) -> Iterator[dict[int, list[torch.Tensor]]]:
        """Within, the outputs [B, T, D] of some decoder layers, by their numbers, are kept: one of
        each forward."""
        found: dict[int, list[torch.Tensor]] = {i: [] for i in layers}
        with ExitStack() as hooks:
            for i, kept in found.items():
                hook = self.layers[i].register_forward_hook(partial(_keep, kept))
                hooks.callback(hook.remove)
            yield found

    @torch.no_grad()
    def activations(
        self, ids: torch.Tensor, mask: torch.Tensor | None = None, layers: Sequence[int] = ()
    ) -> Activations:
        """One forward without the LM head.

        Args:
            ids: [B, T] tokens, padded on the right.
            mask: [B, T] 1 for tokens, 0 for padding; None: no padding.
            layers: whose outputs are wanted.

        Raises:
            RuntimeError: the model left rows out.
        """
        with self.layer_outputs(layers) as found:
            hidden, shared_kv = self._states(ids, mask)
        outputs = {i: kept[0] for i, kept in found.items()}
        for one in (hidden, *outputs.values()):
            check_rows(one.shape[1], ids.shape[1])
        return Activations(ids, hidden, shared_kv, outputs)

    def _states(
        self, ids: torch.Tensor, mask: torch.Tensor | None
    ) -> tuple[torch.Tensor, SharedKV]:
        """Last hidden states, and keys and values, of a forward without the LM head."""
        if isinstance(self.model, Gemma3ForAssistedDecoding):
            # A cache without a config keeps every row of the sliding layers too.
            cache = DynamicCache()
            with fast_kernels(self.model, small_batch=False, packs=False):
                outputs = self.model.model(ids, mask, use_cache=True, **{CACHE: cache})
            shared_kv = self.model.shared_kv_states(cache, ids.shape[1])
        else:
            of_rows = {"use_cache": False, "return_shared_kv_states": True}
            with fast_kernels(self.model, small_batch=False, packs=False):
                outputs = self.model.model(input_ids=ids, attention_mask=mask, **of_rows)
            shared_kv = dict(outputs.shared_kv_states)
        return outputs.last_hidden_state, shared_kv

    def logits(self, hidden: torch.Tensor, table: torch.Tensor | None = None) -> torch.Tensor:
        """`own_logits` in float32."""
        return self.own_logits(hidden, table).float()

    @torch.no_grad()
    def own_logits(self, hidden: torch.Tensor, table: torch.Tensor | None = None) -> torch.Tensor:
        """Logits as the target emits them: `hidden` [..., D], post-norm -> [..., V], or [..., C] of
        the rows `table` [C, D] alone, in the dtype of the table; soft-capped where the
        configuration says so. Costs V numbers a row: pass rows in chunks.
        """
        if table is None:  # as a module, so that contexts around the target find it
            logits = self.model.get_output_embeddings()(hidden.to(self.table.dtype))
        else:
            logits = torch.nn.functional.linear(hidden.to(table.dtype), table)
        # The soft cap comes before the cast, in the target's dtype, as in its own forward.
        if (cap := self.config.final_logit_softcapping) is not None:
            logits = torch.tanh(logits / cap) * cap
        return logits


def _keep(kept: list[torch.Tensor], layer: nn.Module, args: Any, output: torch.Tensor) -> None:
    kept.append(output)


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


def model_fingerprint(model: nn.Module, config: Any, dtype: torch.dtype | None = None) -> str:
    """SHA-256 over a configuration, but for what changes no value, and every weight in the dtype
    that it has now, or as it would be if the model were loaded in `dtype`: equal models, equal
    prints."""
    content = config.to_dict()
    changes_no_value = ("transformers_version", "_name_or_path", "headstart_")
    content = {k: v for k, v in content.items() if not k.startswith(changes_no_value)}
    if dtype is not None and content.get("dtype") is not None:
        content["dtype"] = str(dtype).removeprefix("torch.")
    digest = hashlib.sha256(json.dumps(content, sort_keys=True, default=str).encode())
    digest.update(_adapter_scales(model))
    for name, tensor in sorted(model.state_dict().items()):
        if dtype is not None and type(tensor) is torch.Tensor and tensor.is_floating_point():
            tensor = tensor.to(dtype)  # quantized ones, of a class of their own, stay
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        for part in raw_bytes(tensor):
            digest.update(part)
    return digest.hexdigest()


def _adapter_scales(model: nn.Module) -> bytes:
    """The factors of adapters beside the weights, which stand in no tensor; empty without any."""
    scales = {
        name: {adapter: float(factor) for adapter, factor in module.scaling.items()}
        for name, module in model.named_modules()
        if isinstance(vars(module).get("scaling"), dict)  # of peft; attention's is a number
    }
    return json.dumps(scales, sort_keys=True).encode() if scales else b""


SAMPLED = 256  # numbers of each weight, about


def weights_sample(model: nn.Module) -> str:
    """SHA-256 over some numbers of each weight: other weights differ in it, as good as always, and
    it costs no pass over all of them, as the fingerprint does."""
    digest = hashlib.sha256(_adapter_scales(model))
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        for plain in plain_tensors(tensor):
            flat = plain.reshape(-1)
            for part in raw_bytes(flat[:: max(flat.numel() // SAMPLED, 1)]):
                digest.update(part)
    return digest.hexdigest()


def raw_bytes(tensor: torch.Tensor) -> Iterator[Any]:
    """The bytes of each of `plain_tensors`."""
    for plain in plain_tensors(tensor):
        flat = plain.cpu().contiguous().view(-1)
        yield flat.view(torch.uint8).numpy().data if flat.numel() else b""


def plain_tensors(tensor: torch.Tensor) -> Iterator[torch.Tensor]:
    """A tensor of any shape, or the plain ones that a quantized tensor is made of."""
    if not hasattr(tensor, "__tensor_flatten__"):
        yield tensor.detach()
        return
    names, _ = tensor.__tensor_flatten__()
    for name in names:
        yield from plain_tensors(getattr(tensor, name))

"""Models in memory as targets, under names by which loading finds them for a while.

A model of the user's is never run here and never changed. What runs is a copy of its modules whose
parameters are tensors of their own over the same memory: it may have another class, other settings
and another mode, and nothing of that reaches the model. The adapters of a `PeftModel` are written
to a folder of the time being, and go on from there as every adapter does: unmerged, in the dtype of
the weights beside them.
"""

import copy
import math
import re
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import nn
from transformers import Gemma3ForCausalLM, PreTrainedModel, PreTrainedTokenizerBase

from headstart.common.children import temporary_folder
from headstart.common.console import print_once
from headstart.heads.target import SUPPORTED, Gemma3ForAssistedDecoding, check_supported

MEMORY = "memory:"
"""Begins the names of targets and adapters that are in memory: no file of that name is looked
for."""
REPLACED = (
    "forward", "_original_forward", "_old_forward", "_hf_hook",
    "_output_capturing_hooks_installed",
)  # fmt: skip
"""Attributes by which accelerate and others put a forward of theirs in place of a module's own, and
by which transformers knows that its hooks are there, which a copy without hooks has to forget."""
CAPTURING = "transformers.utils.output_capturing"
"""The module of the hooks that transformers itself leaves in a model that has handed out states."""
HUB_ID = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*")
M = TypeVar("M", bound=nn.Module)


@dataclass(frozen=True)
class LiveTarget:
    """A model in memory that is a target for a while."""

    name: str
    """What reports call it: `memory:` and the Hub id or the folder that it was loaded from, or its
    class. Its weights may be others by now: its fingerprint tells them apart."""
    model: PreTrainedModel
    """Without its adapters; its parameters share the memory of the user's."""
    tokenizer: PreTrainedTokenizerBase
    adapters: dict[str, Path]
    """Name -> folder of the time being, of those that were active, in their order."""

    def served(self, device: torch.device | str, dtype: torch.dtype) -> PreTrainedModel:
        """A copy to serve: on another device or in another dtype with memory of its own."""
        model = moved(aliased(self.model), device, dtype)
        # As the configuration would be after `save_pretrained` and `from_pretrained`.
        model.config.architectures = [type(model).__name__]
        for config in (model.config, model.config.get_text_config()):
            config.dtype = dtype
        return as_target_class(model)


def moved(model: M, device: torch.device | str, dtype: torch.dtype) -> M:
    """The same model on a device and in a dtype, as `from_pretrained` would have loaded it there.

    `Module.to` also rounds what no file holds, the frequencies of RoPE: in bfloat16 a query then
    stands up to a third of a radian beside its place at the 150th position, and anywhere at the
    thousandth.
    """
    kept = [
        (module, name, buffer)
        for module in model.modules()
        for name, buffer in module._buffers.items()
        if buffer is not None and name in module._non_persistent_buffers_set
    ]
    model.to(device, dtype)
    for module, name, buffer in kept:
        if name == "embed_scale":  # made in the dtype, of a number that keeps its places
            buffer = buffer.new_tensor(module.scalar_embed_scale, dtype=dtype)
        module._buffers[name] = buffer.to(device)
    return model


_live: ContextVar[LiveTarget | None] = ContextVar("live", default=None)


def live_target(name: str) -> LiveTarget | None:
    """The model in memory of this name; None: it is the name of something else.

    Raises:
        ValueError: it was in memory, and is not now.
    """
    live = _live.get()
    if live is not None and name == live.name:
        return live
    if name.startswith(MEMORY):
        raise ValueError(
            f"{name} was a model in memory, and is not here now: save it with its tokenizer "
            "(save_pretrained), and give that folder, target.name=DIR; from Python give both again"
        )
    return None


def live_adapter(name: str) -> Path | None:
    """The folder of an adapter in memory; None, and errors: as of `live_target`."""
    live = _live.get()
    if live is not None and name in live.adapters:
        return live.adapters[name]
    if name.startswith(MEMORY):
        raise ValueError(
            f"{name} was an adapter in memory, and is not here now: save it (save_pretrained), and "
            "give that folder, target.adapters=DIR; from Python give its model again"
        )
    return None


@contextmanager
def in_memory(model: Any, tokenizer: Any) -> Iterator[LiveTarget]:
    """Within, a model is a target that loading finds by the name that is given.

    Args:
        model: a Gemma of a class in `SUPPORTED`, `Gemma3ForCausalLM`, or a `PeftModel` of one.
        tokenizer: of it.

    Raises:
        ValueError: it is none, or one that cannot be served as it lies there.
    """
    check_model(model)
    _check_tokenizer(tokenizer, model.config.get_text_config())
    with temporary_folder() as work:
        base, adapters = _taken_apart(model, work)
        # Copied, since it is completed, such as by a padding token.
        live = LiveTarget(_name(base), base, copy.deepcopy(tokenizer), adapters)
        token = _live.set(live)
        try:
            yield live
        finally:
            _live.reset(token)


def aliased(model: M) -> M:
    """A copy of the modules of a model over the same memory.

    Its parameters are frozen tensors of their own that share the storage of the model's, buffers
    are copied, settings too. Hooks, and forwards that were put in place of a module's own, are left
    out; what is replaced or set in the copy does not reach the model.
    """
    memo: dict[int, Any] = {}
    for parameter in model.parameters():
        memo[id(parameter)] = nn.Parameter(parameter.detach(), requires_grad=False)
    for module in model.modules():
        for key, value in vars(module).items():
            # Not to be copied: what they refer to may be a trainer with its data.
            if "_hooks" in key and isinstance(value, dict):
                memo[id(value)] = type(value)()
            elif key in REPLACED:
                memo[id(value)] = value
    twin = copy.deepcopy(model, memo)
    for module in twin.modules():
        for key in REPLACED:
            vars(module).pop(key, None)
    return twin


def as_target_class(model: PreTrainedModel) -> PreTrainedModel:
    """The same model, of the class that hands out shared KV; in place: a copy of `aliased`."""
    if type(model) is Gemma3ForCausalLM:
        model.__class__ = Gemma3ForAssistedDecoding
    return model


def check_model(model: Any) -> None:
    """Raise `ValueError` where a model cannot be served as it lies in memory."""
    from peft import PeftModel  # a second of imports that most targets do without
    from peft.tuners.tuners_utils import BaseTunerLayer

    base = model
    if isinstance(model, PeftModel):
        if any(config.is_prompt_learning for config in model.peft_config.values()):
            raise ValueError(
                "the model learns a prompt, and no weights that a head could follow: tune with "
                "LoRA instead"
            )
        base = model.get_base_model()
    if not isinstance(base, PreTrainedModel):
        raise ValueError(
            f"a {type(model).__name__} is no target: give a Gemma 3 or Gemma 4 of transformers, a "
            "PeftModel of one, or a name or folder; of a wrapped one what is inside "
            "(trainer.accelerator.unwrap_model(trainer.model))"
        )
    check_supported(base.config)
    wanted = SUPPORTED[base.config.model_type]
    if type(base) not in (wanted, _stock(wanted)):
        raise ValueError(
            f"a {type(base).__name__} is no target: load it as {_stock(wanted).__name__}"
        )
    tuned = [module for module in base.modules() if isinstance(module, BaseTunerLayer)]
    if tuned and base is model:
        raise ValueError(
            "the model has layers of an adapter in it: give the PeftModel around it, or what "
            "merge_and_unload() returns"
        )
    if any(layer.merged for layer in tuned):
        raise ValueError(
            "the adapters of the model are merged for the time being: call unmerge_adapter() "
            "before, or give what merge_and_unload() returns"
        )
    if any(layer.disable_adapters for layer in tuned):
        raise ValueError(
            "the adapters of the model are switched off: switch them on, or give get_base_model() "
            "after unload()"
        )
    if isinstance(model, PeftModel):
        _check_scales(model)
    _check_weights(base)
    hooks = (
        h
        for m in model.modules()
        for h in (*m._forward_hooks.values(), *m._forward_pre_hooks.values())
    )
    if any(getattr(hook, "__module__", None) != CAPTURING for hook in hooks):
        print_once(
            "Hooks of the model in memory are left out: it is taken as it would be saved and loaded"
        )


def _stock(wanted: type[PreTrainedModel]) -> type[PreTrainedModel]:
    return Gemma3ForCausalLM if wanted is Gemma3ForAssistedDecoding else wanted


def _check_scales(model: Any) -> None:
    """Raise `ValueError` where an active LoRA adapter has another factor than its configuration
    says, as within peft's `rescale_adapter_scale`: it would be saved without it."""
    from peft.tuners.lora import LoraLayer

    # AdaLoRA's layers are LoRA's too, and scale by a rule of their own.
    known = {n: c for n, c in model.peft_config.items() if c.peft_type == "LORA"}
    for layer in (module for module in model.modules() if isinstance(module, LoraLayer)):
        for adapter in layer.scaling.keys() & known.keys() & set(model.active_adapters):
            root = 0.5 if known[adapter].use_rslora else 1
            own = layer.lora_alpha[adapter] / layer.r[adapter] ** root
            if not math.isclose(layer.scaling[adapter], own):
                raise ValueError(
                    f"the adapter {adapter} of the model is scaled for the time being, by other "
                    "than its lora_alpha: leave the context that scales it, or set lora_alpha"
                )


def _check_weights(base: PreTrainedModel) -> None:
    others = {type(p).__name__ for p in base.parameters() if type(p) is not nn.Parameter}
    if others or getattr(base, "is_quantized", False):
        what = min(others, default="quantized")
        raise ValueError(
            f"the weights of the model are no plain ones ({what}): they have fewer bits, or are "
            "split over processes. Save it, and give its folder, with target.quantization in the "
            "configuration where it is served so"
        )
    places = {str(parameter.device) for parameter in base.parameters()}
    if len(places) > 1 or "meta" in places:
        raise ValueError(
            f"the model lies on {', '.join(sorted(places))}: load it whole on one device, without "
            "device_map='auto'"
        )


def _check_tokenizer(tokenizer: Any, config: Any) -> None:
    """Raise `ValueError` where a tokenizer cannot be that of a model; whether each of its tokens
    has a row is seen when it is loaded."""
    if not isinstance(tokenizer, PreTrainedTokenizerBase):
        inside = ": give its tokenizer" if hasattr(tokenizer, "tokenizer") else ""
        raise ValueError(
            f"a model in memory needs its tokenizer, and a {type(tokenizer).__name__} is none"
            f"{inside or ', such as AutoTokenizer.from_pretrained(MODEL)'}"
        )
    if None not in (pair := (tokenizer.bos_token_id, config.bos_token_id)) and pair[0] != pair[1]:
        raise ValueError(
            f"the tokenizer does not fit the model: its <bos> is token {pair[0]}, the model's "
            f"{pair[1]}: give the one that the model was tuned with"
        )


def _taken_apart(model: Any, work: Path) -> tuple[PreTrainedModel, dict[str, Path]]:
    """The model without adapters, and the folders, in `work`, of those that were active."""
    twin = aliased(model)
    if isinstance(twin, PreTrainedModel):
        return twin, {}
    active = list(twin.base_model.active_adapters)
    # Tables that were made longer are the model's own; asking the Hub for theirs is not needed.
    twin.save_pretrained(str(work), selected_adapters=active, save_embedding_layers=False)
    folders = {MEMORY + n: work if n == "default" else work / n for n in active}
    base: PreTrainedModel = twin.unload()
    return base, folders


def _name(base: PreTrainedModel) -> str:
    place = str(getattr(base.config, "_name_or_path", "") or "")
    if HUB_ID.fullmatch(place) is None or Path(place).exists():
        place = Path(place).name
    return MEMORY + (place or _stock(type(base)).__name__)

"""A target as it will be served: with adapters, and with fewer bits.

A head is trained on what the served model says, so both come before anything is generated.
"""

import hashlib
import json
import warnings
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, get_args

import torch
from huggingface_hub import snapshot_download
from torch import nn
from transformers import BitsAndBytesConfig, PreTrainedModel

from headstart.configs.schema import Quantization, TargetConfig
from headstart.heads.adapters import WEIGHTS, check_arrival, check_effect, fitting, outcome
from headstart.heads.admission import FAULTS, check_files

FILES = ["*.json", "*.jinja", "*.model", WEIGHTS]  # that are read of an adapter on the Hub


def split_revision(adapter: str) -> tuple[str, str | None]:
    """A folder or Hub id and its revision, of `ID@REVISION`."""
    if Path(adapter).is_dir() or "@" not in adapter:
        return adapter, None
    name, _, revision = adapter.rpartition("@")
    return name, revision


def served_name(name: str, adapters: Sequence[str], quantization: Quantization | None) -> str:
    """What reports call a target: `NAME + ADAPTER (QUANTISATION)`."""
    whole = " + ".join([name, *adapters])
    return whole if quantization is None else f"{whole} ({quantization})"


def served_config(name: str, revision: str | None = None) -> TargetConfig:
    """The configuration of a target by what `served_name` calls it."""
    if Path(name).exists():  # a folder may have ` + ` in its name
        return TargetConfig(name=name, revision=revision)
    whole, quantization = name, None
    for one in get_args(Quantization):
        if name.endswith(f" ({one})"):
            whole, quantization = name.removesuffix(f" ({one})"), one
    base, *adapters = whole.split(" + ")
    kept = quantization is not None and quantization != "torchao-int8"
    return TargetConfig(
        name=base, revision=revision, adapters=adapters, quantization=quantization,
        merge_adapters=not kept,
    )  # fmt: skip


def add_adapters(model: PreTrainedModel, adapters: Sequence[str], merge: bool) -> PreTrainedModel:
    """A model with PEFT adapters on it, one after another.

    Args:
        model: changed in place.
        adapters: folders or Hub ids.
        merge: add them to the weights; else they stay beside them, all active at once.

    Raises:
        ValueError: one is no adapter, does not fit the model, or changes nothing.
    """
    if not adapters:
        return model
    from peft import PeftModel  # a second of imports that most targets do without

    # peft's own wrapper puts its layers into the model and is then left behind: `set_adapter` of
    # transformers 5.24 asks for a peft that does not exist (docs/upstream.md).
    wrapper: Any = None
    own_dtype: Any = {"autocast_adapter_dtype": False}  # that of the weights, as it is served
    names = [f"adapter_{number}" for number in range(len(adapters))]
    with ExitStack() as stack:
        folders = [
            stack.enter_context(fitting_adapter(adapter, model, merge)) for adapter in adapters
        ]
        before = outcome(model)
        for number, (name, folder) in enumerate(zip(names, folders, strict=True)):
            with _naming(adapters[number], model), _peft_warnings():
                if merge:
                    wrapped = PeftModel.from_pretrained(model, folder)
                    check_arrival(wrapped, folder, "default")
                    model = wrapped.merge_and_unload(safe_merge=True)
                else:
                    if wrapper is None:
                        wrapper = PeftModel.from_pretrained(model, folder, name, **own_dtype)
                    else:
                        missing = wrapper.load_adapter(folder, name, **own_dtype).missing_keys
                        if missing:
                            raise ValueError(f"Found missing adapter keys: {missing}")
                    check_arrival(wrapper, folder, name)
                    wrapper.base_model.set_adapter(names[: number + 1])
                after = outcome(model)
                check_effect(before, after)
                before = after
    return model


@contextmanager
def fitting_adapter(adapter: str, model: PreTrainedModel, merge: bool) -> Iterator[Path]:
    """`fitting` of a folder or Hub id, whose errors name it."""
    with ExitStack() as stack:
        with _naming(adapter, model):
            folder = stack.enter_context(fitting(adapter, adapter_folder(adapter), model, merge))
        yield folder


@contextmanager
def _naming(adapter: str, model: PreTrainedModel) -> Iterator[None]:
    """Within, what is wrong with an adapter is a `ValueError` that names it and the class."""
    try:
        yield
    except (*FAULTS, UserWarning) as error:
        reason = " ".join(str(error).split())[:400]
        raise ValueError(
            f"{adapter} does not go onto {type(model).__name__} as a PEFT adapter: {reason}"
        ) from error


@contextmanager
def _peft_warnings() -> Iterator[None]:
    """Within, an adapter that lacks weights for its layers, which peft would leave random, is an
    error; and what transformers 5.24 finds old-fashioned in peft is left unsaid."""
    with warnings.catch_warnings():
        warnings.filterwarnings("error", "Found missing adapter keys", UserWarning)
        warnings.filterwarnings("ignore", ".*is_gradient_checkpointing", FutureWarning)
        yield


def adapter_folder(adapter: str) -> Path:
    """Where an adapter lies, after it was downloaded where it has to be.

    Raises:
        ValueError: one of its files is damaged.
    """
    path, revision = split_revision(adapter)
    if Path(path).is_dir():
        check_files(path)
        return Path(path)
    return Path(snapshot_download(path, revision=revision, allow_patterns=FILES))


def tokenizer_folder(adapters: Sequence[str]) -> Path | None:
    """Of the last adapter that brings a tokenizer, whose chat template it was then trained with;
    None: the target's own is right."""
    folders = [adapter_folder(adapter) for adapter in reversed(adapters)]
    return next((f for f in folders if (f / "tokenizer_config.json").is_file()), None)


def loading_arguments(
    quantization: Quantization | None, device: torch.device | str
) -> dict[str, Any]:
    """What `from_pretrained` is told of bits; nothing for `torchao-int8`, which comes after it.

    Raises:
        ValueError: the library is not installed.
    """
    if quantization is None or quantization == "torchao-int8":
        return {}
    _needs("bitsandbytes", quantization)
    eight = quantization == "bnb-int8"
    config = BitsAndBytesConfig(
        load_in_8bit=eight,
        load_in_4bit=not eight,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_compute_dtype=torch.bfloat16,
    )
    return {"quantization_config": config, "device_map": {"": str(device)}}


def quantise(model: PreTrainedModel) -> None:
    """Hold the weights of the decoder layers as int8, a scale a row, in place; embeddings and LM
    head, which the head shares, stay as they are.

    Raises:
        ValueError: torchao is not installed.
    """
    _needs("torchao", "torchao-int8")
    from torchao.quantization import Int8WeightOnlyConfig, quantize_

    def in_a_layer(module: nn.Module, name: str) -> bool:
        # Adapters stay in their own precision.
        return isinstance(module, nn.Linear) and "layers." in name and ".lora_" not in name

    quantize_(model, Int8WeightOnlyConfig(), in_a_layer)


def _needs(library: str, quantization: Quantization) -> None:
    try:
        __import__(library)
    except ImportError as error:
        raise ValueError(
            f"target.quantization={quantization} needs {library}: pip install {library}"
        ) from error


def model_fingerprint(model: nn.Module, config: Any) -> str:
    """SHA-256 over a configuration and every weight: equal models, equal prints.

    Args:
        model: whose state dict counts, in the dtypes that it has now.
        config: of transformers; what changes no value is left out.
    """
    content = config.to_dict()
    changes_no_value = ("transformers_version", "_name_or_path", "headstart_")
    content = {k: v for k, v in content.items() if not k.startswith(changes_no_value)}
    digest = hashlib.sha256(json.dumps(content, sort_keys=True, default=str).encode())
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        for part in raw_bytes(tensor):
            digest.update(part)
    return digest.hexdigest()


def raw_bytes(tensor: torch.Tensor) -> Iterator[Any]:
    """The bytes of a tensor, or of the plain ones that a quantised tensor is made of."""
    if hasattr(tensor, "__tensor_flatten__"):
        names, _ = tensor.__tensor_flatten__()
        for name in names:
            yield from raw_bytes(getattr(tensor, name))
        return
    flat = tensor.detach().cpu().contiguous().view(-1)
    yield flat.view(torch.uint8).numpy().data if flat.numel() else b""

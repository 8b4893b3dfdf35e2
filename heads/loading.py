"""Loading targets: from built-in names, folders, the Hub, GGUF files or memory, as they will be
served."""

import copy
import difflib
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from torch import nn
from transformers import (
    AutoTokenizer,
    BitsAndBytesConfig,
    Gemma3TextConfig,
    Gemma4ForCausalLM,
    Gemma4TextConfig,
    GenerationConfig,
    GgufConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)

from headstart.common import machine
from headstart.common.children import temporary_folder
from headstart.common.console import phase, print_once
from headstart.common.processes import check_same_everywhere, join_processes, told_by_main
from headstart.common.versions import check_transformers
from headstart.configs.schema import Quantization, TargetConfig
from headstart.heads.adapters import add_adapters, fit_adapter, tokenizer_folder
from headstart.heads.admission import (
    check_file,
    check_files,
    check_tied_files,
    check_values,
    check_vocabulary,
    check_weights,
    is_finite,
    load_model_config,
    load_whole,
    reading,
)
from headstart.heads.gemma3_270m import GEMMA3_SAMPLING, gemma3_270m_dir, header_read_once
from headstart.heads.live import live_target, moved
from headstart.heads.target import (
    SUPPORTED,
    Gemma3ForAssistedDecoding,
    Target,
    check_supported,
    checkpoint_settings,
    weights_sample,
)
from headstart.heads.tokens import TargetTokens, complete_tokenizer

TINY_TARGETS = ("tiny-gemma4", "tiny-gemma3")
BUILT_IN = ("gemma3-270m", *TINY_TARGETS)


def load_target_config(
    name: str, revision: str | None = None, trust_remote_code: bool = False
) -> Any:
    """The configuration of a supported target, without its weights, or `ValueError`; arguments of
    `load_target`."""
    if name in TINY_TARGETS:
        return tiny_config(name)
    if (live := live_target(name)) is not None:
        return _checked(copy.deepcopy(live.model.config), name)
    path, options = _where(name)
    if options:
        check_file(Path(name))
    else:
        check_files(path)
    nothing = f"is no built-in name ({', '.join(BUILT_IN)}), and no folder or Hub id that loads"
    if path == name and "/" not in name and not Path(name).exists():  # no Gemma has such an id
        nearest = difflib.get_close_matches(name, BUILT_IN, n=1, cutoff=0.0)[0]
        raise ValueError(
            f"target {name!r} is no folder, no Hub id (ORG/NAME) and no built-in name: the nearest "
            f"of these is {nearest} ({', '.join(BUILT_IN)})"
        )
    with reading(f"target {name!r}", nothing):
        config = load_model_config(name, path, revision, trust_remote_code, **options)
    if trust_remote_code:
        _say_trusted(name)
    return _checked(config, name)


def _checked(config: Any, name: str) -> Any:
    with reading(name, "cannot be a target"):
        check_supported(config)
        check_values(config.get_text_config(), name)
    return config


@cache
def _say_trusted(name: str) -> None:
    # Once: a command reads a configuration several times. A run file may have turned it on.
    print_once(f"{name}: code that lies in it may run on this machine (target.trust_remote_code)")


def load_target(
    name: str, dtype: str = "auto", device: torch.device | str = "cpu", **settings: Any
) -> Target:
    """Load a frozen target as it will be served: its weights, then its adapters, then fewer bits.

    Args:
        name: `gemma3-270m`, `tiny-gemma4`, `tiny-gemma3`, a local folder, a Hub id or a GGUF file.
        dtype: `bfloat16`, `float32` or `auto`, the one that pays on this machine.
        device: where the weights go.
        settings: further fields of `TargetConfig`, such as `revision` or `adapters`.

    Raises:
        RuntimeError: the installed transformers is outside the tested range.
        ValueError: nothing loadable at `name`, an unsupported architecture, an adapter that is none
            or does not fit, or a quantization that this machine cannot have.
    """
    return _load(TargetConfig.model_validate({"name": name, "dtype": dtype, **settings}), device)


def _load(t: TargetConfig, device: torch.device | str) -> Target:
    with _gguf_read_once(t.name):
        return _loaded(t, device)


def _gguf_read_once(name: str) -> AbstractContextManager[None]:
    """Within, the header of a target's GGUF file is read once; other targets have none."""
    # Without the package transformers says how to get it.
    there = name.endswith(".gguf") and find_spec("gguf") is not None
    return header_read_once() if there else nullcontext()


def _loaded(t: TargetConfig, device: torch.device | str) -> Target:
    check_transformers()
    config, tokenizer, name, commit = _described(t)
    dtype = getattr(torch, machine.natural_dtype() if t.dtype == "auto" else t.dtype)
    bits = _quantization_arguments(t.quantization)
    if t.name in TINY_TARGETS:
        if bits:
            raise ValueError(f"{t.quantization} is of weights in files; {t.name} has none to read")
        model: PreTrainedModel = moved(tiny_target(t.name), device, dtype)
    elif (live := live_target(t.name)) is not None:
        if bits:
            raise ValueError(
                f"{t.quantization} is of weights in files: save the model, and give its folder"
            )
        model = live.served(device, dtype)
    else:
        path, options = _where(t.name)
        if options and bits:
            raise ValueError(f"{t.quantization} is not done to a GGUF file: leave it out")
        if options:
            placed: dict[str, Any] = {"quantization_config": GgufConfig(dequantize=True)}
        else:
            # Straight onto the device: no process holds all weights in the memory of the host.
            placed = {"device_map": {"": str(device)}} | bits
        settings = _generation_settings(t, config)
        model = load_whole(
            SUPPORTED[config.model_type], t.name, path, dtype=dtype, revision=t.revision,
            trust_remote_code=t.trust_remote_code, **options, **placed,
        )  # fmt: skip
        model.generation_config = settings
        if not bits:
            # It is on one device. From a CPU peft would move it, to a GPU if there is one.
            vars(model).pop("hf_device_map", None)
        if options:
            model = model.to(device)
    model = add_adapters(model, t.adapters, t.merge_adapters)
    check_weights(model, name)
    if t.quantization == "torchao-int8":
        quantize_layers(model)
    with reading(name, "does not run"):
        target = Target(model, tokenizer, name, commit, t.eos_token_ids)
        target.settings = _settings(t, commit)
        check_logits(target)
    return target


def _where(name: str) -> tuple[str | Path, dict[str, Any]]:
    """What transformers loads for a target that is not tiny: path or id, and how to read it."""
    if name == "gemma3-270m":
        return gemma3_270m_dir(), {}
    if name.endswith(".gguf"):
        if not Path(name).is_file():
            raise ValueError(f"target {name!r}: there is no such file")
        return Path(name).parent, {"gguf_file": Path(name).name}
    return name, {}


def _described(t: TargetConfig) -> tuple[Any, PreTrainedTokenizerBase, str, str | None]:
    """The configuration of a target, its tokenizer, each of whose tokens has a row in the table,
    what reports call it, and its commit on the Hub; None: it lies in a folder."""
    config = load_target_config(t.name, t.revision, t.trust_remote_code)
    where: str | Path = t.name
    if (own := tokenizer_folder(t.adapters)) is not None:
        where = own
        # The setting is of the target, which somebody else may have made than the adapter.
        tokenizer = _read_tokenizer(own, trust_remote_code=False)
    elif t.name in TINY_TARGETS:
        tokenizer = byte_tokenizer()
    elif (live := live_target(t.name)) is not None:
        tokenizer = live.tokenizer
    else:
        path, options = _where(t.name)
        if options and (Path(path) / "tokenizer.json").is_file():
            options = {}
        tokenizer = _read_tokenizer(
            path, revision=t.revision, trust_remote_code=t.trust_remote_code, **options
        )
    check_vocabulary(tokenizer, config.get_text_config().vocab_size, str(where))
    name = served_name(t)
    complete_tokenizer(tokenizer, config, name, t.chat_template)
    commit = None if live_target(t.name) else getattr(config, "_commit_hash", None)
    return config, tokenizer, name, commit or t.revision


def _read_tokenizer(path: str | Path, **arguments: Any) -> PreTrainedTokenizerBase:
    fix = (
        "copy tokenizer.json and tokenizer_config.json of the model that it was tuned from into it"
    )
    with reading(str(path), f"has no tokenizer that loads; {fix}"):
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(path, **arguments)
        tokenizer("a")  # a setting of a wrong type shows at the first text
        assert tokenizer.all_special_ids is not None  # looking up an empty <unk> never ends
    return tokenizer


def load_served(t: TargetConfig, device: torch.device | str = "cpu") -> Target:
    """The target of a run configuration, shown while it takes its time."""
    with phase(f"Loading {t.name}"):
        return _load(t, device)


def open_target(t: TargetConfig, device: torch.device | str = "cpu") -> Target:
    """`load_served` for all processes of the launch at once; with `t.sharded` the layers are split
    over them."""
    target = open_whole(t, device)
    if t.sharded and join_processes().num_processes > 1:
        target.shard()
    return target


def open_whole(t: TargetConfig, device: torch.device | str = "cpu") -> Target:
    """`load_served` for all processes of the launch at once, whole in each.

    Raises:
        ValueError: `load_served` raises it, or the processes have different weights.
    """
    with join_processes().main_process_first():  # it downloads, or converts
        target = load_served(t, device)
    fix = "Give all machines the same files, and name target.dtype where processors differ"
    check_same_everywhere(f"target {target.name}", weights_sample(target.model), fix)
    # Of all weights, which takes a minute for large ones: the main process tells the others.
    target.fingerprint = told_by_main(lambda: target.fingerprint)
    return target


def check_target(t: TargetConfig) -> None:
    """Raise `ValueError` for all that can be known of a target before its weights are loaded: its
    architecture, its files, its tokenizer, whether its tables are one, and whether its adapters go
    onto it."""
    load_target_tokens(t)
    if t.name not in BUILT_IN and Path(t.name).is_dir():
        check_tied_files(Path(t.name), t.name)
    if not t.adapters:
        return
    config = load_target_config(t.name, t.revision, t.trust_remote_code)
    with torch.device("meta"):  # no memory: of the weights only their names and shapes count
        model = SUPPORTED[config.model_type](config)
    with temporary_folder() as work:
        for number, adapter in enumerate(t.adapters):
            fit_adapter(adapter, model, t.merge_adapters, work / str(number))


def load_target_tokens(t: TargetConfig) -> TargetTokens:
    """The tokenizer of a supported target and how its texts end, or `ValueError`."""
    with _gguf_read_once(t.name):
        config, tokenizer, name, commit = _described(t)
    settings = GenerationConfig()
    if (live := live_target(t.name)) is not None:
        settings = live.model.generation_config
    elif t.name not in TINY_TARGETS:
        settings = _generation_settings(t, config)
    tokens = TargetTokens(tokenizer, name, commit, settings, t.eos_token_ids)
    tokens.settings = _settings(t, commit)
    return tokens


def _generation_settings(t: TargetConfig, config: Any) -> GenerationConfig:
    """Those of the checkpoint; of the built-in Gemma 3, whose GGUF file has none, Google's own."""
    settings = checkpoint_settings(_where(t.name)[0], t.revision, config)
    if t.name == "gemma3-270m":
        settings.update(**GEMMA3_SAMPLING)
    return settings


def served_name(t: TargetConfig) -> str:
    """What reports call a target: `NAME + ADAPTER (QUANTIZATION)`."""
    whole = " + ".join([t.name, *t.adapters])
    return whole if t.quantization is None else f"{whole} ({t.quantization})"


NOTED = {"name", "revision", "adapters", "merge_adapters", "quantization"}
"""What is noted of a target, and all that is taken of a note: a stranger's may not say whose code
runs, nor which file is a chat template."""


def _settings(t: TargetConfig, commit: str | None) -> dict[str, Any]:
    return t.model_copy(update={"revision": commit}).model_dump(mode="json", include=NOTED)


def noted_target(note: Mapping[str, Any], name: str = "name") -> TargetConfig:
    """The target that a head, conversations or a store were made for, as they note it.

    Args:
        note: `Target.identity`, or settings with its keys; those of earlier versions have a name
            alone.
        name: key of the name there.

    Raises:
        ValueError: it notes what is no target.
    """
    with reading("the note of a target", "is none"):
        settings = note.get("config") or {"name": note[name], "revision": note.get("revision")}
        return TargetConfig.model_validate({k: v for k, v in settings.items() if k in NOTED})


def _quantization_arguments(quantization: Quantization | None) -> dict[str, Any]:
    """What `from_pretrained` is told of bits; nothing for `torchao-int8`, which comes after it.
    `ValueError`: the library is not installed."""
    if quantization is None:
        return {}
    library = "torchao" if quantization == "torchao-int8" else "bitsandbytes"
    if find_spec(library) is None:
        raise ValueError(
            f"target.quantization={quantization} needs {library}: pip install {library}"
        )
    if library == "torchao":
        return {}
    eight = quantization == "bnb-int8"
    config = BitsAndBytesConfig(
        load_in_8bit=eight, load_in_4bit=not eight, bnb_4bit_quant_type="nf4",
        bnb_4bit_compute_dtype=torch.bfloat16,
    )  # fmt: skip
    return {"quantization_config": config}


def quantize_layers(model: PreTrainedModel) -> None:
    """Hold the weights of the decoder layers as int8, a scale a row, in place; embeddings and LM
    head, which the head shares, and adapters stay as they are."""
    from torchao.quantization import Int8WeightOnlyConfig, quantize_

    def in_a_layer(module: nn.Module, name: str) -> bool:
        return isinstance(module, nn.Linear) and "layers." in name and ".lora_" not in name

    quantize_(model, Int8WeightOnlyConfig(), in_a_layer)


@torch.no_grad()
def check_logits(target: Target) -> None:
    """Raise `ValueError` where a target's logits after one token are no numbers, though its weights
    are: they overflow in its dtype."""
    first = target.tokenizer.bos_token_id or target.eos_ids[0]
    hidden = target.activations(torch.tensor([[first]], device=target.device)).hidden
    logits = target.logits(hidden)
    if logits.min() == logits.max():
        raise ValueError(
            f"{target.name}: all of its logits are {float(logits.max()):g}: its weights say "
            "nothing. Save or download it again"
        )
    if not is_finite(logits):
        raise ValueError(
            f"{target.name}: its logits are NaN or infinite in {target.table.dtype}, though its "
            "weights are numbers: try target.dtype=float32"
        )


# Tiny random targets from the real configuration classes, with a byte tokenizer: they cover every
# architecture whose weights are not at hand, in tests and in `configs/tiny.yaml`.
VOCAB_SIZE = 320  # 256 bytes and the special tokens, with room to spare
_TEXT: dict[str, Any] = {
    "vocab_size": VOCAB_SIZE, "hidden_size": 48, "intermediate_size": 64, "num_hidden_layers": 6,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16, "sliding_window": 8,
    "max_position_embeddings": 1024,
    "initializer_range": 0.2,  # large enough that attention and MLP have a say
    "layer_types": ["sliding_attention", "sliding_attention", "full_attention"] * 2,
}  # fmt: skip
_GEMMA4: dict[str, Any] = {
    "global_head_dim": 32, "hidden_size_per_layer_input": 0, "vocab_size_per_layer_input": 0,
    "final_logit_softcapping": 30.0,
}  # fmt: skip


def gemma4_text_config(**changes: Any) -> Gemma4TextConfig:
    """A tiny Gemma 4 text configuration; `changes` go to `Gemma4TextConfig`."""
    return Gemma4TextConfig(**{**_TEXT, **_GEMMA4, **changes})


def gemma3_config(**changes: Any) -> Gemma3TextConfig:
    """A tiny Gemma 3 text configuration; `changes` go to `Gemma3TextConfig`."""
    return Gemma3TextConfig(**{**_TEXT, "query_pre_attn_scalar": 16, **changes})


def tiny_config(name: str) -> Gemma3TextConfig | Gemma4TextConfig:
    """`tiny-gemma4` (KV sharing, per-layer embeddings, soft cap) or `tiny-gemma3`."""
    if name == "tiny-gemma3":
        return gemma3_config()
    per_layer = {"hidden_size_per_layer_input": 8, "vocab_size_per_layer_input": VOCAB_SIZE}
    return gemma4_text_config(num_kv_shared_layers=3, **per_layer)


def tiny_target(name: str) -> PreTrainedModel:
    """The model of `tiny_config(name)`, with the same weights each time."""
    cls = Gemma3ForAssistedDecoding if name == "tiny-gemma3" else Gemma4ForCausalLM
    return random_model(lambda: cls(tiny_config(name)))


def random_model(build: Callable[[], PreTrainedModel]) -> PreTrainedModel:
    """A model with seeded random weights whose greedy text is varied.

    The residual stream of a random model still holds the embedding of its last token, so a tied
    LM head repeats that token for ever. Random signs in the final norm break this.
    """
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(0)
        model = build()
        norm: Any = model.get_decoder().norm
        signs = torch.randint(0, 2, norm.weight.shape) * 2.0 - 1.0
        # Gemma 3 stores w of a `1 + w` norm.
        norm.weight.copy_(signs - 1 if type(norm).__name__.startswith("Gemma3") else signs)
    return model


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """One token a byte, after <pad> 0, <eos> 1, <bos> 2, <unk> 3, as in Gemma's tokenizers."""
    specials = ["<pad>", "<eos>", "<bos>", "<unk>"]
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: i for i, token in enumerate([*specials, *alphabet])}
    tokenizer = Tokenizer(models.BPE(vocabulary, [], unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<bos> $A", special_tokens=[("<bos>", vocabulary["<bos>"])]
    )
    names = dict(zip(("pad_token", "eos_token", "bos_token", "unk_token"), specials, strict=True))
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names)

"""What is let in of a checkpoint: files that are whole, and weights that all arrive and say
something: no NaN or infinity, no zeros in a head, no codes of a quantization without scales.

`from_pretrained` casts whatever a file holds to the dtype that it is asked for. Of int8 or fp8
codes it so makes numbers that are off by each row's scale, without a word.

Letters: D target width, V vocabulary.
"""

import json
import logging
import math
import re
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError, safe_open
from torch import nn
from transformers import AutoConfig, PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import cached_file, find_adapter_config_file

from headstart.common.console import print_once
from headstart.common.files import plain_name, put_back

READ = (
    "config.json", "generation_config.json", "adapter_config.json", "model.safetensors.index.json",
    "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "chat_template.jinja",
    "adapter_model.safetensors",
)  # fmt: skip
# Only the first that is there is read; people download the others as pointers.
EITHER = (
    ("model.safetensors", "model-*.safetensors", "pytorch_model*.bin"),
    ("tokenizer.json", "tokenizer.model"),
)
LFS_POINTER = b"version https://git-lfs"  # begins the file that Git LFS leaves in place of a large
PARSED = 2**20  # bytes: a larger tokenizer.json takes a second, and its reader looks at it

# What wrappers of a training put into the names of weights, which a plain model does not have:
# around the model and within it, since each pattern is applied once.
_WITHIN = r"(?:_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module|_forward_module)\."
WRAPPERS = {
    rf"^{_WITHIN}": "", rf"(?<=\.){_WITHIN}": "",
    r"^module\.": "", r"^base_model\.model\.": "",
}  # fmt: skip
# Names of a multimodal class for what a text class has too: of today's, and of earlier releases.
MULTIMODAL = {r"^model\.language_model\.": "model.", r"^language_model\.model\.": "model."}

# What may be left out: what no text passes through, images and sound of a multimodal class; the
# clusters of a head whose config.json has switched them off; what is calculated from config.json.
TOWERS = ("vision_tower", "audio_tower", "embed_vision", "embed_audio", "multi_modal_projector")
OF_TOWERS = re.compile(rf"(^|\.)({'|'.join(TOWERS)})\.")
SPARE = re.compile(rf"^masked_embedding\.|\brotary_emb\.|\brope_freqs\.|{OF_TOWERS.pattern}")
# Of the text checkpoints of Gemma 3, whose tokenizer is that of the multimodal ones.
WITHOUT_ROW = "<image_soft_token>"


# What libraries raise over the files of strangers: a number where a text should be, half a header;
# or warn of, where a warning is made an error.
FAULTS = (
    OSError, ValueError, TypeError, LookupError, AttributeError, ArithmeticError, AssertionError,
    RuntimeError, ImportError, MemoryError, SafetensorError, StrictDataclassError, UserWarning,
)  # fmt: skip
WEIGHTS_A_BYTE = 16  # at most: fewer bits than any format has, and tied or calculated ones
LAYERS = 1000  # more than any model has; a library would build them one by one before it refused


@contextmanager
def reading(name: str, what: str = "") -> Iterator[None]:
    """Within, whatever a library raises over somebody's files is a `ValueError` of one line, with
    the name of the checkpoint and what is wrong; a refusal that names it already stays."""
    try:
        yield
    except FAULTS as error:
        if isinstance(error, ValueError) and name in str(error):
            raise
        reason = f"no {error}" if isinstance(error, KeyError) else str(error)
        reason = " ".join(reason.split())[:400] or type(error).__name__
        raise ValueError(f"{name} {what}".rstrip() + f": {reason}") from error


def check_files(folder: str | Path) -> None:
    """Raise `ValueError`, naming file and fix, where a file of a local folder is damaged.

    Of large files only what shows a pointer of Git LFS or a file that was cut short is read. A Hub
    id is passed over: what is downloaded is compared with its length there.
    """
    name, folder = str(folder), Path(folder)
    put_back(folder)
    if not folder.is_dir():
        if name.startswith(("/", ".", "~")) or name.count("/") > 1:  # no Hub id looks so
            raise ValueError(f"there is no folder {name}")
        return
    paths = [folder / name for name in READ if (folder / name).is_file()]
    for patterns in EITHER:
        paths += next(filter(None, (sorted(folder.glob(pattern)) for pattern in patterns)), [])
    for path in paths:
        check_file(path)
    quantization = None
    if (folder / "config.json").is_file():
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        quantization = config.get("quantization_config")
    check_codes(name, weight_dtypes(folder), quantization)


def check_file(path: Path) -> None:
    """Raise `ValueError`, naming file and fix, where a file is damaged."""
    with path.open("rb") as file:
        start = file.read(len(LFS_POINTER))
        file.seek(max(0, path.stat().st_size - 64))
        end = file.read().rstrip()
    if start == LFS_POINTER:
        raise ValueError(
            f"{path} is a Git LFS pointer and not the file itself: run `git lfs pull` in its "
            "folder, or download the file again"
        )
    with reading(str(path), "is damaged or cut short; copy or download it again"):
        if path.suffix == ".safetensors":
            with safe_open(path, framework="pt"):
                pass
        elif path.suffix == ".gguf" and not start.startswith(b"GGUF"):
            raise ValueError("it does not begin as a GGUF file does")
        elif path.suffix == ".json" and (
            path.name != "tokenizer.json" or path.stat().st_size < PARSED
        ):
            content = json.loads(path.read_text(encoding="utf-8"))
            if not isinstance(content, dict):
                raise ValueError("it holds no JSON object")
            _check_depth(content)
            files = content.get("weight_map")
            for file in files.values() if isinstance(files, dict) else []:
                plain_name(file, path)
        elif path.suffix == ".json" and not end.endswith(b"}"):
            raise ValueError("its end is missing")


def _check_depth(config: dict[str, Any]) -> None:
    for part in (config, *config.values()):  # of text, images and sound
        layers = part.get("num_hidden_layers") if isinstance(part, dict) else None
        if isinstance(layers, int | float) and not 0 < layers <= LAYERS:
            raise ValueError(f"num_hidden_layers is {layers}")


def load_model_config(
    name: str, path: str | Path, revision: str | None, trust_remote_code: bool, **options: Any
) -> Any:
    """The configuration of a checkpoint, with `options` for AutoConfig.

    Raises:
        ValueError: its attention would be computed by a kernel of the Hub, which transformers
            would download and run, unasked; or there is an adapter at its place, which transformers
            would add to the weights, or to those of a base that it names, untold.
    """
    if find_adapter_config_file(str(path), revision=revision) is not None:
        raise ValueError(
            f"{name} holds an adapter (adapter_config.json), which is not told apart from its "
            "weights: give the base as the target and the adapter's folder in target.adapters; or "
            "delete adapter_config.json, where the adapter was merged into the weights"
        )
    # Not left out: transformers then asks on the terminal whether to run what a stranger wrote.
    config = AutoConfig.from_pretrained(
        path, revision=revision, trust_remote_code=trust_remote_code, **options
    )
    for part in (config, config.get_text_config()):
        kernel = part._attn_implementation
        if kernel is not None and "/" in str(kernel):
            raise ValueError(
                f"{name} wants its attention computed by code of the Hub ({kernel}): take "
                "attn_implementation out of its config.json"
            )
    return config


def _check_size(cls: Any, name: str, path: Path) -> None:
    """Raise `ValueError` where config.json of a local folder asks for far more weights than its
    files can hold: what is missing would be made of nothing before it is refused."""
    files = [file for kind in ("safetensors", "bin") for file in path.glob(f"*.{kind}")]
    with reading(name, "does not load"), torch.device("meta"):
        model = cls(cls.config_class.from_pretrained(path))
    wanted = sum(tensor.numel() for tensor in (*model.parameters(), *model.buffers()))
    held = sum(file.stat().st_size for file in files)
    if wanted > WEIGHTS_A_BYTE * max(held, 2**20):
        raise ValueError(
            f"{name}: config.json asks for {wanted:,} weights, and its files hold {held:,} bytes: "
            "copy all of them from one place"
        )


def load_whole(cls: Any, name: str, path: str | Path, **arguments: Any) -> Any:
    """`cls.from_pretrained(path, **arguments)` of a target or a head that messages call `name`, all
    of whose weights come from its files.

    Names that wrappers of a training or a multimodal class gave them are read too, with a line.

    Raises:
        ValueError: it does not load, or weights are missing, of no layer, or of another shape.
    """
    if "gguf_file" not in arguments and Path(path).is_dir():
        _check_size(cls, name, Path(path))
    model, info = _read(cls, name, path, arguments)
    text_class = not any("language_model." in key for key in info["missing_keys"])
    mapping = WRAPPERS | (MULTIMODAL if text_class else {})
    found = {key: renamed(key, mapping) for key in sorted(info["unexpected_keys"])}
    changed = {old: new for old, new in found.items() if new in info["missing_keys"]}
    if changed:
        model, info = _read(cls, name, path, {**arguments, "key_mapping": mapping})
    if "gguf_file" not in arguments:
        folder = Path(path)
        if not folder.is_dir():  # of the Hub: in the cache
            config_file = cached_file(str(path), "config.json", revision=arguments.get("revision"))
            folder = Path(str(config_file)).parent
        own = None if "quantization_config" in arguments else model.config.to_dict()
        check_codes(
            name, weight_dtypes(folder), own and own.get("quantization_config"), model.state_dict(),
            info["unexpected_keys"],
        )  # fmt: skip
    _check_arrival(model, name, info)
    if changed:
        old, new = next(iter(changed.items()))
        print_once(
            f"{name}: {len(changed)} weights are read under other names: {old} as {new}, ..."
        )
    return model


def renamed(key: str, mapping: dict[str, str]) -> str:
    """The name of a weight after each of the patterns was replaced once, as transformers does."""
    for pattern, replacement in mapping.items():
        key = re.sub(pattern, replacement, key, count=1)
    return key


def _read(
    cls: Any, name: str, path: str | Path, arguments: dict[str, Any]
) -> tuple[Any, dict[str, Any]]:
    """A model, and which keys were missing, unexpected and mismatched; transformers' own table of
    them is left unsaid: ours is a refusal, or a line."""

    def other(record: logging.LogRecord) -> bool:
        return "LOAD REPORT" not in record.getMessage()

    logger = logging.getLogger("transformers.modeling_utils")
    logger.addFilter(other)
    try:
        with reading(name, "does not load"):
            # Without ignoring it, a mismatch is an error that names no tensor.
            model, info = cls.from_pretrained(
                path, output_loading_info=True, ignore_mismatched_sizes=True, **arguments
            )
    finally:
        logger.removeFilter(other)
    return model, info


def _check_arrival(model: PreTrainedModel, name: str, info: dict[str, Any]) -> None:
    """Raise `ValueError`, naming some, where weights of the model are not those of its files.

    What transformers knows to be left out (a tied table, keys of KV-shared layers) is not in
    `info`.
    """
    missing, unexpected = sorted(info["missing_keys"]), sorted(info["unexpected_keys"])
    if model.config.to_dict().get("quantization_config") is not None:
        # Scales and the like are the format's own business.
        missing = [key for key in missing if key.endswith(".weight")]
        unexpected = [key for key in unexpected if key.endswith(".weight")]
    # What reads images is let go after loading (`Target`): it may be random till then.
    missing = [key for key in missing if not OF_TOWERS.search(key)]
    spare = [key for key in unexpected if SPARE.search(key)]
    unexpected = sorted(set(unexpected) - set(spare))
    mismatched = [
        f"{key} {list(mine)} where config.json says {list(its)}"
        for key, mine, its in sorted(info["mismatched_keys"])
    ]
    faults = {"missing": missing, "of no layer": unexpected, "of another shape": mismatched}
    said = [f"{len(keys)} {what} ({_some(keys)})" for what, keys in faults.items() if keys]
    if said:
        raise ValueError(
            f"{name}: not all weights of {type(model).__name__} come from its files, the rest "
            f"would be random: {'; '.join(said)}. Copy all of its files from one place, or save it "
            "again with save_pretrained() of the plain class that config.json names: an adapter "
            "after merge_and_unload() (or apart from its base, in target.adapters), a resized "
            "table with their number as vocab_size and the tokenizer of that training"
        )
    if spare:
        print_once(f"{name}: {len(spare)} weights of its files are not needed ({_some(spare)})")


def _some(keys: Sequence[str]) -> str:
    return ", ".join(keys[:3]) + (", ..." if len(keys) > 3 else "")


def tie_equal_tables(model: PreTrainedModel, name: str) -> None:
    """Let the LM head of a target share the embedding table [V, D], where both are equal, or raise
    `ValueError`: a head shares one table with its target."""
    into, out = model.get_input_embeddings(), model.get_output_embeddings()
    if out.weight is into.weight:
        return
    _check_equal(into.weight, out.weight, name)
    out.weight = into.weight
    for config in (model.config, model.config.get_text_config()):
        config.tie_word_embeddings = True
    print_once(f"{name}: its LM head equals its embedding table, and is tied to it")


def check_tied_files(folder: Path, name: str) -> None:
    """Raise `ValueError` where the safetensors files of a local folder hold both tables, and these
    differ: `tie_equal_tables` before weights are loaded."""
    tables = {}
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, framework="pt") as file:
            for key in file.keys():  # noqa: SIM118
                if key.endswith((".embed_tokens.weight", "lm_head.weight")):
                    tables[key.rpartition(".weight")[0].rpartition(".")[2]] = file.get_tensor(key)
    if len(tables) == 2:
        _check_equal(tables["embed_tokens"], tables["lm_head"], name)


def _check_equal(table: torch.Tensor, lm_head: torch.Tensor, name: str) -> None:
    if lm_head.shape != table.shape or not torch.equal(lm_head, table):
        raise ValueError(
            f"unsupported target {name}: it lacks tied embeddings (its LM head is a table of its "
            "own, which the head could not share). Tune it with lm_head and embed_tokens frozen, "
            "or with tied ones: peft's ensure_weight_tying=True for modules_to_save, and "
            "tie_word_embeddings: true in config.json"
        )


def check_vocabulary(tokenizer: PreTrainedTokenizerBase, rows: int, where: str) -> None:
    """Raise `ValueError` where the tokenizer of the folder or id `where` has tokens that the table
    of a target, of V rows, has no row for."""
    vocabulary = tokenizer.get_vocab().items()
    over = sorted((i, token) for token, i in vocabulary if i >= rows and token != WITHOUT_ROW)
    if over:
        raise ValueError(
            f"the tokenizer of {where} has {len(over)} tokens for which the target's table of "
            f"{rows:,} rows has none (first: {over[0][1]!r} is {over[0][0]}): tokens were added. "
            "Give as the target the checkpoint whose table was resized with them "
            "(resize_token_embeddings, merge_and_unload, save_pretrained)"
        )


# Keys of config.json whose numbers are above 0 where there are any, and the most that some can be.
ABOVE_ZERO = {
    "sliding_window", "max_position_embeddings", "top_k_experts", "query_pre_attn_scalar",
    "rms_norm_eps", "final_logit_softcapping", "attn_logit_softcapping",
}  # fmt: skip
ROPE = {"rope_theta", "factor", "partial_rotary_factor"}  # of them, those in rope_parameters
AT_MOST = {"rms_norm_eps": 0.1, "partial_rotary_factor": 1.0}


def check_values(config: Any, name: str) -> None:
    """Raise `ValueError` where a number in the text part of the config.json of a target or a head
    cannot be: a model would be built of it, and say something else or stop in mid-text."""
    values = {k: v for k, v in config.to_dict().items() if k in ABOVE_ZERO | ROPE}
    if not getattr(config, "enable_moe_block", False):  # Gemma 3 has no such field
        values.pop("top_k_experts", None)
    # A head without attention has none.
    for layer_type, rope in getattr(config, "rope_parameters", {}).items():
        values |= {f"{layer_type}: {key}": rope[key] for key in ROPE & rope.keys()}
    for key, value in values.items():
        most = AT_MOST.get(key.rpartition(" ")[2], math.inf)
        if value is not None and not 0 < value <= most:
            raise ValueError(
                f"{name}: config.json says {key} is {value}, which cannot be: copy config.json "
                "from where the weights are from"
            )


def is_finite(tensor: torch.Tensor) -> bool:
    """Whether a tensor of any shape holds numbers alone; integers always do."""
    if not tensor.is_floating_point() or not tensor.numel():
        return True
    # The extremes of a tensor with a NaN are NaN; unlike `isfinite` this needs no memory.
    low, high = torch.aminmax(tensor.detach())
    return bool(torch.isfinite(low) and torch.isfinite(high))


def check_weights(model: nn.Module, name: str) -> None:
    """Raise `ValueError`, naming it, where a parameter or buffer of a model that is not quantized
    is no number."""
    for tensor, weight in chain(model.named_parameters(), model.named_buffers()):
        if not is_finite(weight):
            raise ValueError(
                f"{name}: its weight {tensor} holds NaN or infinity: what it says is not to be "
                "trusted. Save it again from a state of the training that was whole, or download "
                "it anew"
            )


def check_alive(head: nn.Module, name: str) -> None:
    """Raise `ValueError`, naming it, where all drafts of a head would be alike, since what every
    one of them passes through is zero: its table, its projections, a norm outside its layers, or
    the factor of a layer."""
    for tensor, weight in chain(head.named_parameters(), head.named_buffers()):
        passed = ".layers." not in tensor or tensor.endswith("layer_scalar")
        if passed and weight.is_floating_point() and not weight.any():
            raise ValueError(
                f"{name}: all of its weight {tensor} is zero, so that its drafts say nothing: it "
                "was saved before its weights were there, or by a process that did not hold them. "
                "Save or download it again"
            )


NUMBERS = ("F64", "F32", "F16", "BF16")  # dtypes of safetensors
WEIGHTS = (".weight", "_proj")  # of a layer, and of all experts of a layer together
# In the names of what says how codes are meant: scales, bitsandbytes' statistics.
SCALES = re.compile(r"scale|absmax|SCB|quant")


def weight_dtypes(folder: Path) -> dict[str, str]:
    """Name of each tensor in the safetensors files of a model or an adapter -> its dtype there."""
    dtypes = {}
    for path in sorted(folder.glob("*model*.safetensors")):
        with safe_open(path, framework="pt") as file:
            for key in file.keys():  # noqa: SIM118
                dtypes[key] = str(file.get_slice(key).get_dtype())
    return dtypes


def check_codes(
    name: str,
    dtypes: Mapping[str, str],
    quantization: Any,
    state: Mapping[str, torch.Tensor] | None = None,
    unread: Collection[str] = (),
) -> None:
    """Raise `ValueError` where weights are codes with nothing by which they would be numbers, or
    where config.json names a quantization of weights that are none of it, as after adapters were
    merged into the weights before they were quantized.

    Args:
        name: of the checkpoint.
        dtypes: of its tensors, `weight_dtypes`.
        quantization: `quantization_config` of its config.json; None: there is none.
        state: of the model that was loaded from them; None: none was yet.
        unread: the tensors that no layer of it has read.
    """
    for key, dtype in dtypes.items():
        if not key.endswith(WEIGHTS) or dtype in NUMBERS:
            continue
        loaded_as_number = state is not None and key in state and state[key].is_floating_point()
        if not _scales(key, dtypes) or (loaded_as_number and _scales(key, unread)):
            raise ValueError(
                f"{name}: its weight {key} is {dtype}, a code of a quantization, and no number: no "
                "scale beside it is read. Save it again in bfloat16 after its quantization was "
                "undone, or copy all of its files from one place; if it was only cast, cast it back"
            )
    if quantization is not None and dtypes and set(dtypes.values()) <= set(NUMBERS):
        raise ValueError(
            f"{name}: its config.json has a quantization_config, and its weights are plain numbers "
            f"({', '.join(sorted(set(dtypes.values())))}): delete it there; how the target is "
            "served is said by target.quantization"
        )


def _scales(key: str, others: Iterable[str]) -> bool:
    """Whether a tensor among the others says how the codes in `key` are meant."""
    prefix = key.removesuffix("weight")
    return any(k.startswith(prefix) and SCALES.search(k.removeprefix(prefix)) for k in others)

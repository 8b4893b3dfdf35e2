"""PEFT adapters of a target: every weight has a module to go to, and the whole an effect.

A head is trained on what the served model says, so adapters come before anything is generated.

Letters: r rank, V vocabulary.
"""

import json
import re
import warnings
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import PreTrainedModel

from headstart.common.children import temporary_folder
from headstart.common.console import print_once
from headstart.common.signals import time_limit
from headstart.heads.admission import MULTIMODAL, OF_TOWERS, WRAPPERS, check_files, reading, renamed
from headstart.heads.kinds import is_head
from headstart.heads.live import live_adapter

WEIGHTS = "adapter_model.safetensors"
CONFIG = "adapter_config.json"
# A plain state dict has names in its keys that peft leaves out of its files.
SAVED_RAW = {r"\.default(\.weight)?$": r"\1", r"(?<=\.lora_magnitude_vector)\.weight$": ""}
TABLE = re.compile(r"\b(lm_head|embed_tokens)\.(base_layer\.)?weight$")
PREFIX = "base_model.model."  # of peft's keys: its wrapper's place for the model
PATTERNS = re.compile(r"\w+_(?:modules|patterns?)|modules_to_save")  # keys of CONFIG that hold them
# How peft looks for a pattern in the name of a module.
FORMS = ("{}", r"(.*\.)?({})$", r"(^|.*\.){}($|\..*)", r"(?:^|.*?\.){}\.(?P<idx>\d+)\.")
MATCHED_IN = 10.0  # seconds, of all patterns in all names of a model: most take milliseconds
OTHER_TRAINING = "both files are of different trainings; copy both from one"
REFUSED = {
    "lora_bias": "for which the target's layers have no place: keep it beside the weights, "
    "target.merge_adapters=false",
    "alora_invocation_tokens": "an activated LoRA, which works after certain tokens only: tune "
    "with a plain one",
    "layer_replication": "repeats of layers of its model: merge it, and give the outcome as the "
    "target",
}
TOO_SLOW = f"a pattern of {CONFIG} takes too long: name the modules one by one"


def fit_adapter(adapter: str, model: PreTrainedModel, merge: bool, work: Path) -> Path:
    """The folder of an adapter whose weights are named as the modules of a model are: its own, or
    `work`, written here, where a text class and a multimodal one name them otherwise.

    Args:
        adapter: folder or Hub id, `ID@REVISION`.
        model: without adapters yet; it may be on the meta device.
        merge: whether it is to be added to the weights, or stays beside them.
        work: a folder that is not there yet.

    Raises:
        ValueError: it is none, of a kind that no head can follow, or of another model.
    """
    with reading(_place(adapter, model)):
        folder = adapter_folder(adapter)
        config = _config(folder, merge)
        _check_patterns(config, [path for path, _ in model.named_modules()])
        with safe_open(folder / WEIGHTS, framework="pt") as file:
            keys = list(file.keys())
            _check_ranks(config, [file.get_slice(key).get_shape() for key in keys])
        kept = _places(keys, model)
        left_out = [key for key in keys if key not in kept]
        rows = model.config.get_text_config().vocab_size
        _check_tables(folder / WEIGHTS, kept, config, rows, merge)
        _check_trained(folder / WEIGHTS, kept)
        changed = [key for key, place in kept.items() if key != place]
        if changed:
            names = f"{changed[0]} as {kept[changed[0]]}"
            print_once(
                f"{adapter}: {len(changed)} weights are read under other names: {names}, ..."
            )
        if left_out:
            what = f"weights of images and sound are left out, as {left_out[0]}"
            print_once(f"{adapter}: {len(left_out)} {what}")
        if not changed and not left_out:
            return folder
        _write(folder, work, config, kept, model)
        return work


def _place(adapter: str, model: PreTrainedModel) -> str:
    return f"{adapter} does not go onto {type(model).__name__} as a PEFT adapter"


def _config(folder: Path, merge: bool) -> dict[str, Any]:
    """What adapter_config.json says, of an adapter that changes weights and can be merged, where it
    is to be."""
    from peft import PeftConfig  # a second of imports that most targets do without

    for name in (WEIGHTS, CONFIG):
        if not (folder / name).is_file():
            raise ValueError(f"it has no {name} (other formats may run code)")
    kind = PeftConfig.from_pretrained(str(folder))
    if kind.is_prompt_learning or kind.is_adaption_prompt:
        raise ValueError(
            "it learns a prompt, and no weights that a head could follow: tune with LoRA instead"
        )
    config: dict[str, Any] = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
    if kind.peft_type == "XLORA":  # peft would read these from wherever it says, the Hub too
        raise ValueError("it mixes other adapters that it names: give each as an adapter")
    for key, reason in REFUSED.items():
        if config.get(key) and (merge or key != "lora_bias"):
            raise ValueError(f"{CONFIG} has {key}, {reason}")
    return config


def _check_patterns(config: Mapping[str, Any], paths: Sequence[str]) -> None:
    """Try the patterns of an adapter on the paths of a model's modules, before peft does: raise
    `TooSlow` where they do not come to an end, `ValueError` where one is no pattern."""
    found = {text for key in config if PATTERNS.fullmatch(key) for text in _texts(config[key])}
    with time_limit(MATCHED_IN, TOO_SLOW):
        for pattern in sorted(found):
            if re.fullmatch(r"[\w.-]*", pattern):
                continue  # a plain name
            try:
                forms = [re.compile(form.format(pattern)) for form in FORMS]
            except (re.error, RecursionError, OverflowError) as error:
                raise ValueError(f"{CONFIG} holds {pattern[:80]!r}, no pattern: {error}") from error
            for path in paths:
                # Of an adapter that stays beside the weights the module is called otherwise.
                for name in (path, f"{path}.base_layer"):
                    for form in forms:
                        form.match(name)
                    forms[0].fullmatch(name)


def _texts(value: Any) -> Iterable[str]:
    """The texts of a value, the keys of an object among them."""
    return [value] if isinstance(value, str) else [t for t in value or () if isinstance(t, str)]


def _check_ranks(config: Mapping[str, Any], shapes: Sequence[Sequence[int]]) -> None:
    """Raise `ValueError` where adapter_config.json says a rank that no weight of the file can have:
    peft makes room for it before it looks."""
    most = max((side for shape in shapes for side in shape), default=0)
    ranks = [config.get("r"), *(config.get("rank_pattern") or {}).values()]
    sides = [("rank", rank) for rank in ranks]
    sides += [(key, config.get(key)) for key in ("num_vectors", "vector_length", "n_frequency")]
    for key, side in sides:
        if isinstance(side, int | float) and side > most:
            raise ValueError(
                f"{CONFIG} says {key} {side:,}, and no side of its weights is longer than "
                f"{most:,}: {OTHER_TRAINING}"
            )


def _places(keys: Sequence[str], model: PreTrainedModel) -> dict[str, str]:
    """Key of an adapter's file -> the key of the same weight on this model, but for those of images
    and sound, which a text class does without. `ValueError`: there is no module for some."""
    owners = _owners(model)
    named = (name for name, _ in model.named_modules() if name.endswith("embed_tokens"))
    text = next(named, "")  # a draft head may have none
    text = text.removesuffix("embed_tokens")  # `model.` or `model.language_model.`
    places: dict[str, str] = {}
    lost = []
    for key in keys:
        bare = renamed(key, WRAPPERS | SAVED_RAW)
        if bare.startswith("base_model."):
            places[key] = key  # shared by all of its layers, as VeRA's matrices
            continue
        plain = renamed(bare, MULTIMODAL).removeprefix("language_model.")
        tried = (bare, plain, text + plain.removeprefix("model."))
        place = next((place for place in tried if _owner(place, owners) is not None), None)
        if place is not None:
            places[key] = PREFIX + place
        elif not OF_TOWERS.search(bare):
            lost.append(key)
    if lost:
        raise ValueError(
            f"{len(lost)} of its {len(keys)} weights match no module (first: {lost[0]}): it was "
            "made for another model, or another class of it; tune on this one"
        )
    if all(OF_TOWERS.search(place) for place in places.values()):
        raise ValueError("it changes nothing that text passes through, only images or sound")
    return places


def _owners(model: nn.Module) -> dict[str, nn.Module]:
    """Path -> module, of those with weights of their own: what an adapter can change."""
    named = model.named_modules()
    return {path: m for path, m in named if next(m.parameters(recurse=False), None) is not None}


def _owner(key: str, owners: Mapping[str, nn.Module]) -> str | None:
    """The path of the module that a weight of an adapter belongs to."""
    parts = key.split(".")
    paths = (".".join(parts[:n]) for n in range(len(parts) - 1, 0, -1))
    return next((path for path in paths if path in owners), None)


def _check_tables(
    path: Path, kept: Mapping[str, str], config: Mapping[str, Any], rows: int, merge: bool
) -> None:
    """Raise `ValueError` where one side of the tied pair would change, or the table's V rows."""
    tables: dict[str, torch.Tensor] = {}
    for key, place in kept.items():
        found = re.search(r"\b(lm_head|embed_tokens)\.(.+)", place)
        if found is None:
            continue
        side, weight = found.groups()
        if weight == "weight":
            with safe_open(path, framework="pt") as file:
                tables[side] = file.get_tensor(key)
            if len(tables[side]) != rows:
                raise ValueError(
                    f"its {side} has {len(tables[side]):,} rows, the target's table {rows:,}: "
                    "tokens were added. Merge it on the target after resize_token_embeddings(), "
                    "save_pretrained() both model and tokenizer, and give that folder as the target"
                )
        elif "trainable_tokens" in weight:
            if not merge:
                raise ValueError(
                    "it changes rows of the table, which the head shares: let it be merged, "
                    "with target.merge_adapters=true"
                )
        elif merge or side == "lm_head":
            # Beside the weights, what comes before the table is the target's own affair.
            keep = ", or keep it beside the weights, target.merge_adapters=false"
            keep = "" if side == "lm_head" else keep
            raise ValueError(
                f"it changes {side}, one side of the tied pair: embedding table and LM head are "
                "one table, which the head shares. Tune without lm_head and embed_tokens in "
                f"target_modules{keep}"
            )
    if not tables or config.get("ensure_weight_tying"):
        return
    if len(tables) == 1 or not torch.equal(*tables.values()):
        raise ValueError(
            f"it has a table of its own for {' and another for '.join(sorted(tables))}, and the "
            "head shares one for both: tune without them in modules_to_save, or with "
            "ensure_weight_tying=True"
        )
    if not merge and config.get("modules_to_save"):
        raise ValueError("its tables are not tied: let it be merged, target.merge_adapters=true")


def _check_trained(path: Path, kept: Mapping[str, str]) -> None:
    """Raise `ValueError` where low-rank products B A [out, in] are all there is, and are zero."""
    with safe_open(path, framework="pt") as file:
        for key in kept:
            if not re.search(r"\.lora_(embedding_)?[AB](\.weight)?$", key):
                return  # another kind of weight: what it does is seen on the model
            if re.search(r"lora_(embedding_)?B", key) and bool(file.get_tensor(key).any()):
                return
    raise ValueError(
        "all its B matrices are zero, so that it changes nothing: it was saved before its training "
        "began, or by a process that did not train"
    )


def _write(
    folder: Path, work: Path, config: dict[str, Any], kept: Mapping[str, str], model: nn.Module
) -> None:
    """Write an adapter as `model` names its modules, one by one: a pattern for names of the other
    class might find none here, or those of images too."""
    from peft.utils.other import get_pattern_key

    owners = _owners(model)
    earlier = {}  # path here -> the path that the patterns of adapter_config.json mean
    for key, place in kept.items():
        path = str(_owner(place.removeprefix(PREFIX), owners))
        weight = place.removeprefix(f"{PREFIX}{path}.")
        if isinstance(owners[path], nn.Linear | nn.Embedding) and weight.startswith("lora_"):
            earlier[path] = renamed(key, WRAPPERS | SAVED_RAW).removesuffix(f".{weight}")
    changed = config | {
        "target_modules": sorted(earlier),
        "exclude_modules": None, "layers_to_transform": None, "layers_pattern": None,
    }  # fmt: skip
    for name in ("rank_pattern", "alpha_pattern"):
        pattern: dict[str, Any] = config.get(name) or {}
        with time_limit(MATCHED_IN, TOO_SLOW):
            found = {path: get_pattern_key(list(pattern), was) for path, was in earlier.items()}
        changed[name] = {path: pattern[key] for path, key in found.items() if key in pattern}
    weights = load_file(folder / WEIGHTS)
    work.mkdir()
    (work / CONFIG).write_text(json.dumps(changed))
    save_file({new: weights[old] for old, new in kept.items()}, work / WEIGHTS)


def _check_arrival(wrapped: Any, folder: Path, name: str) -> None:
    """Raise `ValueError` where weights of an adapter's file are not on the model: peft drops what
    it has no layer for."""
    from peft import get_peft_model_state_dict

    there = get_peft_model_state_dict(wrapped, adapter_name=name, save_embedding_layers=False)
    with safe_open(folder / WEIGHTS, framework="pt") as file:
        # Of whole tables peft saves copies beside an adapter, and reads them into the model.
        lost = [key for key in set(file.keys()) - set(there) if not TABLE.search(key)]
    if lost:
        raise ValueError(
            f"{len(lost)} of its weights are of layers that {CONFIG} does not name (first: "
            f"{min(lost)}): {OTHER_TRAINING}"
        )


@torch.no_grad()
def _outcome(model: PreTrainedModel) -> torch.Tensor:
    """What an adapter has to change: the logits [1, T, V] of a target for some tokens, from all
    over its vocabulary; all weights of a head, which reads more than tokens."""
    if is_head(model.config):
        return torch.cat([weight.detach().flatten().float() for weight in model.parameters()])
    rows = model.config.get_text_config().vocab_size
    ids = torch.arange(rows // 16, rows, rows // 8, device=model.device)[None]
    return model.eval()(input_ids=ids).logits.float()


FILES = ["*.json", "*.jinja", "*.model", WEIGHTS]  # that are read of an adapter on the Hub


def split_revision(adapter: str) -> tuple[str, str | None]:
    """A folder or Hub id and its revision, of `ID@REVISION`."""
    if Path(adapter).is_dir() or "@" not in adapter:
        return adapter, None
    name, _, revision = adapter.rpartition("@")
    return name, revision


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
    # What stays beside the weights has their dtype, as it is served.
    dtype: Any = {"autocast_adapter_dtype": merge}
    names = ["default" if merge else f"adapter_{n}" for n in range(len(adapters))]
    with temporary_folder() as work:
        folders = [fit_adapter(a, model, merge, work / str(n)) for n, a in enumerate(adapters)]
        before = _outcome(model)
        for number, (name, folder) in enumerate(zip(names, folders, strict=True)):
            with reading(_place(adapters[number], model)), warnings.catch_warnings():
                # peft would leave weights that an adapter lacks for its layers random.
                warnings.filterwarnings("error", "Found missing adapter keys", UserWarning)
                # What transformers 5.24 finds old-fashioned in peft.
                warnings.filterwarnings("ignore", ".*is_gradient_checkpointing", FutureWarning)
                if merge or wrapper is None:
                    wrapper = PeftModel.from_pretrained(model, folder, name, **dtype)
                elif missing := wrapper.load_adapter(folder, name, **dtype).missing_keys:
                    raise ValueError(f"Found missing adapter keys: {missing}")
                _check_arrival(wrapper, folder, name)
                if merge:
                    model = wrapper.merge_and_unload(safe_merge=True)
                else:
                    wrapper.base_model.set_adapter(names[: number + 1])
                after = _outcome(model)
                if torch.equal(before, after):
                    raise ValueError(
                        "it changes nothing, in the dtype that the weights have here: it is not "
                        "trained, or merging rounds its effect away (dtype: float32, or "
                        "target.merge_adapters=false, would keep it)"
                    )
                before = after
    return model


def adapter_folder(adapter: str) -> Path:
    """Where an adapter lies, undamaged, after it was downloaded where it has to be."""
    if (live := live_adapter(adapter)) is not None:
        return live
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

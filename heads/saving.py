"""Heads in the native format, on disk and on the Hub: what plain transformers loads, and back; and
low-rank adapters of a head.

An adapter is trained in place of a head's weights, saved beside it and added to it. One base head
then serves many tuned targets, each with an adapter of some hundred kilobytes.

Letters: H head width, V vocabulary, r rank.
"""

import copy
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, get_args

import torch
from safetensors.torch import save_file
from torch import nn
from transformers import GenerationConfig, PreTrainedModel
from transformers.utils import cached_file

from headstart.common.files import atomic_folder, drop_remote_code
from headstart.configs.schema import DraftPositionOffset, LoraConfig
from headstart.heads.adapters import PREFIX, WEIGHTS, add_adapters, split_revision
from headstart.heads.admission import (
    check_alive,
    check_files,
    check_values,
    check_weights,
    load_model_config,
    load_whole,
    reading,
)
from headstart.heads.kinds import head_kinds, is_head, kind_of
from headstart.heads.live import moved

MADE_FOR = "headstart_target"  # in config.json, where other readers leave it alone
OFFSET = "headstart_draft_position_offset"  # there too: `TrainConfig.draft_position_offset`
OFFSET_BEFORE = "headstart_rope_position"  # in heads of earlier versions, which are read for ever
BEFORE: dict[str, DraftPositionOffset] = {"newest": 0, "one_earlier": -1, "both": "mixed"}
OF_OTHERS: DraftPositionOffset = 0  # where transformers and Google's heads put drafts
VARIABLES = "headstart_chat_template_kwargs"  # there too: of the texts that it was trained on
NOTES = "headstart_config.json"  # beside an adapter: what config.json says of the head with it


def save_assistant(
    assistant: PreTrainedModel,
    table: torch.Tensor,
    folder: Path,
    num_assistant_tokens: int,
    dtype: torch.dtype,
    weights: Mapping[str, torch.Tensor] | None = None,
    notes: Mapping[str, Any] | None = None,
    beside: Callable[[Path], None] | None = None,
) -> None:
    """Write a folder that plain transformers loads with `from_pretrained`: beside its place, and
    then put there (`atomic_folder`).

    Args:
        assistant: the head; its own table is ignored.
        table: [V, H] the table to save, materialized where the tie is low-rank.
        folder: where to.
        num_assistant_tokens: K that `generate` reads from the folder.
        dtype: of the saved weights.
        weights: in place of the state dict of `assistant`.
        notes: further keys of config.json, such as `MADE_FOR`; others keep what stands there.
        beside: writes further files into the folder.
    """
    # The order of the tokens is of integers, and stays so.
    weights = assistant.state_dict() if weights is None else weights
    state = {k: v.to(dtype) if v.is_floating_point() else v for k, v in weights.items()}
    # Detached, or `assign` would turn the target's own table into a trainable parameter.
    kind, saved_table = kind_of(assistant.config), table.detach().to(dtype)
    state |= dict.fromkeys(kind.tables, saved_table)
    config = copy.deepcopy(assistant.config)
    for key, value in (notes or {}).items():
        setattr(config, key, value)
    if hasattr(config, OFFSET) or hasattr(config, OFFSET_BEFORE):
        setattr(config, OFFSET, draft_position_offset(config))
    if hasattr(config, OFFSET_BEFORE):  # said once, by today's name
        delattr(config, OFFSET_BEFORE)
    with torch.device("meta"):  # no memory for a table that is replaced at once
        native = type(assistant)(config)
    native.load_state_dict(state, assign=True)
    native.tie_weights()
    native.generation_config = GenerationConfig(num_assistant_tokens=num_assistant_tokens)
    native.config.dtype = dtype
    with atomic_folder(folder) as work:
        native.save_pretrained(work)
        kind.write_more(work)
        if beside is not None:
            beside(work)
        drop_remote_code(work)


def split_pair(path: str | Path) -> tuple[str, str | None]:
    """A head, and the adapter of `HEAD+ADAPTER` that is to be added to it."""
    if Path(path).exists() or "+" not in str(path):
        return str(path), None
    head, _, adapter = str(path).rpartition("+")
    return head, adapter


def load_assistant(
    path: str | Path, dtype: torch.dtype, device: torch.device | str = "cpu"
) -> PreTrainedModel:
    """Load a head in the native format, from a folder or the Hub (`ID@REVISION`); of
    `HEAD+ADAPTER`, with the weights of a peft adapter added to its own.

    Raises:
        ValueError: as `load_assistant_config`; its weights say nothing, or the adapter is none of
            it.
    """
    head, adapter = split_pair(path)
    config = load_assistant_config(head)
    name, revision = split_revision(head)
    cls: Any = kind_of(config).model_class(config)
    # An adapter is added in float32 and rounded once, as the head was that it was saved beside.
    first = dtype if adapter is None else torch.float32
    model = load_whole(cls, head, name, revision=revision, dtype=first)
    if adapter is not None:
        model = add_adapters(model, [adapter], merge=True)
        _take_notes(model.config, adapter)
    check_weights(model, str(path))
    check_alive(model, str(path))
    return moved(model, device, dtype).eval()


def made_for(config: Any) -> dict[str, Any] | None:
    """The `Target.identity` that a head was trained for, of its configuration; None: it does not
    say, as heads of other makers."""
    return getattr(config, MADE_FOR, None)


def draft_position_offset(config: Any) -> DraftPositionOffset:
    """Where the drafts of a head stood in training; of heads of other makers, which do not say,
    and of kinds whose drafts stand nowhere, `OF_OTHERS`.

    Raises:
        ValueError: it says what is no offset; or it is a head of Headstart, and does not say.
    """
    if not kind_of(config).has_position:
        return OF_OTHERS
    noted: Any = getattr(config, OFFSET, None)
    if noted is not None:
        return _known(OFFSET, noted, {offset: offset for offset in get_args(DraftPositionOffset)})
    earlier: Any = getattr(config, OFFSET_BEFORE, None)
    if earlier is not None:
        return _known(OFFSET_BEFORE, earlier, BEFORE)
    if made_for(config) is not None:
        raise ValueError(
            f"the config.json of this head has {MADE_FOR} and no {OFFSET}: add where its drafts "
            "stood in training, 0 unless train.draft_position_offset said otherwise"
        )
    return OF_OTHERS


def _known(key: str, value: Any, offsets: Mapping[Any, DraftPositionOffset]) -> DraftPositionOffset:
    """The offset that `key` of a config.json means; what JSON takes for another type is none."""
    if type(value) not in (int, str) or value not in offsets:
        known = ", ".join(map(json.dumps, offsets))
        raise ValueError(f"{key}={value!r} of a head's config.json is none of {known}")
    return offsets[value]


def kept_notes(config: Any, identity: Mapping[str, Any]) -> dict[str, Any]:
    """What config.json says of a head that keeps its training: the target that it is saved for
    (`Target.identity`), and where its drafts stand, which heads of other makers leave out."""
    notes: dict[str, Any] = {MADE_FOR: identity}
    if kind_of(config).has_position:
        notes[OFFSET] = draft_position_offset(config)
    return notes


def trained_notes(
    config: Any, position: DraftPositionOffset, variables: Mapping[str, Any]
) -> dict[str, Any]:
    """What the config.json of a head says of its training, so that it says so wherever it goes.

    Args:
        config: of the head.
        position: of its drafts.
        variables: of the chat template with which its texts were asked.
    """
    notes: dict[str, Any] = {OFFSET: position} if kind_of(config).has_position else {}
    if variables or noted_variables(config) is not None:
        notes[VARIABLES] = dict(variables)
    return notes


def noted_variables(config: Any) -> dict[str, Any] | None:
    """The variables that `trained_notes` has of them; None: none were noted."""
    return getattr(config, VARIABLES, None)


def load_assistant_config(path: str | Path) -> Any:
    """The configuration of a head in the native format.

    Raises:
        ValueError: there is no head at `path`, the folder holds another kind of model, or its
            config.json says what cannot be.
    """
    path, adapter = split_pair(path)
    name, revision = split_revision(path)
    if (Path(name) / "head" / "config.json").is_file():
        raise ValueError(f"{name} is a run folder: its head is {Path(name) / 'head'}")
    head_kinds()  # makes their types of configuration known to transformers
    with reading(f"no draft head at {path}"):
        check_files(name)
        config = load_model_config(str(path), name, revision, trust_remote_code=False)
    if not is_head(config):
        raise ValueError(
            f"{path} is a {config.model_type} model, not a Gemma 4 assistant or a head of another "
            "kind (`headstart heads kinds` lists them)"
        )
    with reading(path, "cannot be a head"):
        check_values(config.get_text_config(), path)
    if adapter is not None:
        _take_notes(config, adapter)
    return config


def _take_notes(config: Any, adapter: str) -> None:
    """Put what is noted of a head with its adapter in place of what is noted of it without: beside
    the adapter, or in the head that was saved around it. Of others' adapters nothing is known."""
    name, revision = split_revision(adapter)
    around = Path(name).parent / "config.json"
    with reading(f"what is noted of the head with {adapter} cannot be read"):
        if Path(name).is_dir():
            path = Path(name) / NOTES
            file = path if path.is_file() or Path(name).name != ADAPTER else around
            found = str(file) if file.is_file() else None
        else:
            found = cached_file(
                name, NOTES, revision=revision, _raise_exceptions_for_missing_entries=False
            )
        content = {} if found is None else json.loads(Path(found).read_text(encoding="utf-8"))
        if not isinstance(content, dict):
            raise ValueError(f"{found} holds no notes")
    for key in (MADE_FOR, OFFSET, OFFSET_BEFORE, VARIABLES):
        if hasattr(config, key):
            delattr(config, key)
        if key in content:
            setattr(config, key, content[key])


ADAPTER = "adapter"  # its name within the model, and of its folder beside the head


def add_lora(assistant: PreTrainedModel, lora: LoraConfig) -> None:
    """Put a fresh adapter beside linear layers of a head, in place; it alone is trained then. peft
    raises `ValueError` where the head has no layers of these names."""
    from peft import inject_adapter_in_model

    config = _peft_config(lora)
    # What stands where a narrower head has a linear layer.
    through = [name for name, m in assistant.named_modules() if isinstance(m, nn.Identity)]
    config.exclude_modules = through or None
    inject_adapter_in_model(config, assistant, adapter_name=ADAPTER)


def _peft_config(lora: LoraConfig) -> Any:
    from peft import LoraConfig as PeftLora

    alpha: Any = (
        2 * lora.r if lora.lora_alpha is None else lora.lora_alpha
    )  # peft takes fractions too
    return PeftLora(r=lora.r, lora_alpha=alpha, target_modules=list(lora.target_modules))


def without_lora(
    weights: Mapping[str, torch.Tensor], scalings: Mapping[str, float], dtype: torch.dtype
) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """The weights of a head with its adapter added to them, and the adapter as peft keeps it.

    The adapter is rounded first: what is saved beside the head is then what was added to it. It is
    done on tensors, and not by peft, since the head trains on, and may be split over processes.

    Args:
        weights: state dict, whole tensors: of a layer [out, in], and beside it A [r, in] and
            B [out, r].
        scalings: layer -> alpha / r.
        dtype: that the adapter is saved in.
    """
    merged, adapter = {}, {}
    for name, tensor in weights.items():
        if ".lora_" in name:
            adapter[PREFIX + name.replace(f".{ADAPTER}.", ".")] = tensor.to(dtype)
        else:
            merged[name.replace(".base_layer.", ".")] = tensor
    for layer, scaling in scalings.items():
        a, b = (adapter[f"{PREFIX}{layer}.lora_{which}.weight"].float() for which in "AB")
        merged[f"{layer}.weight"] = merged[f"{layer}.weight"].float() + scaling * (b @ a)
    return merged, adapter


def scalings_of(assistant: nn.Module) -> dict[str, float]:
    """Layer -> alpha / r, of the layers that have an adapter; none: the head has no adapter."""
    return {
        name: module.scaling[ADAPTER]
        for name, module in assistant.named_modules()
        if hasattr(module, "lora_A")
    }


def write_adapter(
    head: Path,
    adapter: dict[str, torch.Tensor],
    lora: LoraConfig,
    base: str,
    notes: Mapping[str, Any],
) -> None:
    """Write the folder `adapter` beside the folder of a head: what `without_lora` gives as the
    adapter, which peft loads onto the head at `base`, a folder or a Hub id, and the notes of the
    head with it."""
    config = _peft_config(lora)
    # Those that have some: of what merely passes through, peft could make no adapter.
    changed = {name.removeprefix(PREFIX).rpartition(".lora_")[0] for name in adapter}
    config.target_modules = sorted(changed)
    config.base_model_name_or_path, config.inference_mode = base, True
    folder = head / ADAPTER
    folder.mkdir()
    config.save_pretrained(folder)
    text = json.dumps(notes, indent=2, sort_keys=True) + "\n"
    (folder / NOTES).write_text(text, encoding="utf-8")
    tensors = {name: tensor.contiguous().cpu() for name, tensor in adapter.items()}
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})

"""What a caller holds, as the settings by which the commands know it: a model in memory, rows, a
configuration built in code, a head."""

import json
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from headstart.common.children import temporary_folder
from headstart.common.console import print_once
from headstart.common.files import atomic_folder, expand_home, write_atomically
from headstart.common.machine import natural_dtype, random_numbers_kept
from headstart.common.processes import join_processes, launch_kept
from headstart.configs.loader import Override, load_settings, read_yaml
from headstart.configs.recipes import find_config
from headstart.configs.schema import Config, SourceConfig
from headstart.configs.settings import Settings
from headstart.data.sources import without_nulls
from headstart.heads.kinds import is_head
from headstart.heads.live import aliased, in_memory, moved
from headstart.heads.saving import load_assistant
from headstart.heads.target import model_fingerprint

OF_FILES = ("name", "revision", "adapters", "merge_adapters", "trust_remote_code", "sharded")
"""Settings of a target that is loaded from files, which one in memory is not."""


@dataclass(frozen=True)
class TrainedHead:
    """A head that was trained or adapted, and what was measured on the way."""

    model: PreTrainedModel
    """`Gemma4AssistantForCausalLM`, in the target's dtype and on its device: what plain
    transformers takes as `assistant_model`. `save_pretrained(DIR)` keeps it."""
    summary: dict[str, Any]
    """What summary.json of the run holds: `best.acceptance_length` on held-out conversations."""
    report: dict[str, Any] | None
    """What eval/report.json holds, or adapt.json of an adaptation; None: nothing was evaluated."""
    folder: Path | None
    """That was asked for, with the head in `head/`, or `run/head/` after an adaptation; None: it
    was of the time being."""


@dataclass(frozen=True)
class Work:
    """Where a call works, and the settings that name its target."""

    out: Path
    """The folder that was asked for, or one of the time being."""
    passing: Path
    """A folder of the time being."""
    kept: bool
    """Whether `out` stays."""
    device: torch.device
    overrides: list[Override]
    defaults: list[tuple[str, Any]]
    in_memory: bool
    """Whether the target is a model in memory."""

    def settings(
        self,
        config: Config | str | Path | None,
        more: Sequence[Override] = (),
        defaults: Sequence[tuple[str, Any]] = (),
        makes_head: bool = True,
    ) -> Settings:
        """The settings of a call.

        Args:
            config: built in code, or the name or file of a recipe; None: the defaults.
            more: what the call itself says.
            defaults: where neither says anything.
            makes_head: whether hours of work would go with a folder of the time being.

        Raises:
            ValueError: it is something else, a combination cannot work, it names a target beside
                the model in memory, or a folder in which the head would not be kept.
        """
        own: list[Override] = []
        chosen: dict[str, Any] = {}
        if isinstance(config, Config):
            chosen = config.model_dump(mode="json", exclude_unset=True)
            own += chosen.items()
        elif not (config is None or isinstance(config, str | Path)):
            raise ValueError(
                f"config is a {type(config).__name__}: give headstart.configs.schema.Config(...), "
                "the name of a recipe, or a YAML file"
            )
        path = None if isinstance(config, Config) else config
        tree = chosen if path is None else read_yaml(find_config(path), Settings)
        given = [name for name in OF_FILES if name in (tree.get("target") or {})]
        if path is not None and "name" in given:
            given.remove("name")  # a recipe has one, in whose place another may stand
        if self.in_memory and given:
            raise ValueError(
                f"target.{given[0]} is of a target in files, and the model is in memory: leave it "
                "out"
            )
        if makes_head and not self.kept and tree.get("output_dir") is not None:
            raise ValueError(
                f"config has output_dir={tree['output_dir']}, and what is not kept is of the time "
                "being: give it as the argument output_dir, or leave it out"
            )
        overrides = [*own, ("output_dir", str(self.out)), *self.overrides, *more]
        return load_settings(path, overrides, [*defaults, *self.defaults])

    def trained_on(self, data: Any) -> list[Override]:
        """The setting of prompts to train on; none where they are left to the configuration."""
        return [] if data is None else [("data.prompts", [self.prompts(data, "prompts.jsonl")])]

    def prompts(self, data: Any, name: str) -> Any:
        """Prompts as a source of the configuration: rows in memory are written to a file `name` in
        the folder of the call."""
        if isinstance(data, str | Path):
            return str(data)
        if isinstance(data, SourceConfig):
            return data.model_dump(mode="json", exclude_unset=True)
        from datasets import Dataset

        if not isinstance(data, Dataset):
            raise ValueError(
                f"data is a {type(data).__name__}: give a datasets.Dataset with a column "
                "`messages` or `prompt` (Dataset.from_list(rows), or one split of a DatasetDict), "
                "or a file or name of prompts"
            )
        write_rows(data.with_format(None), self.out / name)
        return str(self.out / name)


@contextmanager
def work_on(model: Any, tokenizer: Any, output_dir: str | Path | None) -> Iterator[Work]:
    """Within, a call works; afterwards random numbers, accelerate's settings and torch's choice of
    attention are what they were, and what is of the time being is gone.

    Raises:
        ValueError: there are several processes, or model and tokenizer are no target.
    """
    with launch_kept():
        state = join_processes()
        if state.num_processes > 1:
            raise ValueError(
                "these functions run in one process: save the model and launch the command, "
                "accelerate launch -m headstart.cli train"
            )
        with temporary_folder() as passing, random_numbers_kept(state.device), _attention_kept():
            out = passing / "out" if output_dir is None else Path(expand_home(str(output_dir)))
            cache = ("data.cache_dir", str(passing / "cache"))
            kept = output_dir is not None
            if isinstance(model, str | Path):
                if tokenizer is not None:
                    raise ValueError(
                        f"{model} is a name, which brings its own tokenizer: leave tokenizer out"
                    )
                named: list[Override] = [("target.name", str(model))]
                yield Work(out, passing, kept, state.device, named, [cache], in_memory=False)
                return
            with in_memory(model, tokenizer) as live:
                found: list[Override] = [
                    ("target.name", live.name), ("target.adapters", list(live.adapters)),
                    ("target.merge_adapters", False),
                ]  # fmt: skip
                dtype = ("target.dtype", _dtype_of(live.model))
                yield Work(out, passing, kept, state.device, found, [cache, dtype], in_memory=True)


def _dtype_of(model: PreTrainedModel) -> str:
    """In which a model in memory is run: its own, or what is quick here."""
    own, known = str(model.dtype).removeprefix("torch."), ("bfloat16", "float32")
    if own in known:
        return own
    print_once(f"The model is in {own}, which is not computed in here: taken as {natural_dtype()}")
    return natural_dtype()


@contextmanager
def _attention_kept() -> Iterator[None]:
    """Loading a target chooses for the whole process."""
    before = torch.backends.cuda.cudnn_sdp_enabled()
    try:
        yield
    finally:
        torch.backends.cuda.enable_cudnn_sdp(before)


def head_path(head: Any, folder: Path) -> str:
    """Folder or Hub id of a head; one in memory is written below `folder`, under a name that no
    other head gets.

    Raises:
        ValueError: it is none.
    """
    if isinstance(head, str | Path):
        return str(head)
    if isinstance(head, TrainedHead) and head.folder is not None:
        adapted = head.folder / "run" / "head"
        return str(adapted if adapted.is_dir() else head.folder / "head")
    model = _loaded(head)
    given = folder / f"given-{model_fingerprint(model, model.config)[:12]}"
    if not given.is_dir():
        with atomic_folder(given) as work:
            model.save_pretrained(work)
    return str(given)


def assistant_of(head: Any, dtype: torch.dtype, device: torch.device) -> PreTrainedModel:
    """A head to draft with, in a dtype and on a device; one in memory stays as it is.

    Raises:
        ValueError: it is none.
    """
    if isinstance(head, str | Path):
        return load_assistant(head, dtype, device)
    return moved(aliased(_loaded(head)), device, dtype).eval()


def _loaded(head: Any) -> PreTrainedModel:
    model = head.model if isinstance(head, TrainedHead) else head
    if not (isinstance(model, PreTrainedModel) and is_head(model.config)):
        raise ValueError(
            f"a {type(model).__name__} is no draft head: give a folder or Hub id of one, what "
            "train_head returned, or a Gemma4AssistantForCausalLM"
        )
    return model


def write_rows(rows: Iterable[dict[str, Any]], path: Path) -> None:
    """Write rows that are in memory as JSON lines, of which `read_rows` makes the same rows.

    Raises:
        ValueError: there is none, a value is not one of JSON, or the file holds other rows.
    """
    lines = []
    for number, row in enumerate(rows):
        try:
            lines.append(json.dumps(without_nulls(row), ensure_ascii=False) + "\n")
        except TypeError as error:
            fix = "leave its column out (remove_columns)"
            raise ValueError(f"row {number} cannot be written as JSON ({error}): {fix}") from error
    if not lines:
        raise ValueError("the data has no rows: give prompts, a column `messages` or `prompt`")
    text = "".join(lines)
    if path.is_file() and path.read_text(encoding="utf-8") != text:
        raise ValueError(f"{path} holds other rows: name another folder, output_dir=DIR")
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, text)

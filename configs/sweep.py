"""A sweep: runs of one recipe that differ in some settings each, judged on the same texts."""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, PositiveInt, ValidationError, field_validator

from headstart.configs.loader import Override, explain_all, load_config, read_yaml
from headstart.configs.schema import Config, Folder, Section


class Judge(Section):
    store: Folder
    """Activation store of texts that no run trains on, in which rounds are walked. Greedy text is
    judged as greedy decoding; on sampled text a draft is right where the target drew it."""
    rope_position: Literal["newest", "one_earlier"] = "newest"
    """Where drafts stand: as in transformers, or as in vLLM."""


class Sweep(Section):
    config: Folder
    """Run YAML of the recipe that all runs vary."""
    overrides: list[str] = Field(default=[])
    """`section.key=value` for every run, such as `data.store=stores/train`."""
    runs: dict[str, list[str]]
    """Name -> overrides of that run. The first is what the others are compared with."""
    seeds: list[int] = Field(default=[0], min_length=1)
    """Each run is trained once with each."""
    num_assistant_tokens: PositiveInt = 4
    """Draft length K at which all are judged."""
    judged_on: dict[str, Judge]
    """Name -> what a run is judged on; a path alone is a store."""

    @field_validator("judged_on", mode="before")
    @classmethod
    def _stores(cls, judged_on: Any) -> Any:
        if not isinstance(judged_on, dict):
            return judged_on
        return {k: {"store": v} if isinstance(v, str | Path) else v for k, v in judged_on.items()}

    @field_validator("runs")
    @classmethod
    def _named(cls, runs: dict[str, list[str]]) -> dict[str, list[str]]:
        if not runs:
            raise ValueError("name at least one run")
        if odd := [name for name in runs if not re.fullmatch(r"[\w.+-]+", name)]:
            raise ValueError(f"{odd[0]!r} is to name a folder: letters, digits and . + - _ alone")
        return runs

    def configs(self, out: Path, overrides: Sequence[Override] = ()) -> list[tuple[str, Config]]:
        """The name and the configuration of each run, those of one seed after another.

        Args:
            out: folder of the runs.
            overrides: further ones for every run.

        Raises:
            ValueError: as `load_config`, naming the run.
        """
        found = []
        for seed in self.seeds:
            for name, own in self.runs.items():
                place = [("run.seed", seed), ("run.dir", out / f"{name}-seed{seed}")]
                settings = [*self.overrides, *overrides, *own, *place]
                try:
                    found.append((name, load_config(self.config, settings)))
                except ValueError as error:
                    raise ValueError(f"run {name}: {error}") from error
        return found


def load_sweep(path: Path) -> Sweep:
    """Read a sweep.

    Raises:
        ValueError: the file is missing or malformed, or a key does not exist.
    """
    try:
        return Sweep.model_validate(read_yaml(path, Sweep))
    except ValidationError as error:
        raise ValueError(f"{path}: {explain_all(error, Sweep)}") from error

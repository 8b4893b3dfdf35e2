"""What `headstart adapt` is asked: a tuned target, a head that fitted it before, texts, a time."""

import re

from pydantic import Field, NonNegativeInt, PositiveInt, model_validator

from headstart.configs.schema import Place, Section, SourceConfig, TargetConfig

DEFAULTS = [
    "head.earlier_clusters=keep",  # minutes that steps use better
    "train.steps=20000",  # time ends it
    "train.batch_size=4",
    "train.later_anchors=32",
    "train.learning_rate=5.0e-4",
    "train.validate_every=100",
    "train.patience=4",
    "data.max_new_tokens=96",
    "data.max_prompt_tokens=256",
]
"""Settings of the training, where the command line says nothing else: the reference recipe's, at
half its learning rate, since the head is finished."""


ARGUMENTS = {
    "target": "--target, --adapter and --dtype", "head.start": "--head", "run.dir": "--out",
    "data.store": "--out", "data.prompts": "--prompts and --general",
    "eval": "--held-out, --decoded and --num-assistant-tokens",
}  # fmt: skip
"""Settings that an adaptation takes from arguments of its own."""


def check_settings(overrides: list[str]) -> None:
    """Raise `ValueError` where a `section.key=value` would be passed over for an argument."""
    for key in (override.partition("=")[0] for override in overrides):
        for name, argument in ARGUMENTS.items():
            if key == name or key.startswith(f"{name}."):
                raise ValueError(f"{key} is given to adapt by {argument}, not as a setting")


class Adaptation(Section):
    target: TargetConfig
    """The tuned target, as it is served."""
    head: Place
    """The head to go on from, by folder or Hub id."""
    prompts: SourceConfig
    """Prompts of the target's new work."""
    general: SourceConfig | None = None
    """Prompts of everything else, to be mixed in, and to see on what the head forgets. None: none,
    and forgetting is not measured."""
    general_share: float = Field(default=0.25, ge=0, lt=1)
    """Share of the training conversations that answer general prompts."""
    base: Place | None = None
    """The target that the head was trained for, which tells what was lost. None: the one that the
    head names; where it names none, the target without its adapters."""
    budget_minutes: float = Field(default=15, gt=0)
    """Time for all of it, loading apart."""
    held_out: PositiveInt = 48
    """Prompts of each kind that are measured on and not trained on."""
    num_assistant_tokens: PositiveInt = 4
    """Draft length K at which the head is measured."""
    decoded: NonNegativeInt = 8
    """Held-out prompts of each kind that are decoded in the end, to measure the speedup; fewer
    where the time does not do. 0: none."""
    measure_only: bool = False
    """Say what the head has lost, and stop there."""

    @model_validator(mode="after")
    def _check(self) -> "Adaptation":
        if self.general is None and "general_share" in self.model_fields_set and self.general_share:
            raise ValueError("general_share is of general prompts: name them, --general SET")
        return self


def minutes(text: str) -> float:
    """`15m`, `90s`, `1h30m` or a bare number of minutes.

    Raises:
        ValueError: it is none of these.
    """
    unit = r"(\d+(?:\.\d+)?)"
    found = re.fullmatch(rf"{unit}|(?:{unit}h)?(?:{unit}m)?(?:{unit}s)?", text)
    if not text or found is None:
        raise ValueError(f"{text!r} is no time: write 15m, 1h30m or 90s")
    bare, hours, whole, seconds = (float(part or 0) for part in found.groups())
    return bare + 60 * hours + whole + seconds / 60

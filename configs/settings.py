"""What the commands beside `headstart train` are asked, and all settings together."""

import re
from collections.abc import Iterable
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, NonNegativeInt, PositiveInt, model_validator

from headstart.configs.schema import Config, SourceConfig
from headstart.configs.section import Folder, Place, Section

LANGUAGE = r"^[A-Za-z]{2,8}(-[A-Za-z0-9]{1,8})*$"  # BCP 47, as cards of the Hub have it


def minutes(value: Any) -> Any:
    """Minutes of `15m`, `90s`, `1h30m`; a number is minutes already.

    Raises:
        ValueError: it is no time.
    """
    if not isinstance(value, str):
        return value
    unit = r"(\d+(?:\.\d+)?)"
    found = re.fullmatch(rf"{unit}|(?:{unit}h)?(?:{unit}m)?(?:{unit}s)?", value)
    if not value or found is None:
        raise ValueError(f"{value!r} is no time: write 15m, 1h30m or 90s")
    bare, hours, whole, seconds = (float(part or 0) for part in found.groups())
    return bare + 60 * hours + whole + seconds / 60


class AdaptConfig(Section):
    """Of `headstart adapt`, which goes on from a head for a target that was fine-tuned."""

    general_prompts: SourceConfig | None = None
    """Prompts of everything else, to be mixed in, and to see on what the head forgets. None: none,
    and forgetting is not measured."""
    general_share: float = Field(default=0.25, ge=0, lt=1)
    """Share of what the target writes to train on that answers general prompts."""
    conversations: SourceConfig | None = None
    """Whole conversations to train on beside what the target writes, such as the data that it was
    tuned on: the target's distribution over their answers is learned. None: none."""
    answering_share: float = Field(default=0.5, ge=0, lt=1)
    """Share of the time between both measurements in which the target answers prompts, as many as
    `data.num_conversations` says where that is given. 0: it answers none but those that the
    training is validated on, and the conversations are all that is trained on."""
    base: Place | None = None
    """The target that the head was trained for, which tells what was lost. None: the one that the
    head names; where it names none, the target without its adapters."""
    budget: Annotated[float, BeforeValidator(minutes)] = Field(default=15, gt=0)
    """Time for all of it, loading apart: 15m, 90s, 1h30m, or minutes."""
    held_out_prompts: PositiveInt = 48
    """Prompts of each kind that are measured on and not trained on."""
    decoded_prompts: NonNegativeInt = 8
    """Held-out prompts of each kind that are decoded in the end, to measure the speedup; fewer
    where the time does not do. 0: none."""
    measure_only: bool = False
    """Say what the head has lost, and stop there."""

    @model_validator(mode="after")
    def _check(self) -> "AdaptConfig":
        named = "general_share" in self.model_fields_set and self.general_share
        if self.general_prompts is None and named:
            raise ValueError("general_share is of general prompts: name them, general_prompts=SET")
        if self.conversations is None and not self.answering_share:
            raise ValueError("answering_share=0 leaves no text: name conversations=FILE")
        return self


class SimulateConfig(Section):
    """Of `headstart simulate`."""

    draft_position_offset: Literal[0, -1] = 0
    """RoPE position of the drafts: 0 as in transformers and llama.cpp, -1 as in vLLM."""


class ServerConfig(Section):
    """A server with the OpenAI API that answers in place of the target, for `headstart
    regenerate`."""

    url: str | None = None
    """Its address, such as http://localhost:8000; vLLM, SGLang or llama.cpp runs the target
    there."""
    model: str | None = None
    """The target's name there. None: the only one."""
    api_key_env: str | None = None
    """Variable of the environment with the server's key. None: HEADSTART_SERVER_API_KEY; without it
    none is sent."""
    concurrency: PositiveInt = 16
    """Requests under way at once."""

    @model_validator(mode="after")
    def _check(self) -> "ServerConfig":
        if self.url is None and self.model_fields_set - {"url"}:
            raise ValueError("these settings are of a server: give url too")
        return self


class BenchConfig(Section):
    """Of `headstart bench`."""

    prompts: PositiveInt | None = None
    """Prompts measured. None: 8 for `train`, whose plain objective takes gigabytes, else 64."""
    context: PositiveInt = 128
    """Tokens in the target's cache while drafts are timed."""


class ExportConfig(Section):
    """How a head is written for a serving engine (`headstart export` and `serve-check`)."""

    dense: bool = False
    """Leave ordered embeddings out: drafts read the whole table."""
    dtype: Literal["bfloat16", "float32", "int8"] | None = None
    """Dtype of its weights, in serve-check for litert alone; int8: of linear layers and tables, for
    litert alone. None: bfloat16, for litert float32."""
    num_assistant_tokens: PositiveInt | None = None
    """K that litert's file is made for (`headstart export` alone). None: as the head says, or 4."""
    cache_length: PositiveInt = 4096
    """Tokens of prompt and answer that litert's file has room for (`headstart export` alone)."""
    target_gguf: Folder | None = None
    """GGUF file of the target that llama.cpp is to serve, quantized perhaps (`headstart
    serve-check` alone). None: one is made of target.name, in target.dtype."""


class PublishConfig(Section):
    """Of `headstart publish`."""

    private: bool = True
    """Whether the repository is seen by its owner alone."""
    report: Folder | None = None
    """Folder of the report that the figures are taken from. None: the run's own."""
    base_models: list[str] = Field(default_factory=list)
    """The target on the Hub, whole, and what else is its base. None named: as the run names it."""
    base_head: str | None = None
    """The head that a head's adapter goes onto, ORG/NAME@REVISION for a revision. None: as the run
    names it."""
    merge_adapter: bool = False
    """Publish the head of an adapter whole."""
    license: str | None = None
    """License in the model card. None: that of the target."""
    languages: list[Annotated[str, Field(pattern=LANGUAGE)]] = Field(default_factory=list)
    """Languages of the prompts, in the model card: en, de."""
    include_texts: bool = True
    """Whether the report keeps its example texts, which are of your prompts."""
    branch: str | None = None
    """Branch of the repository. None: main."""
    create_pr: bool = False
    """Open a pull request."""


class WatchConfig(Section):
    """Of `headstart watch`, which reads the metrics of a server."""

    head: str | None = None
    """Name of the head in a report of several. None: there is one."""
    temperature: float | None = Field(default=None, ge=0)
    """At which the server samples, of those in the report; 0: greedy. None: the highest of these,
    at which the least is accepted."""
    interval: float = Field(default=10, gt=0)
    """Seconds between two readings."""
    rounds: PositiveInt | None = None
    """Rounds of drafts to end after, of those since the watch began. None: no limit."""
    seconds: float | None = Field(default=None, ge=0)
    """Seconds to end after; 0: one reading, of all since the server's start. None: no limit."""
    margin: float = Field(default=0.1, ge=0, lt=1)
    """Share of the report's acceptance, at each draft, that a head may lack and not be stale. What
    the report has is the lower end of its 95% interval."""
    false_alarms: float = Field(default=0.01, gt=0, lt=1)
    """Chance of ever calling a head stale, in however long a watch, that is within the margin."""


class Settings(Config):
    """All that a file or a command line can set: a run, and what other commands are asked."""

    adapt: AdaptConfig = AdaptConfig()
    simulate: SimulateConfig = SimulateConfig()
    server: ServerConfig = ServerConfig()
    bench: BenchConfig = BenchConfig()
    export: ExportConfig = ExportConfig()
    publish: PublishConfig = PublishConfig()
    watch: WatchConfig = WatchConfig()

    def of_run(self) -> Config:
        """The run alone; what was given is still told from what was not."""
        return Config(**{name: getattr(self, name) for name in self.given(Config.model_fields)})

    def given(self, names: Iterable[str]) -> list[str]:
        """Those of the names, such as `output_dir` or `target.name`, that were given a value."""
        return [name for name in names if _is_given(self, name.split("."))]


def _is_given(section: Any, path: list[str]) -> bool:
    first, *rest = path
    known = isinstance(section, Section) and first in section.model_fields_set
    return known and (not rest or _is_given(getattr(section, first), rest))

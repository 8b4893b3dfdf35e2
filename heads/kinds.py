"""What a kind of draft head is: the one interface behind which they differ, and which kinds there
are.

A kind is a file of heads/ with a `KIND` in it and a name in `BUILT_IN`. Everything else (the loop,
objectives, ordered embeddings, the low-rank tie, decoding, evaluation, publishing) is common to all
and asks a kind what only it knows. docs/how-to/new-head.md builds one.

Letters: B rows of texts, each of one text or of several that are packed, T positions, R rows
drafted from in each, S of them beyond the first draft, K drafts, n tokens of one forward, D target
width, H head width, V vocabulary.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from importlib import import_module
from pathlib import Path
from types import MappingProxyType
from typing import Any, ClassVar, NamedTuple, Protocol, TypeAlias

import torch
from torch import nn
from transformers import PreTrainedModel

from headstart.configs.schema import DraftPositionOffset, Engine, HeadConfig
from headstart.heads.target import Inputs, SharedKV, Target

Embed: TypeAlias = Callable[[torch.Tensor], torch.Tensor]
"""Token ids [...] -> their scaled embeddings [..., D]."""


class Texts(NamedTuple):
    """What the target left behind of the texts in B rows: one text in each, or several, packed."""

    hidden: torch.Tensor
    """[B, T, D] post-norm hidden states, or [B, M, D] those of some positions for a kind that does
    not read whole texts."""
    kv: SharedKV
    """Layer type -> (keys, values), each [B, kv heads, T, head_dim]; empty for a kind that does not
    read them."""
    ids: torch.Tensor | None = None
    """[B, T] tokens; None for a kind that does not read whole texts."""
    starts: torch.Tensor | None = None
    """[B, T] index of the first position of the same text; None: there is one text in each row, or
    nobody reads whole texts."""
    layers: Mapping[int, torch.Tensor] = MappingProxyType({})
    """Number of a decoder layer that the kind reads -> its outputs, as `hidden` has positions."""


class Rows(NamedTuple):
    """The positions of `Texts` that are drafted from, and what each round reads there."""

    at: torch.Tensor
    """[B, R] index of the row of t among keys and values."""
    hidden: torch.Tensor
    """[B, R] index of h_t among the hidden states, of which not all may be there."""
    starts: torch.Tensor
    """[B, R] index of the first row of the same text; t is `at - starts`."""
    tokens: torch.Tensor
    """[B, R, K] x_{t+1} .. x_{t+K}."""
    multi_step: torch.Tensor
    """[B, S] which of the R, by number, go on beyond the first round; -1 fills up."""

    def going_on(self) -> "Rows":
        """Those that go on beyond the first round, S in place of R."""
        at, hidden, starts, tokens = (select(one, self.multi_step) for one in self[:4])
        return Rows(at, hidden, starts, tokens, self.multi_step)


def all_rows(at: torch.Tensor, tokens: torch.Tensor) -> Rows:
    """`Rows` at [B, R] of texts that are not packed and have all their hidden states; all rows read
    the K `tokens` [B, R, K]."""
    places = torch.arange(at.shape[1], device=at.device).expand_as(at)
    return Rows(at, at, torch.zeros_like(at), tokens, places)


def select(tensor: torch.Tensor, places: torch.Tensor) -> torch.Tensor:
    """[B, R, ...] at `places` [B, S] -> [B, S, ...]; -1 stands for place 0."""
    index = places.clamp_min(0).view(*places.shape, *[1] * (tensor.ndim - 2))
    return tensor.gather(1, index.expand(*places.shape, *tensor.shape[2:]))


class Verified(NamedTuple):
    """One forward of the target while one text is decoded: the prefill, or a verification."""

    tokens: torch.Tensor
    """[1, v] those of its tokens that belong to the text, from the first on."""
    hidden: torch.Tensor
    """[1, n, D] post-norm hidden states of all tokens that it was given; the first v are valid."""
    shared_kv: SharedKV
    """As its output has them, whose newest n rows are those tokens'; empty for a kind that does
    not read them."""
    layers: Mapping[int, torch.Tensor] = MappingProxyType({})
    """Number of a decoder layer that the kind reads -> its outputs, [1, n, D]."""


class DraftState(Protocol):
    """Drafting along one text. Batch 1."""

    def commit(self, seen: Verified) -> None:
        """Take what is valid of a forward of the target, the prefill first; each is seen once."""

    def begin(self) -> None:
        """A round begins: what drafts since the last `commit` left behind is forgotten."""

    def step(self, token: torch.Tensor) -> torch.Tensor:
        """[1, 1] the newest token, on which the target has not run, and then each draft -> [1, 1,
        H] the state whose product with the table is the logits of the next draft."""
        ...


class DraftMemory(NamedTuple):
    """Bytes that one draft keeps for the backward pass."""

    layers: list[int]
    """Of each layer that it passes through."""
    beside: int
    """Outside of the layers."""
    copied_keys: list[int]
    """Of copies of keys and values in each layer, a position of the texts."""
    kept_keys: int = 0
    """Of keys and values that each round keeps, a position of the texts, where they are the head's
    own."""


class HeadKind(ABC):
    """A kind of draft head; one object of each serves all heads of the kind.

    Its models are `PreTrainedModel`s with an `lm_head` tied to the target's table and a
    `masked_embedding` where config.json has `use_ordered_embeddings`; of their configurations
    `get_text_config()` has `vocab_size` and `hidden_size`, and they themselves
    `backbone_hidden_size`, the target's width.
    """

    name: ClassVar[str]
    """As `head.kind` has it."""
    model_types: ClassVar[tuple[str, ...]]
    """In the config.json of its heads."""
    reads: ClassVar[str]
    """What it reads of the target, in words."""
    costs: ClassVar[str]
    """What a draft computes, in words."""
    engines: ClassVar[tuple[Engine, ...]] = ()
    """What serves it outside Headstart; with `transformers` among them its own decoder does."""
    has_position: ClassVar[bool] = False
    """Whether its drafts stand at a RoPE position (`TrainConfig.draft_position_offset`)."""
    tables: ClassVar[tuple[str, ...]] = ("lm_head.weight",)
    """Names of the table among its weights."""

    @abstractmethod
    def configure(self, source: Any, head: HeadConfig, drafts: int) -> Any:
        """The configuration of a head.

        Args:
            source: the target's text configuration.
            head: what is asked.
            drafts: K, for which it will be trained.

        Raises:
            ValueError: there is no such head for this target.
        """

    @abstractmethod
    def model_class(self, config: Any) -> type[PreTrainedModel]:
        """Of the heads with such a configuration."""

    @abstractmethod
    def init_weights(self, model: Any, target: Target, from_target: bool) -> None:
        """Give a head that was built at random its weights at step 0; `from_target`: what it can
        take from the target."""

    def init_narrow(self, model: Any, down: torch.Tensor) -> None:  # noqa: B027 (may be left out)
        """Start a head that is narrower than its target, which has `init_weights` already, from
        `down` [H, D], the best projection of the target's hidden states."""

    @abstractmethod
    def unroll(
        self, model: Any, texts: Texts, rows: Rows, embed: Embed, position: DraftPositionOffset
    ) -> list[torch.Tensor]:
        """What the decoder will compute step by step, for many rows in parallel.

        Args:
            model: in training.
            texts: with keys and values in the dtype to compute in.
            rows: of these texts.
            embed: `Target.embed`.
            position: where drafts stand, of a kind that `has_position`.

        Returns:
            K of [B, R, H], from the second on [B, S, H]: the product of the k-th with the table is
            the logits of draft k.
        """

    @abstractmethod
    def draft_state(self, model: Any, embed: Embed, padding: int, offset: int) -> DraftState:
        """What drafting along one text begins with.

        Args:
            model: with a table of its own.
            embed: token ids [1, 1] -> [1, 1, D] in the model's dtype and on its device.
            padding: tokens at the left of the prompt that no head sees.
            offset: of the drafts' position from the newest token's: 0, or -1 as in some engines; of
                a kind that `has_position`.
        """

    def layers(self, model: Any) -> Sequence[nn.Module]:
        """Of a model, what may be compiled each by itself; the first has a weight in the dtype
        that the head computes in. By default the layers of a decoder within it."""
        layers: Sequence[nn.Module] = model.model.layers
        return layers

    @abstractmethod
    def describe(self, config: Any) -> str:
        """The shape of a head in words."""

    @abstractmethod
    def draft_memory(self, config: Any, compute: int) -> DraftMemory:
        """What a draft keeps in training, by the bytes of a value that products are computed in."""

    def inputs(self, config: Any) -> Inputs:
        """What it reads of the target, which is all that is stored for it; by default nothing but
        last hidden states and tokens."""
        return Inputs(kv=False)

    def most_drafts(self, config: Any) -> int | None:
        """K at most; None: any number."""
        return None

    def draft_share(self, config: Any) -> float:
        """Share of the weights, the LM head apart, that one draft reads."""
        return 1.0

    def mismatches(self, source: Any, config: Any) -> list[tuple[str, Any, Any]]:
        """Name, the head's value and the target's, of what has to agree.

        Args:
            source: the target's text configuration.
            config: of a head.
        """
        return [
            ("backbone_hidden_size", config.backbone_hidden_size, source.hidden_size),
            ("vocab_size", config.get_text_config().vocab_size, source.vocab_size),
        ]

    def write_more(self, folder: Path) -> None:  # noqa: B027 (may be left out)
        """Add to a saved head what other readers than transformers want."""


BUILT_IN = ("assistant", "parallel", "mtp", "eagle")
"""Kinds that come with Headstart, each in the file of heads/ that has its name."""
_registered: dict[str, HeadKind] = {}


def register(kind: HeadKind) -> None:
    """Make a kind known by its name; one of the same name gives way to it."""
    _registered[kind.name] = kind


def head_kinds() -> dict[str, HeadKind]:
    """Name -> kind, those that come with Headstart first."""
    built_in = {name: import_module(f"headstart.heads.{name}").KIND for name in BUILT_IN}
    return built_in | _registered


def head_kind(name: str) -> HeadKind:
    """The kind of a name.

    Raises:
        ValueError: there is none; the message lists them.
    """
    kinds = head_kinds()
    if name not in kinds:
        raise ValueError(f"head.kind={name!r} is none of {', '.join(kinds)}")
    return kinds[name]


def is_head(config: Any) -> bool:
    """Whether a configuration is that of a draft head, and not of another model."""
    return any(config.model_type in kind.model_types for kind in head_kinds().values())


def kind_of(config: Any) -> HeadKind:
    """The kind of a head, by its configuration (`is_head`)."""
    return next(kind for kind in head_kinds().values() if config.model_type in kind.model_types)


def inputs_of(config: Any) -> Inputs:
    """What a head reads of its target, by its configuration."""
    return kind_of(config).inputs(config)


def runs_in_transformers(config: Any) -> bool:
    """Whether transformers' own assisted decoding runs a head."""
    return "transformers" in kind_of(config).engines


def check_drafts(config: Any, tokens: Sequence[int], setting: str) -> None:
    """Raise `ValueError`, naming the setting, where a head cannot draft so many tokens a round."""
    kind = kind_of(config)
    most = kind.most_drafts(config)
    if most is not None and (above := [k for k in tokens if k > most]):
        raise ValueError(
            f"{setting}={above[0]} is above the {most} drafts that this {kind.name} head was made "
            f"for: lower it, or train one with train.num_speculative_steps={above[0]}"
        )

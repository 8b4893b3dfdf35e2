"""What is known of a target without its weights: its tokenizer, how it ends and samples texts."""

import hashlib
import json
from dataclasses import dataclass
from functools import cached_property

from transformers import GenerationConfig, PreTrainedTokenizerBase


@dataclass(frozen=True)
class Sampling:
    """How a target chooses its next token."""

    temperature: float
    """0: greedy."""
    top_k: int | None = None
    """Only the k most likely tokens; None: all."""
    top_p: float = 1.0
    """Only the most likely tokens that hold this much probability together."""


class TargetTokens:
    """What is known of a target without its weights: enough to ask a server that holds them.

    Args:
        tokenizer: the target's.
        name: what reports call it.
        revision: commit on the Hub, where it comes from there.
        generation: its generation configuration.
    """

    fingerprint: str | None = None

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        name: str,
        revision: str | None,
        generation: GenerationConfig,
    ):
        self.tokenizer = tokenizer
        self.name = name
        self.revision = revision
        self.generation = generation

    @property
    def eos_ids(self) -> list[int]:
        """Tokens with which the target ends a text."""
        eos = self.generation.eos_token_id
        eos = self.tokenizer.eos_token_id if eos is None else eos
        return eos if isinstance(eos, list) else [eos]

    @property
    def own_sampling(self) -> Sampling:
        """What the target's checkpoint says of sampling; plain where it says nothing."""
        g = self.generation
        return Sampling(
            1.0 if g.temperature is None else g.temperature,
            g.top_k or None,
            1.0 if g.top_p is None else g.top_p,
        )

    @cached_property
    def tokenizer_hash(self) -> str:
        """SHA-256 over the vocabulary: equal hashes, ids that mean the same."""
        vocabulary = sorted(self.tokenizer.get_vocab().items())
        return hashlib.sha256(json.dumps(vocabulary).encode()).hexdigest()

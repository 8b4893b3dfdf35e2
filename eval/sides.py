"""The ways to decode that are compared with plain decoding."""

from collections.abc import Sequence
from dataclasses import dataclass

from transformers import PreTrainedModel

from headstart.configs.schema import Decoder
from headstart.eval.decoding import Decoded, greedy
from headstart.eval.draft_cost import measure_costs
from headstart.eval.moment import MAX_DRAFT_TOKENS
from headstart.heads.draft_length import CostRule
from headstart.heads.exact import ExactDecoding, Lookup
from headstart.heads.targets import Target


@dataclass(frozen=True)
class Side:
    """One way to decode that is compared with plain decoding."""

    decoder: Decoder
    num_assistant_tokens: int
    """K, the most drafts of a round."""
    how: ExactDecoding | None
    """Of the exact decoder; learns from prompt to prompt."""

    def decode(
        self, target: Target, prompt_ids: list[int], max_new_tokens: int, assistant: PreTrainedModel
    ) -> Decoded:
        """One greedy text."""
        head = None if self.decoder == "lookup" else assistant
        return greedy(target, prompt_ids, max_new_tokens, head, self.num_assistant_tokens, self.how)


def make_sides(
    decoders: Sequence[Decoder],
    num_assistant_tokens: Sequence[int],
    target: Target,
    assistant: PreTrainedModel,
) -> list[Side]:
    """Each decoder with each K; those that choose K themselves once, told what drafts cost here."""
    sides: list[Side] = []
    costs = None
    if {"cost", "hybrid"} & set(decoders):
        costs = measure_costs(target, assistant)
    for decoder in decoders:
        match decoder:
            case "transformers" | "lookup":
                sides += [Side(decoder, k, None) for k in num_assistant_tokens]
            case "exact":
                sides += [Side(decoder, k, ExactDecoding()) for k in num_assistant_tokens]
            case "cost" | "hybrid":
                assert costs is not None
                rule = CostRule(*costs)
                lookup = Lookup(rule) if decoder == "hybrid" else None
                sides.append(Side(decoder, MAX_DRAFT_TOKENS, ExactDecoding(rule, lookup)))
    return sides

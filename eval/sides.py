"""The ways to decode that are compared with plain decoding."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from transformers import PreTrainedModel

from headstart.configs.schema import Decoder
from headstart.eval.decoding import Decoded, decode
from headstart.eval.draft_cost import Costs
from headstart.eval.moment import MAX_DRAFT_TOKENS
from headstart.heads.draft_length import Confident, CostRule, DraftLength, Heuristic
from headstart.heads.exact import ExactDecoding, Lookup, Round
from headstart.heads.progress import progress_bar
from headstart.heads.targets import Target
from headstart.heads.tokens import Sampling

START = 4  # draft tokens with which `heuristic` begins
THRESHOLDS = [0.05 * i for i in range(20)]  # of confidence, tried for `confident`


@dataclass(frozen=True)
class Side:
    """One way to decode that is compared with plain decoding."""

    decoder: Decoder
    head: str | None
    """Name of the head, or of the small model; None: it needs neither."""
    num_assistant_tokens: int
    """K, the most drafts of a round."""
    assistant: PreTrainedModel | None
    how: ExactDecoding | None
    """Of the exact decoder; learns from prompt to prompt."""
    costs: Costs | None
    """What its drafts and verifications cost; None: not measured."""
    threshold: float | None = None
    """Of confidence, of the decoder `confident`."""

    @property
    def key(self) -> list[str | int | None]:
        """By which it is found again in a file."""
        return [self.decoder, self.head, self.num_assistant_tokens]

    def decode(
        self,
        target: Target,
        prompt_ids: list[int],
        max_new_tokens: int,
        sampling: Sampling,
        seed: int,
    ) -> Decoded:
        """One text."""
        k, how = self.num_assistant_tokens, self.how
        return decode(target, prompt_ids, max_new_tokens, self.assistant, k, how, sampling, seed)


def make_sides(
    decoders: Sequence[Decoder],
    num_assistant_tokens: Sequence[int],
    heads: Mapping[str, PreTrainedModel],
    draft_models: Mapping[str, PreTrainedModel],
    costs: Mapping[str, dict[str, Costs]],
    thresholds: Mapping[str, float],
) -> list[Side]:
    """Each decoder with each head and each K; those that choose K themselves once for each head.

    Args:
        decoders: what to compare.
        num_assistant_tokens: the K of those that keep to one.
        heads: name -> head.
        draft_models: name -> small model.
        costs: head -> what `measure_costs` found.
        thresholds: head -> `calibrated_threshold`, where `confident` is among the decoders.
    """
    sides: list[Side] = []
    for decoder in decoders:
        match decoder:
            case "lookup":
                found = next(iter(costs.values()), None)
                free = None if found is None else Costs(0.0, found["transformers"].v)
                sides += [Side(decoder, None, k, None, None, free) for k in num_assistant_tokens]
            case "draft-model":
                for name, model in draft_models.items():
                    sides += [
                        Side(decoder, name, k, model, None, None) for k in num_assistant_tokens
                    ]
            case _:
                for name, head in heads.items():
                    sides += _of_head(
                        decoder, name, head, num_assistant_tokens, costs[name], thresholds.get(name)
                    )
    return sides


def _of_head(
    decoder: Decoder,
    name: str,
    head: PreTrainedModel,
    num_assistant_tokens: Sequence[int],
    costs: dict[str, Costs],
    threshold: float | None,
) -> list[Side]:
    if decoder == "transformers":
        stock = costs["transformers"]
        return [Side(decoder, name, k, head, None, stock) for k in num_assistant_tokens]
    exact = costs["exact"]
    if decoder == "exact":
        return [Side(decoder, name, k, head, ExactDecoding(), exact) for k in num_assistant_tokens]
    rule: DraftLength
    lookup = None
    match decoder:
        case "heuristic":
            rule = Heuristic(START, MAX_DRAFT_TOKENS)
        case "confident":
            assert threshold is not None
            rule = Confident(MAX_DRAFT_TOKENS, threshold)
        case "cost" | "hybrid":
            rule = CostRule(exact.c, exact.v)
            lookup = Lookup(rule) if decoder == "hybrid" else None
    how = ExactDecoding(rule, lookup)
    return [Side(decoder, name, MAX_DRAFT_TOKENS, head, how, exact, threshold)]


def calibrated_threshold(
    target: Target,
    head: PreTrainedModel,
    costs: Costs,
    prompts: Sequence[list[int]],
    max_new_tokens: int,
) -> float:
    """The least confidence for another draft that promises the most tokens a target step.

    Texts are decoded with the longest drafts; then each threshold is told what its shorter ones
    would have brought and cost.

    Args:
        target: in the dtype to measure.
        head: of the drafts.
        costs: of the exact decoder.
        prompts: token ids of each.
        max_new_tokens: of each text.
    """
    how, rounds = ExactDecoding(Confident(MAX_DRAFT_TOKENS, 0.0)), list[Round]()
    with progress_bar() as bar:
        task = bar.add_task("Calibrating the confidence threshold", total=len(prompts), status="")
        for ids in prompts:
            decode(target, ids, max_new_tokens, head, MAX_DRAFT_TOKENS, how)
            rounds += how.rounds
            bar.update(task, advance=1)
    return max(THRESHOLDS, key=lambda threshold: _promise(rounds, threshold, costs))


def _promise(rounds: list[Round], threshold: float, costs: Costs) -> float:
    """Tokens a target step of rounds whose drafts end after one below the threshold."""
    tokens = cost = 0.0
    for one in rounds:
        below = [i for i, sure in enumerate(one.drafts.confidences, 1) if sure < threshold]
        drafted = min(below, default=len(one.drafts.confidences))
        tokens += 1 + min(one.accepted, drafted)
        cost += costs.of_round(drafted)
    return tokens / cost if cost else 1.0

"""From prompt files to the activation stores of a run."""

import random

from headstart.configs.schema import DataConfig
from headstart.data.activations import ActivationStore, generate_activations
from headstart.data.prompts import Prompt, load_prompts, split_by_source
from headstart.heads.targets import Target


def prepare_stores(
    target: Target, data: DataConfig, seed: int
) -> tuple[ActivationStore, ActivationStore]:
    """Training and validation activations; validation text is greedy and of other sources.

    Whatever an earlier call has finished is reused.

    Raises:
        ValueError: a prompt file is missing or malformed, or too small to hold out from.
    """
    prompts = [p for path in data.prompts for p in load_prompts(path)]
    training, validation = split_by_source(prompts, data.validation_conversations, seed)
    chosen = deal(training, data.num_conversations, seed)
    heats = [data.temperatures[i % len(data.temperatures)] for i in range(len(chosen))]
    greedy = [0.0] * len(validation)
    return (
        generate_activations(target, chosen, heats, data, seed, "Generating"),
        generate_activations(target, validation, greedy, data, seed, "  held out"),
    )


def deal(prompts: list[Prompt], count: int, seed: int) -> list[Prompt]:
    """`count` prompts in a shuffled order, starting over where there are fewer."""
    rng = random.Random(seed)
    dealt: list[Prompt] = []
    while len(dealt) < count:
        dealt += rng.sample(prompts, len(prompts))
    return dealt[:count]

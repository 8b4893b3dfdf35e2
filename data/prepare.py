"""From prompt files to the activation stores of a run."""

import random

from headstart.configs.schema import DataConfig
from headstart.data.activations import ActivationStore, open_recorded
from headstart.data.conversations import generate_batches
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
    prompts = [p for source in data.prompts for p in load_prompts(source.path)]
    training, validation = split_by_source(prompts, data.validation_conversations, seed)
    chosen = deal(training, data.num_conversations, seed)
    heats = [data.temperatures[i % len(data.temperatures)] for i in range(len(chosen))]
    greedy = [0.0] * len(validation)
    written, _ = generate_batches(target, chosen, heats, data, seed, "Generating")
    held_out, _ = generate_batches(target, validation, greedy, data, seed, "  held out")
    return open_recorded(written), open_recorded(held_out)


def deal(prompts: list[Prompt], count: int, seed: int) -> list[Prompt]:
    """`count` prompts in a shuffled order, starting over where there are fewer."""
    rng = random.Random(seed)
    dealt: list[Prompt] = []
    while len(dealt) < count:
        dealt += rng.sample(prompts, len(prompts))
    return dealt[:count]

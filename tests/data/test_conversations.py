from pathlib import Path
from typing import Any

import pytest
import torch

from headstart.configs.schema import DataConfig
from headstart.data import conversations
from headstart.data.conversations import (
    Conversation,
    TemperatureMixture,
    batch_files,
    generate_batches,
    read_batch,
)
from headstart.data.prompts import Prompt
from headstart.heads.targets import Target


def _prompts(count: int) -> list[Prompt]:
    return [
        Prompt(f"p{i}", "c", f"s{i}", [{"role": "user", "content": "abc" * (i + 1)}], raw=True)
        for i in range(count)
    ]


def generate_conversations(*args: Any) -> list[Conversation]:
    """In the order of the prompts."""
    folder, order = generate_batches(*args)
    written = [c for path in batch_files(folder) for c in read_batch(path)]
    by_prompt = dict(zip(order, written, strict=True))
    return [by_prompt[i] for i in range(len(order))]


CONFIG = DataConfig(max_new_tokens=12, generation_batch_size=3)


def test_a_greedy_response_is_what_the_target_says_one_token_at_a_time(tiny: Target) -> None:
    for conversation in generate_conversations(tiny, _prompts(5), [0.0] * 5, CONFIG, 0, "x"):
        ids = list(conversation.prompt_ids)
        for token in conversation.response_ids:
            hidden = tiny.activations(torch.tensor([ids])).hidden[:, -1]
            assert token == int(tiny.logits(hidden).argmax())
            ids.append(token)


def test_an_interrupted_generation_ends_as_an_uninterrupted_one(
    tiny: Target, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    heats = [0.0, 1.0] * 4
    whole = CONFIG.model_copy(update={"cache_dir": tmp_path / "whole"})
    cut = CONFIG.model_copy(update={"cache_dir": tmp_path / "cut"})
    expected = generate_conversations(tiny, _prompts(8), heats, whole, 3, "x")

    calls = []
    answer = conversations._answer

    def fail_on_second(*args: Any) -> object:
        calls.append(args)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return answer(*args)

    monkeypatch.setattr(conversations, "_answer", fail_on_second)
    with pytest.raises(KeyboardInterrupt):
        generate_conversations(tiny, _prompts(8), heats, cut, 3, "x")
    assert generate_conversations(tiny, _prompts(8), heats, cut, 3, "x") == expected
    assert len(calls) == 4, "the first batch was kept, the second and third were made anew"
    generate_conversations(tiny, _prompts(8), heats, cut, 3, "x")
    assert len(calls) == 4, "a finished cache is reused whole"


def test_the_mixture_draws_from_the_softmax_at_each_rows_temperature() -> None:
    """Chi-square over 20,000 draws of 8 tokens: below the 99.9% quantile for 7 degrees (24.3)."""
    torch.manual_seed(0)
    logits = torch.randn(8)
    draws = 20_000
    mixture = TemperatureMixture([0.0] + [0.7] * draws, seed=1)
    chosen = mixture(torch.zeros(1, 1, dtype=torch.long), logits.repeat(draws + 1, 1)).argmax(-1)
    assert int(chosen[0]) == int(logits.argmax())
    expected = (logits / 0.7).softmax(-1) * draws
    observed = torch.bincount(chosen[1:], minlength=8)
    assert float(((observed - expected) ** 2 / expected).sum()) < 24.3

"""Small prompts and conversations."""

import torch

from headstart.configs.schema import DataConfig
from headstart.data.conversations import Conversation, answered
from headstart.data.prompts import Prompt
from headstart.data.regenerate import Job, make_jobs
from headstart.heads.tokens import Sampling, TargetTokens


def conversations(count: int, prompt_tokens: int = 5) -> list[Conversation]:
    """Random bytes, each conversation three tokens longer than the one before."""
    generator = torch.Generator().manual_seed(0)
    rows = []
    for i in range(count):
        ids = torch.randint(4, 260, (12 + 3 * i,), generator=generator).tolist()
        names = {"id": f"c{i}", "category": "c", "source": f"s{i}", "temperature": 0.0}
        rows.append(answered(ids[:prompt_tokens], ids[prompt_tokens:], **names))
    return rows


def prompts(count: int) -> list[Prompt]:
    """Plain text prompts of different lengths."""
    return [
        Prompt(f"p{i}", "c", f"s{i}", [{"role": "user", "content": "abc" * (i % 7 + 1)}], raw=True)
        for i in range(count)
    ]


def jobs(tokens: TargetTokens, temperatures: list[float], config: DataConfig) -> list[Job]:
    """A job for each temperature."""
    sampling = [Sampling(t) for t in temperatures]
    return make_jobs(prompts(len(temperatures)), sampling, tokens, config)

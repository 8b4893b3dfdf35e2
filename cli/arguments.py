"""What several commands parse alike."""

import argparse


def count(text: str) -> int:
    """For argparse: a whole number, 1 or more."""
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{value} is not 1 or more")
    return value


def counts(text: str) -> list[int]:
    """For argparse: `2,4`."""
    return [count(part) for part in text.split(",")]


def default_device() -> str:
    """Where a model runs that nobody placed."""
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"

"""The commands as functions, for a script that holds a model in memory (docs/reference/api.md)."""

from headstart.api.calls import (
    adapt_head,
    clean_kv_decoding,
    evaluate_head,
    publish_head,
    train_head,
)
from headstart.api.inputs import TrainedHead

__all__ = [
    "TrainedHead",
    "adapt_head",
    "clean_kv_decoding",
    "evaluate_head",
    "publish_head",
    "train_head",
]

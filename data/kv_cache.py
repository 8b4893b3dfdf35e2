"""Keys and values of a batch that generates, in buffers that are there from the beginning.

`DynamicCache` copies all of a layer's rows at every step, to append one. Here a step writes its own
row, and attention sees a view of the buffer: the same numbers in the same order, to the bit.

Letters: B batch, G key heads, T rows, D head width.
"""

from typing import Any

import torch
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

SLACK = 128  # rows


class _Rows:
    """Keys or values of one layer: a buffer [B, G, room, D], filled from its beginning.

    Args:
        room: rows that it holds.
        before: how many earlier rows new ones are seen with; None: all of them. Rows beyond these
            may go when the buffer is full.
    """

    def __init__(self, room: int, before: int | None):
        self.room, self.before, self.end = room, before, 0
        self.buffer: torch.Tensor | None = None

    def append(self, new: torch.Tensor) -> torch.Tensor:
        """`new` [B, G, t, D] -> what its tokens see, themselves included: [B, G, T, D]."""
        if self.buffer is None:
            self.buffer = new.new_empty(*new.shape[:2], self.room, new.shape[3])
        start = 0 if self.before is None else max(self.end - self.before, 0)
        end = self.end + new.shape[2]
        if end <= self.room:
            self.buffer.narrow(2, self.end, new.shape[2]).copy_(new)
            self.end = end
            return self.buffer[:, :, start:end]
        if self.before is None:
            raise RuntimeError(f"{end} rows of keys for a cache of {self.room}")
        seen = torch.cat([self.buffer[:, :, start : self.end], new], dim=2)
        self.end = min(self.before, seen.shape[2])
        self.buffer[:, :, : self.end] = seen[:, :, seen.shape[2] - self.end :]
        return seen

    def last(self, rows: int) -> torch.Tensor:
        """The last rows that are there, at most so many."""
        assert self.buffer is not None
        return self.buffer[:, :, max(self.end - rows, 0) : self.end]


class FullLayer(DynamicLayer):
    """A layer of full attention; `room` rows at most."""

    def __init__(self, room: int):
        super().__init__()
        self._rows = _Rows(room, None), _Rows(room, None)

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """New keys and values [B, G, t, D] -> all, each [B, G, T, D]."""
        _begin(self, key_states)
        self.keys = self._rows[0].append(key_states)
        self.values = self._rows[1].append(value_states)
        return self.keys, self.values

    def rows(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values of all tokens, each [B, G, T, D]."""
        return self.keys, self.values


class WindowLayer(DynamicSlidingWindowLayer):
    """A sliding layer. Its buffer is of its window and `SLACK` rows more, so that it moves the
    window once in so many steps, or of `room` rows where those are fewer. With `keeps_all` it is of
    `room` rows, all of which `rows` tells; attention sees the window alone there too."""

    def __init__(self, sliding_window: int, room: int, keeps_all: bool = False):
        super().__init__(sliding_window)
        room = room if keeps_all else min(room, sliding_window + SLACK)
        self._rows = tuple(_Rows(room, sliding_window - 1) for _ in range(2))

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """New keys and values [B, G, t, D] -> those that they see, each [B, G, T, D]."""
        _begin(self, key_states)
        self.cumulative_length += key_states.shape[2]
        seen = self._rows[0].append(key_states), self._rows[1].append(value_states)
        self.keys, self.values = (rows.last(self.sliding_window - 1) for rows in self._rows)
        return seen

    def rows(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values of all tokens that are kept, each [B, G, T, D]."""
        return self._rows[0].last(self._rows[0].room), self._rows[1].last(self._rows[1].room)


def _begin(layer: DynamicLayer, key_states: torch.Tensor) -> None:
    """What the layers of transformers note at their first rows, without the empty tensors."""
    layer.dtype, layer.device = key_states.dtype, key_states.device
    layer.is_initialized = True


def generation_cache(config: Any, room: int, keeps_all: int | None = None) -> DynamicCache:
    """A cache for `room` tokens of each text, padding included.

    Args:
        config: the target's text configuration.
        room: tokens that will run in all.
        keeps_all: index of a sliding layer whose rows are all kept.
    """
    cache = DynamicCache(config=config)
    for i, layer in enumerate(cache.layers):
        cache.layers[i] = (
            WindowLayer(layer.sliding_window, room, keeps_all=i == keeps_all)
            if isinstance(layer, DynamicSlidingWindowLayer)
            else FullLayer(room)
        )
    return cache

"""What the head will see of the target, recorded while the target generates.

Letters: B batch, W padded prompt length, S steps generated, T positions, D target width, k teacher
tokens, V vocabulary.
"""

from typing import Any

import torch
from transformers import DynamicCache, LogitsProcessor

from headstart.heads.targets import Target
from headstart.heads.versions import CACHE, all_prompt_rows, check_rows


def top_logprobs(logits: torch.Tensor, k: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The k best tokens of [N, V] logits and their log-probabilities, best first.

    Returns:
        ids [N, k] int64, logprobs [N, k] float32 of the softmax over all V.
    """
    best = logits.topk(k)
    # Row by row a CPU keeps the V values in its cache: a third of the time of all rows at once.
    rows = logits.split(1) if logits.device.type == "cpu" else (logits,)
    normaliser = torch.cat([row.float().logsumexp(-1, keepdim=True) for row in rows])
    return best.indices, best.values.float() - normaliser


class Recorder(LogitsProcessor):
    """Keeps hidden states, keys, values and the teacher's top tokens of one `generate` call.

    As the first logits processor it sees the logits as the target emits them; a hook on the final
    norm sees the hidden states; the cache that it brings keeps every row, beyond sliding windows
    too. Use it as a context manager around `generate(**recorder.arguments(), ...)`.

    Raises:
        RuntimeError: (in `generate`) the target left out rows of the prompt.
    """

    def __init__(self, target: Target, top_k: int):
        self.target, self.top_k = target, top_k
        self.cache = DynamicCache()  # without a config: no layer drops rows
        self.hidden: list[torch.Tensor] = []
        self.teacher: list[tuple[torch.Tensor, torch.Tensor]] = []

    def arguments(self) -> dict[str, Any]:
        """Keywords for `generate`."""
        return {CACHE: self.cache, **all_prompt_rows(self.target.device)}

    def __enter__(self) -> "Recorder":
        self._hook = self.target.final_norm.register_forward_hook(
            lambda module, inputs, output: self.hidden.append(output)
        )
        return self

    def __exit__(self, *error: Any) -> None:
        self._hook.remove()

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """`scores` [B, V], unchanged; `input_ids` [B, W + tokens so far]."""
        check_rows(sum(block.shape[1] for block in self.hidden), input_ids.shape[1])
        self.teacher.append(top_logprobs(scores, self.top_k))
        return scores

    def tensors(
        self, prompt_ids: list[list[int]], responses: list[list[int]]
    ) -> dict[str, torch.Tensor]:
        """The tensors of one shard (`data/shards.py`), documents in the order of the batch.

        The target never ran on the last token of a response: its row holds zeros, and no training
        row reads it.
        """
        width = self.hidden[0].shape[1]
        # Forwards after the last token were for other processes' sake.
        hidden = torch.cat(self.hidden[: len(self.teacher)], dim=1)  # [B, W + S - 1, D]
        ids = torch.stack([ids for ids, _ in self.teacher], dim=1)  # [B, S, k]
        logprobs = torch.stack([logprobs for _, logprobs in self.teacher], dim=1)
        sources = {t: self.cache.layers[i] for t, i in self.target.source_layers.items()}
        shards: dict[str, list[torch.Tensor]] = {}
        for b, (prompt, response) in enumerate(zip(prompt_ids, responses, strict=True)):
            length, steps = len(prompt) + len(response), len(response)
            seen = slice(width - len(prompt), width - len(prompt) + length - 1)
            document = {
                "ids": torch.tensor(prompt + response, dtype=torch.int32),
                "loss_mask": torch.arange(length) >= len(prompt),
                "hidden": _padded(hidden[b, seen], 0, length),
                "teacher_ids": _padded(ids[b, :steps].int(), len(prompt) - 1, length),
                "teacher_logprobs": _padded(logprobs[b, :steps], len(prompt) - 1, length),
            }
            for layer_type, layer in sources.items():
                keys, values = layer.keys[b, :, seen], layer.values[b, :, seen]
                document[f"{layer_type}.keys"] = _padded(keys.transpose(0, 1), 0, length)
                document[f"{layer_type}.values"] = _padded(values.transpose(0, 1), 0, length)
            for name, tensor in document.items():
                shards.setdefault(name, []).append(tensor.cpu())
        return {name: torch.cat(parts) for name, parts in shards.items()}


def _padded(tensor: torch.Tensor, before: int, length: int) -> torch.Tensor:
    """`tensor` [n, ...] as rows `before` .. of [length, ...], zeros elsewhere."""
    rows = tensor.new_zeros(length, *tensor.shape[1:])
    rows[before : before + len(tensor)] = tensor
    return rows

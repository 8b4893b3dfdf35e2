"""The heart of the suite: training rows equal what transformers' own generator computes.

The generator drafts from a clean prefix, as after a prefill or after a round without a rejection.
After a rejection the stock decoder shows the head stale KV (docs/upstream.md); that is pinned
below and is not trained to.
"""

from pathlib import Path
from typing import Any

import pytest
import torch

from headstart.configs.schema import DraftPositionOffset
from headstart.heads.kinds import Texts, all_rows
from headstart.heads.pairing import check_pair
from headstart.heads.saving import load_assistant, save_assistant
from headstart.heads.target import Target
from tests.helpers.heads import noisy_head
from tests.helpers.models import make_target
from tests.helpers.stock import K, prefill, stock_drafts, training_logits

pytestmark = pytest.mark.contract

TOKENS = 30  # beyond the sliding window of 8 several times over


@torch.no_grad()
def test_training_rows_equal_the_stock_generator(target: Target) -> None:
    """Every row, every round, all rows in one forward; the head eats its own drafts."""
    head = noisy_head(target)
    ids = torch.randint(4, 260, (1, TOKENS))
    rows = torch.arange(TOKENS - 1)
    drafts, wanted = [], []
    for t in rows.tolist():
        outputs = prefill(target, ids[:, : t + 1])
        tokens, logits = stock_drafts(target, head.assistant, ids[:, : t + 2], outputs)
        drafts.append(tokens)
        wanted.append(logits)
    own = torch.stack(drafts)
    fed = torch.cat([ids[0, 1:, None], own[:, : K - 1]], dim=1)
    logits = training_logits(target, head, target.activations(ids), rows, fed)
    torch.testing.assert_close(logits, torch.stack(wanted, dim=1), atol=1e-4, rtol=0)
    # A test of random models is worth nothing if all of them say the same.
    assert len(own.unique()) > 10


@torch.no_grad()
@pytest.mark.parametrize("family", ["gemma3", "gemma4-kv-sharing"])
def test_rows_one_earlier_equal_the_stock_generator_one_position_earlier(family: str) -> None:
    """As vLLM has it: the generator with every position lowered by one. Of `mixed`, every second
    row of the text, in whatever order they are drawn."""
    target = make_target(family)
    head = noisy_head(target)
    ids = torch.randint(4, 260, (1, TOKENS))
    rows = torch.arange(TOKENS - 1)
    rows = torch.cat([rows[::3], rows[1::3], rows[2::3]])

    def lower(module: Any, args: Any, kwargs: Any) -> Any:
        return args, kwargs | {"position_ids": kwargs["position_ids"] - 1}

    found: dict[int, list[Any]] = {0: [], 1: []}
    for t in rows.tolist():
        outputs = prefill(target, ids[:, : t + 1])
        found[1].append(stock_drafts(target, head.assistant, ids[:, : t + 2], outputs))
        handle = head.assistant.register_forward_pre_hook(lower, with_kwargs=True)
        found[0].append(stock_drafts(target, head.assistant, ids[:, : t + 2], outputs))
        handle.remove()
    said = {}
    cases: list[tuple[DraftPositionOffset, list[int]]] = [(-1, [0, 0]), ("mixed", [0, 1])]
    for position, ahead in cases:
        chosen = [found[ahead[t % 2]][i] for i, t in enumerate(rows.tolist())]
        own, wanted = (torch.stack(parts) for parts in zip(*chosen, strict=True))
        fed = torch.cat([ids[0, rows + 1, None], own[:, : K - 1]], dim=1)
        seen = target.activations(ids)
        read = all_rows(rows[None], fed[None])
        states = head(Texts(seen.hidden, seen.shared_kv), read, target.embed, position)
        said[position] = torch.stack(states)[:, 0] @ target.table.T
        torch.testing.assert_close(said[position], wanted.transpose(0, 1), atol=1e-4, rtol=0)
    assert not torch.allclose(said[-1], said["mixed"], atol=1e-2)


@torch.no_grad()
@pytest.mark.parametrize("family", ["gemma3", "gemma4", "gemma4-kv-sharing"])
def test_teacher_forced_rows_equal_the_stock_generator(family: str) -> None:
    """As in training: the text's own tokens are fed, forced upon the stock loop as its argmax."""
    target = make_target(family)
    head = noisy_head(target)
    ids = torch.randint(4, 260, (1, TOKENS))
    recorded: list[torch.Tensor] = []
    forced: list[int] = []

    def force(module: Any, args: Any, output: Any) -> Any:
        recorded.append(output.logits[0, 0].clone())
        output.logits[0, 0, forced[len(recorded) - 1]] = torch.inf
        return output

    rows = torch.arange(TOKENS - K)
    wanted = []
    for t in rows.tolist():
        recorded.clear()
        forced[:] = [*ids[0, t + 2 : t + 2 + K].tolist(), 4]
        outputs = prefill(target, ids[:, : t + 1])
        handle = head.assistant.register_forward_hook(force)
        stock_drafts(target, head.assistant, ids[:, : t + 2], outputs)
        handle.remove()
        wanted.append(torch.stack(recorded))
    fed = ids[0, rows[:, None] + torch.arange(1, K + 1)]
    logits = training_logits(target, head, target.activations(ids), rows, fed)
    torch.testing.assert_close(logits, torch.stack(wanted, dim=1), atol=1e-4, rtol=0)


@torch.no_grad()
@pytest.mark.parametrize("family", ["gemma3", "gemma4", "gemma4-kv-sharing", "gemma4-unified"])
@pytest.mark.parametrize("prompt", [4, 20])
def test_second_round_equals_training_unless_a_draft_was_rejected(family: str, prompt: int) -> None:
    """Drafts accepted: the next round's rows are the training rows. Drafts rejected: stale KV.

    transformers cuts the shared KV to the length of the text and not to the rows that are valid,
    so after a rejection one stale row stays visible in the full layers, and past the window all
    rejected rows stay in the sliding layers.
    """
    target = make_target(family)
    head = noisy_head(target)
    text = torch.randint(4, 260, (1, prompt + K + 2))
    seen = target.activations(text)

    def verify(candidates: torch.Tensor) -> Any:
        outputs = prefill(target, text[:, :prompt])
        outputs.past_key_values.crop(0)
        return target.model(
            input_ids=torch.cat([text[:, prompt : prompt + 1], candidates], dim=1),
            past_key_values=outputs.past_key_values,
            output_hidden_states=True,
            return_shared_kv_states=True,
        )

    def gap(accepted: int) -> float:
        candidates = text[:, prompt + 1 : prompt + 1 + K].clone()
        candidates[:, accepted:] = (candidates[:, accepted:] + 7) % 250 + 4
        length = prompt + accepted + 2
        _, wanted = stock_drafts(
            target, head.assistant, text[:, :length], verify(candidates), accepted, is_prefill=False
        )
        row = torch.tensor([length - 2])
        fed = torch.cat([text[:, length - 1 : length], wanted.argmax(-1)[None, : K - 1]], dim=1)
        logits = training_logits(target, head, seen, row, fed)
        return float((logits[:, 0] - wanted).abs().max())

    assert gap(accepted=K) < 1e-4
    assert gap(accepted=1) > 1e-3, "the stock decoder no longer shows stale KV: update the docs"


@torch.no_grad()
@pytest.mark.parametrize("family", ["gemma3", "gemma4-moe"])
@pytest.mark.parametrize(
    "shape",
    [
        {"num_hidden_layers": 1},
        {"num_hidden_layers": 3, "intermediate_size": 40},
        {"num_attention_heads": 2},
        {"hidden_size": 32},
    ],
    ids=str,
)
def test_heads_of_other_shapes_equal_the_stock_generator_once_saved(
    family: str, shape: dict[str, int], tmp_path: Path
) -> None:
    """Trained form against saved form; a narrow head's table is materialized in between."""
    target = make_target(family)
    head = noisy_head(target, **shape)
    if "hidden_size" in shape:
        head.projection = torch.nn.Parameter(torch.randn(48, 32))
    save_assistant(head.assistant, head.table(target.table), tmp_path / "h", K, torch.float32)
    saved = load_assistant(tmp_path / "h", torch.float32)
    check_pair(target, saved)
    ids = torch.randint(4, 260, (1, TOKENS))
    seen = target.activations(ids)
    for t in (2, 12, 28):
        tokens, wanted = stock_drafts(
            target, saved, ids[:, : t + 2], prefill(target, ids[:, : t + 1])
        )
        fed = torch.cat([ids[0, t + 1 : t + 2], tokens[:-1]])[None]
        logits = training_logits(target, head, seen, torch.tensor([t]), fed)[:, 0]
        # The product with the projection makes logits of a few hundred.
        torch.testing.assert_close(logits, wanted, atol=1e-4, rtol=1e-5)


@torch.no_grad()
def test_parity_fails_when_the_pairing_is_one_token_late(tiny: Target) -> None:
    """The test above can fail: embed(x_t) with h_t is told apart from embed(x_{t+1}) with h_t."""
    head = noisy_head(tiny)
    ids = torch.randint(4, 260, (1, TOKENS))
    seen = tiny.activations(ids)
    row = torch.tensor([20])
    _, wanted = stock_drafts(tiny, head.assistant, ids[:, :22], prefill(tiny, ids[:, :21]))
    right = training_logits(tiny, head, seen, row, ids[:, 21:22])[0]
    late = training_logits(tiny, head, seen, row, ids[:, 20:21])[0]
    assert (right - wanted[:1]).abs().max() < 1e-4
    assert (late - wanted[:1]).abs().max() > 1e-2

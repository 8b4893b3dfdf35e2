"""What a head is worth where several texts are decoded at once."""

from dataclasses import asdict
from typing import Any

import pytest
import torch

from headstart.eval.concurrency import (
    BatchCost,
    draft_for_all,
    leave_off_from,
    measure_batches,
    predicted,
)
from headstart.eval.draft_cost import FOR_DRAFTS, random_ids
from headstart.heads.decoder import verified
from headstart.heads.drafting import Drafter
from headstart.heads.kinds import Texts
from tests.helpers.heads import ordered_head
from tests.helpers.models import FAMILIES, make_target


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_is_measured_at_each_number_of_texts(family: str) -> None:
    target = make_target(family)
    head = ordered_head(target.config)
    costs = measure_batches(target, head, [1, 3], [1, 2])
    assert [(cost.texts, cost.num_assistant_tokens) for cost in costs] == [
        (1, 1), (1, 2), (3, 1), (3, 2)
    ]  # fmt: skip
    assert all(cost.c > 0 and cost.v > 0 for cost in costs)


@torch.no_grad()
@pytest.mark.parametrize("ordered", [True, False])
def test_what_is_timed_are_the_drafts_of_the_decoder(ordered: bool) -> None:
    """Fed with the tokens that the decoder drafts for each text alone, all are drafted alike."""
    target = make_target("gemma3")
    head = ordered_head(target.config)
    head.config.use_ordered_embeddings = ordered
    head.lm_head.weight.copy_(target.table)
    ids = random_ids(target, 3, 7)
    outputs = target.model(ids[:, :6], **FOR_DRAFTS)
    drafter = Drafter(head, target.model.get_input_embeddings())
    alone = []
    for n in range(3):
        state, own = drafter.new_text(), target.model(ids[n : n + 1, :6], **FOR_DRAFTS)
        state.commit(verified(own, ids[n : n + 1, :6]))
        alone.append(drafter.draft(ids[n : n + 1, 6:], state, 3, frozenset(), goes_on=None).tokens)
    seen = verified(outputs, ids)
    following = torch.cat([ids[:, 6:], torch.tensor(alone)[:, :2]], dim=1)
    together = draft_for_all(head, Texts(seen.hidden, seen.shared_kv), following, target)
    assert torch.stack(together, dim=1).tolist() == alone
    assert len({tuple(tokens) for tokens in alone}) > 1


def result(decoder: str, temperature: float, length: float, **other: Any) -> dict[str, Any]:
    own = {"category": "all", "looping_texts": "with", "head": "head", "num_assistant_tokens": 2}
    return (
        own | {"decoder": decoder, "temperature": temperature, "acceptance_length": length} | other
    )


def test_the_prediction_is_of_the_warmest_texts_of_the_exact_decoder() -> None:
    costs = [asdict(BatchCost(4, 2, 0.1, 1.3)), asdict(BatchCost(4, 3, 0.1, 1.4))]
    results = [
        result("exact", 0.0, 2.0), result("exact", 1.0, 1.5), result("transformers", 0.0, 1.9),
        result("exact", 0.0, 3.0, category="code"),
        result("exact", 0.0, 1.8, looping_texts="without"),
    ]  # fmt: skip
    [row] = predicted({"head": costs}, results)
    assert (row["num_assistant_tokens"], row["acceptance_length"]) == (2, 1.5)
    assert (row["temperature"], row["speedup"]) == (1.0, pytest.approx(1.5 / (2 * 0.1 + 1.3)))
    [cold] = predicted({"head": costs}, [r for r in results if not r["temperature"]])
    assert (cold["temperature"], cold["acceptance_length"]) == (0.0, 2.0)


@pytest.mark.parametrize(
    ("best", "size"),
    [
        ({4: 1.5, 16: 1.1}, None),
        ({4: 1.5, 16: 0.9}, 16),
        ({4: 0.9, 16: 0.8}, 4),
        ({4: 0.9, 16: 1.2, 64: 0.9}, 64),
    ],
)
def test_a_head_is_left_off_where_nothing_beyond_pays(
    best: dict[int, float], size: int | None
) -> None:
    assert leave_off_from(best) == size

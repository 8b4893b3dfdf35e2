"""Texts that diverge: where, by how much, and whether rounding explains it."""

import pytest
import torch

from headstart.eval.decoding import (
    ROUNDING,
    Divergence,
    _last_logits,
    decode,
    divergence,
    explain_divergence,
)
from headstart.heads.target import Target
from tests.helpers.models import make_target

PROMPT = [5, 9, 7, 200, 31]


def test_the_first_token_that_differs_is_where_texts_part() -> None:
    assert divergence([1, 2, 3], [1, 2, 3]) is None
    assert divergence([1, 2, 3], [1, 4, 3]) == 1
    assert divergence([1, 2, 3], [1, 2]) == 2


@torch.no_grad()
def test_forwards_of_any_shape_give_the_same_logits_in_float32(target: Target) -> None:
    """Past the sliding window of 8 too, so that what differs in bfloat16 is rounding alone."""
    ids = [*PROMPT, *range(40, 60)]
    whole = target.model(torch.tensor([ids])).logits[0, -1].float()
    for first, rows in ((len(ids), 1), (5, 1), (5, 5), (5, 7)):
        torch.testing.assert_close(_last_logits(target, ids, first, rows), whole, atol=1e-4, rtol=0)


def test_a_token_that_the_target_did_not_mean_is_no_rounding(tiny: Target) -> None:
    plain = decode(tiny, PROMPT, 12).tokens
    assert explain_divergence(tiny, PROMPT, plain, plain) is None
    for at in (0, len(plain) - 2):
        other = [*plain[:at], plain[at] + 1, *plain[at + 1 :]]
        why = explain_divergence(tiny, PROMPT, plain, other)
        assert why is not None
        assert why.token_logit_gap is not None
        assert why.token_logit_gap >= why.top2_logit_gap > ROUNDING["float32"]
        assert why.rounding is not None
        assert why.rounding < ROUNDING["float32"]
        assert not why.within_rounding
    ended = explain_divergence(tiny, PROMPT, plain, plain[:-1])
    assert ended is not None
    assert ended.token_logit_gap is None
    assert not ended.within_rounding


def test_what_rounding_moves_is_measured_where_the_gap_is_not_small() -> None:
    """In bfloat16 forwards of other shapes give other logits: a gap within that is explained."""
    target = make_target("gemma3", torch.bfloat16)
    plain = decode(target, PROMPT, 16).tokens
    other = [*plain[:12], plain[12] + 1]
    why = explain_divergence(target, PROMPT, plain, other)
    assert why is not None
    if why.rounding is None:
        assert why.token_logit_gap is not None
        assert why.token_logit_gap <= ROUNDING["bfloat16"]
    assert Divergence(0.3, 0.3, None).within_rounding
    assert Divergence(0.3, 0.7, 0.4).within_rounding
    assert not Divergence(0.3, 0.9, 0.4).within_rounding


@pytest.mark.parametrize("family", ["gemma3", "gemma4-kv-sharing"])
def test_bfloat16_rounds_shapes_apart(family: str) -> None:
    target = make_target(family, torch.bfloat16)
    ids = [*PROMPT, *range(40, 60)]
    with torch.no_grad():
        whole, steps = (_last_logits(target, ids, first, 1) for first in (len(ids), 5))
    assert 0 < (whole - steps).abs().max() < 1

"""A head, a store, a checkpoint and a report as commit e034597 wrote them, on transformers 5.22.2:
each loads with the figures of then, or is refused by name.

They are of configs/tiny.yaml, smaller still: six conversations of 24 tokens, 12 steps.
"""

import json
import shutil
from pathlib import Path

import pytest
import torch

from headstart.configs.loader import load_saved
from headstart.data.store import ActivationStore
from headstart.eval.compare import read_report
from headstart.eval.replay import simulate_acceptance
from headstart.heads.loading import load_target
from headstart.heads.saving import draft_position_offset, load_assistant, load_assistant_config
from headstart.heads.unroll import DraftHead
from headstart.train.losses import Candidates
from headstart.train.run import train
from tests.helpers.runs import metrics

FILES = Path(__file__).parent / "e034597"


def test_a_head_is_accepted_on_a_store_as_it_was() -> None:
    target = load_target("tiny-gemma4", "float32")
    head = DraftHead(load_assistant(FILES / "run" / "head", torch.float32))
    store = ActivationStore(FILES / "store", target)
    greedy = [i for i, entry in enumerate(store.entries) if not entry.temperature]
    found = simulate_acceptance(head, target, store, 3, greedy).acceptance
    told = json.loads((FILES / "estimate.json").read_text())["results"][0]
    assert found.rounds == told["rounds"]
    # One text ended with a draft that was right, which counted as accepted then; no decoder counts
    # it so, and tests/eval/test_decoding.py holds both to the same.
    first, second, third = told["accepted"]
    assert list(found.accepted) == [first, second, third - 1]
    assert draft_position_offset(load_assistant_config(FILES / "run" / "head")) == "mixed"


def drawn_as_then(kept: torch.Tensor, negatives: int, seed: int) -> Candidates:
    """Candidates of a step of then, whose negatives were another draw: all else is as it was."""
    rest = (~kept).nonzero()[:, 0]
    order = torch.randperm(len(rest), generator=torch.Generator().manual_seed(seed))
    ids = torch.cat([kept.nonzero()[:, 0], rest[order[:negatives]]])
    weights = torch.ones(len(ids))
    weights[int(kept.sum()) :] = len(rest) / min(negatives, len(rest))
    slot_of = torch.full_like(kept, -1, dtype=torch.long)
    slot_of[ids] = torch.arange(len(ids))
    return Candidates(ids, weights, slot_of)


def test_a_run_goes_on_from_a_checkpoint_with_the_losses_that_it_had(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    work = tmp_path / "work"
    shutil.copytree(FILES, work)
    monkeypatch.chdir(work)
    monkeypatch.setattr("headstart.train.step.draw_candidates", drawn_as_then)
    told = metrics(FILES / "run")
    train(load_saved(Path("run/config.yaml")), resume=True)
    found = metrics(Path("run"))
    assert [row["step"] for row in found] == [row["step"] for row in told] == list(range(1, 13))
    for before, now in zip(told[6:], found[6:], strict=True):
        assert now == pytest.approx(before, rel=1e-4)


def test_a_report_is_refused_by_its_schema() -> None:
    with pytest.raises(ValueError, match=r"report\.json has schema 2"):
        read_report(FILES / "report.json")

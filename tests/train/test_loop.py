"""The loop on tiny targets: what is trained, what is not, and what survives a stop."""

import json
import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from safetensors.torch import load_file

from headstart.configs.loader import load_config
from headstart.configs.schema import Config, HeadConfig
from headstart.data.loader import candidate_rows, gather_rows
from headstart.eval.decoding import greedy
from headstart.heads.assistant import build_assistant, load_assistant
from headstart.heads.targets import Target, load_target
from headstart.heads.unroll import DraftHead
from headstart.train import loop
from headstart.train.checkpoints import checkpoints
from headstart.train.loop import Interrupted, export_head, learning_rate, objective, train
from tests.conftest import make_target
from tests.overfit import greedy_store, overfit

ROOT = Path(__file__).resolve().parents[2]
K = 3


def tiny_config(tmp_path: Path, *overrides: str) -> Config:
    prompts = ROOT / "data" / "prompts" / "text_train.jsonl"
    return load_config(
        ROOT / "configs" / "tiny.yaml",
        [f"run.dir={tmp_path}", f"data.prompts=[{prompts}]", *overrides],
    )


def acceptance_after_overfitting(target: Target, tmp_path: Path, shift: int = 0) -> float:
    """Train a head on one text, save it, and decode that text with the stock `generate`."""
    prompt, store = greedy_store(target)
    head = overfit(target, store, steps=500, rounds=K, shift=shift)
    export_head(head, target, tmp_path / "head", K)
    assistant = load_assistant(tmp_path / "head", torch.float32)
    # The text's last tokens are never drafted from in training: nothing follows them there.
    decoded = greedy(target, prompt, 22, assistant, K)
    return decoded.counts(len(prompt), K).acceptance_rate


@pytest.mark.parametrize("family", ["gemma3", "gemma4-kv-sharing", "gemma4-moe"])
def test_a_head_overfitted_on_one_text_is_always_accepted_by_generate(
    family: str, tmp_path: Path
) -> None:
    assert acceptance_after_overfitting(make_target(family), tmp_path) == 1.0


def test_the_same_head_fails_when_the_pairing_is_shifted_by_one(tmp_path: Path) -> None:
    """x_{t+1} with h_{t+1} in place of h_t: the head learns to be the target's own LM head."""
    assert acceptance_after_overfitting(make_target("gemma3"), tmp_path, shift=1) < 0.9


@pytest.mark.parametrize("head_config", [HeadConfig(), HeadConfig(hidden_size=32)])
def test_gradients_reach_all_of_the_head_and_none_of_the_target(
    target: Target, head_config: HeadConfig
) -> None:
    _, store = greedy_store(target)
    narrow = torch.randn(48, 32) if head_config.hidden_size else None
    head = DraftHead(build_assistant(target, head_config), narrow)
    before = target.fingerprint
    batch = gather_rows([store[0]], [candidate_rows(store[0])], 2)
    optimizer = torch.optim.AdamW(head.trainable().values(), lr=1e-2)
    for step in range(2):
        sums = objective(head, target, batch, torch.ones(2), 64, step, Accelerator())
        sums["loss_sum"].backward()
        for name, parameter in head.trainable().items():
            assert parameter.grad is not None, name
            assert parameter.grad.abs().sum() > 0, name
        optimizer.step()
    assert all(p.grad is None for p in target.model.parameters())
    assert target.fingerprint == before


def weights(run: Path) -> dict[str, torch.Tensor]:
    return load_file(checkpoints(run / "checkpoints")[-1] / "head.safetensors")


def metrics(run: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def test_a_resumed_run_ends_as_an_uninterrupted_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """SIGTERM in the middle saves the step in hand; the rest is bit for bit the same."""
    overrides = ["train.steps=20", "train.validate_every=5", "train.checkpoint_every=50"]
    overrides += [f"data.cache_dir={tmp_path / 'cache'}"]
    train(tiny_config(tmp_path / "whole", *overrides))

    log = loop._log

    def stop_at_7(accelerator: Accelerator, run: Path, row: dict[str, Any]) -> None:
        log(accelerator, run, row)
        if row["step"] == 7:
            os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(loop, "_log", stop_at_7)
    cut = tiny_config(tmp_path / "cut", *overrides)
    with pytest.raises(Interrupted, match="stopped after step 7"):
        train(cut)
    with pytest.raises(ValueError, match="holds a run already: go on with --resume"):
        train(cut)
    with pytest.raises(ValueError, match=r"another configuration: .*steps: 21.*, was .*steps: 20"):
        train(tiny_config(tmp_path / "cut", *overrides, "train.steps=21"), resume=True)
    train(cut, resume=True)

    ours, theirs = weights(tmp_path / "cut"), weights(tmp_path / "whole")
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[k], theirs[k]) for k in ours)
    assert metrics(tmp_path / "cut") == metrics(tmp_path / "whole")
    assert len(checkpoints(tmp_path / "cut" / "checkpoints")) <= 2


def test_the_head_folder_holds_the_best_head_and_fits_its_target(tmp_path: Path) -> None:
    config = tiny_config(tmp_path / "run", "train.steps=20", "train.validate_every=10")
    train(config)
    lengths = [
        m["acceptance_length"] for m in metrics(tmp_path / "run") if "acceptance_length" in m
    ]
    assert len(lengths) == 2
    target = load_target("tiny-gemma4", "float32")
    assistant = load_assistant(tmp_path / "run" / "head", torch.float32)
    assert torch.equal(assistant.lm_head.weight, target.table)
    state = json.loads(
        (checkpoints(tmp_path / "run" / "checkpoints")[-1] / "state.json").read_text()
    )
    assert state["best"] == max(lengths)


def test_accumulated_halves_of_a_batch_move_the_head_as_the_whole_does(tmp_path: Path) -> None:
    """Equal to rounding only because all documents here have equally many rows."""
    shared = ["train.steps=4", "train.warmup_steps=1", "train.anchors=8", "train.negatives=2000"]
    shared += [f"data.cache_dir={tmp_path / 'cache'}"]
    train(tiny_config(tmp_path / "whole", *shared, "train.batch_size=4"))
    halves = ["train.batch_size=2", "train.gradient_accumulation_steps=2"]
    train(tiny_config(tmp_path / "halves", *shared, *halves))
    losses = [[m["loss"] for m in metrics(tmp_path / n)] for n in ("whole", "halves")]
    assert losses[0][0] == pytest.approx(losses[1][0], rel=0.02)


def test_the_learning_rate_warms_up_and_decays_to_a_tenth() -> None:
    rates = [learning_rate(s, 100, 10, 1.0) for s in range(100)]
    assert rates[0] == pytest.approx(0.1)
    assert rates[9] == pytest.approx(1.0)
    assert rates[99] == pytest.approx(0.1, abs=0.01)
    assert sorted(rates[10:], reverse=True) == rates[10:]

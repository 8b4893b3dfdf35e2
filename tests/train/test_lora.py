"""What of a head is trained: an adapter, some parts; and when its training ends."""

import os
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from headstart.common.signals import Interrupted
from headstart.configs.schema import HeadConfig, LoraConfig
from headstart.heads.kinds import head_kinds
from headstart.heads.loading import load_target
from headstart.heads.pairing import other_target
from headstart.heads.saving import (
    draft_position_offset,
    load_assistant,
    load_assistant_config,
    made_for,
)
from headstart.train import step as step_module
from headstart.train.checkpoints import Progress
from headstart.train.run import train
from headstart.train.step import learning_rate
from tests.helpers.heads import FULL, NARROW, finished
from tests.helpers.runs import metrics, take_every_head, tiny_config

SHORT = ("train.max_steps=12", "train.eval_steps=6", "train.save_steps=6")


@pytest.mark.parametrize("width", [NARROW, FULL])
def test_a_heads_adapter_is_what_the_head_was_changed_by(
    tmp_path: Path, width: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The head that the run made, and the head that it started from with the adapter on it, are the
    same bits; all that is not under the adapter is the start's."""
    take_every_head(monkeypatch)
    target = load_target("tiny-gemma4", "bfloat16")
    start = finished(target, tmp_path / "start", width)
    ordered = "true" if width else "false"
    config = tiny_config(
        tmp_path / "run", f"head.init_from={start}", "head.lora={r: 4}", "target.dtype=bfloat16",
        "head.num_centroids=null", f"head.use_ordered_embeddings={ordered}",
        "train.learning_rate=0.01", "train.max_steps=60", "train.eval_steps=20",
    )  # fmt: skip
    train(config)
    folder = tmp_path / "run" / "head"
    whole = load_assistant(folder, torch.bfloat16).state_dict()
    pair = load_assistant(f"{start}+{folder / 'adapter'}", torch.bfloat16).state_dict()
    before = load_assistant(start, torch.bfloat16).state_dict()
    assert whole.keys() == pair.keys() == before.keys()
    assert all(torch.equal(whole[name], pair[name]) for name in whole)
    changed = {name for name in whole if not torch.equal(whole[name], before[name])}
    assert "pre_projection.weight" in changed
    assert not [name for name in changed if "norm" in name or "centroids" in name]
    adapter = load_file(folder / "adapter" / "adapter_model.safetensors")
    assert {tensor.dtype for tensor in adapter.values()} == {torch.bfloat16}
    assert all(4 in tensor.shape for tensor in adapter.values())


@pytest.mark.parametrize("width", [NARROW, FULL])
@pytest.mark.parametrize("kind", head_kinds())
def test_an_adapter_of_every_kind_loads_onto_its_head(
    kind: str, width: int | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where some of the layers that it names merely pass through, and where the head has no
    embeddings of its own."""
    take_every_head(monkeypatch)
    dense = ["head.num_centroids=null", "head.use_ordered_embeddings=false", "eval=null", *SHORT]
    shape = [] if width is None else [f"head.hidden_size={width}"]
    train(tiny_config(tmp_path / "first", f"head.kind={kind}", *shape, *dense))
    start = tmp_path / "first" / "head"
    own = [f"head.init_from={start}", "head.lora={r: 4}", "train.learning_rate=0.02", *dense]
    train(tiny_config(tmp_path / "run", *own))
    if kind == "parallel":
        with pytest.raises(ValueError, match=r"would leave 1 of the 3 drafts of .* untrained"):
            train(tiny_config(tmp_path / "fewer", *own, "train.num_speculative_steps=2"))
    folder = tmp_path / "run" / "head"
    whole = load_assistant(folder, torch.float32).state_dict()
    pair = load_assistant(f"{start}+{folder / 'adapter'}", torch.float32).state_dict()
    before = load_assistant(start, torch.float32).state_dict()
    assert all(torch.equal(whole[name], pair[name]) for name in whole)
    assert any(not torch.equal(whole[name], before[name]) for name in whole)


def notes_of(config: Any) -> dict[str, Any]:
    return {key: v for key, v in config.to_dict().items() if key.startswith("headstart_")}


def test_a_head_with_an_adapter_is_known_by_the_adapters_training(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Target, place of its drafts and template variables: not those that the head had before."""
    take_every_head(monkeypatch)
    start = finished(load_target("tiny-gemma4", "float32"), tmp_path / "start", FULL)
    settings = [f"head.init_from={start}", "head.lora={}", *SHORT, "head.num_centroids=null"]
    settings += ["head.use_ordered_embeddings=false", "train.draft_position_offset=-1"]
    train(tiny_config(tmp_path / "run", *settings))
    folder = tmp_path / "run" / "head"
    wanted, alone = (notes_of(load_assistant_config(path)) for path in (folder, start))
    assert wanted["headstart_draft_position_offset"] == -1
    assert wanted != alone
    shutil.copytree(folder / "adapter", tmp_path / "elsewhere")
    for adapter in (folder / "adapter", tmp_path / "elsewhere"):
        pair = f"{start}+{adapter}"
        assert notes_of(load_assistant_config(pair)) == wanted
        assert notes_of(load_assistant(pair, torch.float32).config) == wanted
        (adapter / "headstart_config.json").unlink()
    # Of an earlier version: the head around it says it, and alone it is anybody's.
    assert notes_of(load_assistant_config(f"{start}+{folder / 'adapter'}")) == wanted
    assert not notes_of(load_assistant_config(f"{start}+{tmp_path / 'elsewhere'}"))


def test_an_adapters_run_goes_on_as_if_never_stopped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    start = finished(load_target("tiny-gemma4", "float32"), tmp_path / "start", FULL)
    settings = [f"head.init_from={start}", "head.lora={}", *SHORT]
    settings += ["head.num_centroids=null", "head.use_ordered_embeddings=false"]
    train(tiny_config(tmp_path / "whole", *settings))
    rate = step_module.learning_rate

    def stop_in_step_5(now: int, *args: Any) -> float:
        if now == 4:
            os.kill(os.getpid(), signal.SIGTERM)
        return rate(now, *args)

    with monkeypatch.context() as patch:
        patch.setattr(step_module, "learning_rate", stop_in_step_5)
        with pytest.raises(Interrupted):
            train(tiny_config(tmp_path / "parts", *settings))
    train(tiny_config(tmp_path / "parts", *settings), resume=True)
    for file in ("head.safetensors", "optimizer.safetensors"):
        one, two = (
            load_file(tmp_path / name / "checkpoints" / "step-000012" / file)
            for name in ("whole", "parts")
        )
        assert one.keys() == two.keys()
        assert all(torch.equal(one[key], two[key]) for key in one)
        assert all("lora_" in key for key in one)


def test_named_parts_alone_are_trained(tmp_path: Path) -> None:
    target = load_target("tiny-gemma4", "float32")
    start = finished(target, tmp_path / "start", FULL)
    settings = [f"head.init_from={start}", "head.use_ordered_embeddings=false", *SHORT]
    settings += ["head.num_centroids=null", "train.learning_rate=0.02"]
    train(
        tiny_config(
            tmp_path / "run", *settings, "head.trainable_modules=[post_projection, layers.1.]"
        )
    )
    parts = load_file(tmp_path / "run" / "checkpoints" / "step-000012" / "head.safetensors")
    assert parts
    assert all("post_projection" in n or "layers.1." in n for n in parts)
    with pytest.raises(ValueError, match="'lm_head' is in none of the names"):
        train(tiny_config(tmp_path / "odd", *settings, "head.trainable_modules=[lm_head]"))


def test_a_run_that_finds_nothing_better_ends_with_the_head_that_it_began_with(
    tmp_path: Path,
) -> None:
    target = load_target("tiny-gemma4", "float32")
    start = finished(target, tmp_path / "start", FULL)
    config = tiny_config(
        tmp_path / "run", f"head.init_from={start}", "head.use_ordered_embeddings=false",
        "head.num_centroids=null", "train.learning_rate=1e-12", "train.early_stopping_patience=2",
        "train.max_steps=40", "train.eval_steps=3", "train.weight_decay=0",
    )  # fmt: skip
    train(config)
    assert [row["step"] for row in metrics(tmp_path / "run")][-1] == 6, (
        "two validations since the best"
    )
    train(config, resume=True)  # it is at its end
    assert len(metrics(tmp_path / "run")) == 6
    before, after = (load_assistant(f, torch.float32) for f in (start, tmp_path / "run" / "head"))
    for name, tensor in after.state_dict().items():
        assert torch.equal(tensor, before.state_dict()[name]), name
    assert draft_position_offset(after.config) == 0, (
        "where it was trained, whatever was tried since"
    )


def test_training_ends_when_its_time_is_over(tmp_path: Path) -> None:
    """The learning rate falls with the time, and the last step is validated and saved."""
    config = tiny_config(
        tmp_path / "run", "train.max_steps=100000", "train.max_minutes=0.02",
        "train.warmup_steps=1", "train.eval_steps=50000", "head.use_ordered_embeddings=false",
        "head.num_centroids=null",
    )  # fmt: skip
    train(config)
    rows = metrics(tmp_path / "run")
    assert len(rows) < 100000
    assert "acceptance_length" in rows[-1]
    assert rows[-1]["learning_rate"] < 0.4 * rows[1]["learning_rate"]
    assert (tmp_path / "run" / "checkpoints" / f"step-{len(rows):06d}").is_dir()
    assert learning_rate(5, 1000, 1, 1.0, 1.0) == pytest.approx(0.1)


def test_the_end_of_a_run() -> None:
    c = tiny_config(Path("unused"), "train.max_steps=10").train
    timed = c.model_copy(update={"max_minutes": 1.0, "early_stopping_patience": 3})
    assert not Progress(step=9, evals_since_best=5, seconds=100).ended(c)
    assert Progress(step=10).ended(c)
    assert not Progress(step=9, evals_since_best=2, seconds=59).ended(timed)
    assert Progress(evals_since_best=3).ended(timed)
    assert Progress(seconds=60).ended(timed)


def test_a_head_knows_its_target(tmp_path: Path) -> None:
    """It says for which it was trained, and warns of another one by both names; transformers' own
    loader reads it all the same."""
    config = tiny_config(tmp_path / "run", *SHORT, "train.warmup_steps=2")
    train(config)
    folder = tmp_path / "run" / "head"
    target = load_target("tiny-gemma4", config.target.dtype)
    assert made_for(load_assistant_config(folder)) == target.identity
    head = load_assistant(folder, target.table.dtype)
    assert other_target(target, head) is None
    assert other_target(load_target("tiny-gemma4", "bfloat16"), head) is None, "the same weights"
    tuned = load_target("tiny-gemma4", config.target.dtype, quantization="torchao-int8")
    warning = other_target(tuned, head)
    assert warning is not None
    assert target.fingerprint[:12] in warning
    assert tuned.fingerprint[:12] in warning
    assert "tiny-gemma4 (torchao-int8)" in warning


def test_combinations_that_cannot_be_raise() -> None:
    with pytest.raises(ValueError, match="lora is beside a finished head"):
        HeadConfig(lora=LoraConfig())
    with pytest.raises(ValueError, match="leave out trainable_modules"):
        HeadConfig(init_from="ORG/head", lora=LoraConfig(), trainable_modules=["pre_projection"])
    with pytest.raises(ValueError, match="those of a finished head"):
        HeadConfig(on_existing_clusters="keep")

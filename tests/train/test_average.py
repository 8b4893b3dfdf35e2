"""The moving average of the weights: what it is, and that the weights come back."""

from pathlib import Path

import torch
from safetensors.torch import load_file

from headstart.train.checkpoints import Average, checkpoints
from headstart.train.run import train
from tests.helpers.runs import tiny_config, weights


def test_the_average_follows_the_weights_with_a_decay_that_grows_to_its_limit() -> None:
    weight = torch.nn.Parameter(torch.zeros(3))
    average = Average({"w": weight}, 0.5)
    expected = torch.zeros(3)
    for step in range(1, 8):
        with torch.no_grad():
            weight.add_(torch.tensor([1.0, 2.0, -step]))
        average.update(step)
        decay = min(0.5, (1 + step) / (10 + step))
        expected = decay * expected + (1 - decay) * weight.detach()
    torch.testing.assert_close(average.values["w"], expected)
    before = weight.detach().clone()
    with average.applied():
        assert torch.equal(weight, expected.to(weight)) or torch.allclose(weight, expected)
        assert torch.equal(average.values["w"], before)
    assert torch.equal(weight, before)


def test_the_head_that_is_saved_is_the_average(tmp_path: Path) -> None:
    config = ["train.max_steps=6", "train.eval_steps=6", f"data.cache_dir={tmp_path / 'cache'}"]
    train(tiny_config(tmp_path / "run", *config, "train.ema_decay=0.9"))
    last = checkpoints(tmp_path / "run" / "checkpoints")[-1]
    average = load_file(last / "average.safetensors")
    head = load_file(tmp_path / "run" / "head" / "model.safetensors")
    for name, tensor in average.items():
        assert torch.equal(head[name.removeprefix("assistant.")], tensor), name
    trained = weights(tmp_path / "run")
    assert any(not torch.equal(trained[name], average[name]) for name in average)
    train(tiny_config(tmp_path / "plain", *config))
    plain = weights(tmp_path / "plain")
    assert all(torch.equal(plain[name], trained[name]) for name in plain), "it only watches"

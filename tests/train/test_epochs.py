"""Steps that are counted from passes over the conversations."""

from pathlib import Path

import pytest

from headstart.configs.loader import load_saved
from headstart.train.run import train
from tests.helpers.runs import metrics, tiny_config


def test_epochs_are_the_steps_that_they_come_to(tmp_path: Path) -> None:
    """Seven conversations, two a step, one and a half times: six steps, as max_steps=6 takes."""
    shared = [
        "data.num_conversations=7", "data.validation_conversations=2", "train.batch_size=2",
        "train.warmup_steps=1", "head.use_ordered_embeddings=false", "head.num_centroids=null",
        f"data.cache_dir={tmp_path / 'cache'}", "train.eval_steps=3",
    ]  # fmt: skip
    counted = tiny_config(tmp_path / "epochs", *shared, "train.num_epochs=1.5")
    train(counted)
    train(tiny_config(tmp_path / "steps", *shared, "train.max_steps=6"))
    found, said = metrics(tmp_path / "epochs"), metrics(tmp_path / "steps")
    assert [row["loss"] for row in found] == [row["loss"] for row in said]
    assert len(found) == 6
    assert load_saved(tmp_path / "epochs" / "config.yaml").train.max_steps == 6
    train(counted, resume=True)  # it is finished, and says nothing of other steps
    with pytest.raises(ValueError, match=r"train\.num_epochs=1\.5, now 3"):
        train(tiny_config(tmp_path / "epochs", *shared, "train.num_epochs=3"), resume=True)


def test_epochs_shorter_than_the_warm_up_are_refused(tmp_path: Path) -> None:
    config = tiny_config(tmp_path / "run", "train.num_epochs=0.1", "data.num_conversations=8")
    with pytest.raises(ValueError, match=r"train\.num_epochs=0\.1 comes to max_steps=1"):
        train(config)

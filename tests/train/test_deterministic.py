"""`train.deterministic`: deterministic algorithms, while a head is trained and no longer."""

import os
from pathlib import Path

import pytest
import torch

from headstart.common.machine import CUBLAS
from headstart.train import run as run_module
from headstart.train.run import train
from tests.helpers.runs import SHORT, tiny_config


@pytest.mark.parametrize("wanted", [False, True])
def test_algorithms_are_deterministic_while_a_head_is_trained(
    wanted: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """cuBLAS is told before anything runs; answers, for which torch has no such algorithms on a
    GPU, are written without them; afterwards, a failure too, all is as before."""
    seen: dict[str, tuple[bool, str | None]] = {}

    def noting(name: str) -> None:
        real = getattr(run_module, name)

        def note(*args: object, **kwargs: object) -> object:
            seen[name] = torch.are_deterministic_algorithms_enabled(), os.environ.get(CUBLAS)
            return real(*args, **kwargs)

        monkeypatch.setattr(run_module, name, note)

    for name in ("plan_documents", "start_run", "train_head", "order_best"):
        noting(name)

    def fail(*args: object, **kwargs: object) -> None:
        raise OSError("no space left on device")

    monkeypatch.setattr(run_module, "write_summary", fail)
    monkeypatch.delenv(CUBLAS, raising=False)
    with pytest.raises(OSError, match="no space left"):
        train(tiny_config(
            tmp_path / "run", *SHORT, f"train.deterministic={wanted}",
            f"data.cache_dir={tmp_path / 'cache'}",
        ))  # fmt: skip
    workspace = ":4096:8" if wanted else None
    assert seen == {
        "plan_documents": (False, workspace),
        "start_run": (wanted, workspace),
        "train_head": (wanted, workspace),
        "order_best": (wanted, workspace),
    }
    assert not torch.are_deterministic_algorithms_enabled()
    assert CUBLAS not in os.environ

"""A whole run in the dtype that a machine chooses: run once each way by `make test-dtypes`."""

import json
from pathlib import Path

import pytest

from headstart.common import machine
from headstart.common.processes import launch_kept
from headstart.configs.loader import load_config
from headstart.heads.loading import load_target
from headstart.heads.saving import load_assistant_config
from headstart.train.plan import plan
from headstart.train.run import run
from tests.helpers.runs import metrics, tiny_config

pytestmark = pytest.mark.auto_dtype
ROOT = Path(__file__).resolve().parents[2]


def test_a_run_is_of_the_dtype_that_the_machine_chooses(tmp_path: Path) -> None:
    """What is saved says so, the head has it, and in float32 each text is plain decoding's."""
    dtype = machine.natural_dtype()
    config = tiny_config(
        tmp_path / "run", "target.dtype=auto", "train.mixed_precision=auto", "train.max_steps=6",
        "eval.limit=2", "eval.max_new_tokens=8", "eval.fp32_check_prompts=1",
        f"data.cache_dir={tmp_path / 'cache'}",
    )  # fmt: skip
    assert config.target.dtype == dtype
    assert config.train.mixed_precision == ("bf16" if dtype == "bfloat16" else "no")
    with launch_kept():  # tests before this one may have had another precision
        run(config)
    assert load_config(tmp_path / "run" / "config.yaml").target.dtype == dtype
    assert str(load_assistant_config(tmp_path / "run" / "head").dtype) == f"torch.{dtype}"
    assert all(0 < row["loss"] < 20 for row in metrics(tmp_path / "run"))
    report = json.loads((tmp_path / "run" / "eval" / "report.json").read_text())
    assert report["environment"]["dtype"] == dtype
    exact = tmp_path / "run" / "eval" / "exact" / "report.json"
    assert exact.is_file() == (dtype == "bfloat16")
    checked = json.loads(exact.read_text()) if exact.is_file() else report
    assert checked["environment"]["dtype"] == "float32"
    assert all(result["equal_to_plain"] for result in checked["results"])


def test_a_target_and_a_plan_are_of_the_dtype_that_the_machine_chooses() -> None:
    dtype = machine.natural_dtype()
    assert str(load_target("tiny-gemma4").table.dtype) == f"torch.{dtype}"
    lines = plan(load_config(ROOT / "configs" / "gemma4-e2b.yaml"))
    assert f", {dtype})" in lines["target"]

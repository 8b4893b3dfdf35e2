"""What engines tell of their drafts, and how one that fails is reported."""

import subprocess
import sys
from pathlib import Path

import pytest

from headstart.eval import engine_servers
from headstart.eval.engine_servers import Counts, EngineServer, vllm_counts

# Lines of vLLM 0.32's /metrics.
METRICS = """\
# HELP vllm:spec_decode_num_drafts_total Number of spec decoding drafts.
# TYPE vllm:spec_decode_num_drafts_total counter
vllm:spec_decode_num_drafts_total{engine="0",model_name="target"} 148.0
vllm:spec_decode_num_drafts_created{engine="0",model_name="target"} 1.79e+09
vllm:spec_decode_num_draft_tokens_total{engine="0",model_name="target"} 592.0
vllm:spec_decode_num_accepted_tokens_total{engine="0",model_name="target"} 374.0
vllm:spec_decode_num_accepted_tokens_per_pos_total{engine="0",model_name="target",position="0"} 123.0
vllm:spec_decode_num_accepted_tokens_per_pos_total{engine="0",model_name="target",position="1"} 91.0
"""  # noqa: E501


def test_vllms_counters_are_read() -> None:
    found = vllm_counts(METRICS)
    assert found == Counts(148, 592, 374, [123, 91])
    assert found - Counts() == found
    assert found - Counts(100, 400, 300, [100, 90]) == Counts(48, 192, 74, [23, 1])


def test_an_engine_that_dies_says_why_and_keeps_its_log(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # This Python has no vLLM, so that the engine ends at once with an error of its own.
    monkeypatch.setattr(engine_servers, "engine_python", lambda engine: Path(sys.executable))
    log = tmp_path / "vllm.log"
    server = EngineServer("vllm", tmp_path, None, 4, 64, [1], log, "float32", 2)
    with pytest.raises(RuntimeError, match=r"did not come up: .*vllm.*vllm\.log"), server:
        pass
    assert "No module named" in log.read_text()
    assert server.process.poll() is not None


def test_what_an_engine_started_is_stopped_with_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(engine_servers, "engine_python", lambda engine: Path(sys.executable))
    monkeypatch.setattr(engine_servers, "STARTING", 3.0)
    server = EngineServer("vllm", tmp_path, None, 4, 64, [1], tmp_path / "log", "float32", 2)
    child = "import subprocess, sys, time; p = subprocess.Popen(['sleep', '60']); print(p.pid)"
    server.command = [sys.executable, "-u", "-c", f"{child}; time.sleep(60)"]
    with pytest.raises(RuntimeError, match="did not come up"), server:
        pass
    started = int((tmp_path / "log").read_text())
    state = subprocess.run(
        ["ps", "-o", "stat=", "-p", str(started)], capture_output=True, text=True
    )
    assert state.stdout.strip().startswith("Z") or not state.stdout.strip()

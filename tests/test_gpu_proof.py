"""The proof for a GPU, on the CPU: each section has a result, and one that fails costs no other."""

import json
import subprocess
import sys
import time
from pathlib import Path

import pytest

import tests.gpu_proof as gpu_proof
from tests.helpers.gpu import Place


@pytest.mark.slow
def test_every_section_has_a_result_on_a_cpu(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "tests.gpu_proof", "--out", str(tmp_path / "gpu")]
    done = subprocess.run(command, cwd=gpu_proof.ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    lines = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    assert [line["section"] for line in lines] == list(gpu_proof.SECTIONS)
    for name in gpu_proof.SECTIONS:
        content = json.loads((tmp_path / "gpu" / f"{name}.json").read_text())
        assert content["found"], name
        assert "error" not in content["found"], name


def test_a_section_beyond_its_time_keeps_what_it_has_and_the_next_one_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def slow(place: Place, found: gpu_proof.Found) -> None:
        found["first"] = 1
        time.sleep(30)

    def quick(place: Place, found: gpu_proof.Found) -> None:
        found["second"] = 2

    monkeypatch.setattr(gpu_proof, "SECTIONS", {"slow": (1, slow), "quick": (9, quick)})
    monkeypatch.setattr(sys, "argv", ["gpu_proof", "--out", str(tmp_path)])
    with pytest.raises(SystemExit, match="failed: slow"):
        gpu_proof.main()
    found = [json.loads((tmp_path / f"{n}.json").read_text())["found"] for n in ("slow", "quick")]
    assert found[0].pop("error").endswith("it took longer than its 1 seconds\n")
    assert found == [{"first": 1}, {"second": 2}]

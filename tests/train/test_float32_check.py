"""The check in float32 at the end of a run, where memory is short: the run is good all the same."""

import json
import shlex
from pathlib import Path
from typing import Any

import pytest
import torch

from headstart.cli.main import main
from headstart.common import machine
from headstart.common.machine import free_memory
from headstart.common.versions import CACHE
from headstart.eval.decoding import GREEDY, decode
from headstart.heads.target import Target
from headstart.train import run as run_module
from headstart.train.run_folder import read_status
from tests.helpers.runs import ROOT, SHORT


def lines_of(run: Path, capsys: pytest.CaptureFixture[str]) -> tuple[str, list[str]]:
    """Train and evaluate a tiny run in bfloat16 by its command, which ends well: what it says of
    the check, and the command that it names."""
    cache = f"data.cache_dir={run.parent / 'cache'}"
    assert main([
        "train", "--config", str(ROOT / "configs" / "tiny.yaml"), *SHORT, "target.dtype=bfloat16",
        "eval.fp32_check_prompts=1", "eval.decoders=[exact]", f"output_dir={run}", cache,
    ]) == 0  # fmt: skip
    assert read_status(run)["state"] == "finished"
    (line,) = [text for text in capsys.readouterr().out.splitlines() if "was skipped" in text]
    summary = json.loads((run / "summary.json").read_text())
    assert summary["fp32_check"] == line
    assert summary["best"]
    assert (run / "eval" / "report.json").is_file()
    assert not (run / "eval" / "exact" / "report.json").exists()
    return line, shlex.split(line[line.index("headstart eval") :])[1:]


def test_a_check_that_does_not_fit_is_skipped_with_a_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """What it needs, what is free, and a command that does it where there is more."""
    monkeypatch.setattr(run_module, "free_memory", lambda device: 2**20)
    line, command = lines_of(tmp_path / "run", capsys)
    assert "0.00 GiB are free on cpu" in line
    monkeypatch.undo()
    assert main(command) == 0
    report = json.loads((tmp_path / "run" / "eval" / "exact" / "report.json").read_text())
    assert report["environment"]["dtype"] == "float32"
    assert report["environment"]["limit"] == 1
    assert all(result["equal_to_plain"] for result in report["results"])


def test_texts_of_a_sampled_evaluation_are_checked_greedily(tmp_path: Path) -> None:
    """None of its own is equal to anything; and with decoders that choose K there is none to take
    the longest of."""
    assert main([
        "train", "--config", str(ROOT / "configs" / "tiny.yaml"), *SHORT, "target.dtype=float32",
        "eval.fp32_check_prompts=1", "eval.decoders=[hybrid]", "eval.num_assistant_tokens=[]",
        "eval.temperatures=[1.0]", f"output_dir={tmp_path}", f"data.cache_dir={tmp_path / 'cache'}",
    ]) == 0  # fmt: skip
    report = json.loads((tmp_path / "eval" / "exact" / "report.json").read_text())
    assert {result["temperature"] for result in report["results"]} == {0.0}
    assert json.loads((tmp_path / "summary.json").read_text())["fp32_check"].startswith("every")


def test_a_check_that_runs_out_of_memory_is_skipped_with_a_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    begin = run_module.load_served

    def small(t: Any, device: torch.device) -> Target:
        if t.dtype == "float32":
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
        return begin(t, device)

    monkeypatch.setattr(run_module, "load_served", small)
    assert "had less free" in lines_of(tmp_path / "run", capsys)[0]


def test_other_errors_of_the_check_are_no_want_of_memory() -> None:
    allocate = "[enforce fail at alloc_cpu.cpp:124] err == 0. DefaultCPUAllocator: can't allocate"
    assert machine.is_out_of_memory(RuntimeError(allocate))
    assert not machine.is_out_of_memory(RuntimeError("assisted decoding gave other text"))


def test_what_the_check_needs_is_what_the_models_in_float32_hold(target: Target) -> None:
    """Of each family: the weights, and the cache of its longest text to the byte."""
    prompt, new = list(range(4, 24)), 8
    cache: list[Any] = []
    handle = target.model.register_forward_hook(
        lambda module, args, output: cache.append(output[CACHE])
    )
    decode(target, prompt, new, sampling=GREEDY)
    handle.remove()
    tensors = [
        tensor
        for layer in cache[-1].layers
        for tensor in (layer.keys, layer.values)
        if tensor is not None
    ]
    held = sum(tensor.numel() * 4 for tensor in tensors)
    weights = sum(p.numel() * 4 for p in target.model.parameters())
    rows = len(prompt) + new
    found = run_module.float32_bytes(target, torch.nn.Linear(2, 2, bias=False), rows)
    assert weights + 16 + held <= found <= weights + 16 + held * rows / (rows - 1) + 4096


@pytest.mark.parametrize("version", ["0::/job/step", "4:memory:/job/step"])
def test_limits_of_control_groups_count(version: str, tmp_path: Path) -> None:
    """The lowest of a group and those above it, less what it uses, cached files apart."""
    told = tmp_path / "cgroup"
    told.write_text(f"1:name=systemd:/\n{version}\n")
    _, limit, used, cached = machine.GROUP_FILES[version.split(":")[1]]
    mount = tmp_path / "mount"
    top = mount / machine.GROUP_FILES[version.split(":")[1]][0]
    for place, allowed in ((top / "job", "1000"), (top / "job" / "step", "max")):
        place.mkdir(parents=True)
        (place / limit).write_text(allowed + "\n")
        (place / used).write_text("700\n")
        (place / "memory.stat").write_text(f"anon 1\n{cached} 300\n")
    assert machine._left_in_groups(told, mount) == [600]
    free = free_memory(torch.device("cpu"))
    assert free is None or 2**20 < free < 2**50

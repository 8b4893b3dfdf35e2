"""examples/after_sft.py on tiny models: a trainer's model gets its head in the same process."""

from pathlib import Path

import pytest
import torch

from headstart.heads.saving import load_assistant
from tests.helpers.runs import load_script
from tests.helpers.tiny_pair import ROOT

QUICK = [
    "--rows", "40", "--steps", "2", "--head-steps", "4", "--new-tokens", "8",
]  # fmt: skip


@pytest.mark.parametrize("target", ["tiny-gemma3", "tiny-gemma4"])
def test_a_tuned_model_gets_its_head_in_the_process_that_tuned_it(
    target: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("headstart.eval.draft_cost.COST_TURNS", 1)
    script = load_script(ROOT / "examples" / "after_sft.py")
    tuned = list[torch.nn.Module]()
    tune = script.tune

    def tuning(*args: object) -> torch.nn.Module:
        tuned.append(tune(*args))
        return tuned[0]

    monkeypatch.setattr(script, "tune", tuning)
    head = script.run(["--target", target, *QUICK, "--out", str(tmp_path / "run")])
    printed = capsys.readouterr().out
    decoded = head.report["results"][0]["acceptance_length"]
    assert f"when decoding, K = 4: {decoded:.2f}" in printed
    assert "memory:" in head.report["environment"]["target"]
    saved = load_assistant(tmp_path / "run" / "head", torch.float32).state_dict()
    assert all(torch.equal(saved[name], value) for name, value in head.model.state_dict().items())
    trained = [name for name, p in tuned[0].named_parameters() if p.requires_grad]
    assert trained
    assert all("lora_" in name for name in trained)

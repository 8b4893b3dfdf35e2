"""`headstart simulate`: from a store, the acceptance of exact decoding on its texts."""

import json
from pathlib import Path

import pytest
from transformers import PreTrainedModel

from headstart.cli.main import main
from headstart.configs.schema import EvalConfig
from headstart.eval.replay import run_estimate
from headstart.eval.report import run_evaluation
from headstart.heads.loading import load_target
from tests.helpers.heads import half_trained_head, noisy_head

NEW = 24


@pytest.fixture
def store(tmp_path: Path) -> Path:
    """Greedy answers of the tiny target to some prompts, and one sampled, which does not count."""
    rows = [{"prompt": "xyz" * (i + 1), "category": "ab"[i % 2], "id": str(i)} for i in range(6)]
    (tmp_path / "p.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    argv = ["extract", f"output_dir={tmp_path / 'store'}", "target.name=tiny-gemma4"]
    argv += [f"data.prompts=[{tmp_path / 'p.jsonl'}]", "target.dtype=float32", "eval=null"]
    argv += ["data.temperatures=[0.0]", f"data.max_new_tokens={NEW}"]
    assert main(argv) == 0
    return tmp_path / "store"


def test_the_estimate_is_what_exact_decoding_does(
    store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Round for round: the same counts, in every category."""
    monkeypatch.setattr("headstart.eval.draft_cost.COST_TURNS", 2)
    target = load_target("tiny-gemma4", "float32")
    with pytest.raises(ValueError, match="one or more"):
        run_estimate(target, {}, store, [2], tmp_path / "none")
    heads: dict[str, PreTrainedModel] = {"h": half_trained_head(target)}
    estimated = run_estimate(target, heads, store, [2, 3], tmp_path / "estimate")
    assert json.loads((tmp_path / "estimate" / "estimate.json").read_text()) == estimated
    chosen = EvalConfig(
        prompts=str(tmp_path / "p.jsonl"), num_assistant_tokens=[2, 3], max_new_tokens=NEW,
        decoders=["exact"],
    )  # fmt: skip
    decoded = run_evaluation(target, heads, chosen, tmp_path / "out")
    real = [r for r in decoded["results"] if r["looping_texts"] == "with"]
    names = ("num_assistant_tokens", "category", "rounds", "accepted")
    found = [[r[name] for name in names] for r in estimated["results"]]
    assert found == [[r[name] for name in names] for r in real]
    assert all(sum(r["accepted"]) > 0 for r in real), "a head never accepted makes this test empty"


def test_texts_that_the_target_did_not_write_are_none_of_its_greedy_texts(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [{"prompt": f"Count {i}", "response": "one two three four five"} for i in range(4)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    half_trained_head(load_target("tiny-gemma4", "float32")).save_pretrained(tmp_path / "head")
    asked = ["target.name=tiny-gemma4", "target.dtype=float32"]
    store = tmp_path / "store"
    assert main(["extract", str(tmp_path / "rows.jsonl"), *asked, f"output_dir={store}"]) == 0
    argv = ["simulate", str(store), str(tmp_path / "head"), *asked, "eval.num_assistant_tokens=2"]
    assert main([*argv, f"output_dir={tmp_path / 'out'}"]) == 1
    assert "no greedy text" in capsys.readouterr().err


def test_a_store_of_another_target_or_without_greedy_text_is_refused(
    store: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    target = load_target("tiny-gemma4", "float32")
    heads: dict[str, PreTrainedModel] = {"h": half_trained_head(target)}
    heads["h"].save_pretrained(tmp_path / "head")
    # Its copy differs from it in nothing, and a head that is not trained differs.
    heads |= {"copy": heads["h"], "worse": noisy_head(target).assistant}
    results = run_estimate(target, heads, store, [2], tmp_path / "three")["results"]
    whole = {r["head"]: r for r in results if r["category"] == "all"}
    assert whole["h"]["difference"] is None
    assert whole["copy"]["difference"] == 0
    assert whole["copy"]["difference_interval"] == [0, 0]
    lengths = [whole[name]["acceptance_length"] for name in ("worse", "h")]
    assert whole["worse"]["difference"] == pytest.approx(lengths[0] - lengths[1])
    low, high = whole["worse"]["difference_interval"]
    assert low <= whole["worse"]["difference"] <= high
    argv = ["simulate", str(store), str(tmp_path / "head"), "target.dtype=float32"]
    argv += [f"output_dir={tmp_path / 'out'}", "eval.num_assistant_tokens=2"]
    assert main([*argv, "target.name=tiny-gemma4"]) == 0
    assert "greedy texts of tiny-gemma4, simulated" in capsys.readouterr().out
    assert main([*argv, "target.name=tiny-gemma3"]) == 1
    assert "was made for tiny-gemma4" in capsys.readouterr().err

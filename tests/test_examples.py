"""What the examples promise: a sweep goes on where it stopped and judges heads as eval does."""

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from headstart.configs.loader import load_config
from headstart.configs.schema import DataConfig, DraftPositionOffset
from headstart.configs.settings import ServerConfig
from headstart.data.extraction import OnlineActivations
from headstart.data.prepare import run_regenerate
from headstart.data.store import ActivationStore
from headstart.eval.replay import simulate_acceptance
from headstart.heads.loading import load_target
from headstart.heads.saving import load_assistant
from headstart.heads.target import Target
from headstart.heads.unroll import DraftHead
from tests.helpers.heads import noisy_head
from tests.helpers.prompts import conversations
from tests.helpers.runs import load_script, tiny_config
from tests.helpers.tiny_pair import ROOT

ABLATIONS = ROOT / "examples" / "ablations"


@pytest.mark.parametrize("path", sorted(ABLATIONS.glob("*.yaml")), ids=lambda path: path.stem)
def test_every_run_of_every_shipped_sweep_loads(path: Path) -> None:
    sweep = yaml.safe_load(path.read_text(encoding="utf-8"))
    for run in sweep["runs"].values():
        overrides = run["overrides"] if isinstance(run, dict) else run
        load_config(sweep["config"], [*sweep["overrides"], *overrides])


def test_an_interrupted_sweep_goes_on_and_judges_heads_as_the_simulated_evaluation_does(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    script = load_script(ABLATIONS / "sweep.py")
    store = tmp_path / "store"
    run_regenerate(tiny_config(store), ServerConfig(), extracting=True, device="cpu")
    overrides = [
        f"data.store={store}", "train.max_steps=6", "train.eval_steps=3", "eval=null",
        "head.use_ordered_embeddings=false", "head.num_centroids=null",
    ]  # fmt: skip
    (tmp_path / "sweep.yaml").write_text(yaml.safe_dump({
        "config": str(ROOT / "configs" / "tiny.yaml"),
        "overrides": overrides,
        "eval_sets": {"a": str(store), "b": {"store": str(store), "draft_position_offset": -1}},
        "num_assistant_tokens": 3,
        "runs": {"base": [], "slow": ["train.learning_rate=1e-6"]},
    }))  # fmt: skip
    real, trained = script.train, list[str]()

    def stopping(config: Any, resume: bool) -> None:
        if len(trained) == 1 and "base" in trained[0]:
            trained.clear()
            raise KeyboardInterrupt
        trained.append(config.output_dir.name)
        real(config, resume)

    (tmp_path / "wrong.yaml").write_text("{config: a, runs: {}, eval_sets: {}, seed: [1]}")
    with pytest.raises(SystemExit, match="unknown: seed"):
        script.run_sweep(tmp_path / "wrong.yaml", tmp_path / "out", [])
    (tmp_path / "odd.yaml").write_text(
        "{config: a, runs: {}, eval_sets: {b: {store: s, draft_position_offset: one_earlier}}}"
    )
    with pytest.raises(SystemExit, match="draft_position_offset of b"):
        script.run_sweep(tmp_path / "odd.yaml", tmp_path / "out", [])
    monkeypatch.setattr(script, "train", stopping)
    with pytest.raises(KeyboardInterrupt):
        script.run_sweep(tmp_path / "sweep.yaml", tmp_path / "out", [])
    script.run_sweep(tmp_path / "sweep.yaml", tmp_path / "out", [])
    assert trained == ["slow-seed0"]
    content = json.loads((tmp_path / "out" / "sweep.json").read_text())
    target = load_target("tiny-gemma4", "float32")
    texts = ActivationStore(store, target)
    for result in content["results"]:
        folder = tmp_path / "out" / f"{result['run']}-seed0" / "head"
        head = DraftHead(load_assistant(folder, target.table.dtype))
        positions: dict[str, DraftPositionOffset] = {"a": 0, "b": -1}
        for name, position in positions.items():
            every = range(len(texts.entries))
            found = simulate_acceptance(head, target, texts, 3, every, position).acceptance
            judged = result["eval_sets"][name]
            assert judged["acceptance_length"] == pytest.approx(found.acceptance_length)
    base, slow = (result["eval_sets"]["a"] for result in content["results"])
    assert base["difference_interval"] == [0, 0]
    difference = slow["acceptance_length"] - base["acceptance_length"]
    assert slow["difference"] == pytest.approx(difference)


def test_rejections_are_of_the_drafts_that_a_simulation_counts(tiny: Target) -> None:
    script = load_script(ROOT / "examples" / "rejections.py")
    head = noisy_head(tiny)
    documents = OnlineActivations(tiny, conversations(5), DataConfig(teacher_top_k=16))
    counts = simulate_acceptance(head, tiny, documents, script.K, range(5)).acceptance
    found = script.rejections(head, tiny, documents)
    by_draft = [found["draft"][str(k)] for k in sorted(map(int, found["draft"]))]
    assert [one["drafts"] for one in by_draft] == [n for n in counts.reached if n]
    accepted = [one["drafts"] - one["rejected"] for one in by_draft]
    assert accepted == list(counts.accepted)[: len(accepted)]
    for dimension, classes in found.items():
        drafts = by_draft[0]["drafts"] if dimension == "the round before" else sum(counts.reached)
        assert sum(one["drafts"] for one in classes.values()) == drafts

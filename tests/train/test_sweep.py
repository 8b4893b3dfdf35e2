"""A sweep trains each run once, judges all on the same texts, and goes on where it stopped."""

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from headstart.cli.main import main
from headstart.configs.sweep import Sweep, load_sweep
from headstart.data.prepare import run_regenerate
from headstart.data.store import ActivationStore
from headstart.eval.replay import simulate_acceptance
from headstart.heads.loading import load_target
from headstart.heads.saving import load_assistant
from headstart.heads.unroll import DraftHead
from headstart.train import sweep as module
from headstart.train.sweep import run_sweep, summarise
from tests.helpers.runs import ROOT, tiny_config

SHIPPED = sorted((ROOT / "configs").glob("sweep-*.yaml"))


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sweep")
    run_regenerate(tiny_config(folder / "none"), folder / "store", extracting=True, device="cpu")
    return folder / "store"


def written(folder: Path, store: Path, **changes: Any) -> Path:
    content = {
        "config": str(ROOT / "configs" / "tiny.yaml"),
        "overrides": [
            f"data.store={store}", "train.steps=6", "train.validate_every=3",
            "head.use_ordered_embeddings=false", "head.num_centroids=null", "eval=null",
        ],
        "judged_on": {
            "texts": str(store),
            "as vLLM": {"store": str(store), "rope_position": "one_earlier"},
        },
        "num_assistant_tokens": 3,
        "runs": {"right": [], "own_key": ["train.trap=own_key"]},
        "seeds": [0, 1],
    }  # fmt: skip
    path = folder / "sweep.yaml"
    path.write_text(yaml.safe_dump(content | changes, sort_keys=False))
    return path


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_every_run_of_every_shipped_sweep_loads(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(ROOT)
    assert SHIPPED
    sweep = load_sweep(path)
    runs = sweep.configs(Path("runs/x"))
    assert len({config.run.dir for _, config in runs}) == len(sweep.runs) * len(sweep.seeds)


def test_a_sweep_goes_on_where_it_stopped_and_counts_what_the_heads_do(
    store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    real, trained = module.train, list[str]()

    def stopping(config: Any, resume: bool) -> None:
        if len(trained) == 3:
            raise KeyboardInterrupt
        trained.append(config.run.dir.name)
        real(config, resume)

    path = written(tmp_path, store)
    monkeypatch.setattr(module, "train", stopping)
    assert main(["sweep", str(path), "--out", str(tmp_path / "out")]) == 130
    half = json.loads((tmp_path / "out" / "sweep.json").read_text())
    trained.clear()
    assert main(["sweep", str(path), "--out", str(tmp_path / "out")]) == 0
    assert trained == ["own_key-seed1"]
    assert "own_key" in capsys.readouterr().out
    whole = json.loads((tmp_path / "out" / "sweep.json").read_text())
    assert [r["run"] for r in whole["results"]] == ["right", "own_key"]
    seed0 = [r["judged_on"]["texts"]["of_each_seed"]["0"] for r in half["results"]]
    assert seed0 == [r["judged_on"]["texts"]["of_each_seed"]["0"] for r in whole["results"]]
    assert (tmp_path / "out" / "sweep.png").stat().st_size > 1000

    target = load_target("tiny-gemma4", "float32")
    texts = ActivationStore(store, target)
    head = DraftHead(load_assistant(tmp_path / "out" / "right-seed0" / "head", target.table.dtype))
    every = range(len(texts.entries))
    counts = simulate_acceptance(head, target, texts, 3, every).acceptance
    assert seed0[0] == pytest.approx(counts.acceptance_length)
    earlier = whole["results"][0]["judged_on"]["as vLLM"]["of_each_seed"]["0"]
    counts = simulate_acceptance(head, target, texts, 3, every, ahead=0).acceptance
    assert earlier == pytest.approx(counts.acceptance_length)


def test_a_judged_run_of_other_settings_is_not_taken_for_this_one(
    store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = written(tmp_path, store, seeds=[0], runs={"right": []})
    run_sweep(load_sweep(path), tmp_path / "out", [], "cpu")
    with pytest.raises(ValueError, match="judged with other settings"):
        run_sweep(load_sweep(path), tmp_path / "out", ["train.steps=7"], "cpu")


def test_a_judge_that_is_named_later_judges_the_heads_that_are_there(
    store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    one: dict[str, Any] = {"seeds": [0], "runs": {"right": []}}
    run_sweep(
        load_sweep(written(tmp_path, store, **one, judged_on={"texts": str(store)})),
        tmp_path / "out", [], "cpu",
    )  # fmt: skip
    monkeypatch.setattr(module, "train", lambda *_, **__: pytest.fail("it was trained again"))
    content = run_sweep(load_sweep(written(tmp_path, store, **one)), tmp_path / "out", [], "cpu")
    assert list(content["results"][0]["judged_on"]) == ["texts", "as vLLM"]
    one["num_assistant_tokens"] = 2
    content = run_sweep(load_sweep(written(tmp_path, store, **one)), tmp_path / "out", [], "cpu")
    judged = content["results"][0]["judged_on"]["texts"]
    assert len(judged["conditional_acceptance_rate"]) == 2


def test_a_difference_is_of_the_same_texts() -> None:
    """A run that gains one token in every round is ahead for certain, however texts differ."""

    def run(name: str, gain: int) -> dict[str, Any]:
        texts = [
            {"id": str(i), "category": "c", "rounds": 10, "drafted": 20, "reached": [10, 10],
             "accepted": [i % 10 * gain, 0]}
            for i in range(40)
        ]  # fmt: skip
        return {
            "run": name, "seed": 0, "overrides": [], "steps": 1, "loss": 1.0, "held_out": 1.5,
            "texts": {"t": texts},
        }  # fmt: skip

    first, second = summarise([run("a", 1), run("b", 2)], ["t"])
    one, other = first["judged_on"]["t"], second["judged_on"]["t"]
    assert one["acceptance_length"] == pytest.approx(1.45)
    assert one["difference_interval"] == (0.0, 0.0)
    assert other["difference"] == pytest.approx(0.45)
    low, high = other["difference_interval"]
    assert 0.3 < low < 0.45 < high < 0.6


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"runs": {}}, "name at least one run"),
        ({"runs": {"a/b": []}}, "is to name a folder"),
        ({"seed": 1}, "nearest valid key is seeds"),
        ({"runs": {"right": ["train.stepz=1"]}}, "run right: .*nearest valid key is train.steps"),
    ],
)
def test_a_bad_sweep_is_refused_before_anything_runs(
    store: Path, tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        load_sweep(written(tmp_path, store, **changes)).configs(tmp_path / "out")


def test_a_sweep_of_python_values_is_as_strict() -> None:
    with pytest.raises(ValueError, match="at least 1 item"):
        Sweep(config=Path("x"), runs={"a": []}, seeds=[], judged_on={})


def test_a_sweeps_runs_are_in_its_folder(tmp_path: Path) -> None:
    sweep = load_sweep(written(tmp_path, tmp_path / "store #1", seeds=[0]))
    runs = sweep.configs(tmp_path / "sweep #2")
    assert [config.run.dir for _, config in runs] == [
        tmp_path / "sweep #2" / f"{name}-seed0" for name in ("right", "own_key")
    ]
    assert {config.data.store for _, config in runs} == {tmp_path / "store #1"}
    path = tmp_path / "dated.yaml"
    path.write_text(
        "config: 007\nruns: {2026-11-27: []}\njudged_on: {today: 2026-11-27, on: {store: 1.50}}\n"
    )
    sweep = load_sweep(path)
    assert (sweep.config, list(sweep.runs)) == (Path("007"), ["2026-11-27"])
    stores = {name: judge.store for name, judge in sweep.judged_on.items()}
    assert stores == {"today": Path("2026-11-27"), "on": Path("1.50")}

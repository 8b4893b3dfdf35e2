"""The benchmarks run, compare like with like, and say what they say in the file too."""

import json
from pathlib import Path

import pytest
import torch

from headstart.configs.loader import load_config
from headstart.configs.schema import DataConfig
from headstart.data.extraction import extract
from headstart.data.store import bytes_per_token
from headstart.heads.target import Target
from headstart.train import loader_benchmark
from headstart.train.benchmark import bare_forwards, run_benchmark, stepwise_difference
from headstart.train.plan import run_shapes
from tests.helpers.prompts import conversations

CONFIG = DataConfig(teacher_top_k=5)

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize(
    ("name", "target", "ratios"),
    [
        (
            "extract",
            "tiny-gemma4",
            {
                "extract_over_forward",
                "extract_over_gemm",
                "fused_over_regenerate",
                "write_share",
            },
        ),
        ("regenerate", "tiny-gemma3", {"batched_over_single", "regenerate_over_gemm"}),
        ("regenerate", "tiny-gemma4", {"batched_over_single"}),
    ],
)
def test_a_benchmark_prints_and_writes_its_ratios(
    name: str, target: str, ratios: set[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    prompts = ROOT / "data" / "prompts" / "text_train.jsonl"
    overrides = [
        f"target.name={target}", "target.dtype=float32", "data.max_new_tokens=6",
        f"data.prompts=[{prompts}]", "data.max_prompt_tokens=16",
    ]  # fmt: skip
    run_benchmark(name, load_config(None, overrides), 6, "cpu", tmp_path / "out.json")
    content = json.loads((tmp_path / "out.json").read_text())
    assert content["ratios"].keys() == ratios
    assert all(value >= 0 for value in content["ratios"].values())
    for share in {"extract_over_gemm", "regenerate_over_gemm", "write_share"} & ratios:
        assert content["ratios"][share] < 1
    assert content["environment"]["prompts"] == 6
    printed = capsys.readouterr().out
    assert all(ratio in printed for ratio in ratios)
    if name == "extract":
        assert content["stepwise"]["same best token"] == 1.0
        assert content["stepwise"]["hidden relative error"] < 1e-5


def test_the_loader_is_timed_over_a_store_of_the_shapes_of_a_target(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(loader_benchmark, "STEPS", 5)
    config = load_config(None, ["target.name=tiny-gemma4", "data.storage=int8"])
    out = tmp_path / "a new folder" / "out.json"
    loader_benchmark.run_loader_benchmark(config, out)
    content = json.loads(out.read_text())
    source = run_shapes(config).text
    plain = bytes_per_token(source, 2, config.data.teacher_top_k, "int8")
    assert plain < content["bytes_per_token"] < 1.2 * plain, "the rest are headers"
    assert content["write_bytes_per_second"] > 0
    assert all(0 <= share < 1 for share in content["ratios"].values())
    assert "MB/s" in capsys.readouterr().out


def test_the_forward_to_compare_with_runs_every_token_through_the_lm_head(
    tiny: Target, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = conversations(9)
    seen = []
    tiny.model.get_output_embeddings().register_forward_hook(
        lambda module, args, output: seen.append(output.shape[0] * output.shape[1])
    )
    bare_forwards(tiny, rows)
    assert sum(seen) >= sum(len(row.ids) for row in rows)


def test_a_difference_is_found_where_there_is_one(tiny: Target, tmp_path: Path) -> None:
    rows = conversations(4)
    tokens = sum(len(row.ids) for row in rows)
    clean = extract(tiny, rows, tokens, CONFIG, tmp_path / "clean")
    same = stepwise_difference(tiny, clean, clean)
    assert same["hidden relative error"] == 0
    with torch.no_grad():
        tiny.final_norm.get_parameter("weight").mul_(1.1)
    del tiny.__dict__["fingerprint"]
    moved = extract(tiny, rows, tokens, CONFIG, tmp_path / "moved")
    found = stepwise_difference(tiny, moved, clean)
    assert found["hidden relative error"] == pytest.approx(0.1, abs=1e-3)
    assert found["full_attention.keys relative error"] == 0

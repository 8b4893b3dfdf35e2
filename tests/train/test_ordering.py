"""Clusters for a head that is there already: learned on its own states, its trunk untouched."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from headstart.cli.main import main
from headstart.configs.schema import HeadConfig
from headstart.heads.loading import load_target
from headstart.heads.ordered import is_of_clusters
from headstart.heads.pairing import build_assistant
from headstart.heads.saving import load_assistant, save_assistant
from headstart.train import ordering
from headstart.train.ordering import TEMPERATURE, cluster_mass
from headstart.train.run import train
from tests.helpers.runs import ROOT, tiny_config

COMMON = ["target.name=tiny-gemma4", "target.dtype=float32", "data.max_new_tokens=30"]


def order(head: Path, out: Path, cache: Path, *options: str) -> int:
    prompts = ROOT / "data" / "prompts" / "text_train.jsonl"
    settings = [
        *COMMON, f"data.prompts=[{prompts}]", "data.num_conversations=12",
        "data.validation_conversations=4", "data.max_prompt_tokens=16", f"data.cache_dir={cache}",
        "data.teacher_top_k=16",
    ]  # fmt: skip
    return main(["order", str(head), f"output_dir={out}", *options, *settings])


def test_refined_centroids_keep_more_and_nothing_else_changes(tmp_path: Path) -> None:
    config = tiny_config(tmp_path / "run", "train.max_steps=6", "train.eval_steps=6")
    train(config)
    first, second = tmp_path / "flipped", tmp_path / "refined"
    flipped = load_assistant(tmp_path / "run" / "head", torch.float32)
    centroids = flipped.masked_embedding.centroids.weight
    with torch.no_grad():
        centroids.copy_(centroids.flip(0))
    save_assistant(flipped, flipped.lm_head.weight, first, 3, torch.float32)
    options = ["head.centroid_steps=500", "head.centroid_intermediate_top_k=4"]
    assert order(first, second, tmp_path / "cache", *options) == 0
    found = json.loads((second / "order.json").read_text())
    assert found["after"]["recall"]["argmax"]["8"] > found["before"]["recall"]["argmax"]["8"]
    assert found["after"]["dense_acceptance_length"] == found["before"]["dense_acceptance_length"]
    before, after = (load_assistant(path, torch.float32) for path in (first, second))
    assert after.config.centroid_intermediate_top_k == 4
    for name, tensor in before.state_dict().items():
        same = torch.equal(tensor, after.state_dict()[name])
        assert same == (name != "masked_embedding.centroids.weight"), name
    for kept in ("head.on_existing_clusters=keep", "head.centroid_steps=0"):
        third, fewer = tmp_path / kept, "head.centroid_intermediate_top_k=1"
        assert order(second, third, tmp_path / "cache", kept, fewer) == 0
        read = load_assistant(third, torch.float32)
        assert read.config.centroid_intermediate_top_k == 1
        assert all(torch.equal(t, after.state_dict()[n]) for n, t in read.state_dict().items())
        found = json.loads((third / "order.json").read_text())
        assert found["after"]["acceptance_length"] != found["before"]["acceptance_length"]


def test_a_run_killed_while_it_orders_keeps_its_dense_head_and_ends_as_one_that_was_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    short = ["train.max_steps=6", "train.eval_steps=6", f"data.cache_dir={tmp_path / 'cache'}"]
    short.append("head.centroid_steps=3")
    train(tiny_config(tmp_path / "whole", *short))

    def stop(*args: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(ordering, "set_order", stop)
        with pytest.raises(KeyboardInterrupt):
            train(tiny_config(tmp_path / "cut", *short))
    dense = load_assistant(tmp_path / "cut" / "head", torch.float32)
    assert not dense.config.use_ordered_embeddings
    train(tiny_config(tmp_path / "cut", *short), resume=True)
    ours, theirs = (
        load_assistant(tmp_path / name / "head", torch.float32).state_dict()
        for name in ("cut", "whole")
    )
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[k], theirs[k]) for k in ours)
    assert json.loads((tmp_path / "cut" / "head" / ordering.RECORD).read_text())["steps"] == 3
    summaries = (json.loads((tmp_path / n / "summary.json").read_text()) for n in ("cut", "whole"))
    assert len({json.dumps(summary["best"]) for summary in summaries}) == 1


def test_cluster_mass_is_the_flattened_sum_over_the_tokens_of_each() -> None:
    logits, clusters = torch.randn(7, 60), torch.randint(9, (60,))
    wanted = torch.zeros(7, 9).index_add_(1, clusters, logits.softmax(-1)) ** (1 / TEMPERATURE)
    found = cluster_mass(logits, clusters, 9)
    torch.testing.assert_close(found, wanted / wanted.sum(1, keepdim=True), atol=1e-5, rtol=1e-3)


@pytest.mark.parametrize("width", [None, 32])
def test_a_head_without_clusters_is_given_some(width: int | None, tmp_path: Path) -> None:
    """A narrow head has a table of its own, as Google's for E2B and E4B do."""
    target = load_target("tiny-gemma4", "float32")
    assistant = build_assistant(target, HeadConfig(hidden_size=width))
    table = target.table if width is None else target.table[:, :width].contiguous()
    save_assistant(assistant, table, tmp_path / "dense", 3, torch.float32)
    cache = tmp_path / "cache"
    assert order(tmp_path / "dense", tmp_path / "x", cache) == 1, "nothing to refine"
    assert not (tmp_path / "x").exists()
    options = [
        "head.on_existing_clusters=rebuild", "head.num_centroids=20",
        "head.centroid_intermediate_top_k=20", "head.centroid_steps=3",
    ]  # fmt: skip
    assert order(tmp_path / "dense", tmp_path / "ordered", cache, *options) == 0
    found = json.loads((tmp_path / "ordered" / "order.json").read_text())["after"]
    assert found["acceptance_length"] == found["dense_acceptance_length"]
    dense, ordered = (
        load_assistant(tmp_path / name, torch.float32).state_dict() for name in ("dense", "ordered")
    )
    assert {name for name in ordered if name not in dense} == {
        name for name in ordered if is_of_clusters(name)
    }
    assert all(torch.equal(tensor, ordered[name]) for name, tensor in dense.items())
    assert order(tmp_path / "dense", tmp_path / "y", cache, "head.num_centroids=20") == 1

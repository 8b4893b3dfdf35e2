"""Training that goes on from a finished head: narrow with clusters, as Google's, or full-width."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import modeling_utils

from headstart.configs.schema import HeadConfig
from headstart.data.loader import Batch, candidate_rows, gather_rows
from headstart.heads.loading import load_target
from headstart.heads.pairing import warm_assistant
from headstart.heads.saving import draft_position_offset, load_assistant, load_assistant_config
from headstart.heads.target import Target
from headstart.heads.unroll import DraftHead
from headstart.train.plan import plan
from headstart.train.run import check_start, train
from headstart.train.start import untrained_assistant
from tests.helpers.heads import FULL, NARROW, finished, greedy_document
from tests.helpers.models import make_target
from tests.helpers.runs import metrics, take_every_head, tiny_config


def rows_of(target: Target) -> Batch:
    _, document = greedy_document(target)
    return gather_rows([document], [candidate_rows(document)], 2)


@pytest.mark.parametrize("width", [NARROW, FULL])
def test_a_warm_head_starts_as_the_head_that_it_is_made_from(
    target: Target, tmp_path: Path, width: int | None
) -> None:
    folder = finished(target, tmp_path / "head", width)
    head, wanted = DraftHead(warm_assistant(target, folder)), load_assistant(folder, torch.float32)
    batch = rows_of(target)
    with torch.no_grad():
        states, theirs = (
            one(batch.texts.computed_in(torch.float32), batch.rows, target.embed, 0)[0]
            for one in (head, DraftHead(wanted))
        )
    logits = states @ head.draft_table(target.table).T
    torch.testing.assert_close(logits, theirs @ wanted.lm_head.weight.T)
    trained = head.trainable()
    assert not [n for n in trained if "lm_head" in n or "embed_tokens" in n or "masked" in n]
    assert len(trained) == sum(
        "masked" not in n and "embed_tokens" not in n for n, _ in wanted.named_parameters()
    )
    assert head.table(target.table).shape == wanted.lm_head.weight.shape
    if width is FULL:
        assert head.table(target.table) is target.table


@pytest.mark.parametrize("width", [NARROW, FULL])
def test_a_run_goes_on_from_it_and_keeps_its_clusters_and_table(
    tmp_path: Path, width: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    take_every_head(monkeypatch)
    target = load_target("tiny-gemma4", "float32")
    start = finished(target, tmp_path / "start", width)
    config = tiny_config(
        tmp_path / "run", f"head.init_from={start}", "train.max_steps=12", "train.eval_steps=4",
        "train.save_steps=8", "head.num_centroids=null",
        f"head.use_ordered_embeddings={'true' if width else 'false'}",
    )  # fmt: skip
    train(config)
    losses = [row["loss"] for row in metrics(tmp_path / "run")]
    assert losses[-1] < losses[0]
    before = load_assistant(start, torch.float32)
    after = load_assistant(tmp_path / "run" / "head", torch.float32)
    assert torch.equal(after.lm_head.weight, before.lm_head.weight)
    assert [draft_position_offset(head.config) for head in (before, after)] == [0, "mixed"]
    q_proj = "model.layers.0.self_attn.q_proj.weight"
    assert not torch.equal(after.state_dict()[q_proj], before.state_dict()[q_proj])
    if width is NARROW:
        ours, theirs = after.masked_embedding, before.masked_embedding
        assert torch.equal(ours.token_ordering, theirs.token_ordering)
        assert not torch.equal(ours.centroids.weight, theirs.centroids.weight), "they learn on"


@pytest.mark.parametrize("asked", [None, 3])
@pytest.mark.parametrize("how", ["keep", "refine", "rebuild"])
def test_a_draft_reads_as_many_clusters_as_before_or_as_are_asked_for(
    how: str, asked: int | None, tmp_path: Path
) -> None:
    target = load_target("tiny-gemma4", "float32")
    start = finished(target, tmp_path / "start", NARROW)
    before = load_assistant_config(start)
    read = "null" if asked is None else asked
    config = tiny_config(
        tmp_path / "run", f"head.init_from={start}", "train.max_steps=2", "train.eval_steps=2",
        "train.warmup_steps=1", "head.num_centroids=null", f"head.on_existing_clusters={how}",
        f"head.centroid_intermediate_top_k={read}", "head.centroid_steps=2", "eval=null",
    )  # fmt: skip
    shape = untrained_assistant(target, config.head, 2).config
    train(config)
    after = load_assistant_config(tmp_path / "run" / "head")
    wanted = (before.num_centroids, asked or before.centroid_intermediate_top_k)
    assert (after.num_centroids, after.centroid_intermediate_top_k) == wanted
    assert (shape.num_centroids, shape.centroid_intermediate_top_k) == wanted


def test_layers_of_a_finished_head_are_checkpointed_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    start = finished(load_target("tiny-gemma4", "float32"), tmp_path / "start", FULL)
    ran: list[bool] = []
    real = modeling_utils.checkpoint

    def counted(*args: Any, **kwargs: Any) -> Any:
        ran.append(True)
        return real(*args, **kwargs)

    monkeypatch.setattr(modeling_utils, "checkpoint", counted)
    train(
        tiny_config(
            tmp_path / "run",
            f"head.init_from={start}",
            "train.max_steps=2",
            "train.eval_steps=2",
            "train.warmup_steps=1",
            "head.num_centroids=null",
            "head.use_ordered_embeddings=false",
            "train.activation_checkpointing=true",
            "eval=null",
        )
    )
    assert ran


def test_a_head_of_another_target_is_refused(tmp_path: Path) -> None:
    folder = finished(make_target("gemma4"), tmp_path / "head", FULL)
    other = make_target("gemma4-moe")  # its full layers have one KV head, not two
    with pytest.raises(ValueError, match="does not fit gemma4-moe"):
        warm_assistant(other, folder)


def test_its_shapes_are_its_own() -> None:
    with pytest.raises(ValueError, match="hidden_size is that of the head in init_from"):
        HeadConfig(init_from="ORG/head", hidden_size=256)


def test_a_head_that_does_not_say_where_its_drafts_stood_is_refused_before_any_answer(
    tiny: Target, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = finished(tiny, tmp_path / "head", FULL)
    path = Path(folder) / "config.json"
    config = json.loads(path.read_text()) | {"headstart_target": {"name": "tiny-gemma4"}}
    config.pop("headstart_draft_position_offset", None)
    path.write_text(json.dumps(config))
    monkeypatch.setattr("headstart.train.run.open_target", None)
    with pytest.raises(ValueError, match="headstart_draft_position_offset"):
        train(tiny_config(tmp_path / "run", f"head.init_from={folder}", "head.num_centroids=null"))


def test_clusters_that_a_run_would_drop_are_spoken_of_or_refused(
    tiny: Target, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Before a target is loaded, and by the plan."""
    start = finished(tiny, tmp_path / "start", NARROW)
    dense = [f"head.init_from={start}", "head.num_centroids=null"]
    dense.append("head.use_ordered_embeddings=false")
    config = tiny_config(tmp_path / "run", *dense)
    check_start(config)
    assert "has clusters, and the head of this run will have none" in capsys.readouterr().out
    assert plan(config)["LM head"].startswith("dense")
    with pytest.raises(ValueError, match=r"on_existing_clusters=keep needs"):
        check_start(tiny_config(tmp_path / "run", *dense, "head.on_existing_clusters=keep"))
    dense[0] = f"head.init_from={finished(tiny, tmp_path / 'full', FULL)}"  # which has none
    with pytest.raises(ValueError, match=r"on_existing_clusters=rebuild needs"):
        check_start(tiny_config(tmp_path / "run", *dense, "head.on_existing_clusters=rebuild"))

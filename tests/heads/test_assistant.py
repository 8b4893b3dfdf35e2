import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from headstart.configs.schema import HeadConfig
from headstart.heads.kinds import Texts, all_rows
from headstart.heads.pairing import build_assistant, check_pair
from headstart.heads.saving import (
    draft_position_offset,
    load_assistant,
    save_assistant,
    trained_notes,
)
from headstart.heads.target import Target
from headstart.heads.unroll import DraftHead
from headstart.train.start import low_rank_agreement, low_rank_start
from tests.helpers.checkpoints import configure, saved_head
from tests.helpers.models import make_target


def test_plain_transformers_loads_what_was_saved(target: Target, tmp_path: Path) -> None:
    """Same class, same tensors, K set; the table is the target's."""
    assistant = build_assistant(target, HeadConfig())
    head = DraftHead(assistant)
    save_assistant(assistant, head.table(target.table), tmp_path / "head", 5, torch.float32)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "head")
    assert type(loaded) is type(assistant)
    assert loaded.generation_config.num_assistant_tokens == 5
    for name, tensor in assistant.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], tensor), name
    assert torch.equal(loaded.lm_head.weight, target.table)
    check_pair(target, load_assistant(tmp_path / "head", torch.float32))


def test_a_full_width_head_shares_the_targets_table_and_does_not_train_it() -> None:
    target = make_target("gemma4")
    head = DraftHead(build_assistant(target, HeadConfig()))
    assert head.assistant.lm_head.weight is target.table
    assert not any(p is target.table for p in head.trainable().values())


@torch.no_grad()
def test_a_narrow_heads_saved_table_gives_the_logits_that_were_trained(tmp_path: Path) -> None:
    target = make_target("gemma4")
    assistant = build_assistant(target, HeadConfig(hidden_size=32))
    head = DraftHead(assistant, torch.randn(48, 32))
    ids = torch.randint(4, 260, (1, 12))
    seen = target.activations(ids)
    texts, rows = (
        Texts(seen.hidden, seen.shared_kv),
        all_rows(torch.arange(11)[None], ids[:, 1:, None]),
    )
    state = head(texts, rows, target.embed, 0)[0]
    save_assistant(assistant, head.table(target.table), tmp_path / "head", 4, torch.float32)
    saved = load_assistant(tmp_path / "head", torch.float32)
    assert saved.lm_head.weight.shape == (320, 32)
    narrow = DraftHead(saved)(texts, rows, target.embed, 0)[0]
    torch.testing.assert_close(
        narrow @ saved.lm_head.weight.T, state @ target.table.T, atol=1e-4, rtol=1e-4
    )


def test_the_data_aware_start_beats_the_plain_svd_on_what_the_target_says() -> None:
    """Skewed hidden states and a few likely tokens: the SVD of the table alone knows of neither."""
    torch.manual_seed(0)
    table = torch.randn(500, 24)
    hidden = torch.randn(4000, 24) * torch.logspace(0.5, -1.5, 24)
    wanted = (hidden @ table.T).argmax(-1)
    counts = torch.bincount(wanted, minlength=500).float() + 1e-3
    unseen = torch.randn(1000, 24) * torch.logspace(0.5, -1.5, 24)
    aware = low_rank_agreement(table, low_rank_start(table, hidden, counts, 8), unseen)
    vectors = torch.linalg.svd(table, full_matrices=False).Vh[:8]
    assert aware > low_rank_agreement(table, (vectors.T, vectors), unseen) + 0.2
    assert low_rank_agreement(table, low_rank_start(table, hidden, counts, 24), unseen) == 1


@pytest.mark.parametrize("family", ["gemma3", "gemma4"])
def test_query_norms_start_at_the_targets_scale(family: str) -> None:
    """Gemma 3 divides scores by sqrt(query_pre_attn_scalar), Gemma 4 assistants never do."""
    target = make_target(family)
    with torch.no_grad():
        for layer in target.layers:
            layer.self_attn.q_norm.weight.normal_()
    assistant = build_assistant(target, HeadConfig())
    for layer, layer_type in zip(
        assistant.model.layers, ("sliding_attention", "full_attention"), strict=True
    ):
        source = target.layers[target.source_layers[layer_type]].self_attn
        x = torch.randn(3, layer.self_attn.head_dim)
        wanted = source.q_norm(x) * source.scaling
        torch.testing.assert_close(layer.self_attn.q_norm(x), wanted, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("changes", "values"),
    [
        ({"backbone_hidden_size": 64}, ("backbone_hidden_size is 64", "the target has 48")),
        ({"vocab_size": 640}, ("vocab_size is 640", "the target has 320")),
        ({"sliding_window": 16}, ("sliding_window is 16", "the target has 8")),
    ],
)
def test_a_head_of_another_target_is_refused_with_both_values(
    changes: dict[str, int], values: tuple[str, str]
) -> None:
    target = make_target("gemma4")
    assistant = build_assistant(target, HeadConfig())
    for key, value in changes.items():
        owner = assistant.config if hasattr(assistant.config, key) else assistant.config.text_config
        setattr(owner, key, value)
    with pytest.raises(ValueError, match="does not fit gemma4") as error:
        check_pair(target, assistant)
    assert all(value in str(error.value) for value in values)


def test_impossible_shapes_are_refused_with_their_cure() -> None:
    target = make_target("gemma4")
    with pytest.raises(ValueError, match=r"hidden_size=64 is above the target's 48"):
        build_assistant(target, HeadConfig(hidden_size=64))
    with pytest.raises(ValueError, match=r"num_attention_heads=3 is no multiple .* 2 KV heads"):
        build_assistant(target, HeadConfig(num_attention_heads=3))


def test_a_folder_that_is_no_head_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no draft head at"):
        load_assistant(tmp_path, torch.float32)
    make_target("gemma4").model.config.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="not a Gemma 4 assistant"):
        load_assistant(tmp_path, torch.float32)


def test_a_head_of_another_maker_drafts_where_transformers_puts_it_and_ours_has_to_say() -> None:
    """A key that is missed in silence would change what a trained head means."""
    config = build_assistant(make_target("gemma4"), HeadConfig()).config
    assert draft_position_offset(config) == 0
    for key, value in trained_notes(config, "mixed", {}).items():
        setattr(config, key, value)
    assert draft_position_offset(config) == "mixed"
    delattr(config, "headstart_draft_position_offset")
    config.headstart_target = {"name": "tiny"}
    with pytest.raises(ValueError, match="headstart_draft_position_offset"):
        draft_position_offset(config)


BEFORE = {"newest": 0, "one_earlier": -1, "both": "mixed"}


@pytest.mark.parametrize("said", BEFORE)
def test_a_head_of_before_keeps_where_its_drafts_stand_and_is_saved_in_the_words_of_today(
    tmp_path: Path, said: str
) -> None:
    """Published heads say it by the earlier name for ever; what is saved again says it once."""
    target = make_target("gemma4")
    saved_head(tmp_path / "before", target)
    configure(tmp_path / "before", headstart_rope_position=said)
    head: Any = load_assistant(tmp_path / "before", torch.float32)
    assert draft_position_offset(head.config) == BEFORE[said]
    save_assistant(head, target.table, tmp_path / "again", 4, torch.float32)
    notes = json.loads((tmp_path / "again" / "config.json").read_text())
    assert "headstart_rope_position" not in notes
    assert notes["headstart_draft_position_offset"] == BEFORE[said]
    kept = load_assistant(tmp_path / "again", torch.float32)
    assert draft_position_offset(kept.config) == BEFORE[said]


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("headstart_rope_position", "latest"),
        ("headstart_rope_position", 0),
        ("headstart_rope_position", ["both"]),
        ("headstart_draft_position_offset", "newest"),
        ("headstart_draft_position_offset", 1),
        ("headstart_draft_position_offset", False),
        ("headstart_draft_position_offset", {}),
    ],
)
def test_a_head_that_says_what_is_no_draft_position_is_neither_read_nor_saved(
    tmp_path: Path, key: str, value: object
) -> None:
    """Not even one of another maker: taken for 0, its drafts would stand elsewhere in silence."""
    target = make_target("gemma4")
    saved_head(tmp_path / "head", target)
    changes: dict[str, Any] = {key: value}
    configure(tmp_path / "head", **changes)
    head: Any = load_assistant(tmp_path / "head", torch.float32)
    with pytest.raises(ValueError, match=key):
        draft_position_offset(head.config)
    with pytest.raises(ValueError, match=key):
        save_assistant(head, target.table, tmp_path / "again", 4, torch.float32)
    assert not (tmp_path / "again").exists()

"""Kinds whose heads are one decoder layer with keys and values of its own."""

from typing import Any

import pytest
import torch

from headstart.configs.schema import HeadConfig, LoraConfig
from headstart.heads.kinds import Rows, Texts, head_kinds
from headstart.heads.pairing import build_assistant, check_pair
from headstart.heads.saving import add_lora
from headstart.heads.target import Target
from headstart.heads.unroll import DraftHead
from tests.helpers.heads import greedy_document, noisy_head
from tests.helpers.models import FAMILIES, make_target

K = 3
each_kind = pytest.mark.parametrize("kind", ["mtp", "eagle"])


@each_kind
@pytest.mark.parametrize("family", FAMILIES)
def test_a_head_begins_with_the_target_s_last_full_layer(kind: str, family: str) -> None:
    target = make_target(family)
    model = build_assistant(target, HeadConfig(kind=kind), K).model
    number = target.source_layers["full_attention"]
    assert target.config.layer_types[number] == "full_attention"
    source: Any = target.layers[number]
    own = model.layers[0]
    assert type(own) is type(source)
    theirs = source.state_dict()
    for name, tensor in own.state_dict().items():
        assert torch.equal(tensor, theirs[name]), name
    final: Any = target.final_norm
    assert torch.equal(model.norm.weight, final.weight)
    assert own.self_attn.layer_type == "full_attention"


@each_kind
@pytest.mark.parametrize("packed", [False, True])
@torch.no_grad()
def test_no_row_sees_what_another_drafts(kind: str, packed: bool, tiny: Target) -> None:
    """Rows drafted from together say what each says alone, whatever the others read."""
    head = noisy_head(tiny, kind=kind)
    ids = greedy_document(tiny)[1].ids[None]
    seen = tiny.activations(ids, layers=head.inputs.layers)
    start = 4 if packed else 0
    starts = torch.zeros_like(ids)
    starts[:, start:] = start
    texts = Texts(seen.hidden, {}, ids, starts if packed else None, seen.layers)
    at = torch.tensor([[6, 9, 10, 20]])
    tokens = torch.randint(4, 260, (1, 4, K), generator=torch.Generator().manual_seed(0))

    def drafted(*which: int) -> list[torch.Tensor]:
        chosen = list(which)
        places = at[:, chosen]
        every = torch.arange(len(chosen))[None]
        begins = torch.full_like(places, start)
        rows = Rows(places, places, begins, tokens[:, chosen], every)
        return head(texts, rows, tiny.embed, 0)

    together = drafted(0, 1, 2, 3)
    for r in range(4):
        for one, all_rows in zip(drafted(r), together, strict=True):
            torch.testing.assert_close(one[:, 0], all_rows[:, r], atol=1e-5, rtol=1e-5)


@each_kind
def test_what_cannot_be_is_refused(kind: str, tiny: Target) -> None:
    refused: list[tuple[dict[str, Any], str]] = [
        ({"num_hidden_layers": 2}, "one layer"),
        ({"num_attention_heads": 3}, "no multiple"),
        ({"hidden_size": 96}, "above the target's"),
    ]
    for asked, said in refused:
        with pytest.raises(ValueError, match=said):
            build_assistant(tiny, HeadConfig(kind=kind, **asked), K)


def test_an_eagle_head_belongs_to_a_target_of_as_many_layers(tiny: Target) -> None:
    assistant = build_assistant(tiny, HeadConfig(kind="eagle"), K)
    check_pair(tiny, assistant)
    assert assistant.config.target_layers == [2, 3]
    assistant.config.target_num_hidden_layers += 1
    with pytest.raises(ValueError, match="number of layers is 7"):
        check_pair(tiny, assistant)


@pytest.mark.parametrize("kind", head_kinds())
@pytest.mark.parametrize("width", [None, 32])
def test_adapters_are_beside_all_linear_layers(kind: str, width: int | None, tiny: Target) -> None:
    assistant: Any = build_assistant(tiny, HeadConfig(kind=kind, hidden_size=width), K)
    linear = {n for n, m in assistant.named_modules() if type(m) is torch.nn.Linear}
    add_lora(assistant, LoraConfig())
    adapted = {n.partition(".lora_A")[0] for n, _ in assistant.named_parameters() if "lora_A" in n}
    assert adapted == linear - {"lm_head"}
    assert all("lora" in name for name in DraftHead(assistant).trainable())

"""What runs in one piece gives the numbers of what transformers runs in many: on whole models of
every family, forwards and gradients; and it is put back."""

from contextlib import suppress
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from transformers import (
    Gemma3TextConfig,
    GenerationConfig,
    TopKLogitsWarper,
    TopPLogitsWarper,
)
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.gemma3.modeling_gemma3 import Gemma3MLP, Gemma3RMSNorm
from transformers.models.gemma4.modeling_gemma4 import Gemma4RMSNorm

from headstart.common.versions import CUTS_ROWS
from headstart.eval.decoding import decode
from headstart.heads import kernels
from headstart.heads.decoder import ExactDecoding, exact_decoding
from headstart.heads.kernels import (
    best_tokens,
    fast_kernels,
    grouped_query_attention,
)
from headstart.heads.target import Target
from tests.helpers.heads import noisy_head
from tests.helpers.models import make_target


def replaced(model: nn.Module) -> list[str]:
    """Classes of the modules that run another forward than their own."""
    return [type(m).__name__ for m in model.modules() if "forward" in m.__dict__]


def norms() -> list[Any]:
    return [Gemma4RMSNorm(40), Gemma4RMSNorm(40, with_scale=False), Gemma3RMSNorm(40, 1e-5)]


@pytest.mark.parametrize("place", range(3))
@pytest.mark.parametrize("weights", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(1, 1, 40), (2, 7, 40), (2, 3, 4, 40)])
def test_a_norm_in_one_piece_is_the_same_bit_for_bit(
    place: int, weights: torch.dtype, dtype: torch.dtype, shape: tuple[int, ...]
) -> None:
    """Its gradients up to the order of sums; also where training in bfloat16 casts on the way."""
    torch.manual_seed(0)
    norm = norms()[place].to(weights)
    for weight in norm.parameters():
        nn.init.normal_(weight, std=2.0)
    fast = kernels._fast_forward(norm)
    assert fast is not None
    x = (5 * torch.randn(shape)).to(dtype).requires_grad_()
    for context in (torch.autocast("cpu", enabled=False), torch.autocast("cpu", torch.bfloat16)):
        with context:
            ours, stock = fast(x), norm(x)
        assert ours.dtype == stock.dtype
        assert torch.equal(ours, stock)
        wanted, found = (
            torch.autograd.grad((y.float() ** 3).sum(), [x, *norm.parameters()])
            for y in (stock, ours)
        )
        exact = dtype == weights == torch.float32
        off = 1e-4 if exact else 0.02
        for a, b in zip(found, wanted, strict=True):
            scale = b.float().abs().max().clamp_min(1.0)
            torch.testing.assert_close(a.float() / scale, b.float() / scale, rtol=off, atol=off)


class Adapted(nn.Linear):
    """A linear layer of somebody's own, which may look at all of its rows."""


def mlp(of: type[nn.Module] = nn.Linear) -> Any:
    config = Gemma3TextConfig(hidden_size=40, intermediate_size=56)
    made = Gemma3MLP(config)
    made.up_proj = of(40, 56, bias=False)
    return made


@pytest.mark.parametrize("module", [*norms(), mlp()], ids=lambda m: type(m).__name__)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_many_rows_go_by_blocks(
    module: nn.Module, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not those that gradients are kept for, whose memory is needed anyway."""
    torch.manual_seed(0)
    monkeypatch.setattr(kernels, "BLOCK", 4)
    monkeypatch.setattr(kernels, "MANY", 6 * 40)
    blocks: list[int] = []
    stock = torch.cat

    def noted(parts: Any, *args: Any, **kwargs: Any) -> torch.Tensor:
        blocks.extend(map(len, parts))
        return stock(parts, *args, **kwargs)

    module = module.to(dtype)
    fast, x = kernels._fast_forward(module), torch.randn(2, 5, 40, dtype=dtype)
    assert fast is not None
    monkeypatch.setattr(torch, "cat", noted)
    with torch.no_grad():
        assert fast(x[:, :3]).shape == (2, 3, 40)
        assert blocks == []
        found, wanted = fast(x), module(x)
    assert blocks == [4, 4, 2]
    torch.testing.assert_close(
        found, wanted, atol=1e-6, rtol=1e-5 if dtype is torch.float32 else 0.01
    )
    fast(x)
    assert blocks == [4, 4, 2]


def test_an_mlp_with_layers_of_another_make_is_left_alone() -> None:
    assert kernels._fast_forward(mlp()) is not None
    assert kernels._fast_forward(mlp(Adapted)) is None
    watched = mlp()
    watched.down_proj.register_forward_hook(lambda *_: None)
    assert kernels._fast_forward(watched) is None


@pytest.mark.parametrize("rows", [1, 3, 40])
@pytest.mark.parametrize("masked", [False, True])
def test_grouped_heads_attend_as_the_stock_attention_does(
    rows: int, masked: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Gradients too; and no key is copied, but for a long prefill and rows without a mask."""
    torch.manual_seed(0)
    layer: Any = nn.Module()
    layer.num_key_value_groups, layer.is_causal = 4, True
    # As a layer hands them over: heads and rows swapped in place.
    query = torch.randn(2, rows, 8, 16).transpose(1, 2).requires_grad_()
    key, value = (torch.randn(2, 2, 70, 16, requires_grad=True) for _ in range(2))
    mask = torch.rand(2, 1, rows, 70) > 0.3 if masked else None
    if mask is not None:
        mask[..., 0] = True
    heads: list[int] = []
    stock = F.scaled_dot_product_attention

    def noted(query: torch.Tensor, key: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        heads.append(key.shape[1])
        return stock(query, key, *args, **kwargs)

    wanted, _ = sdpa_attention_forward(layer, query, key, value, mask, scaling=0.3)
    monkeypatch.setattr(kernels.F, "scaled_dot_product_attention", noted)
    found, _ = grouped_query_attention(layer, query, key, value, mask, scaling=0.3)
    assert found.shape == wanted.shape
    assert found.is_contiguous()
    torch.testing.assert_close(found, wanted, atol=1e-6, rtol=1e-5)
    for a, b in zip(
        *(torch.autograd.grad((y**2).sum(), [query, key, value]) for y in (found, wanted)),
        strict=True,
    ):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-4)
    if masked or rows == 1:
        assert heads == [2]


def test_a_long_prefill_is_left_to_transformers(monkeypatch: pytest.MonkeyPatch) -> None:
    """There a mask for each head would be larger than copies of the keys."""
    called: list[int] = []

    def stock(module: Any, query: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        called.append(query.shape[2])
        return query, None

    monkeypatch.setattr(kernels, "sdpa_attention_forward", stock)
    layer: Any = nn.Module()
    key = torch.randn(1, 1, 80, 16)
    for rows in (32, 33):
        mask = torch.ones(1, 1, rows, 80, dtype=torch.bool)
        grouped_query_attention(layer, torch.randn(1, 4, rows, 16), key, key, mask)
    assert called == [33]


def causal_mask(rows: int, before: int, window: int, padding: int) -> torch.Tensor:
    """[2, 1, R, T], True where a row sees a key: the second text has padding at its left."""
    places, keys = torch.arange(before, before + rows)[:, None], torch.arange(before + rows)
    seen = (keys <= places) & (keys > places - window)
    padded = seen & ((keys >= padding) | (keys == places))
    return torch.stack([seen, padded])[:, None]


@pytest.mark.parametrize("additive", [False, True])
@pytest.mark.parametrize("window", [5, 1000])
@pytest.mark.parametrize("before", [0, 7])
def test_a_long_prefill_goes_by_blocks_over_the_keys_that_they_see(
    before: int, window: int, additive: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    monkeypatch.setattr(kernels, "BLOCK", 8)
    layer: Any = nn.Module()
    layer.num_key_value_groups, layer.is_causal = 4, True
    query = torch.randn(2, 8, 50, 16)
    key, value = (torch.randn(2, 2, before + 50, 16) for _ in range(2))
    mask = causal_mask(50, before, window, padding=20)
    if additive:
        mask = torch.zeros(mask.shape).masked_fill(~mask, torch.finfo(torch.float32).min)
    keys: list[int] = []
    stock = F.scaled_dot_product_attention

    def noted(query: torch.Tensor, key: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        keys.append(key.shape[2])
        return stock(query, key, *args, **kwargs)

    with torch.no_grad():
        wanted, _ = sdpa_attention_forward(layer, query, key, value, mask, scaling=0.3)
        monkeypatch.setattr(kernels.F, "scaled_dot_product_attention", noted)
        found, _ = grouped_query_attention(layer, query, key, value, mask, scaling=0.3)
    torch.testing.assert_close(found, wanted, atol=1e-6, rtol=1e-5)
    ends = [before + min(end, 50) for end in range(8, 57, 8)]
    assert keys == [min(end, 8 + window - 1, 2 + window - 1 if end == 50 + before else end)
                    for end in ends]  # fmt: skip


def test_a_long_prompt_gives_the_same_text_by_blocks(
    target: Target, monkeypatch: pytest.MonkeyPatch
) -> None:
    prompt = torch.randint(10, 90, (1, 60), generator=torch.Generator().manual_seed(0))
    plain = target.model.generate(prompt, max_new_tokens=12)
    monkeypatch.setattr(kernels, "BLOCK", 16)
    with fast_kernels(target.model):
        assert torch.equal(target.model.generate(prompt, max_new_tokens=12), plain)


@pytest.mark.usefixtures("other_forms")
def test_linear_layers_take_few_rows_the_other_way_and_are_put_back(tiny: Target) -> None:
    """Not those of other classes, nor one whose forward somebody else replaced, nor where gradients
    are kept."""

    class Other(nn.Linear):
        pass

    model = tiny.model
    plain, other, hooked = nn.Linear(4, 3), Other(4, 3), nn.Linear(4, 3)
    model.extra = nn.ModuleList([plain, other, hooked])
    theirs = hooked.forward = lambda x: x  # type: ignore[method-assign, assignment]
    x = torch.randn(3, 4)
    wanted = plain(x)
    with suppress(RuntimeError), fast_kernels(model):
        assert "forward" in plain.__dict__
        assert "forward" not in other.__dict__
        assert hooked.forward is theirs
        assert torch.equal(plain(x), wanted)
        with torch.no_grad():
            torch.testing.assert_close(plain(x), wanted)
        with fast_kernels(model):  # one text within another
            assert "forward" in plain.__dict__
        assert "forward" in plain.__dict__
        assert ALL_ATTENTION_FUNCTIONS["sdpa"] is kernels._attention
        raise RuntimeError("as when generate fails")
    assert hooked.forward is theirs
    del model.extra
    assert not replaced(model)
    assert ALL_ATTENTION_FUNCTIONS["sdpa"] is sdpa_attention_forward


@pytest.mark.usefixtures("other_forms")
@pytest.mark.parametrize("padded", [False, True])
def test_a_target_generates_the_same_text_within(padded: bool, target: Target) -> None:
    first = [0, 0, 5, 6, 7, 8] if padded else [3, 4, 5, 6, 7, 8]
    ids = torch.tensor([first, [9, 8, 7, 6, 5, 4]])

    def text() -> tuple[list[list[int]], torch.Tensor]:
        output = target.model.generate(
            ids, attention_mask=(ids > 0).long(), max_new_tokens=20, do_sample=False,
            eos_token_id=None, output_logits=True, return_dict_in_generate=True,
        )  # fmt: skip
        return output.sequences.tolist(), torch.stack(output.logits)

    plain, plain_logits = text()
    with fast_kernels(target.model):
        fast, logits = text()
    assert fast == plain
    torch.testing.assert_close(logits, plain_logits, atol=1e-4, rtol=1e-4)
    assert not replaced(target.model)


def test_a_target_has_the_same_gradients_within(target: Target) -> None:
    ids = torch.tensor([[3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13]])
    weights = [p for p in target.model.parameters() if p.is_floating_point()]
    for weight in weights:
        weight.requires_grad_()

    def gradients() -> list[torch.Tensor | None]:
        loss = target.model(ids).logits.logsumexp(-1).sum()
        return list(torch.autograd.grad(loss, weights, allow_unused=True))

    stock = gradients()
    with fast_kernels(target.model):
        assert any(name.endswith("RMSNorm") for name in replaced(target.model))
        fast = gradients()
    for weight, a, b in zip(weights, fast, stock, strict=True):
        weight.requires_grad_(False)
        assert (a is None) == (b is None)
        if a is not None and b is not None:
            torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-3)


def test_layers_that_run_again_or_are_compiled_keep_their_own(tiny: Target) -> None:
    head = noisy_head(tiny).assistant
    head.model.layers[0].compile()
    with fast_kernels(head):
        assert not replaced(head.model.layers[0])
        assert replaced(head.model.layers[1])
    head.train()
    head.model.gradient_checkpointing_enable({"use_reentrant": False})
    with fast_kernels(head):
        assert not replaced(head)
        assert ALL_ATTENTION_FUNCTIONS["sdpa"] is sdpa_attention_forward


def test_a_signal_on_the_way_in_leaves_nothing_behind(
    tiny: Target, monkeypatch: pytest.MonkeyPatch
) -> None:
    forward, made = kernels._fast_forward, list[nn.Module]()

    def interrupted(module: nn.Module, *how: bool) -> Any:
        made.append(module)
        if len(made) == 9:
            raise KeyboardInterrupt
        return forward(module, *how)

    monkeypatch.setattr(kernels, "_fast_forward", interrupted)
    with pytest.raises(KeyboardInterrupt), fast_kernels(tiny.model):
        pass
    assert not replaced(tiny.model)


def test_attention_of_other_models_stays_as_it_is_however_contexts_overlap(
    tiny: Target, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As those of two threads may: the first to begin is the first to end."""
    grouped = list[nn.Module]()

    def noted(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        grouped.append(module)
        return grouped_query_attention(module, *args, **kwargs)

    monkeypatch.setattr(kernels, "grouped_query_attention", noted)
    other, third = make_target("gemma3"), make_target("gemma4-kv-sharing")
    first, second = fast_kernels(tiny.model), fast_kernels(other.model)
    first.__enter__()
    second.__enter__()
    first.__exit__(None, None, None)
    for target in (tiny, other, third):
        target.model(torch.tensor([[5, 6, 7]]))
    assert grouped
    assert set(grouped) <= set(other.model.modules())
    second.__exit__(None, None, None)
    assert ALL_ATTENTION_FUNCTIONS["sdpa"] is sdpa_attention_forward


def test_attention_takes_masks_that_are_the_same_for_all_rows(tiny: Target) -> None:
    ids = torch.tensor([[5, 6, 7, 8]])
    mask = torch.tensor([[[[0.0, -1.0, -2.0, 0.0]]]])
    masks = dict.fromkeys(set(tiny.config.layer_types), mask)
    with torch.no_grad():
        stock = tiny.model(ids, attention_mask=masks).logits
        with fast_kernels(tiny.model):
            assert (tiny.model(ids, attention_mask=masks).logits - stock).abs().max() < 1e-5


@pytest.mark.usefixtures("other_forms")
def test_weights_that_are_exchanged_within_are_used() -> None:
    model = make_target("gemma4").model
    with fast_kernels(model), torch.no_grad():
        model.lm_head.weight = nn.Parameter(torch.zeros_like(model.lm_head.weight))
        assert not model(torch.tensor([[5, 6, 7]])).logits.any()


@pytest.mark.parametrize("decoding_config", [None, ExactDecoding()], ids=["stock", "exact"])
def test_decoding_leaves_nothing_behind(
    tiny: Target, decoding_config: ExactDecoding | None
) -> None:
    """The contexts of target and head end in the reverse order, whichever began within which."""
    head = noisy_head(tiny).assistant
    decode(tiny, [5, 6, 7], 8, head, 2, decoding_config)
    with exact_decoding(tiny.model):
        head.generation_config.num_assistant_tokens = 2
        tiny.model.generate(torch.tensor([[5, 6, 7]]), max_new_tokens=8, assistant_model=head)
    assert ALL_ATTENTION_FUNCTIONS["sdpa"] is sdpa_attention_forward
    assert not replaced(tiny.model)
    assert not replaced(head)


def test_the_lm_head_is_given_rows_without_gaps(target: Target) -> None:
    """A prefill's last row has the stride of its sequence, though it passes for contiguous."""
    seen: list[tuple[int, ...]] = []
    head = target.model.get_output_embeddings()
    ids = torch.tensor([[5, 6, 7, 8]])

    def run() -> None:
        # After the hook of `fast_kernels`: it sees what the layer is given.
        note = head.register_forward_pre_hook(lambda module, args: seen.append(args[0].stride()))
        with torch.no_grad():
            target.model(ids, logits_to_keep=1)
        note.remove()

    width = target.config.hidden_size
    with fast_kernels(target.model):
        run()
    assert seen == [(width, width, 1)]
    run()
    # Where layers share keys the row was cut out before them.
    alone = CUTS_ROWS and getattr(target.config, "num_kv_shared_layers", 0) > 0
    gap = width if alone else 4 * width
    assert seen[1] == (gap, width, 1), "transformers mends it: _rows_without_gaps can go"


@pytest.mark.parametrize("vocabulary", [7, 96, 3 * kernels.BLOCK, 3 * kernels.BLOCK + 64])
def test_the_best_token_is_the_first_of_equals(vocabulary: int) -> None:
    torch.manual_seed(0)
    for logits in (torch.randn(50, vocabulary), torch.randint(3, (50, vocabulary)).bfloat16()):
        first = (logits == logits.amax(-1, keepdim=True)).long().cumsum(-1).clamp_max(1).sum(-1)
        assert torch.equal(best_tokens(logits), vocabulary - first)


IDS = torch.zeros(20, 1, dtype=torch.long)  # which top-k and top-p do not read


def rows_of_logits(vocabulary: int) -> torch.Tensor:
    """[6, V] in bfloat16's steps, so that many are equal."""
    torch.manual_seed(0)
    logits = (3 * torch.randn(6, vocabulary)).bfloat16().float()
    logits[0, : 2 * kernels.BLOCK] = logits[0].max() + 1  # more equals than top-k asks for
    logits[1] = -torch.inf
    logits[1, 7] = 0.0
    logits[2, vocabulary // 2 :] = -torch.inf
    logits[3] = 1.0
    return logits


VOCABULARIES = [kernels.BLOCK, (kernels.FEW + 4) * kernels.BLOCK, 3 * kernels.BLOCK + 1]


@pytest.mark.parametrize("vocabulary", VOCABULARIES)
@pytest.mark.parametrize("top_k", [1, 5, 64, 1000])
def test_top_k_keeps_the_tokens_that_transformers_keeps(top_k: int, vocabulary: int) -> None:
    if top_k > vocabulary:
        top_k = vocabulary
    logits = rows_of_logits(vocabulary)
    expected = TopKLogitsWarper(top_k, -7.0)(IDS, logits)
    assert torch.equal(kernels.QuickTopK(top_k, -7.0)(IDS, logits), expected)


@pytest.mark.parametrize("vocabulary", VOCABULARIES)
@pytest.mark.parametrize("top_k", [1, 5, 64, None])
@pytest.mark.parametrize("top_p", [0.0, 0.3, 0.95, 1.0])
def test_top_p_keeps_the_tokens_that_transformers_keeps(
    top_k: int | None, top_p: float, vocabulary: int
) -> None:
    logits = rows_of_logits(vocabulary)
    if top_k is not None:
        logits = TopKLogitsWarper(top_k)(IDS, logits)
    expected = TopPLogitsWarper(top_p)(IDS, logits)
    found = kernels.QuickTopP(top_p)(IDS, logits)
    # Which of equals goes first, no sort promises.
    assert torch.equal(found.sort().values, expected.sort().values)
    differ = found != expected
    least = expected.masked_fill(expected == -torch.inf, torch.inf).amin(-1, keepdim=True)
    assert torch.equal(logits[differ], least.expand_as(logits)[differ])


def test_a_target_samples_the_same_text_within(tiny: Target) -> None:
    def sampled(**kwargs: Any) -> list[int]:
        torch.manual_seed(0)
        ids = torch.tensor([[5, 6, 7]])
        return tiny.model.generate(ids, do_sample=True, max_new_tokens=16, **kwargs)[0].tolist()

    for shaped in ({"top_k": 20, "top_p": 0.9}, {"top_k": 0, "top_p": 0.9}, {"top_k": 20}):
        outside = sampled(**shaped)
        with fast_kernels(tiny.model):
            made = tiny.model._get_logits_processor(GenerationConfig(do_sample=True, **shaped))
            assert any(type(one) is kernels.QuickTopP for one in made) == ("top_p" in shaped)
            assert any(type(one) is kernels.QuickTopK for one in made) == (shaped["top_k"] > 0)
            assert sampled(**shaped) == outside
        assert "_get_logits_processor" not in tiny.model.__dict__

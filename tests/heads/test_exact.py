"""The exact decoder: clean KV in every round, the target's own text, `generate`'s arguments."""

from concurrent.futures import ThreadPoolExecutor
from functools import partial
from threading import Barrier
from typing import Any

import pytest
import torch
from transformers import GenerationConfig

from headstart.common.versions import CACHE
from headstart.heads.decoder import (
    Constant,
    ExactDecoding,
    Heuristic,
    exact_decoding,
)
from headstart.heads.loading import byte_tokenizer, gemma3_config, random_model
from headstart.heads.ordered import with_clusters
from headstart.heads.saving import OFFSET
from headstart.heads.target import Gemma3ForAssistedDecoding, Target
from headstart.heads.unroll import DraftHead
from tests.helpers.heads import greedy_document, order_by_target, overfit
from tests.helpers.models import make_target

pytestmark = [pytest.mark.contract, pytest.mark.usefixtures("other_forms")]
K = 3
FAMILIES = ["gemma3", "gemma4-kv-sharing", "gemma4-multimodal", "gemma4-unified"]


def generate(target: Target, ids: list[int], new: int, **kwargs: Any) -> list[int]:
    prompt = torch.tensor([ids])
    settings = {"do_sample": False, "max_new_tokens": new, "pad_token_id": 0} | kwargs
    output = target.model.generate(prompt, **{"attention_mask": torch.ones_like(prompt)} | settings)
    return output[0, len(ids) :].tolist()


def half_trained_head(target: Target, clusters: int | None = None) -> Any:
    """A head that is accepted now and then on the text that it was trained on."""
    head = overfit(target, greedy_document(target)[1], steps=25, rounds=K).eval()
    if clusters:
        head = DraftHead(with_clusters(head.assistant, clusters, 4))
        order_by_target(head.assistant, target, target.table)
    head.assistant.generation_config = GenerationConfig(num_assistant_tokens=K)
    return head.assistant


@pytest.mark.parametrize(
    "settings",
    [
        {"repetition_penalty": 1.5},
        {"no_repeat_ngram_size": 2, "min_new_tokens": 20},
        {"eos_token_id": list(range(4, 60))},
        {"max_new_tokens": 1},
        {"max_new_tokens": 2},
    ],
    ids=str,
)
def test_settings_of_generate_hold(tiny: Target, settings: dict[str, Any]) -> None:
    assistant, ids = half_trained_head(tiny), greedy_document(tiny)[0]
    plain = generate(tiny, ids, 30, **settings)
    with exact_decoding(tiny.model):
        assert generate(tiny, ids, 30, assistant_model=assistant, **settings) == plain


def test_contexts_that_overlap_decode_exactly_each_and_leave_nothing(tiny: Target) -> None:
    """As those of a server's threads: the one that began first may end first."""
    assistant, ids = half_trained_head(tiny), greedy_document(tiny)[0]
    first, second = ExactDecoding(), ExactDecoding()
    contexts = [exact_decoding(tiny.model, how) for how in (first, second)]
    for context in contexts:
        context.__enter__()
    contexts[0].__exit__(None, None, None)
    plain = generate(tiny, ids, 20)
    assert generate(tiny, ids, 20, assistant_model=assistant) == plain
    assert second.rounds
    assert not first.rounds
    contexts[1].__exit__(None, None, None)
    assert not {"_get_candidate_generator", "_get_logits_processor"} & tiny.model.__dict__.keys()
    with exact_decoding(tiny.model, first), exact_decoding(tiny.model, second):
        pass
    assert "_get_candidate_generator" not in tiny.model.__dict__


def test_each_thread_drafts_by_the_contexts_that_it_is_in(tiny: Target) -> None:
    """Another's may be of other settings; a thread without its own takes the newest."""
    assistant, ids = half_trained_head(tiny), greedy_document(tiny)[0]
    settings = [ExactDecoding(Constant(k)) for k in (1, K)]
    entered = Barrier(3, timeout=60)

    def decode(how: ExactDecoding) -> None:
        with exact_decoding(tiny.model, how):
            entered.wait()
            entered.wait()  # the thread without a context has decoded
            generate(tiny, ids, 20, assistant_model=assistant)
            entered.wait()

    with ThreadPoolExecutor(2) as threads:
        running = [threads.submit(decode, how) for how in settings]
        entered.wait()
        generate(tiny, ids, 20, assistant_model=assistant)
        assert bool(settings[0].rounds) != bool(settings[1].rounds)
        for how in settings:
            how.rounds.clear()
        entered.wait()
        entered.wait()
        for one in running:
            one.result()
    drafted = [max(len(r.drafts.tokens) for r in how.rounds) for how in settings]
    assert drafted == [1, K]


@pytest.mark.parametrize("offset", [0, -1, "mixed"])
def test_drafts_stand_where_they_stood_in_training_unless_told_otherwise(
    tiny: Target, offset: Any
) -> None:
    assistant, ids = half_trained_head(tiny), greedy_document(tiny)[0]
    setattr(assistant.config, OFFSET, offset)
    places = []
    for how in (ExactDecoding(), ExactDecoding(draft_position_offset=-1 if offset == -1 else 0)):
        with exact_decoding(tiny.model, how):
            generate(tiny, ids, 20, assistant_model=assistant)
        places.append([r.drafts.tokens for r in how.rounds])
    assert places[0] == places[1]


def test_a_lookup_within_contexts_of_two_settings_is_transformers_own(tiny: Target) -> None:
    ids = greedy_document(tiny)[0]
    plain = generate(tiny, ids, 12)
    with exact_decoding(tiny.model), exact_decoding(tiny.model):
        assert generate(tiny, ids, 12, prompt_lookup_num_tokens=3) == plain


def test_tokens_stream_as_they_come(tiny: Target) -> None:
    class Collect:
        def __init__(self) -> None:
            self.tokens: list[int] = []
            self.ended = False

        def put(self, value: torch.Tensor) -> None:
            self.tokens += value.flatten().tolist()

        def end(self) -> None:
            self.ended = True

    assistant, ids, streamer = half_trained_head(tiny), greedy_document(tiny)[0], Collect()
    with exact_decoding(tiny.model):
        text = generate(tiny, ids, 20, assistant_model=assistant, streamer=streamer)
    assert streamer.tokens == ids + text
    assert streamer.ended


@pytest.mark.parametrize("family", FAMILIES)
def test_padding_at_the_left_changes_no_round(family: str) -> None:
    """The head sees no padding, and counts positions without it, as in training."""
    target = make_target(family)
    assistant, ids = half_trained_head(target), greedy_document(target)[0]
    rounds = []
    for padding in (0, 5):
        how = ExactDecoding()
        mask = torch.tensor([[0] * padding + [1] * len(ids)])
        with exact_decoding(target.model, how):
            generate(
                target, [0] * padding + ids, 20, assistant_model=assistant, attention_mask=mask
            )
        rounds.append([(r.drafts.tokens, r.accepted) for r in how.rounds])
    assert rounds[0] == rounds[1]
    assert any(accepted for _, accepted in rounds[0])


@pytest.mark.parametrize("window", [8, 64])
def test_assisted_decoding_from_the_cache_of_a_turn_before_is_wrong_and_refused_here(
    window: int,
) -> None:
    """Of the loop, whoever drafts, within the sliding window too. When this fails transformers has
    mended it: update docs/upstream.md."""
    config = gemma3_config(sliding_window=window)
    build = partial(Gemma3ForAssistedDecoding, config)
    target = Target(random_model(build), byte_tokenizer(), "turns")
    assistant, ids = half_trained_head(target), greedy_document(target)[0]
    prompt, settings = torch.tensor([ids]), {"do_sample": False, "max_new_tokens": 14}

    def again(**second: Any) -> bool:
        first = target.model.generate(prompt, return_dict_in_generate=True, **settings)
        text = [*first.sequences[0].tolist(), 9, 8, 7]
        found = generate(target, text, 14, **{CACHE: first[CACHE]}, **second)
        return found == generate(target, text, 14)

    assert again()
    assert not again(assistant_model=assistant)
    with exact_decoding(target.model), pytest.raises(ValueError, match="its whole text"):
        again(assistant_model=assistant)


def test_the_stock_generator_is_back_afterwards(tiny: Target) -> None:
    own = tiny.model._get_candidate_generator
    with exact_decoding(tiny.model):
        outer = tiny.model._get_candidate_generator
        with exact_decoding(tiny.model):
            assert tiny.model._get_candidate_generator != outer
        assert tiny.model._get_candidate_generator == outer != own
    assert tiny.model._get_candidate_generator == own


@pytest.mark.parametrize("setting", [{"stop_strings": ["e"]}, {"guidance_scale": 1.7}], ids=str)
def test_what_assisted_decoding_would_write_otherwise_is_refused(
    tiny: Target, setting: dict[str, Any]
) -> None:
    assistant, given = half_trained_head(tiny), setting | {"tokenizer": tiny.tokenizer}
    with exact_decoding(tiny.model), pytest.raises(ValueError, match=next(iter(setting))):
        generate(tiny, [5, 6, 7], 4, assistant_model=assistant, **given)
    assert generate(tiny, [5, 6, 7], 4, **given), "plain decoding takes it"


def test_a_head_that_says_no_length_is_refused(tiny: Target) -> None:
    assistant = half_trained_head(tiny)
    assistant.generation_config.num_assistant_tokens = None
    with exact_decoding(tiny.model), pytest.raises(ValueError, match="set num_assistant_tokens"):
        generate(tiny, [5, 6, 7], 4, assistant_model=assistant)


def test_the_stock_decoder_ignores_what_ends_a_draft(tiny: Target) -> None:
    """When this fails transformers has mended it: update docs/upstream.md."""
    assistant, ids = half_trained_head(tiny), greedy_document(tiny)[0]
    assistant.generation_config = GenerationConfig(
        num_assistant_tokens=K,
        num_assistant_tokens_schedule="heuristic",
        assistant_confidence_threshold=0.999,
    )
    drafted: list[int] = []
    handle = assistant.register_forward_pre_hook(
        lambda module, args, kwargs: drafted.append(int(kwargs["position_ids"])), with_kwargs=True
    )
    generate(tiny, ids, 30, assistant_model=assistant)
    handle.remove()
    rounds = [drafted.count(position) for position in dict.fromkeys(drafted)]
    assert set(rounds[:-1]) == {K}, "drafts of all rounds but the last, which the text's end cuts"
    how = ExactDecoding(Heuristic(K))
    with exact_decoding(tiny.model, how):
        generate(tiny, ids, 30, assistant_model=assistant)
    assert {len(r.drafts.tokens) for r in list(how.rounds)[:-1]} != {K}


def test_rounds_are_those_of_a_decoder_that_recomputes_everything(tiny: Target) -> None:
    """A plain loop of draft, verify, accept: no cache, no masks, no class of ours but the head."""
    assistant = half_trained_head(tiny)
    ids, how = greedy_document(tiny)[0], ExactDecoding()
    with exact_decoding(tiny.model, how):
        text = ids + generate(tiny, ids, 30, assistant_model=assistant)

    def said(tokens: list[int]) -> list[int]:
        with torch.no_grad():
            return tiny.model(torch.tensor([tokens]), use_cache=False).logits[0].argmax(-1).tolist()

    written = [*ids, said(ids)[-1]]
    accepted = []
    while len(written) < len(text):
        seen = tiny.activations(torch.tensor([written[:-1]]))
        drafts: list[int] = []
        hidden = seen.hidden[:, -1:]
        window = assistant.config.text_config.sliding_window + 1
        kept = {"full_attention": len(written), "sliding_attention": window}
        for _ in range(min(K, len(text) - len(written) - 1)):
            newest = torch.tensor([[([written[-1], *drafts])[-1]]])
            with torch.no_grad():
                outputs = assistant(
                    inputs_embeds=torch.cat([tiny.embed(newest), hidden], dim=-1),
                    position_ids=torch.tensor([[len(written) - 1]]),
                    shared_kv_states={
                        t: (k[:, :, -kept[t] :], v[:, :, -kept[t] :])
                        for t, (k, v) in seen.shared_kv.items()
                    },
                )
            hidden = outputs.last_hidden_state
            drafts.append(int(outputs.logits[0, -1].argmax()))
        own = said(written + drafts)[len(written) - 1 :]
        right = 0
        while right < len(drafts) and drafts[right] == own[right]:
            right += 1
        written += own[: right + 1]
        accepted.append((drafts, right))
    assert written == text
    assert [(r.drafts.tokens, r.accepted) for r in how.rounds] == accepted
    assert 0 < sum(n for _, n in accepted) < K * len(accepted)

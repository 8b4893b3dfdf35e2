"""What holds for every kind of head: those of `head_kinds()`, and that of docs/how-to/new-head.md,
whose code is taken from the page. A new kind joins by its name.
"""

import importlib.util
import json
import os
import re
import signal
import sys
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, GenerationConfig

from headstart.common.signals import Interrupted
from headstart.configs.loader import load_settings
from headstart.configs.schema import HeadConfig
from headstart.eval.decoding import decode
from headstart.heads import kinds
from headstart.heads.decoder import (
    Constant,
    CostRule,
    DraftLength,
    ExactDecoding,
    Heuristic,
    Lookup,
    exact_decoding,
)
from headstart.heads.describe import describe
from headstart.heads.drafting import Drafter
from headstart.heads.kinds import (
    DraftState,
    Verified,
    head_kinds,
    inputs_of,
    kind_of,
    runs_in_transformers,
)
from headstart.heads.ordered import with_clusters
from headstart.heads.pairing import build_assistant, check_pair, head_config
from headstart.heads.saving import load_assistant, load_assistant_config, save_assistant
from headstart.heads.target import Target
from headstart.heads.unroll import DraftHead
from headstart.train import step as step_module
from headstart.train.adapt import adapt
from headstart.train.adaptation import adapt_defaults
from headstart.train.plan import plan
from headstart.train.run import run, train
from tests.helpers.checkpoints import make_adapter
from tests.helpers.heads import greedy_document, order_by_target, overfit
from tests.helpers.import_graph import import_graph
from tests.helpers.models import FAMILIES, make_target
from tests.helpers.runs import ROOT, SHORT, metrics, publish, tiny_config, weights
from tests.helpers.stock import training_logits

pytestmark = pytest.mark.usefixtures("other_forms", "kind_of_the_page")
PAGE = ROOT / "docs" / "how-to" / "new-head.md"
KINDS = [*head_kinds(), "hydra"]
K = 3
contract = pytest.mark.contract
each_kind = pytest.mark.parametrize(
    "kind", [pytest.param(kind, marks=[contract] if kind == "assistant" else []) for kind in KINDS]
)
# What other releases of transformers have to hold to: the native kind with each family, and the
# others with one.
each_kind_and_family = pytest.mark.parametrize(
    ("kind", "family"),
    [
        pytest.param(
            kind, family,
            marks=[contract] if kind == "assistant" or family == "gemma4-kv-sharing" else [],
        )
        for kind in KINDS for family in FAMILIES
    ],
)  # fmt: skip


@pytest.fixture(scope="module")
def kind_of_the_page(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """The page's first block of Python, as a file that somebody imports."""
    [code, *_] = re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)
    file = tmp_path_factory.mktemp("page") / "hydra.py"
    file.write_text(code, encoding="utf-8")
    spec = importlib.util.spec_from_file_location("hydra", file)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kinds, "_registered", {})
        patch.setitem(sys.modules, "hydra", module)
        spec.loader.exec_module(module)
        yield


def test_what_trains_and_evaluates_knows_no_kind() -> None:
    """Each costs its own file alone; that of the page is no part of the package."""
    files = {f"heads/{name}" for name in kinds.BUILT_IN}
    graph = import_graph()
    assert files <= graph.keys()
    common = ("train/", "eval/", "cli/", "data/")
    assert [name for name in graph if name.startswith(common) and files & set(graph[name])] == []


def generate(target: Target, ids: list[int], new: int, **kwargs: Any) -> list[int]:
    prompt = torch.tensor([ids])
    settings = {"do_sample": False, "max_new_tokens": new, "pad_token_id": 0} | kwargs
    output = target.model.generate(prompt, attention_mask=torch.ones_like(prompt), **settings)
    return output[0, len(ids) :].tolist()


def half_trained_head(target: Target, kind: str, clusters: int | None = None) -> Any:
    """A head that is accepted now and then on the text that it was trained on."""
    text = greedy_document(target)[1]
    head = overfit(target, text, steps=100, rounds=K, kind=kind).eval()
    if clusters:
        head = DraftHead(with_clusters(head.assistant, clusters, 4))
        order_by_target(head.assistant, target, target.table)
    head.assistant.generation_config = GenerationConfig(num_assistant_tokens=K)
    return head.assistant


@each_kind_and_family
@torch.no_grad()
def test_drafts_of_the_decoder_equal_the_training_rows(
    kind: str, family: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Within and beyond the sliding window, after rejections and without: the logits of each draft
    are those of the parallel training forward over clean activations."""
    target = make_target(family)
    with torch.enable_grad():
        assistant = half_trained_head(target, kind)
    recorded: list[list[torch.Tensor]] = []  # of each round
    own, draft = Drafter._logits, Drafter.draft

    def record(self: Drafter, state: torch.Tensor) -> Any:
        logits, ids = own(self, state)
        recorded[-1].append(logits.clone())
        return logits, ids

    def begin(*args: Any, **kwargs: Any) -> Any:
        recorded.append([])
        return draft(*args, **kwargs)

    monkeypatch.setattr(Drafter, "_logits", record)
    monkeypatch.setattr(Drafter, "draft", begin)
    ids, how = greedy_document(target)[0], ExactDecoding()
    with exact_decoding(target.model, how):
        text = ids + generate(target, ids, 40, assistant_model=assistant)
    accepted = [r.accepted for r in how.rounds]
    assert {0} < set(accepted), "some drafts have to be accepted, some rejected"
    layers, length = inputs_of(assistant.config).layers, len(ids) + 1
    seen = target.activations(torch.tensor([text]), layers=layers)
    for r in how.rounds:
        drafted = r.drafts.tokens
        if not drafted:
            assert length == len(text) - 1, "only the last token leaves no room for a draft"
            break
        fed = torch.tensor([[text[length - 1], *drafted[:-1]]])
        row = torch.tensor([length - 2])
        wanted = training_logits(target, DraftHead(assistant), seen, row, fed)[:, 0]
        found = torch.stack(recorded.pop(0)[: len(drafted)])  # those after a stop are cut off
        torch.testing.assert_close(found, wanted, atol=1e-4, rtol=1e-5)
        length += r.accepted + 1
    assert not recorded


@each_kind
def test_checkpointed_activations_give_the_same_gradients(kind: str, tiny: Target) -> None:
    text = greedy_document(tiny)[1].ids
    head = DraftHead(build_assistant(tiny, HeadConfig(kind=kind), K)).train()
    seen = tiny.activations(text[None], layers=head.inputs.layers)
    rows = torch.arange(3, 9)
    fed = torch.stack([text[rows + k] for k in range(1, K + 1)], dim=1)
    found = []
    for checkpointed in (False, True):
        if checkpointed:
            head.assistant.gradient_checkpointing_enable({"use_reentrant": False})
        head.zero_grad()
        training_logits(tiny, head, seen, rows, fed).logsumexp(-1).sum().backward()
        found.append({n: p.grad for n, p in head.named_parameters() if p.grad is not None})
    assert found[0]
    torch.testing.assert_close(found[0], found[1])


def see(target: Target, drafter: Drafter, state: DraftState, ids: torch.Tensor, *ends: int) -> None:
    """Let a state see forwards over `ids` [1, T], each from one of the ends to the next."""
    seen = target.activations(ids, layers=drafter.inputs.layers)
    for start, end in pairwise(ends):
        layers = {i: outputs[:, start:end] for i, outputs in seen.layers.items()}
        kv = {t: (k[:, :, :end], v[:, :, :end]) for t, (k, v) in seen.shared_kv.items()}
        state.commit(Verified(ids[:, start:end], seen.hidden[:, start:end], kv, layers))


@each_kind
@torch.no_grad()
def test_a_round_forgets_the_drafts_before_it(kind: str, tiny: Target) -> None:
    """Begun again after another token, and after more of the text in one forward or in several,
    the drafts are those of a state that has seen the text in one and drafted nothing."""
    with torch.enable_grad():
        assistant = half_trained_head(tiny, kind)
    drafter = Drafter(assistant, tiny.model.get_input_embeddings())
    ids = greedy_document(tiny)[1].ids[None]

    def drafted(state: DraftState, token: int) -> torch.Tensor:
        newest = torch.tensor([[token]])
        drafts = drafter.draft(newest, state, K, frozenset(), goes_on=lambda _: True)
        return torch.tensor([drafts.tokens, drafts.confidences])

    def anew(end: int, token: int) -> torch.Tensor:
        state = drafter.new_text()
        see(tiny, drafter, state, ids, 0, end)
        return drafted(state, token)

    right = int(ids[0, 9])
    for more in ((9, 14), (9, 10, 14)):
        state = drafter.new_text()
        see(tiny, drafter, state, ids, 0, 9)
        for token in (5, 7, right, 5, right):
            torch.testing.assert_close(drafted(state, token), anew(9, token))
        see(tiny, drafter, state, ids, *more)
        for token in (8, 5):
            torch.testing.assert_close(drafted(state, token), anew(14, token))


RULES: list[DraftLength | None] = [
    None, Constant(2), Heuristic(4), CostRule(0.1, [1, 1.1, 1.15, 1.2, 1.25]),
]  # fmt: skip


@each_kind_and_family
def test_greedy_text_is_that_of_plain_decoding(kind: str, family: str) -> None:
    """In float32, with every rule, dense and through clusters, the text looked up or not."""
    target = make_target(family)
    prompts = [greedy_document(target)[0], [5] * 13]
    plain = [generate(target, ids, 40) for ids in prompts]
    for clusters in (None, 20):
        assistant, accepted = half_trained_head(target, kind, clusters), 0
        for rule in RULES:
            how = ExactDecoding(rule, Lookup(rule) if isinstance(rule, CostRule) else None)
            with exact_decoding(target.model, how):
                for ids, text in zip(prompts, plain, strict=True):
                    assert generate(target, ids, 40, assistant_model=assistant) == text
            accepted += sum(r.accepted for r in how.rounds)
        assert accepted > 0, "a head that is never accepted makes this test empty"


@each_kind
def test_padding_at_the_left_changes_no_text(kind: str, tiny: Target) -> None:
    assistant, ids = half_trained_head(tiny, kind), greedy_document(tiny)[0]
    prompt = torch.tensor([[0] * 5 + ids])
    mask = (torch.arange(prompt.shape[1])[None] >= 5).long()
    settings = {"attention_mask": mask, "max_new_tokens": 30, "pad_token_id": 0}
    texts = {}
    for name, padded in (("no padding", False), ("padding", True)):
        how = ExactDecoding()
        with exact_decoding(tiny.model, how):
            if padded:
                text = tiny.model.generate(prompt, assistant_model=assistant, **settings)
                texts[name] = text[0, prompt.shape[1] :].tolist()
            else:
                texts[name] = generate(tiny, ids, 30, assistant_model=assistant)
    assert texts["padding"] == texts["no padding"]


@each_kind
@pytest.mark.parametrize("family", ["gemma3", "gemma4-kv-sharing", "gemma4-moe"])
def test_a_head_overfitted_on_one_text_is_always_accepted(
    kind: str, family: str, tmp_path: Path
) -> None:
    """As saved and loaded again."""
    target = make_target(family)
    prompt, document = greedy_document(target)
    head = overfit(target, document, steps=500, rounds=K, kind=kind)
    save_assistant(head.assistant, head.table(target.table), tmp_path / "h", K, torch.float32)
    assistant = load_assistant(tmp_path / "h", torch.float32)
    counts = decode(target, prompt, 22, assistant, K, ExactDecoding()).counts(len(prompt), K)
    assert counts.acceptance_rate == 1.0


@each_kind
@pytest.mark.parametrize("width", [None, 32])
def test_a_saved_head_describes_itself(kind: str, width: int | None, tmp_path: Path) -> None:
    """Plain transformers loads it by its config.json, with the same tensors and the table that a
    narrow head's projection makes."""
    target = make_target("gemma4")
    built = build_assistant(target, HeadConfig(kind=kind, hidden_size=width), K)
    head = DraftHead(built, None if width is None else torch.randn(48, width))
    table = head.table(target.table)
    save_assistant(built, table, tmp_path / "head", K, torch.float32)
    config = load_assistant_config(tmp_path / "head")
    assert kind_of(config).name == kind
    loaded: Any = AutoModelForCausalLM.from_pretrained(tmp_path / "head")
    assert type(loaded) is type(built)
    assert loaded.generation_config.num_assistant_tokens == K
    assert torch.equal(loaded.lm_head.weight, table)
    tables = kind_of(config).tables
    for name, tensor in built.state_dict().items():
        assert name in tables or torch.equal(loaded.state_dict()[name], tensor), name
    check_pair(target, load_assistant(tmp_path / "head", torch.float32))
    figures = describe(tmp_path / "head", target.config)
    own = sum(p.numel() for p in head.trainable().values())
    assert figures["kind"] == kind
    assert figures["parameters_trained"] == own
    loaded.config.backbone_hidden_size += 1
    with pytest.raises(ValueError, match="backbone_hidden_size"):
        check_pair(target, loaded)


@each_kind
def test_a_position_is_refused_where_drafts_stand_at_none(kind: str, tmp_path: Path) -> None:
    """Before the target answers anything. An adaptation asks for what the head was trained with."""
    config = tiny_config(tmp_path, f"head.kind={kind}", "train.draft_position_offset=-1")
    has_position = head_kinds()[kind].has_position
    if not has_position:
        with pytest.raises(ValueError, match="draft_position_offset=-1: drafts of the kind"):
            train(config)
        assert not list(tmp_path.glob("**/*.safetensors"))
    target = make_target("gemma3")
    head = DraftHead(build_assistant(target, HeadConfig(kind=kind), K))
    save_assistant(head.assistant, head.table(target.table), tmp_path / "head", K, torch.float32)
    asked = dict(adapt_defaults(str(tmp_path / "head")))
    assert ("train.draft_position_offset" in asked) == has_position


@each_kind
@pytest.mark.parametrize("narrow", [False, True])
def test_a_run_that_was_killed_ends_as_one_that_was_not(
    kind: str, narrow: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Packed rows, clusters, a low-rank tie: bit for bit the same."""
    overrides = [
        f"head.kind={kind}", "train.max_steps=10", "train.eval_steps=5", "train.save_steps=50",
        "train.max_packed_length=128", "train.multi_step_anchors=8", "eval=null",
        "train.warmup_steps=2", f"data.cache_dir={tmp_path / 'cache'}", "head.centroid_steps=4",
        *(["head.hidden_size=32"] if narrow else []),
    ]  # fmt: skip
    train(tiny_config(tmp_path / "whole", *overrides))
    rate = step_module.learning_rate

    def stop_in_step_4(now: int, *args: Any) -> float:
        if now == 3:
            os.kill(os.getpid(), signal.SIGTERM)
        return rate(now, *args)

    cut = tiny_config(tmp_path / "cut", *overrides)
    with monkeypatch.context() as patch:
        patch.setattr(step_module, "learning_rate", stop_in_step_4)
        with pytest.raises(Interrupted):
            train(cut)
    train(cut, resume=True)
    whole, resumed = weights(tmp_path / "whole"), weights(tmp_path / "cut")
    assert whole.keys() == resumed.keys()
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)
    files = [tmp_path / name / "head" / "model.safetensors" for name in ("whole", "cut")]
    saved = [load_file(file) for file in files]
    assert all(torch.equal(saved[0][name], saved[1][name]) for name in saved[0])
    assert metrics(tmp_path / "cut")[-1]["loss"] == metrics(tmp_path / "whole")[-1]["loss"]


@each_kind
def test_a_run_of_each_kind_is_planned_evaluated_published_and_adapted(
    kind: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """With ordered embeddings, all decoders, the report, the card, and a target that was tuned."""
    monkeypatch.setattr("headstart.eval.draft_cost.COST_TURNS", 1)
    prompts = ROOT / "data" / "prompts" / "text_eval.jsonl"
    cache = f"data.cache_dir={tmp_path / 'cache'}"
    config = tiny_config(
        tmp_path / "run", *SHORT, f"head.kind={kind}", f"eval.prompts={prompts}", cache,
        "eval.decoders=[transformers,exact,cost,hybrid]", "eval.num_assistant_tokens=[2]",
        "train.warmup_steps=1", "head.centroid_steps=4",
    )  # fmt: skip
    planned = plan(config)
    assert planned["head"].startswith(kind)
    inputs = inputs_of(head_config(make_target("gemma4-kv-sharing").config, config.head, K))
    assert ("shared KV from layers" in planned) == inputs.kv
    assert ("the head runs on" in planned["rows a step"]) == inputs.whole_texts
    run(config)
    head = tmp_path / "run" / "head"
    trained = sum(tensor.numel() for tensor in weights(tmp_path / "run").values())
    assert planned["parameters trained"] == f"{trained:,}"
    made = load_assistant_config(head)
    assert made.use_ordered_embeddings
    stock = runs_in_transformers(made)
    page = tmp_path / "page"
    assert publish(tmp_path / "run", "--plan", f"output_dir={page}") == 0
    load_assistant(page, torch.float32)
    card = (page / "README.md").read_text(encoding="utf-8")
    assert "exact_decoding" in card
    assert ("vllm serve" in card) == stock
    report = json.loads((tmp_path / "run" / "eval" / "report.json").read_text(encoding="utf-8"))
    decoders = {result["decoder"] for result in report["results"]}
    assert decoders == {"exact", "cost", "hybrid"} | ({"transformers"} if stock else set())
    capsys.readouterr()

    adapter, out = make_adapter(tmp_path / "lora"), tmp_path / "adapted"
    few = {"path": str(ROOT / "data" / "prompts" / "chat_eval.jsonl"), "limit": 24}
    settings: list[str | tuple[str, Any]] = [
        f"output_dir={out}", "target.name=tiny-gemma4", "target.dtype=float32",
        f"target.adapters={adapter}", "data.prompts=builtin:text_eval", "train.max_steps=4",
        "train.eval_steps=2", "train.warmup_steps=1", "train.likely_tokens=32",
        "train.negatives=32", "train.mixed_precision=no", "data.num_conversations=8",
        "data.validation_conversations=2", "data.max_new_tokens=16",
        "data.max_prompt_tokens=24", "data.teacher_top_k=16",
        ("adapt.general_prompts", few), "adapt.held_out_prompts=4", "adapt.decoded_prompts=2",
        "adapt.budget=5m",
    ]  # fmt: skip
    asked = load_settings(None, settings, adapt_defaults(str(head)))
    adapt(asked, str(head), "cpu", ["headstart", "adapt"])
    assert kind_of(load_assistant_config(out / "run" / "head")).name == kind


@each_kind
def test_a_head_in_bfloat16_keeps_what_no_file_holds(
    kind: str, tiny: Target, tmp_path: Path
) -> None:
    """Rounded frequencies of RoPE turn the queries of drafts away from the keys."""
    head = build_assistant(tiny, HeadConfig(kind=kind), K)
    save_assistant(head, tiny.table, tmp_path / "head", K, torch.float32)
    ours = dict(load_assistant(tmp_path / "head", torch.bfloat16).named_buffers())
    made = dict(type(head).from_pretrained(tmp_path / "head", dtype=torch.bfloat16).named_buffers())
    assert ours.keys() == made.keys()
    for name, buffer in made.items():
        assert ours[name].dtype == buffer.dtype, name
        assert torch.equal(ours[name], buffer), name

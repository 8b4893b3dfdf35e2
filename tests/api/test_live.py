"""The functions on what a script holds in memory: a head comes out, and the model is as it was."""

import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from datasets import Dataset, DatasetDict
from peft import AdaLoraConfig, LoraConfig, get_peft_model
from peft.tuners.lora import LoraLayer
from peft.tuners.tuners_utils import BaseTunerLayer
from transformers import (
    Gemma3ForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from headstart.api import (
    TrainedHead,
    adapt_head,
    clean_kv_decoding,
    evaluate_head,
    publish_head,
    train_head,
)
from headstart.common.machine import natural_dtype
from headstart.common.processes import launch_kept
from headstart.configs.schema import (
    Config,
    DataConfig,
    EvalConfig,
    TargetConfig,
    TrainConfig,
)
from headstart.configs.settings import AdaptConfig, PublishConfig, Settings
from headstart.heads.live import check_model, in_memory
from headstart.heads.loading import (
    byte_tokenizer,
    gemma3_config,
    load_target,
    random_model,
)
from headstart.heads.saving import load_assistant
from headstart.train import loop
from tests.helpers.models import FAMILIES

IDS = torch.tensor([[2, 70, 71, 72, 73, 74]])
ROWS = Dataset.from_list(
    [{"messages": [{"role": "user", "content": letter * 9}]} for letter in "abcdefghijkl"]
)
FEW = Dataset.from_list([{"prompt": letter * 9} for letter in "yz"])
SECTIONS: dict[str, Any] = {
    "data": DataConfig(
        num_conversations=6, validation_conversations=2, max_new_tokens=8, max_prompt_tokens=24,
        generation_batch_size=8, teacher_top_k=16,
    ),
    "train": TrainConfig(
        max_steps=6, eval_steps=6, save_steps=6, warmup_steps=1, batch_size=4, max_anchors=8,
        multi_step_anchors=8, num_speculative_steps=2, likely_tokens=32, negatives=32,
        mixed_precision="no",
    ),
}  # fmt: skip
MEASURED = EvalConfig(
    num_assistant_tokens=[2], decoders=["exact"], max_new_tokens=8, fp32_check_prompts=1
)
QUICK = Config(**SECTIONS, eval=MEASURED)


def plain() -> Any:
    return random_model(lambda: Gemma3ForCausalLM(gemma3_config()))


def tuned(model: PreTrainedModel | None = None, **lora: Any) -> Any:
    """A `PeftModel` whose adapter says something."""
    torch.manual_seed(0)
    chosen = LoraConfig(**{"r": 2, "target_modules": ["q_proj", "up_proj"], **lora})
    wrapped = get_peft_model(plain() if model is None else model, chosen)
    for name, parameter in wrapped.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.3)
    return wrapped


MODELS: dict[str, Callable[[], Any]] = {
    "gemma3": plain,
    "gemma4": lambda: random_model(FAMILIES["gemma4-kv-sharing"]),
    "gemma4-multimodal": lambda: random_model(FAMILIES["gemma4-multimodal"]),
    "peft-gemma3": tuned,
    "peft-gemma4": lambda: tuned(random_model(FAMILIES["gemma4-kv-sharing"])),
}


def left_by_a_trainer(model: Any) -> None:
    """Modes, hooks, forwards, settings and gradients as a trainer may leave them."""
    base = model.get_base_model() if hasattr(model, "peft_config") else model
    model.train()
    base.get_decoder().layers[0].eval()
    base.get_input_embeddings().register_forward_hook(lambda *of: of[2].requires_grad_(True))
    base.get_decoder().layers[1].register_forward_pre_hook(lambda module, args: None)
    stock = base.forward
    base.forward = lambda *args, **kwargs: stock(*args, **kwargs)  # as accelerate's autocast
    base.config.use_cache = False
    base.generation_config.update(repetition_penalty=1.5, num_beams=2)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    trained[0].grad = torch.ones_like(trained[0])
    base.get_decoder().norm.weight.requires_grad_(False)


def state_of(model: Any) -> dict[str, Any]:
    """All of a model that a call could change."""
    found: dict[str, Any] = {"values": {}, "grads": {}}
    for name, module in model.named_modules():
        hooks = {k: dict(v) for k, v in vars(module).items() if "_hooks" in k and v}
        own = {k: id(v) for k, v in vars(module).items() if k in ("forward", "generate")}
        state = None
        if isinstance(module, BaseTunerLayer):
            state = (module.active_adapters, module.merged_adapters, module.disable_adapters)
        found[name] = (
            id(module), type(module), module.training, hooks, own, sorted(vars(module)),
            state,
        )  # fmt: skip
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        found[f"{name}:"] = (
            id(tensor), tensor.data_ptr(), tensor.dtype, tensor.device, tensor.requires_grad,
            id(tensor.grad), tensor._version,
        )  # fmt: skip
        found["values"][name] = tensor.detach().clone()
        found["grads"][name] = None if tensor.grad is None else tensor.grad.clone()
    base = model.get_base_model() if hasattr(model, "peft_config") else model
    found["settings"] = (base.config.to_dict(), base.generation_config.to_dict())
    adapters = getattr(model, "peft_config", {})
    found["adapters"] = {name: config.to_dict() for name, config in adapters.items()}
    return found


def check_same(before: dict[str, Any], after: dict[str, Any]) -> None:
    tensors = [state.pop(name) for name in ("values", "grads") for state in (before, after)]
    assert before == after
    for was, now in zip(tensors[::2], tensors[1::2], strict=True):
        torch.testing.assert_close(now, was, rtol=0, atol=0)


def tokenizer_state(tokenizer: Any) -> tuple[Any, ...]:
    return (
        tokenizer.backend_tokenizer.to_str(),
        tokenizer.special_tokens_map,
        tokenizer.padding_side,
    )


@pytest.fixture(autouse=True)
def no_trainer() -> Iterator[None]:
    """Whatever other tests have told accelerate."""
    with launch_kept():
        yield


@pytest.fixture(autouse=True)
def places(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """Where something might be left: the working folder, that of temporary files, the cache."""
    monkeypatch.setattr("headstart.eval.draft_cost.COST_TURNS", 1)
    found = [tmp_path / "here", tmp_path / "temporary"]
    for folder in found:
        folder.mkdir()
    monkeypatch.chdir(found[0])
    monkeypatch.setattr(tempfile, "tempdir", str(found[1]))
    monkeypatch.setenv("HEADSTART_CACHE", str(tmp_path / "cache"))
    return [*found, tmp_path / "cache"]


@pytest.mark.parametrize("kind", MODELS)
def test_a_model_gets_its_head_and_comes_back_as_it_was(
    kind: str, places: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    model, tokenizer = MODELS[kind](), byte_tokenizer()
    wanted = model.eval().generate(IDS, max_new_tokens=12, do_sample=False)
    left_by_a_trainer(model)
    trainer = Accelerator(mixed_precision="bf16", cpu=True)
    before, its_tokenizer = state_of(model), tokenizer_state(tokenizer)
    numbers = torch.get_rng_state()
    head = train_head(model, tokenizer, ROWS, QUICK, eval_data=FEW)
    report = evaluate_head(model, tokenizer, head, FEW, QUICK)
    assert torch.equal(torch.get_rng_state(), numbers)
    with clean_kv_decoding(model, head) as served:
        text = served.generate(
            IDS, max_new_tokens=12, do_sample=False, num_beams=1, repetition_penalty=1.0
        )
    assert torch.equal(text, wanted), "greedy text stays the model's own, with its adapter active"

    def fails(*args: object, **named: object) -> None:
        raise RuntimeError("in the middle")

    monkeypatch.setattr(loop, "optimizer_step", fails)
    with pytest.raises(RuntimeError, match="in the middle"):
        train_head(model, tokenizer, ROWS, QUICK)
    check_same(before, state_of(model))
    assert tokenizer_state(tokenizer) == its_tokenizer
    assert trainer.mixed_precision == AcceleratorState().mixed_precision == "bf16"
    assert not [path for place in places for path in place.rglob("*")], "nothing was asked for"
    assert head.folder is None
    assert head.report is not None
    prints = [r["environment"]["target_fingerprint"] for r in (head.report, report)]
    assert prints[0] == prints[1]
    assert (lengths := [r["results"][0]["acceptance_length"] for r in (head.report, report)])
    assert lengths[0] == lengths[1], "the head that was returned is the one that was measured"


@pytest.mark.parametrize("kind", MODELS)
def test_a_model_in_memory_is_the_target_that_its_files_would_be(kind: str, tmp_path: Path) -> None:
    model, tokenizer, folders = MODELS[kind](), byte_tokenizer(), []
    wanted = model.eval()(input_ids=IDS).logits
    left_by_a_trainer(model)
    with in_memory(model, tokenizer) as live:
        adapters = list(live.adapters)
        target = load_target(live.name, "float32", adapters=adapters, merge_adapters=False)
        other = load_target(live.name, "bfloat16", adapters=adapters, merge_adapters=False)
    assert torch.equal(target.model(input_ids=IDS).logits, wanted)
    if adapters:
        model.save_pretrained(tmp_path / "lora")
        folders = [str(tmp_path / "lora")]
        model = model.unload()
    # Of what a trainer leaves, the texts that are recorded show nothing.
    model.generation_config.update(repetition_penalty=1.0, num_beams=1)
    for folder in (model, tokenizer):
        folder.save_pretrained(tmp_path / "model")
    loaded = load_target(str(tmp_path / "model"), "float32", adapters=folders, merge_adapters=False)
    assert target.fingerprint == loaded.fingerprint
    folder = str(tmp_path / "model")
    loaded = load_target(folder, "bfloat16", adapters=folders, merge_adapters=False)
    assert other.fingerprint == loaded.fingerprint
    pairs = zip(other.model.named_buffers(), loaded.model.named_buffers(), strict=True)
    for (name, ours), (same, theirs) in pairs:
        assert name == same
        assert torch.equal(ours.to(theirs.dtype), theirs), name


def test_a_head_follows_a_model_that_was_tuned_in_memory(tmp_path: Path) -> None:
    base, tokenizer = plain(), byte_tokenizer()
    head = train_head(base, tokenizer, ROWS, Config(**SECTIONS))
    assert head.report is None
    model = tuned(base)
    before = state_of(model)
    settings = Settings(
        **SECTIONS, adapt=AdaptConfig(budget=5, held_out_prompts=2, decoded_prompts=0)
    )
    adapted = adapt_head(model, tokenizer, ROWS, head, settings, output_dir=tmp_path / "out")
    check_same(before, state_of(model))
    assert adapted.folder == tmp_path / "out"
    assert adapted.report is not None
    assert set(adapted.report["acceptance"]["domain"]) >= {"reference", "unadapted", "adapted"}
    saved = load_assistant(tmp_path / "out" / "run" / "head", torch.float32)
    for name, weight in saved.state_dict().items():
        assert torch.equal(adapted.model.state_dict()[name], weight)
    again = adapt_head(model, tokenizer, ROWS, head, settings, output_dir=tmp_path / "out")
    assert again.report is not None
    assert again.report["acceptance"] == adapted.report["acceptance"], "it went on at its end"
    with torch.no_grad():
        next(p for name, p in model.named_parameters() if "lora_B" in name).mul_(2)
    with pytest.raises(ValueError, match=r"was begun with target\.fingerprint"):
        adapt_head(model, tokenizer, ROWS, head, settings, output_dir=tmp_path / "out")


def test_a_kept_run_is_published_under_a_name_that_others_know(tmp_path: Path) -> None:
    model, tokenizer, run = tuned(), byte_tokenizer(), tmp_path / "run"
    head = train_head(model, tokenizer, ROWS, QUICK, eval_data=FEW, output_dir=run)
    assert head.folder == run
    (folder,) = {tmp_path / "folder"}

    def publish(published: Any, its: Any = model, **options: Any) -> None:
        chosen = PublishConfig(**options)
        publish_head(published, "org/head", its, tokenizer, chosen, output_dir=folder, plan=True)

    with pytest.raises(ValueError, match=r"no repository of the Hub.*publish\.base_models"):
        publish(head)
    with pytest.raises(ValueError, match="is not the target of the report"):
        publish(head, plain(), base_models=["org/tuned"])
    with pytest.raises(ValueError, match="output_dir=DIR"):
        publish(TrainedHead(head.model, head.summary, head.report, None))
    with pytest.raises(ValueError, match="was a model in memory"):
        publish_head(
            run, "org/head", options=PublishConfig(base_models=["org/tuned"]),
            output_dir=folder, plan=True,
        )  # fmt: skip
    publish(run, base_models=["org/tuned"])
    texts = {p.name: p.read_text() for p in folder.rglob("*") if p.suffix in (".md", ".json")}
    assert "org/tuned" in texts["README.md"]
    assert not [name for name, text in texts.items() if "memory:" in text or str(tmp_path) in text]
    load_assistant(folder, torch.float32)


def other_tokenizer() -> PreTrainedTokenizerBase:
    tokenizer = byte_tokenizer()
    tokenizer.bos_token = "<eos>"
    return tokenizer


def merged() -> Any:
    model = tuned()
    model.merge_adapter()
    return model


def scaled() -> Any:
    """As within peft's `rescale_adapter_scale`."""
    model = tuned()
    for layer in model.modules():
        if isinstance(layer, LoraLayer):
            layer.scale_layer(0.5)
    return model


OTHER = Config(target=TargetConfig(name="tiny-gemma4"))
WRONG: dict[str, tuple[Any, Any, Any, Any, str]] = {
    "no model": (7, None, ROWS, QUICK, "a int is no target: give"),
    "wrapped": (torch.nn.Sequential(), None, ROWS, QUICK, "unwrap_model"),
    "other family": (
        GPT2LMHeadModel(GPT2Config(n_layer=1, n_embd=8, n_head=1, vocab_size=320)),
        byte_tokenizer(), ROWS, QUICK, "Supported: gemma3_text",
    ),
    "inside of a PeftModel": (tuned().get_base_model(), None, ROWS, QUICK, "give the PeftModel"),
    "merged for a while": (merged(), byte_tokenizer(), ROWS, QUICK, "call unmerge_adapter"),
    "scaled for a while": (scaled(), byte_tokenizer(), ROWS, QUICK, "leave the context"),
    "one side of the table": (
        tuned(target_modules=["lm_head"]), byte_tokenizer(), ROWS, QUICK, "Tune without lm_head",
    ),
    "no tokenizer": (plain(), None, ROWS, QUICK, "AutoTokenizer.from_pretrained"),
    "other tokenizer": (plain(), other_tokenizer(), ROWS, QUICK, "does not fit the model"),
    "name with tokenizer": ("tiny-gemma3", byte_tokenizer(), ROWS, QUICK, "leave tokenizer out"),
    "no rows": (plain(), byte_tokenizer(), ROWS.select([]), QUICK, "the data has no rows: give"),
    "no data": (plain(), byte_tokenizer(), None, QUICK, "nothing says what to train on: give data"),
    "no split": (plain(), byte_tokenizer(), DatasetDict(train=ROWS), QUICK, "one split"),
    "no column": (
        plain(), byte_tokenizer(), Dataset.from_list([{"a": "b"}]), QUICK, "no recognized column",
    ),
    "no configuration": (plain(), byte_tokenizer(), ROWS, {"seed": 1}, "give headstart.configs"),
    "folder of the configuration": (
        plain(), byte_tokenizer(), ROWS, QUICK.model_copy(update={"output_dir": Path("runs/x")}),
        "give it as the argument output_dir",
    ),
    "two targets": (plain(), byte_tokenizer(), ROWS, OTHER, "target.name is of a target in files"),
}  # fmt: skip


@pytest.mark.parametrize("case", WRONG)
def test_what_is_no_input_is_refused_in_one_line(case: str, places: list[Path]) -> None:
    model, tokenizer, data, config, fix = WRONG[case]
    with pytest.raises(ValueError, match=fix) as error:
        train_head(model, tokenizer, data, config)
    assert "\n" not in str(error.value)
    assert not [path for place in places for path in place.rglob("*")]


def test_factors_that_the_configuration_of_an_adapter_gives_are_no_scaling() -> None:
    adaptive = AdaLoraConfig(target_modules=["q_proj"], init_r=4, lora_alpha=16, total_step=9)
    check_model(get_peft_model(plain(), adaptive))
    patterns = {"alpha_pattern": {"up_proj": 3}, "rank_pattern": {"q_proj": 1}}
    for lora in ({}, {"use_rslora": True}, patterns):
        check_model(tuned(**lora))


def test_a_head_of_another_kind_or_target_is_refused(tmp_path: Path) -> None:
    head = train_head("tiny-gemma4", data=ROWS, config=Config(**SECTIONS)).model
    with pytest.raises(ValueError, match="does not fit"), clean_kv_decoding(plain(), head):
        pass
    with pytest.raises(ValueError, match="does not fit"):
        evaluate_head(plain(), byte_tokenizer(), head, FEW, QUICK)
    with pytest.raises(ValueError, match="is no draft head: give a folder"):
        evaluate_head(plain(), byte_tokenizer(), plain(), FEW, QUICK)


def test_a_model_in_float16_is_taken_in_a_dtype_that_is_run(
    capsys: pytest.CaptureFixture[str],
) -> None:
    """As on GPUs without bfloat16."""
    model = plain().half()
    head = train_head(model, byte_tokenizer(), ROWS, QUICK)
    assert "The model is in float16" in capsys.readouterr().out
    assert {p.dtype for p in model.parameters()} == {torch.float16}
    assert head.model.dtype == getattr(torch, natural_dtype())


def test_a_model_that_has_handed_out_hidden_states_is_taken_like_any_other(
    capsys: pytest.CaptureFixture[str],
) -> None:
    """transformers leaves hooks in it, and a mark that they are there."""
    model, tokenizer = plain(), byte_tokenizer()
    head = train_head(model, tokenizer, ROWS, QUICK).model
    ids = torch.tensor([[5, 6, 7]])
    model(ids, output_hidden_states=True)
    capsys.readouterr()
    with clean_kv_decoding(model, head) as served:
        found = served.generate(ids, assistant_model=head, max_new_tokens=8, do_sample=False)
    assert torch.equal(found, model.generate(ids, max_new_tokens=8, do_sample=False))
    assert "Hooks" not in capsys.readouterr().out

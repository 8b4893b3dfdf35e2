"""A head is evaluated on prompts that are asked as its run asked them."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from headstart.cli.main import main
from headstart.configs.loader import load_config
from headstart.configs.schema import Config
from headstart.configs.settings import ServerConfig
from headstart.data import prepare
from headstart.data.prepare import run_extract, run_regenerate
from headstart.data.prompts import load_prompts
from headstart.data.store import ActivationStore, read_index, write_index
from headstart.data.templates import encode_prompt
from headstart.eval.asked import asked_by_heads, asked_by_run
from headstart.heads.loading import load_target, load_target_config
from headstart.serve import engine_check as serving
from headstart.serve.engine_check import ServeCheck, serve_check
from headstart.train import adapt as adapting
from headstart.train import ordering
from headstart.train.adaptation import Adaptation
from headstart.train.run import run
from tests.helpers.chat_templates import GEMMA4, chat_tokenizer
from tests.helpers.models import make_target
from tests.helpers.runs import ROOT

THINKING = {"enable_thinking": True}
PLAIN = {"enable_thinking": False}
ASKED = "data.chat_template_kwargs={enable_thinking: true}"


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("headstart.eval.draft_cost.COST_TURNS", 1)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A chat target whose template has a switch, prompts to train on, and two held out."""
    folder = tmp_path_factory.mktemp("chat")
    model, tokenizer = make_target("gemma4").model, chat_tokenizer(GEMMA4)
    ends = [1, tokenizer.convert_tokens_to_ids("<turn|>")]
    model.generation_config.eos_token_id = model.config.eos_token_id = ends
    model.save_pretrained(folder / "target")
    tokenizer.save_pretrained(folder / "target")
    for name, words in (("train", "abcdefghijkl"), ("eval", "yz")):
        rows = [{"id": letter, "prompt": letter * 9} for letter in words]
        lines = "".join(json.dumps(row) + "\n" for row in rows)
        (folder / f"{name}.jsonl").write_text(lines)
    return folder


def config_of(folder: Path, run: Path, *overrides: str) -> Config:
    return load_config(ROOT / "configs" / "tiny.yaml", [
        f"output_dir={run}", f"target.name={folder / 'target'}", f"data.cache_dir={run}-cache",
        f"data.prompts={folder / 'train.jsonl'}", f"eval.prompts={folder / 'eval.jsonl'}",
        "train.max_steps=2", "train.warmup_steps=1", "train.eval_steps=2",
        "data.num_conversations=6", "data.validation_conversations=2", "data.max_new_tokens=8",
        "head.use_ordered_embeddings=false", "head.num_centroids=null", "eval.fp32_check_prompts=0",
        "eval.num_assistant_tokens=[2]", "eval.decoders=[exact]", "eval.max_new_tokens=4",
        *overrides,
    ])  # fmt: skip


@pytest.fixture(scope="module")
def thinking(folder: Path) -> Path:
    """A run whose prompts asked the target to think."""
    config = config_of(folder, folder / "thinking", ASKED)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("headstart.eval.draft_cost.COST_TURNS", 1)
        run(config)
    return folder / "thinking"


def lengths(folder: Path, kwargs: dict[str, Any]) -> dict[str, int]:
    """Tokens of the held-out prompts, as the template renders them."""
    tokenizer = load_target(str(folder / "target"), "float32").tokenizer
    prompts = load_prompts(folder / "eval.jsonl")
    return {p.id: len(encode_prompt(p, tokenizer, kwargs)) for p in prompts}


def measured(out: Path) -> dict[str, int]:
    rows = [json.loads(line) for line in (out / "measurements.jsonl").read_text().splitlines()[1:]]
    return {row["id"]: row["turns"][0]["prompt_len"] for row in rows}


def environment(out: Path) -> Any:
    return json.loads((out / "report.json").read_text())["environment"]


def test_train_evaluates_as_it_trained(folder: Path, thinking: Path) -> None:
    assert lengths(folder, THINKING) != lengths(folder, PLAIN)
    assert measured(thinking / "eval") == lengths(folder, THINKING)
    assert environment(thinking / "eval")["chat_template_kwargs"] == THINKING
    assert "enable_thinking=True" in (thinking / "eval" / "report.md").read_text()


def evaluated(folder: Path, out: Path, *heads: object) -> int:
    return main([
        "eval", *map(str, heads), f"target.name={folder / 'target'}", "target.dtype=float32",
        f"eval.prompts={folder / 'eval.jsonl'}", "eval.decoders=exact",
        "eval.num_assistant_tokens=2", "eval.max_new_tokens=4", f"output_dir={out}",
    ])  # fmt: skip


def test_eval_of_a_runs_head_asks_as_the_run(
    folder: Path, thinking: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert evaluated(folder, tmp_path, thinking / "head") == 0
    assert measured(tmp_path) == lengths(folder, THINKING)
    assert environment(tmp_path)["chat_template_kwargs"] == THINKING
    assert "asked as in the run of" in capsys.readouterr().out


def test_an_evaluation_does_not_go_on_with_other_questions(
    folder: Path, thinking: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Nor with other ends of texts."""
    head = thinking / "head"
    assert evaluated(folder, tmp_path, head) == 0
    assert evaluated(folder, tmp_path, head, "--resume") == 0
    assert evaluated(folder, tmp_path, head, "--resume", "target.eos_token_ids=[1, 40]") == 1
    assert "eos_token_ids" in capsys.readouterr().err
    template = tmp_path / "other.jinja"
    template.write_text("{{ bos_token }}{% for m in messages %}{{ m.content }}: {% endfor %}")
    assert evaluated(folder, tmp_path, head, "--resume", f"target.chat_template={template}") == 1
    assert "encoded_sha256" in capsys.readouterr().err


def test_heads_of_runs_that_asked_differently_are_evaluated_one_by_one(
    folder: Path, thinking: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = tmp_path / "other" / "head"
    other.mkdir(parents=True)
    text = (thinking / "config.yaml").read_text()
    (other.parent / "config.yaml").write_text(text.replace("enable_thinking: true", "{}"))
    config = text.replace("chat_template_kwargs:\n    enable_thinking: true", "max_bad_rows: 0.5")
    (other.parent / "config.yaml").write_text(config.replace("  max_bad_rows: 0.01\n", ""))
    assert evaluated(folder, tmp_path / "out", thinking / "head", other) == 1
    assert "one by one" in capsys.readouterr().err
    (other.parent / "config.yaml").write_text("data: {chat_templ")
    assert evaluated(folder, tmp_path / "out", other) == 1
    assert str(other.parent / "config.yaml") in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_prompts_longer_than_in_training_are_counted(folder: Path, tmp_path: Path) -> None:
    run(config_of(folder, tmp_path / "short", "data.max_prompt_tokens=12"))
    out = tmp_path / "short" / "eval"
    assert measured(out) == lengths(folder, {}), "they are measured whole"
    assert environment(out)["longer_than_trained"] == 2
    assert "2 of the prompts are longer" in (out / "report.md").read_text()


def test_adapt_measures_and_decodes_as_the_heads_run_asked(
    folder: Path, thinking: Path, tmp_path: Path
) -> None:
    held_out = [
        "data.num_conversations=4", "data.validation_conversations=1", "data.max_new_tokens=8",
        "train.max_steps=2", "train.warmup_steps=1", "train.eval_steps=2", "train.negatives=32",
        "train.likely_tokens=32", "data.teacher_top_k=16",
    ]  # fmt: skip
    code = main([
        "adapt", str(thinking / "head"), f"target.name={folder / 'target'}",
        "target.dtype=float32", f"data.prompts={folder / 'train.jsonl'}",
        "adapt.held_out_prompts=3", "adapt.decoded_prompts=2", "adapt.budget=5m",
        f"output_dir={tmp_path / 'out'}", *held_out,
    ])  # fmt: skip
    assert code == 0
    found = measured(tmp_path / "out" / "eval")
    tokenizer = load_target(str(folder / "target"), "float32").tokenizer
    prompts = {f"domain-{p.id}": p for p in load_prompts(folder / "train.jsonl")}
    assert found == {name: len(encode_prompt(prompts[name], tokenizer, THINKING)) for name in found}
    content = json.loads((tmp_path / "out" / "adapt.json").read_text())
    assert content["chat_template_kwargs"] == THINKING
    assert "enable_thinking=True" in (tmp_path / "out" / "adapt.md").read_text()


def test_adapt_takes_what_it_is_told_before_what_the_head_was(
    folder: Path, thinking: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found: list[Config] = []

    def seen(a: Adaptation) -> None:
        found.append(a.config)
        raise ValueError("seen")

    monkeypatch.setattr(adapting, "load_kinds", seen)
    command = ["adapt", str(thinking / "head"), f"target.name={folder / 'target'}"]
    command += ["data.prompts=p", f"output_dir={folder / 'none'}"]
    for more in ([], ["data.chat_template_kwargs={enable_thinking: false}"]):
        assert main([*command, *more]) == 1
    assert [c.data.chat_template_kwargs for c in found] == [THINKING, PLAIN]


def test_an_order_is_judged_as_the_heads_run_asked(
    folder: Path, thinking: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found: list[Any] = []
    monkeypatch.setattr(ordering, "prepare_documents", lambda t, data, *_: found.append(data))
    command = ["order", str(thinking / "head"), "head.on_existing_clusters=rebuild"]
    command += ["head.num_centroids=20", "head.centroid_intermediate_top_k=2"]
    command += [f"output_dir={tmp_path / 'out'}", f"target.name={folder / 'target'}"]
    for more in ([], ["data.chat_template_kwargs={enable_thinking: false}"]):
        assert main([*command, *more]) == 1
    assert [data.chat_template_kwargs for data in found] == [THINKING, PLAIN]


def test_a_store_that_was_asked_otherwise_is_evaluated_as_it_was_asked(
    folder: Path, tmp_path: Path
) -> None:
    """`data.store` and the settings of the prompts that made it come from two commands."""
    made = config_of(folder, tmp_path / "store", ASKED)
    run_regenerate(made, ServerConfig(), extracting=True, device="cpu")
    config = config_of(folder, tmp_path / "run", f"data.store={tmp_path / 'store'}")
    run(config)
    assert measured(tmp_path / "run" / "eval") == lengths(folder, THINKING)
    other = {"store": tmp_path / "store", "chat_template_kwargs": {"enable_thinking": 3}}
    with pytest.raises(ValueError, match="leave it out"):
        prepare.template_variables(config.data.model_copy(update=other))
    plain = config_of(folder, tmp_path / "plain")
    run_regenerate(plain, ServerConfig(), extracting=False, device="cpu")
    asked = {"conversations": tmp_path / "plain", "chat_template_kwargs": THINKING}
    with pytest.raises(ValueError, match="was asked with none: leave it out"):
        prepare.template_variables(plain.data.model_copy(update=asked))


def test_an_engine_is_asked_as_the_heads_run_asked(
    folder: Path, thinking: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found: list[list[int]] = []

    def seen(target: object, head: object, check: object, ids: list[list[int]]) -> None:
        found.extend(ids)
        raise ValueError("seen")

    monkeypatch.setattr(serving, "_written", lambda *_: (tmp_path, tmp_path, tmp_path))
    monkeypatch.setattr(serving, "_by_transformers", seen)
    name = str(folder / "target")
    check = ServeCheck("vllm", str(thinking / "head"), 2, 4, True)
    prompts = load_prompts(folder / "eval.jsonl")
    with pytest.raises(ValueError, match="seen"):
        serve_check(
            load_target(name, "float32"), load_target_config(name), check, prompts, tmp_path
        )
    assert [len(ids) for ids in found] == list(lengths(folder, THINKING).values())


@pytest.mark.parametrize("from_folder", [True, False], ids=["of-regenerate", "of-a-file"])
def test_a_store_of_extract_is_evaluated_as_it_was_asked(
    folder: Path, tmp_path: Path, from_folder: bool
) -> None:
    texts = tmp_path / "texts.jsonl"
    rows = [{"id": c, "prompt": c * 9, "response": c * 5} for c in "abcdefghijkl"]
    texts.write_text("".join(json.dumps(row) + "\n" for row in rows))
    made = config_of(folder, tmp_path / "store", ASKED)
    if from_folder:
        texts = tmp_path / "asked"
        asking = config_of(folder, texts, ASKED)
        run_regenerate(asking, ServerConfig(), extracting=False, device="cpu")
        made = config_of(folder, tmp_path / "store")
    run_extract(made, str(texts), "cpu")
    data = config_of(folder, tmp_path / "run", f"data.store={tmp_path / 'store'}").data
    assert asked_by_run(data).chat_template_kwargs == THINKING
    assert ActivationStore(tmp_path / "store").shard(0)
    other = {"store": tmp_path / "store", "chat_template_kwargs": {"enable_thinking": 3}}
    with pytest.raises(ValueError, match="leave it out"):
        asked_by_run(data.model_copy(update=other))


def test_a_store_that_did_not_say_how_it_was_asked_says_so_when_extracted_again(
    folder: Path, tmp_path: Path
) -> None:
    asking = config_of(folder, tmp_path / "texts", ASKED)
    run_regenerate(asking, ServerConfig(), extracting=False, device="cpu")
    store = tmp_path / "store"
    run_extract(config_of(folder, store), str(tmp_path / "texts"), "cpu")
    said = (store / "index.json").read_text()
    index = json.loads(said)
    del index["chat_template_kwargs"], index["sha256"]
    write_index(store, [store / shard["file"] for shard in index["shards"]], {
        key: value for key, value in index.items() if key not in ("shards", "tensors")
    })  # fmt: skip
    assert (store / "index.json").read_text() != said
    run_extract(config_of(folder, store), str(tmp_path / "texts"), "cpu")
    assert json.loads((store / "index.json").read_text()) == json.loads(said)


def test_a_store_asked_without_variables_is_what_it_was(folder: Path, tmp_path: Path) -> None:
    asking = config_of(folder, tmp_path / "texts")
    run_regenerate(asking, ServerConfig(), extracting=False, device="cpu")
    run_extract(config_of(folder, tmp_path / "store"), str(tmp_path / "texts"), "cpu")
    assert "chat_template_kwargs" not in read_index(tmp_path / "store")


def test_a_head_that_was_moved_is_asked_as_its_run_asked(
    folder: Path, thinking: Path, tmp_path: Path
) -> None:
    moved = tmp_path / "moved"
    shutil.copytree(thinking / "head", moved)
    assert evaluated(folder, tmp_path / "out", moved) == 0
    assert measured(tmp_path / "out") == lengths(folder, THINKING)


def test_a_head_whose_store_is_gone_is_asked_as_the_store_was(folder: Path, tmp_path: Path) -> None:
    asking = config_of(folder, tmp_path / "store", ASKED)
    run_regenerate(asking, ServerConfig(), extracting=True, device="cpu")
    run(config_of(folder, tmp_path / "run", f"data.store={tmp_path / 'store'}", "eval=null"))
    shutil.rmtree(tmp_path / "store")
    found = asked_by_heads([str(tmp_path / "run" / "head")])
    assert found.chat_template_kwargs == THINKING


def test_a_head_that_does_not_say_is_asked_as_the_template_has_it(
    folder: Path, thinking: Path, tmp_path: Path
) -> None:
    moved = tmp_path / "moved"
    shutil.copytree(thinking / "head", moved)
    said = json.loads((moved / "config.json").read_text())
    del said["headstart_chat_template_kwargs"]
    (moved / "config.json").write_text(json.dumps(said))
    assert evaluated(folder, tmp_path / "out", moved) == 0
    assert measured(tmp_path / "out") == lengths(folder, {})

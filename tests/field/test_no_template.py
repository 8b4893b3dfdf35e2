"""Chat rows for a target whose tokenizer has no chat template."""

import json
from pathlib import Path

import pytest

from headstart.configs.schema import Config, DataConfig, EvalConfig, TargetConfig
from headstart.data.prepare import encode_source
from headstart.data.prompts import load_prompts
from headstart.data.regenerate import make_jobs
from headstart.data.templates import encode_prompt
from headstart.eval.report import run_evaluation
from headstart.heads.loading import load_target, load_target_tokens
from headstart.heads.tokens import Sampling
from tests.helpers.chat_templates import GEMMA3, chat_tokenizer
from tests.helpers.checkpoints import saved_target

TURNS = [
    {"role": "user", "content": "one"},
    {"role": "assistant", "content": "two"},
    {"role": "user", "content": "three"},
    {"role": "assistant", "content": "four"},
]


@pytest.fixture
def rows(tmp_path: Path) -> str:
    file = tmp_path / "rows.jsonl"
    file.write_text(json.dumps({"messages": TURNS}) + "\n" + json.dumps({"text": "raw"}) + "\n")
    return str(file)


def test_a_base_model_reads_chat_turns_as_plain_text_and_says_so(
    rows: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tokens = load_target_tokens(TargetConfig(name=saved_target(tmp_path / "base")))
    chat, raw = load_prompts(rows)
    make_jobs([raw], [Sampling(0.0)], tokens, DataConfig())
    assert "template" not in capsys.readouterr().out
    [job] = make_jobs([chat], [Sampling(0.0)], tokens, DataConfig())
    assert tokens.tokenizer.decode(job.prompt_ids) == "<bos>one\ntwo\nthree"
    assert "target.chat_template" in capsys.readouterr().out
    encode_source(rows, tokens, Config())
    assert "1 of 2 prompts" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("folder", "generation"),
    [("gemma-4-E2B-it", {}), ("Mine_Instruct.v2", {}), ("x", {"eos_token_id": [1, 262]})],
)
def test_a_chat_model_without_a_template_is_refused_by_all_ways_in(
    folder: str, generation: dict[str, object], rows: str, tmp_path: Path
) -> None:
    tokenizer = chat_tokenizer(GEMMA3)
    assert tokenizer.convert_ids_to_tokens(262) == "<end_of_turn>"
    tokenizer.chat_template = None
    name = saved_target(tmp_path / folder, generation=generation, tokenizer=tokenizer)
    target = load_target(name, "float32")
    prompts = load_prompts(rows)
    with pytest.raises(ValueError, match=r"target\.chat_template"):
        make_jobs(prompts, [Sampling(0.0)] * 2, target, DataConfig())
    with pytest.raises(ValueError, match=r"target\.chat_template"):
        encode_source(rows, target, Config())
    chosen = EvalConfig(prompts=rows, decoders=["lookup"])
    with pytest.raises(ValueError, match=r"target\.chat_template"):
        run_evaluation(target, {}, chosen, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_template_that_is_given_is_used(rows: str, tmp_path: Path) -> None:
    tokenizer = chat_tokenizer(GEMMA3)
    wanted = encode_prompt(load_prompts(rows)[0], tokenizer)
    tokenizer.chat_template = None
    name = saved_target(tmp_path / "mine-it", tokenizer=tokenizer)
    file = tmp_path / "template.jinja"
    with pytest.raises(ValueError, match=r"template\.jinja"):
        load_target_tokens(TargetConfig(name=name, chat_template=file))
    file.write_text(GEMMA3)
    t = TargetConfig(name=name, chat_template=file)
    assert encode_prompt(load_prompts(rows)[0], load_target_tokens(t).tokenizer) == wanted
    target = load_target(name, "float32", chat_template=file)
    assert encode_prompt(load_prompts(rows)[0], target.tokenizer) == wanted

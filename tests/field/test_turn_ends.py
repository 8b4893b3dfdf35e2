"""Chat targets whose end of a turn is none of their end tokens."""

import re
from pathlib import Path

import pytest
import torch
from transformers import PreTrainedTokenizerFast

from headstart.configs.schema import DataConfig, TargetConfig
from headstart.data.prompts import Prompt
from headstart.data.regenerate import answer, make_jobs
from headstart.data.templates import encode_conversation
from headstart.eval.decoding import decode
from headstart.heads.loading import byte_tokenizer, load_target, load_target_tokens
from headstart.heads.tokens import Sampling
from tests.helpers.chat_templates import GEMMA3, GEMMA4, chat_tokenizer
from tests.helpers.checkpoints import saved_target

CHATML = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
ASKED = Prompt("p", "c", "s", [{"role": "user", "content": "abc"}], raw=False)


def chatml_tokenizer(special: bool) -> PreTrainedTokenizerFast:
    tokenizer = byte_tokenizer()
    if special:
        tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    tokenizer.chat_template = CHATML
    return tokenizer


TOKENIZERS = {
    "gemma3": (lambda: chat_tokenizer(GEMMA3), "<end_of_turn>"),
    "gemma4": (lambda: chat_tokenizer(GEMMA4), "<turn|>"),
    "chatml": (lambda: chatml_tokenizer(True), "<|im_end|>"),
}


@pytest.mark.parametrize("generation", [None, {}, {"eos_token_id": [1]}])
@pytest.mark.parametrize("kind", TOKENIZERS)
def test_a_text_ends_with_the_turn(
    kind: str,
    generation: dict[str, object] | None,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """As the target writes it, alone and as training text; a line says that it was added."""
    make, end = TOKENIZERS[kind]
    tokenizer = make()
    token = tokenizer.convert_tokens_to_ids(end)
    folder = saved_target(tmp_path, generation=generation, tokenizer=tokenizer)
    assert load_target_tokens(TargetConfig(name=folder)).eos_ids == [1, token]
    assert end in capsys.readouterr().out
    target = load_target(folder, "float32")
    [job] = make_jobs([ASKED], [Sampling(0.0)], target, DataConfig())
    # The target comes to end its turn: its final state then points at the row of that token.
    with torch.no_grad():
        first = int(target.model(torch.tensor([job.prompt_ids])).logits[0, -1].argmax())
        written = [*job.prompt_ids, first]
        hidden = target.activations(torch.tensor([written])).hidden[0, -1]
        target.table[token] = 10 * hidden / hidden.norm()
    assert answer(target, [job], 12, 0, None)[0][-1] == token
    assert decode(target, job.prompt_ids, 12).tokens[-1] == token


@pytest.mark.parametrize("kind", TOKENIZERS)
def test_end_tokens_that_a_user_gives_are_refused_without_the_turns_own(
    kind: str, tmp_path: Path
) -> None:
    make, end = TOKENIZERS[kind]
    tokenizer = make()
    token = tokenizer.convert_tokens_to_ids(end)
    folder = saved_target(tmp_path, tokenizer=tokenizer)
    with pytest.raises(ValueError, match=rf"target\.eos_token_ids.*{token}"):
        load_target_tokens(TargetConfig(name=folder, eos_token_ids=[1]))
    t = TargetConfig(name=folder, eos_token_ids=[token, 7])
    assert load_target_tokens(t).eos_ids == [token, 7]


def test_an_end_that_is_already_named_is_not_said(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tokenizer = chat_tokenizer(GEMMA3)
    end = tokenizer.convert_tokens_to_ids("<end_of_turn>")
    named = {"eos_token_id": [1, end]}
    folder = saved_target(tmp_path, generation=named, tokenizer=tokenizer)
    assert load_target_tokens(TargetConfig(name=folder)).eos_ids == [1, end]
    assert not capsys.readouterr().out


def test_an_end_of_plain_letters_cannot_end_a_text_and_this_is_said(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = saved_target(tmp_path, tokenizer=chatml_tokenizer(False))
    assert load_target_tokens(TargetConfig(name=folder)).eos_ids == [1]
    assert "target.eos_token_ids" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("ends", "named"),
    [
        ([1, 70], "\\(70\\).*no end"),
        ([70], "\\(70\\).*no end"),
        ([1, 0], "'<pad>' .0..*no end"),
        ([2, 1], "'<bos>' .2..*no end"),
        ([1, 3], "'<unk>' .3..*no end"),
        ([1, 0, 2, 70], "'<pad>' .0., '<bos>' .2., .* .70. .*no end"),
    ],
)
@pytest.mark.parametrize("given", [True, False])
def test_end_tokens_that_end_no_text_are_said(
    ends: list[int],
    named: str,
    given: bool,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    folder = saved_target(tmp_path, generation={} if given else {"eos_token_id": ends})
    config = TargetConfig(name=folder, eos_token_ids=ends if given else None)
    assert load_target_tokens(config).eos_ids == ends
    out = capsys.readouterr().out
    assert re.search(named, out)
    assert "target.eos_token_ids" in out
    assert "'<eos>' (1)" not in out


@pytest.mark.parametrize("ends", [[0], [2], [0, 2, 3]])
def test_texts_that_padding_or_a_beginning_alone_would_end_are_refused(
    ends: list[int], tmp_path: Path
) -> None:
    folder = saved_target(tmp_path, generation={"eos_token_id": ends})
    with pytest.raises(ValueError, match=r"no target writes.*generation_config\.json"):
        load_target_tokens(TargetConfig(name=folder))
    assert load_target_tokens(TargetConfig(name=folder, eos_token_ids=[1])).eos_ids == [1]


def test_padding_beside_the_turns_own_end_is_said_and_texts_end_with_the_turn(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tokenizer = chat_tokenizer(GEMMA3)
    end = tokenizer.convert_tokens_to_ids("<end_of_turn>")
    folder = saved_target(tmp_path, generation={"eos_token_id": 0}, tokenizer=tokenizer)
    assert load_target_tokens(TargetConfig(name=folder)).eos_ids == [0, end]
    assert "'<pad>' (0)" in capsys.readouterr().out


def test_a_tokenizer_that_pads_with_its_end_is_right(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tokenizer = byte_tokenizer()
    tokenizer.pad_token = tokenizer.eos_token
    folder = saved_target(tmp_path, generation={}, tokenizer=tokenizer)
    assert load_target_tokens(TargetConfig(name=folder)).eos_ids == [1]
    assert not capsys.readouterr().out


@pytest.mark.parametrize(
    ("ends", "answer", "written"),
    [
        ([260], "yo", "yo<|im_end|>"),
        ([0, 260], "yo", "yo<|im_end|>"),
        ([260], "yo<eos>", "yo<|im_end|>"),
        ([1], "yo", "yo<eos>"),
        ([260, 1], "yo", "yo<eos>"),
        ([260, 1], "yo<eos>", "yo<eos>"),
    ],
)
@pytest.mark.parametrize("raw", [True, False])
def test_a_plain_answer_ends_with_what_ends_the_targets_texts(
    ends: list[int], answer: str, written: str, raw: bool
) -> None:
    tokenizer = byte_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_end|>"]})
    assert tokenizer.convert_tokens_to_ids("<|im_end|>") == 260
    turns = [*ASKED.messages, {"role": "assistant", "content": answer}]
    ids, [(start, end)] = encode_conversation(Prompt("p", "c", "s", turns, raw), tokenizer, ends)
    assert tokenizer.decode(ids) == f"<bos>abc{written}"
    assert tokenizer.decode(ids[start:end]) == written

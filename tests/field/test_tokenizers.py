"""Tokenizers that other programs saved: without <bos>, with <eos>, without padding."""

from collections.abc import Callable
from pathlib import Path

import pytest
from tokenizers import processors
from transformers import PreTrainedTokenizerFast

from headstart.configs.schema import DataConfig, TargetConfig
from headstart.data.prompts import Prompt
from headstart.data.regenerate import answer
from headstart.data.templates import encode_conversation, encode_prompt
from headstart.heads.loading import byte_tokenizer, load_target, load_target_tokens
from tests.helpers.checkpoints import configure, saved_target
from tests.helpers.prompts import jobs

TEXT = Prompt("p", "c", "s", [{"role": "user", "content": "abc"}], raw=True)


def around(single: str, **ids: int) -> Callable[[PreTrainedTokenizerFast], None]:
    """What puts `single` around a text."""

    def change(tokenizer: PreTrainedTokenizerFast) -> None:
        tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
            single=single, special_tokens=list(ids.items())
        )

    return change


CHANGES: dict[str, Callable[[PreTrainedTokenizerFast], None]] = {
    "no <bos>": around("$A"),
    "<eos> at the end": around("<bos> $A <eos>", **{"<bos>": 2, "<eos>": 1}),
    "<eos> alone": around("$A <eos>", **{"<eos>": 1}),
    "<bos> twice": around("<bos> <bos> $A", **{"<bos>": 2}),
    "<eos> in place of <bos>": around("<eos> $A", **{"<eos>": 1}),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_plain_text_begins_with_one_bos_and_ends_with_the_text(
    change: Callable[[PreTrainedTokenizerFast], None],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    tokenizer = byte_tokenizer()
    letters = tokenizer("abc")["input_ids"][1:]
    change(tokenizer)
    folder = saved_target(tmp_path, tokenizer=tokenizer)
    found = load_target_tokens(TargetConfig(name=folder))
    assert "<bos>" in capsys.readouterr().out
    assert encode_prompt(TEXT, found.tokenizer) == [2, *letters]
    ids, spans = encode_conversation(TEXT, found.tokenizer, found.eos_ids)
    assert (ids, spans) == ([2, *letters], [(1, 4)])
    assert load_target(folder, "float32").tokenizer("abc")["input_ids"] == [2, *letters]


def test_a_tokenizer_that_does_not_name_its_bos_has_the_one_of_the_model(tmp_path: Path) -> None:
    folder = saved_target(tmp_path, bos_token_id=2)
    configure(tmp_path, "tokenizer_config.json", bos_token=None, add_bos_token=False)
    found = load_target_tokens(TargetConfig(name=folder))
    assert encode_prompt(TEXT, found.tokenizer)[0] == 2


def test_a_tokenizer_without_padding_pads_with_what_is_masked(tmp_path: Path) -> None:
    """The answers are those of the tokenizer that has a token for it."""
    usual = load_target(saved_target(tmp_path / "usual"), "float32")
    folder = saved_target(tmp_path / "other")
    configure(tmp_path / "other", "tokenizer_config.json", pad_token=None)
    found = load_target(folder, "float32")
    todo = jobs(usual, [0.0, 0.0, 0.0], DataConfig())
    assert answer(found, todo, 8, 0, None) == answer(usual, todo, 8, 0, None)


def test_a_tokenizer_that_pads_on_the_other_side_changes_no_answer(tmp_path: Path) -> None:
    usual = load_target(saved_target(tmp_path / "usual"), "float32")
    folder = saved_target(tmp_path / "other")
    configure(
        tmp_path / "other", "tokenizer_config.json",
        padding_side="right", truncation_side="left", model_max_length=3,
    )  # fmt: skip
    found = load_target(folder, "float32")
    assert encode_prompt(TEXT, found.tokenizer) == encode_prompt(TEXT, usual.tokenizer)
    todo = jobs(usual, [0.0, 0.0, 0.0], DataConfig())
    assert answer(found, todo, 8, 0, None) == answer(usual, todo, 8, 0, None)


@pytest.mark.parametrize("named", [None, 0, -1, 10**6])
def test_a_bos_that_nobody_names_is_what_the_tokenizer_begins_with(
    named: int | None, tmp_path: Path
) -> None:
    """And not the padding, whose id is 0."""
    folder = saved_target(tmp_path, bos_token_id=named)
    configure(tmp_path, "tokenizer_config.json", bos_token=None)
    found = load_target_tokens(TargetConfig(name=folder))
    assert encode_prompt(TEXT, found.tokenizer) == byte_tokenizer()("abc")["input_ids"]


SPECIAL: dict[str, dict[str, str | None]] = {
    "a blank <bos>": {"bos_token": " ", "add_bos_token": None},
    "an empty <unk>": {"unk_token": ""},
}


@pytest.mark.parametrize("special", SPECIAL.values(), ids=SPECIAL)
def test_special_tokens_that_cannot_be_are_refused_by_the_name_of_the_folder(
    special: dict[str, str | None], tmp_path: Path
) -> None:
    folder = saved_target(tmp_path)
    configure(tmp_path, "tokenizer_config.json", **special)
    with pytest.raises(ValueError, match=str(tmp_path)):
        load_target_tokens(TargetConfig(name=folder))

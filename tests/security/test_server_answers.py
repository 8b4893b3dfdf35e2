"""What a server answers is not believed: tokens of the target, and no more than were asked for."""

from typing import Any

import pytest

from headstart.data.server import read_answer
from headstart.heads.loading import byte_tokenizer

TOKENIZER = byte_tokenizer()
EOS = [1]


def body(ids: Any, **choice: Any) -> dict[str, Any]:
    written = len(ids) if isinstance(ids, list) else 1
    there = {"finish_reason": "length", "text": "ab", "token_ids": ids} | choice
    return {"choices": [there], "usage": {"completion_tokens": written}}


def test_tokens_of_the_target_are_taken() -> None:
    assert read_answer(body([5, 6]), TOKENIZER, EOS, 4) == ([5, 6], False)


@pytest.mark.parametrize(
    "odd", [-1, 1.5, 5.0, "a", "5", True, None, [5], {"id": 5}, 2**70, float("nan"), "\x1b[2J"]
)
def test_a_token_that_is_none_is_refused_in_one_line(odd: Any) -> None:
    with pytest.raises(ValueError, match="outside the target's vocabulary") as error:
        read_answer(body([5, odd]), TOKENIZER, EOS, 4)
    assert len(str(error.value)) < 300
    assert str(error.value).isprintable()


def test_a_million_tokens_for_four_are_refused() -> None:
    with pytest.raises(ValueError, match="1,000,000 tokens where 4 were asked for"):
        read_answer(body([5] * 10**6), TOKENIZER, EOS, 4)


def test_a_text_longer_than_any_four_tokens_is_refused_before_it_is_tokenized() -> None:
    answer = body(None, text="a" * 10**7)
    with pytest.raises(ValueError, match="10,000,000 characters where 4 tokens"):
        read_answer(answer, TOKENIZER, EOS, 4)


@pytest.mark.parametrize("stop", [-5, 1.5, 10**9, [1], True])
def test_a_stop_token_that_is_none_is_refused(stop: Any) -> None:
    answer = body([5, 6], finish_reason="stop", stop_reason=stop)
    answer["usage"]["completion_tokens"] = 3
    with pytest.raises(ValueError, match="outside the target's vocabulary"):
        read_answer(answer, TOKENIZER, EOS, 4)


@pytest.mark.parametrize("token", ["token_id:-1", "token_id:", "token_id:1.5", "token_id:x:y"])
def test_an_id_among_the_log_probabilities_that_is_none_is_refused(token: str) -> None:
    answer = body(None, logprobs={"tokens": ["token_id:5", token]})
    answer["usage"]["completion_tokens"] = 2
    with pytest.raises(ValueError, match="outside the target's vocabulary"):
        read_answer(answer, TOKENIZER, EOS, 4)


@pytest.mark.parametrize(
    "answer",
    [
        {}, {"choices": []}, {"choices": None}, {"choices": [None]}, {"choices": [{}]},
        {"choices": [{"finish_reason": "length"}]}, body(7), body(None, text=None),
        body(None, logprobs=[1]), body([5]) | {"usage": {"completion_tokens": "a"}},
        body([5]) | {"usage": [1]},
    ],
)  # fmt: skip
def test_an_answer_of_another_format_is_refused_in_one_line(answer: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="none of /v1/completions"):
        read_answer(answer, TOKENIZER, EOS, 4)

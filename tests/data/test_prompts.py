import json
from pathlib import Path

import pytest

from headstart.data.prompts import limit_evenly, load_prompts, split_by_source
from headstart.data.templates import encode_prompt
from headstart.heads.tiny import byte_tokenizer

PROMPTS = Path(__file__).resolve().parents[2] / "data" / "prompts"


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"prompt": "a"', "not JSON"),
        ("[1]", "expected an object"),
        ('{"text": "a"}', "needs a non-empty string `prompt`"),
        ('{"messages": [{"role": "user"}]}', "`messages` must be a list"),
    ],
)
def test_a_malformed_line_names_its_file_and_line(line: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / "prompts.jsonl"
    path.write_text(f'{{"prompt": "fine"}}\n\n{line}\n')
    with pytest.raises(ValueError, match=r"prompts\.jsonl:3: ") as error:
        load_prompts(path)
    assert message in str(error.value)


def test_a_missing_or_empty_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"no prompt file .*absent\.jsonl"):
        load_prompts(tmp_path / "absent.jsonl")
    (tmp_path / "empty.jsonl").write_text("\n")
    with pytest.raises(ValueError, match=r"empty\.jsonl holds no prompts"):
        load_prompts(tmp_path / "empty.jsonl")


def test_messages_go_through_the_template_and_raw_text_does_not(tmp_path: Path) -> None:
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = (
        "{% for m in messages %}[{{ m['role'] }}]{{ m['content'] }}{% endfor %}"
        "{% if add_generation_prompt %}[model]{% endif %}"
    )
    rows = [
        {"messages": [{"role": "user", "content": "hi"}, {"role": "model", "content": "yes"}]},
        {"prompt": "hi"},
        {"prompt": "hi", "raw": True},
    ]
    (tmp_path / "p.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    texts = [
        tokenizer.decode(encode_prompt(p, tokenizer), skip_special_tokens=True)
        for p in load_prompts(tmp_path / "p.jsonl")
    ]
    assert texts == ["[user]hi[model]yes[model]", "[user]hi[model]", "hi"]


def test_a_long_prompt_keeps_its_beginning_of_sequence_and_its_end(tmp_path: Path) -> None:
    (tmp_path / "p.jsonl").write_text('{"prompt": "abcdefgh"}\n')
    tokenizer = byte_tokenizer()
    ids = encode_prompt(load_prompts(tmp_path / "p.jsonl")[0], tokenizer, max_tokens=4)
    assert ids[0] == tokenizer.bos_token_id
    assert tokenizer.decode(ids[1:]) == "fgh"


def test_no_source_is_both_trained_and_validated_on() -> None:
    prompts = load_prompts(PROMPTS / "text_train.jsonl")
    training, validation = split_by_source(prompts, 32, seed=0)
    assert len(validation) == 32
    assert not {p.source for p in training} & {p.source for p in validation}
    categories = [p.category for p in validation]
    assert min(categories.count(c) for c in ("code", "docs", "speech")) >= 8
    assert len(training) + 32 == len(prompts)
    with pytest.raises(ValueError, match="cannot hold out 4 validation prompts of 4"):
        split_by_source(prompts[:4], 4, seed=0)


def test_a_limit_is_dealt_over_the_categories() -> None:
    chosen = limit_evenly(load_prompts(PROMPTS / "text_eval.jsonl"), 10)
    per_category = [p.category for p in chosen]
    counts = sorted(per_category.count(c) for c in set(per_category))
    assert counts == [2, 2, 3, 3]

"""Text that a chat template rendered already: read as the template's own work, or refused."""

import json
from pathlib import Path
from typing import Any

import pytest
from transformers import GenerationConfig, PreTrainedTokenizerBase

from headstart.configs.schema import DataConfig, SourceConfig
from headstart.data.inspection import inspect_source
from headstart.data.prompts import Prompt, load_prompts
from headstart.data.templates import encode_conversation, encode_prompt
from headstart.heads.loading import byte_tokenizer
from headstart.heads.tokens import TargetTokens
from tests.helpers.chat_templates import CHATML, GEMMA3, GEMMA4, STOPS, chat_tokenizer

TOKENIZERS = {template: chat_tokenizer(template) for template in (*STOPS, None)}
TURNS = [
    {"role": "user", "content": "a"},
    {"role": "assistant", "content": "b"},
    {"role": "user", "content": "c"},
    {"role": "assistant", "content": "\n\nd"},
]


def row(tmp_path: Path, **columns: Any) -> Prompt:
    (tmp_path / "rows.jsonl").write_text(json.dumps(columns))
    [prompt] = load_prompts(tmp_path / "rows.jsonl")
    return prompt


def messages(turns: list[dict[str, Any]]) -> Prompt:
    return Prompt("id", "c", "s", turns, raw=False)


def stops(template: str | None) -> list[int]:
    return [TOKENIZERS[template].convert_tokens_to_ids(s) for s in STOPS.get(str(template), [])]


def rendered(template: str, turns: list[dict[str, Any]], **more: Any) -> str:
    text = TOKENIZERS[template].apply_chat_template(turns, tokenize=False, **more)
    assert isinstance(text, str)
    return text


@pytest.mark.parametrize("template", STOPS)
@pytest.mark.parametrize("form", ["whole", "no bos", "two bos", "stripped"])
def test_a_rendered_text_column_is_trained_on_as_its_messages_are(
    template: str, form: str, tmp_path: Path
) -> None:
    tokenizer, turns = TOKENIZERS[template], TURNS[:4]
    text = rendered(template, turns)
    if form == "no bos":
        text = text.removeprefix("<bos>")
    if form == "two bos" and text.startswith("<bos>"):
        text = "<bos>" + text
    if form == "stripped":
        text = text.strip()
    ids, spans = encode_conversation(row(tmp_path, text=text), tokenizer, stops(template))
    expected, where = encode_conversation(messages(turns), tokenizer, stops(template))
    if form == "stripped":  # without the newline after the last end mark
        expected = expected[: where[-1][1]]
    assert (ids, spans) == (expected, where)
    assert len(spans) == 2
    assert ids.count(tokenizer.bos_token_id) == (template != CHATML)


@pytest.mark.parametrize("template", STOPS)
@pytest.mark.parametrize("form", ["answered", "asked", "prompted", "stripped", "answer cut"])
def test_a_rendered_text_column_prompts_the_target_as_its_messages_do(
    template: str, form: str, tmp_path: Path
) -> None:
    tokenizer = TOKENIZERS[template]
    text = {
        "answered": rendered(template, TURNS),
        "asked": rendered(template, TURNS[:3]),
        "prompted": rendered(template, TURNS[:3], add_generation_prompt=True),
        "stripped": rendered(template, TURNS[:3], add_generation_prompt=True).strip(),
        "answer cut": rendered(template, TURNS[:3], add_generation_prompt=True) + "and",
    }[form]
    ids = encode_prompt(row(tmp_path, text=text), tokenizer)
    assert ids == encode_prompt(messages(TURNS[:3]), tokenizer)


@pytest.mark.parametrize("template", STOPS)
@pytest.mark.parametrize("prompted", [False, True])
def test_inspection_counts_a_rendered_text_without_an_answer_as_a_prompt(
    template: str, prompted: bool, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text = rendered(template, TURNS[:1], add_generation_prompt=prompted)
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps({"text": t}) + "\n" for t in (text, "<bos><bos>")))
    settings = GenerationConfig(eos_token_id=stops(template))
    tokens = TargetTokens(TOKENIZERS[template], "name", None, settings)
    summary = inspect_source(SourceConfig(path=str(path)), 0, tokens, DataConfig())
    expected = encode_prompt(messages(TURNS[:1]), TOKENIZERS[template])
    assert summary.lengths == {"all": [len(expected)], "prompt": [len(expected)], "trained": [0]}
    assert "1 of 2 rows cannot be used" in capsys.readouterr().err, "an empty text stays so"


@pytest.mark.parametrize("template", STOPS)
@pytest.mark.parametrize("end", [True, False])
def test_a_rendered_prompt_that_is_raw_is_continued_by_the_answer_beside_it(
    template: str, end: bool, tmp_path: Path
) -> None:
    tokenizer = TOKENIZERS[template]
    prompt = rendered(template, TURNS[:3], add_generation_prompt=True)
    answer = "\n\nd" + (STOPS[template][min(1, len(STOPS[template]) - 1)] if end else "")
    given = row(tmp_path, prompt=prompt, response=answer, raw=True)
    expected, spans = encode_conversation(messages(TURNS), tokenizer, stops(template))
    found, where = encode_conversation(given, tokenizer, stops(template))
    # Templates trim what users and assistants write; what is given here stands.
    assert tokenizer.decode(found[where[-1][0] :]).lstrip() == (
        tokenizer.decode(expected[spans[-1][0] : spans[-1][1]]).lstrip()
    )
    assert found[: where[-1][0]] == expected[: spans[-1][0]]
    assert len(where) == 2
    assert encode_prompt(given, tokenizer) == expected[: spans[-1][0]]


def test_what_a_tool_returned_in_a_rendered_text_is_not_the_assistants(tmp_path: Path) -> None:
    call = {"type": "function", "function": {"name": "add", "arguments": {"a": 1}}}
    turns: list[dict[str, Any]] = [
        TURNS[0],
        {"role": "assistant", "content": "", "tool_calls": [call]},
        {"role": "tool", "name": "add", "content": "3"},
        {"role": "assistant", "content": "b"},
    ]
    tokenizer = TOKENIZERS[GEMMA4]
    text = row(tmp_path, text=rendered(GEMMA4, turns))
    ids, spans = encode_conversation(text, tokenizer, stops(GEMMA4))
    assert (ids, spans) == encode_conversation(messages(turns), tokenizer, stops(GEMMA4))
    assert [tokenizer.decode(ids[a:b]) for a, b in spans] == [
        "<|tool_call>call:add{a:1}<tool_call|><|tool_response>", "b<turn|>",
    ]  # fmt: skip
    assert encode_prompt(text, tokenizer) == ids[: spans[1][0]]


def test_a_last_answer_without_its_end_is_trained_on_as_far_as_it_goes(tmp_path: Path) -> None:
    text = rendered(GEMMA3, TURNS[:1], add_generation_prompt=True) + "yes and"
    tokenizer = TOKENIZERS[GEMMA3]
    ids, [(start, end)] = encode_conversation(row(tmp_path, text=text), tokenizer, [])
    assert tokenizer.decode(ids[start:end]) == "yes and"
    assert end == len(ids)
    assert tokenizer.decode(ids[:start]) == rendered(GEMMA3, TURNS[:1], add_generation_prompt=True)


@pytest.mark.parametrize("template", [None, GEMMA3])
def test_plain_text_with_its_own_beginning_and_end_has_one_of_each(
    template: str | None, tmp_path: Path
) -> None:
    tokenizer = TOKENIZERS[template]
    bos, eos = tokenizer.bos_token_id, tokenizer.eos_token_id
    word = tokenizer("hi", add_special_tokens=False)["input_ids"]
    text = row(tmp_path, text="<bos>hi<eos>")
    assert encode_conversation(text, tokenizer, []) == ([bos, *word, eos], [(1, len(word) + 2)])
    assert encode_prompt(text, tokenizer) == [bos, *word]
    answered = row(tmp_path, prompt="<bos>hi", response="hi<eos>", raw=True)
    assert encode_conversation(answered, tokenizer, []) == (
        [bos, *word, *word, eos],
        [(1 + len(word), 2 + 2 * len(word))],
    )
    assert encode_prompt(answered, tokenizer) == [bos, *word]


CHATML_TEXT = "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\nyo<|im_end|>\n"
LLAMA_TEXT = "<|start_header_id|>user<|end_header_id|>\n\nhi<|eot_id|>"
GEMMA3_TEXT = "<bos><start_of_turn>user\nhi<end_of_turn>\n<start_of_turn>model\nyo<end_of_turn>\n"
GEMMA4_TEXT = "<bos><|turn>user\nhi<turn|>\n<|turn>model\nyo<turn|>\n"
GUANACO_TEXT = "### Human: hi### Assistant: yo"


def own_words(template: str | None) -> PreTrainedTokenizerBase:
    """A tokenizer to which the marks of other templates are plain text, as on real targets."""
    tokenizer = byte_tokenizer()
    own = {GEMMA3: ["<start_of_turn>", "<end_of_turn>"], GEMMA4: ["<|turn>", "<turn|>"]}
    marks = own.get(str(template), [])
    tokenizer.add_special_tokens({"additional_special_tokens": marks})
    tokenizer.chat_template = template
    return tokenizer


@pytest.mark.parametrize(
    ("template", "text", "mark"),
    [
        (GEMMA3, CHATML_TEXT, "im_start"),
        (GEMMA4, CHATML_TEXT, "im_start"),
        (None, CHATML_TEXT, "im_start"),
        (GEMMA3, LLAMA_TEXT, "start_header_id"),
        (GEMMA3, GEMMA4_TEXT, "turn"),
        (GEMMA4, GEMMA3_TEXT, "start_of_turn"),
        (None, GEMMA3_TEXT, "start_of_turn"),
        (GEMMA3, "<s>[INST] hi [/INST] yo</s>", "INST"),
        (GEMMA3, "<|user|>\nhi<|end|>\n<|assistant|>\nyo", "user"),
        (GEMMA3, "<|user|>hi<|assistant|>yo", "user"),
        (None, "<|prompter|>hi<|endoftext|><|assistant|>yo<|endoftext|>", "prompter"),
        (
            GEMMA3,
            "<\uff5cbegin▁of▁sentence\uff5c><\uff5cUser\uff5c>hi<\uff5cAssistant\uff5c>yo",
            "User",
        ),
        (
            GEMMA4,
            "<\uff5chy_begin▁of▁sentence\uff5c><\uff5chy_User\uff5c>hi<\uff5chy_Assistant\uff5c>yo",
            "hy_User",
        ),
        (
            GEMMA4,
            "<|start|>user<|message|>hi<|end|><|start|>assistant<|channel|>final<|message|>yo",
            "user",
        ),
        (
            None,
            "<|start|>assistant to=functions.f<|channel|>commentary json<|message|>{}<|call|>",
            "functions",
        ),
        (
            GEMMA3,
            "<|begin_of_text|><|header_start|>user<|header_end|>\n\nhi<|eot|>",
            "header_start",
        ),
        (GEMMA3, "<BOS_TOKEN><|START_OF_TURN_TOKEN|><|USER_TOKEN|>hi<|END_OF_TURN_TOKEN|>", "USER"),
        (GEMMA4, "<extra_id_0>System\n\n<extra_id_1>User\nhi\n<extra_id_1>Assistant\nyo", "extra"),
        (GEMMA3, "<|start_of_role|>user<|end_of_role|>hi<|end_of_text|>", "start_of_role"),
        (GEMMA3, "[|user|]hi\n[|assistant|]yo[|endofturn|]", "user"),
        (GEMMA3, "<|im_user|>user<|im_middle|>hi<|im_end|>", "im_user"),
    ],
)
@pytest.mark.parametrize("column", ["text", "prompt"])
def test_a_text_of_another_template_is_refused_with_the_fix(
    template: str | None, text: str, mark: str, column: str, tmp_path: Path
) -> None:
    tokenizer = own_words(template)
    prompt = row(tmp_path, **{column: text}, **({"response": "yo"} if column == "prompt" else {}))
    for encode in (
        lambda: encode_prompt(prompt, tokenizer),
        lambda: encode_conversation(prompt, tokenizer, [1]),
    ):
        with pytest.raises(ValueError, match=rf"holds '[^']*{mark}.*`messages`"):
            encode()


@pytest.mark.parametrize("template", [GEMMA3, None])
@pytest.mark.parametrize(
    ("text", "heading"),
    [
        (GUANACO_TEXT, "### Human:"),
        ("### USER: hi\n### ASSISTANT: yo", "### USER:"),
        (
            "### instruction:\nhi\n\n### response:\nyo",
            "### instruction:",
        ),
        ("A chat between a user and an assistant. USER: hi ASSISTANT: yo</s>", "USER:"),
        ("\n\nHuman: hi\n\nAssistant: yo", "Human:"),
        ("User: hi\n\nAssistant: yo", "User:"),
        ("GPT4 Correct User: hi<|end_of_turn|>GPT4 Correct Assistant: yo", "GPT4 Correct User:"),
        ("<human>: hi\n<bot>: yo", "<human>:"),
    ],
)
def test_turns_under_headings_are_refused_as_a_text_and_are_a_users_words_in_a_prompt(
    text: str, heading: str, template: str | None, tmp_path: Path
) -> None:
    tokenizer = TOKENIZERS[template]
    whole = row(tmp_path, text=text)
    for encode in (
        lambda: encode_prompt(whole, tokenizer),
        lambda: encode_conversation(whole, tokenizer, [1]),
    ):
        with pytest.raises(ValueError, match=f"holds '{heading}'.*`messages`"):
            encode()
    ids = encode_prompt(row(tmp_path, prompt=text), tokenizer)
    assert text.strip() in tokenizer.decode(ids)


@pytest.mark.parametrize(
    "text",
    [
        "Set USER: root in the file.",
        "The Assistant: a novel.\nHuman: the last word.",
        "What do the tokens <|user|> and <|assistant|> mean?",
        "Begin with <|start|> and end with <|message|>.",
        "```\n[INST]\n``` and <|im_start|> are marks, <extra_id_0> is T5's.",
    ],
)
def test_a_plain_text_that_names_a_mark_alone_is_trained_on_as_it_is(
    text: str, tmp_path: Path
) -> None:
    tokenizer = own_words(GEMMA3)
    for prompt in (row(tmp_path, text=text), row(tmp_path, prompt=text)):
        assert text in tokenizer.decode(encode_prompt(prompt, tokenizer))
    ids, _ = encode_conversation(row(tmp_path, text=text), tokenizer, [1])
    assert tokenizer.decode(ids) == f"<bos>{text}"


@pytest.mark.parametrize(
    ("template", "begins"),
    [
        (GEMMA3, "<s>"),
        (GEMMA3, "<|begin_of_text|>"),
        (GEMMA4, "<s>\n"),
        (CHATML, "<|endoftext|>"),
        (CHATML, "[gMASK]<sop>"),
    ],
)
def test_a_rendered_text_that_begins_as_those_of_another_tokenizer_is_refused(
    template: str, begins: str, tmp_path: Path
) -> None:
    tokenizer, text = TOKENIZERS[template], rendered(template, TURNS)
    prompt = row(tmp_path, text=begins + text.removeprefix("<bos>"))
    for encode in (
        lambda: encode_prompt(prompt, tokenizer),
        lambda: encode_conversation(prompt, tokenizer, stops(template)),
    ):
        with pytest.raises(ValueError, match=r"begins with.*`messages`"):
            encode()


def test_what_a_template_itself_writes_before_its_first_turn_is_its_own(tmp_path: Path) -> None:
    tokenizer = chat_tokenizer("[gMASK]<sop>" + CHATML)
    text = tokenizer.apply_chat_template(TURNS, tokenize=False)
    assert isinstance(text, str)
    assert text.startswith("[gMASK]<sop><|im_start|>")
    found = encode_conversation(row(tmp_path, text=text), tokenizer, stops(CHATML))
    assert found == encode_conversation(messages(TURNS), tokenizer, stops(CHATML))


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("<bos>" + GEMMA3_TEXT + GEMMA3_TEXT, "<bos>"),
        (GEMMA3_TEXT + "<pad><pad>", "<pad>"),
        ("<bos>hi<eos><bos>yo<eos>", "<eos>"),
        ("hi <mask> yo<unk>", "<unk>"),
    ],
)
def test_a_packed_or_padded_text_is_refused(text: str, found: str, tmp_path: Path) -> None:
    prompt, tokenizer = row(tmp_path, text=text), TOKENIZERS[GEMMA3]
    for encode in (
        lambda: encode_prompt(prompt, tokenizer),
        lambda: encode_conversation(prompt, tokenizer, [1]),
    ):
        with pytest.raises(ValueError, match=f"holds '{found}'"):
            encode()


@pytest.mark.parametrize("template", [GEMMA3, None])
def test_a_rendered_prompt_column_is_refused_with_the_fix(
    template: str | None, tmp_path: Path
) -> None:
    prompt, tokenizer = row(tmp_path, prompt=GEMMA3_TEXT, response="yo"), own_words(template)
    for encode in (
        lambda: encode_prompt(prompt, tokenizer),
        lambda: encode_conversation(prompt, tokenizer, [1]),
    ):
        with pytest.raises(ValueError, match=r"start_of_turn.*(columns=\{text: NAME|`messages`)"):
            encode()

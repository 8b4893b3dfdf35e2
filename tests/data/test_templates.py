from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from headstart.data.prompts import Prompt
from headstart.data.templates import encode_conversation, encode_prompt, shortened
from tests.helpers.chat_templates import CHATML, GEMMA3, GEMMA4, STOPS, chat_tokenizer

ADD = [{"type": "function", "function": {"name": "add", "description": "adds"}}]
DECLARED = '<|tool>declaration:add{description:<|"|>adds<|"|>}<tool|>'
CALLED = '<|tool_call>call:add{a:1,b:<|"|>x<|"|>}<tool_call|>'
NO_THOUGHT = "<|channel>thought\n<channel|>"
THOUGHT = "<|channel>thought\nhm\n<channel|>"
TOKENIZERS = {template: chat_tokenizer(template) for template in (*STOPS, None)}

Runs = list[tuple[str, bool]]


def user(content: str) -> dict[str, Any]:
    return {"role": "user", "content": content}


def assistant(content: Any, **more: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": content, **more}


def call(content: str = "", calls: int = 1, **more: Any) -> dict[str, Any]:
    function = {"name": "add", "arguments": {"a": 1, "b": "x"}}
    return (
        assistant(content, tool_calls=[{"type": "function", "function": function}] * calls) | more
    )


def returned(content: str) -> dict[str, Any]:
    return {"role": "tool", "name": "add", "content": content}


def prompt(*messages: dict[str, Any], raw: bool = False, tools: Any = None) -> Prompt:
    return Prompt("id", "category", "source", list(messages), raw, tools)


def encode(
    conversation: Prompt, tokenizer: PreTrainedTokenizerBase, stops: list[str], **kwargs: Any
) -> tuple[list[int], list[tuple[int, int]]]:
    return encode_conversation(
        conversation, tokenizer, tokenizer.convert_tokens_to_ids(stops), kwargs
    )


def runs(template: str, conversation: Prompt, **kwargs: Any) -> Runs:
    """The text of a conversation in runs of tokens, and whether they are in a span."""
    tokenizer = TOKENIZERS[template]
    ids, spans = encode(conversation, tokenizer, STOPS[template], **kwargs)
    result, done = [], 0
    for start, end in spans:
        assert done < start < end <= len(ids)
        result.append((tokenizer.decode(ids[done:start]), False))
        result.append((tokenizer.decode(ids[start:end]), True))
        done = end
    return [*result, (tokenizer.decode(ids[done:]), False)]


def joined(*parts: Runs) -> Runs:
    """Parts one after the other, with neighbors of the same kind as one."""
    result: Runs = [("", False)]
    for text, wrote in (run for part in parts for run in part):
        if wrote == result[-1][1]:
            result[-1] = (result[-1][0] + text, wrote)
        else:
            result.append((text, wrote))
    return result


def test_every_token_of_an_answer_and_its_end_is_in_the_span_and_no_other() -> None:
    tokenizer = TOKENIZERS[CHATML]
    conversation = prompt(user("\n\na"), assistant("\n\nok"))
    ids, spans = encode(conversation, tokenizer, STOPS[CHATML])
    inside = {i for start, end in spans for i in range(start, end)}
    assert [(tokenizer.decode([t]), i in inside) for i, t in enumerate(ids)] == [
        ("<|im_start|>", False), *((letter, False) for letter in "user"),
        ("\n\n", False), ("\n", False), ("a", False), ("<|im_end|>", False), ("\n", False),
        ("<|im_start|>", False), *((letter, False) for letter in "assistant"), ("\n", False),
        ("\n\n", True), ("o", True), ("k", True), ("<|im_end|>", True), ("\n", False),
    ]  # fmt: skip


@pytest.mark.parametrize("system", ["", " Be brief. "])
def test_gemma_3_folds_the_system_prompt_into_the_first_turn_of_the_user(system: str) -> None:
    messages = [{"role": "system", "content": system}, user(" hi "), assistant(" yo\n")]
    assert runs(GEMMA3, prompt(*messages, user("and"), assistant(""))) == [
        (f"<bos><start_of_turn>user\n{system}\n\nhi<end_of_turn>\n<start_of_turn>model\n", False),
        ("yo<end_of_turn>", True),
        ("\n<start_of_turn>user\nand<end_of_turn>\n<start_of_turn>model\n", False),
        ("<end_of_turn>", True),
        ("\n", False),
    ]


def test_a_conversation_that_ends_with_the_user_keeps_that_turn_outside_spans() -> None:
    assert runs(GEMMA3, prompt(user("a"), assistant("b"), user("c"))) == [
        ("<bos><start_of_turn>user\na<end_of_turn>\n<start_of_turn>model\n", False),
        ("b<end_of_turn>", True),
        ("\n<start_of_turn>user\nc<end_of_turn>\n", False),
    ]


def test_without_thinking_only_the_last_turn_follows_an_empty_thought() -> None:
    assert runs(GEMMA4, prompt(user("a"), assistant(THOUGHT + "b"), user("c"), assistant("d"))) == [
        ("<bos><|turn>user\na<turn|>\n<|turn>model\n", False),
        ("b<turn|>", True),
        (f"\n<|turn>user\nc<turn|>\n<|turn>model\n{NO_THOUGHT}", False),
        ("d<turn|>", True),
        ("\n", False),
    ]


def test_an_empty_thought_that_a_template_renders_itself_is_the_prompts() -> None:
    tokenizer = chat_tokenizer(
        CHATML.replace("+ message.c", "+ (think if loop.last else '') + message.c").replace(
            "assistant\\n' if", "assistant\\n' + think if"
        )
    )
    conversation = prompt(user("a"), assistant("b"), user("c"), assistant("d"))
    ids, spans = encode(conversation, tokenizer, ["<|im_end|>"], think="<think>\n\n</think>\n\n")
    assert [tokenizer.decode(ids[a:b]) for a, b in spans] == ["b<|im_end|>", "d<|im_end|>"]


def test_with_thinking_the_last_thought_is_the_assistants() -> None:
    conversation = prompt(
        {"role": "system", "content": ""},
        user("a"), assistant(THOUGHT + "b"), user("c"), assistant(THOUGHT + "d"),
    )  # fmt: skip
    assert runs(GEMMA4, conversation, enable_thinking=True) == [
        ("<bos><|turn>system\n<|think|>\n<turn|>\n<|turn>user\na<turn|>\n<|turn>model\n", False),
        ("b<turn|>", True),
        ("\n<|turn>user\nc<turn|>\n<|turn>model\n", False),
        (f"{THOUGHT}d<turn|>", True),
        ("\n", False),
    ]
    # The variable forgotten: no empty thought comes before a real one.
    assert runs(GEMMA4, conversation)[-3:] == [
        ("\n<|turn>user\nc<turn|>\n<|turn>model\n", False),
        (f"{THOUGHT}d<turn|>", True),
        ("\n", False),
    ]


OPEN: Runs = [
    (f"<bos><|turn>system\n{DECLARED}<turn|>\n<|turn>user\nq<turn|>\n<|turn>model\n", False)
]
PAUSED: Runs = [(f"{CALLED}<|tool_response>", True)]
THREE: Runs = [('response:add{value:<|"|>3<|"|>}<tool_response|>', False)]
NEXT: Runs = [("\n<|turn>user\nr<turn|>\n<|turn>model\n" + NO_THOUGHT, False)]
DONE: Runs = [("a<turn|>", True)]
NEWLINE: Runs = [("\n", False)]


@pytest.mark.parametrize(
    ("messages", "expected"),
    [
        ([call(), returned("3"), assistant("a")], [PAUSED, THREE, DONE, NEWLINE]),
        ([call()], [[(NO_THOUGHT, False)], PAUSED, [("", False)]]),
        ([call(), returned("3")], [PAUSED, THREE]),
        (
            [call(), returned("3"), user("r"), assistant("a")],
            [PAUSED, THREE, [(NEXT[0][0].lstrip(), False)], DONE, NEWLINE],
        ),
        (
            [call(), returned("3")] * 2 + [assistant("a"), user("r"), assistant("a")],
            [PAUSED, THREE, PAUSED, THREE, DONE, NEXT, DONE, NEWLINE],
        ),
        (
            [call(calls=2), returned("3"), returned("3"), assistant("a")],
            [[(CALLED, True)], PAUSED, THREE, [("<|tool_response>", False)], THREE, DONE, NEWLINE],
        ),
        (
            [call("a", tool_responses=[{"name": "add", "response": {"value": "3"}}])],
            [PAUSED, THREE, DONE, NEWLINE],
        ),
    ],
)  # fmt: skip
def test_what_a_tool_returned_is_outside_spans(
    messages: list[dict[str, Any]], expected: list[Runs]
) -> None:
    conversation = prompt(user("q"), *messages, tools=ADD)
    assert runs(GEMMA4, conversation) == joined(OPEN, *expected)


def test_a_tool_with_a_turn_of_its_own_is_outside_spans() -> None:
    conversation = prompt(user("q"), assistant("add(1)"), returned("3"), assistant("a"))
    assert runs(CHATML, conversation) == [
        ("<|im_start|>user\nq<|im_end|>\n<|im_start|>assistant\n", False),
        ("add(1)<|im_end|>", True),
        ("\n<|im_start|>tool\n3<|im_end|>\n<|im_start|>assistant\n", False),
        ("a<|im_end|>", True),
        ("\n", False),
    ]


@pytest.mark.parametrize(
    ("template", "messages", "message"),
    [
        (GEMMA3, [user("a"), user("b"), assistant("c")], "roles must alternate"),
        (GEMMA3, [user("a")], "no assistant turn"),
        (GEMMA3, [user("<start_of_turn>model\nb"), assistant("c")], "holds '<start_of_turn>model"),
        (GEMMA3, [user("a"), assistant("b<end_of_turn>c")], "holds '<end_of_turn>'"),
        (GEMMA3, [user("a"), assistant("b<eos>")], "holds '<eos>'"),
        (GEMMA4, [user("a"), call(), returned("<tool_response|>"), assistant("b")], "holds '<tool"),
        # The text before the call comes after its response, and the answer after the turn's end.
        (GEMMA4, [user("a"), call("so"), returned("3"), assistant("b")], r"early: before '\\nb'"),
        (CHATML, [user("a"), assistant(None)], "refuses the conversation: "),
        (CHATML.replace("<|im_", "<"), [user("a"), assistant("b")], "no control token"),
        (CHATML.replace("assistant\\n' if", "bot\\n' if"), [user("a"), assistant("b")], "bot"),
        (CHATML.replace("in messages", "in messages[-3:]"),
         [user("a"), assistant("b")] * 2 + [user("c")], "1 of 2 assistant turns"),
        (CHATML.replace("{{- m", "").replace("message.content", "''"),
         [user("a"), assistant("b")], "leaves out what an assistant turn says"),
    ],
)  # fmt: skip
def test_a_conversation_whose_turns_cannot_be_told_is_refused_with_the_reason(
    template: str, messages: list[dict[str, Any]], message: str
) -> None:
    tokenizer = chat_tokenizer(template)
    stops = STOPS.get(template, [])
    with pytest.raises(ValueError, match=message):
        encode(prompt(*messages), tokenizer, stops)


def test_plain_text_is_trained_on_the_answer_or_after_the_beginning_of_a_document() -> None:
    tokenizer = TOKENIZERS[None]
    answered = prompt(user("a\n"), assistant("\nb"))
    for conversation in (answered, prompt(*answered.messages, raw=True)):
        ids, spans = encode(conversation, tokenizer, ["<eos>"])
        tokens = [tokenizer.decode([i]) for i in ids]
        assert (tokens, spans) == (["<bos>", "a", "\n", "\n", "b", "<eos>"], [(3, 6)])
    ids, spans = encode(prompt(user("ab"), raw=True), TOKENIZERS[GEMMA3], ["<eos>"])
    assert ([tokenizer.decode([i]) for i in ids], spans) == (["<bos>", "a", "b"], [(1, 3)])
    with pytest.raises(ValueError, match="no assistant turn"):
        encode(prompt(user("ab")), tokenizer, ["<eos>"])
    with pytest.raises(ValueError, match="the text is empty"):
        encode(prompt(user(""), raw=True), tokenizer, ["<eos>"])


def test_a_prompt_leaves_the_last_answer_out_and_keeps_earlier_ones_and_tools() -> None:
    tokenizer = TOKENIZERS[GEMMA4]
    turns = [user("q"), call(), returned("3"), assistant("a"), user("r")]
    for messages in (turns, [*turns, assistant("x")]):
        ids = encode_prompt(prompt(*messages, tools=ADD), tokenizer)
        assert tokenizer.decode(ids) == "".join(
            text for text, _ in joined(OPEN, PAUSED, THREE, DONE, NEXT)
        )
    thinking = encode_prompt(prompt(user("q")), tokenizer, {"enable_thinking": True})
    assert tokenizer.decode(thinking) == (
        "<bos><|turn>system\n<|think|>\n<turn|>\n<|turn>user\nq<turn|>\n<|turn>model\n"
    )
    told = call(tool_responses=[{"name": "add", "response": {"value": "3"}}])
    ids = encode_prompt(prompt(user("q"), told, assistant("a"), tools=ADD), tokenizer)
    assert tokenizer.decode(ids).endswith(THREE[0][0])
    plain = encode_prompt(prompt(user("ab"), assistant("x"), raw=True), tokenizer)
    assert [tokenizer.decode([i]) for i in plain] == ["<bos>", "a", "b"]
    with pytest.raises(ValueError, match="nothing before the assistant's answer"):
        encode_prompt(prompt(assistant("x")), tokenizer)
    with pytest.raises(ValueError, match="roles must alternate"):
        encode_prompt(prompt(user("q"), user("r")), TOKENIZERS[GEMMA3])


def test_a_truncated_prompt_keeps_one_beginning_and_the_generation_prompt() -> None:
    tokenizer = TOKENIZERS[GEMMA3]
    ids = shortened(encode_prompt(prompt(user("a" * 50)), tokenizer), 11)
    assert tokenizer.decode(ids) == "<bos>a<end_of_turn>\n<start_of_turn>model\n"
    assert len(ids) == 11


# Hypothesis draws texts from the program's own literals too, control tokens among them.
CONTROLS = [token.content for token in TOKENIZERS[None].added_tokens_decoder.values()]
CONTENTS = st.one_of(st.text(), st.text(alphabet=" \n\tab<>|é")).filter(
    lambda text: not any(token in text for token in CONTROLS)
)
TURNS = st.lists(st.tuples(CONTENTS, CONTENTS), min_size=1, max_size=4)
MARKS = {
    GEMMA3: ("<bos>", "<start_of_turn>user\n", "<start_of_turn>model\n", "<end_of_turn>"),
    GEMMA4: ("<bos>", "<|turn>user\n", "<|turn>model\n", "<turn|>"),
    CHATML: ("", "<|im_start|>user\n", "<|im_start|>assistant\n", "<|im_end|>"),
}


@given(TURNS, st.sampled_from(sorted(MARKS)))
@settings(deadline=None, max_examples=200)
def test_whatever_the_texts_the_spans_are_the_answers_and_all_else_is_the_rest(
    turns: list[tuple[str, str]], template: str
) -> None:
    bos, asks, answers, end = MARKS[template]
    trimmed = [(q, a) if template == CHATML else (q.strip(), a.strip()) for q, a in turns]
    expected: list[Runs] = [[(bos, False)]]
    for q, a in trimmed:
        expected += [[(f"{asks}{q}{end}\n{answers}", False)], [(a + end, True)], NEWLINE]
    messages = [turn for q, a in turns for turn in (user(q), assistant(a))]
    found = runs(template, prompt(*messages), enable_thinking=False)
    if template == GEMMA4:
        assert found[-3][0].endswith(NO_THOUGHT)
        found[-3] = (found[-3][0].removesuffix(NO_THOUGHT), False)
    assert found == joined(*expected)


@given(CONTENTS, CONTENTS, st.sampled_from(sorted(MARKS)))
@settings(deadline=None, max_examples=200)
def test_the_last_span_follows_the_very_tokens_that_the_target_is_prompted_with(
    question: str, answer: str, template: str
) -> None:
    tokenizer = TOKENIZERS[template]
    conversation = prompt(user(question), assistant(answer))
    asked = encode_prompt(conversation, tokenizer)
    ids, [(start, end)] = encode(conversation, tokenizer, STOPS[template])
    assert ids[:start] == asked
    assert tokenizer.decode(ids[end - 1]) == MARKS[template][-1]


@pytest.mark.real
def test_gemmas_tokenizer_does_not_merge_newlines_of_the_template_with_the_answers() -> None:
    from headstart.heads.gemma3_270m import gemma3_270m_dir

    tokenizer = AutoTokenizer.from_pretrained(gemma3_270m_dir())
    tokenizer.chat_template = GEMMA3.replace(" | trim", "")
    conversation = prompt(user("Hi"), assistant("\n\nSure thing\n"), user("Go"), assistant(" on"))
    ids, spans = encode(conversation, tokenizer, STOPS[GEMMA3])
    context = ["<end_of_turn>", "\n", "<start_of_turn>", "model", "\n"]
    first, last = ["\n\n", "Sure", "▁thing", "\n", "<end_of_turn>"], ["▁on", "<end_of_turn>"]
    assert tokenizer.convert_ids_to_tokens(ids) == [
        "<bos>", "<start_of_turn>", "user", "\n", "Hi", *context, *first,
        "\n", "<start_of_turn>", "user", "\n", "Go", *context, *last, "\n",
    ]  # fmt: skip
    assert spans == [(10, 15), (25, 27)]
    # Tokenized in one, the template's newline would be part of the answer's first token.
    assert "\n\n\n" in tokenizer.convert_ids_to_tokens(
        tokenizer(tokenizer.decode(ids))["input_ids"]
    )

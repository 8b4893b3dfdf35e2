from dataclasses import replace
from pathlib import Path

import pytest

from headstart.data.contamination import Contamination, remove_contaminated
from headstart.data.prompts import Prompt, load_prompts

PROMPTS = Path(__file__).resolve().parents[2] / "data" / "prompts"
QUESTION = (
    "A shop sells pencils in boxes of twelve. Mira buys seven boxes, gives nine pencils to her "
    "brother and shares the rest evenly among five friends. How many does each friend receive?"
)


def prompt(text: str, name: str = "t") -> Prompt:
    return Prompt(name, "c", "s", [{"role": "user", "content": text}], False)


def kept(training: list[Prompt], *held_out: Prompt) -> list[str]:
    return [p.id for p in remove_contaminated(training, list(held_out))[0]]


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        (QUESTION, QUESTION),
        ("what is LOVE", "What is love?!"),
        ("ﬁne “day” — № ①", 'FINE, "day" No 1'),
        ("说说 你的看法。", "说说你的看法"),
        ("a_b", "A-B"),
    ],
)
def test_case_form_and_punctuation_hide_no_duplicate(ours: str, theirs: str) -> None:
    left, found = remove_contaminated([prompt(ours)], [prompt(theirs, "e")])
    assert left == []
    assert (found.exact, found.near, found.pairs) == (1, 0, [("t", "e", 1.0)])


@pytest.mark.parametrize("ours", [QUESTION, QUESTION.replace("sells pencils", "offers pencils")])
def test_later_turns_of_an_evaluation_are_compared_too(ours: str) -> None:
    asked = replace(prompt("Tell me about Mira.", "e"), later_turns=[QUESTION])
    left, found = remove_contaminated([prompt(ours)], [asked])
    assert left == []
    assert (found.exact, found.near) == (0, 1)


def test_a_later_turn_of_a_few_words_removes_nothing() -> None:
    said = ["Thanks!", "Can you explain that in more detail?"]
    asked = replace(prompt("Tell me about Mira.", "e"), later_turns=said)
    assert kept([prompt(turn, turn) for turn in said], asked) == said


@pytest.mark.parametrize(
    "ours",
    [
        QUESTION.replace("sells pencils", "offers pencils"),
        QUESTION.replace("Mira", "Tom").replace("receive", "get"),
        f"Solve this step by step. {QUESTION} Give only the number.",
    ],
)
def test_a_few_words_changed_or_added_hide_no_near_duplicate(ours: str) -> None:
    left, found = remove_contaminated([prompt(ours)], [prompt(QUESTION, "e")])
    assert left == []
    assert (found.exact, found.near) == (0, 1)
    [(training_id, evaluation_id, share)] = found.pairs
    assert (training_id, evaluation_id) == ("t", "e")
    assert 0.6 < share <= 1


def test_unrelated_prompts_and_short_ones_that_differ_stay() -> None:
    training = [
        prompt("How many pencils does each friend get?", "a"),
        prompt("Who wrote Moby Dick, and when?", "b"),
        prompt("what is love worth", "c"),
        prompt("...", "d"),  # without words texts are compared as they are
        prompt(" ? ", "e"),
    ]
    assert kept(training, prompt(QUESTION), prompt("What is love?"), prompt("?")) == list("abcd")


def test_siblings_of_a_template_stay_and_the_one_that_is_held_out_goes() -> None:
    template = "Write a table in Markdown that compares three aspects of {} for a beginner."
    topics = ["jazz", "tea", "chess", "salt", "rust", "wool", "rain", "dust", "gold", "ink", "corn"]
    training = [prompt(template.format(topic), topic) for topic in topics]
    assert kept(training, prompt(template.format("Iceland"))) == topics
    assert kept(training, prompt(template.format("tea"))) == [t for t in topics if t != "tea"]
    wrapped = [prompt(f"Please: {template.format('tea')} Thanks.", "x"), *training]
    assert "x" not in kept(wrapped, prompt(template.format("tea")))


def test_copies_of_a_near_duplicate_make_no_template() -> None:
    copies = [prompt(QUESTION.replace("Mira", "Tom"), str(i)) for i in range(50)]
    assert kept(copies, prompt(QUESTION)) == []


def test_what_users_write_is_compared_turn_by_turn_and_nothing_else() -> None:
    def talk(name: str, *turns: str) -> Prompt:
        roles = ["system", "user", "assistant", "user"]
        messages = [{"role": r, "content": t} for r, t in zip(roles, turns, strict=False)]
        return Prompt(name, "c", "s", messages, False)

    training = [
        talk("system", QUESTION, "What is love?"),
        talk("answer", "s", "What is love?", QUESTION),
        talk("user", "s", QUESTION),
        talk("later", "s", "What is love?", "Much.", QUESTION),
    ]
    assert kept(training, talk("e", "s", QUESTION)) == ["system", "answer"]
    # An evaluation of several turns is repeated by one that has its long first turn alone.
    several = talk("e", "s", QUESTION, "b", "Explain your answer.")
    assert kept(training, several) == ["system", "answer"]
    assert kept([talk("t", "s", "Explain your answer.")], several) == ["t"]


def test_the_counts_are_told_also_when_they_are_zero() -> None:
    line = "Contamination: 0 exact and 0 near duplicates of evaluation prompts removed"
    assert Contamination().describe() == f"{line} from the training prompts"
    training = [prompt("what is love", f"t{i}") for i in range(9)]
    found = remove_contaminated(training, [prompt("What is love?", "e")])[1]
    assert found.exact == 9
    assert len(found.pairs) == 5
    assert found.describe().endswith("first: t0 = e (100%), t1 = e (100%), t2 = e (100%), "
                                     "t3 = e (100%), t4 = e (100%)")  # fmt: skip


def test_the_shipped_prompts_lose_only_those_that_share_their_text() -> None:
    text, found = remove_contaminated(
        load_prompts(PROMPTS / "text_train.jsonl"), load_prompts(PROMPTS / "text_eval.jsonl")
    )
    assert (len(text), found.exact, found.near) == (1496, 0, 0)
    found = remove_contaminated(
        load_prompts(PROMPTS / "chat_train.jsonl"), load_prompts(PROMPTS / "chat_eval.jsonl")
    )[1]
    # A documentation text with another question (4), or the same problem under other names (2).
    assert (found.exact, found.near) == (0, 6)

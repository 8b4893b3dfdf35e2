"""What `headstart adapt` says of few prompts, and of a loss that chance explains."""

import json
from pathlib import Path
from typing import Any

import pytest

from headstart.configs.loader import load_settings
from headstart.train.adapt_report import advice, compare_stages, headline, outcome
from headstart.train.adaptation import Adaptation, load_kinds, split_prompts
from tests.helpers.reports import texts


def prompt_file(folder: Path, *prompts: str) -> str:
    path = folder / "mine.jsonl"
    path.write_text("".join(json.dumps({"prompt": prompt}) + "\n" for prompt in prompts))
    return str(path)


def split(prompts: str, *overrides: str) -> dict[str, Any]:
    settings = load_settings(
        None, ["target.name=tiny-gemma4", f"data.prompts={prompts}", *overrides]
    )
    asked = Adaptation("h", settings.of_run(), settings.adapt, 4, Path("out"))
    return split_prompts(asked, load_kinds(asked))[0]


@pytest.mark.parametrize("count", [1, 5, 8])
def test_few_prompts_name_the_setting_to_lower(count: int, tmp_path: Path) -> None:
    path = prompt_file(tmp_path, *(f"what is {n} and {n}?" for n in range(count)))
    with pytest.raises(ValueError, match=r"mine\.jsonl: .*adapt\.held_out_prompts") as raised:
        split(path, "adapt.held_out_prompts=8")
    assert "validation_conversations" not in str(raised.value)


def test_few_general_prompts_name_their_file(tmp_path: Path) -> None:
    many = prompt_file(tmp_path, *(f"what is {n} and {n}?" for n in range(30)))
    (tmp_path / "general").mkdir()
    few = prompt_file(tmp_path / "general", "who are you?")
    with pytest.raises(ValueError, match=r"general/mine\.jsonl: .*adapt\.held_out_prompts"):
        split(many, "adapt.held_out_prompts=8", f"adapt.general_prompts={few}")


def test_prompts_that_are_all_the_same_are_refused_before_anything_is_answered(
    tmp_path: Path,
) -> None:
    path = prompt_file(tmp_path, *["name ten large rivers of the world in order of length"] * 9)
    with pytest.raises(ValueError, match=r"mine\.jsonl: .*adapt\.held_out_prompts"):
        split(path, "adapt.held_out_prompts=2")


def test_conversations_without_answers_and_without_use_are_refused(tmp_path: Path) -> None:
    many = prompt_file(tmp_path, *(f"what is {n} and {n}?" for n in range(30)))
    with pytest.raises(ValueError, match=r"adapt\.conversations=.*none of 30 ends with an answer"):
        split(many, "adapt.held_out_prompts=8", f"adapt.conversations={many}")
    with pytest.raises(ValueError, match=r"answering_share=0 leaves no text: name conversations"):
        split(many, "adapt.answering_share=0")
    held_out = split(many, "adapt.held_out_prompts=8")["domain"][1]
    given = tmp_path / "given.jsonl"
    rows = [{"prompt": prompt.text, "response": "as it was asked"} for prompt in held_out]
    given.write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(ValueError, match=r"given\.jsonl: all are copies or siblings"):
        split(many, "adapt.held_out_prompts=8", f"adapt.conversations={given}")


Lists = tuple[list[int], list[int], list[int]]


def told(domain: Lists, general: Lists | None = None) -> tuple[dict[str, Any], str, str]:
    """The figures and the words of an adaptation; of each text of `reference`, `unadapted` and
    `adapted` the rounds of ten in which a draft was accepted."""
    kinds = {"domain": domain} | ({"general": general} if general else {})
    stages = {
        stage: {kind: texts(*of_stage[number]) for kind, of_stage in kinds.items()}
        for number, stage in enumerate(("reference", "unadapted", "adapted"))
    }
    compared = compare_stages(stages)
    found = headline(compared)
    return found, outcome({"acceptance": compared, **found}), advice(compared)


def test_no_share_is_told_of_a_loss_within_chance() -> None:
    """The head lost 0.025 tokens a round and gained 0.525, which would be 2100%."""
    found, said, before = told(([9, 2, 4, 1], [2, 9, 3, 1], [9, 9, 9, 9]))
    assert found["recovered_share"] is None
    assert found["recovered_share_without_loops"] is None
    assert "of what was lost" not in said
    assert "within chance" in said
    assert "chance explains the difference" in before
    assert "1.38 to 1.90" in said


def test_a_loss_beyond_chance_has_its_share() -> None:
    found, said, _ = told(([8, 8, 8], [4, 4, 4], [7, 7, 7]))
    assert found["recovered_share"] == pytest.approx(0.75)
    assert "75% of what was lost" in said


def test_no_share_is_told_of_general_tokens_that_were_hardly_there() -> None:
    """One draft in two hundred was accepted, then half of them."""
    domain: Lists = ([8] * 3, [4] * 3, [7] * 3)
    rare = [1, *[0] * 19]
    found, said, _ = told(domain, (rare, rare, [5] * 20))
    assert found["general_change_share"] is None
    assert "general" not in said
    found, said, _ = told(domain, ([5] * 20, [5] * 20, [4] * 20))
    assert found["general_change_share"] == pytest.approx(-0.2)
    assert "on general prompts -20%" in said

"""Prompts with JSON schemas: decoded under them, judged by another library, and reported."""

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from headstart.configs.schema import EvalConfig
from headstart.data.prompts import Prompt, load_prompt_set, load_prompts, schemas_of
from headstart.eval.decoding import Decoded
from headstart.eval.figures import validity
from headstart.eval.measurements import Text
from headstart.eval.recorded import prompts_sha256
from headstart.eval.report import run_evaluation
from headstart.heads.structured import fault, structured_output
from headstart.heads.target import Target
from tests.helpers.heads import half_trained_head
from tests.helpers.runs import ROOT

SET = "builtin:structured"


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("headstart.eval.draft_cost.COST_TURNS", 2)


def test_texts_end_and_are_of_their_schemas(tiny: Target, tmp_path: Path) -> None:
    """On a random model, whose text is noise wherever the schema lets it be. In float32 drafts
    change nothing, and those that know the schema are accepted more often."""
    chosen = EvalConfig(
        prompts=SET, limit=4, max_new_tokens=200, num_assistant_tokens=[3],
        decoders=["transformers", "exact", "unconstrained", "lookup"],
    )  # fmt: skip
    head = half_trained_head(tiny)
    content = run_evaluation(tiny, {"x": head}, chosen, tmp_path, timed=False)
    whole = {r["decoder"]: r for r in content["results"] if r["category"] == "all"}
    for result in whole.values():
        found = result["structured"]
        assert result["equal_to_plain"]
        assert (found["texts"], found["invalid"]) == (4, [])
        assert found["valid"] == found["ended"] >= 3
        of_categories = [r["structured"] for r in content["results"] if r["category"] != "all"]
        assert sum(one["texts"] for one in of_categories) == 4 * len(whole)
    known = whole["exact"]["acceptance_length"]
    assert known > 1.2 * whole["unconstrained"]["acceptance_length"]
    assert "held to a JSON schema" in (tmp_path / "report.md").read_text()


@pytest.mark.slow
def test_all_texts_of_the_set_that_end_are_of_their_schemas(tiny: Target, tmp_path: Path) -> None:
    chosen = EvalConfig(
        prompts=SET, max_new_tokens=200, num_assistant_tokens=[3], decoders=["exact"]
    )
    head = half_trained_head(tiny)
    content = run_evaluation(tiny, {"x": head}, chosen, tmp_path, timed=False)
    [whole] = [r for r in content["results"] if r["category"] == "all"]
    assert whole["equal_to_plain"]
    assert whole["structured"]["texts"] == 100
    assert whole["structured"]["valid"] == whole["structured"]["ended"] >= 80


def test_prompts_without_schemas_have_none_in_the_report(tiny: Target, tmp_path: Path) -> None:
    (tmp_path / "p.jsonl").write_text('{"prompt": "xyz"}\n')
    chosen = EvalConfig(
        prompts=str(tmp_path / "p.jsonl"), max_new_tokens=4, num_assistant_tokens=[2],
        decoders=["exact"],
    )  # fmt: skip
    content = run_evaluation(tiny, {"x": half_trained_head(tiny)}, chosen, tmp_path, timed=False)
    assert {r["structured"] for r in content["results"]} == {None}


def test_a_text_counts_as_valid_if_it_ended_and_is_of_the_schema(tiny: Target) -> None:
    schema = {"type": "object", "required": ["a"]}

    def text(number: int, written: str, end: bool = True) -> Text:
        tokens = tiny.tokenizer(written, add_special_tokens=False)["input_ids"]
        decoded = Decoded(tokens + [1] * end, 0.0, 0.0, None, [], [])
        return Text(f"{number}", 0, "", 1, decoded, decoded, None, None, None, [])

    texts = [text(0, '{"a": 1}'), text(1, '{"b": 1}'), text(2, '{"a": '), text(3, "{}", end=False)]
    found = validity(tiny, texts, dict.fromkeys("0123", schema))
    assert found is not None
    assert [found[name] for name in ("texts", "ended", "valid")] == [4, 3, 1]
    assert [one["id"] for one in found["invalid"]] == ["1", "2"]
    assert validity(tiny, texts, {}) is None


def test_nothing_is_fetched_for_a_schema(monkeypatch: pytest.MonkeyPatch) -> None:
    def fetched(*_: object, **__: object) -> None:
        raise AssertionError("something was fetched")

    monkeypatch.setattr("urllib.request.urlopen", fetched)
    with pytest.raises(Exception, match=r"example\.org"):
        fault("1", {"$ref": "https://example.org/schema.json"})


@pytest.mark.parametrize(
    ("schema", "reason"),
    [
        ("{", "is not JSON"),
        ([1], "is not an object"),
        ({"type": "nothing"}, "p-1 cannot be used: .*JSON schema"),
        ({"$ref": "https://example.org/a.json"}, "p-1 cannot be used: .*JSON schema"),
        ({"type": "string", "pattern": "a("}, "p-1 cannot be used: .*JSON schema"),
    ],
)
def test_a_schema_that_is_none_is_refused_with_its_prompt(
    tiny: Target, tmp_path: Path, schema: Any, reason: str
) -> None:
    path = tmp_path / "p.jsonl"
    path.write_text(json.dumps({"id": "p-1", "prompt": "x", "json_schema": schema}) + "\n")
    with pytest.raises(ValueError, match=reason):
        structured_output(tiny, schemas_of(load_prompts(path)))


def test_without_the_extra_one_line_names_it(tiny: Target, monkeypatch: pytest.MonkeyPatch) -> None:
    prompt = Prompt("p", "c", "s", [{"role": "user", "content": "x"}], True, json_schema={})
    monkeypatch.setattr("headstart.heads.structured.find_spec", lambda name: None)
    with pytest.raises(ModuleNotFoundError, match=r"pip install 'headstart\[structured\]'"):
        structured_output(tiny, schemas_of([prompt]))
    assert structured_output(tiny, {}) is None


def test_a_schema_is_part_of_the_set_that_a_report_records() -> None:
    messages = [{"role": "user", "content": "x"}]
    with_schemas = [
        Prompt("p", "c", "s", messages, True, json_schema=schema)
        for schema in (None, {"type": "integer"}, {"type": "string"})
    ]
    assert len({prompts_sha256([prompt]) for prompt in with_schemas}) == 3


def test_the_set_is_what_its_script_writes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = ROOT / "examples" / "structured_set.py"
    names: dict[str, Any] = {"__name__": "script"}
    exec(compile(path.read_text(encoding="utf-8"), str(path), "exec"), names)
    monkeypatch.setattr(sys, "argv", ["structured_set.py", str(tmp_path / "set.jsonl")])
    names["main"]()
    shipped = ROOT / "data" / "prompts" / "structured.jsonl"
    assert (tmp_path / "set.jsonl").read_bytes() == shipped.read_bytes()
    prompts = load_prompt_set(SET)
    assert len(prompts) == 100
    assert all(prompt.json_schema for prompt in prompts)
    assert len({prompt.text for prompt in prompts}) == 100

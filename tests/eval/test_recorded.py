"""Result files record a prompt set by its name and SHA-256, and nowhere the folder it lies in."""

import gzip
import hashlib
import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest

from headstart.cli.main import main
from headstart.configs.loader import load_config
from headstart.configs.schema import Config, SourceConfig
from headstart.data.prompts import load_prompts
from headstart.eval.compare import differences
from headstart.eval.recorded import prompt_set, recorded_set, set_name, without_paths
from tests.helpers.reports import one_result, report
from tests.helpers.runs import ROOT, SHORT

TELLTALE = "acme-secret-folder"
BUILT_IN = ROOT / "data" / "prompts"
QUICK = ("target.name=tiny-gemma4", "target.dtype=float32", "data.max_new_tokens=8")
STEPS = (
    "train.max_steps=6", "train.warmup_steps=1", "train.eval_steps=6", "train.likely_tokens=32",
    "train.negatives=32", "train.max_anchors=16", "train.multi_step_anchors=8",
    "data.generation_batch_size=8", "data.max_prompt_tokens=16",
    "data.validation_conversations=2",
)  # fmt: skip


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def write_rows(path: Path, count: int, of: str = "text_eval") -> Path:
    lines = (BUILT_IN / f"{of}.jsonl").read_text(encoding="utf-8").splitlines()[:count]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def test_no_result_file_tells_where_the_prompts_lie(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of a training with its evaluation, an evaluation, a simulation, an adaptation and a
    benchmark, whose prompts lie in a folder of their own, named whole."""
    there = tmp_path / TELLTALE
    training = write_rows(there / "mine.jsonl", 60, "text_train")
    evaluated, general = write_rows(there / "eval.jsonl", 4), write_rows(there / "rest.jsonl", 40)
    work = tmp_path / "work"
    work.mkdir()
    monkeypatch.chdir(work)
    asked = [*QUICK, f"data.prompts={training}"]
    for command in (
        ["train", "--config", "tiny", *asked, *SHORT, f"eval.prompts={evaluated}",
         "output_dir=run"],
        ["eval", "run/head", *QUICK[:2], f"eval.prompts={evaluated}", "eval.limit=2",
         "eval.max_new_tokens=8", "output_dir=report"],
        ["extract", *asked, "data.temperatures=0", "data.num_conversations=8", "output_dir=store"],
        ["simulate", "store", "run/head", *QUICK[:2], "output_dir=estimate"],
        ["adapt", "run/head", *asked, f"adapt.general_prompts={general}", *STEPS,
         "data.num_conversations=8", "adapt.held_out_prompts=4", "adapt.decoded_prompts=2",
         "output_dir=adapted"],
        ["bench", "extract", *asked, "bench.prompts=2", "--json", "bench.json"],
    ):  # fmt: skip
        monkeypatch.setattr("sys.argv", ["headstart", *command])
        assert main(command) == 0, command
    written = [p for p in work.rglob("*") if p.suffix in (".json", ".jsonl", ".md", ".html")]
    names = {path.name for path in written}
    assert names >= {
        "report.json", "report.md", "report.html", "summary.json", "estimate.json", "adapt.json",
        "adapt.md", "notes.json", "bench.json", "measurements.jsonl",
    }  # fmt: skip
    assert not [path for path in written if TELLTALE in path.read_text(encoding="utf-8")]

    def read(path: str) -> dict[str, Any]:
        content: dict[str, Any] = json.loads((work / path).read_text(encoding="utf-8"))
        return content

    mine, theirs, rest = (
        {"name": path.name, "sha256": sha256(path)} for path in (training, evaluated, general)
    )
    assert read("run/summary.json")["data"]["prompt_sets"] == [mine]
    for folder in ("run/eval", "report"):
        assert read(f"{folder}/report.json")["environment"]["prompt_set"] == theirs
        for page in ("report.md", "report.html"):
            text = (work / folder / page).read_text(encoding="utf-8")
            assert theirs["name"] in text
            assert theirs["sha256"][:12] in text
    assert read("adapted/adapt.json")["prompt_sets"] == {"domain": [mine], "general": [rest]}
    assert read("bench.json")["environment"]["prompt_set"] == mine


def test_a_set_has_one_name_and_one_sum_wherever_it_lies(tmp_path: Path) -> None:
    path = write_rows(tmp_path / "a" / "mine.jsonl", 5)
    copy = write_rows(tmp_path / "b" / "mine.jsonl", 5)
    found = prompt_set(str(path), load_prompts(path))
    assert found == {"name": "mine.jsonl", "sha256": sha256(path)}
    assert prompt_set(str(copy), load_prompts(copy)) == found
    whole = BUILT_IN / "text_eval.jsonl"
    for name in ("builtin:text_eval", "data/prompts/text_eval.jsonl"):
        assert prompt_set(name, load_prompts(name)) == {
            "name": "builtin:text_eval", "sha256": sha256(whole),
        }  # fmt: skip
    benchmark = f"gsm8k={copy}"
    assert prompt_set(benchmark, []) == {"name": "gsm8k=mine.jsonl", "sha256": sha256(copy)}


def test_the_sum_of_several_files_is_that_of_what_they_ask(tmp_path: Path) -> None:
    """Not of how the files are written."""
    rows = [{"id": str(n), "category": "c", "prompt": f"what is {n}?"} for n in range(4)]

    def folder(name: str, rows: list[dict[str, str]], zipped: bool = False) -> dict[str, Any]:
        (tmp_path / name / "set").mkdir(parents=True)
        for number, own in enumerate((rows[:2], rows[2:])):
            text = "".join(json.dumps(row) + "\n" for row in own).encode()
            file = tmp_path / name / "set" / f"{number}.jsonl{'.gz' if zipped else ''}"
            file.write_bytes(gzip.compress(text) if zipped else text)
        path = str(tmp_path / name / "set")
        return prompt_set(path, load_prompts(path))

    one = folder("one", rows)
    assert one["name"] == "set"
    assert folder("two", rows, zipped=True) == one
    changed = [*rows[:3], rows[3] | {"prompt": "what is 33?"}]
    assert folder("three", changed)["sha256"] != one["sha256"]
    assert folder("four", rows[::-1])["sha256"] != one["sha256"]
    assert prompt_set(str(tmp_path / "one" / "set"))["sha256"] is None


def test_a_dataset_is_named_with_what_chooses_from_it() -> None:
    assert set_name("org/data") == "org/data"
    source = SourceConfig(path="org/data", name="main", split="test", revision="abc", limit=4)
    assert set_name(source) == "org/data (name=main, split=test, revision=abc)"
    assert set_name("spec-bench") == "spec-bench"


def test_compare_says_when_other_prompts_were_measured() -> None:
    """By the sum where both know it, else by the name."""

    def told(before: dict[str, Any], after: dict[str, Any]) -> list[str]:
        pair = []
        for env in (before, after):
            content = report([one_result("exact", 4, 1.5)])
            del content["environment"]["prompt_set"]
            content["environment"] |= env
            pair.append(content)
        return [line for line in differences(*pair) if line.startswith("prompts")]

    def of(name: str, digit: str) -> dict[str, Any]:
        return {"prompt_set": {"name": name, "sha256": digit * 64}}

    assert not told(of("a.jsonl", "1"), of("b.jsonl", "1"))
    (line,) = told(of("a.jsonl", "1"), of("a.jsonl", "2"))
    assert "1" * 12 in line
    assert "2" * 12 in line
    assert not told({"prompts": "my/a.jsonl"}, of("a.jsonl", "1"))
    (line,) = told({"prompts": "/home/me/a.jsonl"}, of("b.jsonl", "1"))
    assert "/home/me" not in line
    assert recorded_set({"prompts": "data/prompts/text_eval.jsonl"})["name"] == "builtin:text_eval"


def test_a_folder_that_is_called_like_a_setting_takes_nothing_elses_name() -> None:
    """Whatever word of the settings the target's folder has for a name."""
    config = load_config("quickstart")

    def words(value: Any) -> Iterator[str]:
        if isinstance(value, dict):
            yield from value
        below = value.values() if isinstance(value, dict) else value
        if isinstance(below, str):
            yield below
        elif isinstance(below, Iterable):
            for one in below:
                yield from words(one)

    dumped = config.model_dump(mode="json")
    for word in {*words(dumped), "model", "float8"}:
        dumped["target"]["name"] = word
        public = without_paths(dumped, {word: "ORG/mine"})
        assert public.keys() == dumped.keys()
        assert public["target"] == {**dumped["target"], "name": "ORG/mine"}
        assert public["train"] == dumped["train"]
        assert public["data"]["storage"] == dumped["data"]["storage"]
        assert Config.model_validate(public).target.name == "ORG/mine"


def test_what_a_report_holds_for_each_head_goes_by_the_name_that_others_know() -> None:
    costs = {"head": {"exact": {"c": 0.1, "v": [1.0, 1.1]}}}
    row = {"head": "head", "decoder": "exact", "acceptance_length": 2.0}
    report = {"costs": costs, "results": [row], "environment": {"heads": ["head"]}}
    assert without_paths(report, {"head": "ORG/mine"}) == {
        "costs": {"ORG/mine": costs["head"]},
        "results": [{**row, "head": "ORG/mine"}],
        "environment": {"heads": ["ORG/mine"]},
    }

"""Two reports side by side: paired by prompt, and no change is made of noise."""

import json
import random
from pathlib import Path
from typing import Any

import pytest

from headstart.cli.main import main
from headstart.eval.compare import compare, read_report
from headstart.eval.report import PER_TEXT


def report(
    rows: list[dict[str, Any]], head: str = "h", decoder: str = "exact", **environment: Any
) -> dict[str, Any]:
    per_text = [[row[column] for column in PER_TEXT] for row in rows]
    result = {
        "head": head, "decoder": decoder, "num_assistant_tokens": 4, "temperature": 0.0,
        "category": "all", "per_text": per_text,
    }  # fmt: skip
    asked = {"name": "mine.jsonl", "sha256": "ab" * 32}
    where = {"target": "t", "threads": 2, "prompt_set": asked} | environment
    return {
        "schema": 4, "environment": where, "per_text_columns": PER_TEXT, "results": [result]
    }  # fmt: skip


def texts(count: int, seconds: float, jitter: float, seed: int = 0) -> list[dict[str, Any]]:
    """Texts of very different length and luck, which a paired comparison does not mind."""
    rng, luck = random.Random(seed), random.Random(1)
    rows = []
    for i in range(count):
        rounds = luck.randint(5, 60)
        accepted = luck.randint(0, 2 * rounds)
        tokens = rounds + accepted + 1
        rows.append({
            "id": f"p{i}", "turn": 0, "seed": None, "category": "ab"[i % 2], "prompt_tokens": 9,
            "plain_seconds": tokens * 0.1, "plain_tokens": tokens,
            "seconds": rounds * seconds * (1 + rng.uniform(0, jitter)),
            "tokens": tokens, "rounds": rounds, "accepted": accepted,
        })  # fmt: skip
    return rows


def by_name(before: dict[str, Any], after: dict[str, Any]) -> dict[tuple[str, str], Any]:
    return {(c.category, c.measure): c for c in compare(before, after)}


def test_a_small_change_is_seen_where_the_same_prompts_were_measured() -> None:
    """2% faster on 30 texts that differ among each other by a factor of three."""
    before, after = report(texts(30, 0.2, 0.01)), report(texts(30, 0.196, 0.01, seed=5), "other")
    found = by_name(before, after)
    assert set(found) == {
        (category, measure)
        for category in ("all", "a", "b")
        for measure in ("acceptance length", "speedup", "tokens a second")
    }
    change = found["all", "speedup"]
    assert change.paired
    assert change.says == "significant"
    assert change.after / change.before == pytest.approx(1 / 0.98, rel=0.01)
    same = found["all", "acceptance length"]
    assert (same.after - same.before, same.interval, same.says) == (0, (0, 0), "within chance")


def test_noise_is_no_change_and_prompts_of_their_own_are_drawn_apart() -> None:
    """Half of each text's time is chance. Without shared prompts 2% are lost among the texts."""
    noisy = by_name(report(texts(30, 0.2, 0.5)), report(texts(30, 0.2, 0.5, seed=5)))
    assert noisy["all", "speedup"].says == "within chance"
    others = [row | {"id": f"other {row['id']}"} for row in texts(30, 0.196, 0.01, seed=5)]
    apart = by_name(report(texts(30, 0.2, 0.01)), report(others))
    assert not apart["all", "speedup"].paired
    assert apart["all", "speedup"].says == "within chance"
    assert apart["all", "acceptance length"].interval[0] < 0


def test_a_few_texts_say_nothing_however_far_they_are_apart() -> None:
    for count in (1, 4):
        found = by_name(report(texts(count, 0.2, 0.01)), report(texts(count, 0.1, 0.01, seed=5)))
        change = found["all", "speedup"]
        assert change.interval[0] > 0
        assert change.says == "too few prompts"
    seeds = [row | {"turn": turn} for turn in range(8) for row in texts(1, 0.2, 0.01, seed=turn)]
    faster = [row | {"seconds": row["seconds"] / 2} for row in seeds]
    change = by_name(report(seeds), report(faster))["all", "speedup"]
    assert (change.texts, change.says) == (8, "too few prompts")


def test_only_texts_that_both_have_are_compared() -> None:
    rows = texts(10, 0.2, 0.0)
    odd = rows[3] | {"id": "odd", "accepted": 10**6, "tokens": 10**6}
    found = by_name(report(rows[:8]), report([*rows[2:], odd]))
    assert found["all", "acceptance length"].texts == 6
    assert found["all", "acceptance length"].interval == (0, 0)


def test_prompts_of_another_set_are_not_taken_for_those_of_their_name() -> None:
    """Rows without ids are called by the file's name and their number."""
    first = report(texts(40, 0.2, 0.0))
    other: dict[str, Any] = {"prompt_set": {"name": "mine.jsonl", "sha256": "cd" * 32}}
    longer = [row | {"prompt_tokens": 12} for row in texts(200, 0.1, 0.0)]
    found = by_name(first, report(longer, **other))["all", "acceptance length"]
    assert not found.paired
    grown = by_name(first, report(texts(50, 0.1, 0.0), **other))["all", "acceptance length"]
    assert grown.paired, "most prompts of a set that has grown are the same"
    assert grown.texts == 40


def test_two_decoders_of_a_report_are_compared_text_by_text(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    both = report(texts(30, 0.2, 0.01), decoder="transformers")
    both["results"] += report(texts(30, 0.1, 0.01, seed=5))["results"]
    both["results"].append(both["results"][1] | {"num_assistant_tokens": 2})
    found = compare(both, both, ("transformers", "exact"))
    assert {c.variant for c in found} == {"transformers K=4 -> exact K=4"}
    change = next(c for c in found if (c.category, c.measure) == ("all", "speedup"))
    assert change.after / change.before == pytest.approx(2, rel=0.02)
    (tmp_path / "report.json").write_text(json.dumps(both))
    assert main(["compare", str(tmp_path), "eval.decoders=transformers,exact"]) == 0
    assert "significant" in capsys.readouterr().out
    assert main(["compare", str(tmp_path)]) == 1
    assert "name a second report" in capsys.readouterr().err


def sampled(content: dict[str, Any], **sampling: Any) -> dict[str, Any]:
    """The report as if its results were sampled so."""
    results = [result | sampling for result in content["results"]]
    return content | {"results": results}


def test_only_sides_that_choose_tokens_alike_are_compared() -> None:
    """Not a sampled one with a greedy one, in two reports or in one, and not samples of another
    top-k or top-p."""
    rows, own = texts(8, 0.2, 0.0), {"temperature": 1.0, "top_k": 64, "top_p": 0.95}
    greedy = report(rows)
    drawn = sampled(greedy, **own)
    assert {c.variant for c in compare(drawn, drawn)} == {"exact T=1 K=4"}
    others = [
        greedy,
        *(sampled(greedy, **own | {k: v}) for k, v in (("top_k", 32), ("top_p", 1.0))),
    ]
    for other in others:
        with pytest.raises(ValueError, match="in common"):
            compare(drawn, other)
    both = greedy | {"results": [*greedy["results"], *sampled(greedy, **own)["results"]]}
    both["results"] += [r | {"decoder": "cost"} for r in both["results"]]
    found = {c.variant for c in compare(both, both, ("exact", "cost"))}
    assert found == {"exact K=4 -> cost K=4", "exact T=1 K=4 -> cost T=1 K=4"}
    # Reports of before have top-k and top-p among their settings, and no column of seeds.
    before = sampled(report(rows, top_k=64, top_p=0.95), temperature=1.0)
    assert all(c.paired for c in compare(before, drawn))
    with pytest.raises(ValueError, match="in common"):
        compare(sampled(report(rows, top_k=None, top_p=0.95), temperature=1.0), drawn)


def test_texts_are_paired_by_their_seeds() -> None:
    def with_seeds(rows: list[dict[str, Any]], *seeds: int) -> dict[str, Any]:
        content = report([row | {"seed": seed} for row in rows for seed in seeds])
        return sampled(content, temperature=1.0, top_k=None, top_p=1.0)

    rows = texts(8, 0.2, 0.0)
    found = {c.measure: c for c in compare(with_seeds(rows, 0, 1), with_seeds(rows, 1, 2))
             if c.category == "all"}  # fmt: skip
    assert found["speedup"].texts == 8, "of the seed that both have"
    assert found["speedup"].paired
    whole = compare(with_seeds(rows, 0, 1), with_seeds(rows, 1, 0))
    assert next(c for c in whole if c.category == "all").texts == 16
    # Twice the texts of the same prompts are no surer.
    other = texts(8, 0.2, 0.5, seed=3)
    once, twice = (
        next(c for c in compare(with_seeds(rows, *s), with_seeds(other, *s))
             if (c.category, c.measure) == ("all", "speedup")) for s in ((0,), (0, 1))
    )  # fmt: skip
    assert once.interval == pytest.approx(twice.interval)


def test_the_command_says_what_else_changed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, threads in (("a", 2), ("b", 4)):
        (tmp_path / name).mkdir()
        content = report(texts(8, 0.2, 0.1), threads=threads)
        (tmp_path / name / "report.json").write_text(json.dumps(content))
    assert main(["compare", str(tmp_path / "a"), str(tmp_path / "b" / "report.json")]) == 0
    assert "Not the same: threads: 2 -> 4" in capsys.readouterr().out

    assert main(["compare", str(tmp_path), str(tmp_path / "b")]) == 1
    assert "no report at" in capsys.readouterr().err
    (tmp_path / "report.json").write_text('{"schema": 1}')
    with pytest.raises(ValueError, match="has schema 1"):
        read_report(tmp_path)
    with pytest.raises(ValueError, match="in common"):
        compare(report(texts(2, 0.2, 0.1)), report(texts(2, 0.2, 0.1), decoder="cost"))

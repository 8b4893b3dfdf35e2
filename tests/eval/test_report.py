"""The evaluation: what is compared with what, and that the report says what was measured."""

import json
from html import unescape
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from headstart.cli.main import main
from headstart.common.machine import environment, machine_name
from headstart.configs.schema import Decoder, EvalConfig
from headstart.data.prompts import load_prompts
from headstart.data.templates import encode_prompt
from headstart.eval.compare import compare
from headstart.eval.decoding import Decoded, decode
from headstart.eval.draft_cost import Costs
from headstart.eval.measurements import Measurements
from headstart.eval.report import run_evaluation
from headstart.eval.statistics import RESAMPLES, slow_baseline
from headstart.heads.target import Target
from headstart.heads.tokens import Sampling
from tests.helpers.heads import half_trained_head, ordered_head
from tests.helpers.models import make_target


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("headstart.eval.draft_cost.COST_TURNS", 2)


def prompt_file(folder: Path, count: int) -> str:
    path = folder / "p.jsonl"
    rows = [{"prompt": "xyz" * (i + 1), "category": "ab"[i % 2]} for i in range(count)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def settings(folder: Path, prompts: int, **kwargs: Any) -> EvalConfig:
    chosen: dict[str, Any] = {"num_assistant_tokens": [2], "max_new_tokens": 12} | kwargs
    return EvalConfig(prompts=prompt_file(folder, prompts), **chosen)


def test_the_report_holds_the_schema_that_others_read(tiny: Target, tmp_path: Path) -> None:
    chosen = settings(tmp_path, 5, limit=4, num_assistant_tokens=[2, 3], max_new_tokens=20)
    run_evaluation(tiny, {"heads/x": half_trained_head(tiny)}, chosen, tmp_path / "out")
    content = json.loads((tmp_path / "out" / "report.json").read_text())
    assert content["schema"] == 4
    assert content["environment"]["dtype"] == "float32"
    assert content["verdict"] in (tmp_path / "out" / "report.md").read_text()
    assert content["noise"]["texts"] == 1
    names = ("decoder", "num_assistant_tokens", "category", "prompts")
    found = [r for r in content["results"] if r["looping_texts"] == "with"]
    assert {tuple(r[name] for name in names) for r in found} == {
        (decoder, k, category, n)
        for decoder in ("transformers", "exact")
        for k in (2, 3)
        for category, n in (("all", 4), ("a", 2), ("b", 2))
    }
    for r in content["results"]:
        k = r["num_assistant_tokens"]
        assert (r["head"], r["temperature"], r["equal_to_plain"]) == ("heads/x", 0, True)
        assert len(r["conditional_acceptance_rate"]) == k
        assert r["acceptance_length"] == 1 + sum(r["accepted"]) / r["rounds"]
        assert r["acceptance_rate"] == sum(r["accepted"]) / r["drafted"]
        assert r["cumulative_acceptance_rate"] == [a / r["rounds"] for a in r["accepted"]]
        histogram = r["accepted_histogram"]
        assert sum(histogram) == r["rounds"] == sum(p["rounds"] for p in r["by_position"])
        assert sum(n * count for n, count in enumerate(histogram)) == sum(r["accepted"])
        assert sum(c["rounds"] for c in r["by_context"]) == r["rounds"]
        assert sum(c["texts"] for c in r["by_context"]) == r["texts"]
        for total, count in (("new_tokens", "tokens"), ("rounds", "rounds"), ("drafted",) * 2):
            assert sum(span[count] for span in r["by_span"]) == r[total]
        for name in ("reached", "accepted"):
            assert np.sum([span[name] for span in r["by_span"]], axis=0).tolist() == r[name]
        assert r["target_forwards"] == r["rounds"] + r["texts"]
        assert r["target_forwards_per_token"] == r["target_forwards"] / r["new_tokens"]
        assert r["new_tokens"] == sum(r["accepted"]) + r["rounds"] + r["texts"]
        assert r["baseline_target_forwards"] == r["new_tokens"]
        for name in ("speedup", "acceptance_length"):
            low, high = r[f"{name}_interval"]
            assert low <= r[name] <= high
        assert r["time_to_first_token"] > 0
        assert r["predicted_decode_speedup"] > 0
        assert r["decode_tokens_per_second"] > r["tokens_per_second"] * 0.9
        assert (r["drafting_share"] is None) == (r["decoder"] == "transformers")
        assert r["drafting_share"] is None or 0 < r["drafting_share"] < 1
        if "per_text" in r:
            rows = [dict(zip(content["per_text_columns"], t, strict=True)) for t in r["per_text"]]
            assert sum(row["accepted"] for row in rows) == sum(r["accepted"])
            assert sum(row["tokens"] for row in rows) == r["new_tokens"]


def test_texts_that_diverge_are_counted_with_their_logit_gap(
    tiny: Target, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A decoder that changes the target's mind must not go unnoticed."""

    def meddle(target: Target, ids: list[int], *args: Any, **kwargs: Any) -> Decoded:
        decoded = decode(target, ids, *args, **kwargs)
        if len(ids) == shortest and len(decoded.tokens) > 5:
            decoded.tokens[5] += 1
        return decoded

    chosen = settings(tmp_path, 2, decoders=["transformers"])
    prompts = load_prompts(chosen.prompts)
    shortest = len(encode_prompt(prompts[0], tiny.tokenizer))
    monkeypatch.setattr("headstart.eval.decoding.decode", meddle)
    content = run_evaluation(tiny, {"h": half_trained_head(tiny)}, chosen, tmp_path / "out")
    whole = content["results"][0]
    assert whole["equal_to_plain"] is False
    assert whole["diverged_share"] == 0.5
    (diverged,) = whole["diverged"]
    ids = encode_prompt(prompts[0], tiny.tokenizer)
    ids += decode(tiny, ids, 12).tokens[:5]
    logits = tiny.model(torch.tensor([ids])).logits[0, -1]
    best = logits.topk(2).values
    right = decode(tiny, ids, 1).tokens[0]
    assert diverged.pop("rounding") < 1e-3 < diverged["token_logit_gap"]
    assert diverged == {
        "id": prompts[0].id,
        "turn": 0,
        "token": 5,
        "top2_logit_gap": pytest.approx(float(best[0] - best[1]), abs=1e-4),
        "token_logit_gap": pytest.approx(float(logits[right] - logits[right + 1]), abs=1e-4),
        "within_rounding": False,
    }
    assert "more than rounding explains" in (tmp_path / "out" / "report.md").read_text()


def test_a_report_names_its_machine_by_what_ran_it() -> None:
    where = {"accelerator": None, "threads": 1, "processor": "P"}
    assert machine_name(where) == "1 thread of P"
    assert machine_name(where | {"threads": 2}) == "2 threads of P"
    assert machine_name(where | {"accelerator": "A"}) == "A"
    here = environment(torch.device("cpu"))
    other = here | {"instructions": "others"}
    assert machine_name(other) != machine_name(here), "processors of one name are not one machine"


def test_heads_small_models_and_decoders_are_compared_in_one_run(
    tiny: Target, tmp_path: Path
) -> None:
    """Those that choose K themselves once for each head; every text is that of plain decoding."""
    names: list[Decoder] = ["transformers", "exact", "heuristic", "cost", "hybrid"]
    chosen = settings(
        tmp_path, 3, num_assistant_tokens=[2, 3], max_new_tokens=24,
        decoders=[*names, "lookup", "draft-model"], draft_models=["small"],
    )  # fmt: skip
    heads = {"h": half_trained_head(tiny), "i": half_trained_head(tiny)}
    small = {"small": make_target("gemma3").model}
    content = run_evaluation(tiny, heads, chosen, tmp_path / "out", draft_models=small)
    whole = [r for r in content["results"] if "per_text" in r]
    fixed = [(name, head, k) for name in names[:2] for head in "hi" for k in (2, 3)]
    own = [(name, head, 8) for name in names[2:] for head in "hi"]
    free = [("lookup", None, 2), ("lookup", None, 3)]
    found = [(r["decoder"], r["head"], r["num_assistant_tokens"]) for r in whole]
    assert found == [*fixed, *own, *free, ("draft-model", "small", 2), ("draft-model", "small", 3)]
    assert all(r["equal_to_plain"] for r in whole)
    assert all(r["new_tokens"] == whole[0]["new_tokens"] for r in whole)
    assert content["costs"].keys() == heads.keys()
    for example in content["examples"]:
        kept = "".join(text for text, kind in example["tokens"] if kind != "rejected")
        prompt = next(p for p in load_prompts(chosen.prompts) if p.id == example["id"])
        tokens = decode(tiny, encode_prompt(prompt, tiny.tokenizer), 24).tokens
        assert kept == "".join(tiny.tokenizer.decode([token]) for token in tokens)


def test_a_report_says_that_its_baseline_is_slower_than_a_verification(
    tiny: Target, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    costs = {"transformers": Costs(0.1, [1.0, 0.76, 1.1]), "exact": Costs(0.1, [1.0, 0.97, 1.1])}
    monkeypatch.setattr("headstart.eval.report.measure_costs", lambda *args: costs)
    chosen = settings(tmp_path, 2, max_new_tokens=6)
    content = run_evaluation(tiny, {"h": half_trained_head(tiny)}, chosen, tmp_path / "out")
    assert content["least_verification"] == 0.76
    line = slow_baseline(0.76)
    assert line is not None
    for name in ("report.md", "report.html"):
        text = unescape((tmp_path / "out" / name).read_text(encoding="utf-8"))
        assert line in " ".join(text.split())


def test_decoders_that_cannot_be_compared_are_refused(tiny: Target, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="exact needs a head"):
        run_evaluation(tiny, {}, settings(tmp_path, 1, decoders=["exact"]), tmp_path / "out")
    with pytest.raises(ValueError, match="draft-model and draft_models go together"):
        settings(tmp_path, 1, decoders=["draft-model"])
    with pytest.raises(ValueError, match="decoders names one twice"):
        settings(tmp_path, 1, decoders=["exact", "exact"])
    for nothing in ("decoders", "num_assistant_tokens", "seeds"):
        with pytest.raises(ValueError, match=f"{nothing} needs one value or more"):
            settings(tmp_path, 1, **{nothing: []})
    settings(tmp_path, 1, decoders=["cost", "hybrid"], num_assistant_tokens=[])
    for sampled in ({"top_k": 5}, {"seeds": [5]}, {"temperatures": ["model"], "top_p": 0.5}):
        with pytest.raises(ValueError, match="give a temperature above 0 too"):
            settings(tmp_path, 1, **sampled)
    with pytest.raises(ValueError, match="seeds names one twice"):
        settings(tmp_path, 1, temperatures=[1.0], seeds=[5, 5])
    other = make_target("gemma3").model
    other.config.vocab_size = 7
    chosen = settings(tmp_path, 1, decoders=["draft-model"], draft_models=["small"])
    with pytest.raises(ValueError, match="its vocabulary has 7 tokens"):
        run_evaluation(tiny, {}, chosen, tmp_path / "out", draft_models={"small": other})


def test_sampled_texts_have_a_baseline_of_their_own(tiny: Target, tmp_path: Path) -> None:
    """Each temperature beside plain decoding at it; nothing parts, since nothing need be equal; a
    second run draws the same, and every seed its own."""
    chosen = settings(tmp_path, 2, temperatures=[0.0, 1.0], top_k=50, top_p=0.9)
    heads = {"h": half_trained_head(tiny)}
    content = run_evaluation(tiny, heads, chosen, tmp_path / "out")
    whole = [r for r in content["results"] if "per_text" in r]
    assert [(r["decoder"], r["temperature"]) for r in whole] == [
        ("transformers", 0), ("transformers", 1), ("exact", 0), ("exact", 1)
    ]  # fmt: skip
    assert [r["equal_to_plain"] for r in whole] == [True, None, True, None]
    assert [r["seeds"] for r in whole] == [[], [0, 1], [], [0, 1]]
    assert [(r["prompts"], r["texts"]) for r in whole] == [(2, 2), (2, 4)] * 2
    sampled = "temperature 1, top-k 50, top-p 0.9"
    assert f"At {sampled}: " in content["verdict"]
    for name in ("report.md", "report.html"):
        text = (tmp_path / "out" / name).read_text()
        assert "exact T=1" in text
        assert sampled in text
    file = tmp_path / "out" / "measurements.jsonl"

    def texts() -> list[Any]:
        lines = [json.loads(line) for line in file.read_text().splitlines()[1:]]
        return [
            [[t["plain"]["tokens"], *(v["decoded"]["tokens"] for v in t["variants"])]
             for t in line["turns"]] for line in lines
        ]  # fmt: skip

    first = texts()
    for greedy, one, other in first:
        assert greedy[0] == greedy[2] != one[0] != other[0]
        assert one[2] != other[2]
    run_evaluation(tiny, heads, chosen, tmp_path / "out")
    assert texts() == first


def test_two_seeds_of_a_prompt_are_one_prompt_in_the_intervals(
    tiny: Target, tmp_path: Path
) -> None:
    """A result is over the texts of all seeds: its figures are of their sums, its intervals draw
    prompts, each with all of its texts."""
    chosen = settings(tmp_path, 5, temperatures=[1.0], decoders=["exact"], seeds=[3, 8])
    content = run_evaluation(tiny, {"h": half_trained_head(tiny)}, chosen, tmp_path / "out")
    (whole,) = [r for r in content["results"] if "per_text" in r]
    rows = [dict(zip(content["per_text_columns"], t, strict=True)) for t in whole["per_text"]]
    assert sorted((row["id"], row["seed"]) for row in rows) == sorted(
        (p.id, seed) for p in load_prompts(chosen.prompts) for seed in (3, 8)
    )
    names = ("plain_seconds", "plain_tokens", "seconds", "tokens", "rounds", "accepted")
    sums = {name: sum(row[name] for row in rows) for name in names}
    assert whole["acceptance_length"] == 1 + sums["accepted"] / sums["rounds"]
    speedup = (sums["plain_seconds"] / sums["plain_tokens"]) / (sums["seconds"] / sums["tokens"])
    assert whole["speedup"] == pytest.approx(speedup, rel=1e-3)  # rows are rounded
    # By hand: one row a prompt, its texts added up.
    ids = list(dict.fromkeys(row["id"] for row in rows))
    table = np.array([[sum(r[n] for r in rows if r["id"] == i) for n in names] for i in ids])
    drawn = np.random.default_rng(0).multinomial(len(ids), [1 / len(ids)] * len(ids), RESAMPLES)
    s = dict(zip(names, (drawn @ table).T, strict=True))
    lengths = np.percentile(1 + s["accepted"] / s["rounds"], [2.5, 97.5])
    assert whole["acceptance_length_interval"] == pytest.approx(lengths)
    speedups = (s["plain_seconds"] / s["plain_tokens"]) / (s["seconds"] / s["tokens"])
    wanted = np.percentile(speedups, [2.5, 97.5])
    assert whole["speedup_interval"] == pytest.approx(wanted, rel=1e-3)


def test_model_is_the_targets_own_sampling(tiny: Target, tmp_path: Path) -> None:
    """Its own top-k and top-p, whatever those of the numbers are; two of one temperature could not
    be told apart."""
    tiny.generation.update(do_sample=True, temperature=0.9, top_k=64, top_p=0.95)
    heads = {"h": half_trained_head(tiny)}
    chosen = settings(
        tmp_path, 2, temperatures=[0.0, "model", 0.5], top_k=3, decoders=["exact"], seeds=[0]
    )
    content = run_evaluation(tiny, heads, chosen, tmp_path / "out")
    found = [r for r in content["results"] if "per_text" in r]
    assert [(r["temperature"], r["top_k"], r["top_p"]) for r in found] == [
        (0, None, 1), (0.9, 64, 0.95), (0.5, 3, 1)
    ]  # fmt: skip
    tiny.generation.update(top_k=32)
    with pytest.raises(ValueError, match="with own_sampling="):
        run_evaluation(tiny, heads, chosen, tmp_path / "out", resume=True)
    twice = settings(tmp_path, 2, temperatures=[0.9, "model"])
    with pytest.raises(ValueError, match=r"top-k 32, top-p 0\.95 here"):
        run_evaluation(tiny, heads, twice, tmp_path / "out")


def test_sampling_is_from_the_likeliest_tokens_alone(tiny: Target) -> None:
    ids = [5, 6, 7]
    greedy = decode(tiny, ids, 12).tokens
    for sampling in (Sampling(1.0, top_k=1), Sampling(1.0, top_p=1e-6), Sampling(1e-4)):
        assert decode(tiny, ids, 12, sampling=sampling).tokens == greedy
    assert len({tuple(decode(tiny, ids, 12, sampling=Sampling(1.0), seed=i).tokens)
                for i in range(4)}) == 4  # fmt: skip


def test_each_turn_is_given_its_whole_text(tiny: Target, tmp_path: Path) -> None:
    """The second turn follows plain decoding's own answer, for every side."""
    path = tmp_path / "turns.jsonl"
    path.write_text(json.dumps({"turns": ["first", "second"], "id": "q", "category": "c"}) + "\n")
    chosen = EvalConfig(
        prompts=str(path), num_assistant_tokens=[2], max_new_tokens=10, decoders=["exact"]
    )
    content = run_evaluation(tiny, {"h": half_trained_head(tiny)}, chosen, tmp_path / "out")
    (result,) = [r for r in content["results"] if "per_text" in r]
    assert (result["prompts"], result["texts"], result["equal_to_plain"]) == (1, 2, True)
    line = json.loads((tmp_path / "out" / "measurements.jsonl").read_text().splitlines()[1])
    first, second = line["turns"]
    answer = tiny.tokenizer.decode(first["plain"]["tokens"], skip_special_tokens=True)
    whole = tiny.tokenizer(f"first\n{answer}\nsecond")["input_ids"]
    assert second["prompt_len"] == len(whole)
    assert second["plain"]["tokens"] == decode(tiny, whole, 10).tokens


def test_a_killed_evaluation_goes_on_with_what_is_missing(
    tiny: Target, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Finished prompts are kept, a line that the kill cut short is not; other settings are refused
    with both values."""
    chosen = settings(tmp_path, 4, max_new_tokens=10)
    heads, out = {"h": half_trained_head(tiny)}, tmp_path / "out"
    whole = run_evaluation(tiny, heads, chosen, out)
    file = out / "measurements.jsonl"
    lines = file.read_text().splitlines()
    assert len(lines) == 5, "the settings and four prompts"
    file.write_text("\n".join([*lines[:3], lines[3][:40]]))
    decoded: list[int] = []

    def note(target: Target, ids: list[int], *args: Any, **kwargs: Any) -> Decoded:
        decoded.append(len(ids))
        return decode(target, ids, *args, **kwargs)

    monkeypatch.setattr("headstart.eval.measurements.decode", note)  # plain decoding
    again = run_evaluation(tiny, heads, chosen, out, resume=True)
    missing = [json.loads(line)["turns"][0] for line in lines[3:]]
    twice = sum(turn["again_seconds"] is not None for turn in missing)
    assert len(decoded) == 1 + 2 + twice, "a warm-up and the two prompts that were missing"
    assert again["costs"] == whole["costs"], "measured once"
    counts = ("prompts", "category", "acceptance_length", "new_tokens", "rounds")
    assert [[r[c] for c in counts] for r in again["results"]] == [
        [r[c] for c in counts] for r in whole["results"]
    ]
    assert file.read_text().splitlines()[:3] == lines[:3]

    other = chosen.model_copy(update={"max_new_tokens": 12})
    with pytest.raises(ValueError, match="with max_new_tokens=10, not 12"):
        run_evaluation(tiny, heads, other, out, resume=True)
    of = json.loads(lines[0])
    of["settings"]["machine"][0] = "NVIDIA Z1"
    file.write_text("\n".join([json.dumps(of), *lines[1:]]))
    with pytest.raises(ValueError, match=r"with machine=.*NVIDIA Z1"):
        run_evaluation(tiny, heads, chosen, out, resume=True)
    del of["settings"]["machine"]  # as earlier versions wrote it
    file.write_text("\n".join([json.dumps(of), *lines[1:]]) + "\n")
    run_evaluation(tiny, heads, chosen, out, resume=True)
    file.write_text("\n".join([lines[0], lines[1][:40], *lines[2:]]))
    with pytest.raises(ValueError, match="line 2 is damaged"):
        run_evaluation(tiny, heads, chosen, out, resume=True)


def test_what_killed_processes_measured_is_taken_in(
    tiny: Target, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each process of a launch keeps a file of its own; a later one, of one process, decodes what
    is in none of them, in the order of a run that was never stopped. Times of a shared device are
    no speeds."""
    chosen = settings(tmp_path, 4, max_new_tokens=10)
    heads, out = {"h": half_trained_head(tiny)}, tmp_path / "out"
    whole = run_evaluation(tiny, heads, chosen, out)
    file, part = out / "measurements.jsonl", out / "measurements-process-1.jsonl"
    lines = file.read_text().splitlines()
    shared = json.dumps(json.loads(lines[2]) | {"untimed": True})
    file.write_text("\n".join([lines[0], lines[1], lines[3][:40]]))
    part.write_text("\n".join([lines[0], shared, lines[4][:40]]))
    prompts: list[str] = []
    add = Measurements.add

    def note(kept: Measurements, line: dict[str, Any]) -> None:
        prompts.append(line["id"])
        add(kept, line)

    monkeypatch.setattr(Measurements, "add", note)
    again = run_evaluation(tiny, heads, chosen, out, resume=True)
    assert prompts == [json.loads(line)["id"] for line in lines[3:]]
    assert not part.exists()
    kept = [json.loads(line) for line in file.read_text().splitlines()[1:]]
    assert [line["id"] for line in kept] == [json.loads(line)["id"] for line in lines[1:]]
    for before, after in zip(whole["results"], again["results"], strict=True):
        assert after["speedup"] is None
        assert after["acceptance_length_interval"] == before["acceptance_length_interval"]
    assert "shared a device" in again["verdict"]
    assert {change.measure for change in compare(whole, again)} == {"acceptance length"}

    part.write_text("\n".join([lines[0].replace('"target"', '"other"'), lines[3], ""]))
    run_evaluation(tiny, heads, chosen, out)  # anew: of other settings nothing is taken in
    aside = (out / "measurements.1.jsonl").read_text().splitlines()
    assert len(aside) == 5
    assert not part.exists()


def test_the_command_measures_a_head_and_names_what_is_wrong(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], tiny: Target
) -> None:
    argv = ["eval", "target.name=tiny-gemma4", f"eval.prompts={prompt_file(tmp_path, 2)}"]
    argv += ["eval.max_new_tokens=6", "target.dtype=float32", f"output_dir={tmp_path / 'out'}"]
    assert main([*argv, "eval.decoders=lookup"]) == 0
    assert "prompt lookup, without a head" in (tmp_path / "out" / "report.md").read_text()
    assert main([*argv, "eval.decoders=exact,lockup"]) == 1
    assert "eval.decoders.1: Input should be 'transformers', 'exact'" in capsys.readouterr().err
    assert main([*argv, "eval.decoders=lookup", "eval.temperatures=0,model", "eval.seeds=4"]) == 0
    out = capsys.readouterr().out
    assert all(text in out for text in ("lookup ", "lookup T=1 ", "seeds 4"))
    assert main([*argv, "eval.temperatures=0,0"]) == 1
    assert "temperatures names one twice" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("settings", "measured"),
    [
        ({"decoders": ["exact"], "num_assistant_tokens": [2]}, {(1, 2), (3, 2)}),
        ({"decoders": ["cost"], "num_assistant_tokens": []}, set()),
        ({"decoders": ["lookup"], "num_assistant_tokens": [2]}, set()),
    ],
)
def test_several_texts_at_once_are_predicted_where_the_exact_decoder_was_measured(
    tiny: Target, tmp_path: Path, settings: dict[str, Any], measured: set[tuple[int, int]]
) -> None:
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text(json.dumps({"id": "a", "category": "x", "prompt": "Some text", "raw": True}))
    chosen = EvalConfig(prompts=str(prompts), concurrency=[1, 3], max_new_tokens=6, **settings)
    content = run_evaluation(tiny, {"h": ordered_head(tiny.config)}, chosen, tmp_path / "out")
    rows = {(row["texts"], row["num_assistant_tokens"]) for row in content["concurrency"]}
    assert rows == measured

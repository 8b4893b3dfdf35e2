"""What a run says before, while and after it goes on changes nothing of it, and fits a terminal."""

import io
import json
import random
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from rich.text import Text

from headstart.cli.main import main
from headstart.common.console import LogProgress, plain_console, progress_bar
from headstart.common.machine import random_numbers_kept
from headstart.common.signals import Interrupted
from headstart.configs.schema import Config
from headstart.data.conversations import read_manifest
from headstart.data.prepare import plan_documents, prepare_documents
from headstart.eval import first_figures as first_figures_module
from headstart.eval.first_figures import first_figures, print_first_figures
from headstart.eval.measurements import Asked
from headstart.eval.page import cells, print_report
from headstart.heads.loading import load_target
from headstart.heads.target import Target
from headstart.train import probe
from headstart.train import run as run_module
from headstart.train import step as step_module
from headstart.train.estimate import EVALUATION, ORDERING, TEXTS, TRAINING, Phase, Schedule
from headstart.train.run import look_ahead, run, train
from headstart.train.start import untrained_assistant
from tests.helpers.models import FAMILIES, make_target
from tests.helpers.reports import one_result, report, usual
from tests.helpers.runs import SHORT, metrics, tiny_config, weights

ORDERED = "head.use_ordered_embeddings=true"
DENSE = ("head.use_ordered_embeddings=false", "head.num_centroids=null")


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Everything is measured, however short the run, and costs in few turns."""
    monkeypatch.setattr(run_module, "SHORT", 0.0)
    monkeypatch.setattr("headstart.eval.draft_cost.COST_TURNS", 1)


def ahead(config: Config, target: Target | None = None) -> dict[str, Phase]:
    """The phases of a run, as it finds them."""
    target = target or load_target("tiny-gemma4", "float32")
    held_out = config.eval.prompts if config.eval else None
    schedule = Schedule()
    config.output_dir.mkdir(exist_ok=True)
    look_ahead(config, plan_documents(target, config.data, config.seed, held_out), schedule)
    return {phase.name: phase for phase in schedule.phases}


def at_width_80(show: Any, *arguments: Any) -> str:
    console = plain_console(80)
    console.file = io.StringIO()
    show(*arguments, console)
    return Text.from_ansi(console.file.getvalue()).plain


def test_a_run_that_looks_ahead_is_the_same_run_bit_for_bit(tmp_path: Path) -> None:
    shared = [*SHORT, f"data.cache_dir={tmp_path / 'cache'}"]
    train(tiny_config(tmp_path / "plain", *shared))
    train(tiny_config(tmp_path / "told", *shared), schedule=(schedule := Schedule()))
    assert [phase.name for phase in schedule.phases] == [TEXTS, TRAINING, ORDERING, EVALUATION]
    assert (tmp_path / "told" / "first_figures.json").is_file()
    assert metrics(tmp_path / "told") == metrics(tmp_path / "plain")
    ours, theirs = weights(tmp_path / "told"), weights(tmp_path / "plain")
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    for name in ("model.safetensors", "order.json"):
        told, plain = (tmp_path / run / "head" / name for run in ("told", "plain"))
        assert told.read_bytes() == plain.read_bytes()


def generators() -> list[object]:
    """Where those of Python, numpy and torch are."""
    return [random.getstate(), str(np.random.get_state()), torch.get_rng_state().tolist()]


def state_of(target: Target) -> list[Any]:
    modules = list(target.model.modules())
    hooks = [(len(m._forward_hooks), len(m._forward_pre_hooks), m.training) for m in modules]
    tensors = [*target.model.parameters(), *target.model.buffers()]
    held = [(p.requires_grad, p.grad is None, p.dtype, p.double().sum().item()) for p in tensors]
    settings = target.model.generation_config.to_dict()
    return [hooks, held, settings, [sorted(vars(module)) for module in modules]]


@pytest.mark.parametrize(
    ("family", "settings"),
    [(family, []) for family in FAMILIES]
    + [
        ("gemma4-kv-sharing", ["head.hidden_size=32", "train.max_packed_length=64"]),
        ("gemma4-kv-sharing", ["data.online=true", "train.vocabulary=exact"]),
        ("gemma4-kv-sharing", ["head.hidden_size=32", ORDERED]),
    ],
)
def test_looking_ahead_leaves_no_trace(family: str, settings: list[str], tmp_path: Path) -> None:
    """In the target and in the generators of random numbers; for every family of targets, heads
    with a table of their own, with clusters and without, and texts that are not stored."""
    target = make_target(family)
    dense = () if ORDERED in settings else DENSE
    config = tiny_config(tmp_path / "run", *SHORT, *settings, *dense, "data.max_new_tokens=6")
    ahead(config, target)  # what transformers sets up once at a first forward is no trace
    before = state_of(target)
    drawn = generators()
    phases = ahead(config, target)
    assert state_of(target) == before
    assert generators() == drawn
    assert all(phase.seconds is not None for phase in phases.values())


def test_random_numbers_are_kept_where_something_fails() -> None:
    with random_numbers_kept(torch.device("cpu")):
        expected = random.random(), np.random.rand(), torch.rand(1).item()

    def fail() -> None:
        with random_numbers_kept(torch.device("cpu")):
            torch.manual_seed(5)
            random.seed(5)
            np.random.seed(5)
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    assert (random.random(), np.random.rand(), torch.rand(1).item()) == expected


def test_a_slow_first_call_is_not_what_a_call_takes(
    tiny: Target, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A step of 0.25 s took 2.3 s the first time: 576 were expected to take 22 minutes."""
    clock = iter([0.0, 2.3, 3.0, 3.25])
    monkeypatch.setattr(probe.time, "perf_counter", lambda: next(clock))
    assert probe.seconds_of(tiny, lambda: None) == pytest.approx(0.25)


def test_work_that_is_there_takes_no_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache = f"data.cache_dir={tmp_path / 'cache'}"
    config = tiny_config(tmp_path / "run", *SHORT, cache, "train.save_steps=2")
    fresh = ahead(config)
    assert all(phase.seconds for phase in fresh.values())
    assert "6 steps" in fresh[TRAINING].size
    with monkeypatch.context() as patch:
        rate = step_module.learning_rate

        def stopping(now: int, *args: Any) -> float:
            if now == 4:
                raise Interrupted("stopped")
            return rate(now, *args)

        patch.setattr(step_module, "learning_rate", stopping)
        with pytest.raises(Interrupted):
            train(config)
    begun = ahead(config)
    assert begun[TEXTS].seconds == 0
    assert begun[TRAINING].seconds
    assert "2 steps, 4 done" in begun[TRAINING].size
    assert begun[ORDERING].seconds
    train(config, resume=True)
    done = ahead(config)
    assert [done[name].seconds for name in (TEXTS, TRAINING, ORDERING)] == [0, 0, 0]
    assert done[EVALUATION].seconds


def test_texts_that_are_there_are_extracted_or_read(tmp_path: Path) -> None:
    config = tiny_config(tmp_path / "run", *SHORT, f"data.cache_dir={tmp_path / 'cache'}")
    target = load_target("tiny-gemma4", "float32")
    prepare_documents(target, config.data, 0, None)
    folders = (tmp_path / "cache" / "conversations").iterdir()
    store = max(folders, key=lambda folder: read_manifest(folder)["conversations"])
    for key in ("data.conversations", "data.store"):
        config = tiny_config(
            tmp_path / "other", *SHORT, f"{key}={store}", "data.validation_conversations=1",
            f"data.cache_dir={tmp_path / 'cache'}",
        )  # fmt: skip
        phases = ahead(config, target)
        assert phases[TRAINING].seconds
        assert bool(phases[TEXTS].seconds) == (key == "data.conversations")
        plan_documents(target, config.data, 0, None).prepare()
        assert ahead(config, target)[TEXTS].seconds == 0


def test_first_figures_are_measured_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = tiny_config(tmp_path, *SHORT, *DENSE)
    target = load_target("tiny-gemma4", "float32")
    assistant = untrained_assistant(target, config.head, 3).eval()
    assert config.eval is not None
    content = first_figures(target, assistant, config.eval, Asked(), tmp_path)
    assert set(content["break_even"]["exact"]) == {"2", "4"}
    # Above 1 on a machine that does nothing else: what is timed here is not.
    assert all(length > 0 for found in content["break_even"].values() for length in found.values())
    assert content == json.loads((tmp_path / "first_figures.json").read_text())
    measured: list[object] = []
    real = first_figures_module.measure_costs

    def counted(*args: Any) -> Any:
        measured.append(args)
        return real(*args)

    monkeypatch.setattr(first_figures_module, "measure_costs", counted)
    assert first_figures(target, assistant, config.eval, Asked(), tmp_path) == content
    assert not measured
    for text in ("", "[]", "{", '{"settings": 1}'):
        (tmp_path / "first_figures.json").write_text(text)
        first_figures(target, assistant, config.eval, Asked(), tmp_path)
    monkeypatch.setattr(first_figures_module, "machine_name", lambda environment: "another")
    first_figures(target, assistant, config.eval, Asked(), tmp_path)
    assert len(measured) == 5, "those of another machine are not this one's"
    other = config.eval.model_copy(update={"num_assistant_tokens": [3]})
    assert set(
        first_figures(target, assistant, other, Asked(), tmp_path)["break_even"]["exact"]
    ) == {"3"}
    assert len(measured) == 6


def test_no_first_figures_without_an_evaluation(tmp_path: Path) -> None:
    assert EVALUATION not in ahead(tiny_config(tmp_path / "run", *SHORT, "eval=null"))
    assert not (tmp_path / "run" / "first_figures.json").exists()


def test_progress_says_what_is_left_of_the_run(capsys: pytest.CaptureFixture[str]) -> None:
    schedule = Schedule([Phase("a", "", 100.0), Phase("b", "", None), Phase("c", "", 50.0)])
    with schedule.phase("a"), LogProgress(0.05) as bar:
        task = bar.add_task("Work", total=None, status="")
        bar.stopped.wait(0.2)
        bar.update(task, total=1, completed=1)
    with LogProgress(0.05) as bar:
        bar.add_task("Apart", total=None, status="")
        bar.stopped.wait(0.2)
    lines = capsys.readouterr().out.splitlines()
    assert any("Work" in line and "run 0:02:30 left" in line for line in lines)
    assert not any("Apart" in line and "run" in line for line in lines)
    assert any(line.startswith("A") and "0:00:50" in line for line in lines)
    with schedule.phase("unknown"):
        pass


def test_a_narrow_terminal_cuts_the_status_of_a_bar_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True, raising=False)
    schedule = Schedule([Phase("a", "", 36000.0)])
    with schedule.phase("a"):
        bar = progress_bar()
        bar.add_task("Training", total=6000, completed=1234, status="loss 0.5 " * 20)
        shown = at_width_80(lambda console: console.print(bar.make_tasks_table(bar.tasks)))
    assert len(shown.splitlines()) == 1
    assert whole_lines(shown, "1234/6000", "run 10:00:00 left", "loss")


def test_what_a_phase_took_is_kept(tmp_path: Path) -> None:
    schedule = Schedule([Phase("a", "size", 100.0), Phase("b", "", None)], tmp_path)
    with schedule.phase("a"):
        pass
    with pytest.raises(KeyError), schedule.phase("b"):
        raise KeyError
    a, b = json.loads((tmp_path / "phases.json").read_text())
    assert 0 <= a.pop("took") < 1
    assert a == {"name": "a", "size": "size", "seconds": 100.0}
    assert b["took"] is None


def test_several_processes_are_told_that_nothing_is_estimated(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    class Two:
        num_processes = 2

    monkeypatch.setattr(run_module, "PartialState", Two)
    assert ahead(tiny_config(tmp_path, *SHORT)) == {}
    assert "several processes" in capsys.readouterr().out


def whole_lines(text: str, *wanted: str) -> bool:
    """Whether each is in one line, and none is wider than a terminal."""
    lines = text.splitlines()
    return max(map(len, lines)) <= 80 and all(any(w in line for line in lines) for w in wanted)


def test_tables_of_a_run_fit_80_columns() -> None:
    size = "1,000,000 conversations of up to 1,024 tokens, 999,999 there already"
    schedule = Schedule([Phase(name, size, 360000.0) for name in (TEXTS, TRAINING, EVALUATION)])
    assert whole_lines(at_width_80(lambda console: schedule.print(console)), "4 days, 4:00:00")
    content = {
        "settings": {"dtype": "float32"},
        "environment": {"target": "organization/a-target-with-a-long-name-of-a-hub" * 2},
        "plain": {"tokens_per_second": 12345.6},
        "lookup": {
            "num_assistant_tokens": 16, "acceptance_length": 12.34, "speedup": 10.25,
            "speedup_interval": [9.25, 11.25], "texts": 4,
        },
        "break_even": {name: {"16": 12.25} for name in ("exact", "transformers")},
    }  # fmt: skip
    shown = at_width_80(print_first_figures, content)
    assert whole_lines(shown, "12345.6 tokens per second", "from 12.25 on", "10.25 (9.25 to 11.25)")


@pytest.mark.parametrize("content", [
    usual(),
    report([one_result("transformers", 16, 12.5, temperature=0.75), one_result("lookup", 8, 1.0)]),
    report([one_result("exact", 4, s, head=f"runs/{s}/" + "x" * 90) for s in (1.0, 2.0)]),
])  # fmt: skip
def test_the_end_of_an_evaluation_fits_80_columns(content: dict[str, Any]) -> None:
    """One line for each decoder and K, with its head's; categories are in the report."""
    shown = at_width_80(print_report, content)
    of_all = [
        row for row in content["results"]
        if row["category"] == "all" and row["looping_texts"] == "with"
    ]  # fmt: skip
    lines = shown.splitlines()
    assert max(map(len, lines)) <= 80
    for result in of_all:
        decoder, k, _, _, length, _, speedup, *_ = cells(result)
        assert any(line.split()[0] == decoder.split()[0] and f" {k} " in line and length in line
                   and speedup in line for line in lines if line.strip())  # fmt: skip
    assert sum(" to " in line and line.rstrip().endswith(")") for line in lines) >= len(of_all)
    assert "".join(content["verdict"].split()) in "".join(shown.split())


def test_a_run_ends_in_one_table_its_page_and_the_next_command(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run(tiny_config(tmp_path / "run", *SHORT, "target.dtype=bfloat16", "eval.fp32_check_prompts=1",
                    f"data.cache_dir={tmp_path / 'cache'}"))  # fmt: skip
    out = capsys.readouterr().out
    assert out.count("acceptance length (95%)") == 1
    page, *following = out[out.index("The page: ") :].splitlines()
    assert str(tmp_path / "run" / "eval" / "report.html") in page
    commands = [line.partition(": headstart ")[2].split()[0] for line in following]
    assert commands == ["eval", "publish"]
    assert main(["runs", "show", str(tmp_path / "run")]) == 0
    shown = capsys.readouterr().out
    assert all(f"phase {name}" in shown for name in (TEXTS, TRAINING, ORDERING, EVALUATION))
    assert shown.count("took") == 4
    (tmp_path / "run" / "phases.json").write_text('[{"name": "texts"}]')
    assert main(["runs", "show", str(tmp_path / "run")]) == 1
    assert "phases.json is damaged" in capsys.readouterr().err

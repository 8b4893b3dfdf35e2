"""The example that ends each command's help runs, on tiny models in place of those it names."""

import shlex
import shutil
from contextlib import ExitStack
from pathlib import Path

import pytest

from headstart.cli.arguments import Command, is_read
from headstart.cli.main import COMMANDS, main
from headstart.serve import engines
from tests.helpers.checkpoints import make_adapter
from tests.helpers.metrics import VllmCounters, metrics_server
from tests.helpers.runs import ROOT, write_tuned_run

TINY = "tiny-gemma4"
STAND_INS = {
    "quickstart": "tiny",
    "google/gemma-4-E4B-it-assistant": "runs/mine/head",
    "google/gemma-4-E2B-it-assistant": "runs/mine/head",
    "google/gemma-4-E4B-it": TINY,
    "ORG/my-gemma": TINY,
    "ORG/my-lora": "my-lora",
    "gemma3-270m": TINY,
}
"""What an example names -> what is there."""
SMALL = {
    "train": ["train.max_steps=6", "train.warmup_steps=1", "head.centroid_steps=2", "eval=null"],
    "eval": ["eval.limit=1", "eval.max_new_tokens=4"],
    "adapt": [
        "train.max_steps=6", "train.warmup_steps=1", "train.eval_steps=6", "train.likely_tokens=32",
        "train.negatives=32", "train.max_anchors=16", "train.multi_step_anchors=8",
        "data.num_conversations=8", "data.validation_conversations=1", "data.max_new_tokens=8",
        "data.max_prompt_tokens=16", "data.generation_batch_size=8", "adapt.held_out_prompts=4",
        "adapt.decoded_prompts=0",
    ],
    "regenerate": [
        "data.num_conversations=8", "data.max_new_tokens=8", "data.max_prompt_tokens=16",
    ],
    "order": [
        "head.centroid_steps=2", "train.max_anchors=16", "train.multi_step_anchors=8",
        "data.validation_conversations=2",
    ],
    "bench": ["bench.context=8", "target.dtype=float32"],
}  # fmt: skip
"""Settings that make it quick."""
WRITES = {
    "train": ["runs/mine"], "publish": ["runs/mine"], "regenerate": ["conversations"],
    "extract": ["store"],
}  # fmt: skip
"""What an example writes that others read."""


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that holds what the examples name."""
    folder = tmp_path_factory.mktemp("examples")
    small = [
        "train.max_steps=6", "train.warmup_steps=1", "head.centroid_steps=2", "eval.limit=1",
        "eval.max_new_tokens=4", "eval.num_assistant_tokens=2",
    ]  # fmt: skip
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        measure_once(patch)
        assert main(["train", "--config", "tiny", *small, "output_dir=runs/mine"]) == 0
        for name in ("quickstart", "a", "b"):
            shutil.copytree("runs/mine", f"runs/{name}")
        lines = (ROOT / "data" / "prompts" / "chat_eval.jsonl").read_text().splitlines()[:40]
        Path("my_prompts.jsonl").write_text("\n".join(lines) + "\n")
        make_adapter(folder / "my-lora")
        answers = [
            "data.num_conversations=24",
            "data.max_new_tokens=16",
            "data.max_prompt_tokens=16",
        ]
        answers += [f"target.name={TINY}", "data.temperatures=0"]
        assert main(["regenerate", *answers, "output_dir=conversations"]) == 0
        assert main(["extract", "conversations", f"target.name={TINY}", "output_dir=store"]) == 0
    return folder


def measure_once(patch: pytest.MonkeyPatch) -> None:
    """Costs are told of one turn, which is quick and means nothing."""
    for turns in ("TURNS", "COST_TURNS"):
        patch.setattr(f"headstart.eval.draft_cost.{turns}", 1)


def words_of(command: Command) -> list[str]:
    """The words of the example after `headstart`, with what is there in place of what it names."""
    program, *words = shlex.split(command.example)
    assert program == "headstart"
    assert words[0] == command.name
    found = []
    for word in words:
        key, equals, value = word.partition("=")
        word = STAND_INS.get(word, word)
        found.append(f"{key}={STAND_INS[value]}" if equals and value in STAND_INS else word)
    named = any(word.startswith("target.name=") for word in found)
    if (
        command.name != "publish"
        and not named
        and is_read("target.name", command.settings)
        and "--config" not in found
    ):
        found.append(f"target.name={TINY}")
    return found + SMALL.get(command.name, [])


@pytest.mark.parametrize("command", COMMANDS, ids=lambda c: c.name)
def test_the_example_of_a_command_runs(
    command: Command,
    place: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    request: pytest.FixtureRequest,
) -> None:
    work = tmp_path / "work"
    shutil.copytree(place, work)
    monkeypatch.chdir(work)
    measure_once(monkeypatch)
    words = words_of(command)
    if command.name == "install":
        monkeypatch.setattr(engines, "install_engine", lambda engine: f"environment of {engine}")
    for written in WRITES.get(command.name, []):
        shutil.rmtree(written)
    if command.name == "watch":
        counters = VllmCounters(4)
        counters.count([0, 1, 4, 2] * 8, 2)
        stack = ExitStack()
        request.addfinalizer(stack.close)
        words[1] = stack.enter_context(metrics_server(counters.text))
    if command.name == "publish":  # of a target that has a name on the Hub
        write_tuned_run(Path("runs"))
        Path("runs/run").rename("runs/mine")
        words.append("publish.base_models=org/tiny")
    code = main(words)
    printed = capsys.readouterr()
    if command.name == "serve-check":  # no engine is installed for the tests
        assert code == 1
        assert "headstart install vllm" in printed.err
    else:
        assert code == 0, printed.err

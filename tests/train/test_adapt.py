"""`headstart adapt` on a tiny Gemma 4 with KV-shared layers, an adapter and a clustered head."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from headstart.common.files import weights_sha256
from headstart.configs.loader import Override, load_settings
from headstart.configs.settings import Settings, minutes
from headstart.data.prompts import load_prompts
from headstart.data.store import ActivationStore
from headstart.heads.loading import load_served
from headstart.heads.saving import load_assistant, load_assistant_config, made_for
from headstart.train import adapt as module
from headstart.train.adapt import adapt
from headstart.train.adapt_report import advice, compare_stages, headline, outcome
from headstart.train.adaptation import adapt_defaults
from headstart.train.run import train
from tests.helpers.checkpoints import make_adapter
from tests.helpers.reports import texts
from tests.helpers.runs import ROOT, load_script, tiny_config

QUICK = [
    "train.max_steps=24", "train.eval_steps=12", "train.warmup_steps=2", "train.likely_tokens=32",
    "train.negatives=32", "train.num_speculative_steps=3", "train.max_anchors=16",
    "train.multi_step_anchors=8", "train.learning_rate=0.003", "train.mixed_precision=no",
    "data.num_conversations=16", "data.validation_conversations=4", "data.max_new_tokens=24",
    "data.max_prompt_tokens=24", "data.generation_batch_size=8", "data.teacher_top_k=16",
]  # fmt: skip


@pytest.fixture(scope="module")
def setting(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """A head of the plain tiny target, and an adapter that tunes that target."""
    folder = tmp_path_factory.mktemp("adapt")
    train(tiny_config(folder / "base", f"data.cache_dir={folder / 'cache'}"))
    return folder / "base" / "head", make_adapter(folder / "lora")


def asked(setting: tuple[Path, str], out: Path, *overrides: Override) -> tuple[Settings, str]:
    """The settings of an adaptation, and its head."""
    head, adapter = setting
    general = {"path": str(ROOT / "data" / "prompts" / "chat_eval.jsonl"), "limit": 60}
    settings = [
        f"output_dir={out}", "target.name=tiny-gemma4", "target.dtype=float32",
        f"target.adapters={adapter}", "data.prompts=builtin:text_eval",
        ("adapt.general_prompts", general), "adapt.held_out_prompts=8",
        "adapt.decoded_prompts=2", "adapt.budget=5m", *QUICK, *overrides,
    ]  # fmt: skip
    return load_settings(None, settings, adapt_defaults(str(head))), str(head)


def test_a_head_follows_its_target_and_goes_on_after_a_stop(
    setting: tuple[Path, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    settings, head = asked(setting, out)

    def stopped(*args: object, **named: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(module, "train", stopped)
        with pytest.raises(KeyboardInterrupt):
            adapt(settings, head, "cpu", ["headstart", "adapt"])
    written = {p: p.stat().st_mtime_ns for p in out.rglob("*.safetensors")}
    assert len(written) > 2
    content = adapt(settings, head, "cpu", ["headstart", "adapt"])
    assert all(path.stat().st_mtime_ns == then for path, then in written.items())

    kinds = content["acceptance"]
    assert set(kinds) == {"domain", "general"}
    for found in kinds.values():
        assert {"reference", "unadapted", "adapted", "lost", "gained"} <= set(found)
    assert (
        content["unadapted_acceptance_length"] == kinds["domain"]["unadapted"]["acceptance_length"]
    )
    assert content["general_change_share"] is not None
    assert content["speedup"]["domain"]["adapted"]["prompts"] >= 2
    assert content["training"]["data"]["documents"] + 4 <= 16
    assert json.loads((out / "adapt.json").read_text()) == json.loads(json.dumps(content))
    assert content["verdict"] in (out / "adapt.md").read_text()
    assert len(load_prompts(out / "held_out.jsonl")) == 16
    assert (out / "adapt.png").stat().st_size > 10_000

    tuned = load_served(settings.target)
    noted = made_for(load_assistant_config(out / "run" / "head"))
    assert noted is not None
    assert noted["fingerprint"] == tuned.fingerprint
    before = load_assistant(head, torch.float32).masked_embedding
    after = load_assistant(out / "run" / "head", torch.float32).masked_embedding
    assert torch.equal(before.token_ordering, after.token_ordering)

    with pytest.raises(ValueError, match=r"was begun with adapt\.held_out_prompts=8, now 9"):
        adapt(*asked(setting, out, "adapt.held_out_prompts=9"), "cpu", [])


@pytest.mark.parametrize("answering", [0.0, 0.5])
def test_conversations_are_trained_on_beside_what_the_target_writes(
    answering: float, setting: tuple[Path, str], tmp_path: Path
) -> None:
    """Their answers as they are, the distribution of the tuned target; and none of those whose
    prompt is held out."""
    rows = [
        {"id": f"own-{n}", "prompt": f"{word} number {n} and {7 * n}", "response": f"{n} {word}s"}
        for n, word in enumerate(["tree", "stone", "boat", "shoe", "lamp", "cup"] * 4)
    ]
    held_out = load_prompts("builtin:text_eval")
    rows += [
        {"id": f"copy-{p.id}", "prompt": p.text, "response": "as it was asked"} for p in held_out
    ]
    given = tmp_path / "given.jsonl"
    given.write_text("".join(json.dumps(row) + "\n" for row in rows))
    few = ["data.num_conversations=null", "adapt.budget=30m"] if not answering else []
    settings, head = asked(
        setting, tmp_path / "out", f"adapt.conversations={given}", "adapt.decoded_prompts=0",
        f"adapt.answering_share={answering}", "adapt.general_prompts=null", *few,
    )  # fmt: skip
    content = adapt(settings, head, "cpu", ["headstart", "adapt"])
    assert content["adapted_acceptance_length"] is not None
    target = load_served(settings.target)
    store = ActivationStore(tmp_path / "out" / "answers", target)
    taken = {entry.id for entry in store.entries}
    assert {f"own-{n}" for n in range(24)} <= taken
    held = {p.text for p in load_prompts(tmp_path / "out" / "held_out.jsonl")}
    copies = {f"copy-{p.id}" for p in held_out if p.text in held}
    assert copies
    assert not copies & taken
    written = [entry for entry in store.entries if not entry.id.startswith(("own", "copy"))]
    assert bool(written) == bool(answering)
    document = store.read([next(i for i, e in enumerate(store.entries) if e.id == "own-3")])[0]
    said = target.activations(document.ids[None]).hidden[0]
    answer = document.loss_mask.nonzero()[:, 0] - 1
    best = target.logits(said).log_softmax(-1).topk(16).values[answer]
    torch.testing.assert_close(document.teacher_logprobs[answer], best, atol=1e-4, rtol=1e-4)
    assert content["prompt_sets"]["conversations"]


def test_adapt_can_stop_when_the_loss_is_measured(
    setting: tuple[Path, str], tmp_path: Path
) -> None:
    alone = ["adapt.measure_only=true", "adapt.general_prompts=null"]
    content = adapt(*asked(setting, tmp_path / "out", *alone), "cpu", ["headstart", "adapt"])
    assert content["adapted_acceptance_length"] is None
    assert content["verdict"] == content["advice"]
    assert not (tmp_path / "out" / "run").exists()


def test_a_budget_that_measuring_takes_is_refused(
    setting: tuple[Path, str], tmp_path: Path
) -> None:
    short = ["adapt.budget=0.01", "adapt.general_prompts=null", "data.num_conversations=null"]
    with pytest.raises(ValueError, match=r"a budget of 0\.01 minutes is not enough"):
        adapt(*asked(setting, tmp_path / "out", *short), "cpu", [])


def test_the_headline_is_shares_of_accepted_tokens() -> None:
    stages = {
        "reference": {"domain": texts(8, 8, 8), "general": texts(8)},
        "unadapted": {"domain": texts(4, 4, 4), "general": texts(5)},
        "adapted": {"domain": texts(7, 7, 7), "general": texts(4)},
    }
    compared = compare_stages(stages)
    found = headline(compared)
    assert found["reference_acceptance_length"] == pytest.approx(1.8)
    assert found["recovered_share"] == pytest.approx(0.75)
    assert found["general_change_share"] == pytest.approx(-0.2)
    assert "it lost 50% of its accepted tokens" in advice(compared)
    content = {"acceptance": compared, **found}
    assert "1.40 to 1.70" in outcome(content)
    assert "75% of what was lost" in outcome(content)
    assert "Chance" not in outcome(content)


def test_the_advice_says_how_much_looping_texts_flatter() -> None:
    compared = compare_stages({
        "reference": {"domain": texts(10, 10, 6, looping=2)},
        "unadapted": {"domain": texts(4, 4, 4)},
        "adapted": {"domain": texts(5, 5, 5)},
    })  # fmt: skip
    found = headline(compared)
    assert found["recovered_share"] == pytest.approx(1 / (26 / 3 - 4))
    assert found["recovered_share_without_loops"] == pytest.approx(0.5)
    told = "67% of that target's texts end in a loop, which flatters drafts (0% here)"
    assert f"{told}; without them it had 1.60." in advice(compared)
    assert "(50% where looping texts are left out)" in outcome({"acceptance": compared, **found})


def test_a_head_that_lost_nothing_is_told_so() -> None:
    stages = {"reference": {"domain": texts(2, 9, 4)}, "unadapted": {"domain": texts(9, 2, 4)}}
    compared = compare_stages(stages)
    assert "chance explains the difference" in advice(compared)
    assert headline(compared)["recovered_share"] is None
    alone = compare_stages({"unadapted": {"domain": texts(3)}})
    assert "is not known (adapt.base)" in advice(alone)


def test_the_example_tunes_a_target_and_its_head_follows(
    setting: tuple[Path, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    example = load_script(ROOT / "examples" / "tune_and_adapt.py")
    command = ["tune_and_adapt.py", "--target", "tiny-gemma4", "--head", str(setting[0])]
    command += ["--steps", "3", "--batch", "2", "--out", str(tmp_path), "--budget", "5m"]
    command += ["adapt.held_out_prompts=6", "adapt.decoded_prompts=0", *QUICK]
    monkeypatch.setattr("sys.argv", command)
    assert example.run() == 0
    content = json.loads((tmp_path / "adapted" / "adapt.json").read_text())
    assert content["reference_acceptance_length"] > 1
    assert content["target"]["adapters"] == ["lora"]
    result = json.loads((tmp_path / f"{tmp_path.name}.json").read_text())
    assert result["tuning"] == {"domain": "math", "steps": 3, "batch": 2, "rate": 3e-4}
    assert result["unadapted_acceptance_length"] == content["unadapted_acceptance_length"]
    assert [line.split()[1] for line in result["commands"]] == ["tune_and_adapt.py", "adapt"]
    tuned, unseen = (
        {json.loads(line)["id"] for line in (tmp_path / name).read_text().splitlines()}
        for name in ("math-tuned.jsonl", "math.jsonl")
    )
    assert not tuned & unseen
    monkeypatch.setattr("sys.argv", [*command, "--steps", "4"])
    with pytest.raises(SystemExit, match=r"was tuned with .*'steps': 3.*'steps': 4"):
        example.run()


def test_times_are_read() -> None:
    read = [minutes(text) for text in ("15m", "90s", "1h30m", "2h", "20", "1.5m")]
    assert read == [15, 1.5, 90, 120, 20, 1.5]
    for odd in ("", "soon", "15 m"):
        with pytest.raises(ValueError, match="is no time"):
            minutes(odd)


def test_a_target_that_was_tuned_on_gets_no_verdict_of_before(
    setting: tuple[Path, str], tmp_path: Path
) -> None:
    """Into the same folder, whose name is all that the settings say of it."""
    adapter = Path(shutil.copytree(setting[1], tmp_path / "lora"))
    settings, head = asked((setting[0], str(adapter)), tmp_path / "out", "adapt.measure_only=true")
    adapt(settings, head, "cpu", [])
    adapt(settings, head, "cpu", [])
    path = adapter / "adapter_model.safetensors"
    tuned = {name: tensor * 2 for name, tensor in load_file(path).items()}
    save_file(tuned, path)
    with pytest.raises(ValueError, match=rf"was begun with the weights in {adapter}="):
        adapt(settings, head, "cpu", [])


@pytest.mark.parametrize("name", ["model.safetensors", "pytorch_model.bin", "tuned.gguf"])
def test_weights_are_told_apart_in_files_of_every_kind(name: str, tmp_path: Path) -> None:
    """A byte in a thousand stands for what tuning changes everywhere."""
    place = tmp_path / name
    asked = place if name.endswith(".gguf") else tmp_path
    place.write_bytes(bytes(range(256)) * 40_000)
    before = weights_sha256(asked)
    assert weights_sha256(asked) == before
    changed = bytearray(place.read_bytes())
    changed[::1000] = bytes(len(changed[::1000]))
    place.write_bytes(changed)
    assert weights_sha256(asked) != before

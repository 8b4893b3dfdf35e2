"""Publishing against a stand-in of the Hub: what arrives is what was evaluated, or nothing."""

import itertools
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import huggingface_hub.constants
import pytest
import torch
from huggingface_hub import ModelCard
from safetensors.torch import load_file, save_file

from headstart.cli.main import main
from headstart.configs.loader import load_config
from headstart.configs.settings import PublishConfig
from headstart.heads.loading import load_target
from headstart.heads.saving import load_assistant
from headstart.serve.hub import upload
from headstart.train.run import run
from tests.helpers.heads import FULL, NARROW, finished
from tests.helpers.hub import TOKEN, Hub, Repository
from tests.helpers.runs import PUBLISH, REPO, ROOT, SHORT, publish, tiny_config


def copy_of(run_folder: Path, to: Path) -> Path:
    """A run folder that a test may spoil."""
    return Path(shutil.copytree(run_folder, to))


def test_a_head_that_was_published_reads_back_as_the_one_evaluated(
    finished_run: Path, tmp_path: Path
) -> None:
    """As a user does it: HF_ENDPOINT names the Hub, each command is a process of its own."""
    with Hub() as hub:
        environment = os.environ | {
            "HF_ENDPOINT": hub.url, "HF_TOKEN": TOKEN, "HF_HUB_DISABLE_XET": "1",
            "HF_HOME": str(tmp_path / "hf"),
        }  # fmt: skip

        def headstart(*arguments: object) -> str:
            command = [sys.executable, "-m", "headstart.cli", *map(str, arguments)]
            done = subprocess.run(
                command, env=environment, capture_output=True, text=True, timeout=300
            )
            assert done.returncode == 0, done.stderr
            assert TOKEN not in done.stdout + done.stderr
            return done.stdout

        said = headstart("publish", finished_run, *PUBLISH, f"output_dir={tmp_path / 'folder'}")
        repository = hub.repositories[REPO]
        commit = repository.commit("main")
        assert f"/commit/{commit}" in said
        assert repository.visibility == "private"
        assert sum("/commit/" in request for request in hub.requests) == 1
        there = {
            str(p.relative_to(tmp_path / "folder"))
            for p in (tmp_path / "folder").rglob("*")
            if p.is_file()
        }
        assert set(repository.files("main")) == there
        assert {
            "README.md",
            "config.json",
            "generation_config.json",
            "model.safetensors",
            "tokenizer.json",
            "training_config.yaml",
            "evaluation/report.json",
        } <= there

        settings = ["target.name=tiny-gemma4", "target.dtype=float32", "eval.limit=1"]
        settings += ["eval.max_new_tokens=8", "eval.num_assistant_tokens=2"]
        settings += ["eval.prompts=data/prompts/text_eval.jsonl"]
        for name in (f"{REPO}@{commit}", str(finished_run / "head")):
            headstart("eval", name, *settings, f"output_dir={tmp_path / name[-8:]}")
        pinned, local = (
            json.loads((tmp_path / end / "report.json").read_text())["environment"]
            for end in (commit[-8:], str(finished_run / "head")[-8:])
        )
        assert [*pinned["head_fingerprints"].values()] == [*local["head_fingerprints"].values()]


def test_the_card_holds_the_reports_figures_and_no_others(
    finished_run: Path, tmp_path: Path
) -> None:
    out = tmp_path / "folder"
    assert publish(finished_run, "--plan", f"output_dir={out}", "publish.languages=en") == 0
    card = ModelCard.load(out / "README.md")
    report = json.loads((finished_run / "eval" / "report.json").read_text())
    wanted = {
        (metric, round(result[metric], 4))
        for result in report["results"]
        if result["category"] == "all"
        for metric in ("acceptance_length", "speedup")
    }
    evaluated = card.data.eval_results or []
    assert {(r.metric_type, r.metric_value) for r in evaluated} == wanted
    # One name a figure, and nothing that only some of them share beside them.
    assert len({r.metric_name for r in evaluated}) == len(evaluated)
    assert {tuple(r.dataset_args or ()) for r in evaluated} == {
        ("hardware", "threads", "dtype", "max_new_tokens", "prompts_sha256")
    }
    assert card.data.base_model == ["org/tiny"]
    assert card.data["base_model_relation"] == "finetune"
    assert card.data.license == "unknown", "there is no Hub to ask"
    assert card.data.language == ["en"]
    for result in report["results"]:
        if result["category"] == "all":
            assert f"{result['acceptance_length']:.2f} (" in card.text
    assert report["verdict"] in card.text
    assert report["environment"]["target_fingerprint"][:16] in card.text
    summary = json.loads((finished_run / "summary.json").read_text())
    assert f"6 steps, of which step {summary['best']['step']} was the best" in card.text
    assert re.search(r"prompts from (data/prompts/)?text_train\.jsonl", card.text)


def test_the_cards_own_snippet_drafts_without_headstart(finished_run: Path, tmp_path: Path) -> None:
    """In a process that cannot import Headstart; the names of the Hub stand for folders."""
    out = tmp_path / "folder"
    assert publish(finished_run, "--plan", f"output_dir={out}") == 0
    target = load_target("tiny-gemma4", "float32")
    target.model.save_pretrained(tmp_path / "target")
    target.tokenizer.save_pretrained(tmp_path / "target")
    card = (out / "README.md").read_text()
    snippet = "\n".join(re.findall(r"```python\n(.*?)```", card, re.S))
    snippet = snippet.replace('"org/tiny"', f'"{tmp_path / "target"}"')
    snippet = snippet.replace(f'"{REPO}"', f'"{out}"')
    program = f"import sys; sys.modules['headstart'] = None\n{snippet}\nprint(text.shape[1])"
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=tmp_path, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    ids = target.tokenizer("The capital of France is", return_tensors="pt")
    plain = target.model.generate(**ids, do_sample=False, max_new_tokens=64)
    assert done.stdout.splitlines()[-1] == str(plain.shape[1])
    assert target.tokenizer.decode(plain[0]) in done.stdout


def test_a_gemma_3_card_carries_googles_terms_and_a_snippet_that_runs(tmp_path: Path) -> None:
    folder, builtin = tmp_path / "run", ["data.prompts=builtin:text_train"]
    run(tiny_config(folder, *SHORT, "target.name=tiny-gemma3", *builtin))
    out = tmp_path / "folder"
    assert publish(folder, "--plan", f"output_dir={out}") == 0
    card = ModelCard.load(out / "README.md")
    assert "prompts from builtin:text_train" in card.text, "a name that is public"
    published = load_config(out / "training_config.yaml")
    assert [source.path for source in published.data.prompts] == ["builtin:text_train"]
    assert published.eval is not None
    assert published.eval.prompts == "builtin:text_eval"
    assert (card.data.license, card.data["license_link"]) == (
        "gemma", "https://ai.google.dev/gemma/terms",
    )  # fmt: skip
    assert "found at ai.google.dev/gemma/terms\n" in (out / "NOTICE").read_text()
    snippet = "\n".join(re.findall(r"```python\n(.*?)```", card.text, re.S))
    assert 'load_target("tiny-gemma3")' in snippet
    exec(snippet.replace(f'"{REPO}"', f'"{out}"'), {})


def test_the_license_is_the_targets_own(finished_run: Path, hub: Hub) -> None:
    hub.repositories["org/tiny"] = Repository("public", license="cc-by-nc-4.0")
    assert publish(finished_run) == 0
    readme = hub.repositories[REPO].files("main")["README.md"].decode()
    assert ModelCard(readme).data["license"] == "cc-by-nc-4.0"


def test_without_texts_no_prompt_leaves_the_machine(finished_run: Path, tmp_path: Path) -> None:
    out = tmp_path / "folder"
    assert publish(finished_run, "--plan", f"output_dir={out}", "publish.include_texts=false") == 0
    report = json.loads((finished_run / "eval" / "report.json").read_text())
    shown = {example["prompt"][:40] for example in report["examples"]}
    assert shown
    for path in (out / "evaluation").iterdir():
        assert not any(text in path.read_text(errors="replace") for text in shown)


def test_another_head_than_the_evaluated_one_is_refused(
    finished_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    spoilt = copy_of(finished_run, tmp_path / "run")
    weights = load_file(spoilt / "head" / "model.safetensors")
    weights["pre_projection.weight"][0, 0] += 1e-3
    save_file(weights, spoilt / "head" / "model.safetensors", metadata={"format": "pt"})
    assert publish(spoilt, "--plan", f"output_dir={tmp_path / 'folder'}") == 1
    assert "is not a head of the report" in capsys.readouterr().err
    assert not (tmp_path / "folder").exists()

    report = spoilt / "eval" / "report.json"
    content = json.loads(report.read_text())
    del content["environment"]["head_fingerprints"]
    report.write_text(json.dumps(content))
    assert publish(spoilt, "--plan", f"output_dir={tmp_path / 'folder'}") == 1
    assert "headstart eval" in capsys.readouterr().err

    (spoilt / "head" / "model.safetensors").write_bytes(b"cut")
    report = finished_run / "eval"
    assert (
        publish(spoilt, f"publish.report={report}", "--plan", f"output_dir={tmp_path / 'folder'}")
        == 1
    )
    assert "head/model.safetensors is damaged" in capsys.readouterr().err


def test_a_report_of_another_target_is_refused(
    finished_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    spoilt = copy_of(finished_run, tmp_path / "run")
    path = spoilt / "eval" / "report.json"
    content = json.loads(path.read_text())
    (name,) = content["environment"]["head_fingerprints"]
    path.write_text(json.dumps(content | {"warnings": {name: "this head was trained for others"}}))
    assert publish(spoilt, "--plan", f"output_dir={tmp_path / 'folder'}") == 1
    assert "of another target: this head was trained for others" in capsys.readouterr().err


def test_a_folder_that_reads_back_as_another_head_is_not_published(
    finished_run: Path,
    hub: Hub,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """As a disk that keeps other bytes than were written would have it."""
    copyfile = shutil.copyfile

    def spoiling(source: Path, to: Path) -> Any:
        copyfile(source, to)
        if Path(to).name == "model.safetensors":
            weights = load_file(to)
            weights["pre_projection.weight"][0, 0] += 1e-3
            save_file(weights, to, metadata={"format": "pt"})

    monkeypatch.setattr(shutil, "copyfile", spoiling)
    assert publish(finished_run) == 1
    assert "nothing was published" in capsys.readouterr().err
    assert hub.repositories == {}


def test_a_folder_that_holds_something_else_is_left_alone(
    finished_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The run itself above all; a folder of an earlier plan is replaced."""
    mine = copy_of(finished_run, tmp_path / "run")
    for out in (mine, mine / "head", tmp_path):
        assert publish(mine, "--plan", f"output_dir={out}") == 1
        assert "is not empty" in capsys.readouterr().err
    assert {p.name for p in mine.iterdir()} == {p.name for p in finished_run.iterdir()}
    for _ in range(2):
        assert publish(mine, "--plan", f"output_dir={tmp_path / 'folder'}") == 0


def test_a_target_that_the_hub_does_not_have_is_asked_for(
    finished_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["publish", str(finished_run), REPO, "--plan"]
    assert main([*command, f"output_dir={tmp_path / 'folder'}"]) == 1
    assert "publish.base_models" in capsys.readouterr().err


def test_an_adapter_of_a_head_is_published_as_a_peft_adapter(
    tmp_path: Path, hub: Hub, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Read back by peft alone, onto the head that it is of, it is the head that was evaluated."""
    from peft import PeftModel

    start = finished(load_target("tiny-gemma4", "float32"), tmp_path / "start", FULL)
    # Each validation is the best so far: the head that is kept is not the one to start from.
    better = itertools.count(1.0)
    monkeypatch.setattr("headstart.train.validation.validate", lambda *of: next(better))
    folder = tmp_path / "run"
    prompts = ROOT / "data" / "prompts" / "text_eval.jsonl"
    run(tiny_config(
        folder, *SHORT, f"head.init_from={start}", "head.lora={r: 4}", f"eval.prompts={prompts}",
        "head.num_centroids=null", "head.use_ordered_embeddings=false",
    ))  # fmt: skip
    out = tmp_path / "folder"
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    base = ("--plan", f"output_dir={out}")
    assert publish(folder, *base, "publish.base_head=org/head") == 1, "the Hub has no such head"
    another = finished(load_target("tiny-gemma4", "float32"), tmp_path / "another", NARROW)
    upload(another, "org/another", PublishConfig())
    upload(start, "org/head", PublishConfig())
    capsys.readouterr()
    assert publish(folder, *base, "publish.base_head=org/another") == 1
    assert not out.exists()
    commit = hub.repositories["org/head"].commit("main")
    assert publish(folder, *base, f"publish.base_head=org/head@{commit}") == 0
    card = ModelCard.load(out / "README.md")
    assert (card.data.base_model, card.data.library_name) == (["org/head"], "peft")
    content = json.loads((out / "adapter_config.json").read_text())
    assert (content["base_model_name_or_path"], content["revision"]) == ("org/head", commit)
    assert f'revision="{commit}"' in card.text
    assert not (out / "model.safetensors").exists()
    wrapped = PeftModel.from_pretrained(load_assistant(start, torch.float32), out)
    theirs = wrapped.merge_and_unload().state_dict()
    ours = load_assistant(folder / "head", torch.float32).state_dict()
    assert all(torch.equal(theirs[name], ours[name]) for name in ours)
    plan = ("--plan", f"output_dir={tmp_path / 'whole'}")
    assert publish(folder, *plan, "publish.merge_adapter=true") == 0
    assert (tmp_path / "whole" / "model.safetensors").is_file()
    # The other form in the same repository leaves nothing of the first, which would be read too.
    upload(out, "org/both", PublishConfig())
    hub.repositories["org/both"].revisions["main"]["notes.md"] = b"mine"
    upload(tmp_path / "whole", "org/both", PublishConfig())
    whole = {path.relative_to(tmp_path / "whole").as_posix()
             for path in (tmp_path / "whole").rglob("*") if path.is_file()}  # fmt: skip
    assert "adapter_model.safetensors" not in whole
    kept = set(hub.repositories["org/both"].files("main"))
    assert whole < kept
    assert "notes.md" in kept
    assert not {"adapter_config.json", "adapter_model.safetensors"} & kept


def test_heads_that_one_report_compares_keep_their_figures_apart(
    finished_run: Path, tmp_path: Path
) -> None:
    """The heads of runs are all called head."""
    mine = copy_of(finished_run, tmp_path / "a")
    others = [str(copy_of(finished_run, tmp_path / name) / "head") for name in "bc"]
    path = mine / "eval" / "report.json"
    report = json.loads(path.read_text())
    own = report["environment"]["heads"][0]
    report["environment"]["heads"] += others
    for other in others:
        report["environment"]["head_fingerprints"][other] = other
        report["costs"][other] = report["costs"][own]
    path.write_text(json.dumps(report))
    assert publish(mine, "--plan", f"output_dir={tmp_path / 'out'}") == 0
    told = json.loads((tmp_path / "out" / "evaluation" / "report.json").read_text())
    assert len(set(told["environment"]["heads"])) == 3
    assert set(told["costs"]) == set(told["environment"]["heads"])
    assert len(told["environment"]["head_fingerprints"]) == 3

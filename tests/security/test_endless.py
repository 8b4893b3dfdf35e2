"""What strangers wrote comes to an end: patterns, templates, counts, files that unpack without end.

`soon` breaks off what would not, so that a test that fails does not hold up the others.
"""

import gzip
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from headstart.configs.loader import load_config, load_saved
from headstart.configs.schema import HeadConfig, SourceConfig, TargetConfig
from headstart.data.conversations import (
    FORMAT,
    MANIFEST,
    answered,
    finished_parts,
    part_path,
    read_manifest,
    write_part,
)
from headstart.data.inspection import inspect_conversations, inspect_path
from headstart.data.marks import refuse_marks
from headstart.data.prompts import prompt_of
from headstart.data.sources import Place, read_rows
from headstart.data.templates import encode_prompt
from headstart.heads.adapters import add_adapters
from headstart.heads.loading import (
    byte_tokenizer,
    load_target,
    load_target_config,
    load_target_tokens,
)
from headstart.heads.pairing import build_assistant
from headstart.heads.saving import load_assistant, save_assistant
from headstart.train import tracking
from tests.helpers.checkpoints import adapter, configure, family, saved_target
from tests.helpers.models import make_target
from tests.helpers.runs import tiny_config

NESTED = "{% for a in range(99999) %}" * 3 + "{% endfor %}" * 3


@contextmanager
def soon(seconds: int = 20) -> Iterator[None]:
    def stop(*_: object) -> None:
        pytest.fail(f"it goes on after {seconds} seconds")

    signal.signal(signal.SIGALRM, stop)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)


@pytest.fixture(autouse=True)
def short_limits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("headstart.heads.adapters.MATCHED_IN", 0.5, raising=False)
    monkeypatch.setattr("headstart.heads.tokens.RENDERED_IN", 0.5, raising=False)
    monkeypatch.setattr("headstart.data.sources.LONGEST", 1_000_000, raising=False)
    monkeypatch.setattr("headstart.data.sources.LONGEST", 1_000_000, raising=False)
    monkeypatch.setattr("headstart.data.sources.WHOLE", 1_000_000, raising=False)


@pytest.fixture
def target(tmp_path: Path) -> str:
    return saved_target(tmp_path / "target", generation={})


@pytest.fixture
def own(tmp_path: Path) -> str:
    folder, _ = adapter(tmp_path / "adapter", family("gemma3"))
    return folder


@pytest.mark.parametrize(
    "changes",
    [
        {"target_modules": r"(.+)+!"},
        {"target_modules": r"(\w|\.)*(\w|\.)*(.|\w)*!|.*q_proj"},
        {"target_modules": r".*.*.*.*.*.*.*.*.*!"},
        {"exclude_modules": r"((\w+)\.?)+!"},
        {"layers_to_transform": [0], "layers_pattern": r"((\w+)\.?)+!"},
        {"rank_pattern": {r"((\w+)\.?)+!": 4}},
        {"alpha_pattern": {r"((\w+)\.?)+!": 4}},
        {"modules_to_save": [r"((\w+)\.?)+!"]},
    ],
    ids=["nested", "alternatives", "many", "excluded", "layers", "ranks", "alphas", "saved"],
)
def test_a_pattern_of_an_adapter_that_finds_no_end(
    target: str, own: str, changes: dict[str, Any]
) -> None:
    configure(own, "adapter_config.json", **changes)
    with soon(), pytest.raises(ValueError, match=r"adapter .*adapter_config\.json"):
        load_target(target, "float32", adapters=[own])


def test_a_pattern_of_an_adapter_that_is_none(target: str, own: str) -> None:
    configure(own, "adapter_config.json", target_modules="(q_proj")
    with pytest.raises(ValueError, match=r"adapter .*\(q_proj"):
        load_target(target, "float32", adapters=[own])


@pytest.mark.parametrize("where", [{"r": 100_000}, {"rank_pattern": {"q_proj": 100_000}}])
def test_an_adapter_of_a_rank_that_fills_the_memory(
    target: str, own: str, where: dict[str, Any]
) -> None:
    configure(own, "adapter_config.json", **where)
    with pytest.raises(ValueError, match=r"adapter_config\.json says rank 100,000"):
        load_target(target, "float32", adapters=[own])


def test_an_adapter_that_repeats_layers(target: str, own: str) -> None:
    configure(own, "adapter_config.json", layer_replication=[[0, 4]] * 50)
    with soon(), pytest.raises(ValueError, match="layer_replication"):
        load_target(target, "float32", adapters=[own])


def test_a_template_of_nested_loops_is_stopped_when_the_target_comes_in(target: str) -> None:
    (Path(target) / "chat_template.jinja").write_text(NESTED)
    with soon(), pytest.raises(RuntimeError, match="chat template"):
        load_target_tokens(TargetConfig(name=target))


def chat(*texts: str) -> Any:
    turns = [
        {"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(texts)
    ]
    return prompt_of({"messages": turns}, Place("rows.jsonl", 1), {})


def test_a_template_that_loops_over_some_rows_alone_is_not_tried_on_the_next() -> None:
    tokenizer = byte_tokenizer()
    plain = "{% for m in messages %}<{{ m.role }}>{{ m.content }}</{{ m.role }}>{% endfor %}"
    tokenizer.chat_template = f"{plain}{{% if messages|length > 4 %}}{NESTED}{{% endif %}}"
    encode_prompt(chat("one"), tokenizer)
    with soon(), pytest.raises(RuntimeError, match="chat template"):  # no ValueError: no bad row
        encode_prompt(chat("one", "two", "three", "four", "five"), tokenizer)


@pytest.mark.parametrize(
    "template",
    ["{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "{{ 'x' * 10**15 }}"],
    ids=["calls itself", "memory"],
)
def test_a_template_without_bounds_is_a_refusal_of_the_row(template: str) -> None:
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = template
    with pytest.raises(ValueError, match="chat template"):
        encode_prompt(chat("one"), tokenizer)


def test_blank_turns_are_read_in_linear_time(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": " " * 300_000}]
    file = tmp_path / "rows.jsonl"
    file.write_text(json.dumps({"messages": turns}) + "\n")
    with soon():
        inspect_path(file)


def test_words_joined_are_the_text(tmp_path: Path) -> None:
    from headstart.data.inspection import _words

    text = "\n\n  one\ttwo \u2003 three\n"
    words, _ = _words(chat("a", text))
    assert words[-3:] == ["\n\n  one\t", "two \u2003 ", "three\n"]


def test_marks_of_turns_are_looked_for_in_linear_time() -> None:
    text = "<|user|>x\n" * 50_000
    with soon():
        refuse_marks(chat(text), byte_tokenizer())
    with soon(), pytest.raises(ValueError, match="another chat template"):
        refuse_marks(chat(f"{text}<|assistant|>y"), byte_tokenizer())


@pytest.fixture
def manifest(tmp_path: Path) -> Callable[..., Path]:
    def write(**changes: Any) -> Path:
        folder = tmp_path / "conversations"
        folder.mkdir(exist_ok=True)
        made = {
            "format": FORMAT, "target": "tiny-gemma3", "fingerprint": "0" * 64, "tokenizer": "",
            "parts": 2, "conversations": 2, "max_new_tokens": 4, "seed": 0,
        }  # fmt: skip
        (folder / MANIFEST).write_text(json.dumps(made | changes))
        names = {"id": "a", "category": "", "source": "s"}
        rows = [answered([2, 70], [71, 1], **names, temperature=0.0, finish_reason="stop")]
        for number in (0, 1):
            write_part(part_path(folder, number), rows, byte_tokenizer(), "tiny-gemma3", None)
        return folder

    return write


def test_a_manifest_of_a_billion_parts(manifest: Callable[..., Path]) -> None:
    folder = manifest()
    assert finished_parts(folder) == [part_path(folder, 0), part_path(folder, 1)]
    manifest(parts=10**9)
    with soon(10), pytest.raises(ValueError, match="unfinished"):
        finished_parts(folder)
    with soon(10):
        assert "2 of 1000000000 parts" in inspect_conversations(folder, 0).facts["conversations"]


@pytest.mark.parametrize("parts", ["2", 2.0, -1, None, True])
def test_a_manifest_whose_parts_are_no_number(manifest: Callable[..., Path], parts: object) -> None:
    with pytest.raises(ValueError, match=MANIFEST):
        read_manifest(manifest(parts=parts))


@pytest.mark.parametrize("key", ["vocab_size", "intermediate_size", "hidden_size"])
def test_a_configuration_of_more_weights_than_the_files_hold(target: str, key: str) -> None:
    """Without the check they are all made of nothing, to be refused then."""
    size = 64_000 if key == "hidden_size" else 2_000_000
    changes: Any = {key: size}
    configure(target, **changes)
    with soon(60), pytest.raises(ValueError, match=r"target.*config\.json asks for .* weights"):
        load_target(target, "float32")


def test_a_million_experts(tmp_path: Path) -> None:
    folder = saved_target(tmp_path / "target", "gemma4-moe", generation={}, num_experts=200_000)
    with soon(60), pytest.raises(ValueError, match=r"target.*config\.json asks for .* weights"):
        load_target(folder, "float32")


def test_a_head_of_more_weights_than_its_file_holds(tmp_path: Path) -> None:
    whole = make_target("gemma3")
    head = build_assistant(whole, HeadConfig())
    save_assistant(head, whole.table, tmp_path / "head", 4, whole.table.dtype)
    path = tmp_path / "head" / "config.json"
    config = json.loads(path.read_text())
    config["text_config"]["intermediate_size"] = 2_000_000
    path.write_text(json.dumps(config))
    with soon(60), pytest.raises(ValueError, match=r"head.*config\.json asks for .* weights"):
        load_assistant(tmp_path / "head", whole.table.dtype)


def test_a_row_that_is_long_is_no_attack(tmp_path: Path) -> None:
    text = "a " * 300_000
    (tmp_path / "rows.jsonl.gz").write_bytes(gzip.compress(json.dumps({"prompt": text}).encode()))
    ((_, row),) = read_rows(SourceConfig(path=str(tmp_path / "rows.jsonl.gz")))
    assert row == {"prompt": text}


def test_a_tower_of_a_billion_layers(tmp_path: Path) -> None:
    folder = saved_target(tmp_path / "target", "gemma4-multimodal", generation={})
    config = json.loads((tmp_path / "target" / "config.json").read_text())
    configure(folder, vision_config=config["vision_config"] | {"num_hidden_layers": 10**9})
    with soon(), pytest.raises(ValueError, match=r"config\.json .*num_hidden_layers"):
        load_target(folder, "float32")


def bomb(path: Path, start: bytes, end: bytes = b"") -> SourceConfig:
    """A small file that unpacks to millions of spaces between `start` and `end`: the limits are
    smaller here."""
    path.write_bytes(gzip.compress(start + b" " * 4_000_000 + end))
    return SourceConfig(path=str(path))


@pytest.mark.parametrize(
    ("name", "start", "end"),
    [
        ("rows.jsonl.gz", b'{"prompt": "', b'"}\n'),
        ("rows.txt.gz", b"a", b"a\n"),
        ("rows.csv.gz", b"prompt,id\n", b"a,b\n"),
        ("one.csv.gz", b"prompt", b"\n"),
    ],
)
def test_a_compressed_file_of_one_line_that_fills_the_memory(
    tmp_path: Path, name: str, start: bytes, end: bytes
) -> None:
    with pytest.raises(ValueError, match=rf"{name}.* longer than"):
        list(read_rows(bomb(tmp_path / name, start, end)))


def test_a_compressed_array_that_fills_the_memory(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"rows\.json\.gz.* unpacks to more than"):
        list(read_rows(bomb(tmp_path / "rows.json.gz", b'[{"prompt": "a"}', b"]")))


LAUGHS = "a0: &a0 [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]\n" for i in range(1, 12)
)


def laughing(path: Path) -> Path:
    lines = "".join(f"    {line}\n" for line in LAUGHS.splitlines())
    path.write_text(f"data:\n  chat_template_kwargs:\n{lines}")
    return path


@pytest.mark.parametrize("read", [load_config, load_saved])
def test_references_of_a_run_file_that_grow_without_end(
    tmp_path: Path, read: Callable[[Path], Any]
) -> None:
    file = laughing(tmp_path / "config.yaml")
    with soon(), pytest.raises(ValueError, match=r"config\.yaml"):
        read(file)


def test_a_run_file_that_refers_to_itself(tmp_path: Path) -> None:
    file = tmp_path / "config.yaml"
    file.write_text("data: {chat_template_kwargs: &a {b: *a}}\n")
    with soon(), pytest.raises(ValueError, match=r"config\.yaml"):
        load_config(file)


def test_references_that_are_harmless_are_followed(tmp_path: Path) -> None:
    file = tmp_path / "config.yaml"
    file.write_text("data: {chat_template_kwargs: {a: &a [1, 2], b: *a}}\n")
    assert load_config(file).data.chat_template_kwargs == {"a": [1, 2], "b": [1, 2]}


@pytest.mark.parametrize("folder", ["wandb", ".wandb"])
def test_settings_of_wandb_in_the_current_folder_send_no_key_elsewhere(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, folder: str
) -> None:
    import wandb
    from wandb.sdk import wandb_setup

    (tmp_path / folder).mkdir()
    settings = "[default]\nbase_url = http://stranger.invalid\nentity = stranger\n"
    (tmp_path / folder / "settings").write_text(settings)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("WANDB_API_KEY", "k" * 40)
    monkeypatch.delenv("WANDB_BASE_URL", raising=False)
    begun = []

    class Run:
        def log(self, *_: object) -> None:
            pass

        finish = log

    def init(**_: Any) -> Run:
        fresh: Any = wandb_setup._WandbSetup(os.getpid())  # as a process that has not begun yet
        fresh._load_settings(system_settings_path=None, disable_sagemaker=True)
        begun.append(fresh._settings.base_url)
        return Run()

    monkeypatch.setattr(wandb, "init", init)
    monkeypatch.setattr(tracking, "figures", lambda content: {})
    config = tiny_config(tmp_path / "run", "wandb.mode=online")
    config.output_dir.mkdir()
    with pytest.raises(ValueError, match=rf"{folder}/settings"):
        tracking.log_report(config, {"verdict": "", "results": []})
    assert begun == []


def test_an_adapter_within_the_folder_of_a_target_is_not_added_untold(target: str) -> None:
    adapter(Path(target), family("gemma3"))
    for read in (load_target_config, load_target):
        with pytest.raises(ValueError, match=r"target.*adapter_config\.json"):
            read(target)


def test_an_adapter_as_a_target_brings_no_other_model(tmp_path: Path, target: str) -> None:
    own, _ = adapter(tmp_path / "own", family("gemma3"))
    configure(own, "adapter_config.json", base_model_name_or_path=target)
    with pytest.raises(ValueError, match=r"own.*adapter_config\.json"):
        load_target(own)


def test_an_adapter_within_the_folder_of_a_head_is_not_added_untold(
    tmp_path: Path, own: str
) -> None:
    whole = make_target("gemma3")
    head = build_assistant(whole, HeadConfig())
    save_assistant(head, whole.table, tmp_path / "head", 4, whole.table.dtype)
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        (tmp_path / "head" / name).write_bytes((Path(own) / name).read_bytes())
    with pytest.raises(ValueError, match=r"head.*adapter_config\.json"):
        load_assistant(tmp_path / "head", whole.table.dtype)


def test_a_template_within_one_step_of_python_is_ended_too() -> None:
    """While lists are compared no signal is heeded."""
    lists = "[[[0] * 9999] * 9999] * 9999"
    script = (
        "from headstart.common import signals\n"
        "from headstart.heads import tokens\n"
        "from headstart.heads.loading import byte_tokenizer\n"
        "tokens.RENDERED_IN = signals.GRACE = 1.0\n"
        f"template = '{{{{ {lists} == {lists} }}}}'\n"
        "tokens.render_chat(byte_tokenizer(), template, {}, [{'role': 'user', 'content': 'a'}])\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, timeout=100)
    assert done.returncode == 1
    assert b"Timeout" in done.stderr


def test_a_bank_of_vectors_that_no_file_holds_is_not_made(tmp_path: Path) -> None:
    folder, _ = adapter(tmp_path / "adapter", family("gemma4"))
    bank = {"peft_type": "VBLORA", "r": 2, "num_vectors": 10**8, "vector_length": 4}
    kept = {"target_modules": ["q_proj"], "task_type": "CAUSAL_LM"}
    (Path(folder) / "adapter_config.json").write_text(json.dumps(bank | kept))
    with pytest.raises(ValueError, match="num_vectors 100,000,000"):
        add_adapters(family("gemma4"), [folder], merge=True)

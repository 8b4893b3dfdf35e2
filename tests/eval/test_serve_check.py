"""What engines tell of their drafts, and how one that fails is reported."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from headstart.cli.main import main
from headstart.eval.acceptance import AcceptanceCounts
from headstart.eval.decoding import Decoded
from headstart.heads.loading import byte_tokenizer, load_target
from headstart.heads.target import Target
from headstart.serve import engine_check, engine_server
from headstart.serve.engine_check import ServeCheck, _compared, as_engine_counts, served_model
from headstart.serve.engine_server import (
    Answer,
    Asked,
    Counts,
    EngineServer,
    ask,
    counts_of_metrics,
)
from headstart.serve.engines import Engine
from tests.helpers.tiny_pair import write_multimodal

# Lines of vLLM 0.32's /metrics.
METRICS = """\
# HELP vllm:spec_decode_num_drafts_total Number of spec decoding drafts.
# TYPE vllm:spec_decode_num_drafts_total counter
vllm:spec_decode_num_drafts_total{engine="0",model_name="target"} 148.0
vllm:spec_decode_num_drafts_created{engine="0",model_name="target"} 1.79e+09
vllm:spec_decode_num_draft_tokens_total{engine="0",model_name="target"} 592.0
vllm:spec_decode_num_accepted_tokens_total{engine="0",model_name="target"} 374.0
vllm:spec_decode_num_accepted_tokens_per_pos_total{engine="0",model_name="target",position="0"} 123.0
vllm:spec_decode_num_accepted_tokens_per_pos_total{engine="0",model_name="target",position="1"} 91.0
"""  # noqa: E501


def test_an_engines_counters_are_read() -> None:
    found = counts_of_metrics(METRICS)
    assert found == Counts(148, [123, 91])
    assert found - Counts() == found
    assert found - Counts(100, [100, 90]) == Counts(48, [23, 1])


@pytest.mark.parametrize(
    ("engine", "rounds", "accepted"),
    [
        ("vllm", 3, (2, 2, 1)),  # goes on beyond the end
        ("llama.cpp", 2, (1, 1, 1)),  # leaves a place for the target's own token
        ("mlx", 3, (2, 1, 1)),  # drafts as many as are wanted
    ],
)
def test_acceptance_is_counted_as_the_engine_counts_it(
    engine: Engine, rounds: int, accepted: tuple[int, ...]
) -> None:
    """Of a text of 7 tokens: one of the prompt's, then rounds that bring 4, 1 and, of 3, the last;
    a prompt of 5 tokens, K = 3."""
    forwards = [(0, 5), (5, 4), (9, 4), (10, 4), (13, 2)]
    longer = Decoded(
        tokens=list(range(10)), seconds=1, first_token_seconds=1, drafting_seconds=None,
        forwards=forwards, drafts=[],
    )  # fmt: skip
    counts = as_engine_counts(longer, 5, 7, 3, engine)
    assert (counts.rounds, counts.accepted) == (rounds, accepted)


def test_an_answer_is_without_the_token_that_ends_it() -> None:
    ended, whole = (Answer.of(tokens, [1], 3, 1.0) for tokens in ([5, 1], [5, 6, 7]))
    assert (ended.tokens, ended.ended, ended.written) == ([5], True, 2)
    assert (whole.tokens, whole.ended, whole.written) == ([5, 6, 7], False, 3)
    assert Answer.of([5], [1], 3, 1.0) == ended, "engines differ in whether they hand it out"


def test_an_engine_that_dies_says_why_and_keeps_its_log(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # This Python has no vLLM, so that the engine ends at once with an error of its own.
    monkeypatch.setattr(engine_server, "engine_python", lambda engine: Path(sys.executable))
    log = tmp_path / "vllm.log"
    server = EngineServer("vllm", tmp_path, None, 4, 64, [1], log, "float32", 2)
    with pytest.raises(RuntimeError, match=r"did not come up: .*vllm.*vllm\.log"), server:
        pass
    assert "No module named" in log.read_text()
    assert server.process.poll() is not None


def test_what_an_engine_started_is_stopped_with_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(engine_server, "engine_python", lambda engine: Path(sys.executable))
    monkeypatch.setattr(engine_server, "STARTING", 3.0)
    server = EngineServer("vllm", tmp_path, None, 4, 64, [1], tmp_path / "log", "float32", 2)
    child = "import subprocess, sys, time; p = subprocess.Popen(['sleep', '60']); print(p.pid)"
    server.command = [sys.executable, "-u", "-c", f"{child}; time.sleep(60)"]
    with pytest.raises(RuntimeError, match="did not come up"), server:
        pass
    started = int((tmp_path / "log").read_text())
    state = subprocess.run(
        ["ps", "-o", "stat=", "-p", str(started)], capture_output=True, text=True
    )
    assert state.stdout.strip().startswith("Z") or not state.stdout.strip()


@pytest.mark.parametrize("stop", [KeyboardInterrupt, TimeoutError])
def test_an_engine_does_not_outlive_a_start_that_was_stopped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stop: type[BaseException]
) -> None:
    monkeypatch.setattr(engine_server, "engine_python", lambda engine: Path(sys.executable))
    server = EngineServer("vllm", tmp_path, None, 4, 64, [1], tmp_path / "log", "float32", 2)
    server.command = [sys.executable, "-c", "import time; time.sleep(60)"]

    def interrupted() -> bool:
        raise stop

    monkeypatch.setattr(server, "_is_up", interrupted)
    with pytest.raises(stop), server:
        pass
    assert server.process.poll() is not None


def test_what_an_engine_says_of_a_prompt_it_refuses_is_passed_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And a proxy of the environment does not stand before it."""
    monkeypatch.setattr(engine_server, "engine_python", lambda engine: Path(sys.executable))
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")
    server = EngineServer("vllm", tmp_path, None, 4, 64, [1], tmp_path / "log", "float32", 2)
    refusing = (
        "import sys, http.server as h\n"
        "class R(h.BaseHTTPRequestHandler):\n"
        "    def do_GET(self): self.send_response(200); self.end_headers()\n"
        "    def do_POST(self):\n"
        "        self.send_response(400); self.end_headers(); self.wfile.write(b'too long')\n"
        "h.HTTPServer(('127.0.0.1', int(sys.argv[1])), R).serve_forever()"
    )
    server.command = [sys.executable, "-c", refusing, server.url.rpartition(":")[2]]
    with pytest.raises(RuntimeError, match=r"refuses a prompt \(400\): too long"), server:
        server.answer([1, 2], 4)


TOGETHER = """
import http.server as h, json, sys, threading, time
under_way, lock, most = 0, threading.Lock(), 0
class R(h.BaseHTTPRequestHandler):
    def say(self, text):
        self.send_response(200); self.end_headers(); self.wfile.write(text.encode())
    def do_GET(self):
        self.say(f"vllm:spec_decode_num_drafts_total {most}\\n" if "metrics" in self.path else "")
    def do_POST(self):
        global under_way, most
        asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        with lock:
            under_way += 1; most = max(most, under_way)
        time.sleep(0.3)
        with lock: under_way -= 1
        self.say(json.dumps({"choices": [{"token_ids": asked["prompt"][:asked["max_tokens"]]}]}))
h.ThreadingHTTPServer(("127.0.0.1", int(sys.argv[1])), R).serve_forever()
"""


@pytest.mark.parametrize("at_once", [1, 3])
def test_so_many_requests_are_under_way_together(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, at_once: int
) -> None:
    """And the answers come in the order of the prompts. The server counts as its rounds the most
    requests that it had at one time, of which the warm-up's was one."""
    monkeypatch.setattr(engine_server, "engine_python", lambda engine: Path(sys.executable))
    server = EngineServer("vllm", tmp_path, None, 4, 64, [1], tmp_path / "log", "float32", 2)
    server.command = [sys.executable, "-c", TOGETHER, server.url.rpartition(":")[2]]
    prompts = [[10 + n, 20 + n] for n in range(6)]
    with server:
        asked = ask(server, prompts, 2, "texts", at_once)
    assert [answer.tokens for answer in asked.answers] == prompts
    assert asked.counts.rounds == at_once - 1
    assert asked.tokens_per_second == pytest.approx(12 / asked.seconds)


def test_an_engine_that_works_on_one_text_alone_is_not_asked_for_several() -> None:
    with pytest.raises(ValueError, match=r"mlx .*eval\.concurrency"):
        ServeCheck("mlx", "head", 4, 64, False, concurrency=(4,))


@pytest.mark.parametrize(
    ("engine", "content", "told"),
    [
        ("vllm", b"GGUF", "vllm reads no GGUF"),
        ("llama.cpp", None, "there is no file"),
        ("llama.cpp", b"no such thing", "does not begin as a GGUF file does"),
    ],
)
def test_a_file_that_llama_cpp_cannot_serve_is_refused_before_the_target_is_loaded(
    tmp_path: Path, engine: Engine, content: bytes | None, told: str
) -> None:
    path = tmp_path / "target.gguf"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(ValueError, match=told):
        ServeCheck(engine, "head", 4, 64, False, target_gguf=path)


def test_the_figures_of_an_engine_are_those_of_its_texts() -> None:
    """A speed is all tokens by all seconds, not a mean of speeds."""

    def text(tokens: list[int], seconds: float) -> Answer:
        return Answer(tokens, False, seconds)

    ours = {
        "plain": [text([1, 2, 3], 1.0), text([4], 1.0)],
        "assisted": [text([1, 2, 3], 0.5), text([4], 0.5)],
    }
    plain = [text([1, 2, 3], 0.25), text([5], 0.75)]
    assisted = [text([1, 2, 3], 0.1), text([4], 0.4)]
    told = Counts(10, [5, 2])
    variants = {"plain": Asked(plain, Counts(), 1.0), "assisted": Asked(assisted, told, 0.5)}
    found = _compared(ours, AcceptanceCounts(10, 20, (10, 6), (6, 3)), variants)
    assert found["tokens_per_second"] == {
        "transformers_plain": 2, "transformers_assisted": 4,
        "engine_plain": 4, "engine_assisted": pytest.approx(8),
    }  # fmt: skip
    assert found["speedup"] == pytest.approx(2)
    assert found["acceptance_length"] == {"transformers": 1.9, "engine": 1.7}
    assert found["cumulative_acceptance_rate"]["engine"] == [0.5, 0.2]
    assert found["equal_texts"] == {
        "engine_assisted_to_engine_plain": 0.5,
        "engine_plain_to_transformers_plain": 0.5,
        "engine_assisted_to_transformers_plain": 1,
    }


def test_litert_is_compared_with_a_target_in_its_own_dtype(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Also where a processor computes in bfloat16, which the engine does not."""
    checked: list[Target] = []

    def serve_check(target: Target, *rest: Any) -> dict[str, Any]:
        checked.append(target)
        return {}

    monkeypatch.setattr("headstart.common.machine.natural_dtype", lambda: "bfloat16")
    monkeypatch.setattr("headstart.serve.engines.engine_python", lambda engine: Path())
    monkeypatch.setattr("headstart.serve.engines.check_served", lambda engine, head: None)
    monkeypatch.setattr(engine_check, "serve_check", serve_check)
    monkeypatch.setattr(engine_check, "print_serve_check", lambda content: None)
    given = ["serve-check", "head", "litert", "target.name=tiny-gemma3", f"output_dir={tmp_path}"]
    assert main(given) == 0
    assert checked[0].table.dtype is torch.float32
    assert main([*given, "target.dtype=bfloat16"]) == 1
    assert "target.dtype=float32" in capsys.readouterr().err
    assert len(checked) == 1


def test_an_engine_gets_all_weights_of_a_multimodal_target(tmp_path: Path) -> None:
    """Whose towers are let go of when it is loaded: mlx-vlm reads them, the others text alone."""
    load_target("tiny-gemma4", "float32").model.save_pretrained(tmp_path / "text")
    byte_tokenizer().save_pretrained(tmp_path / "text")
    given = write_multimodal(tmp_path / "text", tmp_path / "given")
    target = load_target(str(given), "float32")
    served_model(target, "mlx").save_pretrained(tmp_path / "mlx")
    served, whole = (load_file(f / "model.safetensors") for f in (tmp_path / "mlx", given))
    assert served.keys() == whole.keys()
    assert all(torch.equal(served[name], tensor) for name, tensor in whole.items())
    for engine in ("vllm", "llama.cpp"):
        served_model(target, engine).save_pretrained(tmp_path / engine)
        text = AutoModelForCausalLM.from_pretrained(tmp_path / engine)
        assert type(text).__name__ == "Gemma4ForCausalLM"
        ids = torch.tensor([[2, 70, 71, 72]])
        with torch.no_grad():
            torch.testing.assert_close(text(ids).logits, target.model(ids).logits)

"""`headstart regenerate` against llama.cpp's real server, which is killed half-way; so is the
command itself."""

import subprocess
import sys
import time
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from headstart.data.conversations import finished_parts
from tests.helpers.servers import LlamaServer, real_gguf

pytestmark = [pytest.mark.real, pytest.mark.slow]
ROOT = Path(__file__).resolve().parents[2]


def wait_for_parts(process: subprocess.Popen[str], out: Path, count: int) -> None:
    while process.poll() is None and len(list(out.glob("part-*.parquet"))) < count:
        time.sleep(0.05)
    assert process.poll() is None, process.communicate()


def test_nothing_is_lost_or_doubled_when_server_and_command_are_killed(tmp_path: Path) -> None:
    out = tmp_path / "out"
    command = [str(Path(sys.executable).with_name("headstart")), "regenerate", f"output_dir={out}"]
    settings = [
        "target.name=gemma3-270m", "data.prompts=[data/prompts/text_eval.jsonl]",
        "data.max_new_tokens=12", "data.max_prompt_tokens=32", "data.generation_batch_size=4",
    ]  # fmt: skip

    def start(server: LlamaServer) -> subprocess.Popen[str]:
        return subprocess.Popen(
            [*command, f"server.url={server.url}", "server.concurrency=4", *settings],
            cwd=ROOT,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    with LlamaServer(real_gguf(tmp_path), tmp_path / "log") as server:
        process = start(server)
        wait_for_parts(process, out, 3)
        process.kill()
        process.communicate()
        process = start(server)
        wait_for_parts(process, out, 8)
        server.kill()
        time.sleep(0.5)
        kept = {path: path.read_bytes() for path in out.glob("part-*.parquet")}
        server.start()
        output, error = process.communicate(timeout=300)
        assert process.returncode == 0, error
    assert "Written" in output
    assert "tokenized again" not in output, "the server gives token ids"
    assert len(kept) < 20
    for path, before in kept.items():
        assert path.read_bytes() == before, "finished parts stay as they are"
    rows = [row for part in finished_parts(out) for row in pq.read_table(part).to_pylist()]
    prompts = (ROOT / "data" / "prompts" / "text_eval.jsonl").read_text().splitlines()
    assert len({row["id"] for row in rows}) == len(rows) == len(prompts) == 80
    assert {row["temperature"] for row in rows} == {0.0, 0.7}
    for row in rows:
        assert len(row["response_ids"]) == 12 or row["finish_reason"] == "stop"
        assert row["prompt_ids"][0] == 2, "<bos>, which the server is not to add once more"

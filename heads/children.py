"""Child processes: Python that takes no code from the current folder, and gets no secrets."""

import os
import re
import subprocess
from pathlib import Path

# Of the environment, what a program needs to run here; a list of what may pass, since no list of
# secrets is complete.
NEEDED = re.compile(
    r"PATH|HOME|USER|LOGNAME|SHELL|TERM|LANG|LANGUAGE|LC_\w+|TZ|TMPDIR|TEMP|TMP|XDG_\w+|HF_HOME|"
    r"(DY)?LD_LIBRARY_PATH|LD_PRELOAD|SSL_CERT_(FILE|DIR)|"
    r"(CUDA|NVIDIA|NCCL|ROCM|HIP|OMP|KMP|MKL|OPENBLAS|GOMP|TORCH|PYTORCH|VLLM|GGML|MLX)_?\w*"
)
# How pip finds the user's index, whose name may hold a password.
OF_PIP = re.compile(
    r"PIP_\w+|(HTTPS?|ALL|NO)_PROXY|NETRC|REQUESTS_CA_BUNDLE|CURL_CA_BUNDLE", re.IGNORECASE
)
SECRET = re.compile(r"KEY|TOKEN|SECRET|PASSW|CREDENTIAL|AUTH", re.IGNORECASE)


def child_environment(for_pip: bool = False) -> dict[str, str]:
    """The environment of a child process, without keys and tokens.

    Args:
        for_pip: with the variables that name the user's index, and the way there.
    """
    return {
        name: value
        for name, value in os.environ.items()
        if (NEEDED.fullmatch(name) and not SECRET.search(name))
        or (for_pip and OF_PIP.fullmatch(name))
    }


def python_command(python: Path | str, *arguments: str) -> list[str]:
    """A call of Python for which the current folder holds no modules, whatever lies there: without
    `-I`, both `-c` and `-m` look there first. (`-P` would do, but 3.10 does not have it.)"""
    return [str(python), "-I", *arguments]


def run_python(
    python: Path | str, *arguments: str, for_pip: bool = False
) -> subprocess.CompletedProcess[str]:
    """Run Python to its end, within the folder that it lies in: what it starts in turn does not say
    `-I`, and libraries look for plugins in the current folder. Paths in arguments are absolute."""
    return subprocess.run(
        python_command(python, *arguments), capture_output=True, text=True,
        env=child_environment(for_pip), cwd=home_of(python),
    )  # fmt: skip


def home_of(python: Path | str) -> Path:
    """The folder of the environment that a Python is of, where child processes run."""
    return Path(python).absolute().parent.parent

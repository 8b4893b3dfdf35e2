"""Child processes and temporary folders: Python that takes no code from the current folder and gets
no secrets, and names by which a later run knows what an earlier one left behind.
"""

import os
import platform
import re
import secrets
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
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


HOST = re.sub(r"[^\w.-]", "_", platform.node())
COPY = ".copy"  # ends the names of folders in the system's place for those of the time being
TOKEN = secrets.token_hex(4)  # of this process: another machine, or a container, may have its id
NAME = re.compile(r".*\.(?P<host>[\w.-]*)\.(?P<pid>\d+)\.(?P<token>[0-9a-f]{8})")


def own_name(name: str, suffix: str = "") -> str:
    """`NAME.HOST.PID.TOKEN` and a suffix, which no other process has and nobody can guess."""
    return f"{name}.{HOST}.{os.getpid()}.{TOKEN}{suffix}"


def made_here(folder: Path, suffix: str) -> list[Path]:
    """The folders with such names in `folder`, of whichever process and machine; links are none."""
    return [
        path
        for path in folder.iterdir()
        if path.name.endswith(suffix)
        and NAME.fullmatch(path.name.removesuffix(suffix))
        and path.is_dir()
        and not path.is_symlink()
    ]


def remove_left_behind(folder: Path, suffix: str) -> None:
    """Remove what processes of this machine made in `folder` that are gone; another machine's may
    be at work."""
    for path in made_here(folder, suffix) if folder.is_dir() else []:
        if _is_gone(path.name.removesuffix(suffix)):
            shutil.rmtree(path, ignore_errors=True)


@contextmanager
def temporary_folder() -> Iterator[Path]:
    """Gives a folder of the time being, which nobody else can read; what killed processes left of
    theirs goes first: it may be the copy of a target."""
    place = Path(tempfile.gettempdir())
    remove_left_behind(place, COPY)
    folder = place / own_name(f"headstart-{secrets.token_hex(4)}", COPY)
    folder.mkdir(mode=0o700)
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _is_gone(name: str) -> bool:
    found = NAME.fullmatch(name)
    assert found is not None
    # The greedy start of the pattern may take a part of the host's name.
    if not name.endswith(f".{HOST}.{found['pid']}.{found['token']}"):
        return False
    pid = int(found["pid"])
    if pid == os.getpid():  # reused: that of a container is often 1
        return found["token"] != TOKEN
    try:
        os.kill(pid, 0)
    except (ProcessLookupError, OverflowError):
        return True
    except PermissionError:
        pass  # another user's
    return False

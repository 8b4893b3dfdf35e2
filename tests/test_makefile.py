"""Which build of torch `make setup` takes, with a stand-in for pip: no index is asked."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
CPU_INDEX = "https://download.pytorch.org/whl/cpu"

PIP = """#!/bin/sh
echo "$@" >> "{log}"
case "$*" in
*importlib.metadata*) exit {there};;
{success}) exit 0;;
esac
exit 1
"""


def take_torch(
    folder: Path, success: str, gpu: bool = False, there: bool = False
) -> tuple[str, list[str]]:
    """What `make torch` says, and what it asks of pip, which has what the pattern matches."""
    tools, bin_, log = folder / "tools", folder / "venv" / "bin", folder / "log"
    tools.mkdir()
    bin_.mkdir(parents=True)
    for tool in ("sh", "sed", "make", "awk"):
        found = shutil.which(tool)
        assert found is not None
        (tools / tool).symlink_to(found)
    scripts = {bin_ / "python": PIP.format(log=log, success=success, there=int(not there))}
    if gpu:
        scripts[tools / "nvidia-smi"] = "#!/bin/sh\n"
    for path, text in scripts.items():
        path.write_text(text)
        path.chmod(0o755)
    log.write_text("")
    environment = {k: v for k, v in os.environ.items() if not k.startswith("MAKE")}
    environment["PATH"] = str(tools)
    command = ["make", "torch", f"VENV={folder / 'venv'}"]
    result = subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=60
    )
    assert result.returncode == 0, result.stderr
    return result.stdout, [line for line in log.read_text().splitlines() if "install" in line]


def test_the_newest_cpu_build_of_the_usual_index_comes_first(tmp_path: Path) -> None:
    said, asked = take_torch(tmp_path, "*2.14.0+cpu*|*2.13.0+cpu*|*index-url*")
    assert "Took torch 2.14.0+cpu" in said
    assert [line.split()[-1] for line in asked] == [
        "torch==2.15.0+cpu", "torch==2.14.1+cpu", "torch==2.14.0+cpu",
    ]  # fmt: skip


def test_the_index_that_the_install_page_names_comes_second(tmp_path: Path) -> None:
    said, asked = take_torch(tmp_path, "*index-url*")
    assert f"Took the newest CPU build of torch from {CPU_INDEX}" in said
    assert f"--index-url {CPU_INDEX} torch>=" in asked[-1]
    project = (ROOT / "pyproject.toml").read_text()
    assert f'"{asked[-1].split()[-1]}"' in project, "the range of the project"


def test_the_usual_build_comes_last_and_is_announced(tmp_path: Path) -> None:
    said, asked = take_torch(tmp_path, "nothing")
    assert "taking the usual build" in said
    assert len(asked) == 5


def test_an_installed_torch_stays(tmp_path: Path) -> None:
    assert take_torch(tmp_path, "*", there=True) == ("", [])


@pytest.mark.parametrize("success", ["*", "nothing"])
def test_a_machine_with_a_gpu_is_left_to_the_usual_build(tmp_path: Path, success: str) -> None:
    said, asked = take_torch(tmp_path, success, gpu=True)
    assert "CPU" not in said
    assert asked == []

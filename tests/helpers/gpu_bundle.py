"""The wheels that `python -m tests.gpu_proof` needs on a machine without a network, into a folder:
`make gpu-bundle`.

There is an image with Python 3.12, torch, accelerate, peft, safetensors and pyarrow there, and with
what these need; its transformers is older than ours.
"""

import subprocess
import sys
from collections.abc import Iterable
from importlib import metadata
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

IMAGE = ("torch", "accelerate", "peft", "safetensors", "pyarrow")
NOT_THERE = ("transformers", "typing-extensions", "pydantic", "rich")  # or too old
NOT_NEEDED = ("wandb", "datasets", "openai")  # imported where a run asks for them
PURE, COMPILED = ["any"], ["manylinux_2_28_x86_64", "manylinux2014_x86_64"]
"""Platforms of wheels: those that run anywhere are smaller, and come first."""
LIMIT = 40 * 2**20
"""Bytes: what can be carried beside a checkout."""


def needed_by(names: Iterable[str]) -> set[str]:
    """The packages, and all that they need here."""
    found, left = set[str](), [canonicalize_name(name) for name in names]
    while left:
        name = left.pop()
        if name in found:
            continue
        found.add(name)
        for text in metadata.requires(name) or ():
            requirement = Requirement(text)
            if requirement.marker is None or requirement.marker.evaluate({"extra": ""}):
                left.append(canonicalize_name(requirement.name))
    return found


def bundled() -> list[str]:
    """NAME==VERSION of each wheel, as they are installed here."""
    there = needed_by(IMAGE) - needed_by(NOT_THERE[1:]) - set(NOT_THERE)
    asked = [Requirement(text) for text in metadata.requires("headstart") or ()]
    own = {r.name for r in asked if r.marker is None} - set(IMAGE) - set(NOT_NEEDED)
    return [f"{n}=={metadata.version(n)}" for n in sorted(needed_by(own) - there)]


def download(requirement: str, folder: Path) -> None:
    """The wheel of a requirement, or `subprocess.CalledProcessError`: there is none."""
    command = [
        sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:",
        "--python-version", "3.12", "--dest", str(folder), requirement,
    ]  # fmt: skip
    for platforms in (PURE, COMPILED):
        which = [part for platform in platforms for part in ("--platform", platform)]
        last = platforms is COMPILED
        if not subprocess.run([*command, *which], check=last, capture_output=not last).returncode:
            return


def main() -> None:
    folder = Path(sys.argv[1])
    for requirement in bundled():
        download(requirement, folder)
    size = sum(wheel.stat().st_size for wheel in folder.iterdir())
    if size > LIMIT:
        sys.exit(f"{folder} has {size / 2**20:.1f} MiB, more than can be carried")
    print(f"{folder}: {size / 2**20:.1f} MiB. On the machine, in the checkout: make links && "
          f"pip install --no-index --no-deps {folder}/*.whl && "
          "PYTHONPATH=.types python -m tests.gpu_proof --out gpu")  # fmt: skip


if __name__ == "__main__":
    main()

"""The wheel: it holds every module under `headstart`, and nothing beside that name."""

import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parents[1]
FOLDERS = ("common", "configs", "heads", "data", "eval", "train", "serve", "cli")


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> zipfile.ZipFile:
    """The wheel of a copy of the checkout: building in place leaves stale files behind."""
    copy = tmp_path_factory.mktemp("checkout")
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, copy / name)
    for folder in FOLDERS:
        shutil.copytree(ROOT / folder, copy / folder, ignore=shutil.ignore_patterns("__pycache__"))
    # Without isolation the build needs no network: setuptools is in the dev extra.
    command = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", "dist"]
    built = subprocess.run(command, cwd=copy, capture_output=True, text=True, timeout=300)
    assert built.returncode == 0, built.stdout + built.stderr
    (path,) = (copy / "dist").glob("headstart-*.whl")
    return zipfile.ZipFile(path)


def test_wheel_holds_headstart_alone(wheel: zipfile.ZipFile) -> None:
    tops = {name.partition("/")[0] for name in wheel.namelist()}
    info = {top for top in tops if top.startswith("headstart-") and top.endswith(".dist-info")}
    assert len(info) == 1
    assert tops - info == {"headstart"}


def test_wheel_holds_every_module_and_recipe(wheel: zipfile.ZipFile) -> None:
    expected = {
        f"headstart/{path.relative_to(ROOT).as_posix()}"
        for folder in FOLDERS
        for path in [*(ROOT / folder).rglob("*.py"), ROOT / folder / "py.typed"]
    }
    recipes = {f"headstart/configs/{path.name}" for path in (ROOT / "configs").glob("*.yaml")}
    assert recipes, "no recipe in configs/"
    templates = {"headstart/eval/report.html.jinja", "headstart/serve/card.md.jinja"}
    packed = {name for name in wheel.namelist() if name.startswith("headstart/")}
    assert packed == expected | recipes | templates


def test_wheel_leaves_the_namespace_open(wheel: zipfile.ZipFile) -> None:
    assert "headstart/__init__.py" not in wheel.namelist()


def test_wheel_brings_the_command_and_the_license(wheel: zipfile.ZipFile) -> None:
    (info,) = {n.partition("/")[0] for n in wheel.namelist() if ".dist-info/" in n}
    entry_points = wheel.read(f"{info}/entry_points.txt").decode()
    assert "headstart = headstart.cli.main:main" in entry_points
    assert f"{info}/licenses/LICENSE" in wheel.namelist()
    assert "License-Expression: Apache-2.0" in wheel.read(f"{info}/METADATA").decode()

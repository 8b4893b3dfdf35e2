"""The wheel: it holds every module under `headstart`, the recipes, their prompts and the answers to
them, and nothing beside that name; it needs no checkout."""

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parents[1]
PROMPTS = ROOT / "data" / "prompts"
FOLDERS = ("common", "configs", "heads", "data", "eval", "train", "serve", "api", "cli")


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


def test_wheel_holds_every_module_recipe_prompt_and_answer(wheel: zipfile.ZipFile) -> None:
    expected = {
        f"headstart/{path.relative_to(ROOT).as_posix()}"
        for folder in FOLDERS
        for path in [*(ROOT / folder).rglob("*.py"), ROOT / folder / "py.typed"]
    }
    recipes = {f"headstart/configs/{path.name}" for path in (ROOT / "configs").glob("*.yaml")}
    assert recipes, "no recipe in configs/"
    templates = {"headstart/eval/report.html.jinja", "headstart/serve/card.md.jinja"}
    prompts = {f"headstart/data/prompts/{path.name}" for path in PROMPTS.iterdir()}
    answers = {
        f"headstart/data/{path.relative_to(ROOT / 'data').as_posix()}"
        for path in (ROOT / "data" / "answers").rglob("*.*")
    }
    packed = {name for name in wheel.namelist() if name.startswith("headstart/")}
    assert packed == expected | recipes | templates | prompts | answers


def test_wheel_leaves_the_namespace_open(wheel: zipfile.ZipFile) -> None:
    assert "headstart/__init__.py" not in wheel.namelist()


def test_wheel_brings_the_command_and_the_license(wheel: zipfile.ZipFile) -> None:
    (info,) = {n.partition("/")[0] for n in wheel.namelist() if ".dist-info/" in n}
    entry_points = wheel.read(f"{info}/entry_points.txt").decode()
    assert "headstart = headstart.cli.main:main" in entry_points
    assert f"{info}/licenses/LICENSE" in wheel.namelist()
    assert f"{info}/licenses/data/prompts/NOTICE.md" in wheel.namelist()
    assert "License-Expression: Apache-2.0 AND" in wheel.read(f"{info}/METADATA").decode()


def test_wheel_has_the_notices_of_the_prompts_beside_them(wheel: zipfile.ZipFile) -> None:
    notice = wheel.read("headstart/data/prompts/NOTICE.md")
    assert notice == (PROMPTS / "NOTICE.md").read_bytes()


def test_wheel_stays_below_five_megabytes(wheel: zipfile.ZipFile) -> None:
    assert wheel.filename is not None
    assert Path(wheel.filename).stat().st_size < 5_000_000


def test_wheel_trains_by_the_name_of_a_recipe_in_an_empty_folder_without_the_checkout(
    wheel: zipfile.ZipFile, tmp_path: Path
) -> None:
    installed, empty = tmp_path / "installed", tmp_path / "empty"
    wheel.extractall(installed)
    empty.mkdir()
    # Python imports a module of this name when it starts.
    shutil.copy(ROOT / ".ci" / "out_of_reach.py", installed / "sitecustomize.py")
    environment = os.environ | {
        "PYTHONPATH": str(installed), "OUT_OF_REACH": str(ROOT), "WITHIN_REACH": sys.prefix,
        "HEADSTART_CACHE": str(tmp_path / "cache"),
    }  # fmt: skip

    def python(*arguments: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, *arguments], cwd=empty, env=environment, capture_output=True,
            text=True, timeout=300,
        )  # fmt: skip

    reached = python("-c", f"open({str(ROOT / 'configs' / 'tiny.yaml')!r})")
    assert "out of reach" in reached.stderr
    found = python("-c", "import headstart.data as data; print(data.__file__)")
    assert found.stdout.startswith(str(installed)), found.stderr
    settings = [
        "train.max_steps=6",
        "eval.limit=1",
        "eval.max_new_tokens=4",
        "eval.fp32_check_prompts=0",
    ]
    done = python("-m", "headstart.cli", "train", "--config", "tiny", *settings)
    assert done.returncode == 0, done.stderr
    assert (empty / "runs" / "tiny" / "eval" / "report.html").is_file()

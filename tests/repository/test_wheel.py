"""A wheel is whole: what is installed from it works in an environment that has no checkout."""

from __future__ import annotations

import os
import shutil
import site
import subprocess
import sys
import venv
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
RECIPE = """
stages = ["sft", "rl", "eval"]
model = { path = "world:chain/rich" }
data = { source = ["world:chain"], limit = 16 }
sft = { lr = 1e-3, batch = 8, epochs = 1 }
rl = { method = "grpo", lr = 1e-4, steps = 1, prompts = 2, rollouts = 4, max_tokens = 32, reward = "exact" }
eval = { max_tokens = 32, reward = "exact" }
"""


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel of a copy of the checkout's tracked files."""
    folder = tmp_path_factory.mktemp("wheel")
    source = folder / "source"
    names = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, check=False).stdout.decode()
    if not names:
        pytest.skip("this is no checkout of git: which files belong to it is unknown")
    for name in filter(None, names.split("\0")):
        if name.startswith(("src/", "pyproject", "README", "LICENSE")) and (ROOT / name).is_file():
            (source / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, source / name)
    command = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--wheel-dir", str(folder), str(source)]
    made = subprocess.run(command, capture_output=True, text=True, check=False)
    if "No matching distribution found for hatchling" in made.stderr:
        pytest.skip("the build needs hatchling from a package index, and none is reached")
    assert made.returncode == 0, made.stderr
    return next(folder.glob("*.whl"))


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of programs of a new environment with the wheel.

    The dependencies are those of the running environment: a folder named in a .pth file adds its packages, but not the
    .pth files in it, so the editable installation of the checkout stays outside.
    """
    folder = tmp_path_factory.mktemp("environment")
    venv.create(folder, with_pip=True)
    python = folder / "bin" / "python"
    own = next((folder / "lib").glob("python*/site-packages"))
    subprocess.run([python, "-m", "pip", "install", "--quiet", "--no-deps", str(wheel)], check=True)
    (own / "dependencies.pth").write_text("\n".join(site.getsitepackages()) + "\n")
    return folder / "bin"


def thence(installed: Path, folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run the command in a folder outside of the checkout."""
    clean = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    command = [str(installed / "thence"), *arguments]
    return subprocess.run(command, cwd=folder, env=clean, capture_output=True, text=True, check=False)


@pytest.mark.slow
def test_the_wheel_has_all_files_of_the_package(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        packed = set(archive.namelist())
    listed = subprocess.run(["git", "ls-files", "src/thence"], cwd=ROOT, capture_output=True, text=True, check=True)
    missing = {name for name in listed.stdout.split() if (ROOT / name).is_file()} - {f"src/{name}" for name in packed}
    assert not missing
    assert not [name for name in packed if not name.startswith(("thence/", "thence-"))], "nothing else is installed"


@pytest.mark.slow
def test_the_installed_package_is_that_of_the_wheel(installed: Path, tmp_path: Path) -> None:
    said = subprocess.run(
        [str(installed / "python"), "-c", "import thence; print(thence.__file__)"],
        cwd=tmp_path, capture_output=True, text=True, check=True,
        env={name: value for name, value in os.environ.items() if name != "PYTHONPATH"},
    )  # fmt: skip
    assert Path(said.stdout.strip()).is_relative_to(installed.parent)


@pytest.mark.slow
def test_an_installed_thence_trains_evaluates_and_reports(installed: Path, tmp_path: Path) -> None:
    (tmp_path / "recipe.toml").write_text(RECIPE)
    run = thence(installed, tmp_path, "run", "recipe.toml", "--folder", "run")
    assert run.returncode == 0, run.stderr
    assert (tmp_path / "run" / "report.html").stat().st_size > 10_000
    assert thence(installed, tmp_path, "report", "run").returncode == 0
    for command in (["methods"], ["recipes"], ["doctor"], ["--help"], ["audit", "list"]):
        assert thence(installed, tmp_path, *command).returncode == 0, command

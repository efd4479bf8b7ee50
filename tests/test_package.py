"""The project as others get it: a wheel in a fresh environment, used from outside the checkout."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import sysconfig
import venv
import zipfile
from pathlib import Path

import pytest

from tests.machine import give_peaks

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    source = folder / "source"
    tracked = ("ke_gym", "envs", "policies", "pyproject.toml", "README.md", "LICENSE")
    source.mkdir()
    for name in tracked:  # a copy, so that building leaves nothing in the checkout
        if (ROOT / name).is_file():
            shutil.copy(ROOT / name, source)
        else:  # bytecode comes and goes beside other tests
            ignored = shutil.ignore_patterns("__pycache__")
            shutil.copytree(ROOT / name, source / name, symlinks=True, ignore=ignored)
    command = [
        sys.executable,
        "-m",
        "pip",
        "wheel",
        "-q",
        "--no-deps",
        "--no-build-isolation",
        "-w",
        str(folder),
    ]
    subprocess.run([*command, str(source)], check=True)
    (built,) = folder.glob("*.whl")
    return built


def test_the_wheel_holds_what_is_needed_and_nothing_at_top_level(wheel: Path) -> None:
    names = zipfile.ZipFile(wheel).namelist()
    assert {name.split("/")[0] for name in names if "dist-info" not in name} == {"ke_gym"}
    for needed in (
        "ke_gym/py.typed",
        "ke_gym/envs/__init__.py",
        "ke_gym/policies/__init__.py",
        "ke_gym/policies/pretrained/maskable_ppo.json",
        "ke_gym/envs/tables/softmax.npz",
        "ke_gym/languages/include/ke/math.h",
        "ke_gym/targets/peaks.cpp",
        "ke_gym/tasks/library/softmax.py",
        "ke_gym/knowledge/guidance/softmax.md",
    ):
        assert needed in names


def test_an_installed_wheel_evaluates_from_outside_the_checkout(wheel: Path, tmp_path: Path) -> None:
    environment = tmp_path / "environment"
    venv.create(environment, with_pip=False)
    python = str(environment / "bin" / "python")
    install = ["-m", "pip", "--python", python, "install", "-q", "--no-index", "--no-deps", str(wheel)]
    clean = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}  # of the checkout
    subprocess.run([sys.executable, *install], env=clean, check=True)
    # Dependencies come from this environment: a path file adds its folder without its editable installs.
    (packages,) = environment.glob("lib/python*/site-packages")
    (packages / "dependencies.pth").write_text(sysconfig.get_paths()["purelib"] + "\n")
    (tmp_path / "softmax.py").write_text((ROOT / "examples" / "softmax.py").read_text())

    def run(*words: str) -> str:
        environ = {**clean, "KE_GYM_HOME": str(tmp_path / "home")}
        done = subprocess.run(
            [python, *words], cwd=tmp_path, env=environ, capture_output=True, text=True, timeout=900
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    assert str(packages) in run("-c", "import ke_gym, ke_gym.envs, ke_gym.policies; print(ke_gym.__file__)")
    give_peaks(tmp_path / "home")
    script = str(ROOT / "scripts" / "evaluate.py")  # a script's own folder is all it adds to the path
    verdict = json.loads(run(script, "--task", "softmax", "--kernel", "softmax.py", "--json"))
    assert verdict["outcome"] == "correct" and verdict["speedup"] > 0

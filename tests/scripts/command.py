"""The project's scripts as commands: in a process of their own, or in this one, which has torch imported."""

from __future__ import annotations

import contextlib
import io
import os
import runpy
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def command(name: str, *arguments: str, home: Path) -> tuple[list[str], dict[str, str]]:
    """The words and the environment of a process that runs ``scripts/<name>.py``."""
    line = [sys.executable, str(ROOT / "scripts" / f"{name}.py"), *arguments]
    return line, os.environ | {"KE_GYM_HOME": str(home), "PYTHONPATH": str(ROOT), "COLUMNS": "120"}


def in_process(
    name: str, *arguments: str, home: Path, cwd: Path | None = None, **environment: str
) -> subprocess.CompletedProcess[str]:
    """Run a script to its end in a process of its own."""
    line, env = command(name, *arguments, home=home)
    return subprocess.run(
        line, env=env | environment, cwd=cwd or home, capture_output=True, text=True, timeout=900
    )


def here(name: str, *arguments: str, home: Path, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    """The same in this process: the script's ``__main__``, its words, its two streams and its exit code."""
    line, env = command(name, *arguments, home=home)
    out, err, code = io.StringIO(), io.StringIO(), 0
    with (
        pytest.MonkeyPatch.context() as patch,
        contextlib.redirect_stdout(out),
        contextlib.redirect_stderr(err),
    ):
        patch.setenv("KE_GYM_HOME", env["KE_GYM_HOME"])
        patch.setenv("COLUMNS", env["COLUMNS"])
        patch.chdir(cwd or home)
        patch.setattr(sys, "argv", line[1:])
        try:
            runpy.run_path(line[1], run_name="__main__")
        except SystemExit as end:
            code = end.code if isinstance(end.code, int) else int(end.code is not None)
    return subprocess.CompletedProcess(line, code, out.getvalue(), err.getvalue())

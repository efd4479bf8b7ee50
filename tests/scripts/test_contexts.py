"""What the driver makes of contexts: real processes, and a driver that only counts."""

from __future__ import annotations

import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from ke_gym.errors import UserError

DRIVER = r"""
#include <cstdio>
#include <cstdlib>
static int note(const char* what) {
  FILE* log = fopen(getenv("CUDA_HOME"), "a");
  fprintf(log, "%s %s %s\n", what, getenv("CUDA_VISIBLE_DEVICES"), getenv("CUDA_DEVICE_MAX_CONNECTIONS"));
  return fclose(log);
}
extern "C" int cuInit(unsigned) { return note("init"); }
extern "C" int cuDevicePrimaryCtxRetain(void**, int gpu) { return note("make") + BROKEN; }
extern "C" int cuDevicePrimaryCtxRelease_v2(int gpu) { return note("end"); }
"""


@pytest.fixture
def driver(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[int], Path]:
    """Has processes find a driver that answers so; where it notes what it is asked for."""

    def made(answer: int) -> Path:
        (tmp_path / "driver.cpp").write_text(DRIVER.replace("BROKEN", str(answer)))
        subprocess.run(
            ["g++", "-shared", "-fPIC", "-o", tmp_path / "libcuda.so.1", tmp_path / "driver.cpp"], check=True
        )
        monkeypatch.delenv("CUDA_DEVICE_MAX_CONNECTIONS", raising=False)
        monkeypatch.setenv("LD_LIBRARY_PATH", str(tmp_path))
        monkeypatch.setenv("CUDA_HOME", str(tmp_path / "notes"))  # passed on
        return tmp_path / "notes"

    return made


def test_all_are_there_before_one_ends(
    benchmark_module: Callable[[str], Any], driver: Callable[[int], Path]
) -> None:
    notes = driver(0)
    assert benchmark_module("contexts").rate(["4", "7"], 3) > 0
    said = notes.read_text().splitlines()
    made = [line for line in said if line.startswith("make")]
    assert sorted(made) == ["make 4 2"] * 4 + ["make 7 2"] * 4  # one of each holds its GPU open
    assert sorted(said[-6:]) == ["end 4 2"] * 3 + ["end 7 2"] * 3


def test_a_gpu_without_a_context_to_give_is_told(
    benchmark_module: Callable[[str], Any], driver: Callable[[int], Path]
) -> None:
    driver(2)
    with pytest.raises(UserError, match=r"a context could not be made or ended \(2\)"):
        benchmark_module("contexts").rate(["0"], 1)


def test_a_machine_without_a_driver_is_told(
    benchmark_module: Callable[[str], Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "libcuda.so.1").write_text("no library")
    monkeypatch.setenv("LD_LIBRARY_PATH", str(tmp_path))
    with pytest.raises(UserError, match="a context could not be made or ended"):
        benchmark_module("contexts").rate(["0"], 1)

from __future__ import annotations

import functools
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from ke_gym.errors import UserError
from ke_gym.evaluation.evaluator import Evaluator
from ke_gym.evaluation.zygote import Zygote
from ke_gym.languages import cpp
from ke_gym.targets.cpu import Peaks

MEASURE: Any = Evaluator._measure_peaks  # what conftest.py puts fixed numbers in the place of
PEAKS = Peaks(2, ((1 << 18, 1e11), (1 << 29, 1e10)), fp32=1e11, fp64=5e10)


@pytest.mark.parametrize(
    ("dtype", "precision", "matrix_unit", "loose"),
    [
        (torch.float32, "strict", False, False),
        (torch.float64, "strict", False, False),
        (torch.float32, "strict", True, True),
        (torch.float32, "bf16", False, True),
        (torch.bfloat16, "strict", False, True),
        (torch.float16, "strict", False, True),
    ],
)
def test_what_may_be_multiplied_as_bf16_is_not_bounded_by_fp32(
    dtype: torch.dtype, precision: str, matrix_unit: bool, loose: bool
) -> None:
    bounded = PEAKS.bounded_by({dtype, torch.int64}, precision, matrix_unit)
    plain = PEAKS.floor_s(0, 1e9)
    assert (bounded.floor_s(0, 1e9) < plain / 2) == loose
    assert (bounded.floor_s(0, 1e9) == plain) == (not loose)
    assert bounded.floor_s(1e9, 0) == PEAKS.floor_s(1e9, 0)
    assert Peaks.from_json(PEAKS.to_json()) == PEAKS


def only(folder: Path, monkeypatch: pytest.MonkeyPatch, **programs: str) -> None:
    """Let these shell scripts be the only programs there are."""
    for name, script in programs.items():
        (folder / name).write_text(f"#!/bin/sh\n{script}\n")
        (folder / name).chmod(0o755)
    monkeypatch.setenv("PATH", str(folder))
    monkeypatch.setattr(cpp, "compilers", functools.cache(cpp.compilers.__wrapped__))


def test_peaks_are_measured_with_whichever_compiler_there_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = f'PATH={Path(shutil.which("g++") or "").parent}:/usr/bin:/bin exec g++ "$@"'
    only(tmp_path, monkeypatch, **{"g++-13": real})
    with Zygote(1) as zygote:
        peaks = MEASURE(SimpleNamespace(zygote=zygote), 1)
    assert peaks.threads == 1 and min(peaks.fp32, peaks.fp64, *dict(peaks.bandwidth).values()) > 0


def test_a_compiler_that_cannot_measure_says_why(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    only(tmp_path, monkeypatch, **{"g++-13": "echo no such processor >&2; exit 1"})
    with (
        Zygote(1) as zygote,
        pytest.raises(UserError, match=r"(?s)with .*g\+\+-13 failed: .*no such processor"),
    ):
        MEASURE(SimpleNamespace(zygote=zygote), 1)
    (tmp_path / "g++-13").unlink()
    cpp.compilers.cache_clear()
    with pytest.raises(UserError, match="install g"):
        MEASURE(SimpleNamespace(), 1)

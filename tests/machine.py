"""What tests say of this machine instead of measuring it, and what they need of it."""

from __future__ import annotations

import os
import sysconfig
from dataclasses import replace
from pathlib import Path

import pytest

from ke_gym.evaluation.record import MachineRecord
from ke_gym.targets import cpu

# Beyond what any processor of today does, so that no honest kernel is too fast to be true.
PEAKS = cpu.Peaks(1, ((1 << 18, 4e12), (1 << 29, 1e12)), 2e13, 1e13)

PYTHON_HEADERS = pytest.mark.skipif(
    not Path(sysconfig.get_path("include"), "Python.h").exists(), reason="Python's headers are not installed"
)


def give_peaks(home: Path) -> None:
    """Put them into another process's ``KE_GYM_HOME``, for any number of threads."""
    record = MachineRecord(cpu.facts().fingerprint, home)
    for threads in range(1, len(os.sched_getaffinity(0)) + 1):
        (record.folder / f"peaks-{threads}.json").write_text(replace(PEAKS, threads=threads).to_json())

"""What is measured of this machine once for all tests, rather than by each that begins with an empty home."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from ke_gym.evaluation.evaluator import Evaluator
from ke_gym.evaluation.record import MachineRecord
from ke_gym.files import write_whole
from ke_gym.targets import cpu


def share_peaks(patch: pytest.MonkeyPatch, folder: Path) -> None:
    """Evaluators of this process take the machine's peaks from ``folder``, or measure them for the others.

    One that finds a kernel too fast for them measures again, as always.
    """
    measure = Evaluator._measure_peaks

    def shared(self: Evaluator, threads: int) -> cpu.Peaks:
        path = folder / f"peaks-{threads}.json"
        if path.exists() and not hasattr(self, "peaks"):
            return cpu.Peaks.from_json(path.read_text())
        peaks = measure(self, threads)
        write_whole(path, peaks.to_json().encode())
        return peaks

    patch.setattr(Evaluator, "_measure_peaks", shared)


def give_peaks(folder: Path, home: Path) -> None:
    """Put what was measured into another process's ``KE_GYM_HOME``."""
    record = MachineRecord(cpu.facts().fingerprint, home)
    for path in folder.glob("peaks-*.json"):
        shutil.copy(path, record.folder)

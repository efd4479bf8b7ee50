"""What evaluators on GPUs share and keep: cores and device, peaks, processes, and what these see of the machine."""

from __future__ import annotations

import atexit
import functools
import json
import os
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ke_gym.evaluation.builds import Cores
from ke_gym.evaluation.zygote import Zygote
from ke_gym.files import write_whole
from ke_gym.languages import device
from ke_gym.targets import cuda

CONNECTIONS = "CUDA_DEVICE_MAX_CONNECTIONS"
FEW_CONNECTIONS = "2"
"""A process's queues to its device; 8 unless told, which take most of the quarter of a second that the driver needs to
make and end a context, one after another for all GPUs of a machine. Work on two streams goes side by side as ever."""
PASSED_ON = (
    "LD_LIBRARY_PATH", "CUDA_VISIBLE_DEVICES", "CUDA_DEVICE_ORDER", "CUDA_HOME", "CUDA_PATH", CONNECTIONS,
)  # fmt: skip
"""Variables that tell which GPU is meant, where driver and toolkit are, and what a user's module runs with: workers keep them."""


class Lanes(Cores):
    """Builds have the processor's cores but one; whoever holds ``all`` is the one whom an evaluator judges. They go on
    side by side.

    Other evaluators' candidates may be judged on the same device meanwhile: see ``DeviceLock``.

    ``beside``: the lanes of another GPU, whose cores builds share.
    """

    def __init__(self, cores: int, beside: Lanes | None = None) -> None:
        super().__init__(max(1, cores - 1))
        self._judging = threading.Lock()
        self._pool = beside or self

    @contextmanager
    def all(self) -> Iterator[None]:
        with self._judging, self._pool.occupied():
            yield

    @contextmanager
    def occupied(self) -> Iterator[None]:
        """One core is not for builds: it holds the clock of a race."""
        with self._counted(lambda: True):
            yield


def kept_peaks(folder: Path, measure: Callable[[], dict[str, Any]], again: bool = False) -> cuda.Peaks:
    """The device's kept peaks, measured now if there are none; ``again`` keeps the better of both."""
    path = folder / "peaks-cuda.json"
    kept = cuda.Peaks.from_dict(json.loads(path.read_text())) if path.exists() else None
    if kept is not None and not again:
        return kept
    peaks = cuda.Peaks.from_dict(measure())
    if kept is not None:
        peaks = peaks.best(kept)
    write_whole(path, json.dumps(peaks.to_dict()).encode())
    return peaks


@functools.cache
def kept_zygote(threads: int, environment: tuple[tuple[str, str], ...]) -> Zygote:
    """A zygote that all evaluators of this process share, one after the other: a warm one saves seconds. It ends with
    this process."""
    zygote = Zygote(threads, dict(environment))
    atexit.register(zygote.close)
    return zygote


def gpu_environment(folder: Path) -> dict[str, str]:
    """What workers for a GPU have in their environment besides the usual."""
    caches = {"TORCHINDUCTOR_CACHE_DIR": folder / "inductor", "TRITON_CACHE_DIR": folder / "triton"}
    passed = {name: os.environ[name] for name in PASSED_ON if name in os.environ}
    return {
        CONNECTIONS: FEW_CONNECTIONS,
        **passed,
        **{k: str(path) for k, path in caches.items()},
        "HOME": "/tmp",
    }


def arch_of(facts: cuda.Facts) -> str:
    """What kernels for this device are compiled for: the architecture with its own instructions.

    Raises ``UserError`` for one that kernels are not built for.
    """
    number = int(facts.arch.removeprefix("sm_"))
    return device.arch_of((number // 10, number % 10)).name

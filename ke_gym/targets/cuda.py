"""NVIDIA GPUs as targets: facts, and peaks measured once per device and kept.

Both are found in a worker process, so that the parent never touches CUDA.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Any

import torch

from ke_gym.targets.cuda_driver import Clocks, Driver, runtime

VISIBLE = "CUDA_VISIBLE_DEVICES"
FOOTPRINTS = tuple(1 << p for p in range(20, 32))
MATRIX = 8192
SLACK = 0.9
ALIKE_MEMORY = 0.05
"""GPUs of one kind differ by a few pages that were found faulty; slices of one differ by more than this share."""
_MATRIX_RUNS = 12


@dataclass(frozen=True)
class Facts:
    """What is known of one GPU without measuring: names, counts, sizes (bytes).

    ``cores`` are multiprocessors, ``l1_bytes`` the shared memory of one, ``vector_bits`` the width of a warp's
    fp32 instruction. ``uuid`` is the device's own, ``driver`` the newest CUDA its driver knows (13000: 13.0).
    ``reads_host``: kernels can reach the memory of this process (HMM, ATS).
    """

    model: str
    arch: str
    cores: int
    l1_bytes: int
    l2_bytes: int
    memory_bytes: int
    shared_bytes: int
    driver: int
    reads_host: bool
    uuid: str
    clock_mhz: int
    torch: str = torch.__version__
    l3_bytes: int = 0
    vector_bits: int = 1024
    matrix_unit: bool = True

    @property
    def fingerprint(self) -> str:
        """Identifies the device in records: verdicts carry over between devices, times do not."""
        return "cuda-" + hashlib.sha256(json.dumps(asdict(self)).encode()).hexdigest()[:12]

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True)
class Peaks:
    """Measured ceilings: bytes/s by footprint (bytes), FLOP/s by kind of arithmetic, seconds per tiny launch.

    ``ceiling`` names the kind that bounds a task's FLOPs: see ``bounded_by``.
    """

    bandwidth: tuple[tuple[int, float], ...]
    fp32: float
    fp64: float
    tf32: float
    fp16: float
    bf16: float
    launch_s: float
    ceiling: str = "tf32"

    def bytes_per_s(self, footprint: float) -> float:
        """The best rate at this footprint or any larger one."""
        position = math.log2(max(footprint, 1.0))
        best = max((rate for size, rate in self.bandwidth if math.log2(size) >= position - 0.5), default=0.0)
        return best or self.bandwidth[-1][1]

    @property
    def flops(self) -> float:
        """The FLOP/s that bound the task."""
        return max(self.fp32, float(getattr(self, self.ceiling)))

    def bounded_by(self, dtypes: set[torch.dtype], precision: str) -> Peaks:
        """These peaks for a task on such tensors.

        Products of fp32 data may go through TF32 units in several passes, so even a strict task is bounded
        by their rate only; fp64 by that of its own; half precision, or permission for it, by that.
        """
        half = {torch.float16, torch.bfloat16}
        if dtypes & half or precision == "bf16":
            return replace(self, ceiling="bf16" if self.bf16 >= self.fp16 else "fp16")
        return replace(self, ceiling="fp64" if dtypes == {torch.float64} else "tf32")

    def floor_s(self, bytes_moved: float, flops: float) -> float:
        """Seconds below which a time is impossible, with a tenth of slack for the measurement."""
        return SLACK * max(bytes_moved / self.bytes_per_s(bytes_moved), flops / self.flops)

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> Peaks:
        return cls(**{**data, "bandwidth": tuple((int(s), float(r)) for s, r in data["bandwidth"])})

    def best(self, other: Peaks) -> Peaks:
        """The higher of both ceilings, each: a busy or throttled device measures low."""
        known = dict(other.bandwidth)
        rates = tuple((s, max(r, known.get(s, 0.0))) for s, r in self.bandwidth)
        kinds = ("fp32", "fp64", "tf32", "fp16", "bf16")
        higher = {kind: max(getattr(self, kind), getattr(other, kind)) for kind in kinds}
        return replace(self, bandwidth=rates, launch_s=min(self.launch_s, other.launch_s), **higher)


def facts(device: int = 0) -> Facts:
    """Facts of one GPU. Initializes CUDA: for worker processes only."""
    driver = Driver()
    known = runtime.get_device_properties(device)
    return Facts(
        model=known.name,
        arch=f"sm_{known.major}{known.minor}",
        cores=known.multi_processor_count,
        l1_bytes=known.shared_memory_per_multiprocessor,
        l2_bytes=known.L2_cache_size,
        memory_bytes=known.total_memory,
        shared_bytes=known.shared_memory_per_block_optin,
        driver=driver.version(),
        reads_host=driver.reads_host_memory(device),
        uuid=str(known.uuid),
        clock_mhz=Clocks(str(known.uuid)).most_mhz(),
    )


def show_only(device: int) -> None:
    """Let this process see one GPU alone, as number 0: starting CUDA takes longer the more it sees. Before it starts."""
    shown = [name for name in os.environ.get(VISIBLE, "").split(",") if name]
    os.environ[VISIBLE] = shown[device] if device < len(shown) else str(device)


def alike(known: Facts) -> list[int]:
    """The numbers of the GPUs that CUDA shows whose model, architecture and size are this one's. For workers only."""
    shown = [runtime.get_device_properties(number) for number in range(runtime.device_count())]
    wanted = known.model, known.arch, known.cores
    return [
        number
        for number, one in enumerate(shown)
        if (one.name, f"sm_{one.major}{one.minor}", one.multi_processor_count) == wanted
        and abs(one.total_memory - known.memory_bytes) <= ALIKE_MEMORY * known.memory_bytes
    ]


def measure(device: int = 0) -> Peaks:
    """Measure the peaks of one GPU in this process: a few seconds, and up to 4 GiB of its memory."""
    place = torch.device("cuda", device)
    free = torch.cuda.mem_get_info(device)[0]
    footprints = [f for f in FOOTPRINTS if f <= free // 2] or [FOOTPRINTS[0]]
    a = torch.randn(footprints[-1] // 8, device=place)
    b = torch.randn_like(a)
    bandwidth = []
    for footprint in footprints:
        n = footprint // 8
        x, y = a[:n], b[:n]
        flat = torch.cat([x, y]) if footprint <= free // 4 else x
        runs: list[tuple[float, Callable[[], object]]] = [
            (8.0 * n, partial(y.copy_, x)),
            (4.0 * flat.numel(), partial(torch.amax, flat)),
            (4.0 * n, partial(y.fill_, 1.0)),
        ]
        bandwidth.append((footprint, max(moved / best(run, 20) for moved, run in runs)))
    del a, b, x, y, flat, runs
    size = MATRIX if free > 4 << 30 else MATRIX // 4
    kinds = {"fp32": (torch.float32, False), "tf32": (torch.float32, True), "fp16": (torch.float16, False),
             "bf16": (torch.bfloat16, False), "fp64": (torch.float64, False)}  # fmt: skip
    rates = {}
    before = torch.backends.cuda.matmul.allow_tf32
    for name, (dtype, relaxed) in kinds.items():
        torch.backends.cuda.matmul.allow_tf32 = relaxed
        left, right = (torch.randn(size, size, device=place).to(dtype) for _ in range(2))
        out = torch.empty_like(left)
        rates[name] = 2.0 * size**3 / best(partial(torch.mm, left, right, out=out), _MATRIX_RUNS)
    torch.backends.cuda.matmul.allow_tf32 = before
    one = torch.zeros(1, device=place)
    launch_s = best(lambda: [one.add_(1) for _ in range(200)], 5) / 200
    return Peaks.from_dict({"bandwidth": bandwidth, "launch_s": launch_s, **rates})


def best(run: Callable[[], object], times: int) -> float:
    """Seconds of the fastest of ``times`` runs by device events: a ceiling is what was reached once."""
    for _ in range(3):
        run()
    marks = [runtime.Event(enable_timing=True) for _ in range(times + 1)]
    runtime._sleep(2_000_000)  # everything is in line before the first begins
    marks[0].record()
    for mark in marks[1:]:
        run()
        mark.record()
    runtime.synchronize()
    return float(min(before.elapsed_time(after) for before, after in zip(marks, marks[1:]))) / 1e3

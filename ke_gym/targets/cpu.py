"""The CPU as a target: facts, and peaks measured once per machine and kept.

Peaks bound what is physically possible (nothing is faster than its bytes over the bandwidth or its FLOPs over
the FMA rate), so they are measured, never read off a data sheet.
"""

from __future__ import annotations

import ctypes
import hashlib
import json
import math
import os
import platform
import subprocess
import tempfile
import time
from dataclasses import asdict, dataclass, replace
from functools import lru_cache, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from ke_gym.evaluation.channel import Channel

FOOTPRINTS = tuple(1 << p for p in range(18, 30))
FLAGS = ("-O3", "-march=native", "-fopenmp", "-shared", "-fPIC", "-ffast-math", "-std=c++17")
SLACK = 0.9
BF16_TIMES = 16.0
"""How many times the fp32 FMA rate a core may multiply bf16 at, at the most (AMX; AVX512-BF16 does twice)."""


@dataclass(frozen=True)
class Facts:
    """What is known of the machine without measuring: names, counts, cache sizes (bytes), vector width (bits)."""

    model: str
    arch: str
    cores: int
    l1_bytes: int
    l2_bytes: int
    l3_bytes: int
    vector_bits: int
    matrix_unit: bool

    @property
    def fingerprint(self) -> str:
        """Identifies the machine in records: verdicts carry over between machines, times do not."""
        identity = json.dumps([asdict(self), _machine_id(), torch.__version__])
        return "cpu-" + hashlib.sha256(identity.encode()).hexdigest()[:12]


@dataclass(frozen=True)
class Peaks:
    """Measured ceilings with ``threads`` threads: bytes/s by footprint (bytes), FLOP/s of fp32 and fp64 FMA.

    ``times`` is how many times the fp32 rate a task's products may honestly reach: see ``bounded_by``.
    """

    threads: int
    bandwidth: tuple[tuple[int, float], ...]
    fp32: float
    fp64: float
    times: float = 1.0

    def bytes_per_s(self, footprint: float) -> float:
        """The best rate at this footprint or any larger one (a larger footprint can't be faster)."""
        position = math.log2(max(footprint, 1.0))
        best = max((rate for size, rate in self.bandwidth if math.log2(size) >= position - 0.5), default=0.0)
        return best or self.bandwidth[-1][1]

    @property
    def flops(self) -> float:
        """The measured FLOP/s that a task's are compared with."""
        return self.fp32

    def bounded_by(self, dtypes: set[torch.dtype], precision: str, matrix_unit: bool) -> Peaks:
        """These peaks for a task on such tensors: what may be multiplied as bf16 is not bounded by fp32 FMA.

        With a matrix unit that is everything: an fp32 product can be taken as a few of bf16.
        """
        half = bool(dtypes & {torch.float16, torch.bfloat16}) or precision == "bf16"
        return replace(self, times=BF16_TIMES if half or matrix_unit else 1.0)

    def floor_s(self, bytes_moved: float, flops: float) -> float:
        """Seconds below which a time is impossible, with a tenth of slack for the measurement."""
        return SLACK * max(bytes_moved / self.bytes_per_s(bytes_moved), flops / (self.times * self.fp32))

    def to_json(self) -> str:
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> Peaks:
        data = json.loads(text)
        return cls(data["threads"], tuple((s, r) for s, r in data["bandwidth"]), data["fp32"], data["fp64"])


def _machine_id() -> str:
    try:
        return Path("/etc/machine-id").read_text().strip()
    except OSError:
        return platform.node()


def _cache_bytes(level: int) -> int:
    """Size of the data (or unified) cache of this level as Linux reports it; 0 where it does not."""
    for index in sorted(Path("/sys/devices/system/cpu/cpu0/cache").glob("index*")):
        try:
            if (
                int((index / "level").read_text()) == level
                and (index / "type").read_text().strip() != "Instruction"
            ):
                return int((index / "size").read_text().strip().removesuffix("K")) << 10
        except (OSError, ValueError):
            continue
    return 0


@lru_cache(maxsize=1)
def facts() -> Facts:
    """Facts of this machine (Linux: /proc/cpuinfo; elsewhere what Python knows)."""
    model, flags = platform.processor() or platform.machine(), ""
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            key, _, value = line.partition(":")
            if key.strip() == "model name":
                model = value.strip()
            elif key.strip() in ("flags", "Features"):
                flags = value
                break
    except OSError:
        pass
    words = set(flags.split())
    bits = 512 if "avx512f" in words else 256 if "avx2" in words else 128
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    matrix = "amx_bf16" in words
    l1, l2, l3 = (_cache_bytes(level) for level in (1, 2, 3))
    return Facts(model, platform.machine(), cores, l1, l2, l3, bits, matrix)


def measure(threads: int, compiler: str = "g++") -> Peaks:
    """Measure the peaks in this process: about two seconds, most of it a STREAM-like sweep over footprints.

    ``compiler``: the name or path of one that takes GCC's flags.
    """
    with tempfile.TemporaryDirectory() as folder:
        library = f"{folder}/peaks.so"
        source = Path(__file__).with_name("peaks.cpp")
        subprocess.run([compiler, *FLAGS, str(source), "-o", library], check=True)
        lib = ctypes.CDLL(library)
    lib.peak_read.restype = ctypes.c_float
    lib.peak_fma_float.restype = ctypes.c_float
    lib.peak_fma_double.restype = ctypes.c_double
    torch.set_num_threads(threads)
    largest = FOOTPRINTS[-1]
    x, y, z = (torch.ones(largest // 4) for _ in range(3))
    p = [ctypes.c_void_p(t.data_ptr()) for t in (x, y, z)]
    bandwidth = []
    for footprint in FOOTPRINTS:
        rates = []
        for streams, name in ((1, "peak_read"), (2, "peak_copy"), (3, "peak_triad")):
            n = footprint // (4 * streams)
            arguments = {1: (p[0],), 2: (p[0], p[1]), 3: (p[0], p[2], p[1])}[streams]
            run = partial(getattr(lib, name), *arguments, ctypes.c_int64(n))
            rates.append(streams * 4 * n / _best(run, 0.03))
        bandwidth.append((footprint, max(rates)))
    iterations = 200_000
    rate = {}
    for name, lanes in (("peak_fma_float", 16), ("peak_fma_double", 8)):
        run = partial(getattr(lib, name), ctypes.c_int64(iterations), ctypes.c_int64(threads))
        rate[name] = 2 * 24 * lanes * iterations * threads / _best(run, 0.15)
    return Peaks(threads, tuple(bandwidth), rate["peak_fma_float"], rate["peak_fma_double"])


def _best(run: Any, seconds: float) -> float:
    """The fastest of repeated runs: a ceiling is what was reached once."""
    run()
    best, end = math.inf, time.perf_counter() + seconds
    while time.perf_counter() < end or best is math.inf:
        start = time.perf_counter()
        run()
        best = min(best, time.perf_counter() - start)
    return best


def measure_worker(channel: Channel, args: dict[str, Any], fds: list[int]) -> None:
    """Entry for a trusted worker: measuring would leave OpenMP threads behind in the parent."""
    channel.send(json.loads(measure(args["threads"], args["compiler"]).to_json()))

"""``Evaluation``: everything known about one candidate after it was judged."""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Literal

Outcome = Literal["correct", "compile", "constraints", "correctness", "runtime", "timeout"]
OUTCOMES: tuple[Outcome, ...] = ("correct", "compile", "constraints", "correctness", "runtime", "timeout")

# Bumped whenever a change could alter a verdict or a time: recorded evaluations of other versions are not reused.
HARNESS_VERSION = 4
COMPARABLE = 2
"""The oldest version whose replay tables tell what this one would: 3 takes rounding for what it is on inputs that are all
equal, which 2 refused in one check of a hundred at the most, and counts no copy behind a plan's last library call; 4
decides close calls of few elements by more contents, and takes outputs that are nothing but rounding for that."""

# What speedups can be against: PyTorch as it is, or one of torch.compile's modes.
COMPILE_MODES = {"compile": "default", "max-autotune": "max-autotune"}
BASELINES = ("eager", *COMPILE_MODES)


@dataclass(frozen=True)
class Errors:
    """Worst errors over all checks: against the fp64 oracle, and as a ratio to the reference's own error."""

    max_abs: float
    rel_l2: float
    ratio: float

    def or_worse(self, other: Errors) -> Errors:
        """The larger of each."""
        return Errors(
            max(self.max_abs, other.max_abs), max(self.rel_l2, other.rel_l2), max(self.ratio, other.ratio)
        )


@dataclass(frozen=True)
class Cost:
    """Seconds spent on one evaluation."""

    compile_s: float = 0.0
    check_s: float = 0.0
    race_s: float = 0.0

    @property
    def total(self) -> float:
        return self.compile_s + self.check_s + self.race_s


@dataclass(frozen=True)
class Profile:
    """Where the time goes: bytes and FLOPs counted from the graph, rates as shares of the measured peaks.

    ``flops``, ``gflops_per_s`` and ``arithmetic_share`` count elementwise operators and reductions too, at one
    per element; ``flops_share`` counts products only, which is what a peak of FMA units can be held against.
    ``counters`` are a GPU's own, of best kernels only: names of ``gpu_tools.METRICS``, weighted by the kernels' times.
    ``registers`` a thread, and ``occupancy``, the share of a multiprocessor's warps that can be resident, are those of
    the GPU kernel that takes longest, read from its binary.
    """

    bytes: float = 0.0
    flops: float = 0.0
    gbytes_per_s: float = 0.0
    gflops_per_s: float = 0.0
    bandwidth_share: float = 0.0
    flops_share: float = 0.0
    arithmetic_share: float = 0.0
    floor_ms: float = 0.0
    vectorized: tuple[str, ...] = ()
    missed: tuple[str, ...] = ()
    steps: tuple[tuple[str, float], ...] = ()
    resources: tuple[str, ...] = ()
    counters: tuple[tuple[str, float], ...] = ()
    registers: int = 0
    occupancy: float = 0.0


@dataclass(frozen=True)
class Evaluation:
    """The verdict on one candidate.

    Times are milliseconds (medians by the parent's clock); ``speedup`` is baseline time over candidate time
    with a 95 % interval, always against ``baseline``; ``gain`` is rival time over candidate time, where the
    rival is the incumbent it raced (the baseline itself if there was none). ``improved`` says that the gain's
    interval, from fresh processes and new seeds, cleared the machine's margin. ``trust`` is ``"plan"``, or
    ``"host"`` for a module whose Python ran. Times and speedups are None where none was measured.

    ``preparation_ms`` is what the candidate's declared preparation takes, once for given weights and not in
    ``time_ms``; None if it has none. ``times_ms`` and ``reference_times_ms`` are what every round took, in pairs;
    ``races`` says how many rounds belong to each of the races they come from. ``rival`` is the id of the incumbent
    it raced ("": none).
    """

    task: str
    target: str
    language: str
    candidate: str
    outcome: Outcome
    trust: str = "plan"
    log: str = ""
    error: Errors | None = None
    time_ms: float | None = None
    reference_ms: float | None = None
    speedup: float | None = None
    speedup_ci: tuple[float, float] | None = None
    baseline: str = "eager"
    gain: float | None = None
    gain_ci: tuple[float, float] | None = None
    improved: bool = False
    confirmed: bool = False
    rounds: int = 0
    preparation_ms: float | None = None
    kernel_coverage: float | None = None
    limiter: str = ""
    profile: Profile = field(default_factory=Profile)
    shapes: dict[str, float] = field(default_factory=dict)
    times_ms: tuple[float, ...] = ()
    reference_times_ms: tuple[float, ...] = ()
    races: tuple[int, ...] = ()
    rival: str = ""
    binary: str = ""
    threads: int = 1
    machine: str = ""
    sandbox: str = ""
    cost: Cost = field(default_factory=Cost)
    harness: int = HARNESS_VERSION

    @property
    def correct(self) -> bool:
        return self.outcome == "correct"

    @property
    def log_speedup(self) -> float:
        """Natural log of the speedup; 0 where nothing was measured."""
        return math.log(self.speedup) if self.speedup else 0.0

    def replace(self, **changes: Any) -> Evaluation:
        return replace(self, **changes)

    def alone(self) -> Evaluation:
        """What it says of the candidate itself: no gain over a rival that another search raced it against."""
        return replace(self, gain=None, gain_ci=None, improved=False)

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    def to_json(self) -> str:
        return json.dumps(_finite(self.to_dict()))

    @classmethod
    def from_json(cls, text: str) -> Evaluation:
        data = json.loads(text)
        if data["error"]:  # null was NaN: as wrong as can be
            data["error"] = Errors(**{k: math.inf if v is None else v for k, v in data["error"].items()})
        profile = data["profile"]
        profile["vectorized"], profile["missed"] = tuple(profile["vectorized"]), tuple(profile["missed"])
        profile["resources"] = tuple(profile.get("resources", ()))
        profile["counters"] = tuple((name, value) for name, value in profile.get("counters", ()))
        profile["steps"] = tuple((name, seconds) for name, seconds in profile["steps"])
        data["profile"] = Profile(**profile)
        data["cost"] = Cost(**data["cost"])
        for key in ("speedup_ci", "gain_ci"):
            data[key] = tuple(data[key]) if data[key] else None
        for key in ("times_ms", "reference_times_ms", "races"):
            data[key] = tuple(data.get(key, ()))
        return cls(**data)


def _finite(value: Any) -> Any:
    """JSON has no infinities: they become null inside intervals' ends and errors."""
    if isinstance(value, float) and not math.isfinite(value):
        return None if math.isnan(value) else math.copysign(1e308, value)
    if isinstance(value, dict):
        return {k: _finite(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(v) for v in value]
    return value

"""Where a GPU kernel's time goes: rates against measured peaks, and what each kernel takes of the device."""

from __future__ import annotations

from typing import Any

from ke_gym.evaluation.evaluation import Profile
from ke_gym.evaluation.work import Work
from ke_gym.targets.cuda import Facts, Peaks

_WARP = 32
_WARPS = 64
_LATENCY_S = 8e-6


def described(
    work: Work, peaks: Peaks, facts: Facts, seconds: float, floor_s: float, answer: dict[str, Any]
) -> Profile:
    """The profile from the judge's measurements."""
    rate, flops = work.bytes / seconds, work.arithmetic / seconds
    return Profile(
        bytes=work.bytes,
        flops=work.arithmetic,
        gbytes_per_s=rate / 1e9,
        gflops_per_s=flops / 1e9,
        bandwidth_share=rate / peaks.bytes_per_s(max(work.bytes, 4.0 * facts.l2_bytes)),
        flops_share=work.flops / seconds / peaks.flops,
        arithmetic_share=flops / peaks.flops,
        floor_ms=1e3 * floor_s,
        resources=tuple(_sentence(name, taken) for name, taken in answer["resources"].items()),
        steps=tuple((name, seconds) for name, seconds in answer["steps"]),
    )


def _sentence(kernel: str, taken: dict[str, int]) -> str:
    warps = -(-taken["threads"] // _WARP) * taken["blocks"]
    shared = taken["shared"] + taken["dynamic"]
    spilled = f", {taken['local']} bytes of local memory per thread (spills)" if taken["local"] else ""
    return (
        f"{kernel}: {taken['registers']} registers, {shared} bytes of shared memory, "
        f"occupancy {100 * warps / _WARPS:.0f} %{spilled}"
    )


def limiter(profile: Profile, facts: Facts, seconds: float) -> str:
    """What holds the kernel back: memory, arithmetic, launches, or instructions and waiting."""
    launches = len(profile.steps)
    if seconds < _LATENCY_S * max(1, launches):
        return "latency" if launches < 2 else "launches"
    if profile.flops_share >= max(0.4, profile.bandwidth_share):
        return "compute"
    if profile.bandwidth_share >= 0.5:
        return "dram" if profile.bytes > facts.l2_bytes else "l2"
    return "instructions"

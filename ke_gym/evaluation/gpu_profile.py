"""Where a GPU kernel's time goes: rates against measured peaks, and what each kernel takes of the device."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ke_gym.evaluation.evaluation import Profile
from ke_gym.evaluation.gpu_setting import arch_of
from ke_gym.evaluation.work import Work
from ke_gym.languages.device import get_arch
from ke_gym.targets.cuda import Facts, Peaks

_WARP = 32
_LATENCY_S = 8e-6
BUSY = 60.0
"""Percent of its peak from which on a unit counts as what holds a kernel back (as in NVIDIA's own rules)."""
FEW_WARPS = 30.0


def described(
    work: Work, peaks: Peaks, facts: Facts, seconds: float, floor_s: float, answer: dict[str, Any]
) -> Profile:
    """The profile from the judge's measurements."""
    rate, flops = work.bytes / seconds, work.arithmetic / seconds
    resources: dict[str, dict[str, int]] = answer["resources"]
    longest = max(
        answer["steps"], key=lambda step: step[1] if step[0] in resources else -1.0, default=("", 0.0)
    )
    taken = resources.get(longest[0])
    return Profile(
        bytes=work.bytes,
        flops=work.arithmetic,
        gbytes_per_s=rate / 1e9,
        gflops_per_s=flops / 1e9,
        bandwidth_share=rate / peaks.bytes_per_s(max(work.bytes, 4.0 * facts.l2_bytes)),
        flops_share=work.flops / seconds / peaks.flops,
        arithmetic_share=flops / peaks.flops,
        floor_ms=1e3 * floor_s,
        resources=tuple(_sentence(name, each, facts) for name, each in resources.items()),
        steps=tuple((name, seconds) for name, seconds in answer["steps"]),
        registers=taken["registers"] if taken else 0,
        occupancy=_occupancy(taken, facts) if taken else 0.0,
    )


def _sentence(kernel: str, taken: dict[str, int], facts: Facts) -> str:
    shared = taken["shared"] + taken["dynamic"]
    spilled = f", {taken['local']} bytes of local memory per thread (spills)" if taken["local"] else ""
    return (
        f"{kernel}: {taken['registers']} registers, {shared} bytes of shared memory, "
        f"occupancy {100 * _occupancy(taken, facts):.0f} %{spilled}"
    )


def _occupancy(taken: dict[str, int], facts: Facts) -> float:
    """The share of a multiprocessor's warps that a kernel's blocks, as many as fit, make."""
    return -(-taken["threads"] // _WARP) * taken["blocks"] / get_arch(arch_of(facts)).warps


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


def counted(counters: Mapping[str, Mapping[str, float]]) -> tuple[tuple[str, float], ...]:
    """A plan's counters from its kernels': times and bytes added up, the rest weighted by time."""
    total: dict[str, float] = {}
    time = sum(kernel.get("time_ns", 0.0) for kernel in counters.values()) or 1.0
    for kernel in counters.values():
        share = kernel.get("time_ns", 0.0) / time
        for name, value in kernel.items():
            weight = 1.0 if name in ("time_ns", "dram_bytes") else share
            total[name] = total.get(name, 0.0) + weight * value
    return tuple((name, round(value, 3)) for name, value in total.items())


def limiter_by_counters(profile: Profile, guessed: str) -> str:
    """What holds the kernel back by the device's counters; ``guessed`` where they leave it open.

    The unit nearest to its peak, DRAM before L2, through which all its traffic goes; if none is near, few resident
    warps that wait for memory.
    """
    seen = dict(profile.counters)
    if not seen or guessed in ("latency", "launches"):
        return guessed
    units = {
        "dram": seen.get("dram", 0.0),
        "compute": max(seen.get("tensor", 0.0), seen.get("fma", 0.0)),
        "l2": seen.get("l2", 0.0),
        "l1": seen.get("l1", 0.0),
        "instructions": seen.get("issue", 0.0),
    }
    if units["dram"] >= BUSY:
        del units["l2"]
    nearest = max(units, key=lambda unit: units[unit])
    if units[nearest] >= BUSY:
        return nearest
    waiting = seen.get("stall_memory", 0.0) > max(
        seen.get("stall_shared", 0.0), seen.get("stall_barrier", 0.0)
    )
    return "occupancy" if waiting and seen.get("warps", 100.0) < FEW_WARPS else guessed

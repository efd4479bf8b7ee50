"""Where a kernel's time goes, in the few numbers and words that help whoever writes the next version."""

from __future__ import annotations

from collections.abc import Sequence

from ke_gym.evaluation.evaluation import Evaluation, Profile
from ke_gym.evaluation.work import Work
from ke_gym.languages.artifact import Artifact
from ke_gym.targets.cpu import Facts, Peaks

FEEDBACK_LINES = 40
_REMARKS = 12


def profile(
    artifact: Artifact,
    work: Work,
    peaks: Peaks,
    seconds: float,
    floor_s: float,
    steps: Sequence[tuple[str, str, float]],
) -> Profile:
    """Rates achieved in ``seconds`` and the compiler's vectorization remarks; ``steps`` are (kind, name, s)."""
    rate, flops = work.bytes / seconds, work.arithmetic / seconds
    remarks = artifact.report.get("vectorization", [])
    done = tuple(f"line {r['line']}: {r['message']}" for r in remarks if r["width"])
    missed = tuple(f"line {r['line']}: {r['message']}" for r in remarks if not r["width"])
    return Profile(
        bytes=work.bytes,
        flops=work.arithmetic,
        gbytes_per_s=rate / 1e9,
        gflops_per_s=flops / 1e9,
        bandwidth_share=rate / peaks.bytes_per_s(work.bytes),
        flops_share=work.flops / seconds / peaks.fp32,
        arithmetic_share=flops / peaks.fp32,
        floor_ms=1e3 * floor_s,
        vectorized=done[:_REMARKS],
        missed=missed[:_REMARKS],
        steps=tuple((name, s) for _, name, s in steps),
    )


def limiter(described: Profile, facts: Facts, seconds: float) -> str:
    """What holds the kernel back: a level of memory, arithmetic, launch overhead, or instructions."""
    if seconds < 2e-5:
        return "latency"
    if described.flops_share >= max(0.4, described.bandwidth_share):
        return "compute"
    if described.bandwidth_share >= 0.4:
        if described.bytes > facts.l3_bytes > 0:
            return "dram"
        return "l3" if described.bytes > facts.cores * facts.l2_bytes else "l2"
    return "instructions"


_HINTS = {
    "latency": "The whole call takes microseconds: fewer launches and no parallel region may help.",
    "compute": "Arithmetic is near its peak: only fewer or cheaper operations can help.",
    "dram": "Main memory is near its peak: only moving fewer bytes can help (fuse, stream, smaller types).",
    "l3": "The last-level cache is near its peak: block so that data stays in L2, or move fewer bytes.",
    "l2": "The L2 cache is near its peak: keep more in registers and L1.",
    "instructions": "Neither memory nor FMA units are busy: look at vectorization, dependency chains, "
    "strided access, or threads that wait.",
}


_GPU_HINTS = {
    "latency": "The whole call takes microseconds: only less work before the first load and after the last can help.",
    "launches": "Several kernels of microseconds each: fuse them, or let fewer do the work.",
    "compute": "Arithmetic is near its peak: only fewer or cheaper operations can help.",
    "dram": "Device memory is near its peak: only moving fewer bytes can help (fuse, one pass, smaller types).",
    "l2": "The data fits into L2 and moves near its peak: reuse it from registers or shared memory.",
    "l1": "Shared memory or L1 is near its peak: wider accesses, fewer bank conflicts, more reuse from registers.",
    "occupancy": "Few warps are resident and wait for memory: fewer registers or less shared memory per block, "
    "more loads in flight per thread.",
    "instructions": "Far from both peaks: look at vector width, loads in flight, occupancy, spills, bank conflicts.",
}


_COUNTERS = {
    "dram": "DRAM {:.0f} % of peak",
    "l2": "L2 {:.0f} %",
    "l1": "L1 and shared memory {:.0f} %",
    "tensor": "tensor cores {:.0f} %",
    "fma": "FMA units {:.0f} %",
    "issue": "issue slots {:.0f} %",
    "warps": "resident warps {:.0f} %",
    "l2_hits": "L2 hits {:.0f} %",
    "stall_memory": "per issue {:.1f} warps wait for memory",
    "stall_shared": "{:.1f} for shared memory",
    "stall_barrier": "{:.1f} at barriers",
}


def _counters(seen: dict[str, float]) -> str:
    return ", ".join(words.format(seen[name]) for name, words in _COUNTERS.items() if name in seen)


_FAILURE_HINTS = {
    "compile": "Mend the first error: what follows it is often its consequence.",
    "constraints": "Keep to the contract: outputs of its own, inputs left alone, nothing remembered from call to call.",
    "correctness": "Compute what the reference computes, for every element and value: look at bounds, tails, "
    "NaN, infinities and the precision of sums.",
    "runtime": "Look for an access out of bounds, a write to an input, and sizes or strides taken for granted.",
    "timeout": "Look for a loop that does not end, and for work that grows faster than the task's.",
}


def feedback(evaluation: Evaluation) -> str:
    """What a proposer is told of an evaluation: at most 40 lines; never seeds, tolerances or hidden shapes."""
    lines = [f"outcome: {evaluation.outcome}"]
    if evaluation.log:
        lines += [line[:200] for line in evaluation.log.splitlines()[:24]]
    if evaluation.speedup is not None:
        interval = (
            "[{:.2f}, {:.2f}]".format(*evaluation.speedup_ci) if evaluation.speedup_ci else "(too few rounds)"
        )
        lines.append(
            f"speedup: {evaluation.speedup:.2f}x over {evaluation.baseline} {interval}, "
            f"{evaluation.time_ms:.3f} ms against {evaluation.reference_ms:.3f} ms"
        )
    if evaluation.preparation_ms is not None:
        lines.append(f"preparation: {evaluation.preparation_ms:.3f} ms, once for given weights, timed apart")
    shown = evaluation.profile
    if evaluation.limiter:
        lines.append(
            f"limiter: {evaluation.limiter}; {shown.gbytes_per_s:.1f} GB/s "
            f"({100 * shown.bandwidth_share:.0f} % of peak), {shown.gflops_per_s:.1f} GFLOP/s "
            f"({100 * shown.arithmetic_share:.0f} % of peak); floor {shown.floor_ms:.3f} ms"
        )
        if evaluation.kernel_coverage is not None and evaluation.kernel_coverage < 0.999:
            lines.append(
                f"own kernels: {100 * evaluation.kernel_coverage:.0f} % of the time, the rest is ATen"
            )
        lines += [resource[:160] for resource in shown.resources[:4]]
        if counters := _counters(dict(shown.counters)):
            lines.append("counters: " + counters)
        if shown.missed and evaluation.limiter in ("instructions", "l2"):
            lines += [f"not vectorized, {remark[:160]}" for remark in shown.missed[:4]]
        hints = _HINTS if evaluation.target == "cpu" else _GPU_HINTS
        lines.append("hint: " + hints[evaluation.limiter])
    elif not evaluation.correct:
        lines.append("hint: " + _FAILURE_HINTS[evaluation.outcome])
    return "\n".join(lines[:FEEDBACK_LINES])

"""Why a kernel is faster, in words, from what was measured."""

from __future__ import annotations

import math

from ke_gym.evaluation.evaluation import Evaluation
from ke_gym.search.tree import Node, Tree

_LIMITS = {
    "latency": "the call takes microseconds, so fixed costs (launches, thread start-up) dominate",
    "compute": "arithmetic runs near its measured peak",
    "dram": "main memory runs near its measured peak",
    "l3": "the last-level cache runs near its measured peak",
    "l2": "the L2 caches run near their measured peak",
    "l1": "shared memory or the L1 caches run near their peak",
    "occupancy": "few warps are resident, and they wait for memory",
    "launches": "several short kernels follow each other, and launching them dominates",
    "instructions": "neither memory nor the FMA units are saturated: instructions and dependences set the"
    " pace",
}


def size(count: float) -> str:
    """Bytes in round units."""
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000 or unit == "GB":
            break
        count /= 1000
    return f"{count:.3g} {unit}"


def steps(tree: Tree) -> list[tuple[Node, float]]:
    """The winning path: each node with its speedup over its parent (over the baseline for a draft)."""
    path = tree.path(tree.best) if tree.best else []
    result, before = [], 1.0
    for node in path:
        if node.correct:
            result.append((node, node.speedup / before))
            before = node.speedup
        else:
            result.append((node, 0.0))
    return result


def why(tree: Tree) -> list[str]:
    """A few sentences; empty when nothing correct was found."""
    if tree.best is None:
        return []
    best = tree.best.evaluation
    return [*_where_it_came_from(tree), *_prepared(best), *_traffic(best), *_code(best)]


def _where_it_came_from(tree: Tree) -> list[str]:
    path = steps(tree)
    (draft, first), later = path[0], path[1:]
    sentences = [
        f"The draft it grew from (#{draft.number}) computes the whole task in"
        f" {max(len(draft.evaluation.profile.steps), 1)} step(s) and stood at {first:.2f}x the baseline."
        if draft.correct
        else f"It grew from draft #{draft.number}, which failed and was repaired."
    ]
    gains = sorted(((gain, node) for node, gain in later if gain > 1.01), key=lambda pair: -pair[0])
    if gains:
        told = ", ".join(f"{node.strategy} {100 * (gain - 1):+.0f} %" for gain, node in gains[:4])
        sentences.append(f"On top of that, what helped most: {told}.")
    return sentences


def _prepared(best: Evaluation) -> list[str]:
    if best.preparation_ms is None:
        return []
    return [
        f"Weights are prepared once, which is not in these times: preparation: {best.preparation_ms:.3f} ms, once."
    ]


def _traffic(best: Evaluation) -> list[str]:
    shown, sentences = best.profile, []
    if not best.time_ms or not best.reference_ms or shown.bytes <= 0:
        return []
    before = shown.bandwidth_share * best.time_ms / best.reference_ms
    arithmetic = f" and {shown.flops / 1e6:.3g} MFLOP of arithmetic" if shown.flops else ""
    rate = (
        f" and {shown.gflops_per_s:.1f} GFLOP/s ({100 * shown.arithmetic_share:.0f} %)" if shown.flops else ""
    )
    sentences.append(
        f"The task takes at least {size(shown.bytes)} of traffic{arithmetic}. The kernel does it at"
        f" {shown.gbytes_per_s:.1f} GB/s ({100 * shown.bandwidth_share:.0f} % of the bandwidth measured at this"
        f" size){rate}. The baseline came to {100 * before:.0f} % of that bandwidth."
    )
    if best.limiter:
        sentences.append(f"What limits it now: {_LIMITS.get(best.limiter, best.limiter)}.")
    if shown.floor_ms > 0:
        left = best.time_ms / shown.floor_ms
        if math.isfinite(left):
            sentences.append(
                f"The floor on this machine is {shown.floor_ms:.3f} ms, so at most another {left:.1f}x is"
                " possible."
            )
    return sentences


def _code(best: Evaluation) -> list[str]:
    sentences = []
    coverage = best.kernel_coverage
    if coverage is None:
        sentences.append(
            "What share of the time is spent in generated kernels was not measured: library calls need what they make."
        )
    elif coverage >= 0.999:
        sentences.append("All of the time is spent in generated kernels; no library call is left.")
    else:
        calls = [name for name, _ in best.profile.steps if name.startswith("aten.")]
        names = ", ".join(sorted(set(calls))) or "library calls"
        sentences.append(
            f"{100 * coverage:.0f} % of the time is spent in generated kernels, the rest in {names}."
        )
    done, missed = len(best.profile.vectorized), len(best.profile.missed)
    if done or missed:
        sentences.append(f"The compiler vectorized {done} loop(s) and left {missed} remark(s) on others.")
    return sentences

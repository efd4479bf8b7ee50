"""What a policy sees: 132 named float32 values in [-1, 1], in six parts.

Values are normalized by physics (peaks, counts, limits), never by the statistics of a data set, so that a policy
trained on one machine's recorded searches means the same thing on another's live ones. Live sessions and replay
tables fill the same builders. What is not known (a profile of the reference, a task of no known family) is zero.

The layout and its reasons: KernelBand (arXiv 2511.18868) and CompilerGym's winning PPO entry, which needed the
budget that is left.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from ke_gym.evaluation.evaluation import OUTCOMES, Evaluation
from ke_gym.search.tree import Node, Tree
from ke_gym.strategies import STRATEGIES

if TYPE_CHECKING:
    from ke_gym.evaluation.evaluator import Evaluator
    from ke_gym.evaluation.work import Work
    from ke_gym.languages.plan import TensorSpec
    from ke_gym.targets.cpu import Facts, Peaks
    from ke_gym.tasks import Task

Values = NDArray[np.float32]
Observation = dict[str, Values]
Number = Any  # a number, or an array of them with one entry per environment

SPACES_VERSION = 1

TASK = (
    "pointwise", "reduction", "norm", "matmul", "conv", "attention", "index", "scan",
    "log_flops", "log_bytes", "log_intensity", "float32", "half", "other_dtype", "shape_sets", "tolerance",
)  # fmt: skip
HARDWARE = (
    "cpu", "cuda", "hip", "log_peak_flops", "log_bandwidth", "log_ridge", "log_cores", "l1", "l2",
    "vector_width", "matrix_unit", "clocks_locked",
)  # fmt: skip
CODE = (
    "log_lines", "loop_depth", "loads", "stores", "barriers", "atomics", "local_memory", "dot", "vector",
    "unroll", "reduction", "log_tile", "stages", "distance_to_root",
)  # fmt: skip
PROFILE = (
    "roofline", "compute", "dram", "l2", "l1", "occupancy", "registers", "own_kernels", "memory_stall",
    "launch_share", "timing_cv", "has_profile",
)  # fmt: skip
HISTORY = (
    "budget_left", "steps_since_improvement", "log_best_speedup", "parent_gap", "compile_failures",
    "wrong_failures", "slow_rate", "duplicate_rate", "archive_coverage", "tree_depth", "last_outcome", "drafts",
)  # fmt: skip
PER_STRATEGY = ("tries", "mean_gain", "failure_rate")

LAYOUT: dict[str, int] = {
    "task": len(TASK),
    "hardware": len(HARDWARE),
    "code": len(CODE),
    "profile": len(PROFILE),
    "history": len(HISTORY),
    "strategies": len(PER_STRATEGY) * len(STRATEGIES),
}
"""Part to size, in the order of the flat vector. ``strategies`` holds ``PER_STRATEGY`` of each in turn."""

FAMILY_GROUPS = {
    "pointwise": "pointwise", "reduction": "reduction", "pooling": "reduction", "norm": "norm",
    "softmax": "norm", "matmul": "matmul", "conv": "conv", "attention": "attention", "gather": "index",
    "ranking": "index", "scan": "scan",
}  # fmt: skip

RECENT = 8
MOST_REGISTERS = 255  # of a thread, on every GPU here
LAUNCH_MS = 0.02  # below this a call is all launch and thread start


@dataclass(frozen=True)
class Surroundings:
    """What stays the same for a whole search: the ``task`` part, shape (16,), and ``hardware``, shape (12,)."""

    task: Values
    hardware: Values

    @classmethod
    def of(cls, evaluator: Evaluator) -> Surroundings:
        """The surroundings of a search that this evaluator judges."""
        shape = evaluator.judge.shapes[evaluator.contract]
        return cls(
            task_features(evaluator.task, shape.work, shape.inputs, len(evaluator.shape_sets)),
            hardware_features(evaluator.facts, evaluator.peaks, evaluator.target),
        )

    @classmethod
    def unknown(cls) -> Surroundings:
        """All zeros: for synthetic problems, which have neither task nor machine."""
        return cls(_box([0.0] * len(TASK)), _box([0.0] * len(HARDWARE)))


@dataclass(frozen=True)
class SearchCounters:
    """What the search itself knows, as counters: one search (numbers), or N side by side (arrays, shape (N,)).

    The last four describe each strategy: shape (22,), or (N, 22). Gains are log-speedups over the parent.
    """

    budget_left: Number
    """Share of the budget, in [0, 1]."""
    since_improvement: Number
    """Evaluations since the best was found (since the start, while there is none)."""
    log_best: Number
    """Natural log of the best verified speedup; 0 while there is none."""
    parent_gap: Number
    """Natural log of best speedup over the parent's; 0 where one of them is missing."""
    recent: Number
    """How many of the last ``RECENT`` evaluations there are; the next three count among them."""
    recent_compile: Number
    recent_wrong: Number
    recent_slow: Number
    """Correct, but neither an improvement nor the best."""
    evaluations: Number
    duplicates: Number
    """Asks in vain, since they only repeated known candidates."""
    covered: Number
    """Distinct actions that made a correct candidate."""
    depth: Number
    """Of the best: edges from the reference."""
    last_outcome: Number
    """Index into ``OUTCOMES``; 0 before the first evaluation."""
    drafts: Number
    """Candidates made from the reference."""
    tries: NDArray[Any]
    gain_sums: NDArray[Any]
    gain_counts: NDArray[Any]
    failures: NDArray[Any]


def history_features(counters: SearchCounters) -> Values:
    """The ``history`` part, shape (12,) or (N, 12)."""
    c = counters
    recent = np.maximum(c.recent, 1)
    columns = (
        c.budget_left,
        np.divide(c.since_improvement, 10),
        np.divide(c.log_best, math.log(10)),
        c.parent_gap,
        c.recent_compile / recent,
        c.recent_wrong / recent,
        c.recent_slow / recent,
        c.duplicates / np.maximum(np.add(c.evaluations, c.duplicates), 1),
        np.divide(c.covered, len(STRATEGIES)),
        np.divide(c.depth, 10),
        np.divide(c.last_outcome, len(OUTCOMES) - 1),
        np.divide(c.drafts, 5),
    )
    return _box(np.stack(columns, axis=-1))


def strategy_features(counters: SearchCounters) -> Values:
    """The ``strategies`` part, shape (66,) or (N, 66): ``PER_STRATEGY`` of strategy 0, then of 1, …"""
    tries = np.asarray(counters.tries, dtype=np.float64)
    columns = (
        tries / 5,
        counters.gain_sums / np.maximum(counters.gain_counts, 1),
        counters.failures / np.maximum(tries, 1),
    )
    stacked = np.stack(columns, axis=-1)
    return _box(stacked.reshape(*tries.shape[:-1], -1))


def count(tree: Tree, parent: Node | None, budget_left: float, duplicates: int) -> SearchCounters:
    """The counters of a live search whose next candidate is made from ``parent``."""
    nodes = list(tree)
    recent = nodes[-RECENT:]
    outcomes = Counter(node.evaluation.outcome for node in recent)
    best = tree.best
    tries, sums, counts, failures = (np.zeros(len(STRATEGIES)) for _ in range(4))
    for node in nodes:
        index = _INDEX.get(node.strategy)
        if index is None:
            continue
        tries[index] += 1
        origin = tree.nodes[node.parent] if node.parent is not None else None
        if not node.correct:
            failures[index] += 1
        elif origin is not None and origin.correct:
            counts[index] += 1
            sums[index] += math.log(node.speedup / origin.speedup)
    return SearchCounters(
        budget_left=budget_left,
        since_improvement=sum(1 for node in nodes if best is None or node.number > best.number),
        log_best=math.log(best.speedup) if best else 0.0,
        parent_gap=math.log(best.speedup / parent.speedup) if best and parent and parent.correct else 0.0,
        recent=len(recent),
        recent_compile=outcomes["compile"],
        recent_wrong=outcomes["correctness"],
        recent_slow=sum(n.correct and n is not best and not n.evaluation.improved for n in recent),
        evaluations=len(nodes),
        duplicates=duplicates,
        covered=len({node.strategy for node in nodes if node.correct}),
        depth=tree.depth(best),
        last_outcome=OUTCOMES.index(nodes[-1].evaluation.outcome) if nodes else 0,
        drafts=len(tree.children(None)),
        tries=tries,
        gain_sums=sums,
        gain_counts=counts,
        failures=failures,
    )


_INDEX = {strategy.name: strategy.id for strategy in STRATEGIES}


def observe(
    surroundings: Surroundings, code: Values, profile: Values, counters: SearchCounters
) -> Observation:
    """All six parts in the order of ``LAYOUT``; ``code`` and ``profile`` are the parent's."""
    return {
        "task": surroundings.task,
        "hardware": surroundings.hardware,
        "code": code,
        "profile": profile,
        "history": history_features(counters),
        "strategies": strategy_features(counters),
    }


def flatten(observation: Mapping[str, NDArray[Any]]) -> Values:
    """The parts side by side in the order of ``LAYOUT``: shape (132,), or (N, 132) for a batch."""
    return np.concatenate([observation[name] for name in LAYOUT], axis=-1, dtype=np.float32)


def task_features(task: Task, work: Work, inputs: Sequence[TensorSpec], shape_sets: int = 1) -> Values:
    """The ``task`` part, shape (16,): family, least work of one call, dtype of the largest input."""
    group = FAMILY_GROUPS.get(task.family)
    families = [float(name == group) for name in TASK[:8]]
    largest = max(inputs, key=lambda spec: math.prod(spec.shape), default=None)
    dtype = "" if largest is None else str(largest.dtype).removeprefix("torch.")
    kind = "float32" if dtype == "float32" else "half" if dtype in ("float16", "bfloat16") else "other_dtype"
    dtypes = [float(name == kind) for name in TASK[11:14]]
    size = (
        math.log10(1.0 + work.flops) / 15,
        math.log10(1.0 + work.bytes) / 12,
        math.log2((1.0 + work.flops) / (1.0 + work.bytes)) / 12,
    )
    loose = float(task.tolerance is not None or task.precision != "strict")
    return _box([*families, *size, *dtypes, shape_sets / 8, loose])


def hardware_features(facts: Facts, peaks: Peaks, target: str) -> Values:
    """The ``hardware`` part, shape (12,): measured peaks and what the machine says of itself."""
    bandwidth = peaks.bandwidth[-1][1]
    values = (
        math.log10(1.0 + peaks.fp32) / 15,
        math.log10(1.0 + bandwidth) / 13,
        math.log2((1.0 + peaks.fp32) / (1.0 + bandwidth)) / 12,
        math.log2(1.0 + facts.cores) / 10,
        facts.l1_bytes / (256 << 10),
        facts.l2_bytes / (64 << 20),
        facts.vector_bits / 1024,
        float(facts.matrix_unit),
        0.0,  # no target locks its clocks
    )
    return _box([*(float(name == target) for name in HARDWARE[:3]), *values])


_PYTHON_COMMENT = re.compile(r"^\s*#(?!\s*(?:pragma|include|define))[^\n]*", re.MULTILINE)
_C_COMMENT = re.compile(r"//[^\n]*|/\*.*?\*/", re.DOTALL)
_LOOP = re.compile(r"\bfor\s*\(|\bwhile\s*\(|^\s*for\b.*:\s*$", re.MULTILINE)
_COUNTED = {
    "loads": r"\btl\.load\b|\w\[|_loadu?_|\bke::load",
    "stores": r"\btl\.store\b|\]\s*[-+*/]?=(?!=)|_storeu?_|\bke::store",
    "barriers": r"__syncthreads|\bbarrier\b|tl\.debug_barrier|omp taskwait",
    "atomics": r"\batomic",
}
_FLAGS = {
    "local_memory": r"__shared__|\balignas\s*\(|\bthread_local\b",
    "dot": r"tl\.dot\b|mma_sync|wmma|gemm|_fmadd_",
    "vector": r"omp\s+simd|omp\s+parallel\s+for\s+simd|\b__m(?:128|256|512)|\bfloat4\b|vector_size|ke::vec",
    "unroll": r"\bunroll\b|static_range|_acc1\b",
    "reduction": r"\breduction\s*\(|tl\.(?:sum|max|min)\b|__shfl|_acc0\b",
}
_TILE = re.compile(r"\b(?:BLOCK\w*|TILE\w*|[MNK]C|[mnk]c|tile\w*)\s*=\s*(\d+)|\+=\s*(\d+)\s*\)")
_STAGES = re.compile(r"num_stages\s*=\s*(\d+)|\bprefetch")


def code_features(source: str, language: str, root_source: str | None = None) -> Values:
    """The ``code`` part, shape (14,): what the text shows without compiling it.

    ``root_source`` is the draft that the kernel descends from (None: it is one itself).
    """
    text = _uncommented(source, language)
    lines = _lines(text)
    tiles = [int(a or b) for a, b in _TILE.findall(text)]
    stages = [int(match[1] or 2) for match in _STAGES.finditer(text)]
    return _box(
        [
            math.log10(1 + len(lines)) / 4,
            _loop_depth(text) / 6,
            *(math.log1p(len(re.findall(pattern, text))) / 5 for pattern in _COUNTED.values()),
            *(float(re.search(pattern, text) is not None) for pattern in _FLAGS.values()),
            math.log2(1 + max(tiles, default=0)) / 16,
            max(stages, default=0) / 5,
            distance(lines, code_lines(root_source, language)) if root_source is not None else 0.0,
        ]
    )


def _loop_depth(text: str) -> int:
    """How deep loops nest, by indentation: both Python and well-formed C++ are laid out by it."""
    open_loops: list[int] = []
    deepest = 0
    for line in text.splitlines():
        if not line.strip():
            continue
        indent = len(line) - len(line.lstrip())
        while open_loops and open_loops[-1] >= indent:
            open_loops.pop()
        if _LOOP.search(line):
            open_loops.append(indent)
            deepest = max(deepest, len(open_loops))
    return deepest


def _uncommented(source: str, language: str) -> str:
    text = _PYTHON_COMMENT.sub("", source)
    return text if language == "triton" else _C_COMMENT.sub("", text)  # in Python, // divides


def _lines(text: str) -> list[str]:
    return [line.strip() for line in text.splitlines() if line.strip()]


def code_lines(source: str, language: str) -> list[str]:
    """The lines that hold code, stripped."""
    return _lines(_uncommented(source, language))


def distance(lines: list[str], root: list[str]) -> float:
    """The share of lines that are not common to both texts, whatever their order (Dice distance)."""
    common = (Counter(lines) & Counter(root)).total()
    return 1.0 - 2.0 * common / max(len(lines) + len(root), 1)


def profile_features(evaluation: Evaluation | None) -> Values:
    """The ``profile`` part, shape (12,); zeros without a measured time.

    Shares of measured peaks. A target that does not count something leaves it zero (the CPU: ``l1``,
    ``registers``, ``memory_stall``); the CPU's ``occupancy`` is the share of loops the compiler vectorized. On a GPU
    ``l1`` and ``memory_stall`` are the device's counters, which only best kernels have, ``occupancy`` is what they say or
    else what the binary allows, and ``registers`` the share of the 255 that a thread may have.
    """
    if evaluation is None or not evaluation.correct or not evaluation.time_ms:
        return NO_PROFILE
    shown = evaluation.profile
    cached = evaluation.limiter in ("l2", "l3")
    loops = len(shown.vectorized) + len(shown.missed)
    counters = dict(shown.counters)
    waiting = counters.get("stall_memory", 0.0)
    times = np.asarray(evaluation.times_ms, dtype=np.float64)
    spread = float(times.std() / times.mean()) if times.size and times.mean() > 0 else 0.0
    return _box(
        [
            shown.floor_ms / evaluation.time_ms,
            shown.flops_share,
            0.0 if cached else shown.bandwidth_share,
            shown.bandwidth_share if cached else 0.0,
            counters.get("l1", 0.0) / 100,
            counters.get("warps", 0.0) / 100
            if counters
            else shown.occupancy or len(shown.vectorized) / max(loops, 1),
            shown.registers / MOST_REGISTERS,
            evaluation.kernel_coverage or 0.0,
            waiting / (1 + waiting),
            min(LAUNCH_MS / evaluation.time_ms, 1.0),
            spread,
            1.0,
        ]
    )


def _box(values: Sequence[float] | NDArray[Any]) -> Values:
    """Float32 in [-1, 1]; what is not a number counts as unknown."""
    array = np.asarray(values, dtype=np.float64)
    return np.clip(np.nan_to_num(array, nan=0.0, posinf=1.0, neginf=-1.0), -1.0, 1.0).astype(np.float32)


NO_CODE, NO_PROFILE = _box([0.0] * len(CODE)), _box([0.0] * len(PROFILE))
"""Of the reference, which has no kernel."""

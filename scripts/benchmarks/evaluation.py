"""Can verdicts be trusted, and how fast are they."""

from __future__ import annotations

import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from statistics import geometric_mean as geomean

import psutil
from rich.progress import track

from benchmarks import gpu
from benchmarks.figures import Figure, Figures, console
from ke_gym.candidate import Candidate
from ke_gym.evaluation.evaluator import Evaluator
from ke_gym.targets import cpu
from ke_gym.tasks.task import Task

# A row-wise kernel whose cost can be set exactly: `again` of 1000 rows, spread evenly, are computed twice.
KERNEL = r'''
import torch
from ke_gym import lang

kernels = lang.cpp(r"""
#include "ke/math.h"
#include <cstdint>
// variant {variant}
static void row(const float* x, float* out, int64_t n) {{
    float top = x[0];
    #pragma omp simd reduction(max : top)
    for (int64_t j = 0; j < n; ++j) top = x[j] > top || x[j] != x[j] ? x[j] : top;
    float sum = 0;
    #pragma omp simd reduction(+ : sum)
    for (int64_t j = 0; j < n; ++j) {{ out[j] = ke::exp(x[j] - top); sum += out[j]; }}
    const float scale = {scale}f / sum;
    #pragma omp simd
    for (int64_t j = 0; j < n; ++j) out[j] *= scale;
}}
extern "C" void softmax(const float* x, float* out, int64_t rows, int64_t n) {{
    #pragma omp parallel for schedule(static)
    for (int64_t i = 0; i < rows; ++i) {{
        row(x + i * n, out + i * n, n);
        for (int64_t k = 0; k < {repeat}; ++k)
            if (i * 617 % 1000 < {again}) row(x + i * n, out + i * n, n);
    }}
}}
""")

def forward(x):
    out = torch.empty_like(x)
    kernels.softmax(x, out, *x.shape)
    return out
'''


def kernel(variant: str, again: int = 0, repeat: int = 1, scale: float = 1.0) -> Candidate:
    """A softmax that computes ``again`` of every 1000 rows ``repeat`` times more, times ``scale``."""
    return Candidate(KERNEL.format(variant=variant, again=again, repeat=repeat, scale=scale))


@dataclass
class Evaluation:
    """A/A false positives, resolution of 5 % differences, early rejection, throughput, memory, exploits.

    On a GPU: A/A, resolution of 2 % differences at 100 us, the host lane's clock, throughput (of all GPUs, where there are
    several), exploits.
    """

    target: str = "cpu"
    """cpu, cuda, or cuda:1 for the second GPU."""
    races: int = 200
    """A/A races, and half as many of each 5 % comparison, on a GPU a tenth of each 2 % comparison; 0 leaves all of them
    out."""
    threads: tuple[int, ...] = (1, cpu.facts().cores)
    """On a CPU: numbers of threads whose races are looked at; two that share a core scatter more than one does."""
    candidates: int = 120
    """Candidates of the throughput mix; 0 leaves it out."""
    evaluations: int = 1000
    """On a CPU: evaluations over which the parent's memory is watched; 0 leaves it out."""
    host_lane: bool = True
    """Time eager PyTorch in a GPU's host lane too."""
    exploits: bool = True
    """Run the exploit suite too, and on a CPU the honest kernels."""
    json: Path | None = None
    """Also write the figures here."""

    def run(self) -> None:
        figures = Figures("evaluation", self.json)
        if self.target != "cpu":
            if self.races:
                figures.extend(gpu.resolution(self.target, self.races))
            if self.host_lane:
                figures.extend(gpu.host_lane(self.target))
            if self.candidates:
                figures.extend(gpu.throughput(self.target, self.candidates))
            if self.exploits:
                figures.extend(gpu.exploits(self.target))
            figures.print()
            return
        if self.races:
            for threads in sorted(set(self.threads)):
                with Evaluator(Task.load("softmax"), threads=threads) as evaluator:
                    figures.extend(resolution(evaluator, self.races))
                    figures.extend(rejection(evaluator))
        if self.candidates:
            figures.extend(throughput(self.candidates))
        if self.evaluations:
            figures.extend(memory(self.evaluations))
        if self.exploits:
            figures.extend(exploits())
            figures.extend(honest())
        figures.print()


def resolution(evaluator: Evaluator, races: int) -> Iterator[Figure]:
    """How often the whole decision (race, then confirmation) calls equals, slower and faster copies a gain."""
    plain = kernel("plain")
    slow, slower = calibrated(evaluator, plain, 0.05)
    on = f", {evaluator.threads} thread" + "s" * (evaluator.threads > 1)
    yield Figure(
        "the slower copy takes" + on, f"{100 * slower:.1f} % longer", "5 ± 1 %", 0.04 <= slower <= 0.06
    )

    def accepted(name: str, candidate: Candidate, rival: Candidate, n: int) -> int:
        decisions = (evaluator.decide(candidate, rival) for _ in range(n))
        return sum(d.improved for d in track(decisions, f"{name} races", n, console=console))

    wrong = accepted("A/A", plain, plain, races)
    share = f"{wrong} of {races} ({100 * wrong / races:.1f} %)"
    yield Figure("A/A races called a gain" + on, share, "≤ 1 %", wrong <= 0.01 * races)
    half = races // 2
    wrong = accepted("slower", slow, plain, half)
    yield Figure("5 % slower copies accepted" + on, f"{wrong} of {half}", "0", wrong == 0)
    right = accepted("faster", plain, slow, half)
    yield Figure("5 % faster copies accepted" + on, f"{right} of {half}", "≥ 95 %", right >= 0.95 * half)


def calibrated(evaluator: Evaluator, plain: Candidate, wanted: float) -> tuple[Candidate, float]:
    """A copy of ``plain`` that takes about ``wanted`` (a share) longer, and what it takes by long races.

    Rows computed twice cost less the second time: how much, a copy that computes every row twice tells.
    """
    again = 1000 * wanted / longer(evaluator, kernel("twice", again=1000), plain, 20)
    slow = kernel("slow", again=round(again))
    return slow, longer(evaluator, slow, plain, 40)


def longer(evaluator: Evaluator, candidate: Candidate, plain: Candidate, races: int) -> float:
    """The share by which ``candidate`` takes longer than ``plain``."""
    gains = [evaluator.decide(candidate, plain).gain or 1.0 for _ in range(races)]
    return 1 / geomean(gains) - 1


def rejection(evaluator: Evaluator) -> Iterator[Figure]:
    """Seconds from a 2x slower candidate's first timed call to its end."""
    plain, slow = kernel("plain"), kernel("twice", again=1000)
    spent = []
    for _ in range(5):
        start = time.perf_counter()
        evaluator.decide(slow, plain)
        spent.append(time.perf_counter() - start)
    worst = max(spent)
    yield Figure("2x slower candidate dropped after", f"{worst:.2f} s (worst of 5)", "≤ 1 s", worst <= 1.0)


def throughput(candidates: int) -> Iterator[Figure]:
    """Candidates a minute over a mix of good, slow, wrong and non-compiling kernels.

    A quarter of the good ones beat the incumbent by a few percent, which costs a confirmation; as in a search, most
    do not.
    """

    def mixed(index: int) -> Candidate:
        match index % 4:
            case 0:
                return kernel(f"good {index}", again=100 * (index // 4 % 4))
            case 1:
                return kernel(f"slow {index}", again=1000, repeat=2)
            case 2:
                return kernel(f"wrong {index}", scale=1.001)
            case _:
                return Candidate(kernel(f"broken {index}").source.replace("float sum = 0;", "float sum = ;"))

    with Evaluator(Task.load("softmax")) as evaluator, ThreadPoolExecutor(4) as pool:
        incumbent = kernel("incumbent", again=100)
        evaluator.evaluate(incumbent)
        busy, start = evaluator.busy_s, time.perf_counter()
        jobs = [pool.submit(evaluator.evaluate, mixed(i), incumbent) for i in range(candidates)]
        outcomes = [job.result().outcome for job in track(jobs, "throughput", console=console)]
        wall = time.perf_counter() - start
        outside = 1 - (evaluator.busy_s - busy) / wall
    rate = 60 * candidates / wall
    right = all(
        outcome == ("correct", "correct", "correctness", "compile")[i % 4]
        for i, outcome in enumerate(outcomes)
    )
    yield Figure("candidates a minute", f"{rate:.0f}", "≥ 60", rate >= 60)
    yield Figure(
        "time outside building, running, racing", f"{100 * outside:.1f} %", "≤ 15 %", outside <= 0.15
    )
    yield Figure("verdicts of the mix as they should be", "all" if right else "NOT all", "all", right)


def memory(evaluations: int) -> Iterator[Figure]:
    """Growth of this process's resident memory over many evaluations."""
    process = psutil.Process()
    sizes = []
    with Evaluator(Task.load("softmax"), shape_sets=["ragged"]) as evaluator:
        for index in track(range(evaluations), "memory", console=console):
            evaluator.evaluate(kernel(f"memory {index}", again=index % 5))
            sizes.append(process.memory_info().rss / 2**20)
    settled = sizes[min(100, len(sizes) // 2)]
    yield Figure(
        f"parent's memory over {evaluations} evaluations",
        f"{settled:.0f} → {sizes[-1]:.0f} MiB",
        "flat (≤ 5 % more)",
        sizes[-1] <= 1.05 * settled,
    )


def exploits() -> Iterator[Figure]:
    """The exploit suite: none may be accepted."""
    from ke_gym.testing import exploits as cheats

    attempts = cheats.run()
    accepted = [r.exploit.name for r in attempts if not r.caught]
    found = " ".join([f"{len(accepted)} of {len(attempts)}", *accepted])
    yield Figure("exploits accepted", found, "0", not accepted)


def honest() -> Iterator[Figure]:
    """The honest kernels: less than one in a hundred may be rejected."""
    from ke_gym.testing import honest as kernels

    attempts = kernels.run()
    rejected = [r.kernel.name for r in attempts if not r.ok]
    found = " ".join([f"{len(rejected)} of {len(attempts)}", *rejected])
    yield Figure("honest kernels rejected", found, "< 1 %", len(rejected) < 0.01 * len(attempts))

"""Can verdicts about a GPU's kernels be trusted, and how many are there a minute."""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import numpy as np
from rich.progress import track

from benchmarks import contexts, lanes
from benchmarks.figures import Figure, console
from ke_gym.candidate import Candidate
from ke_gym.evaluation.opening import open_evaluator
from ke_gym.evaluation.record import CONFIRMATIONS
from ke_gym.tasks.task import Task

TASK = '''
"""{call} of {rows} rows of {cols}."""

import torch
import torch.nn as nn


class Model(nn.Module):
    def forward(self, x):
        return {call}


def get_inputs():
    return [torch.randn({rows}, {cols})]
'''
# The middle one takes about 100 us on a large GPU, the small one about 5.
SIZES = {"100 us": (8192, 6144), "5 us": (128, 1024)}
SOFTMAX = "torch.softmax(x, dim=-1)"
# What eager PyTorch is called with in the host lane, from what takes no time there to what takes long.
HOST_CALLS = {
    "sine of 128 x 256": ("x.sin()", 128, 256),
    "sine of 4096 x 4096": ("x.sin()", 4096, 4096),
    "sine of 8192 x 8192": ("x.sin()", 8192, 8192),
    "softmax of 8192 x 8192": (SOFTMAX, 8192, 8192),
    "five calls of 8192 x 8192": ("(2 * (x.sin() * x + x)).cos()", 8192, 8192),
    "two products of 4096 x 4096": ("(x @ x) @ x", 4096, 4096),
}
# Where a tensor lies cannot be traced.
HOST_LANE = "import torch\n\nCOPY = {copy}\n\n\ndef forward(x):\n    x.data_ptr()\n    return {call}\n"
AT_LEAST, ACCURATE_FROM_MS, ACCURACY = 0.95, 0.1, 0.25
"""No call may be found to take less than this share of what it does; none of so long clearly more."""
IN_FLIGHT = 8
"""Candidates per GPU that are under way at once: most of them wait for their turn, compiled."""
WINNERS = 1 / 16
"""The share of the mix that beats the incumbent and is confirmed, in so many fresh processes."""

# One block a row, the row in shared memory; so many rows in a thousand are computed twice.
KERNEL = r'''
import torch
from ke_gym import lang

AGAIN, SCALE, VARIANT = {again}, {scale}, {variant!r}
kernels = lang.cuda(r"""
extern "C" __global__ void __launch_bounds__(512) rows(
    const float* x, float* out, long long n, long long r, float scale) {{
  extern __shared__ float4 tile[];
  __shared__ float part[16];
  long long which = blockIdx.x % r;
  const float4* row = (const float4*)(x + which * n);
  float4* to = (float4*)(out + which * n);
  const float nan = __int_as_float(0x7fffffff);
  int m = n / 4;
  float top = -__int_as_float(0x7f800000);
  bool bad = false;
  for (int i = threadIdx.x; i < m; i += 512) {{
    float4 v = row[i];
    tile[i] = v;
    bad |= isnan(v.x) | isnan(v.y) | isnan(v.z) | isnan(v.w);
    top = fmaxf(top, fmaxf(fmaxf(v.x, v.y), fmaxf(v.z, v.w)));
  }}
  if (bad) top = nan;
  for (int d = 16; d; d >>= 1) {{
    float o = __shfl_xor_sync(~0u, top, d);
    top = isnan(o) || isnan(top) ? nan : fmaxf(top, o);
  }}
  if (threadIdx.x % 32 == 0) part[threadIdx.x / 32] = top;
  __syncthreads();
  top = part[0];
  for (int i = 1; i < 16; i++) top = isnan(part[i]) || isnan(top) ? nan : fmaxf(top, part[i]);
  __syncthreads();
  float sum = 0;
  for (int i = threadIdx.x; i < m; i += 512) {{
    float4 v = tile[i];
    v.x = expf(v.x - top); v.y = expf(v.y - top); v.z = expf(v.z - top); v.w = expf(v.w - top);
    tile[i] = v;
    sum += (v.x + v.y) + (v.z + v.w);
  }}
  for (int d = 16; d; d >>= 1) sum += __shfl_xor_sync(~0u, sum, d);
  if (threadIdx.x % 32 == 0) part[threadIdx.x / 32] = sum;
  __syncthreads();
  sum = 0;
  for (int i = 0; i < 16; i++) sum += part[i];
  float s = scale / sum;
  for (int i = threadIdx.x; i < m; i += 512) {{
    float4 v = tile[i];
    v.x *= s; v.y *= s; v.z *= s; v.w *= s;
    to[i] = v;
  }}
}}""")


def forward(x):
    out = torch.empty_like(x)
    r, n = x.shape
    kernels.rows[r + r * AGAIN // 1000, 512, 4 * n](x, out, n, r, SCALE)
    return out
'''


def kernel(variant: str, again: int = 0, scale: float = 1.0) -> Candidate:
    """A softmax that computes ``again`` of every 1000 rows twice, times ``scale``."""
    return Candidate(KERNEL.format(variant=variant, again=again, scale=scale), "cuda")


def task(size: str) -> Task:
    """The softmax whose honest kernel takes about that long."""
    return called(SOFTMAX, *SIZES[size])


def called(call: str, rows: int, cols: int) -> Task:
    """The task whose reference is one expression of ``x``."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "call.py"
        path.write_text(TASK.format(call=call, rows=rows, cols=cols))
        return Task.from_file(path)


def host_lane(target: str) -> Iterator[Figure]:
    """What eager PyTorch is found to take in the host lane, where a process's clock counts, against itself by device events.

    It is never faster than itself, nor than its copy.
    """
    least = f"at least {100 * AT_LEAST:.0f} %, at most {100 * (1 + ACCURACY):.0f} % from {1e3 * ACCURATE_FROM_MS:.0f} us on"
    with tempfile.TemporaryDirectory() as folder:  # these races of equals tell nothing of other kernels'
        for name, (call, rows, cols) in HOST_CALLS.items():
            module, copy = (Candidate(HOST_LANE.format(copy=n, call=call), "cuda") for n in range(2))
            with open_evaluator(called(call, rows, cols), target, folder=Path(folder)) as evaluator:
                judged = evaluator.evaluate(module)
                if not judged.correct or judged.reference_ms is None:
                    yield Figure(f"host lane, {name}", f"{judged.outcome}: {judged.log}", "correct", False)
                    continue
                equals = evaluator.aa_race(evaluator.build(module))
                gain = judged.improved or evaluator.decide(copy, module).improved
            by_events, here = judged.reference_ms, 1e3 * equals.median("candidate")
            near = by_events < ACCURATE_FROM_MS or here <= (1 + ACCURACY) * by_events
            sound = here >= AT_LEAST * by_events and not gain and judged.trust == "host"
            value = f"{1e3 * here:.1f} us, {1e3 * by_events:.1f} by events" + ", a gain over a copy" * gain
            yield Figure(f"host lane, {name}", value, least, sound and near)


def resolution(target: str, races: int) -> Iterator[Figure]:
    """A/A races, and whether kernels that differ by 2 % in work are told apart, in the right order."""
    for size in SIZES:
        with open_evaluator(task(size), target) as evaluator:
            plain = kernel("plain")
            judged = evaluator.evaluate(plain)
            yield Figure(
                f"the kernel of {size} takes", f"{1e3 * (judged.time_ms or 0):.1f} us", "", judged.correct
            )
            artifact = evaluator.build(plain)
            before = len(evaluator.record.races)
            for _ in track(range(races), f"A/A races, {size}", console=console):
                evaluator.aa_race(artifact)
            equals = evaluator.record.races[before:]
            wrong = sum(race.false_positive for race in equals)
            yield Figure(
                f"A/A races of {size} called a gain", f"{wrong} of {races}", "≤ 1 %", wrong <= 0.01 * races
            )
            spread = 100 * float(np.quantile([abs(race.log_ratio) for race in equals], 0.95))
            yield Figure(f"95 % of A/A medians of {size} within", f"{spread:.2f} %", "≤ 1 %", spread <= 1)
            if size != "100 us":
                continue
            n = max(1, races // 10)
            right = sum(evaluator.decide(plain, kernel(f"slow {i}", 20)).improved for i in range(n))
            yield Figure("2 % faster copies accepted", f"{right} of {n}", "≥ 95 %", right >= 0.95 * n)
            wrong = sum(evaluator.decide(kernel(f"slow {i}", 20), plain).improved for i in range(n))
            yield Figure("2 % slower copies accepted", f"{wrong} of {n}", "0", wrong == 0)


def mixed(index: int) -> Candidate:
    """A mix of good, slow, wrong and non-compiling kernels.

    A quarter of the good ones beat the incumbent, which costs a confirmation; as in a search, most do not.
    """
    match index % 4:
        case 0:
            return kernel(f"good {index}", again=100 * (index // 4 % 4))
        case 1:
            return kernel(f"slow {index}", again=1000)
        case 2:
            return kernel(f"wrong {index}", scale=1.001)
        case _:
            source = kernel(f"broken {index}").source.replace("float sum = 0;", "float sum = ;")
            return Candidate(source, "cuda")


def rate(target: str, numbers: range) -> tuple[float, bool, dict[str, float]]:
    """Candidates of the mix a minute in one search's evaluator, whether all verdicts are as they should be, and the seconds
    of each phase that a candidate took on average.

    By the clock from the first's start to the end of all but one per GPU: the last confirmations keep one busy while
    the others have nothing left.
    """
    ends: list[float] = []

    def judged(index: int) -> str:
        outcome = evaluator.evaluate(mixed(index), incumbent).outcome
        ends.append(time.perf_counter())
        return outcome

    with open_evaluator(task("100 us"), target) as evaluator:
        evaluator.ready()
        incumbent = kernel("incumbent", again=100)
        evaluator.evaluate(incumbent)
        before = evaluator.account.spent()
        start = time.perf_counter()
        with ThreadPoolExecutor(IN_FLIGHT * evaluator.devices) as pool:
            outcomes = list(pool.map(judged, numbers))
        counted = len(numbers) - evaluator.devices
        spent = {
            phase: (seconds - before.get(phase, (0.0, 0))[0]) / len(numbers)
            for phase, (seconds, _) in evaluator.account.spent().items()
        }
    wanted = ("correct", "correct", "correctness", "compile")
    right = all(outcome == wanted[i % 4] for i, outcome in zip(numbers, outcomes))
    return 60 * counted / (sorted(ends)[counted - 1] - start), right, spent


def throughput(target: str, candidates: int) -> Iterator[Figure]:
    """``candidates`` of the mix a GPU, a minute: on one GPU, on two, four, … that are here, and as many more cores.

    What each phase takes is printed: what takes longer the more GPUs there are is what keeps them from being linear. So is
    what the driver leaves to confirmations: it makes and ends contexts one after another, whatever GPU they are for.
    """
    devices = lanes.gpus() if target == "cuda" else []
    cores = sorted(os.sched_getaffinity(0))
    each = max(1, len(cores) // max(1, len(devices)))
    one, first, right = 0.0, 0, True
    for n in counts(len(devices)):
        numbers = range(
            first, first := first + n * candidates
        )  # others each time: what was compiled stays so
        if len(devices) > 1:
            with lanes.Lane(lanes.Share(",".join(devices[:n]), tuple(cores[: n * each]))) as lane:
                found, fine, spent = lane.run(partial(rate, target), numbers)
        else:
            found, fine, spent = rate(target, numbers)
        one, right = one or found, right and fine
        on = f"{n} GPU{'s' * (n > 1)}, {min(n * each, len(cores))} cores"
        phases = ", ".join(
            f"{phase} {seconds:.2f}" for phase, seconds in sorted(spent.items()) if seconds >= 0.005
        )
        console.print(f"{on}: seconds a candidate: {phases}", highlight=False)
        if n == 1:
            yield Figure(f"candidates a minute, {on}", f"{found:.0f}", "≥ 100", found >= 100)
        else:
            times, least = found / one, 0.8 * n
            yield Figure(
                f"candidates a minute, {on}", f"{found:.0f}, {times:.2f} times one's", f"≥ {least:.1f} times",
                times >= least,
            )  # fmt: skip
        if devices:
            made = contexts.rate(devices[:n], CONFIRMATIONS)
            most = 60 * made / (WINNERS * CONFIRMATIONS)
            value = f"{made:.1f}, enough for {most:.0f} candidates a minute"
            yield Figure(f"contexts made and ended a second, {n} GPU{'s' * (n > 1)}", value, "", True)
    yield Figure("verdicts of the mix as they should be", "all" if right else "NOT all", "all", right)


def counts(devices: int) -> list[int]:
    """Numbers of GPUs to measure on: 1, 2, 4, …, and all."""
    powers = [1 << n for n in range(devices.bit_length()) if 1 << n < devices]
    return [*powers, devices or 1]


def exploits(target: str) -> Iterator[Figure]:
    """Device code that cheats: none may be accepted."""
    from ke_gym.testing.exploits import suite
    from ke_gym.testing.exploits.gpu_catalogue import GPU_CATALOGUE

    attempts = suite.run(
        evaluator=lambda task: open_evaluator(task, target, call_timeout=2), catalogue=GPU_CATALOGUE
    )
    accepted = [r.exploit.name for r in attempts if not r.caught]
    found = " ".join([f"{len(accepted)} of {len(attempts)}", *accepted])
    yield Figure("exploits accepted", found, "0", not accepted)

"""The GPU's judge: one trusted process per device that draws inputs, runs everybody, and holds oracle and clock.

Candidates are device code only, so they share this process's context, and nothing of it that could help them:

- contents are new in every single call, each contestant's its own, drawn on the device from a seed in host
  memory; what belongs to them (reference, oracle) is computed only after the candidate has finished;
- it is computed from a second drawing, so that a kernel gains nothing by writing to its inputs;
- what a kernel leaves behind in device memory belongs to other contents.

A kernel that faults or hangs takes this process with it; the parent starts another.
"""

from __future__ import annotations

import os
import random
import secrets
import traceback
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ke_gym.errors import UserError
from ke_gym.evaluation import gpu_signature, mutants, work
from ke_gym.evaluation.acceptance import Expected, Verdict, judge_output
from ke_gym.evaluation.channel import Channel
from ke_gym.evaluation.evaluation import COMPILE_MODES
from ke_gym.evaluation.gpu_memory import Block, Placement, damaged, poison, same_bits
from ke_gym.evaluation.gpu_timing import Hung, Sample, Stopwatch
from ke_gym.evaluation.race import Rules, race
from ke_gym.languages.artifact import Artifact
from ke_gym.languages.plan import Launch, TensorSpec
from ke_gym.targets import cuda
from ke_gym.targets._memory import PlanError, plan_memory
from ke_gym.targets.cuda_driver import Clocks, CudaError, Driver
from ke_gym.targets.cuda_executor import ALIGNMENT, CudaRunner
from ke_gym.tasks.task import Reference, Task

RED_ZONE = 4096
SAMPLED_BLOCKS, BLOCK = 32, 128
HIDDEN_TRIES = 4
WARM_CALLS = 3
PATIENCE = 20.0
FULL_CHECKS = 0.04
PROFILE_RUNS = 5
TUNING_ROUNDS = 5
# CUDA graphs are the plan's own business: torch.compile is raced without them.
_MODES = {"max-autotune": "max-autotune-no-cudagraphs"}


class Died(Exception):
    """The candidate's device code ended badly. ``fatal``: this process is of no more use."""

    def __init__(self, outcome: str, log: str, fatal: bool = True) -> None:
        super().__init__(log)
        self.outcome, self.log, self.fatal = outcome, log, fatal


@dataclass
class ShapeSet:
    """What the judge keeps of one shape set. ``plain`` are the arguments with None for every tensor."""

    name: str
    reference: Reference
    plain: list[Any]
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    work: work.Work
    state: dict[str, TensorSpec]
    given: list[Block] = field(default_factory=list)
    wanted: list[Block] = field(default_factory=list)
    held: Block | None = None
    baseline: Callable[..., tuple[Tensor, ...]] | None = None

    @property
    def parameters(self) -> dict[str, Tensor]:
        """The candidates' own copy of the state."""
        assert self.held is not None
        return dict(zip(self.state, self.held.tensors))


@dataclass
class Arm:
    """One artifact, loaded for one shape set."""

    artifact: Artifact
    shape_set: str
    runner: CudaRunner


@dataclass(frozen=True)
class Called:
    """A timed call: its time, the candidate's outputs, and the seed of the contents it was given."""

    sample: Sample
    out: Block | None
    seed: int


class GpuJudge:
    """The server side. One method per request; each returns a JSON-able dict (and maybe a blob)."""

    def __init__(self, task: Task, baseline: str, device: torch.device) -> None:
        self.task = task
        self.baseline = baseline
        self.device = device
        relaxed = task.precision != "strict"
        torch.backends.cuda.matmul.allow_tf32 = relaxed
        torch.backends.cudnn.allow_tf32 = relaxed
        self.driver = Driver()
        self.facts = cuda.facts(device.index or 0)
        self.watch = Stopwatch(self.device, self.facts.l2_bytes, Clocks(self.facts.uuid))
        self.sets: dict[str, ShapeSet] = {}
        self.arms: dict[int, Arm] = {}
        self.rng = random.Random(secrets.randbits(62))
        self._next = 0

    # -- shape sets ------------------------------------------------------------------------------------------

    def describe(self, shape_sets: list[str]) -> tuple[dict[str, Any], bytes]:
        """Build the references; return facts, specs per shape set and, as blob, the compile signature."""
        signature = gpu_signature.signature(self.task, shape_sets)
        described = {}
        for name in shape_sets:
            chosen = self.sets[name] = self._shape_set(name)
            described[name] = {
                "inputs": [_listed(spec) for spec in chosen.inputs],
                "state": {key: _listed(spec) for key, spec in chosen.state.items()},
                "outputs": [_listed(spec) for spec in chosen.outputs],
                "work": asdict(chosen.work),
            }
            torch.cuda.empty_cache()
        return {"shapes": described, "facts": self.facts.to_dict()}, signature.to_bytes()

    def _shape_set(self, name: str) -> ShapeSet:
        reference = self.task.reference(name, seed=0, device=str(self.device))
        arguments = self._draw(name, 0)
        tensors = [a for a in arguments if isinstance(a, Tensor)]
        counted = work.count(reference, arguments)
        outputs = tuple(TensorSpec.of(t) for t in reference(*arguments))
        chosen = ShapeSet(
            name,
            reference,
            [None if isinstance(a, Tensor) else a for a in arguments],
            tuple(TensorSpec.of(t) for t in tensors),
            outputs,
            counted,
            {key: TensorSpec.of(t) for key, t in reference.state.items()},
        )
        given, wanted = Placement.of(chosen.inputs), Placement.of(outputs)
        roomy = 6 * (given.size + wanted.size) < torch.cuda.mem_get_info(self.device)[0]
        chosen.given = [Block(given, self.device) for _ in range(2 if roomy else 1)]
        chosen.wanted = [Block(wanted, self.device) for _ in range(2 if roomy else 1)]
        chosen.held = Block(Placement.of(tuple(chosen.state.values())), self.device)
        self._hold(chosen)
        return chosen

    def measure(self) -> dict[str, Any]:
        """The device's peaks."""
        torch.cuda.empty_cache()
        return cuda.measure(self.device.index).to_dict()

    # -- contents --------------------------------------------------------------------------------------------

    def _draw(self, name: str, seed: int, distribution: str = "task") -> list[Any]:
        return self.task.inputs(name, seed, distribution, device=str(self.device))

    def _fill(self, chosen: ShapeSet, seed: int, distribution: str = "task") -> Block:
        """Fresh contents at a fresh place."""
        block = chosen.given[0]
        chosen.given.append(chosen.given.pop(0))
        block.jump(self.rng)
        drawn = [a for a in self._draw(chosen.name, seed, distribution) if isinstance(a, Tensor)]
        _copy(block.tensors, drawn)
        return block

    def _blank(self, chosen: ShapeSet) -> Block:
        """A fresh place for outputs."""
        block = chosen.wanted[0]
        chosen.wanted.append(chosen.wanted.pop(0))
        block.jump(self.rng)
        return block

    def _hold(self, chosen: ShapeSet) -> None:
        """Give the candidates a copy of the reference's state as it is now."""
        assert chosen.held is not None
        chosen.held.jump(self.rng)
        poison(chosen.held.bytes, chosen.held.placement.used, 0)
        _copy(chosen.held.tensors, list(chosen.reference.state.values()))

    def _arguments(self, chosen: ShapeSet, tensors: list[Tensor]) -> list[Any]:
        """The reference's arguments with these tensors in their places."""
        left = iter(tensors)
        of_tensors = len(chosen.plain) - len(chosen.inputs)
        plain = [a for a in chosen.plain if a is not None]
        if of_tensors == len(plain):
            return [next(left) if a is None else a for a in chosen.plain]
        raise UserError(f"task {self.task.name}: an input is None; give every input a value")

    # -- arms ------------------------------------------------------------------------------------------------

    def load(self, shape_set: str, blob: bytes) -> dict[str, Any]:
        """Load an artifact's kernels afresh; the number it goes by from now on."""
        artifact = Artifact.from_bytes(blob)
        chosen = self.sets[shape_set]
        try:
            runner = self._runner(artifact, chosen)
        except PlanError as error:
            raise Died("constraints", str(error), fatal=False) from None
        number = self._next
        self._next += 1
        self.arms[number] = Arm(artifact, shape_set, runner)
        return {"arm": number}

    def _runner(self, artifact: Artifact, chosen: ShapeSet, **options: Any) -> CudaRunner:
        return CudaRunner(
            artifact,
            chosen.name,
            chosen.given[0].tensors,
            chosen.parameters,
            driver=self.driver,
            device=self.device,
            outputs=chosen.wanted[0].tensors,
            **options,
        )

    def unload(self, arm: int) -> dict[str, Any]:
        gone = self.arms.pop(arm, None)
        if gone is not None:
            gone.runner.close()
        return {}

    def tune(self, arm: int, patience: float) -> dict[str, Any]:
        """Race the alternatives of every launch; the arm goes on with the fastest. The picks by step."""
        one = self.arms[arm]
        chosen = self.sets[one.shape_set]
        plan = one.artifact.plans[one.shape_set]
        picks = dict.fromkeys(plan.choices, 0)
        for step, count in plan.choices.items():
            best = float("inf")
            for number in range(count):
                trial = self._picked(one, {**picks, step: number})
                try:
                    with _fatal():
                        runner = self._runner(trial, chosen)
                    seconds = sorted(
                        self._call(chosen, runner, patience).sample.seconds for _ in range(TUNING_ROUNDS)
                    )[1]
                except Died as died:
                    if died.fatal:
                        raise
                    continue  # more than this device has: another one will do
                runner.close()
                if seconds < best:
                    best, picks[step] = seconds, number
        if picks:
            one.runner.close()
            one.artifact = self._picked(one, picks)
            one.runner = self._runner(one.artifact, chosen)
        return {"picks": picks}

    @staticmethod
    def _picked(arm: Arm, picks: dict[int, int]) -> Artifact:
        plan = arm.artifact.plans[arm.shape_set].choose(picks)
        return replace(arm.artifact, plans={**arm.artifact.plans, arm.shape_set: plan})

    # -- running a candidate ---------------------------------------------------------------------------------

    def _finish(self, run: Callable[[], object], patience: float) -> None:
        """Run device code of a candidate to its end. Raises ``Died``."""
        with _fatal():
            run()
            done = torch.cuda.Event()
            done.record()
            _wait(done, patience)
            torch.cuda.synchronize(self.device)

    def _call(self, chosen: ShapeSet, runner: CudaRunner | None, patience: float) -> Called:
        """One timed call of a candidate or, without a runner, of the baseline, on contents of its own.

        Again with other contents while enqueuing it took longer than the spin that hides it.
        """
        for _ in range(HIDDEN_TRIES):
            seed = self.rng.getrandbits(60)
            block = self._fill(chosen, seed)
            if runner is None:
                assert chosen.baseline is not None
                arguments = self._arguments(chosen, block.tensors)
                baseline = chosen.baseline
                sample = self.watch.time(lambda: baseline(*arguments), patience)  # noqa: B023
                out = None
            else:
                out = self._blank(chosen)
                out.bytes.fill_(0xFF)
                with _fatal():
                    runner.place(block.tensors, chosen.parameters, out.tensors)
                    sample = self.watch.time(runner.run, patience)
            if sample.hidden:
                break
        return Called(sample, out, seed)

    # -- checking --------------------------------------------------------------------------------------------

    def check(
        self, arm: int, cases: list[tuple[int, str, int]], touch_seed: int, touched: bool, patience: float
    ) -> dict[str, Any]:
        """Every case; then, if ``touched``, two calls whose contents differ in one element of every tensor."""
        one = self.arms[arm]
        chosen = self.sets[one.shape_set]
        memory = plan_memory(one.runner.plan, reuse=False, red_zone=RED_ZONE, alignment=ALIGNMENT)
        arena = torch.empty(memory.size, dtype=torch.uint8, device=self.device)
        runner = self._runner(one.artifact, chosen, memory=memory, arena=arena)
        answer = self._cases(chosen, runner, cases, touch_seed, touched, patience)
        runner.close()  # not after a fault: unloading waits for a kernel that hangs
        return answer

    def _cases(
        self,
        chosen: ShapeSet,
        runner: CudaRunner,
        cases: list[tuple[int, str, int]],
        touch_seed: int,
        touched: bool,
        patience: float,
    ) -> dict[str, Any]:
        worst = {"max_abs": 0.0, "rel_l2": 0.0, "ratio": 0.0}
        for index, (seed, distribution, state_seed) in enumerate(cases):
            if state_seed:
                chosen.reference.randomize(state_seed)
            self._hold(chosen)
            out, reason = self._checked_call(chosen, runner, seed, distribution, index % 2, patience)
            if reason:
                return {"reason": reason, "case": index, "damage": True}
            if state_seed:
                chosen.reference.randomize(state_seed)
            verdict = self._verdict(chosen, self._draw(chosen.name, seed, distribution), out.tensors)
            if verdict is None:
                continue  # the reference itself has no answer here
            if not verdict.ok:
                return {"reason": verdict.reason, "pattern": verdict.pattern, "case": index}
            worst = {key: max(value, float(getattr(verdict, key))) for key, value in worst.items()}
        if touched:
            verdict = self._touched(chosen, runner, cases[0], touch_seed, patience)
            if verdict is not None and not verdict.ok:
                return {"reason": verdict.reason, "touched": True}
        return worst

    def _checked_call(
        self,
        chosen: ShapeSet,
        runner: CudaRunner,
        seed: int,
        distribution: str,
        pattern: int,
        patience: float,
    ) -> tuple[Block, str]:
        """Run on poisoned memory; the outputs, and what was written where nothing may be, in words."""
        given, out, held = self._fill(chosen, seed, distribution), self._blank(chosen), chosen.held
        assert held is not None
        self._ring(given)
        poison(out.bytes, out.placement.used, pattern)
        memory = runner._memory
        poison(runner._arena, memory.used, pattern)
        runner.scratch.fill_(0xFF if pattern == 0 else 0x5A)
        with _fatal():
            runner.place(given.tensors, chosen.parameters, out.tensors)
        self._finish(runner.run, patience)
        for what, block, used in (
            ("outputs", out.bytes, out.placement.used),
            ("intermediates", runner._arena, memory.used),
            ("inputs", given.bytes, given.placement.used),
            ("parameters", held.bytes, held.placement.used),
        ):
            if (byte := damaged(block, used)) is not None:
                return out, f"wrote outside of its {what}: " + _nearest(byte, used, what[:-1])
        drawn = [a for a in self._draw(chosen.name, seed, distribution) if isinstance(a, Tensor)]
        for index, (tensor, before) in enumerate(zip(given.tensors, drawn)):
            if not same_bits(tensor, before):
                return out, f"wrote to input {index}, which is read-only"
        for name, tensor in chosen.parameters.items():
            if not same_bits(tensor, chosen.reference.state[name]):
                return out, f"wrote to parameter {name}, which is read-only"
        return out, ""

    @staticmethod
    def _ring(block: Block) -> None:
        """Put the red zones around contents that are in place already."""
        kept = [tensor.clone() for tensor in block.tensors]
        poison(block.bytes, block.placement.used, 0)
        _copy(block.tensors, kept)

    def _touched(
        self,
        chosen: ShapeSet,
        runner: CudaRunner,
        case: tuple[int, str, int],
        touch_seed: int,
        patience: float,
    ) -> Verdict | None:
        """Twice the same contents, but for one element of every floating input and parameter."""
        seed, distribution, state_seed = case
        if state_seed:
            chosen.reference.randomize(state_seed)
        self._hold(chosen)
        given, out = self._fill(chosen, seed, distribution), self._blank(chosen)
        with _fatal():
            runner.place(given.tensors, chosen.parameters, out.tensors)
        self._finish(runner.run, patience)
        _touch([*given.tensors, *chosen.parameters.values()], touch_seed)
        self._finish(runner.run, patience)
        arguments = self._draw(chosen.name, seed, distribution)
        drawn = [a for a in arguments if isinstance(a, Tensor)]
        _touch([*drawn, *chosen.reference.state.values()], touch_seed)
        return self._verdict(chosen, arguments, out.tensors)

    def _verdict(self, chosen: ShapeSet, arguments: list[Any], outputs: list[Tensor]) -> Verdict | None:
        """The verdict on outputs for these contents, worst output first; None if most of the oracle is not finite."""
        references = chosen.reference(*arguments)
        oracles = chosen.reference.double()(*arguments)
        worst: Verdict | None = None
        for output, reference, oracle in zip(outputs, references, oracles, strict=True):
            expected = Expected(
                reference, oracle, self.task.precision, self.task.tolerance, chosen.work.reduction_length
            )
            if expected.mask is not None and float(expected.mask.double().mean()) < 0.5:
                return None
            verdict = judge_output(output, expected)
            if not verdict.ok:
                return verdict
            if worst is None or verdict.ratio > worst.ratio:
                worst = verdict
        return worst

    # -- racing ----------------------------------------------------------------------------------------------

    def warm(self, shape_set: str, own: int, other: int | None, baseline: bool) -> dict[str, Any]:
        """Everybody's first calls, on new parameter values; the seconds of each one's quickest."""
        chosen = self.sets[shape_set]
        if baseline and chosen.baseline is None:
            chosen.baseline = self._baseline(chosen)
        chosen.reference.randomize(self.rng.getrandbits(60))
        self._hold(chosen)
        self.driver.forget_persisting_lines()
        self.watch.warm_up()
        pace = {
            name: min(self._call(chosen, runner, PATIENCE).sample.seconds for _ in range(WARM_CALLS))
            for name, runner in self._contestants(own, other, baseline).items()
        }
        return {"pace": pace}

    def _contestants(self, own: int, other: int | None, baseline: bool) -> dict[str, CudaRunner | None]:
        found: dict[str, CudaRunner | None] = {"candidate": self.arms[own].runner}
        if other is not None:
            found["incumbent"] = self.arms[other].runner
        if baseline:
            found["baseline"] = None
        return found

    def race(
        self,
        shape_set: str,
        own: int,
        other: int | None,
        baseline: bool,
        rules: dict[str, Any],
        margin: float,
        patience: float,
    ) -> dict[str, Any]:
        """One race; see ``race.race``. Contestants are compared on contents of their own, in the same round."""
        chosen = self.sets[shape_set]
        limits = Rules(**rules)
        full = {self.rng.randrange(limits.min_rounds)}
        samples: list[Sample] = []
        suspects: set[str] = set()
        counts = {"rounds": 0, "throttled": 0, "disputed": 0}

        def contestant(name: str, runner: CudaRunner | None) -> Callable[[], float]:
            def call() -> float:
                done = self._call(chosen, runner, patience)
                samples.append(done.sample)
                counts["disputed"] += done.sample.disputed and name == "candidate"
                if done.out is not None:
                    due = counts["rounds"] in full or self.rng.random() < FULL_CHECKS
                    if not self._plausible(chosen, done.seed, done.out, due):
                        suspects.add(name)
                return done.sample.seconds

            return call

        def usable() -> bool:
            throttled = self.watch.throttled(samples)
            counts["rounds"] += 1
            counts["throttled"] += throttled
            return not throttled or counts["throttled"] > limits.max_rounds

        named = self._contestants(own, other, baseline)
        result = race(
            {name: contestant(name, runner) for name, runner in named.items()},
            "incumbent" if other is not None else "baseline",
            draw=samples.clear,
            inspect=lambda: set(suspects),
            rng=self.rng,
            rules=limits,
            margin=margin,
            usable=usable,
        )
        torch.cuda.empty_cache()
        answer = {"seconds": result.seconds, "ended": result.ended, "suspects": sorted(result.suspects)}
        return {**answer, "values": result.test.values, "counts": counts}

    def _plausible(self, chosen: ShapeSet, seed: int, out: Block, full: bool) -> bool:
        """Whether what a timed call computed is right: by random blocks, by the oracle if they look wrong or are due."""
        arguments = self._draw(chosen.name, seed)
        if not full:
            expected = chosen.reference(*arguments)
            if all(self._agree(got, want) for got, want in zip(out.tensors, expected, strict=True)):
                return True
        verdict = self._verdict(chosen, arguments, out.tensors)
        return verdict is None or verdict.ok

    def _agree(self, output: Tensor, expected: Tensor) -> bool:
        """Whether random blocks agree to well within what separates right from wrong (not: from imprecise)."""
        flat, want = output.reshape(-1), expected.reshape(-1)
        n = flat.numel()
        if not n:
            return True
        starts = [
            self.rng.randrange(max(1, n - BLOCK + 1)) for _ in range(min(SAMPLED_BLOCKS, 1 + n // BLOCK))
        ]
        index = (torch.tensor(starts).unsqueeze(1) + torch.arange(min(BLOCK, n))).reshape(-1)
        a, b = flat[index], want[index]
        if not b.is_floating_point():
            return int((a != b).sum()) <= a.numel() // 100
        a, b = a.double(), b.double()
        finite = torch.isfinite(b)
        if not torch.equal(torch.isfinite(a), finite):
            return False
        b = torch.where(finite, b, 0.0)
        slack = {torch.float64: 1e-9, torch.float32: 1e-4}.get(expected.dtype, 2e-2)
        near = (torch.where(finite, a, 0.0) - b).abs() <= slack * (b.abs() + b.abs().max())
        return bool(near.all())

    def _baseline(self, chosen: ShapeSet) -> Callable[..., tuple[Tensor, ...]]:
        mode = COMPILE_MODES.get(self.baseline)
        if mode is None:
            return chosen.reference
        compiled = chosen.reference.compiled(_MODES.get(mode, mode))
        arguments = self._draw(chosen.name, self.rng.getrandbits(60))
        for _ in range(2):
            compiled(*arguments)
        torch.cuda.synchronize(self.device)
        return compiled

    # -- afterwards ------------------------------------------------------------------------------------------

    def profile(self, arm: int, patience: float) -> dict[str, Any]:
        """Median seconds of every step, what each kernel takes of the device, and the kernels' share of a call."""
        one = self.arms[arm]
        chosen = self.sets[one.shape_set]
        given, out = self._fill(chosen, self.rng.getrandbits(60)), self._blank(chosen)
        with _fatal():
            one.runner.place(given.tensors, chosen.parameters, out.tensors)
            runs = [one.runner.step_times() for _ in range(PROFILE_RUNS)]
        middle = len(runs) // 2
        steps = [(name, sorted(run[i][1] for run in runs)[middle]) for i, (name, _) in enumerate(runs[0])]
        kinds = ["aten" if "." in name else "kernel" for name in one.runner.step_names]
        return {
            "steps": [(kind, name, seconds) for kind, (name, seconds) in zip(kinds, steps)],
            "resources": one.runner.resources(),
            "coverage": self._coverage(one, chosen, patience),
        }

    def _coverage(self, arm: Arm, chosen: ShapeSet, patience: float) -> float:
        """The share of a call that is gone when the plan runs without its own kernels."""
        plan = arm.artifact.plans[chosen.name]
        rest = tuple(step for step in plan.steps if not isinstance(step, Launch))
        if len(rest) == len(plan.steps):
            return 0.0
        if not arm.runner._calls:
            return 1.0
        library = replace(arm.artifact, binaries={}, plans={chosen.name: replace(plan, steps=rest)})
        without = self._runner(library, chosen)
        whole, part = [], []
        for _ in range(TUNING_ROUNDS):
            whole.append(self._call(chosen, arm.runner, patience).sample.seconds)
            part.append(self._call(chosen, without, patience).sample.seconds)
        return max(0.0, 1.0 - sorted(part)[1] / sorted(whole)[1])

    def mutants(self, shape_set: str, cases: list[tuple[int, str, int]]) -> dict[str, Any]:
        """Whether each mutant of the reference is rejected on one of the cases (design rule 8)."""
        chosen = self.sets[shape_set]
        results: dict[str, bool] = {}
        for seed, distribution, state_seed in cases:
            if state_seed:
                chosen.reference.randomize(state_seed)
            arguments = self._draw(shape_set, seed, distribution)
            other = self._draw(shape_set, seed + 1, distribution)
            for mutant in mutants.mutants(chosen.reference, arguments, other):
                verdict = self._verdict(chosen, arguments, list(mutant.outputs))
                rejected = verdict is not None and not verdict.ok
                results[mutant.name] = results.get(mutant.name, False) or rejected
            if all(results.values()):
                break
        return {"mutants": results}

    def self_verdict(self, shape_set: str) -> dict[str, Any]:
        """The reference judged as if it were a candidate."""
        chosen = self.sets[shape_set]
        arguments = self._draw(shape_set, self.rng.getrandbits(60))
        verdict = self._verdict(chosen, arguments, list(chosen.reference(*arguments)))
        return (verdict or Verdict(False, "most of what it computes is not finite")).to_dict()


class _fatal:
    """Device code of a candidate runs inside: what goes wrong is its fault, and mostly the end of the context."""

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        if error is None or isinstance(error, Died):
            return
        if isinstance(error, Hung):
            raise Died("timeout", str(error)) from error
        if isinstance(error, PlanError):
            raise Died("constraints", str(error), fatal=False) from error
        if isinstance(error, torch.OutOfMemoryError):
            raise Died(
                "constraints", f"not enough device memory: {_first_line(error)}", fatal=False
            ) from error
        if isinstance(error, (CudaError, RuntimeError)):
            fault = isinstance(error, CudaError) or "CUDA error" in str(error)
            raise Died("runtime", _first_line(error), fatal=fault) from error


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def _wait(event: torch.cuda.Event, patience: float) -> None:
    import time

    end = time.perf_counter() + patience
    while not event.query():
        if time.perf_counter() > end:
            raise Hung(patience)
        time.sleep(1e-5)


def _touch(tensors: list[Tensor], seed: int) -> None:
    """Give one element of every floating tensor its neighbour's value (what is sorted or positive stays so)."""
    chance = random.Random(seed)
    for tensor in tensors:
        if tensor.is_floating_point() and tensor.dim() and tensor.shape[-1] > 1 and tensor.numel():
            *outer, last = (chance.randrange(size) for size in tensor.shape)
            tensor[(*outer, last)] = tensor[(*outer, last - 1 if last else 1)]


def _copy(targets: list[Tensor], sources: list[Tensor]) -> None:
    with torch.no_grad():
        for target, source in zip(targets, sources, strict=True):
            target.copy_(source)


def _listed(spec: TensorSpec) -> list[Any]:
    return [list(spec.shape), list(spec.stride), spec.dtype]


def _nearest(byte: int, used: list[tuple[int, int]], what: str) -> str:
    distances = [
        (byte - o - n, f"past the end of {what} {i}") for i, (o, n) in enumerate(used) if byte >= o + n
    ] + [(o - byte, f"before {what} {i}") for i, (o, n) in enumerate(used) if byte < o]
    distance, where = min(distances, default=(byte, "off"))
    return f"{distance} bytes {where}"


def serve(channel: Channel, args: dict[str, Any], fds: list[int]) -> None:
    """Entry of the process: the first message carries the task, then requests until the parent leaves."""
    os.sched_setaffinity(0, args["cores"])  # OpenMP has bound this thread to one core
    _, blob = channel.recv(timeout=None)
    if args["baseline"] in COMPILE_MODES:
        torch._inductor.config.compile_threads = max(1, len(args["cores"]) // 2)
        Path("/tmp").mkdir(exist_ok=True)
    torch.set_num_threads(1)
    try:
        if not torch.cuda.is_available():
            raise UserError("no GPU")
        device = torch.device("cuda", args["device"])
        torch.cuda.set_device(device)
        torch.set_default_device(device)
        judge = GpuJudge(Task.from_bytes(blob), args["baseline"], device)
    except (UserError, RuntimeError, OSError, AssertionError) as error:
        channel.send({"no_device": _first_line(error)})
        return
    channel.send({})
    while True:
        try:
            header, blob = channel.recv(timeout=None)
        except EOFError:
            return
        request = header.pop("do")
        if blob:
            header["blob"] = blob
        try:
            answer = getattr(judge, request)(**header)
            channel.send(*answer) if isinstance(answer, tuple) else channel.send(answer)
        except Died as died:
            channel.send({"died": died.outcome, "log": died.log[:4000], "fatal": died.fatal})
            if died.fatal:
                os._exit(1)  # a lost context cannot be torn down in order
        except UserError as error:
            channel.send({"user_error": str(error)})
        except torch.OutOfMemoryError as error:
            torch.cuda.empty_cache()
            channel.send({"out_of_memory": _first_line(error)})
        except Exception as error:  # the parent turns it into a clear message about the task
            if isinstance(error, CudaError) and error.sticky:
                channel.send({"died": "runtime", "log": str(error), "fatal": True})
                os._exit(1)
            traceback.print_exc()
            channel.send({"task_error": f"{type(error).__name__}: {_first_line(error)}"})

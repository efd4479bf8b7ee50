"""What a GPU's judge works with: contents, the memory that kernels are given, timed calls, and verdicts."""

from __future__ import annotations

import random
import secrets
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, Union

import torch
from torch import Tensor

from ke_gym.errors import UserError
from ke_gym.evaluation import work
from ke_gym.evaluation.acceptance import (
    DRAWINGS,
    UNSEEN,
    Expected,
    Size,
    Verdict,
    blocks_agree,
    compare,
    largest,
)
from ke_gym.evaluation.gpu_memory import Block, Placement, lacks_memory, poison, taken_elsewhere
from ke_gym.evaluation.gpu_timing import Hung, Sample, Stopwatch
from ke_gym.languages.artifact import Artifact
from ke_gym.languages.plan import Plan, TensorSpec
from ke_gym.targets import cuda
from ke_gym.targets._memory import PlanError
from ke_gym.targets.cuda_driver import Clocks, CudaError, Driver, runtime
from ke_gym.targets.cuda_executor import CudaRunner
from ke_gym.tasks.inputs import separate
from ke_gym.tasks.task import Reference, Task

if TYPE_CHECKING:
    from ke_gym.evaluation.gpu_apart import Apart, ApartRunner
    from ke_gym.evaluation.gpu_host import HostRunner

Runner = Union[CudaRunner, "ApartRunner", "HostRunner"]
"""What runs a candidate: its plan here or in a process of its own, or its Python there."""
SAMPLED_BLOCKS = 32
TRIES = 4
SOAK_CALLS, SOAK_CHECKS, SOAK_SECONDS = 600, 12, 1.0


class Died(Exception):
    """A candidate's device code ended badly, or its ``rival``'s. ``fatal``: this process is of no more use."""

    def __init__(self, outcome: str, log: str, fatal: bool = True) -> None:
        super().__init__(log)
        self.outcome, self.log, self.fatal, self.rival = outcome, log, fatal, False


class Crowded(Died):
    """A candidate lacked memory that other processes have."""


@contextmanager
def foreign() -> Iterator[None]:
    """Device code of a candidate runs inside: what goes wrong is its fault, and mostly the end of the context.

    Raises ``Died`` for it, ``Crowded`` where others have the memory that it lacks.
    """
    try:
        yield
    except Hung as error:
        raise Died("timeout", str(error)) from error
    except PlanError as error:
        raise Died("constraints", str(error), fatal=False) from error
    except (CudaError, RuntimeError) as error:
        taken = taken_elsewhere(error) if lacks_memory(error) else None
        # What else was enqueued may still fault; torch's allocator speaks before anything is.
        fault = isinstance(error, CudaError) or "CUDA error" in str(error)
        if taken is None:
            raise Died("runtime", first_line(error), fatal=fault) from error
        kind = Crowded if taken else Died
        raise kind("constraints", f"not enough device memory: {first_line(error)}", fatal=fault) from error


def wait_for(run: Callable[[], object], patience: float, device: torch.device) -> None:
    """Run what enqueues work, and wait for its end. Raises ``Hung``."""
    run()
    done = runtime.Event()
    done.record()
    end = time.perf_counter() + patience
    while not done.query():
        if time.perf_counter() > end:
            raise Hung(patience)
        time.sleep(1e-5)
    torch.cuda.synchronize(device)


@dataclass
class ShapeSet:
    """What is kept of one shape set. ``plain`` are the arguments with None for every tensor.

    ``given`` and ``wanted`` are memory for inputs and outputs, used in turn; ``held`` is the candidates' copy of
    the state.
    """

    name: str
    reference: Reference
    plain: list[Any]
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    work: work.Work
    state: dict[str, TensorSpec]
    given: list[Block]
    wanted: list[Block]
    held: Block
    baseline: Callable[..., tuple[Tensor, ...]] | None = None
    calls: int = 1
    """How many calls of everybody make one time of a race."""
    sizes: Sequence[Size] = ()
    """Of each output on the task's own inputs: its root mean square, and its ``Expected.rounding``; the largest seen."""

    @property
    def parameters(self) -> dict[str, Tensor]:
        """The candidates' own copy of the state."""
        return dict(zip(self.state, self.held.tensors))


@dataclass(frozen=True)
class Called:
    """A timed call: its time, the candidate's outputs (None: the baseline's), the seed of what it was given."""

    sample: Sample
    outputs: list[Tensor] | None
    seed: int


class Stage:
    """One device, one task: everything that is drawn, run, timed and compared goes through here."""

    def __init__(self, task: Task, device: torch.device, driver: Driver) -> None:
        self.task = task
        self.device = device
        self.driver = driver
        self.facts = cuda.facts(device.index or 0)
        self.watch = Stopwatch(device, self.facts.l2_bytes, Clocks(self.facts.uuid))
        self.rng = random.Random(secrets.randbits(62))
        self.apart: Apart | None = None
        """The process that launches candidates' kernels, if it is not this one."""

    def shape_set(self, name: str) -> ShapeSet:
        """Build the reference of a shape set and the memory that kernels will work in."""
        reference = self.task.reference(name, seed=0, device=str(self.device))
        arguments = self.draw(name, 0)
        counted = work.count(reference, arguments)
        inputs = tuple(TensorSpec.of(a) for a in arguments if isinstance(a, Tensor))
        outputs = tuple(TensorSpec.of(t) for t in reference(*arguments))
        state = {key: TensorSpec.of(t) for key, t in reference.state.items()}
        plain = [None if isinstance(a, Tensor) else a for a in arguments]
        if plain.count(None) != len(inputs):
            raise UserError(f"task {self.task.name}: an input is None; give every input a value")
        del arguments
        given, wanted = Placement.of(inputs), Placement.of(outputs)
        roomy = 6 * (given.size + wanted.size) < torch.cuda.mem_get_info(self.device)[0]
        copies = 2 if roomy else 1
        chosen = ShapeSet(
            name, reference, plain, inputs, outputs, counted, state,
            [Block(given, self.device) for _ in range(copies)],
            [Block(wanted, self.device) for _ in range(copies)],
            Block(Placement.of(tuple(state.values())), self.device), sizes=[UNSEEN] * len(outputs),
        )  # fmt: skip
        self.hold(chosen)
        return chosen

    # -- contents --------------------------------------------------------------------------------------------

    def draw(self, name: str, seed: int, distribution: str = "task") -> list[Any]:
        """The task's arguments: on the device, a function of the seed, which no kernel can see."""
        return separate(self.task.inputs(name, seed, distribution, device=str(self.device)))

    def fill(self, chosen: ShapeSet, seed: int, distribution: str = "task") -> Block:
        """Fresh contents at a fresh place."""
        block = chosen.given[0]
        chosen.given.append(chosen.given.pop(0))
        block.jump(self.rng)
        copy_all(block.tensors, tensors_of(self.draw(chosen.name, seed, distribution)))
        return block

    def blank(self, chosen: ShapeSet, plan: Plan) -> Block:
        """A fresh place for what ``plan`` returns, laid out as it does (the reference may do otherwise)."""
        block = chosen.wanted[0]
        chosen.wanted.append(chosen.wanted.pop(0))
        block.jump(self.rng)
        block.lay(plan.return_specs)
        return block

    def hold(self, chosen: ShapeSet) -> None:
        """Give the candidates a copy of the reference's state as it is now."""
        chosen.held.jump(self.rng)
        poison(chosen.held.bytes, chosen.held.placement.used, 0)
        copy_all(chosen.held.tensors, list(chosen.reference.state.values()))

    # -- calls -----------------------------------------------------------------------------------------------

    def runner(self, artifact: Artifact, chosen: ShapeSet, **options: Any) -> Runner:
        """An artifact's kernels, loaded afresh. Raises ``PlanError``."""
        plan = artifact.plans[chosen.name]
        for index, (spec, wanted) in enumerate(zip(plan.return_specs, chosen.outputs, strict=True)):
            if spec.storage_bytes > wanted.storage_bytes:
                raise PlanError(
                    f"output {index} is spread over {spec.storage_bytes} bytes, the reference's over"
                    f" {wanted.storage_bytes}"
                )
        given, outputs = chosen.given[0].tensors, self.blank(chosen, plan).tensors
        if self.apart is not None:
            return self.apart.runner(artifact, chosen.name, given, chosen.parameters, outputs, **options)
        return CudaRunner(
            artifact, chosen.name, given, chosen.parameters, driver=self.driver, device=self.device, outputs=outputs,
            **options,
        )  # fmt: skip

    @contextmanager
    def loaded(self, artifact: Artifact, chosen: ShapeSet, **options: Any) -> Iterator[Runner]:
        """An artifact's kernels, loaded for this alone. Raises ``Died``; after a fault there is nothing to unload: that
        would wait for a kernel that hangs."""
        with foreign():
            runner = self.runner(artifact, chosen, **options)
        try:
            yield runner
        except Died as died:
            if not died.fatal:
                runner.close()
            raise
        runner.close()

    def run(self, runner: Runner, patience: float) -> None:
        """Run a candidate to its end. Raises ``Died``."""
        self._finish(runner, runner.run, patience)

    def _finish(self, runner: Runner, run: Callable[[], object], patience: float) -> None:
        if not isinstance(runner, CudaRunner):
            runner.patience = patience
        with foreign():
            wait_for(run, patience, self.device)

    def prepare(self, chosen: ShapeSet, runner: Runner, patience: float) -> None:
        """Run a candidate's preparation, if it has one, for the weights as they are, to its end.

        Before the contents of a call are drawn, so that nothing of them can be in it. Raises ``Died``.
        """
        if runner.plan.preparation is not None:
            self._finish(runner, lambda: runner.prepare(chosen.parameters), patience)

    def call(self, chosen: ShapeSet, runner: Runner | None, patience: float) -> Called:
        """One timed call of a candidate or, without a runner, of the baseline, on contents of its own.

        Again with other contents while enqueuing it took longer than the spin that hides it, or while the host's
        clock doubts the device's events: mostly this process had to wait for a core. A kernel whose events lie has
        them doubted every time.
        """
        for _ in range(TRIES):
            if runner is not None:
                self.prepare(chosen, runner, patience)
            seed = self.rng.getrandbits(60)
            block = self.fill(chosen, seed)
            outputs = None
            if runner is None:
                sample = self._timed_baseline(chosen, block, patience)
            else:
                out = self.blank(chosen, runner.plan)
                out.bytes.fill_(0xFF)
                with foreign():
                    runner.place(block.tensors, chosen.parameters, out.tensors)
                    sample, outputs = self._timed_outputs(runner, out.tensors, patience)
            if sample.hidden and not sample.disputed:
                break
        return Called(sample, outputs, seed)

    def settled(self, outputs: list[Tensor]) -> list[Tensor]:
        """Outputs as they are now, before anything is computed that they will be compared with: another process that
        launches kernels may still write to those it was lent."""
        return outputs if self.apart is None else [each.clone() for each in outputs]

    def timed(
        self,
        runner: Runner,
        patience: float,
        what: Literal["run", "prepare"] = "run",
        over: Callable[[], object] = int,
    ) -> Sample:
        """Time one run of a candidate, or of its preparation, on what it has; ``over`` is called right after it."""
        if isinstance(runner, CudaRunner):
            return self.watch.time(getattr(runner, what), patience, over=over)
        return runner.timed(what, patience, self.watch.mhz(), over)

    def _timed_outputs(
        self, runner: Runner, outputs: list[Tensor], patience: float
    ) -> tuple[Sample, list[Tensor]]:
        """A timed run and its outputs; of one launched apart as they were when it said that it had ended."""
        if self.apart is None:  # what these are is the judge's alone
            return self.timed(runner, patience), outputs
        kept: list[Tensor] = []
        sample = self.timed(runner, patience, over=lambda: kept.extend(each.clone() for each in outputs))
        return sample, kept

    def _timed_baseline(self, chosen: ShapeSet, block: Block, patience: float) -> Sample:
        left, baseline = iter(block.tensors), chosen.baseline or chosen.reference
        arguments = [next(left) if a is None else a for a in chosen.plain]
        return self.watch.time(lambda: baseline(*arguments), patience)

    def soak(self, chosen: ShapeSet, runner: Runner, patience: float) -> bool:
        """Call a candidate many times more, nobody knows how often; whether it stays right.

        What is honest only for its first calls shows itself, if not by then.
        """
        self.prepare(chosen, runner, patience)
        end, block = time.perf_counter() + SOAK_SECONDS, None
        for number in range(calls := self.rng.randrange(SOAK_CALLS // 2, SOAK_CALLS), 0, -1):
            last = number == 1 or time.perf_counter() > end
            if block is None:
                seed = self.rng.getrandbits(60)
                block, out = self.fill(chosen, seed), self.blank(chosen, runner.plan)
            outputs = self._computed(chosen, runner, block, out, patience)
            if last or self.rng.random() < SOAK_CHECKS / calls:
                if not self.plausible(chosen, runner, seed, self.settled(outputs), patience, full=False):
                    return False
                block = None
            if last:
                break
        return True

    def _computed(
        self, chosen: ShapeSet, runner: Runner, block: Block, out: Block, patience: float
    ) -> list[Tensor]:
        """What an untimed call gives, in ``out``. Raises ``Died``."""
        out.bytes.fill_(0xFF)
        with foreign():
            runner.place(block.tensors, chosen.parameters, out.tensors)
        self.run(runner, patience)
        return out.tensors

    # -- verdicts --------------------------------------------------------------------------------------------

    def expected(
        self, chosen: ShapeSet, arguments: list[Any], distribution: str = "task"
    ) -> Iterator[Expected]:
        """What is right for these contents, output by output.

        Of zeros, outputs are often differences of equal numbers: what rounding leaves is measured against their ``sizes``.
        """
        task, length = self.task, chosen.work.reduction_length
        references = chosen.reference(*arguments)
        oracles = chosen.reference.double()(*arguments)
        seen = []
        for reference, oracle, (size, rounding) in zip(references, oracles, chosen.sizes, strict=True):
            scale = size if distribution == "zeros" else 0.0
            one = Expected(reference, oracle, task.precision, task.tolerance, length, scale, rounding)
            seen.append(one.size)
            yield one
        if distribution == "task":
            chosen.sizes = largest(chosen.sizes, seen)

    def verdict(
        self,
        chosen: ShapeSet,
        arguments: list[Any],
        outputs: list[Tensor],
        distribution: str = "task",
        again: Callable[[int], tuple[list[Any], list[Tensor]]] | None = None,
    ) -> Verdict | None:
        """The verdict on outputs for these contents: the worst output's; None if little of the oracle is finite.

        A close call is decided by more contents, if ``again`` gives them: arguments, and what the candidate makes of them.
        """
        try:
            verdict, pool = compare(outputs, map(_finite, self.expected(chosen, arguments, distribution)))
        except _Unknown:
            return None
        if pool is None or again is None:
            return verdict
        for drawing in range(1, DRAWINGS):
            arguments, outputs = again(drawing)
            with suppress(_Unknown):
                pool.add(outputs, map(_finite, self.expected(chosen, arguments, distribution)))
        return pool.verdict()

    def plausible(
        self, chosen: ShapeSet, runner: Runner, seed: int, outputs: list[Tensor], patience: float, full: bool
    ) -> bool:
        """Whether what a timed call computed is right.

        By random blocks against the reference; by the oracle if those look wrong or ``full`` asks for it.
        """
        arguments = self.draw(chosen.name, seed)
        if not full:
            expected = chosen.reference(*arguments)
            if all(
                blocks_agree(got, want, SAMPLED_BLOCKS, self.rng.randrange, rounding)
                for got, want, (_, rounding) in zip(outputs, expected, chosen.sizes, strict=True)
            ):
                return True

        def again(_: int) -> tuple[list[Any], list[Tensor]]:
            seed = self.rng.getrandbits(60)
            self.prepare(chosen, runner, patience)
            block, out = self.fill(chosen, seed), self.blank(chosen, runner.plan)
            computed = self.settled(self._computed(chosen, runner, block, out, patience))
            return self.draw(chosen.name, seed), computed

        verdict = self.verdict(chosen, arguments, outputs, again=again)
        return verdict is None or verdict.ok


class _Unknown(Exception):
    """Little of what is expected is finite."""


def _finite(expected: Expected) -> Expected:
    if expected.mask is not None and 2 * expected.count < expected.reference.numel():
        raise _Unknown
    return expected


def tensors_of(arguments: list[Any]) -> list[Tensor]:
    return [a for a in arguments if isinstance(a, Tensor)]


def copy_all(targets: list[Tensor], sources: list[Tensor]) -> None:
    with torch.no_grad():
        for target, source in zip(targets, sources, strict=True):
            target.copy_(source)


def first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]

"""The evaluator for one NVIDIA GPU: the same rules as on the CPU, with all device code in the judge's process."""

from __future__ import annotations

import os
import random
import secrets
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

import torch

from ke_gym.candidate import Candidate
from ke_gym.errors import UserError
from ke_gym.evaluation.account import ALONE, Account
from ke_gym.evaluation.arms import ArmDied
from ke_gym.evaluation.builder import BUILD_SECONDS, Builder
from ke_gym.evaluation.builds import Builds
from ke_gym.evaluation.checking import CASES, Rejected, draw_cases, errors_of, refusal
from ke_gym.evaluation.contest import CONFIRM, RACE, SOAK, believe
from ke_gym.evaluation.evaluation import BASELINES, Errors, Evaluation, Profile
from ke_gym.evaluation.evaluator import Evaluator
from ke_gym.evaluation.gpu_client import GpuClient, OutOfDeviceMemory
from ke_gym.evaluation.gpu_inspection import Inspector
from ke_gym.evaluation.gpu_lock import DeviceLock
from ke_gym.evaluation.gpu_profile import described, limiter
from ke_gym.evaluation.gpu_setting import Lanes, arch_of, gpu_environment, kept_peaks, kept_zygote
from ke_gym.evaluation.gpu_spares import Spares
from ke_gym.evaluation.gpu_tools import Replayed
from ke_gym.evaluation.race import Race, Rules
from ke_gym.evaluation.record import CONFIRMATIONS, MachineRecord, home
from ke_gym.evaluation.selfcheck import Proof
from ke_gym.languages.artifact import Artifact
from ke_gym.languages.cubin import is_cubin
from ke_gym.languages.plan import Launch, Plan, TensorSpec
from ke_gym.targets import cuda
from ke_gym.tasks.task import Task

T = TypeVar("T")
DISPUTED = 0.25
"""A candidate whose events claim less than the host's clock saw in more than this share of its calls is refused.

On a busy host the clock is read late now and then: for everybody, so what the baseline was doubted for is taken off."""

UNPROMISING = 6
"""A device's times scatter so little that so many rounds tell most losers."""
FRESH_ROUNDS = 12
"""Rounds of a confirmation's first race: that a kernel stays honest, the soak before it shows."""
AA_SELDOM = 30
"""A device's calls scatter little and alike on every day: once their floor is on record, a race of equals comes after so
many evaluations."""
OPENING_MEMORY_S, MEMORY_S = 30.0, 180.0
"""How long memory that other processes have is waited for, to open with and to judge with: other searches' checks come to an
end, and a candidate cannot help them."""
CONTEXT_BYTES = 1 << 29
"""What a process takes of the device's memory before it has allocated anything."""
SPARE_SHARE = 0.3


@dataclass(frozen=True)
class Entry:
    """One contestant: the number its kernels go by in the judge, and the shape set they are loaded for."""

    number: int
    shape_set: str


class Lacking:
    """What was tried and lacked memory: whether it should be tried again."""

    def __init__(self, account: Account, seconds: float) -> None:
        self._account, self._seconds = account, seconds
        self._first: float | None = None

    def again(self, error: OutOfDeviceMemory) -> bool:
        """Once at any rate; then, after a while, as long as others have what is lacking."""
        if self._first is None:
            self._first = time.monotonic()
        elif not error.elsewhere or time.monotonic() - self._first > self._seconds:
            return False
        if error.elsewhere:
            with self._account.phase("waiting for memory"):
                time.sleep(random.uniform(1.0, 4.0))
        return True


class GpuEvaluator(Evaluator):
    """Judges candidates for one task on one GPU; see ``Evaluator``.

    ``device`` is its number among those that CUDA shows. A task whose GPU sizes do not fit into the device's
    memory is judged at its CPU sizes; ``contract`` says which are used. ``beside`` is the evaluator of the same
    task on another GPU: they share builds, and shape sets. Raises ``UserError`` where there is no GPU.
    """

    judge: GpuClient  # type: ignore[assignment]
    facts: cuda.Facts  # type: ignore[assignment]
    peaks: cuda.Peaks  # type: ignore[assignment]
    watchful = True

    def __init__(
        self,
        task: Task,
        target: str = "cuda",
        baseline: str = "eager",
        threads: int | None = None,
        folder: Path | None = None,
        shape_sets: Sequence[str] = (),
        build_timeout: float = BUILD_SECONDS,
        call_timeout: float | None = None,
        device: int = 0,
        beside: GpuEvaluator | None = None,
    ) -> None:
        if baseline not in BASELINES:
            raise UserError(f"baseline {baseline!r} is unknown; choose {', '.join(BASELINES)}")
        self.task, self.target, self.baseline = task, target, baseline
        self.threads = threads or 1
        self.folder = folder or home()
        self._device = device
        self._lock: DeviceLock | None = None
        self.account = beside.account if beside else Account()
        self.build_timeout = build_timeout
        self.call_timeout = call_timeout
        self._rng = random.Random(secrets.randbits(64))
        lanes = beside._lanes if beside else None
        self._lanes: Lanes = Lanes(len(os.sched_getaffinity(0)), lanes)
        self._cores = self._lanes
        self._builds = beside._builds if beside else Builds(self._cores)
        # What was found fastest on one device is taken to be on its like.
        self._settled: dict[str, Artifact] = beside._settled if beside else {}
        self._tuned: dict[str, frozenset[str]] = beside._tuned if beside else {}
        self._signature: bytes = beside._signature if beside else b""
        self._too_large: str = beside._too_large if beside else ""
        self._spares = Spares(self._open_spare, 0)
        self._evaluated = 0
        self._steady: Artifact | None = None
        self._steady_s = 0.0
        self._profiled: dict[str, Any] = {}
        self._inspector = Inspector(self._replayed, self._undisturbed, lambda: self.account.total(ALONE))
        self._state = ExitStack()
        try:
            self.zygote = kept_zygote(self.threads, tuple(gpu_environment(self.folder).items()))
            self.sandbox = self.zygote.sandbox_level
            self.builder = beside.builder if beside else Builder(self.zygote, self.folder / "builds")
            shape_sets = beside.shape_sets if beside else shape_sets
            self.judge = self._first_judge(list(shape_sets or task.public_shapes("cuda")), not beside)
            self._state.callback(lambda: self.judge.close())
            self.facts = self.judge.facts
            self.alike = self.judge.alike
            """The numbers of the GPUs like this one that CUDA shows, this one among them."""
            self.refused: dict[str, str] = beside.refused if beside else self._refusals()
            """The distributions on which the reference itself raises, and what it says."""
            self.cases = draw_cases(self._rng, self.refused)
            arch_of(self.facts)
            if not self.facts.clock_mhz and beside is None:
                warnings.warn(
                    "this GPU's clock cannot be read (is libnvidia-ml.so.1 there?): calls are timed without waiting for it to"
                    " rise, and those made while it is throttled count like others",
                    stacklevel=2,
                )
            self.record = MachineRecord(self.facts.fingerprint, self.folder)
            dtypes = {s.torch_dtype for s in self._specs(self.contract) if s.torch_dtype.is_floating_point}
            try:
                with self.judge.alone():  # another process may be measuring them
                    measured = kept_peaks(self.record.folder, lambda: self.judge.measure())
            except ArmDied as death:
                raise UserError(f"this GPU's peaks cannot be measured: {death.log}") from death
            self.peaks = measured.bounded_by(dtypes or {torch.float32}, task.precision)
        except BaseException:
            self._state.close()
            raise

    def prove(self) -> Proof | None:
        """See ``Evaluator.prove``; None, with a warning, for a task whose wrong versions do not fit beside it."""
        try:
            return self._with_memory(self._prove)
        except OutOfDeviceMemory as error:
            warnings.warn(f"{self.task.name} could not be proven before its search: {error}", stacklevel=2)
            return None

    def _prove(self) -> Proof | None:
        with self._lanes.all():
            self._revive()
        return super().prove()

    def _judged(
        self, base: Evaluation, artifact: Artifact, rival: Artifact | None, absent: str
    ) -> Evaluation:
        """See ``Evaluator._judged``."""
        base = base.replace(machine=self.facts.fingerprint)
        try:
            evaluation = self._with_memory(
                lambda: super(GpuEvaluator, self)._judged(base, artifact, rival, absent)
            )
        except OutOfDeviceMemory as error:
            evaluation = base.replace(outcome="constraints", log=str(error), rival="")
        if self._too_large:
            remark = f"{self._too_large} does not fit into this GPU's memory: judged at the sizes of {self.contract!r}"
            evaluation = evaluation.replace(log="\n".join(filter(None, (remark, evaluation.log))))
        if evaluation.improved and rival is not None and artifact.lane == "plan":
            evaluation = self._inspector.glance(evaluation, self._chosen(artifact))
        if self.facts.reads_host and not self.judge.apart:
            # Such kernels could have read and written the judge's own memory.
            remark = f"kernels could reach the judge's memory on this machine: {self.judge.why_not_apart}"
            log = "\n".join(filter(None, (evaluation.log, remark)))
            evaluation = evaluation.replace(trust="host", log=log)
        return evaluation

    def final(self, candidate: Candidate) -> Evaluation:
        """See ``Evaluator.final``: with ``compute-sanitizer``, whose findings refuse a kernel, and ``ncu``."""
        evaluation = self.evaluate(candidate)
        if not evaluation.correct:
            return evaluation
        artifact = self.settled(candidate)
        if artifact.lane == "host":
            said = "not looked at by compute-sanitizer or ncu: its own Python would have to run under them"
            return evaluation.replace(log="\n".join(filter(None, (evaluation.log, said))))
        return self._inspector.final(evaluation, artifact)

    def kernel_times(self, candidate: Candidate) -> dict[str, float]:
        """See ``Evaluator.kernel_times``."""
        artifact = self.settled(candidate)
        if artifact.lane == "host":
            raise UserError("Proton looks at plans alone, and this module's Python cannot be traced to one")
        return self._inspector.times(artifact)

    def compile_baseline(self, baseline: str) -> None:
        """See ``Evaluator.compile_baseline``; others may race on the device meanwhile."""

        def compile_all() -> None:
            with self._lanes.all(), self.account.phase("compiling the reference"):
                self._revive()
                for name in self.shape_sets:
                    self.judge.compile(name, baseline)

        self._with_memory(compile_all)
        self.baseline = baseline

    def ahead(self, candidate: Candidate, rival: Candidate) -> bool:
        """See ``Evaluator.ahead``; False, too, where there is no memory for both."""
        try:
            return self._with_memory(lambda: super(GpuEvaluator, self).ahead(candidate, rival))
        except OutOfDeviceMemory:
            return False

    def race_baseline(self, candidate: Candidate) -> tuple[float, tuple[float, float]]:
        """See ``Evaluator.race_baseline``."""

        def race() -> tuple[float, tuple[float, float]]:
            if not self.judge.alive and self.baseline != BASELINES[0]:
                self.compile_baseline(self.baseline)
            with self._lanes.all():
                self._revive()
            return super(GpuEvaluator, self).race_baseline(candidate)

        return self._with_memory(race)

    def _replayed(self, artifact: Artifact) -> Replayed:
        environment = gpu_environment(self.folder)
        return Replayed(self.task, artifact, self.contract, self._device, environment)

    def settled(self, candidate: Candidate) -> Artifact:
        """See ``Evaluator.settled``; once its launches' alternatives have been raced, with the fastest."""
        return self._raced(self._chosen(self.build(candidate)))

    def _chosen(self, artifact: Artifact) -> Artifact:
        """An artifact with what was found fastest of it, be it for another source that compiles to the same."""
        known = self._settled.get(artifact.binary_id)
        return artifact if known is None else replace(known, source=artifact.source)

    # -- setting up ------------------------------------------------------------------------------------------

    def _first_judge(self, shape_sets: list[str], may_shrink: bool) -> GpuClient:
        """The judge, at smaller sizes if those asked for, or the oracle's of them, do not fit."""
        self.shape_sets = shape_sets
        for smaller in (None, "cpu", "default") if may_shrink else (None,):
            if smaller is not None:
                if smaller in self.shape_sets or (smaller == "cpu" and "cpu" not in self.task.shapes):
                    continue
                self.shape_sets = [smaller]
                self._signature = b""
            self.contract = self.shape_sets[0]
            self.hidden = [name for name in self.task.hidden_shapes() if name not in self.shape_sets]
            lacking, again = Lacking(self.account, OPENING_MEMORY_S), True
            while again:
                try:
                    return self._one_that_fits()
                except OutOfDeviceMemory as error:
                    problem, again = error, error.elsewhere > 0 and lacking.again(error)
            self._too_large = self._too_large or f"the shape set {self.contract!r}"
        raise problem

    def _one_that_fits(self) -> GpuClient:
        """A judge that has come to a verdict at these sizes. Raises ``OutOfDeviceMemory``."""
        judge = self._open_judge(self.hidden)
        try:
            self._working_bytes = int(judge.self_verdict(self.contract)["peak"])
            return judge
        except ArmDied as death:
            judge.close()
            raise UserError(f"task {self.task.name} cannot be judged on this GPU: {death.log}") from death
        except BaseException:
            judge.close()
            raise

    def _with_memory(self, attempt: Callable[[], T]) -> T:
        """``attempt()``; where it lacks memory, once more in an empty process, and as long as others have that memory, up to
        ``MEMORY_S``. Raises ``OutOfDeviceMemory``."""
        lacking = Lacking(self.account, MEMORY_S)
        while True:
            try:
                return attempt()
            except OutOfDeviceMemory as error:
                with self._lanes.all():  # another thread may be at the judge
                    self.judge.close()
                if not lacking.again(error):
                    raise

    def _lock_of(self, uuid: str) -> DeviceLock:
        if self._lock is None:
            self._lock = DeviceLock(uuid, self.account)
        return self._lock

    @contextmanager
    def _undisturbed(self) -> Iterator[None]:
        """The device for this process alone: another one may be racing on it."""
        with self._lanes.all(), self.judge.alone():
            yield

    def _open_judge(self, hidden: Sequence[str] = ()) -> GpuClient:  # type: ignore[override]
        judge = GpuClient(
            self.zygote,
            self.task,
            [*self.shape_sets, *hidden],
            self.baseline,
            self._device,
            self.call_timeout or 5.0,
            self._signature,
            lock=self._lock or self._lock_of,
        )
        self._signature = judge.signature
        return judge

    def _refusals(self) -> dict[str, str]:
        """Asked before any candidate is there, whose faults could be taken for the reference's."""
        found = {}
        for distribution in dict.fromkeys(name for name, _ in CASES if name != "task"):
            self._revive()
            if why := self.judge.refuses(self.contract, distribution):
                found[distribution] = why
        self._revive()
        return found

    def _refused(self) -> dict[str, str]:
        """See ``Evaluator._refused``."""
        return self.refused

    def _revive(self) -> None:
        """Another judge, if this evaluator's own has ended."""
        if not self.judge.running():
            self.judge.close()
            self.judge = self._open_judge(self.hidden)

    def _specs(self, shape_set: str) -> list[TensorSpec]:
        shape = self.judge.shapes[shape_set]
        return [*shape.inputs, *shape.state.values(), *shape.outputs]

    def _compile(self, candidate: Candidate) -> Artifact:
        return self.builder.build(
            candidate.source,
            self.judge.signature,
            candidate.language,
            target="cuda",
            arch=arch_of(self.facts),
            multiprocessors=self.facts.cores,
            timeout=self.build_timeout,
        )

    @contextmanager
    def _entries(self, judge: GpuClient | None = None) -> Iterator[Any]:  # type: ignore[override]
        """Loads artifacts into a judge, the evaluator's own or another; unloads them all."""
        if judge is None:
            self._revive()
            judge = self.judge
        loaded: list[int] = []

        def open_entry(artifact: Artifact, shape_set: str) -> Entry:
            if artifact.lane == "host":
                if any(is_cubin(binary) for binary in artifact.binaries.values()):
                    raise ArmDied(
                        "constraints", "kernels of lang.cuda and Triton need a forward that can be traced"
                    )
                loaded.append(judge.load(artifact, shape_set))
                return Entry(loaded[-1], shape_set)
            settled = self._chosen(artifact)
            number = judge.load(settled, shape_set)
            loaded.append(number)
            tuned = self._tuned.get(settled.binary_id, frozenset())
            if shape_set not in tuned and open_to_choice(settled.plans[shape_set]):
                with self.account.phase("tuning"):
                    picks, graph = judge.tune(number, shape_set)
                plan = replace(settled.plans[shape_set].choose(picks), graph=graph)
                chosen = replace(settled, plans={**settled.plans, shape_set: plan})
                self._tuned[chosen.binary_id] = tuned | {shape_set}
                if chosen.binary_id != artifact.binary_id:
                    self._settled[artifact.binary_id] = chosen
            return Entry(number, shape_set)

        try:
            yield open_entry
        finally:
            for number in loaded:
                if judge.alive:
                    judge.unload(number)

    # -- checking and racing ---------------------------------------------------------------------------------

    def _check(self, artifact: Artifact, entries: dict[str, Entry], open_entry: Any) -> Errors:  # type: ignore[override]
        """Every case on every shape set, on seeds of this check's own; raises ``Rejected``."""
        worst = Errors(0.0, 0.0, 0.0)
        sets = dict(entries)
        for name in self.hidden if artifact.general else ():
            sets[name] = open_entry(artifact, name)
        for name, entry in sets.items():
            cases = draw_cases(self._rng, self.refused)
            cases = cases if name == self.contract else cases[:2]
            touch = self._rng.getrandbits(60)
            answer = self.judge.check(entry.number, name, cases, touch, touched=name in entries)
            if "reason" in answer:
                error = None if answer.get("damage") else errors_of(answer)
                raise Rejected("correctness", self._wrong(name, answer, cases), error)
            worst = worst.or_worse(errors_of(answer))
        return worst

    def _wrong(self, name: str, answer: dict[str, Any], cases: list[tuple[int, str, int]]) -> str:
        if answer.get("damage"):
            return str(answer["reason"])
        distribution = "" if answer.get("touched") else cases[answer["case"]][1]
        return refusal(answer, distribution, name in self.hidden)

    def _first_race(  # type: ignore[override]
        self, artifact: Artifact, rival: Artifact | None, entries: dict[str, Entry]
    ) -> dict[str, Race]:
        """See ``Evaluator._first_race``; with all that is timed of a candidate that does not win."""
        with self.judge.alone():
            rules = replace(RACE, unpromising=UNPROMISING)
            races = self._race_sets(self.judge, artifact, rival, rules, entries)  # type: ignore[arg-type]
            with self.account.phase("profiling"):
                self._profiled = self.judge.profile(entries[self.contract].number, self.contract)
        return races

    def _race(  # type: ignore[override]
        self, base: Evaluation, artifact: Artifact, rival: Artifact | None, entries: dict[str, Entry]
    ) -> Evaluation:
        """See ``Evaluator._race``; a lead that fresh processes do not confirm ends the one that told of it.

        Where memory and kernels lie in a process is the same at every race and may favour one side for as long as it lasts:
        seen as 12 leads of 1 to 2 % over one incumbent.
        """
        try:
            raced = super()._race(base, artifact, rival, entries)  # type: ignore[arg-type]
        finally:
            with self.account.phase("ending processes"):
                self._spares.close()
        if raced.confirmed and not raced.improved and self.judge.alive:
            with suppress(OutOfDeviceMemory):  # two do not fit: better this one than none
                other = self._open_judge(self.hidden)
                self.judge.close()
                self.judge = other
        return raced

    def _fresh_race(self, artifact: Artifact, rival: Artifact | None, rules: Rules) -> dict[str, Race]:
        """See ``Evaluator._fresh_race``; a confirmation's processes start together, before it, and end after it."""
        with self.account.phase("starting processes"):
            if rules is SOAK:
                self._spares = Spares(self._open_spare, self._spare_count(artifact, rival))
            spare = self._spares.take()
            judge = spare if spare is not None and spare.running() else self._fresh_judge()
        try:
            with self.account.phase("confirming"), ExitStack() as held:
                if rules is not SOAK:  # that one races after what need not be alone
                    held.enter_context(judge.alone())
                return self._race_sets(judge, artifact, rival, rules)  # type: ignore[arg-type]
        finally:
            if judge is not spare:
                judge.close()

    def _fresh_judge(self) -> GpuClient:
        """Another judge; where two do not fit into the device's memory, in the place of the evaluator's own."""
        try:
            return self._open_judge()
        except OutOfDeviceMemory:
            self.judge.close()
            return self._open_judge()

    def _open_spare(self) -> GpuClient:
        """A judge that has once come to a verdict: a device's code is loaded where it is first used."""
        judge = self._open_judge()
        try:
            with suppress(OutOfDeviceMemory):
                judge.self_verdict(self.contract)
            return judge
        except BaseException:
            judge.close()
            raise

    def _spare_count(self, artifact: Artifact, rival: Artifact | None) -> int:
        """As many judges as a confirmation needs, or as fit into a part of what is free of the device's memory.

        A module of the host lane has a process for every shape set, with contents and outputs of its own, and one beside
        them that does nothing.
        """
        specs = [spec for name in self.shape_sets for spec in self._specs(name)]
        kept = sum(2 * spec.storage_bytes for spec in specs)
        modules = sum(one is not None and one.lane == "host" for one in (artifact, rival))
        contexts = (2 if self.judge.apart else 1) + bool(modules) + modules * len(self.shape_sets)
        each = max(kept, self._working_bytes) + modules * kept + contexts * CONTEXT_BYTES
        return min(CONFIRMATIONS, int(SPARE_SHARE * self.judge.free_bytes() / each))

    def _race_set(  # type: ignore[override]
        self,
        judge: GpuClient,
        name: str,
        own: Entry,
        other: Entry | None,
        rules: Rules,
        baseline: bool = True,
    ) -> Race:
        rival = other.number if other is not None else None
        if rules is SOAK:
            if not judge.soak(own.number, name):
                raise Rejected("correctness", "right when checked, wrong after some hundred calls")
            with self.account.phase("starting processes"):
                self._spares.settle()  # until now nothing was timed
            rules = replace(CONFIRM, min_rounds=FRESH_ROUNDS, max_rounds=FRESH_ROUNDS)
        with judge.alone():
            pace = judge.warm(name, own.number, rival, baseline)
            margin = self.record.margin(pace["baseline" if other is None else "incumbent"])
            result, counts = judge.race(name, own.number, rival, rules, margin, baseline)
        believe(result)
        if counts["disputed"] - counts["doubted"] > DISPUTED * max(1, result.rounds):
            raise Rejected(
                "constraints", "the device's events claim less time than the host's clock measured"
            )
        return result

    def _maybe_aa(self) -> None:
        with suppress(OutOfDeviceMemory):  # the verdict of the candidate just judged stands
            super()._maybe_aa()

    def _aa_every(self) -> int:
        return AA_SELDOM if self.record.knows(self._steady_s) else super()._aa_every()

    # -- afterwards ------------------------------------------------------------------------------------------

    def _describe(self, base: Evaluation, artifact: Artifact, entry: Entry) -> Evaluation:  # type: ignore[override]
        """Profile, coverage, limiter, and the physical floor."""
        assert base.time_ms is not None
        work = self.judge.shapes[self.contract].work
        seconds = base.time_ms / 1e3
        # What was written may still lie in L2 when the call ends.
        written = sum(spec.storage_bytes for spec in self.judge.shapes[self.contract].outputs)
        moved = work.bytes - min(written, self.facts.l2_bytes)
        floor_s = self.peaks.floor_s(moved, work.floor_flops)
        if seconds < floor_s:
            self._revive()  # it made room for a confirmation
            ceiling = self.peaks.ceiling
            again = kept_peaks(self.record.folder, lambda: self.judge.measure(), again=True)
            self.peaks = replace(again, ceiling=ceiling)
            floor_s = self.peaks.floor_s(moved, work.floor_flops)
            if seconds < floor_s:
                raise Rejected(
                    "constraints",
                    f"{1e3 * seconds:.3g} ms is faster than this GPU can move the task's bytes or do its FLOPs "
                    f"({1e3 * floor_s:.3g} ms by measured peaks)",
                )
        answer = self._profiled
        profile: Profile = described(work, self.peaks, self.facts, seconds, floor_s, answer)
        return base.replace(
            profile=profile,
            limiter=limiter(profile, self.facts, seconds),
            preparation_ms=None if answer["preparation"] is None else 1e3 * answer["preparation"],
            kernel_coverage=None if answer["coverage"] is None else round(answer["coverage"], 4),
        )


def open_to_choice(plan: Plan) -> bool:
    """Whether there is more than one way to run a plan: other launches, or all of them as one CUDA graph."""
    return bool(plan.choices) or sum(isinstance(step, Launch) for step in plan.steps) > 1

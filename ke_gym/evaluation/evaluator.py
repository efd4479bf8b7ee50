"""The evaluator: build → check → race → confirm → profile, one candidate at a time per machine.

Builds run side by side, one per core; checks and races have the machine to themselves. Everything a verdict
rests on (clock, order, seeds, statistics) lives in this process, everything expected in the judge's.
"""

from __future__ import annotations

import itertools
import math
import random
import secrets
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from ke_gym.candidate import Candidate
from ke_gym.errors import UserError
from ke_gym.evaluation.admission import admit
from ke_gym.evaluation.arms import Arm, ArmDied, RivalFailed, open_arm
from ke_gym.evaluation.builder import BUILD_SECONDS, Builder
from ke_gym.evaluation.evaluation import BASELINES, Cost, Errors, Evaluation, Outcome, Profile
from ke_gym.evaluation.judge_client import JudgeClient, Shape
from ke_gym.evaluation.profile import limiter, profile
from ke_gym.evaluation.race import Race, Rules, confirm, planned, pooled, race
from ke_gym.evaluation.record import MachineRecord, home
from ke_gym.evaluation.stats import confidence_sequence
from ke_gym.evaluation.zygote import Zygote
from ke_gym.languages.artifact import Artifact
from ke_gym.languages.base import BuildError
from ke_gym.languages.plan import Call, Launch
from ke_gym.targets import cpu
from ke_gym.tasks.task import Task

CASES = (
    ("task", False),
    ("task", True),
    ("ties", False),
    ("offset", False),
    ("sparse", True),
    ("lognormal", False),
    ("zeros", True),
    ("special", False),
)
RACE = Rules()
CONFIRM = Rules(futile=1000, max_seconds=2.0, hopeless=math.inf, slow=math.inf)
# The first fresh process goes on for longer: a kernel that is honest only for its first calls shows itself.
SOAK = Rules(40, 1000, 40, max_seconds=6.0, hopeless=math.inf, slow=math.inf)
AA = Rules(min_rounds=48, futile=1000, max_rounds=48, max_seconds=2.0, hopeless=math.inf, slow=math.inf)
AA_EVERY = 10
COVERAGE_ROUNDS = 12
WARM_CALLS, WARM_SECONDS = 4, 0.05
KEPT_ARTIFACTS = 64


def draw_cases(rng: random.Random) -> list[tuple[int, str, int]]:
    """Secret (seed, distribution, state seed) of what every candidate of a session is checked on."""
    return [(rng.getrandbits(60), d, rng.getrandbits(60) if fresh_state else 0) for d, fresh_state in CASES]


class Rejected(Exception):
    """A candidate's evaluation ended early with this outcome; ``error`` is what its outputs were wrong by."""

    def __init__(self, outcome: Outcome, log: str, error: Errors | None = None) -> None:
        super().__init__(log)
        self.outcome: Outcome = outcome
        self.log = log
        self.error = error


@contextmanager
def rivals_fault() -> Iterator[None]:
    """What fails within is the incumbent's doing. Raises ``RivalFailed``."""
    try:
        yield
    except (BuildError, ArmDied) as failure:
        raise RivalFailed(failure.log) from failure


class Cores:
    """The machine's cores: builds take one each, a race takes them all. Knows how long anything held one."""

    def __init__(self, cores: int) -> None:
        self._condition = threading.Condition()
        self._cores = cores
        self._builds = 0
        self._racing = False
        self._since = 0.0
        self.busy_s = 0.0

    @contextmanager
    def one(self) -> Iterator[None]:
        with self._condition:
            self._condition.wait_for(lambda: not self._racing and self._builds < self._cores)
            self._start()
            self._builds += 1
        try:
            yield
        finally:
            with self._condition:
                self._builds -= 1
                self._stop()

    @contextmanager
    def all(self) -> Iterator[None]:
        with self._condition:
            self._condition.wait_for(lambda: not self._racing and not self._builds)
            self._start()
            self._racing = True
        try:
            yield
        finally:
            with self._condition:
                self._racing = False
                self._stop()

    def _start(self) -> None:
        if not self._builds:
            self._since = time.perf_counter()

    def _stop(self) -> None:
        if not self._builds:
            self.busy_s += time.perf_counter() - self._since
        self._condition.notify_all()


@dataclass
class Entry:
    """One contestant: its artifact, its process, and the number the judge knows its outputs by."""

    arm: Arm
    number: int


class Evaluator:
    """Judges candidates for one task on this machine's CPU.

    Args:
        task: what the candidates must compute.
        target: ``"cpu"``.
        baseline: what speedups are against: ``"eager"``, ``"compile"`` (``torch.compile``) or
            ``"max-autotune"`` (its mode of that name).
        threads: OpenMP threads for everybody; all cores by default.
        folder: where caches and the machine's record live; ``home()`` by default.
        shape_sets: what is checked and timed, first the one that counts; the task's public sets by default.
        build_timeout: seconds a build may take.
        call_timeout: seconds one call may take; by default far more than the task's work could need.

    Thread-safe: `evaluate` may be called from several threads; builds overlap, races do not.
    """

    def __init__(
        self,
        task: Task,
        target: str = "cpu",
        baseline: str = "eager",
        threads: int | None = None,
        folder: Path | None = None,
        shape_sets: Sequence[str] = (),
        build_timeout: float = BUILD_SECONDS,
        call_timeout: float | None = None,
    ) -> None:
        if target != "cpu":
            raise UserError(f"this evaluator is for the target cpu, not {target!r}; see open_evaluator")
        if baseline not in BASELINES:
            raise UserError(f"baseline {baseline!r} is unknown; choose {', '.join(BASELINES)}")
        self.task = task
        self.target = target
        self.baseline = baseline
        self.facts = cpu.facts()
        self.threads = self.facts.cores if threads is None else threads
        if not 1 <= self.threads <= self.facts.cores:
            raise UserError(f"--threads {threads}: choose 1 to {self.facts.cores}, the cores of this machine")
        self.folder = folder or home()
        self.record = MachineRecord(self.facts.fingerprint, self.folder)
        self._build_timeout = build_timeout
        self._call_timeout = call_timeout
        self._rng = random.Random(secrets.randbits(64))
        self._cores = Cores(self.facts.cores)
        self._artifacts: OrderedDict[str, Artifact] = OrderedDict()
        self._build_s: dict[str, float] = {}
        self._lock = threading.Lock()
        self._evaluated = 0
        self._steady: Artifact | None = None
        self._state = ExitStack()
        try:
            self.zygote = self._state.enter_context(Zygote(self.threads))
            self.sandbox = self.zygote.sandbox_level
            self.builder = Builder(self.zygote, self.folder / "builds")
            self.shape_sets = list(shape_sets or task.public_shapes(target))
            self.contract = self.shape_sets[0]
            self.hidden = [name for name in task.hidden_shapes() if name not in self.shape_sets]
            self.judge = self._open_judge(self.hidden)
            self._state.callback(lambda: self.judge.close())
            self.peaks = self._kept_peaks()
            self.cases = draw_cases(self._rng)
            self._touch_seed = self._rng.getrandbits(60)
        except BaseException:
            self._state.close()
            raise

    # -- public ----------------------------------------------------------------------------------------------

    def evaluate(self, candidate: Candidate, incumbent: Candidate | None = None) -> Evaluation:
        """Judge ``candidate``; race it against ``incumbent`` (and the baseline), or the baseline alone.

        An incumbent that fails in the race is left out of it: the log says so, and there is no gain then.
        Never raises for anything the candidate does; `UserError` for a broken task.
        """
        start = time.perf_counter()
        base = Evaluation(
            self.task.name,
            self.target,
            candidate.language,
            candidate.id,
            "correct",
            baseline=self.baseline,
            threads=self.threads,
            machine=self.facts.fingerprint,
            sandbox=self.sandbox,
        )
        try:
            artifact = self.build(candidate)
        except BuildError as error:
            spent = time.perf_counter() - start
            return base.replace(outcome=error.outcome, log=error.log, cost=Cost(compile_s=spent))
        rival, absent = None, ""
        if incumbent is not None and incumbent.id != candidate.id:
            try:
                with rivals_fault():
                    rival = self.build(incumbent)
                base = base.replace(rival=incumbent.id)
            except RivalFailed as failure:
                absent = str(failure)
        base = base.replace(trust=artifact.lane, binary=artifact.binary_id)
        with self._cores.all():
            compiled = time.perf_counter()
            cost = Cost(compile_s=self._build_s.pop(candidate.id, 0.0))
            checked = compiled
            try:
                while True:
                    try:
                        with self._entries() as open_entry:
                            entries = {name: open_entry(artifact, name) for name in self.shape_sets}
                            errors = self._check(artifact, entries, open_entry)
                            checked = time.perf_counter()
                            base = base.replace(error=errors)
                            base = self._race(base, artifact, rival, entries)
                            base = self._describe(base, artifact, entries[self.contract])
                        break
                    except RivalFailed as failure:  # once at most: from now on there is none
                        rival, absent, base = None, str(failure), base.replace(rival="")
            except (Rejected, ArmDied) as failure:
                if checked == compiled:
                    checked = time.perf_counter()
                wrong_by = failure.error if isinstance(failure, Rejected) else None
                base = base.replace(
                    outcome=failure.outcome, log=failure.log, error=wrong_by or base.error, speedup=None,
                    speedup_ci=None, gain=None, gain_ci=None, improved=False,
                )  # fmt: skip
            now = time.perf_counter()
            base = base.replace(cost=replace(cost, check_s=checked - compiled, race_s=now - checked))
            if base.improved:
                self._steady = artifact
            self._maybe_aa()
        if absent:
            said = f"the incumbent failed ({absent.splitlines()[0]}): raced against the baseline alone"
            base = base.alone().replace(log="\n".join(filter(None, (said, base.log))))
        return base

    def decide(self, candidate: Candidate, rival: Candidate) -> Evaluation:
        """Only the race, and the confirmation if it is won: no check, no cache, no record."""
        artifact, other = self.build(candidate), self.build(rival)
        base = Evaluation(self.task.name, self.target, candidate.language, candidate.id, "correct")
        with self._cores.all(), self._entries() as open_entry:
            entries = {name: open_entry(artifact, name) for name in self.shape_sets}
            return self._race(base, artifact, other, entries)

    def build(self, candidate: Candidate) -> Artifact:
        """The candidate's artifact, built in the sandbox unless it is known; raises `BuildError`."""
        with self._lock:
            known = self._artifacts.get(candidate.id)
            if known is not None and known.source == candidate.source:
                self._artifacts.move_to_end(candidate.id)
                return known
        with self._cores.one():
            start = time.perf_counter()
            artifact = self._compile(candidate)
            spent = time.perf_counter() - start
        self.adopt(candidate, artifact)
        with self._lock:
            self._build_s[candidate.id] = spent
        return artifact

    def adopt(self, candidate: Candidate, artifact: Artifact) -> None:
        """Take an artifact as the candidate's, wherever it was built; raises `BuildError` if it can't be."""
        wanted = {
            name: ((*shape.inputs, *shape.state.values()), shape.outputs)
            for name, shape in self.judge.shapes.items()
            if artifact.general or name not in self.hidden
        }
        admit(artifact, candidate.source, candidate.language, wanted)
        with self._lock:
            self._artifacts[candidate.id] = artifact
            while len(self._artifacts) > KEPT_ARTIFACTS:
                self._artifacts.popitem(last=False)

    def _compile(self, candidate: Candidate) -> Artifact:
        return self.builder.build(
            candidate.source, self.judge.signature, candidate.language, timeout=self._build_timeout
        )

    def artifact(self, candidate_id: str) -> Artifact | None:
        """The artifact of a recently built candidate."""
        with self._lock:
            return self._artifacts.get(candidate_id)

    @property
    def busy_s(self) -> float:
        """Seconds so far in which something was built, checked or raced."""
        return self._cores.busy_s

    def close(self) -> None:
        self._state.close()

    def __enter__(self) -> Evaluator:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    # -- setting up ------------------------------------------------------------------------------------------

    def _open_judge(self, hidden: Sequence[str] = ()) -> JudgeClient:
        return JudgeClient(self.zygote, self.task, [*self.shape_sets, *hidden], self.baseline, self.threads)

    def _kept_peaks(self, again: bool = False) -> cpu.Peaks:
        """The machine's peaks, as they bound this task."""
        shape = self.judge.shapes[self.contract]
        dtypes = {spec.torch_dtype for spec in (*shape.inputs, *shape.state.values(), *shape.outputs)}
        peaks = self.record.peaks(self.threads, self._measure_peaks, again)
        return peaks.bounded_by(dtypes, self.task.precision, self.facts.matrix_unit)

    def _measure_peaks(self, threads: int) -> cpu.Peaks:
        worker = self.zygote.spawn("ke_gym.targets.cpu:measure_worker", {"threads": threads})
        try:
            header, _ = worker.channel.recv(timeout=120)
        finally:
            worker.close()
        return cpu.Peaks(
            header["threads"], tuple((s, r) for s, r in header["bandwidth"]), header["fp32"], header["fp64"]
        )

    @contextmanager
    def _entries(self, judge: JudgeClient | None = None) -> Iterator[Any]:
        """Opens arms and shows their outputs to the judge; closes them all."""
        judge = judge or self.judge
        opened: list[Entry] = []

        def open_entry(artifact: Artifact, shape_set: str) -> Entry:
            shape = judge.shapes[shape_set]
            arm = open_arm(self.zygote, artifact, shape_set, shape.buffer, shape.layout, judge.signature)
            entry = Entry(arm, judge.attach_output(arm.output_layout, arm.output_buffer.fd))
            opened.append(entry)
            return entry

        try:
            yield open_entry
        finally:
            for entry in opened:
                entry.arm.close()
                judge.detach_output(entry.number)

    # -- checking --------------------------------------------------------------------------------------------

    def _check(self, artifact: Artifact, entries: dict[str, Entry], open_entry: Any) -> Errors:
        """Every case on every shape set; raises `Rejected`."""
        worst = Errors(0.0, 0.0, 0.0)
        sets = dict(entries)
        for name in self.hidden if artifact.general else ():
            sets[name] = open_entry(artifact, name)
        for name, entry in sets.items():
            cases = self.cases if name == self.contract else self.cases[:2]
            for index, (seed, distribution, state_seed) in enumerate(cases):
                verdict = self._check_case(name, entry, seed, distribution, state_seed, poison=index)
                worst = Errors(
                    max(worst.max_abs, verdict["max_abs"]),
                    max(worst.rel_l2, verdict["rel_l2"]),
                    max(worst.ratio, verdict["ratio"]),
                )
        for name, entry in entries.items():
            self._check_touched(name, entry)
            entry.arm.check_mode(None)
        return worst

    def _check_case(
        self, name: str, entry: Entry, seed: int, distribution: str, state_seed: int, poison: int
    ) -> dict[str, Any]:
        finite = self.judge.load(name, seed, distribution, state_seed)
        if finite < 0.5:
            return {"max_abs": 0.0, "rel_l2": 0.0, "ratio": 0.0}  # the reference itself has no answer here
        entry.arm.check_mode(poison % 2)
        entry.arm.call(self._patience(name))
        damage = entry.arm.damage()
        if damage:
            raise Rejected("correctness", damage)
        verdict = self.judge.check(name, entry.number)
        if not verdict["ok"]:
            hidden = name in self.hidden
            where = "a shape it claims to support (general = True)" if hidden else "the task's shapes"
            inputs = "inputs" if distribution == "task" else f"{distribution} inputs"
            detail = f"; wrong: {verdict['pattern']}" if verdict["pattern"] and not hidden else ""
            reason = f"wrong on {inputs} of {where}: {verdict['reason']}{detail}"
            raise Rejected("correctness", reason, errors_of(verdict))
        return verdict

    def _check_touched(self, name: str, entry: Entry) -> None:
        """Two calls whose inputs and parameters differ in one element each: what is remembered shows."""
        self.judge.load(name, *self.cases[0])
        entry.arm.check_mode(0)
        entry.arm.call(self._patience(name))
        self.judge.touch(name, self._touch_seed)
        entry.arm.call(self._patience(name))
        verdict = self.judge.check(name, entry.number)
        if not verdict["ok"]:
            raise Rejected(
                "correctness",
                f"wrong after one element of each input and parameter has changed: {verdict['reason']}; outputs "
                "may depend on nothing but the inputs and parameters of the call",
                errors_of(verdict),
            )

    def _patience(self, name: str) -> float:
        """Seconds one call may take before it counts as hung."""
        if self._call_timeout is not None:
            return self._call_timeout
        floor = self.judge.shapes[name].work.bytes / 1e8 + self.judge.shapes[name].work.flops / 1e9
        return max(5.0, 20 * floor)

    # -- racing ----------------------------------------------------------------------------------------------

    def _race(
        self, base: Evaluation, artifact: Artifact, rival: Artifact | None, entries: dict[str, Entry]
    ) -> Evaluation:
        against = "incumbent" if rival is not None else "baseline"
        first = self._race_sets(self.judge, artifact, rival, RACE, entries)
        main = first[self.contract]
        margin = self.record.margin(main.median(against))
        base = base.replace(rounds=sum(r.rounds for r in first.values()), log=_remark(main, against))
        sets: dict[str, list[Race]] = {name: [r] for name, r in first.items()}
        won = all(r.test.median > -margin for r in first.values()) and main.ended == "faster"
        gain, gain_ci, improved = _over_sets(sets, against)
        if won:
            confirmed: dict[str, list[Race]] = {name: [] for name in first}
            rounds = planned(main, against, margin)
            rules = replace(CONFIRM, min_rounds=rounds, max_rounds=rounds)

            def fresh(index: int) -> Race:
                races = self._fresh_race(artifact, rival, rules if index else SOAK)
                for name, one in races.items():
                    confirmed[name].append(one)
                return races[self.contract]

            _, _, main_improved = confirm(fresh, against, margin=margin)
            sets = confirmed
            gain, gain_ci, _ = _over_sets(sets, against)
            improved = main_improved and gain_ci[0] > margin
            if not improved:
                base = base.replace(log="a first lead did not hold in fresh processes")
        else:
            improved = False
        speedup, speedup_ci, _ = _over_sets(sets, "baseline")
        times = [s for r in sets[self.contract] for s in r.seconds["candidate"]]
        reference = [s for r in sets[self.contract] for s in r.seconds["baseline"]]
        return base.replace(
            time_ms=1e3 * float(np.median(times)),
            reference_ms=1e3 * float(np.median(reference)),
            times_ms=tuple(round(1e3 * t, 6) for t in times),
            reference_times_ms=tuple(round(1e3 * t, 6) for t in reference),
            races=tuple(r.rounds for r in sets[self.contract]),
            speedup=math.exp(speedup),
            speedup_ci=_factors(speedup_ci),
            gain=math.exp(gain),
            gain_ci=_factors(gain_ci),
            improved=improved,
            confirmed=won,
            shapes={n: math.exp(_over_sets({n: r}, "baseline")[0]) for n, r in sets.items()},
        )

    def _race_sets(
        self,
        judge: JudgeClient,
        artifact: Artifact,
        rival: Artifact | None,
        rules: Rules,
        entries: dict[str, Entry] | None = None,
        baseline: bool = True,
    ) -> dict[str, Race]:
        """Race on every public shape set, with the given candidate arms or fresh ones."""
        races = {}
        for name in self.shape_sets:
            with self._entries(judge) as open_entry:
                own = entries[name] if entries else open_entry(artifact, name)
                other = None
                if rival is not None:
                    with rivals_fault():
                        other = open_entry(rival, name)
                races[name] = self._race_set(judge, name, own, other, rules, baseline)
        return races

    def _race_set(
        self,
        judge: JudgeClient,
        name: str,
        own: Entry,
        other: Entry | None,
        rules: Rules,
        baseline: bool = True,
    ) -> Race:
        patience = self._patience(name)
        judge.renew(name, self._rng.getrandbits(60))
        # One timed output is compared with the oracle in full, and nobody knows which; others at random.
        full = {self._rng.randrange(rules.min_rounds)}
        rounds = itertools.count()
        contestants: dict[str, Callable[[], float]] = {"candidate": lambda: judge.net(own.arm.call(patience))}
        by_number = {own.number: "candidate"}
        if other is not None:

            def call_rival() -> float:
                with rivals_fault():
                    return judge.net(other.arm.call(patience))

            contestants["incumbent"] = call_rival
            by_number[other.number] = "incumbent"
        if baseline:
            contestants["baseline"] = lambda: judge.call_baseline(name)
        rival = "incumbent" if other is not None else "baseline"
        pace = {contestant: _warm(call) for contestant, call in contestants.items()}

        def inspect() -> set[str]:
            suspects = judge.fingerprint(name, list(by_number)) if baseline else []
            wrong = {n for n in suspects if not judge.check(name, n)["ok"]}
            due = next(rounds) in full or self._rng.random() < 0.04
            if baseline and due and own.number not in wrong and not judge.check(name, own.number)["ok"]:
                wrong.add(own.number)
            return {by_number[n] for n in wrong}

        result = race(
            contestants,
            rival,
            draw=lambda: judge.draw(name, self._rng.getrandbits(60)),
            inspect=inspect,
            rng=self._rng,
            rules=rules,
            margin=self.record.margin(pace[rival]),
        )
        believe(result)
        return result

    def _fresh_race(self, artifact: Artifact, rival: Artifact | None, rules: Rules) -> dict[str, Race]:
        """The same race with new processes for everybody, the judge included, on new seeds."""
        judge = self._open_judge()
        try:
            return self._race_sets(judge, artifact, rival, rules)
        finally:
            judge.close()

    # -- afterwards ------------------------------------------------------------------------------------------

    def _describe(self, base: Evaluation, artifact: Artifact, entry: Entry) -> Evaluation:
        """Profile, coverage, limiter, and the physical floor."""
        assert base.time_ms is not None
        shape: Shape = self.judge.shapes[self.contract]
        seconds = base.time_ms / 1e3
        most = (
            seconds + self.judge.null_s
        )  # the deducted round trip is an estimate: the doubt is the kernel's
        floor_s = self.peaks.floor_s(shape.work.bytes, shape.work.floor_flops)
        if most < floor_s:
            self.peaks = self._kept_peaks(again=True)
            floor_s = self.peaks.floor_s(shape.work.bytes, shape.work.floor_flops)
            if most < floor_s:
                raise Rejected(
                    "constraints",
                    f"{1e3 * seconds:.3g} ms is faster than this machine can move the task's bytes or do its "
                    f"FLOPs ({1e3 * floor_s:.3g} ms by measured peaks)",
                )
        steps = entry.arm.profile(5)
        described: Profile = profile(artifact, shape.work, self.peaks, seconds, floor_s, steps)
        return base.replace(
            profile=described,
            limiter=limiter(described, self.facts, seconds),
            kernel_coverage=round(self._coverage(artifact, entry, seconds), 4),
        )

    def _coverage(self, artifact: Artifact, entry: Entry, raced_s: float) -> float:
        """The share of a call (``raced_s`` in the race) that is gone when the plan runs without its own kernels.

        By this process's clock: what the candidate's process says of its steps could be forged, and a decoy
        could be slow only while it is profiled.
        """
        if artifact.lane == "host":
            return 0.0
        plan = artifact.plans[self.contract]
        rest = tuple(step for step in plan.steps if not isinstance(step, Launch))
        if not any(isinstance(step, Call) for step in rest):
            return 1.0
        if len(rest) == len(plan.steps):
            return 0.0
        library = replace(artifact, binaries={}, plans={self.contract: replace(plan, steps=rest)})
        patience = self._patience(self.contract)
        with self._entries() as open_entry:
            without = open_entry(library, self.contract)
            seconds: dict[int, list[float]] = {entry.number: [], without.number: []}
            for _ in range(COVERAGE_ROUNDS):
                self.judge.draw(self.contract, self._rng.getrandbits(60))
                for one in self._rng.sample((entry, without), 2):
                    seconds[one.number].append(self.judge.net(one.arm.call(patience)))
        whole, part = (float(np.quantile(times[1:], 0.25)) for times in seconds.values())
        return max(0.0, 1.0 - part / min(whole, raced_s))

    def _maybe_aa(self) -> None:
        """Every so often, race the last confirmed winner against its own copy, for the machine's record.

        Only what was as fast in several fresh processes: a kernel that tosses a coin would spoil the record.
        """
        self._evaluated += 1
        if self._steady is not None and self._evaluated % AA_EVERY == 1:
            try:
                self.aa_race(self._steady)
            except (Rejected, RivalFailed, ArmDied):
                self._steady = (
                    None  # not as steady as it seemed; the candidate just judged has no part in this
                )

    def aa_race(self, artifact: Artifact) -> Race:
        """One race of equals in fresh processes; goes into the machine's record."""
        with self._entries() as open_entry:
            own, copy = open_entry(artifact, self.contract), open_entry(artifact, self.contract)
            result = self._race_set(self.judge, self.contract, own, copy, AA, baseline=False)
        seconds = result.median("candidate")
        wrong = result.ended == "faster"
        self.record.add(self.task.name, self.threads, seconds, result.test.median, result.rounds, wrong)
        return result


def believe(result: Race) -> None:
    """Raise ``Rejected`` or ``RivalFailed`` for a race in which an output was wrong."""
    if "candidate" in result.suspects:
        raise Rejected("correctness", "right when checked, wrong in a timed call")
    if result.suspects:
        raise RivalFailed("right when checked, wrong in a timed call")


def errors_of(verdict: dict[str, Any]) -> Errors:
    """What a judge's answer says of how wrong the outputs were."""
    return Errors(verdict["max_abs"], verdict["rel_l2"], verdict["ratio"])


def _warm(call: Callable[[], float]) -> float:
    """Call until the heap has its size and the caches are as they will be; a slow contestant only once.

    Returns the seconds of the quickest call.
    """
    times: list[float] = []
    while len(times) < WARM_CALLS and sum(times) <= WARM_SECONDS:
        times.append(call())
    return min(times)


def _over_sets(sets: dict[str, list[Race]], over: str) -> tuple[float, tuple[float, float], bool]:
    """Mean log-ratio of ``over`` to the candidate over shape sets, with an interval.

    Within one process the interval is the e-process's confidence sequence, across fresh processes Student's.
    """
    means, lows, highs = [], [], []
    for races in sets.values():
        if len(races) == 1:
            ratios = races[0].log_ratios(over, "candidate")
            mean = float(np.median(ratios))
            low, high = confidence_sequence(ratios)
        else:
            mean, (low, high) = pooled(races, over, "candidate")
        means.append(mean)
        lows.append(low)
        highs.append(high)
    low, high = float(np.mean(lows)), float(np.mean(highs))
    return float(np.mean(means)), (low, high), low > 0


def _factors(interval: tuple[float, float]) -> tuple[float, float] | None:
    """A log-interval as factors; None where there were too few rounds for one."""
    low, high = interval
    return (math.exp(low), math.exp(high)) if math.isfinite(low) and math.isfinite(high) else None


def _remark(result: Race, against: str) -> str:
    words = {
        "hopeless": f"dropped after one call: more than three times the {against}'s time",
        "slow": f"dropped after three rounds: slower than the {against}",
        "slower": f"slower than the {against}",
        "no gain": f"no gain over the {against} beyond the machine's margin",
        "rounds": f"no clear gain over the {against} within the race's rounds",
        "time": f"no clear gain over the {against} within the race's time",
        "faster": "",
    }
    return words[result.ended]

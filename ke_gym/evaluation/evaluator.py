"""The evaluator: build → check → race → confirm → profile, one candidate at a time per machine.

Builds run side by side, one per core; checks and races have the machine to themselves. Everything a verdict
rests on (clock, order, seeds, statistics) lives in this process, everything expected in the judge's.
"""

from __future__ import annotations

import math
import random
import secrets
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np

from ke_gym.candidate import Candidate
from ke_gym.errors import UserError
from ke_gym.evaluation.account import BUILDING, WAITING, Account
from ke_gym.evaluation.admission import admit
from ke_gym.evaluation.arms import ArmDied, RivalFailed, open_arm
from ke_gym.evaluation.builder import BUILD_SECONDS, Builder
from ke_gym.evaluation.builds import Builds, Cores
from ke_gym.evaluation.checking import Entry, Rejected, check_case, check_touched, draw_cases, unchecked
from ke_gym.evaluation.contest import (
    AA,
    CONFIRM,
    RACE,
    RUNOFF,
    SOAK,
    left_out,
    measured,
    over_sets,
    race_entries,
    remark,
    rivals_fault,
)
from ke_gym.evaluation.coverage import without_kernels
from ke_gym.evaluation.evaluation import BASELINES, Cost, Errors, Evaluation, Profile
from ke_gym.evaluation.judge_client import JudgeClient, Shape
from ke_gym.evaluation.profile import limiter, profile
from ke_gym.evaluation.race import Race, Rules, confirm, planned
from ke_gym.evaluation.record import MachineRecord, home
from ke_gym.evaluation.selfcheck import Proof, prove
from ke_gym.evaluation.stats import FEWEST, sign_p_interval
from ke_gym.evaluation.zygote import Zygote
from ke_gym.languages import cpp
from ke_gym.languages.artifact import Artifact
from ke_gym.languages.base import BuildError
from ke_gym.targets import cpu
from ke_gym.tasks.task import Task

AA_EVERY = 10
CALL_SECONDS = 10.0
"""One call may take so long at least, however little its task has to do: a machine may stand still for seconds."""
PEAKS_SECONDS = 120.0
COVERAGE_ROUNDS = 12
REASON_CHARACTERS = 300


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

    Thread-safe: `evaluate` may be called from several threads; builds overlap, races do not (on each of
    ``devices`` one at a time).
    """

    devices = 1
    watchful = False
    """Whether outputs are looked at in races without the baseline, too."""

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
        self.account = Account()
        self.build_timeout = build_timeout
        self.call_timeout = call_timeout
        self._rng = random.Random(secrets.randbits(64))
        self._cores = Cores(self.facts.cores)
        self._builds = Builds(self._cores)
        self._evaluated = 0
        self._steady: Artifact | None = None
        self._steady_s = 0.0
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
        judged = self._judged(base, artifact, rival, absent)
        if artifact.lane == "host":
            reason = str(artifact.report.get("host_reason", "it cannot be traced"))[:REASON_CHARACTERS]
            said = f"its Python runs with its kernels (host lane): {reason}"
            judged = judged.replace(log="\n".join(filter(None, (judged.log, said))))
        return judged

    def _judged(
        self, base: Evaluation, artifact: Artifact, rival: Artifact | None, absent: str
    ) -> Evaluation:
        """``base`` with the verdict on what was built; ``absent`` says why an incumbent is not in the race."""
        with self._cores.all():
            compiled = self._clock()
            cost = Cost(compile_s=self._builds.seconds(base.candidate))
            checked = compiled
            try:
                while True:
                    try:
                        with self._entries() as open_entry:
                            with self.account.phase("checking"):
                                entries = {name: open_entry(artifact, name) for name in self.shape_sets}
                                errors = self._check(artifact, entries, open_entry)
                            checked = self._clock()
                            base = base.replace(error=errors)
                            with self.account.phase("racing"):
                                base = self._race(base, artifact, rival, entries)
                            base = self._describe(base, artifact, entries[self.contract])
                        break
                    except RivalFailed as failure:  # once at most: from now on there is none
                        rival, absent, base = None, str(failure), base.replace(rival="")
            except (Rejected, ArmDied) as failure:
                if checked == compiled:
                    checked = self._clock()
                wrong_by = failure.error if isinstance(failure, Rejected) else None
                base = base.replace(
                    outcome=failure.outcome, log=failure.log, error=wrong_by or base.error, speedup=None,
                    speedup_ci=None, gain=None, gain_ci=None, improved=False,
                )  # fmt: skip
            now = self._clock()
            base = base.replace(cost=replace(cost, check_s=checked - compiled, race_s=now - checked))
            if base.improved and artifact.lane == "plan":  # others' Python is not steady
                self._steady, self._steady_s = artifact, (base.time_ms or 0.0) / 1e3
            with self.account.phase("racing equals"):
                self._maybe_aa()
        if absent:
            base = left_out(base, absent)
        said = unchecked(self._refused())
        return base.replace(log="\n".join(filter(None, (base.log, said))))

    def _refused(self) -> Mapping[str, str]:
        """The distributions of inputs on which the reference itself raises, and what it says."""
        return self.judge.refused

    def _clock(self) -> float:
        """Seconds without those in which somebody else had the device: what an evaluation costs is its own."""
        return time.perf_counter() - self.account.here(WAITING)

    def decide(self, candidate: Candidate, rival: Candidate) -> Evaluation:
        """Only the race, and the confirmation if it is won: no check, no cache, no record."""
        artifact, other = self.build(candidate), self.build(rival)
        base = Evaluation(self.task.name, self.target, candidate.language, candidate.id, "correct")
        with self._cores.all(), self._entries() as open_entry:
            entries = {name: open_entry(artifact, name) for name in self.shape_sets}
            return self._race(base, artifact, other, entries)

    def ahead(self, candidate: Candidate, rival: Candidate) -> bool:
        """Whether a candidate is faster than another by more than equals differ on this machine, be it by less than the
        margin of a gain: for the choice among proven versions that are level.

        One race of the two on every public shape set: faster in the mean, and on none of them slower by so much. False if
        one of the two fails.
        """
        try:
            artifact, other = self.build(candidate), self.build(rival)
            with self._cores.all(), self.account.phase("racing"):
                races = [
                    self._duel(name, artifact, other, RUNOFF, not self.watchful) for name in self.shape_sets
                ]
        except (BuildError, Rejected, RivalFailed, ArmDied):
            return False
        medians = [race.test.median for race in races]
        lows = [sign_p_interval(race.test.values)[0] for race in races]
        spread = max(self.record.spread(race.median("incumbent")) for race in races)
        enough = min(race.rounds for race in races) >= FEWEST
        return enough and fmean(lows) > 0 and fmean(medians) > spread and min(medians) > -spread

    def race_baseline(self, candidate: Candidate) -> tuple[float, tuple[float, float]]:
        """How many times as long as a candidate's the baseline's calls take: the median of one race, and its 95 % interval.

        For kernels that were judged against another baseline: nothing is checked but what is timed, and nothing
        confirmed. Raises `BuildError`, `Rejected` or `ArmDied`.
        """
        artifact = self.build(candidate)
        with self._cores.all(), self.account.phase("racing"):
            race = self._race_sets(self.judge, artifact, None, AA)[self.contract]
        ratios = race.log_ratios("baseline", "candidate")
        low, high = sign_p_interval(ratios)
        return math.exp(float(np.median(ratios))), (math.exp(low), math.exp(high))

    def compile_baseline(self, baseline: str) -> None:
        """Let the baseline be ``torch.compile``'s from now on, as another evaluator's is from the beginning."""
        raise UserError("only a GPU's evaluator changes its baseline; open another one")

    def final(self, candidate: Candidate) -> Evaluation:
        """``evaluate`` for a search's winner: by itself, and with whatever else this target can look at."""
        return self.evaluate(candidate)

    def kernel_times(self, candidate: Candidate) -> dict[str, float]:
        """Seconds that a call spends in each kernel on the device, a library's too, by Triton's Proton; the largest first.

        Raises ``UserError`` for a target that has none, `BuildError`, or ``gpu_tools.ToolFailed``.
        """
        raise UserError("Proton looks at GPUs alone: choose --target cuda")

    def prove(self) -> Proof | None:
        """How far the task's checks can be trusted; None where that cannot be tried."""
        with self._cores.all():
            return prove(self.judge, self.contract, self.cases)

    def build(self, candidate: Candidate) -> Artifact:
        """The candidate's artifact, built in the sandbox unless it is known; raises `BuildError`."""
        return self._builds.build(candidate, self._make, self.adopt)

    def settled(self, candidate: Candidate) -> Artifact:
        """What a candidate is deployed as: its artifact, with whatever was chosen for this machine when it was judged, and with
        the plans that were raced alone. Whoever builds it may add others."""
        return self._raced(self.build(candidate))

    def _raced(self, artifact: Artifact) -> Artifact:
        plans = {name: plan for name, plan in artifact.plans.items() if name in self.shape_sets}
        return replace(artifact, plans=plans)

    def _make(self, candidate: Candidate) -> Artifact:
        with self.account.phase(BUILDING):
            return self._compile(candidate)

    def adopt(self, candidate: Candidate, artifact: Artifact) -> None:
        """Take an artifact as the candidate's, wherever it was built; raises `BuildError` if it can't be."""
        wanted = {
            name: ((*shape.inputs, *shape.state.values()), shape.outputs)
            for name, shape in self.judge.shapes.items()
            if artifact.general or name not in self.hidden
        }
        admit(artifact, candidate.source, candidate.language, wanted, self.task.backward)
        self._builds.keep(candidate, artifact)

    def _compile(self, candidate: Candidate) -> Artifact:
        return self.builder.build(
            candidate.source, self.judge.signature, candidate.language, timeout=self.build_timeout
        )

    def artifact(self, candidate_id: str) -> Artifact | None:
        """The artifact of a recently built candidate."""
        return self._builds.artifact(candidate_id)

    def ready(self) -> None:
        """Wait until all of ``devices`` take part."""

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
        compiler = next((found.path for found in cpp.compilers().values()), None)
        if compiler is None:
            raise UserError("there is no C++ compiler to measure this machine's peaks with: install g++")
        with self.zygote.spawn(
            "ke_gym.targets.cpu:measure_worker", {"threads": threads, "compiler": compiler}
        ) as worker:
            try:
                header, _ = worker.channel.recv(timeout=PEAKS_SECONDS)
            except (EOFError, TimeoutError) as error:
                how = "took too long" if isinstance(error, TimeoutError) else "failed"
                raise UserError(
                    f"measuring this machine's peaks with {compiler} {how}: {worker.log().strip() or error}"
                ) from error
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
            for index, case in enumerate(cases):
                errors = check_case(
                    self.judge, entry, name, case, index % 2, self._patience(name), name in self.hidden
                )
                worst = worst.or_worse(errors)
        for name, entry in entries.items():
            check_touched(self.judge, entry, name, self.cases[0], self._touch_seed, self._patience(name))
            entry.arm.check_mode(None)
        return worst

    def _patience(self, name: str) -> float:
        """Seconds one call may take before it counts as hung."""
        if self.call_timeout is not None:
            return self.call_timeout
        floor = self.judge.shapes[name].work.bytes / 1e8 + self.judge.shapes[name].work.flops / 1e9
        return max(CALL_SECONDS, 20 * floor)

    # -- racing ----------------------------------------------------------------------------------------------

    def _first_race(
        self, artifact: Artifact, rival: Artifact | None, entries: dict[str, Entry]
    ) -> dict[str, Race]:
        return self._race_sets(self.judge, artifact, rival, RACE, entries)

    def _race(
        self, base: Evaluation, artifact: Artifact, rival: Artifact | None, entries: dict[str, Entry]
    ) -> Evaluation:
        against = "incumbent" if rival is not None else "baseline"
        first = self._first_race(artifact, rival, entries)
        main = first[self.contract]
        margin = self.record.margin(main.median(against))
        sets: dict[str, list[Race]] = {name: [r] for name, r in first.items()}
        won = all(r.test.median > -margin for r in first.values()) and main.ended == "faster"
        improved, log = False, remark(main, against)
        if won:
            sets = {name: [] for name in first}
            rounds = planned(main, against, margin)
            rules = replace(CONFIRM, min_rounds=rounds, max_rounds=rounds)

            def fresh(index: int) -> Race:
                races = self._fresh_race(artifact, rival, rules if index else SOAK)
                for name, one in races.items():
                    sets[name].append(one)
                return races[self.contract]

            _, _, main_improved = confirm(fresh, against, margin=margin)
            improved = main_improved and over_sets(sets, against)[1][0] > margin
            if not improved:
                log = "a first lead did not hold in fresh processes"
        raced = base.replace(
            rounds=sum(r.rounds for r in first.values()), log=log, improved=improved, confirmed=won
        )
        return measured(raced, sets, self.contract, against)

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
                own, other = self._contestants(open_entry, name, artifact, rival, entries)
                races[name] = self._race_set(judge, name, own, other, rules, baseline)
        return races

    def _contestants(
        self,
        open_entry: Any,
        name: str,
        artifact: Artifact,
        rival: Artifact | None,
        entries: dict[str, Entry] | None = None,
    ) -> tuple[Entry, Entry | None]:
        """Contestants of a race, the given one of the candidate's or fresh ones. Raises ``RivalFailed``.

        Where a device's code and memory lie is worth up to a percent, and who comes first lies elsewhere: it is drawn.
        """

        def own() -> Entry:
            return entries[name] if entries else open_entry(artifact, name)

        def other() -> Entry:
            with rivals_fault():
                return open_entry(rival, name)  # type: ignore[no-any-return]

        if rival is None:
            return own(), None
        if self._rng.random() < 0.5:
            first = other()
            return own(), first
        return own(), other()

    def _race_set(
        self,
        judge: JudgeClient,
        name: str,
        own: Entry,
        other: Entry | None,
        rules: Rules,
        baseline: bool = True,
    ) -> Race:
        return race_entries(
            judge, name, own, other, rules, self.record, self._patience(name), self._rng, baseline
        )

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
        patience = self._patience(self.contract)
        prepared = sorted(entry.arm.prepare(patience) for _ in range(3))[1]
        steps = entry.arm.profile(5)
        described: Profile = profile(artifact, shape.work, self.peaks, seconds, floor_s, steps)
        coverage = self._coverage(artifact, entry, seconds)
        return base.replace(
            profile=described,
            limiter=limiter(described, self.facts, seconds),
            preparation_ms=1e3 * prepared if prepared else None,
            kernel_coverage=None if coverage is None else round(coverage, 4),
        )

    def _coverage(self, artifact: Artifact, entry: Entry, raced_s: float) -> float | None:
        """The share of a call (``raced_s`` in the race) that is gone when the plan runs without its own kernels; None where it
        cannot.

        By this process's clock: what the candidate's process says of its steps could be forged, and a decoy
        could be slow only while it is profiled.
        """
        if artifact.lane == "host":
            return 0.0
        library = without_kernels(artifact, self.contract)
        if not isinstance(library, Artifact):
            return library
        if artifact.plans[self.contract].preparation is None:
            library = replace(library, binaries={})
        patience = self._patience(self.contract)
        with self._entries() as open_entry:
            without = open_entry(library, self.contract)
            without.arm.prepare(patience)
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
        if self._steady is not None and self._evaluated % self._aa_every() == 1:
            try:
                self.aa_race(self._steady)
            except (Rejected, RivalFailed, ArmDied):
                self._steady = (
                    None  # not as steady as it seemed; the candidate just judged has no part in this
                )

    def _aa_every(self) -> int:
        return AA_EVERY

    def aa_race(self, artifact: Artifact) -> Race:
        """One race of equals in fresh processes; goes into the machine's record."""
        result = self._duel(self.contract, artifact, artifact, AA)
        seconds = result.median("candidate")
        wrong = result.ended == "faster"
        self.record.add(self.task.name, self.threads, seconds, result.test.median, result.rounds, wrong)
        return result

    def _duel(
        self, name: str, artifact: Artifact, other: Artifact, rules: Rules, baseline: bool = False
    ) -> Race:
        """A race of two on one shape set, each loaded afresh. Without the ``baseline`` outputs are looked at only by who is
        ``watchful``."""
        with self._entries() as open_entry:
            own, rival = self._contestants(open_entry, name, artifact, other)
            return self._race_set(self.judge, name, own, rival, rules, baseline)

"""The GPU's judge: one trusted process per device that draws inputs, runs everybody, and holds oracle and clock.

Candidates are device code, so they share this process's context (unless they could reach its host memory: then
``gpu_apart``; a module's own Python has a process of its own: ``gpu_host``), and nothing of it that could help them:

- contents are new in every single call, each contestant's its own, drawn on the device from a seed in host
  memory; what belongs to them (reference, oracle) is computed only after the candidate has finished;
- it is computed from a second drawing, so that a kernel gains nothing by writing to its inputs;
- what a kernel leaves behind in device memory belongs to other contents.

A kernel that faults or hangs takes this process with it; the parent starts another.
"""

from __future__ import annotations

import math
import os
import socket
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from torch import Tensor

from ke_gym.errors import UserError
from ke_gym.evaluation import gpu_check, gpu_rivals, gpu_signature, mutants
from ke_gym.evaluation.acceptance import Verdict
from ke_gym.evaluation.channel import Channel
from ke_gym.evaluation.coverage import without_kernels
from ke_gym.evaluation.evaluation import COMPILE_MODES
from ke_gym.evaluation.gpu_apart import Apart, Unfit
from ke_gym.evaluation.gpu_client import GpuShape
from ke_gym.evaluation.gpu_host import HostRunner, NullHost
from ke_gym.evaluation.gpu_lock import DeviceLock
from ke_gym.evaluation.gpu_memory import OVERHEAD, give_back, lacks_memory, taken_elsewhere
from ke_gym.evaluation.gpu_stage import Crowded, Died, Runner, ShapeSet, Stage, first_line, foreign
from ke_gym.evaluation.gpu_timing import Hung, Sample
from ke_gym.evaluation.leash import Leash
from ke_gym.evaluation.race import Rules, race
from ke_gym.languages.artifact import Artifact
from ke_gym.languages.plan import Plan
from ke_gym.targets import cuda
from ke_gym.targets.cuda_driver import CudaError, Driver
from ke_gym.tasks.task import Task

WARM_CALLS = 3
PATIENCE = 20.0
FULL_CHECKS = 0.04
PROFILE_RUNS = 5
SHORT_S, MOST_CALLS = 28e-6, 4
"""Calls below this take several in each round, so many at the most."""
TUNING_ROUNDS, BEATEN = 5, 1.2
"""Calls of each alternative; two are enough for one whose better call takes so many times as long as the best so far."""
GRAPH_GAIN = 0.97
"""A CUDA graph must bring a plan's time down to this share: it has to be recorded anew for other tensors."""
# CUDA graphs are the plan's own business: torch.compile is raced without them.
_MODES = {"max-autotune": "max-autotune-no-cudagraphs"}


@dataclass
class Arm:
    """One artifact, loaded for one shape set."""

    artifact: Artifact
    shape_set: str
    runner: Runner


class GpuJudge:
    """The server side. One method per request; each returns a JSON-able dict (and maybe a blob)."""

    def __init__(
        self, task: Task, baseline: str, device: torch.device, link: socket.socket | None = None
    ) -> None:
        relaxed = task.precision != "strict"
        torch.backends.cuda.matmul.allow_tf32 = relaxed
        torch.backends.cudnn.allow_tf32 = relaxed
        self.baseline = baseline
        self.stage = Stage(task, device, Driver())
        self.sets: dict[str, ShapeSet] = {}
        self.arms: dict[int, Arm] = {}
        self._link = link
        self._null: NullHost | None = None
        self._next = 0

    def describe(self, shape_sets: list[str], signature: bool = True) -> tuple[dict[str, Any], bytes]:
        """Build the references; return facts, specs per shape set and, as blob, the compile signature if asked."""
        found = gpu_signature.signature(self.stage.task, shape_sets).to_bytes() if signature else b""
        described = {}
        for name in shape_sets:
            chosen = self.sets[name] = self.stage.shape_set(name)
            shape = GpuShape(name, chosen.inputs, chosen.state, chosen.outputs, chosen.work)
            described[name] = shape.to_dict()
            torch.cuda.empty_cache()
        facts = self.stage.facts
        alike = cuda.alike(facts)
        return {"shapes": described, "facts": facts.to_dict(), "alike": alike}, found

    def measure(self) -> dict[str, Any]:
        """The device's peaks."""
        torch.cuda.empty_cache()
        return cuda.measure(self.stage.device.index or 0).to_dict()

    def free_bytes(self) -> dict[str, Any]:
        """The ``bytes`` of the device's memory that nobody has."""
        return {"bytes": torch.cuda.mem_get_info(self.stage.device)[0]}

    def move_apart(self) -> dict[str, Any]:
        """Have candidates' kernels launched by the process at the other end of ``link``, if that is possible here."""
        assert self._link is not None
        try:
            self.stage.apart = Apart(Channel(self._link), self.stage.driver, self.stage.device)
        except (Unfit, Hung) as refusal:
            return {"apart": False, "why": str(refusal)}
        return {"apart": True, "why": ""}

    # -- arms ------------------------------------------------------------------------------------------------

    def load(self, shape_set: str, blob: bytes) -> dict[str, Any]:
        """Load an artifact's kernels afresh; the number it goes by from now on."""
        artifact = Artifact.from_bytes(blob)
        with foreign():
            runner = self.stage.runner(artifact, self.sets[shape_set])
        return {"arm": self._kept(Arm(artifact, shape_set, runner))}

    def keep_null(self, fds: list[int]) -> dict[str, Any]:
        """Keep a process for calls that do nothing, which those of host lanes are timed beside; see ``load_host``."""
        if self._null is not None:
            self._null.close()
        self._null = NullHost(*_reached_by(fds), self.stage)
        return {}

    def load_host(self, shape_set: str, artifact_bytes: int, fds: list[int], blob: bytes) -> dict[str, Any]:
        """Load a module of the host lane into its process; ``fds``: the connection to it, what it is stopped by.

        ``blob``: the artifact and the task's signature.
        """
        assert self._null is not None
        runner = HostRunner(*_reached_by(fds), self.stage, self.sets[shape_set], self._null)
        try:
            runner.load(blob, artifact_bytes, shape_set)
        except BaseException:
            runner.close()
            raise
        artifact = Artifact.from_bytes(blob[:artifact_bytes])
        return {"arm": self._kept(Arm(replace(artifact, plans={shape_set: runner.plan}), shape_set, runner))}

    def _kept(self, arm: Arm) -> int:
        number = self._next
        self._next += 1
        self.arms[number] = arm
        return number

    def unload(self, arm: int) -> dict[str, Any]:
        gone = self.arms.pop(arm, None)
        if gone is not None:
            gone.runner.close()
        return {}

    def tune(self, arm: int, patience: float) -> dict[str, Any]:
        """Race the alternatives of every launch, then the plan against itself as one CUDA graph.

        The arm goes on with the fastest. The picks by step, and whether the graph is worth it.
        """
        one = self.arms[arm]
        chosen = self.sets[one.shape_set]
        choices = one.artifact.plans[one.shape_set].choices
        picks = dict.fromkeys(choices, 0)
        for step, count in choices.items():
            best = float("inf")
            for number in range(count):
                try:
                    with self.stage.loaded(_picked(one, {**picks, step: number}), chosen) as runner:
                        seconds = self._typical(chosen, runner, patience, best)
                except Died as died:
                    if died.fatal:
                        raise
                    continue  # more than this device has: another one will do
                if seconds < best:
                    best, picks[step] = seconds, number
        if picks:
            one.runner.close()
            one.artifact = _picked(one, picks)
            with foreign():
                one.runner = self.stage.runner(one.artifact, chosen)
        return {"picks": picks, "graph": self._captured(one, chosen, patience)}

    def _captured(self, one: Arm, chosen: ShapeSet, patience: float) -> bool:
        """Let the arm go on as one CUDA graph if it can and is clearly faster so; whether it is."""
        plan = one.artifact.plans[one.shape_set]
        if not one.runner.capturable or plan.graph:
            return plan.graph
        artifact = _with_plan(one, replace(plan, graph=True))
        try:
            with self.stage.loaded(artifact, chosen) as runner:
                together, apart = (self._typical(chosen, each, patience) for each in (runner, one.runner))
        except Died as died:
            if died.fatal:
                raise
            return False  # what this driver does not record goes launch by launch
        if together > GRAPH_GAIN * apart:
            return False
        one.runner.close()
        with foreign():
            one.artifact, one.runner = artifact, self.stage.runner(artifact, chosen)
        return True

    def _typical(
        self, chosen: ShapeSet, runner: Runner | None, patience: float, best: float = math.inf
    ) -> float:
        """Seconds of the second quickest of a few calls; of fewer where ``best`` is clearly out of reach."""
        calls: list[float] = []
        while len(calls) < TUNING_ROUNDS and not (len(calls) == 2 and min(calls) > BEATEN * best):
            calls.append(self.stage.call(chosen, runner, patience).sample.seconds)
        return sorted(calls)[1]

    # -- checking and racing ---------------------------------------------------------------------------------

    def check(
        self, arm: int, cases: list[gpu_check.Case], touch_seed: int, touched: bool, patience: float
    ) -> dict[str, Any]:
        """See ``gpu_check``; with kernels loaded for it alone."""
        one = self.arms[arm]
        chosen = self.sets[one.shape_set]
        rest = cases, touch_seed, touched, patience
        if isinstance(one.runner, HostRunner):
            answer = gpu_check.check_host(self.stage, chosen, one.runner, *rest)
        else:
            answer = gpu_check.check(self.stage, chosen, one.artifact, *rest)
        give_back(self.stage.device, self.stage.facts.memory_bytes)
        return answer

    def warm(self, shape_set: str, own: int, other: int | None, baseline: bool) -> dict[str, Any]:
        """Everybody's first calls, on new parameter values; the seconds of each one's quickest."""
        stage, chosen = self.stage, self.sets[shape_set]
        if baseline and chosen.baseline is None:
            chosen.baseline = self._baseline(chosen)
        chosen.reference.randomize(stage.rng.getrandbits(60))
        stage.hold(chosen)
        stage.driver.forget_persisting_lines()
        stage.watch.warm_up()
        pace = {}
        for name, runner in self._contestants(own, other, baseline).items():
            with answering(name):
                pace[name] = min(
                    stage.call(chosen, runner, PATIENCE).sample.seconds for _ in range(WARM_CALLS)
                )
        chosen.calls = max(1, min(MOST_CALLS, math.ceil(SHORT_S / min(pace.values()))))
        return {"pace": pace}

    def _contestants(self, own: int, other: int | None, baseline: bool) -> dict[str, Runner | None]:
        found: dict[str, Runner | None] = {"candidate": self.arms[own].runner}
        if other is not None:
            found["incumbent"] = self.arms[other].runner
        if baseline:
            found["baseline"] = None
        return found

    def soak(self, arm: int, patience: float) -> dict[str, Any]:
        """Whether an arm stays right over hundreds of calls."""
        one = self.arms[arm]
        return {"ok": self.stage.soak(self.sets[one.shape_set], one.runner, patience)}

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
        """One race; see ``race.race``. Contestants are compared on contents of their own, in the same round.

        Of calls so short that what measuring them adds is no small part, each has several in a round: their mean counts.
        """
        stage, chosen = self.stage, self.sets[shape_set]
        limits = Rules(**rules)
        full = {stage.rng.randrange(limits.min_rounds)}
        samples: list[Sample] = []
        suspects: set[str] = set()
        counts = {"rounds": 0, "throttled": 0, "disputed": 0, "doubted": 0}

        def call(name: str, runner: Runner | None) -> Sample:
            with answering(name):
                done = stage.call(chosen, runner, patience)
                if runner is not None and done.outputs is not None:
                    due = counts["rounds"] in full or stage.rng.random() < FULL_CHECKS
                    if not stage.plausible(chosen, runner, done.seed, done.outputs, patience, due):
                        suspects.add(name)
            return done.sample

        def turn(name: str, runner: Runner | None) -> float:
            taken = [call(name, runner) for _ in range(chosen.calls)]
            samples.extend(taken)
            if name != "incumbent":
                most = 2 * sum(sample.disputed for sample in taken) > len(taken)
                counts["disputed" if name == "candidate" else "doubted"] += most
            return fmean(sample.seconds for sample in taken)

        def usable() -> bool:
            throttled = stage.watch.throttled(samples)
            counts["rounds"] += 1
            counts["throttled"] += throttled
            return not throttled or counts["throttled"] > limits.max_rounds

        named = self._contestants(own, other, baseline)
        result = race(
            {name: partial(turn, name, runner) for name, runner in named.items()},
            "incumbent" if other is not None else "baseline",
            draw=samples.clear,
            inspect=lambda: set(suspects),
            rng=stage.rng,
            rules=limits,
            margin=margin,
            usable=usable,
        )
        give_back(self.stage.device, self.stage.facts.memory_bytes)
        answer = {"seconds": result.seconds, "ended": result.ended, "suspects": sorted(result.suspects)}
        return {**answer, "values": result.test.values, "counts": counts}

    def compile(self, shape_set: str, baseline: str) -> dict[str, Any]:
        """Let the baseline of a shape set be the reference through a compiler.

        Beside others' races: nobody has the device for it, and what has to be alone takes it by itself.
        """
        chosen, mode = self.sets[shape_set], COMPILE_MODES[baseline]
        lock = DeviceLock(self.stage.facts.uuid)
        with lock.shared():
            arguments = self.stage.draw(shape_set, self.stage.rng.getrandbits(60))
            torch.cuda.synchronize(self.stage.device)
        compiler_settings()
        chosen.baseline = gpu_rivals.compiled(chosen.reference, _MODES.get(mode, mode), arguments, lock)
        return {}

    def _baseline(self, chosen: ShapeSet) -> Callable[..., tuple[Tensor, ...]]:
        mode = COMPILE_MODES.get(self.baseline)
        if mode is None:
            return chosen.reference
        compiler_settings()
        compiled = chosen.reference.compiled(_MODES.get(mode, mode))
        arguments = self.stage.draw(chosen.name, self.stage.rng.getrandbits(60))
        for _ in range(2):
            compiled(*arguments)
        torch.cuda.synchronize(self.stage.device)
        return compiled

    # -- afterwards ------------------------------------------------------------------------------------------

    def profile(self, arm: int, patience: float) -> dict[str, Any]:
        """Median seconds of every step, what each kernel takes of the device, and the kernels' share of a call."""
        one = self.arms[arm]
        stage, chosen = self.stage, self.sets[one.shape_set]
        preparation = self._preparation(chosen, one.runner, patience)
        given, out = stage.fill(chosen, stage.rng.getrandbits(60)), stage.blank(chosen, one.runner.plan)
        with foreign():
            one.runner.place(given.tensors, chosen.parameters, out.tensors)
            runs = [one.runner.step_times() for _ in range(PROFILE_RUNS)]
        medians = [sorted(seconds)[len(runs) // 2] for seconds in zip(*([s for _, s in run] for run in runs))]
        return {
            "steps": list(zip(one.runner.step_names, medians)),
            "resources": one.runner.resources(),
            "coverage": self._coverage(one, chosen, patience),
            "preparation": preparation,
        }

    def _preparation(self, chosen: ShapeSet, runner: Runner, patience: float) -> float | None:
        """Seconds that the preparation takes: the second quickest of a few, timed like calls. None without one."""
        if runner.plan.preparation is None:
            return None
        self.stage.prepare(chosen, runner, patience)
        with foreign():
            samples = [self.stage.timed(runner, patience, "prepare") for _ in range(TUNING_ROUNDS)]
        return sorted(sample.seconds for sample in samples)[1]

    def _coverage(self, arm: Arm, chosen: ShapeSet, patience: float) -> float | None:
        """The share of a call that is gone when the plan runs without its own kernels; None where it cannot."""
        library = without_kernels(arm.artifact, chosen.name)
        if not isinstance(library, Artifact):
            return library
        with self.stage.loaded(library, chosen) as without:
            whole, part = (self._typical(chosen, runner, patience) for runner in (arm.runner, without))
        return max(0.0, 1.0 - part / whole)

    def mutants(self, shape_set: str, cases: list[gpu_check.Case]) -> dict[str, Any]:
        """Whether each mutant of the reference is rejected on one of the cases."""
        stage, chosen = self.stage, self.sets[shape_set]
        results: dict[str, bool] = {}
        for seed, distribution, state_seed in cases:
            if state_seed:
                chosen.reference.randomize(state_seed)
            arguments = stage.draw(shape_set, seed, distribution)
            other = stage.draw(shape_set, seed + 1, distribution)
            for mutant in mutants.mutants(chosen.reference, arguments, other, stage.task.precision):
                verdict = stage.verdict(chosen, arguments, list(mutant.outputs), distribution)
                rejected = verdict is not None and not verdict.ok
                results[mutant.name] = results.get(mutant.name, False) or rejected
            if all(results.values()):
                break
        return {"mutants": results}

    def refuses(self, shape_set: str, distribution: str) -> dict[str, Any]:
        """Why the reference raises on inputs of a distribution; "" if it does not. To be asked before candidates come.

        An assertion of a kernel's is the end of the context.
        """
        try:
            self.sets[shape_set].reference(*self.stage.draw(shape_set, 0, distribution))
            torch.cuda.synchronize()
        except (UserError, RuntimeError) as error:
            cause = error.__cause__ or error
            if lacks_memory(cause):
                raise
            return {"refused": first_line(error), "fatal": _context_is_lost()}
        return {"refused": ""}

    def self_verdict(self, shape_set: str) -> dict[str, Any]:
        """The reference judged as if it were a candidate; ``peak``: the most bytes this process has held so far."""
        chosen = self.sets[shape_set]
        arguments = self.stage.draw(shape_set, self.stage.rng.getrandbits(60))
        verdict = self.stage.verdict(chosen, arguments, list(chosen.reference(*arguments)))
        del arguments
        torch.cuda.empty_cache()
        peak = int(torch.cuda.max_memory_allocated(self.stage.device))
        found = verdict or Verdict(False, "most of what it computes is not finite")
        return {**found.to_dict(), "peak": peak}


def _reached_by(fds: list[int]) -> tuple[Channel, Leash]:
    link, pidfd, stat = fds
    return Channel(socket.socket(fileno=link)), Leash(pidfd, stat)


def compiler_settings() -> None:
    """Inductor's own processes have a part of the cores: others search meanwhile."""
    torch._inductor.config.compile_threads = min(8, max(1, len(os.sched_getaffinity(0)) // 2))
    Path("/tmp").mkdir(exist_ok=True)


def _picked(arm: Arm, picks: dict[int, int]) -> Artifact:
    return _with_plan(arm, arm.artifact.plans[arm.shape_set].choose(picks))


def _with_plan(arm: Arm, plan: Plan) -> Artifact:
    return replace(arm.artifact, plans={**arm.artifact.plans, arm.shape_set: plan})


def serve(channel: Channel, args: dict[str, Any], fds: list[int]) -> None:
    """Entry of the process: the first message carries the task, then requests until the parent leaves."""
    os.sched_setaffinity(0, args["cores"])  # OpenMP has bound this thread to one core
    _, blob = channel.recv(timeout=None)
    torch.set_num_threads(1)
    if args["only"]:
        cuda.show_only(args["device"])
    try:
        if not torch.cuda.is_available():
            torch.cuda.init()  # type: ignore[no-untyped-call]  # says why
            raise UserError("torch sees none")
        device = torch.device("cuda", 0 if args["only"] else args["device"])
        torch.cuda.set_device(device)
        torch.set_default_device(device)
        judge = GpuJudge(Task.from_bytes(blob), args["baseline"], device, socket.socket(fileno=fds[0]))
    except (UserError, RuntimeError, OSError, AssertionError, CudaError) as error:
        if lacks_memory(error):  # there is no room for a context
            channel.send({"out_of_memory": first_line(error), "elsewhere": OVERHEAD})
        else:
            channel.send({"no_device": first_line(error)})
        return
    channel.send({"uuid": judge.stage.facts.uuid, "reads_host": judge.stage.facts.reads_host})
    while True:
        try:
            header, blob = channel.recv(timeout=None, accept_fds=True)
        except EOFError:
            return
        if fds := channel.take_fds():
            header["fds"] = fds
        request = getattr(judge, header.pop("do"))
        answer = answer_to(request, header, blob)
        channel.send(*answer) if isinstance(answer, tuple) else channel.send(answer)
        if isinstance(answer, dict) and answer.get("fatal"):
            os._exit(1)  # a lost context cannot be torn down in order


@contextmanager
def answering(contestant: str) -> Iterator[None]:
    """This contestant's device code runs inside: it dies under its own name."""
    try:
        yield
    except Died as died:
        died.rival = contestant == "incumbent"
        raise


def answer_to(request: Callable[..., Any], header: dict[str, Any], blob: bytes) -> Any:
    """What a request comes to: its result, or what went wrong, as data."""
    try:
        answer = request(**header, **({"blob": blob} if blob else {}))
        if not (isinstance(answer, dict) and answer.get("fatal")):
            torch.cuda.synchronize()  # with the answer, others may get the device
        return answer
    except Crowded as died:
        full = {"out_of_memory": died.log, "elsewhere": OVERHEAD}
    except Died as died:
        return {"died": died.outcome, "log": died.log[:4000], "fatal": died.fatal, "rival": died.rival}
    except Hung as hung:  # what was not a call of it: loading, unloading
        return {"died": "timeout", "log": str(hung), "fatal": True, "rival": False}
    except Exception as error:  # the parent turns it into a clear message about the task
        cause = error.__cause__ or error if isinstance(error, UserError) else error
        taken = taken_elsewhere(cause) if lacks_memory(cause) else None
        if _context_is_lost():
            return _lost(cause, of_a_candidate=blob != b"" or not {"arm", "own"}.isdisjoint(header))
        if taken is None:
            return _unforeseen(error)
        full = {"out_of_memory": first_line(cause), "elsewhere": taken}  # the task's own code lacked it
    torch.cuda.empty_cache()  # only now: exceptions hold what was allocated
    return full


def _unforeseen(error: Exception) -> dict[str, Any]:
    if isinstance(error, UserError):
        return {"user_error": str(error)}
    traceback.print_exception(error)
    return {"task_error": f"{type(error).__name__}: {first_line(error)}"}


def _context_is_lost() -> bool:
    """Whether this process can do nothing more on its device."""
    try:
        torch.cuda.synchronize()
    except RuntimeError:
        return True
    return False


def _lost(error: BaseException, of_a_candidate: bool) -> dict[str, Any]:
    """What is said of an error after which the context, and so this process, is of no more use.

    A kernel's fault may be told only after its end has been, when the judge itself works on the device again: where a
    candidate's kernels are loaded or run, it was theirs.
    """
    if of_a_candidate:
        return {"died": "runtime", "log": first_line(error), "fatal": True, "rival": False}
    return {"task_error": f"{type(error).__name__}: {first_line(error)}", "fatal": True}

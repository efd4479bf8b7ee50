"""The parent's side of a GPU's judge."""

from __future__ import annotations

import os
import socket
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext, suppress
from dataclasses import dataclass
from typing import Any

from ke_gym.errors import UserError
from ke_gym.evaluation.arms import ArmDied, RivalFailed
from ke_gym.evaluation.gpu_lending import worker_arguments
from ke_gym.evaluation.gpu_lock import DeviceLock
from ke_gym.evaluation.race import Race, Rules
from ke_gym.evaluation.sandbox import Sandbox
from ke_gym.evaluation.stats import SignTest
from ke_gym.evaluation.work import Work
from ke_gym.evaluation.zygote import SpawnError, Worker, Zygote
from ke_gym.languages.artifact import Artifact
from ke_gym.languages.plan import TensorSpec
from ke_gym.targets.cuda import Facts
from ke_gym.tasks.task import Task

GONE = "the process of its Python ended"
START_SECONDS = 120.0
CPU_SECONDS = 86_400
"""Of a module's process: one that hangs is ended by the clock, the one whose calls do nothing lives as long as its judge."""
REQUEST_SECONDS = 180.0
APART = "KE_GYM_APART"
"""A variable that has kernels launched by a process of their own, as where they could reach their launcher's memory."""
WARM_SECONDS = 900.0
"""torch.compile may have to try a library's worth of kernels before its first race."""
NO_DEVICE = (
    "no NVIDIA GPU can be used here ({why}); compile here with scripts/evaluate.py --bundle FILE --compile-only "
    "and race the file on a machine that has one with --run-bundle FILE, or search here with "
    "scripts/optimize.py --exchange DIR and judge there with scripts/evaluate.py --serve DIR"
)


TIMED = frozenset({"measure", "tune", "warm", "race", "profile"})
"""Requests for which the judge has its device alone. During all others it shares it."""
LOADING, NULL = -1, -2
"""What a module's process goes by before the judge has a number for it, and the one whose calls do nothing."""
BY_ITSELF = "compile"
"""The request for which the judge takes its device itself, now and then."""


class OutOfDeviceMemory(UserError):
    """A task does not fit on the device, of which other processes have so many bytes ``elsewhere``."""

    def __init__(self, message: str, elsewhere: int = 0) -> None:
        super().__init__(message)
        self.elsewhere = elsewhere


@dataclass(frozen=True)
class GpuShape:
    """One shape set as the parent knows it: specs and work."""

    name: str
    inputs: tuple[TensorSpec, ...]
    state: dict[str, TensorSpec]
    outputs: tuple[TensorSpec, ...]
    work: Work

    def to_dict(self) -> dict[str, Any]:
        """What ``described_shapes`` takes."""
        return {
            "inputs": [_listed(spec) for spec in self.inputs],
            "state": {name: _listed(spec) for name, spec in self.state.items()},
            "outputs": [_listed(spec) for spec in self.outputs],
            "work": vars(self.work),
        }


class GpuClient:
    """A judge process for one task on one GPU, which it has alone while it times, among all processes on this machine.

    ``signature`` is the task's compile signature, if it is known; ``lock`` is the device's, or gives it by the device's
    UUID, which the first judge has to tell. Raises ``UserError`` where there is no GPU and
    ``OutOfDeviceMemory`` where the task does not fit. Requests raise ``ArmDied`` for what a candidate did; when
    the process died of it, ``alive`` is False from then on.
    """

    def __init__(
        self,
        zygote: Zygote,
        task: Task,
        shape_sets: list[str],
        baseline: str,
        device: int,
        patience: float = 5.0,
        signature: bytes = b"",
        *,
        lock: DeviceLock | Callable[[str], DeviceLock],
    ) -> None:
        self.task = task
        self.alive = True
        self.apart, self.why_not_apart = False, ""
        self.launcher: Worker | None = None
        self._link: socket.socket | None = None
        self._zygote = zygote
        self._hosts: dict[int, Worker] = {}
        """Processes of modules' own Python, by arm."""
        self._exposed = False
        self.device = device
        self.patience = patience
        self.signature = signature
        self.lock = lock if isinstance(lock, DeviceLock) else None
        try:
            # Beside races: it computes nothing yet, and nobody could time anything for the seconds that it takes.
            uuid = self._start(zygote, baseline)
            if not isinstance(lock, DeviceLock):
                self.lock = lock(uuid)
            if self._exposed or os.environ.get(APART):
                self._move_apart(zygote)
            described, found = self._ask("describe", shape_sets=shape_sets, signature=not signature)
        except BaseException as error:
            self.close()
            if isinstance(error, ArmDied):  # no candidate was there yet
                raise UserError(
                    f"the process for GPU {device} failed at task {task.name}: {error.log}"
                ) from error
            raise
        self.signature = self.signature or found
        self.facts = Facts(**described["facts"])
        self.alike = tuple(int(number) for number in described["alike"])
        self.shapes = described_shapes(described["shapes"])

    def _start(self, zygote: Zygote, baseline: str) -> str:
        """Start the process; its device's UUID."""
        judges, self._link = socket.socketpair()
        with judges:
            self.worker: Worker = zygote.spawn(
                "ke_gym.evaluation.gpu_judge:serve",
                {
                    "baseline": baseline,
                    "device": self.device,
                    "only": bool(self.signature),  # the first one looks around for GPUs like its own
                    "cores": sorted(os.sched_getaffinity(0)),
                },
                fds=[judges.fileno()],
            )
        self.worker.channel.send({}, self.task.to_bytes())
        said = self._receive("start", START_SECONDS)[0]
        self._raise_what_is_said(said)
        self._exposed = bool(said["reads_host"])
        return str(said["uuid"])

    def _move_apart(self, zygote: Zygote) -> None:
        """Have kernels launched by a process of their own, where they could reach the judge's memory if it can be.

        Raises ``UserError`` if it cannot be although ``KE_GYM_APART`` asks for it.
        """
        assert self.lock is not None
        with self.lock.shared():  # it begins on the device as soon as it is there
            self._start_launcher(zygote)
            answer = self._ask("move_apart")[0]
        self.apart, self.why_not_apart = bool(answer["apart"]), str(answer["why"])
        if os.environ.get(APART) and not self.apart:
            raise UserError(
                f"{APART} is set, but kernels cannot be launched by another process on this GPU"
                f" ({self.why_not_apart}); unset it"
            )

    def _start_launcher(self, zygote: Zygote) -> None:
        """Start a process that launches kernels in the judge's place; nobody but the judge listens to it."""
        assert self._link is not None
        with self._link:
            self.launcher = zygote.spawn(
                "ke_gym.evaluation.gpu_launcher:serve",
                worker_arguments(self.device, self.task.precision != "strict"),
                fds=[self._link.fileno()],
            )

    def running(self) -> bool:
        """Whether the process is there: it may have been ended from outside while it was asked nothing."""
        return self.alive and self.worker.leash.alive()

    def alone(self) -> AbstractContextManager[None]:
        """The judge's device for this thread alone, over several requests."""
        assert self.lock is not None
        return self.lock.alone()

    # -- requests --------------------------------------------------------------------------------------------

    def free_bytes(self) -> int:
        """What nobody has of the device's memory."""
        return int(self._ask("free_bytes")[0]["bytes"])

    def measure(self) -> dict[str, Any]:
        """The device's peaks, as ``cuda.Peaks.from_dict`` takes them."""
        return self._ask("measure")[0]

    def load(self, artifact: Artifact, shape_set: str) -> int:
        """Load an artifact's kernels, or its Python into a process of its own; the number they go by."""
        if artifact.lane == "host":
            return self._load_host(artifact, shape_set)
        return int(self._ask("load", artifact.to_bytes(), shape_set=shape_set)[0]["arm"])

    def unload(self, arm: int) -> None:
        try:
            self._ask("unload", arm=arm)
        finally:
            self._end_host(arm)

    def _load_host(self, artifact: Artifact, shape_set: str) -> int:
        if NULL not in self._hosts:
            self._with_host("keep_null", NULL)
        packed = artifact.to_bytes()
        request = {"shape_set": shape_set, "artifact_bytes": len(packed)}
        answer = self._with_host("load_host", LOADING, packed + self.signature, **request)
        number = int(answer["arm"])
        self._hosts[number] = self._hosts.pop(LOADING)
        return number

    def _with_host(self, do: str, name: int, blob: bytes = b"", **arguments: Any) -> dict[str, Any]:
        """Start a process, which goes by ``name``, and hand it to the judge with a request; what that answers."""
        assert self.lock is not None
        ours, theirs = socket.socketpair()
        with ours, theirs, self.lock.alone():  # it begins on the device as soon as it is there
            host = self._hosts[name] = self._start_host(theirs)
            try:
                fds = [ours.fileno(), host.leash.pidfd, host.leash.stat]
                return self._ask(do, blob, fds, **arguments)[0]
            except BaseException:
                self._end_host(name)
                raise

    def _start_host(self, link: socket.socket) -> Worker:
        """Start a process for a module's own Python. Raises ``ArmDied`` where it cannot be locked in."""
        try:
            host = self._zygote.spawn(
                "ke_gym.evaluation._gpu_host:serve",
                worker_arguments(self.device, self.task.precision != "strict"),
                fds=[link.fileno()],
                sandbox=Sandbox("device", cpu_seconds=CPU_SECONDS),
            )
        except SpawnError as error:
            why = f"forward cannot be traced, and its Python cannot be locked in beside a GPU here: {error}"
            raise ArmDied("constraints", why) from error
        if host.leash.stat < 0:
            said = host.log(1500)
            host.close()
            raise ArmDied(
                "constraints", f"forward cannot be traced, and {GONE} before it began\n{said}".strip()
            )
        return host

    def _end_host(self, arm: int) -> None:
        if (host := self._hosts.pop(arm, None)) is not None:
            assert self.lock is not None
            with self.lock.shared():  # its context is torn down on the device
                host.close()

    def tune(self, arm: int, shape_set: str) -> tuple[dict[int, int], bool]:
        """Choose among the alternatives of the arm's launches by time: step → pick; and whether as a CUDA graph."""
        answer = self._ask("tune", arm=arm, patience=self.seconds(shape_set))[0]
        return {int(step): int(pick) for step, pick in answer["picks"].items()}, bool(answer["graph"])

    def check(
        self, arm: int, shape_set: str, cases: list[tuple[int, str, int]], touch_seed: int, touched: bool
    ) -> dict[str, Any]:
        """Errors over all cases, or ``reason`` and where it went wrong."""
        patience = self.seconds(shape_set)
        return self._ask(
            "check", arm=arm, cases=cases, touch_seed=touch_seed, touched=touched, patience=patience
        )[0]

    def compile(self, shape_set: str, baseline: str) -> None:
        """Let the baseline of a shape set be the reference through a compiler; others may race meanwhile.

        The calling thread must not hold the device's lock.
        """
        self._ask(BY_ITSELF, shape_set=shape_set, baseline=baseline)

    def warm(self, shape_set: str, own: int, other: int | None, baseline: bool) -> dict[str, float]:
        """Let everybody run before a race; the seconds of each one's quickest call."""
        answer, _ = self._ask("warm", shape_set=shape_set, own=own, other=other, baseline=baseline)
        return dict(answer["pace"])

    def soak(self, arm: int, shape_set: str) -> bool:
        """Whether an arm stays right over hundreds of calls."""
        return bool(self._ask("soak", arm=arm, patience=self.seconds(shape_set))[0]["ok"])

    def race(
        self,
        shape_set: str,
        own: int,
        other: int | None,
        rules: Rules,
        margin: float,
        baseline: bool = True,
    ) -> tuple[Race, dict[str, int]]:
        """One race, and how many rounds were thrown away or doubted."""
        answer, _ = self._ask(
            "race",
            shape_set=shape_set,
            own=own,
            other=other,
            baseline=baseline,
            rules=_rules(rules),
            margin=margin,
            patience=self.seconds(shape_set),
        )
        result = Race({name: list(seconds) for name, seconds in answer["seconds"].items()}, SignTest())
        for value in answer["values"]:
            result.test.add(value)
        result.ended, result.suspects = answer["ended"], set(answer["suspects"])
        return result, dict(answer["counts"])

    def profile(self, arm: int, shape_set: str) -> dict[str, Any]:
        return self._ask("profile", arm=arm, patience=self.seconds(shape_set))[0]

    def mutants(self, shape_set: str, cases: list[tuple[int, str, int]]) -> dict[str, bool]:
        """Mutant name → whether the check rejects it on one of ``cases``."""
        return dict(self._ask("mutants", shape_set=shape_set, cases=cases)[0]["mutants"])

    def refuses(self, shape_set: str, distribution: str) -> str:
        """Why the reference raises on inputs of a distribution; "" if it does not. The process may die of it."""
        return str(self._ask("refuses", shape_set=shape_set, distribution=distribution)[0]["refused"])

    def self_verdict(self, shape_set: str) -> dict[str, Any]:
        return self._ask("self_verdict", shape_set=shape_set)[0]

    def seconds(self, shape_set: str) -> float:
        """How long one call may take before it counts as hung."""
        work = self.shapes[shape_set].work
        return max(self.patience, 20 * (work.bytes / 1e10 + work.flops / 1e11))

    # -- plumbing --------------------------------------------------------------------------------------------

    def _ask(
        self, do: str, blob: bytes = b"", fds: Sequence[int] = (), **arguments: Any
    ) -> tuple[dict[str, Any], bytes]:
        assert self.lock is not None
        # What a module's own process still does on the device when it says that it is done can be told only there.
        alone = do in TIMED or any(arm != NULL for arm in self._hosts)
        held = nullcontext() if do == BY_ITSELF else self.lock.alone() if alone else self.lock.shared()
        with held:
            try:
                header, answer = self._exchange(do, arguments, blob, fds)
            except BaseException:
                self.close()  # whatever it still does there, it must not do beside others' races
                raise
            if "died" in header:
                header["log"] = self._with_the_end(header["log"])
                self._end_hosts()
            if header.get("fatal"):
                self.close()
        self._raise_what_is_said(header)
        return header, answer

    def _exchange(
        self, do: str, arguments: dict[str, Any], blob: bytes, fds: Sequence[int]
    ) -> tuple[dict[str, Any], bytes]:
        """One request and its answer, as they go over the channel."""
        self.worker.channel.send({"do": do, **arguments}, blob, fds)
        return self._receive(do, WARM_SECONDS if do in ("warm", BY_ITSELF) else REQUEST_SECONDS)

    def _receive(self, do: str, timeout: float) -> tuple[dict[str, Any], bytes]:
        try:
            return self.worker.channel.recv(timeout=timeout)
        except (EOFError, TimeoutError) as error:
            self.alive = False
            said = self.worker.log(600).strip()
            if isinstance(error, TimeoutError):
                said = f"the GPU's process did not answer within {timeout:g} s ({do})"
                raise ArmDied("timeout", said) from error
            said = f"the GPU's process died ({do}){': ' + said if said else ''}"
            raise ArmDied("runtime", said) from error

    def _raise_what_is_said(self, header: dict[str, Any]) -> None:
        """Raise what an answer reports instead of results."""
        if "died" in header:
            self.alive = self.alive and not header["fatal"]
            if header["rival"]:
                raise RivalFailed(header["log"])
            raise ArmDied(header["died"], header["log"])
        if "no_device" in header:
            raise UserError(NO_DEVICE.format(why=header["no_device"]))
        if "out_of_memory" in header:
            # Where another process launches kernels, it has memory of this search's own.
            elsewhere = 0 if self.apart else header.get("elsewhere", 0)
            where = "beside what others have of this GPU's memory" if elsewhere else "into this GPU's memory"
            raise OutOfDeviceMemory(
                f"task {self.task.name} does not fit {where} ({header['out_of_memory']}); choose smaller sizes",
                elsewhere,
            )
        if "user_error" in header:
            raise UserError(header["user_error"])
        if "task_error" in header:
            raise UserError(f"task {self.task.name}: its reference fails on the GPU: {header['task_error']}")

    def _end_hosts(self) -> None:
        """End all processes of modules' own Python: what one of them left on the device goes with it."""
        for arm in [arm for arm in self._hosts if arm != NULL]:
            self._end_host(arm)

    def _with_the_end(self, log: str) -> str:
        """How the process of a module's Python ended, if that is what the judge tells of, and its last words."""
        if not log.endswith(GONE):
            return log
        for arm, host in self._hosts.items():
            with suppress(TimeoutError):
                how = host.wait(0.0 if arm == NULL else 0.5)
                return "\n".join(filter(None, (f"{log}: {how}", host.log(1500).strip())))
        return log

    def close(self) -> None:
        """End the process, whatever it does; beside no race, since its context is torn down on the device."""
        self.alive = False
        with self.lock.shared() if self.lock is not None else nullcontext():
            self._end_hosts()
            self._end_host(NULL)
            for owned in (getattr(self, "worker", None), self.launcher, self._link):
                if owned is not None:
                    owned.close()


def described_shapes(described: dict[str, Any]) -> dict[str, GpuShape]:
    """Shape sets as a judge describes them, by name."""
    return {
        name: GpuShape(
            name,
            tuple(_spec(s) for s in shape["inputs"]),
            {key: _spec(s) for key, s in shape["state"].items()},
            tuple(_spec(s) for s in shape["outputs"]),
            Work(**shape["work"]),
        )
        for name, shape in described.items()
    }


def _listed(spec: TensorSpec) -> list[Any]:
    return [list(spec.shape), list(spec.stride), spec.dtype]


def _spec(data: list[Any]) -> TensorSpec:
    shape, stride, dtype = data
    return TensorSpec(tuple(shape), tuple(stride), dtype)


def _rules(rules: Rules) -> dict[str, Any]:
    """JSON has no infinity."""
    return {name: min(value, 1e300) for name, value in vars(rules).items()}

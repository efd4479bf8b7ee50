"""The parent's side of the judge: requests, and the clock around its baseline calls."""

from __future__ import annotations

import itertools
import random
import secrets
import time
from dataclasses import dataclass
from typing import Any

import numpy as np

from ke_gym.errors import UserError
from ke_gym.evaluation.arms import elapsed
from ke_gym.evaluation.shared import Layout, SharedBuffer
from ke_gym.evaluation.work import Work
from ke_gym.evaluation.zygote import Worker, Zygote
from ke_gym.languages.plan import TensorSpec
from ke_gym.tasks.task import Task

REQUEST_TIMEOUT = 600.0


@dataclass(frozen=True)
class Shape:
    """One shape set as the parent knows it: specs, work, and the shared inputs (tensors, then state)."""

    name: str
    inputs: tuple[TensorSpec, ...]
    state: dict[str, TensorSpec]
    outputs: tuple[TensorSpec, ...]
    work: Work
    layout: Layout
    buffer: SharedBuffer


class JudgeClient:
    """A judge process for one task. Frozen whenever it is not working, so that it disturbs no race."""

    def __init__(
        self, zygote: Zygote, task: Task, shape_sets: list[str], baseline: str, threads: int
    ) -> None:
        self.task = task
        self.refused: dict[str, str] = {}
        """The distributions on which the reference was seen to raise, and what it said."""
        self._arms = itertools.count()
        self._rng = random.Random(secrets.randbits(62))
        self.worker: Worker = zygote.spawn(
            "ke_gym.evaluation.judge:serve",
            {"baseline": baseline, "threads": threads},
        )
        self.shapes: dict[str, Shape] = {}
        try:
            self.worker.channel.send({}, task.to_bytes())
            self._answer("hello")
            described, self.signature = self._ask("describe", shape_sets=shape_sets)
            for name, shape in described["shapes"].items():
                self._attach(name, shape)
            self.null_s = self._null_latency()
            """Seconds of a timed call that does nothing."""
        except BaseException:
            self.close()
            raise

    def _attach(self, name: str, described: dict[str, Any]) -> None:
        inputs = tuple(_spec(s) for s in described["inputs"])
        state = {key: _spec(s) for key, s in described["state"].items()}
        layout = Layout.plan(inputs, state, self._rng)
        buffer = SharedBuffer(layout.bytes)
        outputs = tuple(_spec(s) for s in described["outputs"])
        self.shapes[name] = Shape(name, inputs, state, outputs, Work(**described["work"]), layout, buffer)
        self._ask("attach", (buffer.fd,), shape_set=name, layout=layout.to_dict())

    # -- requests --------------------------------------------------------------------------------------------

    def draw(self, shape_set: str, seed: int) -> None:
        """Put fresh inputs into the shared buffer."""
        self._ask("draw", shape_set=shape_set, seed=seed)

    def load(self, shape_set: str, seed: int, distribution: str = "task", state_seed: int = 0) -> float:
        """Put a checked case into the shared buffer; returns the share of its expected values that is finite (0 where the
        reference raises)."""
        answer, _ = self._ask(
            "load", shape_set=shape_set, seed=seed, distribution=distribution, state_seed=state_seed
        )
        if answer["refused"]:
            self.refused[distribution] = answer["refused"]
        return float(answer["finite"])

    def touch(self, shape_set: str, seed: int) -> None:
        """Change one element of every floating input and parameter now in the shared buffer."""
        self._ask("touch", shape_set=shape_set, seed=seed)

    def renew(self, shape_set: str, seed: int) -> None:
        """New parameter values for the calls to come."""
        self._ask("renew", shape_set=shape_set, seed=seed)

    def attach_output(self, layout: Layout, fd: int) -> int:
        """Show the judge an arm's output buffer; returns the number it goes by."""
        arm = next(self._arms)
        self._ask("attach_output", (fd,), arm=arm, layout=layout.to_dict())
        return arm

    def detach_output(self, arm: int) -> None:
        self._ask("detach_output", arm=arm)

    def check(self, shape_set: str, arm: int) -> dict[str, Any]:
        """The verdict on an arm's outputs for the inputs now in place."""
        return self._ask("check", shape_set=shape_set, arm=arm)[0]

    def check_again(self, shape_set: str, arm: int) -> dict[str, Any]:
        """The verdict on a close call, of the outputs for the inputs now in place and for those before."""
        return self._ask("check_again", shape_set=shape_set, arm=arm)[0]

    def fingerprint(self, shape_set: str, arms: list[int]) -> list[int]:
        """Those of ``arms`` whose outputs differ visibly from the baseline's for the same inputs."""
        return list(self._ask("fingerprint", shape_set=shape_set, arms=arms)[0]["suspects"])

    def mutants(self, shape_set: str, cases: list[tuple[int, str, int]]) -> dict[str, bool]:
        """Mutant name → whether the check rejects it on one of ``cases`` (seed, distribution, state seed)."""
        return dict(self._ask("mutants", shape_set=shape_set, cases=cases)[0]["mutants"])

    def self_verdict(self, shape_set: str) -> dict[str, Any]:
        return self._ask("self_verdict", shape_set=shape_set)[0]

    def call_baseline(self, shape_set: str) -> float:
        """Run the baseline once on the shared inputs; seconds by this process's clock, round trip deducted."""
        self._send("baseline_ready", shape_set=shape_set)
        return self.net(self._timed_byte())

    def net(self, seconds: float) -> float:
        """A timed call less the round trip; never below a quarter of that, which is as finely as it is known."""
        return max(self.null_s / 4, seconds - self.null_s)

    # -- plumbing --------------------------------------------------------------------------------------------

    def _null_latency(self, calls: int = 41) -> float:
        """Seconds of a timed call that does nothing: the lower quartile, since a busy machine adds to many."""
        seconds = []
        for _ in range(calls):
            self._send("null_ready")
            seconds.append(self._timed_byte())
        return float(np.quantile(seconds[1:], 0.25))

    def _timed_byte(self) -> float:
        self._answer("ready")
        self.worker.freeze()
        channel = self.worker.channel
        try:
            channel.sock.send(b"g")
            start = time.perf_counter_ns()
            self.worker.thaw()
            done = channel.recv_byte(REQUEST_TIMEOUT)
        except (ConnectionError, TimeoutError) as error:
            raise self._broken(error, "while it was timed") from error
        said = time.perf_counter_ns()
        self.worker.freeze()
        stopped = time.perf_counter_ns()
        if done != b"d":
            raise self._broken(None, "while it was timed")
        return elapsed(start, said, stopped)

    def _send(self, do: str, fds: tuple[int, ...] = (), **arguments: Any) -> None:
        self.worker.thaw()
        try:
            self.worker.channel.send({"do": do, **arguments}, fds=fds)
        except (EOFError, TimeoutError) as error:
            raise self._broken(error, do) from error

    def _ask(self, do: str, fds: tuple[int, ...] = (), **arguments: Any) -> tuple[dict[str, Any], bytes]:
        self._send(do, fds, **arguments)
        answer = self._answer(do)
        self.worker.freeze()
        return answer

    def _answer(self, do: str) -> tuple[dict[str, Any], bytes]:
        try:
            header, blob = self.worker.channel.recv(timeout=REQUEST_TIMEOUT)
        except (EOFError, TimeoutError) as error:
            raise self._broken(error, do) from error
        if "user_error" in header:
            raise UserError(header["user_error"])
        if "task_error" in header:
            raise UserError(f"task {self.task.name}: its reference fails: {header['task_error']}")
        return header, blob

    def _broken(self, error: Exception | None, when: str) -> UserError:
        how = "hangs" if isinstance(error, TimeoutError) else "crashed"
        said = self.worker.log(600).strip()
        return UserError(
            f"task {self.task.name}: its reference {how} ({when}); run it by itself to see why"
            + (f". It said: {said}" if said else "")
        )

    def close(self) -> None:
        self.worker.close()
        for shape in self.shapes.values():
            shape.buffer.close()
        self.shapes = {}


def _spec(data: list[Any]) -> TensorSpec:
    shape, stride, dtype = data
    return TensorSpec(tuple(shape), tuple(stride), dtype)

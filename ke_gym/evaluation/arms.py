"""Arms: one implementation in one sandboxed process, working on shared inputs, timed from outside.

The process is stopped whenever the clock is not running: no thread of it can work before or after, and the
spinning threads of one arm don't slow the other down. Its outputs lie in memory that the parent and the judge
see, so what is timed is what is checked.
"""

from __future__ import annotations

import contextlib
import ctypes
import math
import os
import time
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Any

import torch

from ke_gym.evaluation.channel import Channel, ProtocolError
from ke_gym.evaluation.sandbox import GIB, Sandbox
from ke_gym.evaluation.shared import RED_ZONE, Layout, SharedBuffer, damaged, nearest, poison
from ke_gym.evaluation.zygote import Worker, Zygote
from ke_gym.languages.artifact import Artifact
from ke_gym.languages.base import Signature
from ke_gym.languages.plan import TensorSpec
from ke_gym.targets.executor import MemoryPlan, PlanRunner, plan_memory

OPEN_TIMEOUT = 20.0
END_SECONDS = 5.0  # how long a process that is done for may take to say why, and to end
STOPPING_NS = 50_000
WORKSPACE_BYTES = 4 * GIB
_GO, _CHECK, _PROFILE = b"g", b"c", b"p"
_PREPARE, _PREPARE_CHECK = b"r", b"s"
_DONE, _FAILED = b"d", b"e"
_MARK_BYTES = 64  # at the start of an arena: the step that is running, for the message about a crash


class ArmDied(Exception):
    """The arm is gone. ``outcome`` is ``"runtime"`` or ``"timeout"``; ``log`` says what happened."""

    def __init__(self, outcome: str, log: str) -> None:
        super().__init__(log)
        self.outcome = outcome
        self.log = log


class RivalFailed(Exception):
    """The incumbent did not build, died, hung or was wrong: nothing that the candidate should answer for."""


def elapsed(start: int, said: int, stopped: int) -> float:
    """Seconds that count, of three clock readings in ns: started, said that it is done, stopped.

    The clock runs until no thread can work any more, so that nothing is gained by saying it early. A process
    that works is stopped in far less than ``STOPPING_NS``; one that sleeps may have to wait for a busy core.
    """
    return (said - start + min(stopped - said, STOPPING_NS)) / 1e9


class Arm:
    """The parent's side of one implementation in its own process, frozen between calls.

    ``inputs`` (with ``layout``) is mapped read-only by the process. ``output_buffer`` and ``output_layout``
    are where its results appear. A context manager.
    """

    def __init__(
        self,
        zygote: Zygote,
        entry: str,
        artifact: Artifact,
        shape_set: str,
        inputs: SharedBuffer,
        layout: Layout,
        outputs: Sequence[TensorSpec],
        memory: MemoryPlan,
        workspace_bytes: int,
        signature: bytes = b"",
        prepares: bool = False,
    ) -> None:
        self.prepares = prepares
        """Whether the plan has a preparation."""
        self.output_layout = Layout.plan(outputs)
        self.output_buffer = SharedBuffer(self.output_layout.bytes)
        self._arena_plan = memory
        self._arena = SharedBuffer(_MARK_BYTES + memory.size)
        self._pattern: int | None = None
        self._step_names: list[str] = []
        mapped = inputs.size + self.output_buffer.size + self._arena.size
        readable = inputs.read_only_fd()
        try:
            self.worker: Worker = zygote.spawn(
                entry,
                {
                    "shape_set": shape_set,
                    "layout": layout.to_dict(),
                    "inputs": inputs.size,
                    "outputs": self.output_layout.to_dict(),
                    "arena": self._arena.size,
                    "threads": zygote.threads,
                },
                fds=[readable, self.output_buffer.fd, self._arena.fd],
                sandbox=Sandbox("run", memory_bytes=mapped + workspace_bytes),
            )
        finally:
            os.close(readable)
        try:
            self._open(artifact.to_bytes(), signature)
        except BaseException:
            self.close()
            raise

    @property
    def outputs(self) -> list[torch.Tensor]:
        """The results of the last call: views of shared memory, overwritten by the next one."""
        return self.output_layout.views(self.output_buffer)

    def call(self, timeout: float) -> float:
        """Run once and return the seconds it took by this process's clock.

        Everything that moves data or waits lies outside; what remains is waking the process, its answer, and
        stopping it: see ``elapsed``.
        Raises ``ArmDied``: ``"timeout"`` (it is killed then) or ``"runtime"``.
        """
        if self._pattern is not None:
            self._poison(self._pattern)
        return self._timed(_GO if self._pattern is None else _CHECK, timeout)

    def prepare(self, timeout: float) -> float:
        """Run the plan's preparation for the weights as they are; the seconds it took (0: it has none).

        Due whenever the weights have changed, and before inputs are drawn. Raises ``ArmDied``.
        """
        if not self.prepares:
            return 0.0
        return self._timed(_PREPARE if self._pattern is None else _PREPARE_CHECK, timeout)

    def _timed(self, command: bytes, timeout: float) -> float:
        worker, channel = self.worker, self.worker.channel
        self._command(command)
        clock = time.perf_counter_ns
        try:
            start = clock()
            worker.thaw()
            answer = channel.recv_byte(timeout)
            said = clock()
        except TimeoutError:
            raise self._timed_out(timeout) from None
        worker.freeze()
        stopped = clock()
        if answer != _DONE:
            raise self._died(answer)
        if channel.readable():
            raise self._died(b"?")  # an answer to a call that has not been made
        return elapsed(start, said, stopped)

    def check_mode(self, pattern: int | None) -> None:
        """Before every following call fill outputs and intermediates with poison ``pattern`` (0 or 1).

        Intermediates then lie apart, with red zones around each. None: back to timed calls.
        """
        self._pattern = pattern

    def damage(self) -> str:
        """What the last call in check mode wrote outside of its tensors, in words; ``""`` if nothing."""
        byte = damaged(self.output_buffer.bytes, self.output_layout.used)
        if byte is not None:
            return "wrote outside of its outputs: " + nearest(byte, self.output_layout.used, "output")
        byte = damaged(self._arena.bytes[_MARK_BYTES:], self._arena_plan.used)
        if byte is not None:
            return "wrote outside of its intermediates: " + nearest(
                byte, self._arena_plan.used, "intermediate"
            )
        return ""

    def profile(self, runs: int) -> list[tuple[str, str, float]]:
        """(kind, name, median seconds) of every step; kind is ``"kernel"`` or ``"aten"``.

        Measured inside the process, so a hostile kernel can forge it: good for feedback, not for a verdict.
        """
        self._command(_PROFILE)
        self.worker.thaw()
        try:
            self.worker.channel.send({"runs": runs})
            header, _ = self.worker.channel.recv(OPEN_TIMEOUT, limit=0)
            steps = [(str(kind), str(name), float(seconds)) for kind, name, seconds in header["steps"]]
            if not all(math.isfinite(seconds) for _, _, seconds in steps):
                raise ValueError("no seconds")
        except TimeoutError:
            raise self._timed_out(OPEN_TIMEOUT) from None
        except (EOFError, ProtocolError, KeyError, OverflowError, TypeError, ValueError):
            raise self._died(b"") from None
        self.worker.freeze()
        return steps

    def close(self) -> None:
        """Kill the process and release the memory."""
        self.worker.close()
        self.output_buffer.close()
        self._arena.close()

    def _open(self, artifact: bytes, signature: bytes) -> None:
        try:
            self.worker.channel.send({}, artifact)
            self.worker.channel.send({}, signature)
            header, _ = self.worker.channel.recv(OPEN_TIMEOUT, limit=0)
            steps = [str(name)[:200] for name in header.get("steps", [])]
        except TimeoutError:
            raise self._timed_out(OPEN_TIMEOUT) from None
        except (EOFError, ProtocolError, TypeError):
            raise self._died(b"") from None
        self.worker.freeze()
        if "error" in header:
            raise ArmDied("runtime", str(header["error"])[:4000])
        self._step_names = steps

    def _command(self, command: bytes) -> None:
        try:
            self.worker.channel.sock.send(command)
        except OSError:
            raise self._died(b"") from None

    def _poison(self, pattern: int) -> None:
        poison(self.output_buffer.bytes, self.output_layout.used, pattern)
        poison(self._arena.bytes[_MARK_BYTES:], self._arena_plan.used, pattern)
        self._arena.bytes[:4].view(torch.int32).fill_(-1)

    def _timed_out(self, seconds: float) -> ArmDied:
        self.worker.kill()
        return ArmDied("timeout", f"no answer within {seconds:.3g} s{self._where()}")

    def _died(self, answer: bytes) -> ArmDied:
        """The reason why a call did not end well, as far as it can be known from outside."""
        if answer == _FAILED:
            with contextlib.suppress(EOFError, TimeoutError, ProtocolError):
                self.worker.thaw()
                header, _ = self.worker.channel.recv(END_SECONDS, limit=0)
                self.worker.kill()
                return ArmDied("runtime", str(header.get("error", ""))[:4000])
        elif answer:
            self.worker.kill()
            return ArmDied("runtime", "the process answered out of turn")
        try:
            how = self.worker.wait(END_SECONDS)
        except TimeoutError:
            self.worker.kill()
            return ArmDied("runtime", "the process closed its connection and went on")
        names = {
            "SIGSEGV": "segmentation fault (a write to an input, or an access out of bounds)",
            "SIGFPE": "arithmetic fault (an integer division by zero)",
            "SIGILL": "illegal instruction",
            "SIGBUS": "bus error (an access out of bounds)",
            "SIGABRT": "abort",
            "SIGXCPU": "used up its processor time",
            "SIGKILL": "killed from outside (out of memory?)",
        }
        text = names.get(str(how).split(" ")[0], f"the process ended with {how}")
        log = self.worker.log(1500).strip()
        return ArmDied("runtime", f"{text}{self._where()}" + (f"\n{log}" if log else ""))

    def _where(self) -> str:
        """The step that was running, which is only written down in check mode."""
        if self._pattern is None:
            return ""
        index = int(self._arena.bytes[:4].view(torch.int32)[0])
        return f" in {self._step_names[index]}" if 0 <= index < len(self._step_names) else ""

    def __enter__(self) -> Arm:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class PlanArm(Arm):
    """An artifact's launch plan, run by our executor: only its kernels are foreign code."""

    def __init__(
        self,
        zygote: Zygote,
        artifact: Artifact,
        shape_set: str,
        inputs: SharedBuffer,
        layout: Layout,
        workspace_bytes: int = WORKSPACE_BYTES,
    ) -> None:
        plan = artifact.plans[shape_set]
        apart = plan_memory(plan, reuse=False, red_zone=RED_ZONE)
        super().__init__(
            zygote,
            "ke_gym.evaluation.arms:serve_plan",
            artifact,
            shape_set,
            inputs,
            layout,
            plan.return_specs,
            apart,
            workspace_bytes + plan_memory(plan).size,
            prepares=plan.preparation is not None,
        )


class HostArm(Arm):
    """A module's own Python, run for real because it could not be traced; its kernels are built already.

    Its outputs are copied into the output buffer within the timed call.
    """

    def __init__(
        self,
        zygote: Zygote,
        artifact: Artifact,
        shape_set: str,
        inputs: SharedBuffer,
        layout: Layout,
        signature: bytes,
        workspace_bytes: int = WORKSPACE_BYTES,
    ) -> None:
        outputs = Signature.from_bytes(signature).outputs[shape_set]
        super().__init__(
            zygote,
            "ke_gym.evaluation._host:serve",
            artifact,
            shape_set,
            inputs,
            layout,
            outputs,
            MemoryPlan({}, {}, 0),
            workspace_bytes,
            signature,
        )


def open_arm(
    zygote: Zygote,
    artifact: Artifact,
    shape_set: str,
    inputs: SharedBuffer,
    layout: Layout,
    signature: bytes,
) -> Arm:
    """The arm for an artifact's lane; ``signature`` is what the artifact was built for."""
    if artifact.lane == "plan":
        return PlanArm(zygote, artifact, shape_set, inputs, layout)
    return HostArm(zygote, artifact, shape_set, inputs, layout, signature)


# -- inside the sandbox --------------------------------------------------------------------------------------


def serve_plan(channel: Channel, args: dict[str, Any], fds: list[int]) -> None:
    """Entry of a plan arm."""
    torch.set_grad_enabled(False)
    buffers = attach(args, fds)
    _, blob = channel.recv(OPEN_TIMEOUT)
    channel.recv(OPEN_TIMEOUT)
    try:
        artifact = Artifact.from_bytes(blob)
        layout = Layout.from_dict(args["layout"])
        inputs, state = layout.split(buffers[0])
        outputs = Layout.from_dict(args["outputs"]).views(buffers[1])
        runner = PlanRunner(artifact, args["shape_set"], inputs, state, outputs=outputs)
        apart = plan_memory(runner.plan, reuse=False, red_zone=RED_ZONE)
        arena = buffers[2].bytes[_MARK_BYTES:]
        checked = PlanRunner(
            artifact, args["shape_set"], inputs, state, outputs=outputs, arena=arena, memory=apart
        )
    except Exception as error:
        channel.send({"error": f"{type(error).__name__}: {error}"})
        return
    mark = ctypes.c_int32.from_address(buffers[2].bytes.data_ptr())
    channel.send({"steps": checked.step_names})
    serve(
        channel,
        runner.run,
        lambda: checked.run_marked(lambda step: setattr(mark, "value", step)),
        lambda: _profile_plan(runner),
        {_PREPARE: runner.prepare, _PREPARE_CHECK: checked.prepare},
    )


def attach(args: dict[str, Any], fds: list[int]) -> list[SharedBuffer]:
    torch.set_num_threads(args["threads"])
    sizes = (args["inputs"], args["outputs"]["bytes"], args["arena"])
    return [SharedBuffer.from_fd(fd, n, writable=i > 0) for i, (fd, n) in enumerate(zip(fds, sizes))]


def _profile_plan(runner: PlanRunner) -> list[tuple[str, str, float]]:
    kinds = ("aten" if "." in name else "kernel" for name in runner.step_names)
    return [(kind, name, seconds) for kind, (name, seconds) in zip(kinds, runner.step_times())]


def serve(
    channel: Channel,
    timed: Callable[[], object],
    checked: Callable[[], object],
    profiled: Callable[[], list[tuple[str, str, float]]],
    others: Mapping[bytes, Callable[[], object]] = MappingProxyType({}),
) -> None:
    """Answer commands until the parent is gone. One byte in, work, one byte out: nothing else is timed."""
    sock = channel.sock
    sock.setblocking(True)
    recv, send = sock.recv, sock.send
    while True:
        command = recv(1)
        try:
            if command == _GO:
                timed()
                send(_DONE)
            elif command == _CHECK:
                checked()
                send(_DONE)
            elif command in others:
                others[command]()
                send(_DONE)
            elif command == _PROFILE:
                runs = [profiled() for _ in range(channel.recv(OPEN_TIMEOUT)[0]["runs"])]
                middle = len(runs) // 2
                steps = [
                    (kind, name, sorted(run[i][2] for run in runs)[middle])
                    for i, (kind, name, _) in enumerate(runs[0])
                ]
                channel.send({"steps": steps})
            else:
                return
        except Exception as error:
            send(_FAILED)
            channel.send({"error": f"{type(error).__name__}: {error}"})
            return

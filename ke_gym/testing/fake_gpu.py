"""A GPU that is none: a driver whose kernels are Python functions on the processor's memory, and events that do
nothing. With them the executor's and the judge's logic runs everywhere."""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import socket
import subprocess
import tempfile
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import torch

from ke_gym.evaluation import (
    _gpu_host,
    gpu_apart,
    gpu_evaluator,
    gpu_host,
    gpu_judge,
    gpu_launcher,
    gpu_lock,
    gpu_stage,
    gpu_timing,
    race,
)
from ke_gym.evaluation.channel import Channel
from ke_gym.evaluation.gpu_client import GpuClient
from ke_gym.evaluation.leash import Leash
from ke_gym.languages import cpp
from ke_gym.languages.artifact import Artifact
from ke_gym.languages.plan import Alloc, Geometry, Launch, Plan, PlanInput, Ref, TensorSpec
from ke_gym.targets import cuda
from ke_gym.targets.cuda_driver import CudaError

if TYPE_CHECKING:
    from pytest import MonkeyPatch

_LOCKS = tempfile.TemporaryDirectory(prefix="ke_gym-locks-")  # a fake GPU is this process's alone
FACTS = cuda.Facts(
    model="Fake", arch="sm_90", cores=4, l1_bytes=1 << 16, l2_bytes=1 << 16, memory_bytes=1 << 34,
    shared_bytes=1 << 16, driver=13000, reads_host=False, uuid="GPU-fake", clock_mhz=1000,
)  # fmt: skip
PEAKS = cuda.Peaks(((1 << 20, 1e15),), 1e15, 1e15, 1e15, 1e15, 1e15, 1e-6)
KERNELS: dict[str, Callable[..., None]] = {}
SIDE = 99
"""The number of the stream on which launches are recorded."""


class FakeDriver:
    """Kernels are looked up by binary in ``KERNELS`` and called with addresses and scalars, as they lie there."""

    def __init__(self) -> None:
        self.modules: dict[int, bytes] = {}
        self.launches: list[tuple[str, Geometry, int]] = []
        self.maps: list[tuple[int, tuple[int, ...]]] = []
        self.graphs: list[str] = []
        self.allocated: dict[int, Any] = {}
        self._functions: list[tuple[int, str]] = []
        self._recorded: list[list[tuple[int, Any, Any]]] = []
        self._recording: list[tuple[int, Any, Any]] | None = None

    def load(self, binary: bytes) -> int:
        if binary == b"broken":
            raise CudaError("cuModuleLoadData", 209, "CUDA_ERROR_NO_BINARY_FOR_GPU")
        if binary == b"newer":
            raise CudaError("cuModuleLoadData", 222, "CUDA_ERROR_UNSUPPORTED_PTX_VERSION")
        number = len(self.modules) + 1
        self.modules[number] = binary
        return number

    def unload(self, module: int) -> None:
        self.modules[module] = b""

    def function(self, module: int, name: str) -> int:
        if name not in KERNELS:
            raise CudaError("cuModuleGetFunction", 500, "CUDA_ERROR_NOT_FOUND")
        self._functions.append((module, name))
        return len(self._functions) - 1

    def prepare(self, function: int, geometry: Geometry) -> None:
        if geometry.shared > FACTS.shared_bytes:
            raise CudaError("cuFuncSetAttribute", 1, "CUDA_ERROR_INVALID_VALUE")

    def config(self, geometry: Geometry) -> Any:
        return geometry

    def launch(self, function: int, config: Any, stream: int, parameters: Any) -> None:
        module, name = self._functions[function]
        assert self.modules[module], "launched from an unloaded module"
        if self._recording is not None:
            assert stream == SIDE, "launched on another stream while one is recorded"
            # As the driver does, arguments are copied: here every one is a pointer or a scalar of 8 bytes.
            copies = [ctypes.create_string_buffer(ctypes.string_at(p, 8), 8) for p in parameters]
            self._recording.append((function, config, copies))
            return
        self.launches.append((name, config, stream))
        KERNELS[name](*parameters)

    def least_work(self, address: int) -> Callable[[], object]:
        return int

    def side_stream(self) -> int:
        return SIDE

    def drop_stream(self, stream: int) -> None:
        self.graphs.append("stream dropped")

    def record(self, stream: int, enqueue: Callable[[], object]) -> int:
        self._recording = []
        try:
            enqueue()
        finally:
            self._recorded.append(self._recording)
            self._recording = None
        return len(self._recorded) - 1

    def drop_graph(self, graph: int) -> None:
        pass

    def instantiate(self, graph: int) -> int:
        self.graphs.append("instantiated")
        return graph

    def update(self, executable: int, graph: int) -> bool:
        self.graphs.append("updated")
        self._recorded[executable] = self._recorded[graph]
        return True

    def launch_graph(self, executable: int, stream: int) -> None:
        self.graphs.append(f"launched on {stream}")
        for function, config, arguments in self._recorded[executable]:
            self.launch(function, config, stream, [ctypes.addressof(argument) for argument in arguments])

    def drop_executable(self, executable: int) -> None:
        self.graphs.append("dropped")

    def tensor_map(self, where: int, address: int, dtype: str, shape: Any, *_: Any) -> None:
        assert where % 64 == 0
        self.maps.append((address, tuple(shape)))
        ctypes.memset(where, len(self.maps), 128)

    def resources(self, function: int) -> dict[str, int]:
        return {"registers": 32, "local": 0, "shared": 0}

    def blocks_per_processor(self, function: int, threads: int, shared: int) -> int:
        return 2

    def forget_persisting_lines(self) -> None:
        pass

    def allocate(self, size: int) -> int:
        memory = ctypes.create_string_buffer(size + 256)
        address = -(-ctypes.addressof(memory) // 256) * 256
        self.allocated[address] = memory
        return address

    def release(self, address: int) -> None:
        del self.allocated[address]

    def extent(self, address: int) -> tuple[int, int]:
        return address, 1 << 40

    def share(self, address: int) -> tuple[bytes, int]:
        return (address - 64).to_bytes(64, "little"), 64

    def open_shared(self, handle: bytes) -> int:
        if not any(handle):
            raise CudaError("cuIpcOpenMemHandle_v2", 1, "CUDA_ERROR_INVALID_VALUE")
        return int.from_bytes(handle, "little")

    def close_shared(self, begin: int) -> None:
        pass


class FakeEvent:
    """It has happened when it is asked for the second time.

    Time stands still, for the device and for who measures it, but for a millisecond to every event, for spins, and for
    what kernels ``idle``: so every race ends in the same way, however busy the machine is.
    """

    now = 0.0

    def __init__(self, enable_timing: bool = False) -> None:
        self.when = 0.0
        self._asked = False

    def record(self) -> None:
        idle(1e-3)
        self.when = FakeEvent.now

    def query(self) -> bool:
        asked, self._asked = self._asked, True
        return asked

    def elapsed_time(self, later: FakeEvent) -> float:
        return 1e3 * (later.when - self.when)


class FakeClocks:
    """A clock that always runs at its highest rate, unless ``now`` says otherwise."""

    now = 1000

    def __init__(self, uuid: str) -> None:
        pass

    def mhz(self) -> int:
        return self.now

    def most_mhz(self) -> int:
        return 1000


class FakeLauncher(gpu_launcher.Launcher):
    """One in a thread of this process, which no filter may stop; it ends when the other end of ``sock`` is closed."""

    def __init__(self, sock: socket.socket) -> None:
        super().__init__(Channel(sock), FakeDriver(), torch.device("cpu"))  # type: ignore[arg-type]
        threading.Thread(target=self.serve, daemon=True).start()

    def serve(self) -> None:
        with self._channel:
            super().serve()

    def seal(self) -> None:
        pass


class FakeHost(_gpu_host.Host):
    """One in a thread of this process, which does not stop when it should; it ends when the other end of ``sock`` is
    closed."""

    def __init__(self, sock: socket.socket) -> None:
        super().__init__(Channel(sock), FakeDriver(), torch.device("cpu"))  # type: ignore[arg-type]
        threading.Thread(target=self.serve, daemon=True).start()

    def serve(self) -> None:
        with self._link, contextlib.suppress(OSError):
            self._link.send({})
            super().serve()


class Sleeper:
    """A process for whoever must stop one, in the place of a module's own."""

    def __init__(self) -> None:
        self._process = subprocess.Popen(["sleep", "600"])
        number = self._process.pid
        self.leash = Leash(os.pidfd_open(number), os.open(f"/proc/{number}/stat", os.O_RDONLY))

    def wait(self, timeout: float) -> str:
        raise TimeoutError

    def close(self) -> None:
        self.leash.close()
        self._process.kill()
        self._process.wait()


class InProcess(GpuClient):
    """A client whose judge is an object of this process; whatever it says goes through JSON all the same.

    One answers at a time: judges set torch's defaults, which are the process's.
    """

    _turn = threading.RLock()

    def _start(self, zygote: Any, baseline: str) -> str:
        with self._turn:
            self.server = gpu_judge.GpuJudge(self.task, baseline, torch.device("cpu"))
        self._exposed = self.server.stage.facts.reads_host
        return self.server.stage.facts.uuid

    def running(self) -> bool:
        return self.alive

    def _start_launcher(self, zygote: Any) -> None:
        self.server._link, theirs = self._link, _ = socket.socketpair()
        FakeLauncher(theirs)

    def _start_host(self, link: socket.socket) -> Any:
        FakeHost(link.dup())
        return Sleeper()

    def _exchange(
        self, do: str, arguments: dict[str, Any], blob: bytes, fds: Sequence[int] = ()
    ) -> tuple[dict[str, Any], bytes]:
        assert self.alive
        request = json.loads(json.dumps(arguments))
        if fds:
            request["fds"] = [os.dup(fd) for fd in fds]
        with self._turn:
            answer = gpu_judge.answer_to(getattr(self.server, do), request, blob)
        header, data = answer if isinstance(answer, tuple) else (answer, b"")
        return json.loads(json.dumps(header)), data


def pointer(where: int) -> int:
    """The pointer argument that a kernel parameter holds."""
    return ctypes.c_void_p.from_address(where).value or 0


def floats(where: int, count: int) -> torch.Tensor:
    """The fp32 memory that a pointer argument points to."""
    raw = (ctypes.c_float * count).from_address(pointer(where))
    return torch.frombuffer(raw, dtype=torch.float32)


def idle(seconds: float) -> None:
    """What a kernel calls to take longer, by the device's clock."""
    FakeEvent.now += seconds


def integer(where: int) -> int:
    return ctypes.c_int64.from_address(where).value


def kernel(function: Callable[..., None]) -> Callable[..., None]:
    """Register a function as the kernel of that name."""
    KERNELS[function.__name__] = function
    return function


def one_launch(name: str, spec: TensorSpec, **options: Any) -> Artifact:
    """``out = name(x, n)`` on one fp32 tensor, as an artifact with shape set "default"."""
    count = spec.storage_bytes // 4
    launch = Launch(
        "k",
        name,
        (Ref(0), Ref(1), count),
        ("float*", "float*", "int64_t"),
        Geometry((1, 1, 1), (32, 1, 1)),
        **options,
    )
    plan = Plan((PlanInput("input", "0", spec),), (Alloc(1, spec), launch), (1,), (spec,), "cuda")
    return Artifact("cuda", "plan", "", {"k": name.encode()}, {"default": plan}, arch="sm_90a")


def stand_in(patch: MonkeyPatch, client: type[GpuClient] = InProcess) -> None:
    """Let the judge of a GPU find this one: its driver, clocks, facts, peaks, time, and what it calls in ``torch.cuda``.

    Evaluators that are opened reach their judges through ``client``.
    """
    for name, fake in {
        "Event": FakeEvent,
        "synchronize": lambda *_: None,
        "_sleep": lambda cycles: idle(cycles / 1e9),
        "empty_cache": lambda: None,
        "is_current_stream_capturing": lambda: False,
        "max_memory_allocated": lambda *_: 0,
        "memory_reserved": lambda *_: 0,
        "mem_get_info": lambda *_: (1 << 34, 1 << 34),
        "current_stream": lambda *_: SimpleNamespace(cuda_stream=0),
    }.items():
        patch.setattr(torch.cuda, name, fake)
    clock = SimpleNamespace(perf_counter=lambda: FakeEvent.now, sleep=idle)
    for module in (gpu_apart, gpu_host, gpu_stage, gpu_timing, race):
        patch.setattr(module, "time", clock)
    patch.setattr(gpu_stage, "SOAK_CALLS", 100)
    patch.setattr(gpu_judge, "Driver", FakeDriver)
    patch.setattr(cpp, "cached", cpp.cached)  # a module's process has its own
    patch.setattr(gpu_lock, "FOLDER", Path(_LOCKS.name))
    patch.setattr(gpu_stage, "Clocks", FakeClocks)
    patch.setattr(gpu_launcher, "Clocks", FakeClocks)
    patch.setattr(gpu_evaluator, "GpuClient", client)
    patch.setattr(cuda, "measure", lambda _: PEAKS)
    patch.setattr(cuda, "facts", lambda _: FACTS)
    patch.setattr(cuda, "alike", lambda _: [0])

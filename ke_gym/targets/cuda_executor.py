"""Runs launch plans on an NVIDIA GPU: device code through the driver, ATen calls through torch, one stream.

Only device code is foreign, so this runs in a trusted process. A kernel that faults takes the process's context
with it and nothing else.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch

from ke_gym.languages.plan import Call, Launch, Plan, Scratch, TensorMap, TensorSpec
from ke_gym.targets._memory import MemoryPlan, PlanError, plan_memory
from ke_gym.targets.cuda_driver import TENSOR_MAP_BYTES, CudaError, Driver, runtime
from ke_gym.targets.executor import Closure, PlanRunner

if TYPE_CHECKING:
    from ke_gym.languages.artifact import Artifact

ALIGNMENT = 256
"""What every storage is aligned to: Triton specializes kernels on 16, TMA needs 128."""
_MAP_ALIGNMENT = 64
_TOO_NEW = (
    "; it was made by a toolkit newer than this driver: update the driver, or compile with an older toolkit"
)
_REMEDIES = {
    200: _TOO_NEW,
    209: "; it was compiled for another architecture: compile it for this one (--arch)",
    218: _TOO_NEW,
    222: _TOO_NEW,
}
"""What to do about a ``CUresult`` of loading a binary."""


class CudaRunner(PlanRunner):
    """One plan of an artifact, ready to run on given tensors of one GPU; see ``PlanRunner``.

    ``run`` enqueues the plan on ``stream`` (a ``cudaStream_t``; by default what torch's current one is by then) and
    returns at once; a plan that says so goes as one CUDA graph. ``device`` "cpu" is for tests with a driver that is none.
    ``preparing``: the memory of the preparation's own intermediates, and where they lie in it. ``close`` unloads the
    kernels.
    """

    def __init__(
        self,
        artifact: Artifact,
        shape_set: str,
        inputs: Sequence[torch.Tensor],
        state: Mapping[str, torch.Tensor],
        *,
        driver: Driver,
        device: torch.device,
        stream: int | None = None,
        outputs: Sequence[torch.Tensor] | None = None,
        arena: torch.Tensor | None = None,
        memory: MemoryPlan | None = None,
        prepared: Sequence[torch.Tensor] | None = None,
        preparing: tuple[torch.Tensor, MemoryPlan] | None = None,
    ) -> None:
        plan = artifact.plans[shape_set]
        if plan.device != "cuda":
            raise PlanError("the plan was made for a CPU; build it with target cuda")
        self._driver = driver
        self._device = device
        self._fixed = stream
        self._last: torch.cuda.Stream | None = None
        if stream is None:
            self._last = torch.cuda.current_stream(device)
            stream = self._last.cuda_stream
        self._stream = stream
        self.scratch = self._bytes(_scratch_bytes(plan))
        """Memory of single launches, used by one after the other."""
        self._preparing = preparing or (None, None)
        self._calls = any(isinstance(step, Call) for step in plan.steps)
        self._graph: Graph | None = None
        self._libraries, self._preparation = {}, None
        try:
            super().__init__(
                artifact,
                shape_set,
                inputs,
                state,
                outputs=outputs,
                arena=arena,
                memory=memory or plan_memory(plan, alignment=ALIGNMENT),
                prepared=prepared,
            )
            if plan.graph:
                if not self.capturable:
                    raise PlanError(
                        "the plan is to run as a CUDA graph, but not all of its steps are launches"
                    )
                self._graph = Graph(driver)
        except BaseException:
            self.close()
            raise

    @property
    def capturable(self) -> bool:
        """Whether the plan could run as one CUDA graph that is worth it: launches alone, and several.

        Library calls take memory from torch while they run and may wait for the device.
        """
        launches = sum(isinstance(step, Launch) for step in self.plan.steps)
        return 1 < launches == len(self._steps)

    def run(self) -> tuple[torch.Tensor, ...]:
        """Enqueue the plan once."""
        self._follow()
        if self._graph is None or runtime.is_current_stream_capturing():
            return super().run()
        self._renew_outputs()
        arguments = tuple(cell.value for cell in self._cells.values())
        self._graph.run(arguments, self._enqueue_on, self._stream)
        return self._collect()

    def _beside(self, artifact: Artifact, shape_set: str, state: Mapping[str, torch.Tensor]) -> PlanRunner:
        return CudaRunner(
            artifact, shape_set, [], state, driver=self._driver, device=self._device, stream=self._fixed,
            outputs=self.prepared, arena=self._preparing[0], memory=self._preparing[1],
        )  # fmt: skip

    def _follow(self) -> None:
        """Enqueue on torch's current stream from now on, unless one was given: after what the last one still does in memory
        that this runner keeps."""
        if self._last is None:
            return
        now = torch.cuda.current_stream(self._device)
        if now.cuda_stream == self._stream:
            return
        if not runtime.is_current_stream_capturing():  # nothing outside of a graph can be waited for in it
            now.wait_stream(self._last)
        self._last, self._stream = now, now.cuda_stream

    def _enqueue_on(self, stream: int) -> None:
        """Enqueue the plan's launches on another stream."""
        before, self._stream = self._stream, stream
        try:
            for _, step in self._steps:
                step()
        finally:
            self._stream = before

    @property
    def device(self) -> torch.device:
        return self._device

    @property
    def memory(self) -> MemoryPlan:
        """Where the intermediates lie in ``arena``."""
        return self._memory

    @property
    def arena(self) -> torch.Tensor:
        """The memory of the intermediates, as uint8."""
        return self._arena

    def place(
        self,
        inputs: Sequence[torch.Tensor],
        state: Mapping[str, torch.Tensor],
        outputs: Sequence[torch.Tensor],
    ) -> None:
        """Use these tensors from now on, the outputs too. Raises ``PlanError`` if they are not the plan's."""
        self._outputs = list(outputs)
        if self._calls:
            self._steps = []  # ATen calls hold their tensors: bound anew
            self.bind(inputs, state)
            return
        self.bind(inputs, state)
        for value, position in self._direct.items():
            self._define(value, self._outputs[position])

    def fill_scratch(self, byte: int) -> None:
        """Overwrite the memory of single launches."""
        self.scratch.fill_(byte)

    def step_times(self) -> list[tuple[str, float]]:
        """Execute the plan once and return (step, seconds) for each, by device events around it."""
        self._follow()
        self._renew_outputs()
        marks = [runtime.Event(enable_timing=True) for _ in range(len(self._steps) + 1)]
        marks[0].record()
        for (_, step), mark in zip(self._steps, marks[1:]):
            step()
            mark.record()
        self._collect()
        torch.cuda.synchronize(self._device)
        pairs = zip(self.step_names, marks, marks[1:])
        return [(name, before.elapsed_time(after) / 1e3) for name, before, after in pairs]

    def resources(self) -> dict[str, dict[str, int]]:
        """Per kernel: registers, spilled and static shared bytes, dynamic shared bytes, blocks per processor."""
        found = {}
        for step in self.plan.steps:
            if isinstance(step, Launch) and step.geometry is not None:
                function = self._function(step)
                threads = step.geometry.block[0] * step.geometry.block[1] * step.geometry.block[2]
                found[step.kernel] = self._driver.resources(function) | {
                    "threads": threads,
                    "dynamic": step.geometry.shared,
                    "blocks": self._driver.blocks_per_processor(function, threads, step.geometry.shared),
                }
        return found

    def close(self) -> None:
        """Unload the kernels; whatever was enqueued must have ended. A lost context has none left."""
        self._steps = []
        if isinstance(self._preparation, CudaRunner):
            self._preparation.close()
        with contextlib.suppress(CudaError):
            if self._graph is not None:
                self._graph.close()
            while self._libraries:
                self._driver.unload(self._libraries.popitem()[1])

    def _load(self, binary: bytes) -> int:
        try:
            return self._driver.load(binary)
        except CudaError as error:
            if error.not_of_the_plan:
                raise
            raise PlanError(
                f"the driver refuses the binary: {error}{_REMEDIES.get(error.code, '')}"
            ) from None

    def _function(self, step: Launch) -> int:
        assert step.geometry is not None
        try:
            function = self._driver.function(self._libraries[step.binary], step.kernel)
            self._driver.prepare(function, step.geometry)
        except KeyError:
            raise PlanError(f"kernel {step.kernel} is in binary {step.binary}, which is missing") from None
        except CudaError as error:
            if error.not_of_the_plan:
                raise
            raise PlanError(f"kernel {step.kernel} cannot be launched here: {error}") from None
        return function

    def _launch(self, step: Launch) -> Closure:
        if step.geometry is None:
            raise PlanError(f"kernel {step.kernel} has no launch geometry")
        function = self._function(step)
        config = self._driver.config(step.geometry)
        slots: list[Any] = []
        maps: list[_Map] = []
        used = 0
        for argument, ctype in zip(step.args, step.ctypes):
            if isinstance(argument, Scratch):
                slots.append(ctypes.c_void_p(self.scratch.data_ptr() + used))
                used += _align(argument.size)
            elif isinstance(argument, TensorMap):
                cell = self._cells.setdefault(argument.value, ctypes.c_void_p())
                maps.append(_Map(self._driver, argument, cell))
                slots.append(maps[-1].buffer)
            else:
                slots.append(self._argument(step, argument, ctype))
        addresses = [slot.address if isinstance(slot, _Aligned) else ctypes.addressof(slot) for slot in slots]
        parameters = (ctypes.c_void_p * max(1, len(addresses)))(*addresses)
        return functools.partial(self._enqueue, step.kernel, function, config, parameters, maps, slots)

    def _enqueue(
        self, kernel: str, function: int, config: Any, parameters: Any, maps: list[_Map], slots: list[Any]
    ) -> None:
        """``slots`` hold what ``parameters`` points to, and the pointers in them change when tensors do."""
        for one in maps:
            one.renew()
        try:
            self._driver.launch(function, config, self._stream, parameters)
        except CudaError as error:
            if error.not_of_the_plan:
                raise
            raise PlanError(f"kernel {kernel} cannot be launched here: {error}") from None


class Graph:
    """A plan's launches as one CUDA graph, enqueued on a stream at once.

    Recorded when it is first run, and anew whenever an argument is another: the driver then takes the new
    arguments over into the graph that it has. Whoever times ``run`` times that too.
    """

    def __init__(self, driver: Driver) -> None:
        self._driver = driver
        self._side = driver.side_stream()
        self._executable: int | None = None
        self._arguments: tuple[int | None, ...] = ()

    def run(self, arguments: tuple[int | None, ...], enqueue: Callable[[int], None], stream: int) -> None:
        """Enqueue on ``stream`` the graph of what ``enqueue(stream)`` launches, which depends on ``arguments`` alone."""
        if self._executable is None or arguments != self._arguments:
            self._renew(enqueue)
            self._arguments = arguments
        assert self._executable is not None
        self._driver.launch_graph(self._executable, stream)

    def _renew(self, enqueue: Callable[[int], None]) -> None:
        recorded = self._driver.record(self._side, lambda: enqueue(self._side))
        try:
            if self._executable is not None and not self._driver.update(self._executable, recorded):
                self._driver.drop_executable(self._executable)
                self._executable = None
            if self._executable is None:
                self._executable = self._driver.instantiate(recorded)
        finally:
            self._driver.drop_graph(recorded)

    def close(self) -> None:
        """Give up the graph, which must not be running."""
        if self._executable is not None:
            self._driver.drop_executable(self._executable)
            self._executable = None
        self._driver.drop_stream(self._side)


class _Aligned:
    """Host memory for one tensor map."""

    def __init__(self) -> None:
        self._raw = ctypes.create_string_buffer(TENSOR_MAP_BYTES + _MAP_ALIGNMENT)
        self.address = -(-ctypes.addressof(self._raw) // _MAP_ALIGNMENT) * _MAP_ALIGNMENT


class _Map:
    """A TMA descriptor that follows its tensor."""

    def __init__(self, driver: Driver, described: TensorMap, cell: ctypes.c_void_p) -> None:
        self.buffer = _Aligned()
        self._driver, self._described, self._cell = driver, described, cell
        self._address: int | None = None

    def renew(self) -> None:
        if self._cell.value == self._address:
            return
        d = self._described
        itemsize = TensorSpec(d.shape, d.stride, d.dtype).torch_dtype.itemsize
        try:
            self._driver.tensor_map(
                self.buffer.address, self._cell.value or 0, d.dtype, d.shape, d.stride, itemsize, d.box, d.swizzle,
                d.nan_fill,
            )  # fmt: skip
        except CudaError as error:
            raise PlanError(f"no TMA descriptor can be made of {d}: {error}") from None
        self._address = self._cell.value


def _scratch_bytes(plan: Plan) -> int:
    launches = (step for step in plan.steps if isinstance(step, Launch))
    return max((sum(_align(a.size) for a in s.args if isinstance(a, Scratch)) for s in launches), default=0)


def _align(size: int) -> int:
    return -(-size // ALIGNMENT) * ALIGNMENT

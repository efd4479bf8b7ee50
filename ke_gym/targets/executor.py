"""Runs launch plans on the CPU: in the arms of an evaluation, and in the user's process once deployed.

A plan becomes a list of Python closures once; after that a step costs a microsecond or two. Intermediates
live in one arena, reused by liveness.
"""

from __future__ import annotations

import ctypes
import functools
import math
import tempfile
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch

from ke_gym.languages.declarations import SCALARS
from ke_gym.languages.plan import Alloc, Arg, Call, Launch, Plan, PlanInput, Ref, TensorSpec, refs, uses
from ke_gym.targets._memory import (
    MemoryPlan,
    PlanError,
    alias_roots,
    plan_memory,
    resolve,
    view,
)

if TYPE_CHECKING:
    from ke_gym.languages.artifact import Artifact

__all__ = ["MemoryPlan", "PlanError", "PlanRunner", "plan_memory"]

Closure = Callable[[], object]
_NEVER_INTO = (torch.Tag.dynamic_output_shape, torch.Tag.nondeterministic_seeded)
AS_STRIDED = ("aten.as_strided.default", "aten.as_strided_copy.default")


class PlanRunner:
    """One plan of an artifact, ready to run on given tensors.

    ``inputs`` and ``state`` are what the plan's inputs name; they may be replaced by ``bind``. ``outputs``:
    where results go, in every run; without it every run returns fresh tensors. ``arena``: uint8 memory of
    ``memory.size`` bytes for the intermediates, which ``memory`` places; by default its own.

    A plan that has a preparation runs only after ``prepare``, and again so once it is given state that lies elsewhere;
    whoever changes the state's contents prepares again. ``prepared``: where that goes, by default its own memory.
    """

    def __init__(
        self,
        artifact: Artifact,
        shape_set: str,
        inputs: Sequence[torch.Tensor],
        state: Mapping[str, torch.Tensor],
        *,
        outputs: Sequence[torch.Tensor] | None = None,
        arena: torch.Tensor | None = None,
        memory: MemoryPlan | None = None,
        prepared: Sequence[torch.Tensor] | None = None,
    ) -> None:
        self.plan: Plan = artifact.plans[shape_set]
        made = self.plan.preparation
        if prepared is None and made is not None:
            prepared = [self._empty(spec) for spec in made.return_specs]
        self.prepared = list(prepared or ())
        """What the preparation makes."""
        self._preparation: PlanRunner | None = None
        self._current = made is None
        self._constants = {name: self._resident(tensor) for name, tensor in artifact.constants.items()}
        self._state = dict(state)
        self._outputs = None if outputs is None else list(outputs)
        self._memory = memory or plan_memory(self.plan)
        self._arena = arena if arena is not None else self._bytes(self._memory.size)
        self._roots = alias_roots(self.plan)
        self._fitting: dict[int, TensorSpec] = {}
        """Values that came out as the memory of the outputs that they are, or are views of, and as what tensors: from then on
        calls write these in place."""
        # Kernels read inputs through pointers, which are easily replaced; ATen calls hold the tensors.
        calls = [step for step in self.plan.steps if isinstance(step, Call)]
        self._reads_tensors = any(v < len(self.plan.inputs) for step in calls for v in uses(step))
        self._libraries: dict[str, Any] = {}
        for name, data in artifact.binaries.items():
            self._libraries[name] = self._load(data)
        self._values: dict[int, torch.Tensor] = {}
        self._cells: dict[int, ctypes.c_void_p] = {}
        self._steps: list[tuple[str, Closure]] = []
        if made is not None:
            used = {step.binary for step in made.steps if isinstance(step, Launch)}
            binaries = {name: data for name, data in artifact.binaries.items() if name in used}
            alone = replace(artifact, plans={shape_set: made}, binaries=binaries)
            self._preparation = self._beside(alone, shape_set, state)
        self.bind(inputs, state)

    def bind(self, inputs: Sequence[torch.Tensor], state: Mapping[str, torch.Tensor] | None = None) -> None:
        """Use these tensors from now on.

        Raises ``PlanError`` unless shape, stride and dtype are the plan's.
        """
        if state is not None:
            self._current = self._current and (self._preparation is None or _same_places(state, self._state))
            self._state = dict(state)
        given = [self._given(entry, inputs) for entry in self.plan.inputs]
        rebuild = not self._steps or self._reads_tensors
        if rebuild:
            self._values.clear()
            self._cells.clear()
        for number, tensor in enumerate(given):
            self._define(number, tensor)
        if rebuild:
            self._place_allocations()
            self._steps = self._compile()
        self._borrowed = {t.untyped_storage().data_ptr() for t in given}

    def prepare(self, state: Mapping[str, torch.Tensor] | None = None) -> None:
        """Run the preparation, if there is one, on ``state``, by default what is bound, as it is now."""
        if state is not None:
            self._state = dict(state)
        if self._preparation is not None:
            self._preparation.bind([], self._state)
            self._preparation.run()
        self._current = True

    def run(self) -> tuple[torch.Tensor, ...]:
        """Execute the plan once."""
        self._renew_outputs()
        for _, step in self._steps:
            step()
        return self._collect()

    def step_times(self) -> list[tuple[str, float]]:
        """Execute the plan once and return (step, seconds) for each: a kernel's name or an ATen overload."""
        self._renew_outputs()
        times, clock = [], time.perf_counter
        for name, step in self._steps:
            start = clock()
            step()
            times.append((name, clock() - start))
        self._collect()
        return times

    def run_marked(self, mark: Callable[[int], None]) -> tuple[torch.Tensor, ...]:
        """Like ``run``, but calls ``mark(i)`` before step ``i``, so that a crash can be given a place."""
        self._renew_outputs()
        for index, (_, step) in enumerate(self._steps):
            mark(index)
            step()
        mark(len(self._steps))
        return self._collect()

    @property
    def step_names(self) -> list[str]:
        """The kernel or ATen overload of every step, in order."""
        return [name for name, _ in self._steps]

    @property
    def device(self) -> torch.device:
        """Where all the plan's tensors lie."""
        return torch.device("cpu")

    def _beside(self, artifact: Artifact, shape_set: str, state: Mapping[str, torch.Tensor]) -> PlanRunner:
        """What runs the preparation."""
        return PlanRunner(artifact, shape_set, [], state, outputs=self.prepared)

    def _load(self, binary: bytes) -> Any:
        """What ``_launch`` finds kernels in."""
        return load_library(binary)

    def _bytes(self, size: int) -> torch.Tensor:
        return torch.empty(size, dtype=torch.uint8, device=self.device)

    def _resident(self, tensor: torch.Tensor) -> torch.Tensor:
        """The tensor on this device, laid out as it is."""
        if tensor.device == self.device:
            return tensor
        return self._empty(TensorSpec.of(tensor)).copy_(tensor)

    def _empty(self, spec: TensorSpec) -> torch.Tensor:
        return torch.empty_strided(spec.shape, spec.stride, dtype=spec.torch_dtype, device=self.device)

    def _given(self, entry: PlanInput, inputs: Sequence[torch.Tensor]) -> torch.Tensor:
        try:
            if entry.source == "input":
                tensor = inputs[int(entry.name)]
            elif entry.source == "state":
                tensor = self._state[entry.name]
            elif entry.source == "prepared":
                tensor = self.prepared[int(entry.name)]
            else:
                tensor = self._constants[entry.name]
        except (IndexError, KeyError, ValueError):
            raise PlanError(f"the plan needs {entry.source} {entry.name}, which is not given") from None
        if not matches(tensor, entry.spec):
            raise PlanError(f"{entry.source} {entry.name} is {TensorSpec.of(tensor)}, not {entry.spec}")
        return tensor.detach()

    def _define(self, number: int, tensor: torch.Tensor) -> None:
        self._values[number] = tensor
        self._cells.setdefault(number, ctypes.c_void_p()).value = tensor.data_ptr() or None

    def _place_allocations(self) -> None:
        """Give every ``Alloc`` its memory: a returned one is the output itself, others lie in the arena."""
        self._direct: dict[int, int] = {}  # value -> position among the returns
        returned: dict[int, int] = {}
        for position, value in enumerate(self.plan.returns):
            returned.setdefault(value, position)
        self._fresh: list[tuple[int, TensorSpec]] = []
        for step in self.plan.steps:
            if not isinstance(step, Alloc):
                continue
            position = returned.get(step.out, -1)
            if position >= 0 and step.spec == self.plan.return_specs[position]:
                self._direct[step.out] = position
                if self._outputs is None:
                    self._fresh.append((step.out, step.spec))
                    self._cells[step.out] = ctypes.c_void_p()
                else:
                    self._define(step.out, self._outputs[position])
            else:
                self._define(step.out, view(self._arena, step.spec, self._memory.offsets.get(step.out, 0)))

    def _renew_outputs(self) -> None:
        if not self._current:
            raise PlanError("the plan's preparation has not been run for this state")
        for value, spec in self._fresh:
            self._define(value, self._empty(spec))

    def _collect(self) -> tuple[torch.Tensor, ...]:
        results: list[torch.Tensor] = []
        for position, value in enumerate(self.plan.returns):
            tensor = self._values[value]
            if self._direct.get(value) == position:
                results.append(tensor)
                continue
            spec = self.plan.return_specs[position]
            if not matches(tensor, spec):
                raise PlanError(
                    f"output {position} came out as {TensorSpec.of(tensor)}, the plan says {spec}"
                )
            if self._outputs is not None and tensor.data_ptr() == self._outputs[position].data_ptr():
                results.append(self._outputs[position])
                continue
            root = self._roots[value]
            made = self._values.get(root)
            if made is not None and _covers(tensor, made):
                self._fitting[root] = TensorSpec.of(made)
            if self._outputs is not None:
                results.append(self._outputs[position].copy_(tensor))
            elif self._is_own(root, tensor) and self._position(root) == position:
                results.append(tensor)
            else:
                results.append(self._empty(spec).copy_(tensor))
        return tuple(results)

    def _is_own(self, root: int, tensor: torch.Tensor) -> bool:
        """Whether an ATen call made this tensor and shares its memory with nothing the caller gave."""
        return root in self._owned and tensor.untyped_storage().data_ptr() not in self._borrowed

    def _position(self, root: int) -> int:
        """The first output that is a value or a view of it; -1 if none is."""
        return next((p for p, value in enumerate(self.plan.returns) if self._roots[value] == root), -1)

    def _compile(self) -> list[tuple[str, Closure]]:
        steps: list[tuple[str, Closure]] = []
        last_use = _last_uses(self.plan, self._roots)
        self._owned: set[int] = set()
        finished: list[int] = []
        for index, step in enumerate(self.plan.steps):
            finished += [v for v, last in last_use.items() if last == index]
            if isinstance(step, Launch):
                steps.append((step.kernel, self._launch(step)))
            elif isinstance(step, Call) and not self._hoist(step):
                self._owned.update(v for v in step.outs if self._roots[v] == v)
                steps.append((step.target, self._call(step, tuple(finished))))
                finished = []
        return steps

    def _launch(self, step: Launch) -> Closure:
        try:
            function = self._libraries[step.binary][step.kernel]
        except KeyError:
            raise PlanError(f"kernel {step.kernel} is in binary {step.binary}, which is missing") from None
        except AttributeError:
            raise PlanError(f"binary {step.binary} has no kernel {step.kernel}") from None
        arguments: list[Any] = []
        for argument, ctype in zip(step.args, step.ctypes):
            arguments.append(self._argument(step, argument, ctype))
        function.argtypes = [type(a) for a in arguments]
        function.restype = None
        return functools.partial(function, *arguments)

    def _argument(self, step: Launch, argument: Arg, ctype: str) -> Any:
        pointer = "*" in ctype
        if isinstance(argument, Ref):
            if not pointer:
                raise PlanError(f"{step.kernel}: a tensor is passed where the kernel takes {ctype}")
            return self._cells.setdefault(argument.value, ctypes.c_void_p())
        if pointer:
            if argument is not None:
                raise PlanError(f"{step.kernel}: {argument!r} is passed where the kernel takes {ctype}")
            return ctypes.c_void_p()
        scalar = SCALARS.get(ctype)
        if scalar is None:
            raise PlanError(f"{step.kernel}: arguments of type {ctype} are not supported")
        try:
            return scalar(argument)
        except TypeError:
            raise PlanError(f"{step.kernel}: {argument!r} is passed where the kernel takes {ctype}") from None

    def _hoist(self, step: Call) -> bool:
        """Evaluate a view of memory that stays where it is now instead of in every run.

        Returns False where it is no such view: its operand appears only during a run, or the operator
        (``reshape``, ``contiguous``) copied.
        """
        if len(step.outs) != 1:
            return False
        (value,) = step.outs
        if self._roots[value] == value or any(v not in self._values for v in uses(step)):
            return False
        overload = resolve(step.target)
        if any(a.alias_info is not None and a.alias_info.is_write for a in overload._schema.arguments):
            return False
        result = overload(*self._positional(step), **self._concrete_kwargs(step))
        base = self._values[self._roots[value]]
        if result.untyped_storage().data_ptr() != base.untyped_storage().data_ptr():
            return False
        self._define(value, result)
        return True

    def _call(self, step: Call, finished: tuple[int, ...]) -> Closure:
        """One ATen call. Arguments that never change are bound now; those that a run makes are looked up."""
        overload = resolve(step.target)
        values, outs = self._values, step.outs
        cells = [self._cells.setdefault(out, ctypes.c_void_p()) for out in outs]
        position, variant = self._destination(step)
        made = {v for v in uses(step) if v not in values}
        slots = [(i, a.value) for i, a in enumerate(step.args) if isinstance(a, Ref) and a.value in made]
        nested = [i for i, a in enumerate(step.args) if isinstance(a, tuple) and made & set(refs(a))]
        named = [n for n, a in step.kwargs.items() if made & set(refs((a,)))]
        skip = {i for i, _ in slots} | set(nested)
        args = [None if i in skip else a for i, a in enumerate(self._positional(step, skip))]
        kwargs = {n: None if n in named else self._concrete(a) for n, a in step.kwargs.items()}

        def call() -> None:
            for i, value in slots:
                args[i] = values[value]
            for i in nested:
                args[i] = self._concrete(step.args[i])
            for name in named:
                kwargs[name] = self._concrete(step.kwargs[name])
            if variant is not None and outs[0] in self._fitting and self._outputs is not None:
                spec, out = self._fitting[outs[0]], self._outputs[position]
                if spec != self.plan.return_specs[position]:
                    out = out.as_strided(spec.shape, spec.stride)
                result = variant(*args, **kwargs, out=out)
            else:
                result = overload(*args, **kwargs)
            results = [result] if isinstance(result, torch.Tensor) else flatten(result)
            for number, cell, tensor in zip(outs, cells, results, strict=True):
                if tensor is not None:
                    values[number] = tensor
                    cell.value = tensor.data_ptr()
                elif number not in finished:
                    raise PlanError(f"{step.target} gives no tensor here where it was traced to give one")
            for i in skip:
                args[i] = None
            for value in finished:
                values.pop(value, None)

        return call

    def _destination(self, step: Call) -> tuple[int, Any]:
        """Which output is what a call makes, and the overload that writes it there; None where it has to be copied.

        A copy would be counted as the plan's time, and whoever deploys it gets the tensor itself.
        """
        value = step.outs[0] if len(step.outs) == 1 else -1
        if self._roots.get(value) != value or (position := self._position(value)) < 0:
            return -1, None
        return position, _out_variant(resolve(step.target))

    def _positional(self, step: Call, skip: Collection[int] = ()) -> list[Any]:
        """The arguments of a call but those in ``skip``, which a run makes.

        ``as_strided`` counts from the beginning of a storage. The plan means the storage of its operand; here, that
        holds other tensors too.
        """
        args: list[Any] = [None if i in skip else self._concrete(a) for i, a in enumerate(step.args)]
        if step.target not in AS_STRIDED or 0 in skip:
            return args
        operand, root = args[0], self._values[self._roots[step.args[0].value]]
        begin = root.storage_offset() * root.itemsize // operand.itemsize
        size, stride = args[1], args[2]
        offset = args[3] + begin if len(args) > 3 and args[3] is not None else operand.storage_offset()
        end = offset + sum((n - 1) * by for n, by in zip(size, stride)) + 1
        whole = TensorSpec.of(root).storage_bytes // operand.itemsize
        if math.prod(size) and not begin <= offset < end <= begin + whole:
            raise PlanError(
                f"{step.target} {tuple(size)} by {tuple(stride)} reaches beyond its operand's memory"
            )
        return [operand, size, stride, offset]

    def _concrete(self, argument: Any) -> Any:
        if isinstance(argument, Ref):
            return self._values[argument.value]
        if isinstance(argument, tuple):
            return tuple(self._concrete(a) for a in argument)
        return self.device if isinstance(argument, torch.device) else argument

    def _concrete_kwargs(self, step: Call) -> dict[str, Any]:
        return {name: self._concrete(value) for name, value in step.kwargs.items()}


@functools.lru_cache(
    maxsize=64
)  # one instance per process: what it counted while checked, it knows when timed
def load_library(binary: bytes) -> ctypes.CDLL:
    """Load a shared object from memory; its file is gone once it is loaded. Raises ``PlanError``."""
    with tempfile.NamedTemporaryFile(prefix="ke-", suffix=".so") as file:
        file.write(binary)
        file.flush()
        try:
            return ctypes.CDLL(file.name)
        except OSError as error:
            raise PlanError(f"the binary does not load: {error}") from None


def flatten(result: Any) -> list[torch.Tensor | None]:
    """The tensors in what an ATen overload returned, in order; None where it left one out."""
    if result is None or isinstance(result, torch.Tensor):
        return [result]
    if isinstance(result, (list, tuple)):
        return [t for r in result for t in flatten(r)]
    return []


def matches(tensor: torch.Tensor, spec: TensorSpec) -> bool:
    """Whether the plan was made for a tensor like this (strides of dimensions of one element don't count)."""
    if tensor.dtype != spec.torch_dtype or tuple(tensor.shape) != spec.shape:
        return False
    if math.prod(spec.shape) == 0:
        return True
    return all(n == 1 or a == b for n, a, b in zip(spec.shape, tensor.stride(), spec.stride))


def _covers(one: torch.Tensor, other: torch.Tensor) -> bool:
    """Whether a tensor is all the memory of another, in another shape if need be."""
    same = one.data_ptr() == other.data_ptr() and one.dtype == other.dtype
    return same and TensorSpec.of(one).storage_bytes == TensorSpec.of(other).storage_bytes


def _same_places(one: Mapping[str, torch.Tensor], other: Mapping[str, torch.Tensor]) -> bool:
    return {n: t.data_ptr() for n, t in one.items()} == {n: t.data_ptr() for n, t in other.items()}


def _last_uses(plan: Plan, roots: dict[int, int]) -> dict[int, int]:
    """For every value that a ``Call`` makes and the plan does not return: the last step that needs it."""
    made = {out for step in plan.steps if isinstance(step, Call) for out in step.outs}
    last: dict[int, int] = {}
    for index, step in enumerate(plan.steps):
        for value in (*uses(step), *(step.outs if isinstance(step, Call) else ())):
            last[value] = index
    # A kernel reads through a bare pointer, so what a view shows must outlive the view.
    for value, root in roots.items():
        if value in last:
            last[root] = max(last.get(root, 0), last[value])
    kept = {roots[r] for r in plan.returns} | set(plan.returns)
    return {v: i for v, i in last.items() if v in made and v not in kept}


@functools.cache
def _out_variant(overload: Any) -> Any:
    """The overload with the same arguments that writes its one result to ``out``, or None."""
    schema = overload._schema
    returned = [str(result.type) for result in schema.returns]
    if any(tag in overload.tags for tag in _NEVER_INTO) or returned != ["Tensor"]:
        return None
    packet = overload.overloadpacket
    for name in packet.overloads():
        found = getattr(packet, name)
        taken = found._schema.arguments
        outs = [argument for argument in taken if argument.is_out]
        if [argument.name for argument in outs] == ["out"] and _asked(schema.arguments) == _asked(taken[:-1]):
            return found
    return None


def _asked(arguments: Sequence[Any]) -> list[tuple[str, str]]:
    return [(argument.name, str(argument.type)) for argument in arguments]

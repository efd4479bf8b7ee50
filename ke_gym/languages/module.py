"""Kernel modules → artifacts: run the Python on fake tensors, compile what it launches."""

from __future__ import annotations

import hashlib
import inspect
import linecache
import sys
import traceback
from collections.abc import Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from types import ModuleType
from typing import Any, Literal

import torch
from torch import Tensor, nn

from ke_gym.errors import UserError
from ke_gym.languages import extensions
from ke_gym.languages.artifact import Artifact
from ke_gym.languages.base import BuildOptions, Signature, digest
from ke_gym.languages.cubin import examine
from ke_gym.languages.device import DEFAULT_ARCH, Arch, get_arch
from ke_gym.languages.errors import BuildError
from ke_gym.languages.launch import KernelError
from ke_gym.languages.plan import Plan, TensorSpec
from ke_gym.languages.recording import Unit, collecting
from ke_gym.languages.trace import NotTraceable, Traced, trace

FILE = "<kernel module>"
_LOG_LINES = 40


def load(source: str) -> ModuleType:
    """Execute a kernel module's text. Raises whatever its Python raises."""
    name = f"ke_gym_kernel_{hashlib.sha256(source.encode()).hexdigest()[:12]}"
    module = ModuleType(name)
    module.__file__ = FILE
    linecache.cache[FILE] = (len(source), None, source.splitlines(keepends=True), FILE)
    sys.modules[name] = module  # classes and dataclasses look their module up
    exec(compile(source, FILE, "exec"), module.__dict__)
    return module


def _loaded(source: str) -> ModuleType:
    try:
        return load(source)
    except NotTraceable as reason:
        raise BuildError(
            "constraints", f"the module cannot be imported for tracing: {reason}; call it in forward"
        ) from reason


def construct(module: ModuleType, init_inputs: Sequence[Any], seed: int) -> nn.Module | None:
    """The ``ModelNew`` of a module that has no ``forward``. Raises ``BuildError`` if it has neither."""
    if getattr(module, "forward", None) is not None:
        return None
    model = getattr(module, "ModelNew", None)
    if model is None:
        raise BuildError("constraints", "the module defines neither forward(...) nor class ModelNew")
    torch.manual_seed(seed)
    built = model(*init_inputs)
    if not isinstance(built, nn.Module):
        raise BuildError("constraints", "ModelNew is not a torch.nn.Module")
    return built


def named(module: ModuleType, inputs: int, known: Iterable[str]) -> tuple[str, ...]:
    """What ``forward`` takes by name, of what is ``known``: state entries and what ``prepare`` returned.

    ``inputs`` is how many inputs the task has. Raises ``BuildError`` if ``forward`` has other parameters.
    """
    function = module.forward
    if not callable(function):
        raise BuildError("constraints", "forward is not a function")
    known = tuple(known)
    parameters = list(inspect.signature(function).parameters.values())
    kinds = inspect.Parameter
    positional = [p for p in parameters if p.kind in (kinds.POSITIONAL_ONLY, kinds.POSITIONAL_OR_KEYWORD)]
    if len(positional) < inputs and not any(p.kind is kinds.VAR_POSITIONAL for p in parameters):
        raise BuildError(
            "constraints", f"forward takes {len(positional)} arguments, the task has {inputs} inputs"
        )
    rest = [p for p in positional[inputs:] if p.kind is not kinds.POSITIONAL_ONLY]
    rest += [p for p in parameters if p.kind is kinds.KEYWORD_ONLY]
    unknown = [p.name for p in rest if p.name not in known and p.default is kinds.empty]
    if unknown:
        raise BuildError(
            "constraints",
            f"forward takes {unknown[0]!r}, which is neither one of the {inputs} inputs nor in the state "
            f"({', '.join(known) or 'empty'})",
        )
    return tuple(p.name for p in rest if p.name in known)


class ModuleLanguage:
    """A language of kernel modules: their Python is traced for ``device``, their kernels compiled."""

    name: str
    targets: tuple[str, ...]
    device: Literal["cpu", "cuda"]

    def environment(self, arch: Arch) -> AbstractContextManager[None]:
        """What surrounds a module's Python, so that kernels it launches are recorded for ``arch``."""
        return nullcontext()

    def build(self, source: str, signature: Signature, options: BuildOptions) -> Artifact:
        """See ``ke_gym.languages.base.build``."""
        arch = _arch(options) if self.device == "cuda" else None
        around = self.environment(arch) if arch is not None else nullcontext()
        building = extensions.building(source, arch.name if arch is not None else "", options.seconds)
        public = [name for name in signature.shape_sets if name not in signature.hidden]
        with collecting() as units, around, building as checked:
            try:
                with checked:
                    module = _loaded(source)
                    traces = {name: _trace(module, signature, name, self.device) for name in public}
            except BuildError:
                raise
            except NotTraceable as reason:
                if hasattr(module, "prepare") or hasattr(getattr(module, "ModelNew", None), "prepare"):
                    raise BuildError("constraints", f"prepare needs a forward without: {reason}") from reason
                return self._host(module, source, list(units.values()), str(reason), options)
            except (Exception, SystemExit) as error:
                raise BuildError("compile", _blame(error)) from error
            for name, traced in traces.items():
                _compare(traced.plan, signature.outputs[name], name)
            if general := _general(module):
                traces.update(_trace_hidden(module, signature, self.device))
        launched = {unit.name: unit for traced in traces.values() for unit in traced.units}
        binaries, report = _compiled(list(launched.values()), options)
        constants: dict[str, Tensor] = {}
        for traced in traces.values():
            constants.update(traced.constants)
        report["warnings"] += [w for traced in traces.values() for w in traced.warnings]
        plans = {name: traced.plan for name, traced in traces.items()}
        if arch is not None:
            report["kernels"] = _examined(plans, binaries, arch)
        name = arch.name if arch is not None else ""
        return Artifact(self.name, "plan", source, binaries, plans, constants, report, general, name)

    def _host(
        self, module: ModuleType, source: str, units: Sequence[Unit], reason: str, options: BuildOptions
    ) -> Artifact:
        """The artifact of a module whose Python has to run with its kernels."""
        binaries, report = _compiled(units, options)
        report["host_reason"] = reason
        if extensions.mentioned(source):
            report["built_for"] = runtime()
        return Artifact(self.name, "host", source, binaries, report=report, general=_general(module))


class Cpp(ModuleLanguage):
    """The language ``cpp``: ``lang.cpp`` sources and ATen calls, for the CPU."""

    name = "cpp"
    targets = ("cpu",)
    device = "cpu"


def _arch(options: BuildOptions) -> Arch:
    try:
        arch = get_arch(options.arch)
    except UserError as error:
        raise BuildError("constraints", str(error)) from error
    return replace(arch, multiprocessors=options.multiprocessors or arch.multiprocessors)


def _examined(plans: Mapping[str, Plan], binaries: Mapping[str, bytes], arch: Arch) -> list[dict[str, Any]]:
    try:
        return examine(plans, binaries, arch)
    except ValueError as error:
        raise BuildError("constraints", str(error)) from error


def _trace(
    module: ModuleType, signature: Signature, shape_set: str, device: Literal["cpu", "cuda"]
) -> Traced:
    inputs, state = signature.inputs[shape_set], signature.state[shape_set]
    model = construct(module, signature.init_inputs[shape_set], signature.seed)
    held = _bindings(model, state, signature.digests[shape_set]) if model is not None else []
    made = _prepare(model or module, state, held, device)
    specs = dict(zip(made.names, made.traced.plan.return_specs)) if made is not None else {}
    if clash := specs.keys() & state.keys():
        raise BuildError("constraints", f"prepare returns {min(clash)!r}, which is a name in the state")
    names = named(module, len(inputs), (*state, *specs)) if model is None else tuple(specs)
    given = {name: state[name] for name in names if name in state}
    taken = {name: spec for name, spec in specs.items() if name in names}
    if missing := [name for name in specs if name not in taken]:
        raise BuildError("constraints", f"prepare returns {missing[0]!r}, which forward does not take")
    traced = trace(model or module.forward, inputs, given, held, device, taken)
    return traced if made is None else made.before(traced)


@dataclass(frozen=True)
class _Prepared:
    """What ``prepare`` was traced to; its plan returns what it calls ``names``, in order."""

    names: tuple[str, ...]
    traced: Traced

    def before(self, traced: Traced) -> Traced:
        """``traced``, which takes what is prepared, with its preparation."""
        made = self.traced
        return Traced(
            replace(traced.plan, preparation=made.plan), {**made.constants, **traced.constants},
            tuple({unit.name: unit for unit in (*made.units, *traced.units)}.values()),
            tuple(dict.fromkeys((*made.warnings, *traced.warnings))),
        )  # fmt: skip


def _prepare(
    owner: ModuleType | nn.Module,
    state: Mapping[str, TensorSpec],
    held: Sequence[tuple[str, Tensor]],
    device: Literal["cpu", "cuda"],
) -> _Prepared | None:
    """Trace ``prepare`` of a module or ``ModelNew``, if there is one: it is given state entries and nothing else."""
    function = getattr(owner, "prepare", None)
    if function is None:
        return None
    if not callable(function):
        raise BuildError("constraints", "prepare is not a function")
    parameters = inspect.signature(function).parameters
    if unknown := [p.name for p in parameters.values() if p.name not in state]:
        raise BuildError(
            "constraints",
            f"prepare takes {unknown[0]!r}, which is not in the state ({', '.join(state) or 'empty'}); what "
            "depends on inputs belongs into forward",
        )
    names: list[str] = []

    def flat(**given: Tensor) -> list[Tensor]:
        result = function(**given)
        if not isinstance(result, dict) or not all(isinstance(key, str) for key in result):
            raise BuildError("constraints", "prepare returns a dict of tensors by name")
        names.extend(result)
        return list(result.values())

    try:
        traced = trace(flat, (), {name: state[name] for name in parameters}, held, device)
    except NotTraceable as reason:
        raise BuildError("constraints", f"prepare cannot be traced: {reason}") from reason
    specs = traced.plan.return_specs
    if len(specs) != len(names) or any(s == 0 < n - 1 for x in specs for n, s in zip(x.shape, x.stride)):
        raise BuildError("constraints", "prepare returns a dict of dense tensors by name")
    return _Prepared(tuple(names), traced)


def _trace_hidden(
    module: ModuleType, signature: Signature, device: Literal["cpu", "cuda"]
) -> dict[str, Traced]:
    """The hidden shape sets of a module that claims to be general; a failure must not say what they are."""
    try:
        traces = {name: _trace(module, signature, name, device) for name in signature.hidden}
        for name, traced in traces.items():
            _compare(traced.plan, signature.outputs[name], name)
    except Exception as error:
        raise BuildError("correctness", "fails on a shape it claims to support (general = True)") from error
    return traces


def _bindings(
    model: nn.Module, state: Mapping[str, TensorSpec], digests: Mapping[str, str]
) -> list[tuple[str, Tensor]]:
    """Which parameters and buffers stand for which state entries: by name, else by equal contents."""
    held = {
        name.replace(".", "_"): tensor for name, tensor in [*model.named_parameters(), *model.named_buffers()]
    }
    bound = {name: tensor for name, tensor in held.items() if state.get(name) == TensorSpec.of(tensor)}
    free = {name: hashed for name, hashed in digests.items() if name not in bound}
    found = list(bound.items())
    for name, tensor in held.items():
        if name in bound or not free:
            continue
        hashed = digest(tensor)
        match = next((n for n, h in free.items() if h == hashed and state[n] == TensorSpec.of(tensor)), None)
        if match is not None:
            del free[match]
            found.append((match, tensor))
    return found


def _compare(plan: Plan, expected: tuple[TensorSpec, ...], shape_set: str) -> None:
    if len(plan.return_specs) != len(expected):
        raise BuildError(
            "correctness", f"forward returns {len(plan.return_specs)} tensors, the reference {len(expected)}"
        )
    for index, (got, want) in enumerate(zip(plan.return_specs, expected)):
        if got.shape != want.shape or got.dtype != want.dtype:
            raise BuildError(
                "correctness",
                f"output {index} is {got.dtype} {list(got.shape)}, the reference gives {want.dtype} "
                f"{list(want.shape)} (shape set {shape_set})",
            )


def _compiled(units: Sequence[Unit], options: BuildOptions) -> tuple[dict[str, bytes], dict[str, Any]]:
    binaries: dict[str, bytes] = {}
    report: dict[str, Any] = {"warnings": [], "vectorization": [], "units": []}
    for unit in units:
        try:
            built = unit.build(options.seconds, options.arch or DEFAULT_ARCH)
        except KernelError as error:
            raise BuildError("compile", str(error)) from error
        binaries[unit.name] = built.binary
        report["warnings"] += built.warnings
        report["vectorization"] += built.remarks
        report["units"].append({"name": unit.name, **built.settings})
    return binaries, report


def runtime() -> str:
    """What a module that runs with its kernels is built for: its extensions load in no other."""
    version = sys.version_info
    return f"Python {version.major}.{version.minor} with torch {torch.__version__.partition('+')[0]}"


def _general(module: ModuleType) -> bool:
    return getattr(module, "general", False) is True


def _blame(error: BaseException) -> str:
    """The error with the module's own frames, at most 40 lines."""
    frames = [f for f in traceback.extract_tb(error.__traceback__) if f.filename == FILE]
    lines = [line.rstrip() for line in traceback.format_list(frames)]
    told = "".join(traceback.format_exception_only(error)).strip()
    return "\n".join("\n".join([*lines, told]).splitlines()[-_LOG_LINES:])

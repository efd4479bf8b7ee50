"""Schedule -> what a module for a GPU does: what its ``forward`` and ``prepare`` allocate, launch, and leave to the
library."""

from __future__ import annotations

import re
import textwrap
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from ke_gym.codegen import channels_last, module, preparation
from ke_gym.codegen.errors import Illegal
from ke_gym.codegen.fusion import cached_nest, nests, order_steps, visible_in
from ke_gym.codegen.graph import Buffer, Extern, Graph
from ke_gym.codegen.schedule import Plan, Schedule
from ke_gym.languages.plan import memory_order

_ON_CPU = ("aten._scaled_dot_product_flash_attention_for_cpu.default",)
_CLONED = "torch.ops.aten.clone.default({}, memory_format=torch.contiguous_format)"
_LAID_ANYHOW = {
    "aten.scaled_dot_product_attention.default": "{}.contiguous()",  # in the order of its queries, says the trace
    "aten._fft_c2c.default": _CLONED,
    "aten._fft_c2r.default": _CLONED,
    "aten._fft_r2c.default": _CLONED,
}
"""Library calls whose results lie otherwise on a GPU, by sizes, dtypes and device, than on the CPU where they are captured, and
what makes them dense."""


@dataclass(frozen=True)
class Printed:
    """The text of a group's kernels, and the lines that launch them: in ``forward``, and of ``copies`` of weights
    ``before`` that, in the preparation."""

    text: str
    lines: list[str]
    before: list[str] = field(default_factory=list)
    copies: list[str] = field(default_factory=list)


Kernel = Callable[[Any, str, frozenset[str]], Printed]
"""Prints a nest's kernels, their names ending as it is told, and makes copies of these tensors in the preparation."""


def functions(graphs: tuple[Graph, ...], schedule: Schedule, kernel: Kernel) -> tuple[list[str], str]:
    """All kernels' texts, and the functions ``forward`` and, if the schedule asks for it, ``prepare``."""
    kernels: list[str] = []
    bodies = []
    prepared: dict[str, None] = {}
    before = ""
    for number, (graph, plan) in enumerate(zip(graphs, schedule.plans)):
        suffix = f"_{number}" if len(graphs) > 1 else ""
        body = _Body(graph, plan, suffix, kernel, schedule.prepared and len(graphs) == 1)
        kernels.extend(body.kernels)
        bodies.append((graph, body.forward))
        prepared, before = body.made, body.prepare
    forward = module._forward(bodies, tuple(prepared)).rstrip()
    return kernels, f"{before}\n\n\n{forward}" if prepared else forward


class _Body:
    """Kernels and functions of one shape set."""

    def __init__(self, graph: Graph, plan: Plan, suffix: str, kernel: Kernel, prepared: bool) -> None:
        nests(graph, plan)
        self.graph = graph
        self.kernels: list[str] = []
        self.made: dict[str, None] = {}  # by the preparation
        standing, ready = preparation.standing(graph, plan) if prepared else ([], frozenset())
        lines: list[str] = []
        before: list[str] = []
        listed = [g.nodes for g in plan.groups]
        allocated = set(graph.inputs)
        ordered = order_steps(graph, plan)
        made = [
            u if isinstance(u, Extern) else cached_nest(graph, u, visible_in(graph, u.nodes, listed))
            for u in ordered
        ]
        for unit, nest in zip(ordered, channels_last.handed_on(graph, made)):
            early = unit in standing
            home, device = (before, self._beside) if early else (lines, _device(graph))
            if isinstance(unit, Extern):
                home.extend(_call(graph, unit, device))
                makes = [b.name for b in unit.outputs]
            else:
                done = kernel(nest, suffix, ready)
                self.kernels.append(done.text)
                for buffer in nest.writes:
                    if buffer.name not in allocated:
                        home.append(f"{buffer.name} = {_empty(graph, buffer, device)}")
                before.extend(done.before)
                home.extend(done.lines)
                self.made.update(dict.fromkeys(done.copies))
                makes = [b.name for b in nest.writes]
            allocated.update(makes)
            if early:
                self.made.update(dict.fromkeys(makes))
        lines.append(module._return(graph))
        self.forward = [*module.constants(graph, suffix, _device(graph))[1], *lines]
        self.made = {name: None for name in self.made if _names(self.forward, name)}
        self.prepare = self._prepare(before)

    @property
    def _beside(self) -> str:
        return f"{next(name for name in self.graph.inputs if name in self.graph.weights)}.device"

    def _prepare(self, lines: list[str]) -> str:
        """The function that makes what ``forward`` then takes."""
        inner = {name: self.graph.renamed.get(name, name) for name in self.graph.arguments}
        taken = [n for n, tensor in inner.items() if tensor in self.graph.weights and _names(lines, tensor)]
        renamed = [f"{inner[name]} = {name}" for name in taken if inner[name] != name]
        entries = ", ".join(f'"{name}": {name}' for name in self.made)
        body = textwrap.indent("\n".join([*renamed, *lines, f"return {{{entries}}}"]), "    ")
        return f"def prepare({', '.join(taken)}):\n{body}"


def _names(lines: list[str], name: str) -> bool:
    """Whether one of the lines has the name in it."""
    return any(re.search(rf"\b{re.escape(name)}\b", line) for line in lines)


def _device(graph: Graph) -> str:
    """The device of the first tensor that the module is given, as text."""
    inside = (graph.renamed.get(a, a) for a in graph.arguments)
    given = next((a for a in inside if a in graph.inputs and a not in graph.constants), None)
    return f"{given}.device" if given is not None else '"cuda"'


def _empty(graph: Graph, buffer: Buffer, device: str) -> str:
    return module._empty(graph, buffer).removesuffix(")") + f", device={device})"


def _call(graph: Graph, step: Extern, device: str) -> list[str]:
    if step.target in _ON_CPU:
        raise Illegal(f"{step.target} is for the CPU")
    (line,) = module._call(graph, step)
    line = line.replace('torch.device("cpu")', device)
    if step.target not in _LAID_ANYHOW:
        return [line]
    (result,) = step.outputs
    return [line, _as_captured(result, _LAID_ANYHOW[step.target])]


def _as_captured(buffer: Buffer, dense: str) -> str:
    """Have a call's result lie in memory as those who read it expect."""
    order, back = memory_order(buffer.stride)
    turns = f".permute({order})", f".permute({back})"
    turned, returned = ("", "") if list(order) == sorted(order) else turns
    return f"{buffer.name} = {dense.format(buffer.name + turned)}{returned}"

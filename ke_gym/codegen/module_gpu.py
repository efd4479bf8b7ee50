"""Schedule -> what ``forward`` of a module for a GPU does: what it allocates, launches and leaves to the library."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from ke_gym.codegen import module
from ke_gym.codegen.errors import Illegal
from ke_gym.codegen.fusion import cached_nest, nests, order_steps, visible_in
from ke_gym.codegen.graph import Buffer, Extern, Graph
from ke_gym.codegen.schedule import Plan, Schedule

_ON_CPU = {
    "aten._scaled_dot_product_flash_attention_for_cpu.default": "aten.scaled_dot_product_attention.default"
}


def shape_sets(
    graphs: tuple[Graph, ...], schedule: Schedule, kernel: Callable[[Any, str], tuple[str, str]]
) -> tuple[list[str], list[tuple[Graph, list[str]]]]:
    """All kernels' texts, and of each shape set the lines of its ``forward``.

    ``kernel`` gives a nest's text and its launch, their names ending as it is told.
    """
    kernels: list[str] = []
    bodies = []
    for number, (graph, plan) in enumerate(zip(graphs, schedule.plans)):
        suffix = f"_{number}" if len(graphs) > 1 else ""
        sources, lines = _shape_set(graph, plan, suffix, kernel)
        kernels.extend(sources)
        bodies.append((graph, lines))
    return kernels, bodies


def _shape_set(
    graph: Graph, plan: Plan, suffix: str, kernel: Callable[[Any, str], tuple[str, str]]
) -> tuple[list[str], list[str]]:
    nests(graph, plan)
    listed = [g.nodes for g in plan.groups]
    sources: list[str] = []
    lines: list[str] = []
    allocated = set(graph.inputs)
    device = _device(graph)
    for unit in order_steps(graph, plan):
        if isinstance(unit, Extern):
            lines.extend(_call(graph, unit, device))
            allocated.update(b.name for b in unit.outputs)
            continue
        nest: Any = cached_nest(graph, unit, visible_in(graph, unit.nodes, listed))
        source, launch = kernel(nest, suffix)
        sources.append(source)
        for buffer in nest.writes:
            if buffer.name not in allocated:
                lines.append(f"{buffer.name} = {_empty(graph, buffer, device)}")
                allocated.add(buffer.name)
        lines.append(launch)
    lines.append(module._return(graph))
    return sources, [*module.constants(graph, suffix, device)[1], *lines]


def _device(graph: Graph) -> str:
    """The device of the first tensor that the module is given, as text."""
    inside = (graph.renamed.get(a, a) for a in graph.arguments)
    given = next((a for a in inside if a in graph.inputs and a not in graph.constants), None)
    return f"{given}.device" if given is not None else '"cuda"'


def _empty(graph: Graph, buffer: Buffer, device: str) -> str:
    return module._empty(graph, buffer).removesuffix(")") + f", device={device})"


def _call(graph: Graph, step: Extern, device: str) -> list[str]:
    target = _ON_CPU.get(step.target, step.target)
    if target != step.target:
        raise Illegal(f"{step.target} is for the CPU")
    (line,) = module._call(graph, step)
    return [line.replace('torch.device("cpu")', device)]

"""Reductions of few results over many elements, in two steps so that a GPU is filled."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Literal

from ke_gym.codegen.expr import (
    Load,
    Op,
    Rewriter,
    Var,
    compute_dtype,
    constant,
    in_range,
    of,
)
from ke_gym.codegen.graph import Extern, Graph, Node
from ke_gym.codegen.tiles import PROGRAMS, identity
from ke_gym.codegen.tiling import along, column_sum


def for_gpu(graph: Graph, language: Literal["triton", "cuda"] = "triton") -> Graph:
    """The graph with reductions of few results over many elements taken in two steps, so that a GPU is filled."""
    graph = replace(graph, device="cuda", language=language)
    steps: dict[str, Node | Extern] = {}
    for name, step in graph.steps.items():
        if isinstance(step, Node) and step.reduction is not None and step.scan is None:
            for node in [step] if column_sum(graph, step) else _split(step, graph):
                steps[node.name] = node
        else:
            steps[name] = step
    return replace(graph, steps=steps)


def _split(node: Node, graph: Graph) -> list[Node]:
    reduced = math.prod(r.size for r in node.rvars)
    contiguous = along(graph, node, node.rvars)
    programs = node.numel if contiguous else -(-node.numel // 64)
    least = 4096 if contiguous else 128
    want = min(PROGRAMS // max(programs, 1), reduced // least)
    whole = max(node.rvars, key=lambda r: r.size)
    outermost = next((r for r in node.rvars if r.size >= want), whole)
    if want < 2 or programs >= 128 or outermost.size < 2:
        return [node]
    parts = min(want, outermost.size)
    length = -(-outermost.size // parts)
    parts = -(-outermost.size // length)
    part, rest = Var(f"{outermost.name}_part", parts), Var(f"{outermost.name}_rest", length)
    index = of(part) * length + of(rest)
    expr = Rewriter({outermost: index}).expr(node.expr)
    dtype = compute_dtype(node.dtype)
    if parts * length != outermost.size:
        inside = in_range(index, 0, outermost.size)
        expr = Op("where", (inside, expr, identity(node.reduction or "sum", expr.dtype)), expr.dtype)
    rvars = tuple(rest if r is outermost else r for r in node.rvars)
    partial = Node(
        f"{node.name}_parts", (parts, *node.shape), dtype, (part, *node.vars), expr, node.origin,
        node.reduction, rvars,
    )  # fmt: skip
    read = Load(partial.name, (of(part), *(of(v) if v.size != 1 else constant(0) for v in node.vars)), dtype)
    return [partial, replace(node, expr=read, rvars=(part,))]

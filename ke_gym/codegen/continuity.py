"""Whether a graph forgives differences in rounding."""

from __future__ import annotations

from ke_gym.codegen.expr import Op, Search, is_float, walk
from ke_gym.codegen.graph import Extern, Graph, Node

DISCONTINUOUS = frozenset(
    (
        "floor",
        "ceil",
        "trunc",
        "round",
        "sign",
        "floordiv",
        "remainder",
        "fmod",
        "eq",
        "ne",
        "lt",
        "le",
        "gt",
        "ge",
    )
)


def continuous(graph: Graph) -> bool:
    """Whether no step turns a difference in rounding into another integer or another choice."""
    found = graph.memo.get("continuous")
    if found is None:
        values = [n for s in graph.steps.values() if isinstance(s, Node) for n in walk(s.expr)]
        found = not any(
            isinstance(n, Search)
            or (isinstance(n, Op) and n.name in DISCONTINUOUS)
            or (
                isinstance(n, Op) and n.name == "cast" and is_float(n.args[0].dtype) and not is_float(n.dtype)
            )
            for n in values
        )
        found = found and not any(_chooses(graph, s) for s in graph.steps.values() if isinstance(s, Extern))
        graph.memo["continuous"] = found
    return bool(found)


def _chooses(graph: Graph, step: Extern) -> bool:
    """Whether the library makes integers of floats (the places of the largest, say) that are needed."""
    needed = {*graph.outputs, *(name for user in graph.users[step.name] for name in graph.steps[user].reads)}
    floats = any(is_float(graph.buffers[name].dtype) for name in step.reads)
    return floats and any(b.name in needed and not is_float(b.dtype) for b in step.outputs)

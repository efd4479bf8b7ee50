"""Whether a rewritten schedule can be built, and prints to something else: only what changed is looked at."""

from __future__ import annotations

from dataclasses import replace

from ke_gym.codegen import emit_cpp, emit_cpp_products, fusion, module_cuda
from ke_gym.codegen.contract import Contraction
from ke_gym.codegen.errors import Illegal
from ke_gym.codegen.graph import Extern, Graph
from ke_gym.codegen.nest import Nest
from ke_gym.codegen.preparation import preparable
from ke_gym.codegen.program import Program
from ke_gym.codegen.schedule import Group, Plan, Schedule


def nests_of(graph: Graph, plan: Plan) -> list[Nest | Contraction]:
    """The nests of a legal plan, in the order of its groups."""
    key = ("nests", plan)
    found: list[Nest | Contraction] | None = graph.memo.get(key)
    if found is None:
        listed = [g.nodes for g in plan.groups]
        found = [fusion.cached_nest(graph, g, fusion.visible_in(graph, g.nodes, listed)) for g in plan.groups]
        graph.memo[key] = found
    return found


def legal(program: Program, before: Schedule, after: Schedule) -> bool:
    """Whether ``after``, made from the legal schedule ``before``, can be built."""
    return _compare(program, before, after, printed=False)


def changes(program: Program, before: Schedule, after: Schedule) -> bool:
    """Whether ``after``, made from the legal schedule ``before``, can be built and is another kernel module."""
    return _compare(program, before, after, printed=True)


def _compare(program: Program, before: Schedule, after: Schedule, printed: bool) -> bool:
    kernels = any(plan.groups for plan in after.plans)
    changed = not printed or (kernels and (before.flags, before.compiler) != (after.flags, after.compiler))
    for graph, old, new in zip(program.graphs, before.plans, after.plans, strict=True):
        listed = [g.nodes for g in new.groups]
        if listed != [g.nodes for g in old.groups]:
            if not fusion.legal(graph, new):
                return False
            changed = True
            continue
        for was, now in zip(old.groups, new.groups):
            if was == now:
                continue
            visible = fusion.visible_in(graph, now.nodes, listed)
            try:
                nest = fusion.cached_nest(graph, now, visible)
            except Illegal:
                return False
            if not changed:
                other = fusion.cached_nest(graph, was, visible)
                differs = replace(nest, group=other.group) != other  # other loops, or the same in other words
                if graph.device == "cuda":
                    # CUDA C++ has no pipeline stages, and its blocks have no more lanes than a row has use for.
                    changed = differs and (graph.language != "cuda" or _reworded(graph, was, now, visible))
                    continue
                changed = differs and not isinstance(nest, Contraction)  # not every form has all knobs
                changed = changed or _reworded(graph, was, now, visible)
        if before.merged != after.merged:
            changed = changed or _mergeable(graph, new)
    if before.prepared != after.prepared:
        prepared = after if after.prepared else before
        if not _prepares(program, prepared):
            return False
        changed = True
    return changed


def _prepares(program: Program, schedule: Schedule) -> bool:
    """Whether a module of this schedule has anything to prepare; several shape sets have weights of their own each."""
    if program.device != "cuda" or len(program.graphs) > 1:
        return False
    return preparable(program.graphs[0], schedule.plans[0])


def _reworded(graph: Graph, was: Group, now: Group, visible: frozenset[str]) -> bool:
    """Whether the two groups' kernels are printed differently."""
    return _text(graph, was, visible) != _text(graph, now, visible)


def _text(graph: Graph, group: Group, visible: frozenset[str]) -> str:
    """What the group's kernel is printed to, in CUDA C++ with its launch."""
    key = ("text", group, visible)
    found: str | None = graph.memo.get(key)
    if found is None:
        nest = fusion.cached_nest(graph, group, visible)
        used: set[str] = set()
        if graph.device == "cuda":
            printed = module_cuda.kernel(nest, "", used)
            found = "\n".join([printed.text, *printed.lines])
        elif isinstance(nest, Contraction):
            found = emit_cpp_products.print_contraction(nest, used)
        else:
            found = emit_cpp.print_nest(nest, used)
        graph.memo[key] = found
    return found


def _mergeable(graph: Graph, plan: Plan) -> bool:
    """Whether two nests follow each other without a library call in between."""
    units = fusion.order_steps(graph, plan)
    return any(not isinstance(a, Extern) and not isinstance(b, Extern) for a, b in zip(units, units[1:]))

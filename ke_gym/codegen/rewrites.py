"""Strategies as functions from schedule to schedule. Applying one *is* the legality test.

Each strategy lists variants of a schedule in a fixed order; ``apply`` takes the ``draw``-th of them, and goes on
from there until one is legal. A strategy without a legal variant is not applicable.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from dataclasses import replace

from ke_gym.codegen import contract, fusion, rewrites_gpu
from ke_gym.codegen.contraction import GemmProblem, GemmSchedule
from ke_gym.codegen.expr import Load, Op, walk
from ke_gym.codegen.graph import Extern, Node, contiguous_stride
from ke_gym.codegen.knobs import knobs, with_knobs
from ke_gym.codegen.legality import changes
from ke_gym.codegen.nest import COSTLY, Nest
from ke_gym.codegen.outer_loops import outer_choices
from ke_gym.codegen.program import Program
from ke_gym.codegen.schedule import Group, Plan, Schedule
from ke_gym.codegen.variants import (
    ACCUMULATORS,
    GRAINS,
    LANES,
    MAX_TRIES,
    PREFETCH,
    STREAM,
    TILES,
    Variants,
    by_contraction,
    by_field,
    divides,
    either,
    groups,
    has_outer,
    loop_nests,
    nest_of,
    reducing,
    shuffled,
    tests_indices,
    with_group,
    with_knob,
    writes_streams,
)  # fmt: skip

SQUARES = (16, 32, 64)
EXACT = frozenset(("sqrt", "div"))  # costly, but single instructions


def apply(program: Program, schedule: Schedule, strategy: str, draw: int = 0) -> Schedule | None:
    """The ``draw``-th legal variant of ``schedule`` under ``strategy``; None if it is not applicable.

    ``schedule`` must be legal. Deterministic. Raises ``KeyError`` for a strategy that has no rewrite (see
    ``STRATEGIES``).
    """
    if program.device == "cuda" and strategy not in rewrites_gpu.REWRITES:
        return None
    table = rewrites_gpu.REWRITES if program.device == "cuda" else REWRITES
    source = _distinct(table[strategy](program, schedule), schedule)
    found: list[Schedule] = []
    for position in range(draw, draw + MAX_TRIES):
        found.extend(itertools.islice(source, max(position + 1 - len(found), 0)))
        if position - draw >= len(found):
            return None
        variant = found[position % len(found)]
        if changes(program, schedule, variant):
            return variant
    return None


def _distinct(variants: Iterator[Schedule], schedule: Schedule) -> Iterator[Schedule]:
    seen = {schedule}
    for variant in variants:
        if variant not in seen:
            seen.add(variant)
            yield variant


# ------------------------------------------------------------------------------------------- strategies


def tile_outer(program: Program, schedule: Schedule) -> Iterator[Schedule]:
    """Other tile sizes of the outer loops."""
    for p, g, _, nest in loop_nests(program, schedule):
        group = nest.group
        for k, (position, tile) in enumerate(group.outer):
            for size in TILES:
                if size != tile:
                    outer = (*group.outer[:k], (position, size), *group.outer[k + 1 :])
                    yield with_group(schedule, p, g, replace(group, outer=outer))


def stage(program: Program, schedule: Schedule) -> Iterator[Schedule]:
    """Keep one more intermediate in a buffer per outer iteration, rather than computing it again for each user."""
    for p, g, group, nest in loop_nests(program, schedule):
        graph = program.graphs[p]
        if nest.outer:
            for name in group.nodes:
                step = graph.steps[name]
                if (
                    isinstance(step, Node)
                    and step.pointwise
                    and name not in group.staged
                    and graph.users[name]
                ):
                    yield with_group(schedule, p, g, replace(group, staged=(*group.staged, name)))


def unstage(program: Program, schedule: Schedule) -> Iterator[Schedule]:
    """Compute a kept intermediate again for each user."""
    for p, g, group, _ in loop_nests(program, schedule):
        for name in group.staged:
            yield with_group(
                schedule, p, g, replace(group, staged=tuple(n for n in group.staged if n != name))
            )


def duplicate(program: Program, schedule: Schedule) -> Iterator[Schedule]:
    """Compute what another nest stores again here, instead of reading it."""
    for p, g, group, _ in loop_nests(program, schedule):
        graph = program.graphs[p]
        order = list(graph.steps)
        for name in dict.fromkeys(r for n in group.nodes for r in graph.steps[n].reads):
            step = graph.steps.get(name)
            if isinstance(step, Node) and step.pointwise and name not in group.nodes:
                nodes = tuple(sorted((*group.nodes, name), key=order.index))
                yield drop_dead(program, with_group(schedule, p, g, replace(group, nodes=nodes)))


def drop_dead(program: Program, schedule: Schedule) -> Schedule:
    """Without the nodes of groups that nobody needs stored any more."""
    plans = []
    for graph, plan in zip(program.graphs, schedule.plans):
        kept = list(plan.groups)
        for group in plan.groups:
            others = [g for g in kept if g is not group]
            covered = {n for g in others for n in g.nodes}
            visible = fusion.visible_in(graph, group.nodes, [g.nodes for g in kept])
            needed = {n for n in group.nodes if isinstance(graph.steps[n], Node)}
            if not visible and needed <= covered:
                kept.remove(group)
        plans.append(Plan(tuple(kept)))
    return replace(schedule, plans=tuple(plans))


def fuse(program: Program, schedule: Schedule) -> Iterator[Schedule]:
    """Join two nests, or take a library product over with what surrounds it."""
    for p, plan in enumerate(schedule.plans):
        graph = program.graphs[p]
        order = {n: k for k, n in enumerate(graph.steps)}
        for a, b in itertools.combinations(range(len(plan.groups)), 2):
            first, second = plan.groups[a], plan.groups[b]
            if fusion.related(graph, list(first.nodes), list(second.nodes)):
                nodes = tuple(sorted({*first.nodes, *second.nodes}, key=lambda n: order[n]))
                merged = Group(nodes, contraction=first.contraction or second.contraction)
                for joined in dict.fromkeys((merged, fusion.tuned_alone(graph, merged))):
                    rest = [x for k, x in enumerate(plan.groups) if k not in (a, b)]
                    changed = Plan(tuple(sorted((*rest, joined), key=lambda x: order[x.nodes[-1]])))
                    yield replace(schedule, plans=(*schedule.plans[:p], changed, *schedule.plans[p + 1 :]))
    yield from take_over(program, schedule)


def take_over(program: Program, schedule: Schedule) -> Iterator[Schedule]:
    for p, plan in enumerate(schedule.plans):
        graph = program.graphs[p]
        covered = {n for g in plan.groups for n in g.nodes}
        for name, step in graph.steps.items():
            if isinstance(step, Extern) and step.target in contract.KINDS and name not in covered:
                changed = fusion.absorb(graph, plan, name)
                yield replace(schedule, plans=(*schedule.plans[:p], changed, *schedule.plans[p + 1 :]))


def fission(program: Program, schedule: Schedule) -> Iterator[Schedule]:
    """Cut a nest in two, or give a product back to the library."""
    for p, g, group in groups(schedule):
        graph = program.graphs[p]
        products = [n for n in group.nodes if isinstance(graph.steps[n], Extern)]
        rest = tuple(n for n in group.nodes if n not in products)
        if products:
            yield with_group(schedule, p, g, *([Group(rest)] if rest else []))
            if rest:
                yield with_group(
                    schedule, p, g, Group(tuple(products), contraction=group.contraction), Group(rest)
                )
            continue
        for cut in range(len(group.nodes) - 1, 0, -1):
            parts = [Group(group.nodes[:cut]), Group(group.nodes[cut:])]
            yield with_group(schedule, p, g, *parts)


def swap_outer(program: Program, schedule: Schedule) -> Iterator[Schedule]:
    """Walk the outer loops in another order."""
    for p, g, _, nest in loop_nests(program, schedule):
        group = nest.group
        for outer in itertools.permutations(group.outer):
            if outer != group.outer:
                yield with_group(schedule, p, g, replace(group, outer=outer))


def reanchor(program: Program, schedule: Schedule) -> Iterator[Schedule]:
    """Take other loops of a reduction outside: rows or columns, each thread with its own partial results."""
    for p, g, _, nest in loop_nests(program, schedule):
        group = nest.group
        graph = program.graphs[p]
        for name in group.nodes:
            step = graph.steps[name]
            if isinstance(step, Node) and not step.pointwise:
                choices = outer_choices(graph, step, step.expr)
                # Partial results can only be combined after the loops: nobody inside may wait for them.
                awaited = any(user in group.nodes for user in graph.users[name])
                loops = len(step.vars) + (0 if awaited else len(step.rvars))
                singles = [((k, t),) for k in range(loops) for t in (1, 64, 1024)]
                for outer in dict.fromkeys([*choices, *singles]):
                    if all(k < loops for k, _ in outer) and (name, outer) != (group.anchor, group.outer):
                        yield with_group(schedule, p, g, replace(group, anchor=name, outer=outer))


def widths(program: Program, schedule: Schedule) -> Iterator[Schedule]:
    others = tuple(f for f in schedule.flags if not f.startswith("-mprefer-vector-width"))
    for bits in (512, 256, 128):
        yield replace(schedule, flags=(*others, f"-mprefer-vector-width={bits}"))


def flags(*options: str) -> Variants:
    """Variants with one compiler flag added or dropped."""

    def variants(program: Program, schedule: Schedule) -> Iterator[Schedule]:
        for option in options:
            if option in schedule.flags:
                yield replace(schedule, flags=tuple(f for f in schedule.flags if f != option))
            else:
                yield replace(schedule, flags=(*schedule.flags, option))

    return variants


# Reassociation and reciprocals leave NaN and infinities alone, but not the compensated steps of the vector
# math functions: they are for arithmetic only.
REASSOCIATE = ("-fassociative-math", "-fno-signed-zeros")
RECIPROCAL = ("-freciprocal-math",)


def relaxed(program: Program, schedule: Schedule) -> Iterator[Schedule]:
    """Let the compiler add in another order, or multiply by reciprocals; or no longer."""
    nests = [nest for *_, nest in loop_nests(program, schedule)]
    called = {
        n.name
        for nest in nests
        for s in nest.stages
        for i in s.items
        for n in walk(i.expr)
        if isinstance(n, Op)
    }
    for option, useful in (
        (REASSOCIATE, any(map(reducing, nests)) and not called & (COSTLY - EXACT)),
        (RECIPROCAL, "div" in called),
    ):
        without = tuple(f for f in schedule.flags if f not in option)
        if without != schedule.flags:
            yield replace(schedule, flags=without)
        elif useful:
            yield replace(schedule, flags=(*schedule.flags, *option))


def blocked(program: Program, schedule: Schedule) -> Iterator[Schedule]:
    """Where a nest reads along one dimension and writes along another: walk small squares, so that every cache
    line is used while it is there; or make the loop that the reads run along the innermost."""
    for p, g, group, nest in loop_nests(program, schedule):
        crossing = across(nest)
        if crossing is None:
            continue
        name, rows, columns = crossing
        for size in SQUARES:
            for outer in (((rows, size), (columns, size)), ((columns, size), (rows, size))):
                if (name, outer) != (group.anchor, group.outer):
                    yield with_group(schedule, p, g, replace(group, anchor=name, outer=outer))
        for order in (0, 1, 2):
            if order != group.order:
                yield with_group(schedule, p, g, replace(group, order=order))


def across(nest: Nest) -> tuple[str, int, int] | None:
    """A stored node, the position of its loop along which a large read is contiguous, and that of its own last."""
    for stage in nest.stages:
        for item in stage.items:
            node, written = item.node, item.target.index
            own = [k for k, v in enumerate(node.vars) if v.size != 1]
            if not node.pointwise or item.target.kind != "global" or len(own) < 2:
                continue
            stride = contiguous_stride(node.shape)
            place = {stride[k]: k for k in own}
            for load in [n for n in walk(item.expr) if isinstance(n, Load) and n.index]:
                for loop in stage.loops:
                    step = written.coefficient(loop.var)
                    if load.index[0].coefficient(loop.var) == 1 and step > 1 and step in place:
                        return node.name, place[step], own[-1]
    return None


def fitting(program: Program, schedule: Schedule) -> Iterator[Schedule]:
    """Tiles that divide what they cut, so that no loop has a remainder."""
    for p, g, _, nest in loop_nests(program, schedule):
        group = nest.group
        step = program.graphs[p].steps.get(group.anchor)
        if not isinstance(step, Node):
            continue
        loops = (*step.vars, *step.rvars)
        for k, (position, tile) in enumerate(group.outer):
            size = loops[position].size
            if tile > 1 and size % tile:
                exact = [t for t in range(max(tile // 4, 2), min(4 * tile, size - 1) + 1) if size % t == 0]
                for other in sorted(exact, key=lambda t: abs(math.log(t / tile)))[:4]:
                    outer = (*group.outer[:k], (position, other), *group.outer[k + 1 :])
                    yield with_group(schedule, p, g, replace(group, outer=outer))
    for p, g, group in groups(schedule):
        product = nest_of(program, schedule, p, g)
        if isinstance(product, contract.Contraction) and isinstance(product.choices, GemmSchedule):
            assert isinstance(product.problem, GemmProblem)
            m, n = product.problem.m, product.problem.n
            for rows, columns in product.knobs()["tile"]:
                if (rows, columns) != product.choices.tile and m % rows == 0 and n % columns == 0:
                    yield with_group(schedule, p, g, with_knob(group, "tile", (rows, columns)))


def merge_launches(program: Program, schedule: Schedule) -> Iterator[Schedule]:
    yield replace(schedule, merged=not schedule.merged)


REWRITES: dict[str, Variants] = {
    "tile_block": either(by_contraction("tile", "kc", "mc", "nc"), tile_outer),
    "stage_local": stage,
    "layout_coalesce": blocked,
    "vectorize": either(by_field("simd", LANES), widths),
    "loop_order": by_field("order", (0, 1, 2), lambda n: any(len(s.loops) > 1 for s in n.stages)),
    "traversal_swizzle": swap_outer,
    "cache_hint": by_field("stream", STREAM, writes_streams),
    "prefetch_pipeline": by_field("prefetch", PREFETCH, has_outer),
    "fuse": fuse,
    "fission": fission,
    "recompute": either(unstage, duplicate),
    "unroll_ilp": either(by_field("accumulators", ACCUMULATORS, reducing), flags("-funroll-loops")),
    "matrix_unit": by_contraction("matrix_unit"),
    "precision_math": relaxed,
    "algebra_hoist": by_field("reciprocal", (True, False), divides),
    "algorithm_swap": either(by_contraction("form"), by_field("one_pass", (True, False), reducing)),
    "predicate_peel": by_field("peel", (True, False), tests_indices),
    "work_partition": either(
        by_field("grain", GRAINS), by_field("dynamic", (True, False)), by_contraction("parallel")
    ),
    "split_reduce": reanchor,
    "sync_launch": merge_launches,
    "specialize": fitting,
    "param_tune": shuffled(knobs, with_knobs),
}

STRATEGIES: tuple[str, ...] = tuple(REWRITES)


__all__ = ["REWRITES", "STRATEGIES", "apply", "knobs", "nest_of", "with_knobs"]

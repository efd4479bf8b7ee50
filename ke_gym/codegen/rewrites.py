"""Strategies as functions from schedule to schedule. Applying one *is* the legality test.

Each strategy lists variants of a schedule in a fixed order; ``apply`` takes the ``draw``-th of them, and goes on
from there until one is legal. A strategy without a legal variant is not applicable.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

from ke_gym.codegen import contract, fusion
from ke_gym.codegen.errors import Illegal
from ke_gym.codegen.graph import Extern, Graph, Node
from ke_gym.codegen.nest import Nest, outer_choices
from ke_gym.codegen.program import Program
from ke_gym.codegen.schedule import Group, Plan, Schedule

Variants = Callable[[Program, Schedule], Iterator[Schedule]]

TILES = (1, 16, 64, 128, 256, 1024)
ACCUMULATORS = (1, 2, 4, 8)
GRAINS = (2048, 16384, 131072)
LANES = (0, 8, 16, 32)
PREFETCH = (0, 1, 4, 16)
MAX_TRIES = 64


def apply(program: Program, schedule: Schedule, strategy: str, draw: int = 0) -> Schedule | None:
    """The ``draw``-th legal variant of ``schedule`` under ``strategy``; None if it is not applicable.

    Deterministic. Raises ``KeyError`` for a strategy that has no rewrite (see ``STRATEGIES``).
    """
    seen = {schedule}
    variants = []
    for variant in REWRITES[strategy](program, schedule):
        if variant not in seen:
            seen.add(variant)
            variants.append(variant)
    for k in range(min(len(variants), MAX_TRIES)):
        variant = variants[(draw + k) % len(variants)]
        if program.legal(variant) and program.emit(variant) != program.emit(schedule):
            return variant
    return None


# ---------------------------------------------------------------------------------------------- helpers


def groups(schedule: Schedule) -> Iterator[tuple[int, int, Group]]:
    for p, plan in enumerate(schedule.plans):
        for g, group in enumerate(plan.groups):
            yield p, g, group


def with_group(schedule: Schedule, p: int, g: int, *new: Group) -> Schedule:
    """``schedule`` with group ``g`` of plan ``p`` replaced, and the same change where other plans have the group."""
    old = schedule.plans[p].groups[g]
    plans = []
    for k, plan in enumerate(schedule.plans):
        if k == p or old in plan.groups:
            at = g if k == p else plan.groups.index(old)
            plans.append(Plan((*plan.groups[:at], *new, *plan.groups[at + 1 :])))
        else:
            plans.append(plan)
    return replace(schedule, plans=tuple(plans))


def nest_of(program: Program, schedule: Schedule, p: int, g: int) -> Nest | contract.Contraction:
    graph, plan = program.graphs[p], schedule.plans[p]
    visible = fusion.visible_in(graph, plan.groups[g].nodes, [x.nodes for x in plan.groups])
    return fusion.cached_nest(graph, plan.groups[g], visible)


def loop_nests(program: Program, schedule: Schedule) -> Iterator[tuple[int, int, Group, Nest]]:
    for p, g, group in groups(schedule):
        nest = nest_of(program, schedule, p, g)
        if isinstance(nest, Nest):
            yield p, g, group, nest


def contractions(
    program: Program, schedule: Schedule
) -> Iterator[tuple[int, int, Group, dict[str, list[Any]]]]:
    """Groups with a product, each with the legal values of its knobs."""
    for p, g, group in groups(schedule):
        nest = nest_of(program, schedule, p, g)
        if isinstance(nest, contract.Contraction):
            yield p, g, group, nest.knobs()


def with_knob(group: Group, knob: str, value: Any) -> Group:
    kept = [(k, v) for k, v in group.contraction if k != knob]
    return replace(group, contraction=tuple(sorted((*kept, (knob, value)))))


def by_field(field: str, values: tuple[Any, ...], kind: Callable[[Nest], bool] = lambda n: True) -> Variants:
    """Variants that set one field of one nest's group."""

    def variants(program: Program, schedule: Schedule) -> Iterator[Schedule]:
        for p, g, group, nest in loop_nests(program, schedule):
            if kind(nest):
                for value in values:
                    if value != getattr(group, field):
                        yield with_group(schedule, p, g, replace(group, **{field: value}))

    return variants


def by_contraction(*names: str) -> Variants:
    """Variants that set one knob of one product."""

    def variants(program: Program, schedule: Schedule) -> Iterator[Schedule]:
        for p, g, group, choices in contractions(program, schedule):
            for name in names:
                for value in choices.get(name, []):
                    yield with_group(schedule, p, g, with_knob(group, name, value))

    return variants


def either(*parts: Variants) -> Variants:
    def variants(program: Program, schedule: Schedule) -> Iterator[Schedule]:
        for part in parts:
            yield from part(program, schedule)

    return variants


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
                loops = len(step.vars) + len(step.rvars)
                singles = [((k, t),) for k in range(loops) for t in (1, 64, 1024)]
                for outer in dict.fromkeys([*choices, *singles]):
                    if (name, outer) != (group.anchor, group.outer):
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


def merge_launches(program: Program, schedule: Schedule) -> Iterator[Schedule]:
    yield replace(schedule, merged=not schedule.merged)


def shuffle_knobs(program: Program, schedule: Schedule) -> Iterator[Schedule]:
    """A sequence of random settings of all knobs."""
    choices = knobs(program, schedule)
    for seed in range(MAX_TRIES):
        generator = random.Random(seed)
        picked = {k: generator.choice(v) for k, v in choices.items() if generator.random() < 0.4}
        try:
            yield with_knobs(program, schedule, picked)
        except Illegal:
            continue


def reducing(nest: Nest) -> bool:
    return any(item.op for stage in nest.stages for item in stage.items)


def has_outer(nest: Nest) -> bool:
    return bool(nest.outer)


REWRITES: dict[str, Variants] = {
    "tile_block": either(by_contraction("tile", "kc", "mc", "nc"), tile_outer),
    "stage_local": stage,
    "vectorize": either(by_field("simd", LANES), widths),
    "loop_order": by_field("order", (0, 1, 2), lambda n: any(len(s.loops) > 1 for s in n.stages)),
    "traversal_swizzle": swap_outer,
    "prefetch_pipeline": by_field("prefetch", PREFETCH, has_outer),
    "fuse": fuse,
    "fission": fission,
    "recompute": either(unstage, duplicate),
    "unroll_ilp": either(by_field("accumulators", ACCUMULATORS, reducing), flags("-funroll-loops")),
    "matrix_unit": by_contraction("matrix_unit"),
    "algebra_hoist": by_field("reciprocal", (True, False)),
    "algorithm_swap": by_contraction("form"),
    "predicate_peel": by_field("peel", (True, False)),
    "work_partition": either(
        by_field("grain", GRAINS), by_field("dynamic", (True, False)), by_contraction("parallel")
    ),
    "split_reduce": reanchor,
    "sync_launch": merge_launches,
    "param_tune": shuffle_knobs,
}

STRATEGIES: tuple[str, ...] = tuple(REWRITES)


# ------------------------------------------------------------------------------------------------ knobs


def knobs(program: Program, schedule: Schedule) -> dict[str, list[Any]]:
    """What ``param_tune`` may set: knob name -> values, the present one among them."""
    found: dict[str, list[Any]] = {
        "vector_width": [512, 256, 128],
        "unroll_loops": [False, True],
        "merged": [False, True],
    }
    for p, g, group, nest in loop_nests(program, schedule):
        at = f"{p}.{g}"
        found[f"{at}.grain"] = _with(GRAINS, group.grain)
        found[f"{at}.simd"] = _with(LANES, group.simd)
        if reducing(nest):
            found[f"{at}.accumulators"] = _with(ACCUMULATORS, group.accumulators)
        if nest.outer:
            found[f"{at}.dynamic"] = [False, True]
            found[f"{at}.prefetch"] = _with(PREFETCH, group.prefetch)
            for k, (_, tile) in enumerate(nest.group.outer):
                found[f"{at}.tile{k}"] = _with(TILES, tile)
    for p, g, _, choices in contractions(program, schedule):
        for name, values in choices.items():
            if len(values) > 1:
                found[f"{p}.{g}.{name}"] = list(values)
    return found


def _with(values: tuple[Any, ...], present: Any) -> list[Any]:
    return sorted({*values, present})


def with_knobs(program: Program, schedule: Schedule, values: dict[str, Any]) -> Schedule:
    """``schedule`` with these knobs set. Raises ``Illegal`` if the combination cannot be built."""
    result = schedule
    others = [
        f for f in schedule.flags if not f.startswith("-mprefer-vector-width") and f != "-funroll-loops"
    ]
    width = values.get("vector_width", next((f for f in schedule.flags if f.startswith("-mprefer")), None))
    unroll = values.get("unroll_loops", "-funroll-loops" in schedule.flags)
    chosen = [
        *others,
        *([f"-mprefer-vector-width={width}"] if isinstance(width, int) else [width] if width else []),
    ]
    result = replace(result, flags=(*chosen, *(["-funroll-loops"] if unroll else [])))
    result = replace(result, merged=values.get("merged", result.merged))
    settings: dict[tuple[int, int], dict[str, Any]] = {}
    for name, value in values.items():
        if name.count(".") == 2:
            plan_number, group_number, field = name.split(".")
            settings.setdefault((int(plan_number), int(group_number)), {})[field] = value
    for (p, g), fields in settings.items():
        nest = nest_of(program, schedule, p, g)
        group = schedule.plans[p].groups[g]
        for field, value in fields.items():
            if isinstance(nest, contract.Contraction):
                group = with_knob(group, field, value)
            elif field.startswith("tile"):
                group = replace(group, anchor=nest.group.anchor, outer=group.outer or nest.group.outer)
                k = int(field[4:])
                outer = (*group.outer[:k], (group.outer[k][0], value), *group.outer[k + 1 :])
                group = replace(group, outer=outer)
            else:
                group = replace(group, **{field: value})
        plan = result.plans[p]
        changed = Plan((*plan.groups[:g], group, *plan.groups[g + 1 :]))
        result = replace(result, plans=(*result.plans[:p], changed, *result.plans[p + 1 :]))
    if not program.legal(result):
        raise Illegal("these knobs do not go together")
    return result


__all__ = ["REWRITES", "STRATEGIES", "Graph", "apply", "knobs", "with_knobs"]

"""The strategies on schedules for a GPU: the same vocabulary, applied to tile kernels. See ``rewrites``."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from ke_gym.codegen import bags, flash, fusion, products
from ke_gym.codegen import channels_last as layouts
from ke_gym.codegen.attentions import Attention
from ke_gym.codegen.errors import Illegal
from ke_gym.codegen.graph import Extern
from ke_gym.codegen.legality import legal
from ke_gym.codegen.matmuls import Matmul
from ke_gym.codegen.pairs import Pairs
from ke_gym.codegen.program import Program
from ke_gym.codegen.schedule import Group, Plan, Schedule
from ke_gym.codegen.searches import Searched, searching
from ke_gym.codegen.tiles import Tiles
from ke_gym.codegen.variants import Variants, either, groups, nest_of, shuffled, with_group
from ke_gym.codegen.windows import LANGUAGE, Windowed


def with_launch(group: Group, knob: str, value: Any) -> Group:
    kept = [(k, v) for k, v in group.launch if k != knob]
    return replace(group, launch=tuple(sorted((*kept, (knob, value)))))


def by_launch(
    *names: str,
    kinds: tuple[Any, ...] = (
        Tiles,
        products.Product,
        flash.Flash,
        Pairs,
        Windowed,
        Matmul,
        bags.Bag,
        Searched,
    ),
) -> Variants:
    """Variants that set one knob of one kernel, nearest values first."""

    def variants(program: Program, schedule: Schedule) -> Iterator[Schedule]:
        for p, g, group in groups(schedule):
            kernel: Any = nest_of(program, schedule, p, g)
            if not isinstance(kernel, kinds):
                continue
            for name in names:
                values = kernel.knobs().get(name, [])
                present = getattr(kernel.blocks, name, None)
                at = values.index(present) if present in values else 0
                for value in sorted(values, key=lambda v: abs(values.index(v) - at)):
                    if value != present:
                        yield with_group(schedule, p, g, with_launch(group, name, value))

    return variants


def fuse(program: Program, schedule: Schedule) -> Iterator[Schedule]:
    """Join two kernels, take a library product over, or a softmax with the products around it."""
    for p, (graph, plan) in enumerate(zip(program.graphs, schedule.plans)):
        order = {n: k for k, n in enumerate(graph.steps)}
        for a, first in enumerate(plan.groups):
            for second in plan.groups[a + 1 :]:
                if fusion.related(graph, list(first.nodes), list(second.nodes)):
                    nodes = tuple(sorted({*first.nodes, *second.nodes}, key=lambda n: order[n]))
                    rest = [g for g in plan.groups if g is not first and g is not second]
                    kept = tuple(
                        knob for knob in (*first.launch, *second.launch) if knob[0] == "channels_last"
                    )
                    yield _with_plan(schedule, p, _plan([*rest, Group(nodes, launch=kept)], order))
        for name, step in graph.steps.items():
            product = isinstance(step, Extern) and step.target in (*products.KINDS, *bags.KINDS)
            if product and not any(name in g.nodes for g in plan.groups):
                yield _with_plan(schedule, p, fusion.absorb(graph, plan, name))
        yield _with_plan(schedule, p, fusion.attended(graph, plan))


def fission(program: Program, schedule: Schedule) -> Iterator[Schedule]:
    """Cut a kernel in two, or give a product back to the library."""
    for p, g, group in groups(schedule):
        graph = program.graphs[p]
        products_here = [n for n in group.nodes if isinstance(graph.steps[n], Extern)]
        if products_here:
            rest = tuple(n for n in group.nodes if n not in products_here)
            yield with_group(schedule, p, g, *([Group(rest)] if rest else []))
            continue
        for cut in range(len(group.nodes) - 1, 0, -1):
            yield with_group(schedule, p, g, Group(group.nodes[:cut]), Group(group.nodes[cut:]))


def on_tensor_cores(program: Program, schedule: Schedule) -> Iterator[Schedule]:
    """A convolution, a product or attention in CUDA C++, or back in the language of the others; two products in one kernel."""
    for p, g, group in groups(schedule):
        kernel: Any = nest_of(program, schedule, p, g)
        if isinstance(kernel, (Pairs, Windowed, Matmul, Attention)):
            yield with_group(schedule, p, g, replace(group, launch=()))
        elif isinstance(kernel, (products.Product, flash.Flash)):
            yield with_group(schedule, p, g, replace(group, launch=(("language", LANGUAGE),)))
    for p, (graph, plan) in enumerate(zip(program.graphs, schedule.plans)):
        order = {n: k for k, n in enumerate(graph.steps)}
        for one, two in fusion.following(graph):
            yield _with_plan(schedule, p, fusion.paired(plan, one, two, order))


def in_shared_memory(program: Program, schedule: Schedule) -> Iterator[Schedule]:
    """A search that begins in shared memory, or goes to memory with every probe again."""
    for p, g, group in groups(schedule):
        graph = program.graphs[p]
        if isinstance(nest_of(program, schedule, p, g), Searched):
            yield with_group(schedule, p, g, replace(group, launch=()))
        elif searching(graph, group):
            yield with_group(schedule, p, g, replace(group, launch=(("language", LANGUAGE),)))


def prepare(program: Program, schedule: Schedule) -> Iterator[Schedule]:
    """Declare what depends on weights alone a preparation; copies of weights, packed or ready to multiply, belong to it."""
    yield replace(schedule, prepared=not schedule.prepared)
    for p, g, group in groups(schedule):
        kernel: Any = nest_of(program, schedule, p, g)
        if isinstance(kernel, products.Product):
            for knobs in (("ready",), ("packed",), ("packed", "ready")):
                changed = group
                for knob in knobs:
                    changed = with_launch(changed, knob, True)
                yield replace(with_group(schedule, p, g, changed), prepared=True)


def channels_last(program: Program, schedule: Schedule) -> Iterator[Schedule]:
    """Convolutions over a copy of their input with the channels innermost: our own, or the library's taken over."""
    if program.language == LANGUAGE:
        return
    yield from by_launch("channels_last")(program, schedule)
    for p, (graph, plan) in enumerate(zip(program.graphs, schedule.plans)):
        yield _with_plan(schedule, p, layouts.everywhere(graph, plan))
        for name, step in graph.steps.items():
            library = not any(name in g.nodes for g in plan.groups)
            if library and isinstance(step, Extern) and step.target == products.CONVOLUTION:
                yield _with_plan(schedule, p, fusion.absorb(graph, plan, name, layouts.LAUNCH))


def _plan(listed: list[Group], order: dict[str, int]) -> Plan:
    return Plan(tuple(sorted(listed, key=lambda g: order[g.nodes[-1]])))


def _with_plan(schedule: Schedule, p: int, plan: Plan) -> Schedule:
    return replace(schedule, plans=(*schedule.plans[:p], plan, *schedule.plans[p + 1 :]))


def knobs(program: Program, schedule: Schedule) -> dict[str, list[Any]]:
    """See ``knobs.knobs``."""
    found: dict[str, list[Any]] = {}
    pipelined = program.language != "cuda"
    for p, g, _ in groups(schedule):
        kernel: Any = nest_of(program, schedule, p, g)
        for name, values in kernel.knobs().items():
            staged = pipelined or isinstance(kernel, (Pairs, Windowed, Matmul, Attention))
            if len(values) > 1 and (name != "stages" or staged):
                found[f"{p}.{g}.{name}"] = list(values)
    return found


def present(program: Program, schedule: Schedule) -> dict[str, Any]:
    """Where the schedule stands in the space of ``knobs``."""
    values = {}
    for name in knobs(program, schedule):
        p, g, field = name.split(".")
        kernel: Any = nest_of(program, schedule, int(p), int(g))
        values[name] = getattr(kernel.blocks, field)
    return values


def with_knobs(program: Program, schedule: Schedule, values: dict[str, Any]) -> Schedule:
    """See ``knobs.with_knobs``."""
    result = schedule
    for name, value in values.items():
        p, g, field = name.split(".")
        group = result.plans[int(p)].groups[int(g)]
        result = with_group(result, int(p), int(g), with_launch(group, field, value))
    if not legal(program, schedule, result):
        raise Illegal("these knobs do not go together")
    return result


REWRITES: dict[str, Variants] = {
    "tile_block": either(
        by_launch("m", "n", "k"), by_launch("rows", "columns", kinds=(Tiles, bags.Bag, Searched))
    ),
    "stage_local": either(by_launch("levels"), in_shared_memory),
    "vectorize": either(by_launch("rows", kinds=(Tiles, bags.Bag)), by_launch("words")),
    "layout_coalesce": either(by_launch("packed", "turned", "inner"), channels_last),
    "traversal_swizzle": by_launch("group"),
    "cache_hint": by_launch("cache", kinds=(Tiles,)),
    "prefetch_pipeline": by_launch("stages", "loads", "apart", "specialized"),
    "fuse": fuse,
    "fission": fission,
    "unroll_ilp": either(by_launch("columns", kinds=(Tiles,)), by_launch("unroll")),
    "matrix_unit": on_tensor_cores,
    "precision_math": by_launch("precision", "sums"),
    "algebra_hoist": either(prepare, by_launch("ready")),
    "work_partition": by_launch("warps"),
    "split_reduce": by_launch("split"),
    "sync_launch": by_launch("persistent", "programs", "turns"),
    "param_tune": shuffled(knobs, with_knobs),
}

"""What rewrites are made of: a schedule's nests and products, and variants with one choice changed."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

from ke_gym.codegen import contract
from ke_gym.codegen.errors import Illegal
from ke_gym.codegen.expr import InRange, Op, walk
from ke_gym.codegen.legality import nests_of
from ke_gym.codegen.nest import Nest
from ke_gym.codegen.program import Program
from ke_gym.codegen.schedule import Group, Plan, Schedule
from ke_gym.codegen.stages import collapsed, streamed

Variants = Callable[[Program, Schedule], Iterator[Schedule]]

TILES = (1, 16, 64, 128, 256, 1024)
ACCUMULATORS = (1, 2, 4, 8)
GRAINS = (2048, 16384, 131072)
LANES = (0, 8, 16, 32)
PREFETCH = (0, 1, 4, 16)
STREAM = (1, 8, 0)  # the least comes first
MAX_TRIES = 64


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
    return nests_of(program.graphs[p], schedule.plans[p])[g]


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


def shuffled(
    knobs: Callable[[Program, Schedule], dict[str, list[Any]]],
    with_knobs: Callable[[Program, Schedule, dict[str, Any]], Schedule],
) -> Variants:
    """A sequence of random settings of all knobs."""

    def variants(program: Program, schedule: Schedule) -> Iterator[Schedule]:
        choices = knobs(program, schedule)
        for seed in range(MAX_TRIES):
            generator = random.Random(seed)
            picked = {k: generator.choice(v) for k, v in choices.items() if generator.random() < 0.4}
            try:
                yield with_knobs(program, schedule, picked)
            except Illegal:
                continue

    return variants


def reducing(nest: Nest) -> bool:
    return any(item.op for stage in nest.stages for item in stage.items)


def has_outer(nest: Nest) -> bool:
    return bool(nest.outer)


def tests_indices(nest: Nest) -> bool:
    return any(isinstance(n, InRange) for s in nest.stages for i in s.items for n in walk(i.expr))


def divides(nest: Nest) -> bool:
    return any(
        isinstance(n, Op) and n.name == "div" for s in nest.stages for i in s.items for n in walk(i.expr)
    )


def writes_streams(nest: Nest) -> bool:
    return any(streamed(nest, collapsed(stage), STREAM[0] << 20) for stage in nest.stages)

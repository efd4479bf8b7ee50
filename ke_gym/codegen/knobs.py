"""The numbers a schedule exposes to tuning: what ``param_tune`` may set, and a schedule with them set."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from ke_gym.codegen import contract, rewrites_gpu
from ke_gym.codegen.errors import Illegal
from ke_gym.codegen.legality import legal
from ke_gym.codegen.program import Program
from ke_gym.codegen.schedule import Plan, Schedule
from ke_gym.codegen.variants import (
    ACCUMULATORS,
    GRAINS,
    LANES,
    PREFETCH,
    STREAM,
    TILES,
    contractions,
    loop_nests,
    nest_of,
    reducing,
    with_knob,
    writes_streams,
)  # fmt: skip
from ke_gym.languages import cpp


def knobs(program: Program, schedule: Schedule) -> dict[str, list[Any]]:
    """What ``param_tune`` may set: knob name -> values, the present one among them."""
    if program.device == "cuda":
        return rewrites_gpu.knobs(program, schedule)
    found: dict[str, list[Any]] = {
        "vector_width": [512, 256, 128],
        "unroll_loops": [False, True],
        "merged": [False, True],
    }
    offered = sorted({*cpp.compilers(), schedule.compiler})
    if len(offered) > 1:
        found["compiler"] = offered
    for p, g, group, nest in loop_nests(program, schedule):
        at = f"{p}.{g}"
        found[f"{at}.grain"] = _with(GRAINS, group.grain)
        found[f"{at}.simd"] = _with(LANES, group.simd)
        if writes_streams(nest):
            found[f"{at}.stream"] = _with(STREAM, group.stream)
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
    if program.device == "cuda":
        return rewrites_gpu.with_knobs(program, schedule, values)
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
    result = replace(
        result,
        merged=values.get("merged", result.merged),
        compiler=values.get("compiler", result.compiler),
    )
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
    if not legal(program, schedule, result):
        raise Illegal("these knobs do not go together")
    return result

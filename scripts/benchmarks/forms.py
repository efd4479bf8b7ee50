"""Forms of a task, to be built without a search: the generator's first drafts, and random settings of their knobs."""

from __future__ import annotations

import contextlib
import functools
import random
from dataclasses import dataclass

from ke_gym.codegen.errors import Illegal
from ke_gym.codegen.program import Program
from ke_gym.codegen.rewrites_gpu import knobs, present, with_knobs
from ke_gym.codegen.schedule import Schedule
from ke_gym.evaluation.gpu_signature import signature
from ke_gym.languages.base import BuildOptions, Signature, build
from ke_gym.languages.device import DEFAULT_ARCH
from ke_gym.tasks.task import Task

DRAFTS = 6
"""At most so many first drafts of a task are built."""
_TRIES, _MOST_KNOBS = 40, 4


class Failed(Exception):
    """A form, or a reference, cannot be built or run: why."""


@dataclass(frozen=True)
class Recipe:
    """One form of a task, its ``number``-th, to be built for a device."""

    task: bytes
    number: int
    language: str
    variants: int
    arch: str = DEFAULT_ARCH
    multiprocessors: int = 132


@dataclass(frozen=True)
class Form:
    """A built kernel: "draft 2" or "variant 5", and its knobs."""

    label: str
    knobs: str
    artifact: bytes


def forms(program: Program, variants: int) -> dict[str, Schedule]:
    """The first drafts, and so many other settings of the knobs of the very first, drawn at random: the same each time."""
    drafts = program.seeds()
    found = {f"draft {k}": schedule for k, schedule in enumerate(drafts[:DRAFTS])}
    # The first graph is that of the sizes that are timed.
    here = present(program, drafts[0])
    choices = {
        name: [value for value in values if value != here[name]]
        for name, values in knobs(program, drafts[0]).items()
        if name.startswith("0.")
    }
    for number in range(variants):
        generator = random.Random(number)
        for _ in range(_TRIES):
            names = generator.sample(list(choices), min(len(choices), generator.randint(1, _MOST_KNOBS)))
            picked = {name: generator.choice(choices[name]) for name in names}
            with contextlib.suppress(Illegal):
                made = with_knobs(program, drafts[0], picked)
                if made not in (*drafts, *found.values()):
                    found[f"variant {number}"] = made
                    break
    return found


def build_form(recipe: Recipe) -> Form | None:
    """Build one form; None if the task has not so many. Raises ``Failed``."""
    try:
        program, schedules, traced = _prepared(recipe.task, recipe.language, recipe.arch, recipe.variants)
        if recipe.number >= len(schedules):
            return None
        label, schedule = list(schedules.items())[recipe.number]
        options = BuildOptions("cuda", arch=recipe.arch, multiprocessors=recipe.multiprocessors)
        artifact = build(program.emit(schedule), traced, recipe.language, options)
    except Exception as error:  # whatever it is, it costs this form alone
        raise Failed(f"{type(error).__name__}: {error}") from None
    return Form(label, _knobs(schedule), artifact.to_bytes())


@functools.cache
def _prepared(
    packed: bytes, language: str, arch: str, variants: int
) -> tuple[Program, dict[str, Schedule], Signature]:
    task = Task.from_bytes(packed)
    program = Program.for_language(task, language, arch)
    return program, forms(program, variants), signature(task, [task.contract("cuda")])


def _knobs(schedule: Schedule) -> str:
    """What the launches of the first graph are told: "0.rows=2", by kernel."""
    groups = enumerate(schedule.plans[0].groups)
    return " ".join(f"{g}.{name}={value}" for g, group in groups for name, value in group.launch)

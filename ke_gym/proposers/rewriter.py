"""The rule-based proposer: no model, no key, no network.

A strategy is a rewrite of the parent's schedule, printed again by the code generator; whether it applies is
found by applying it. Source that carries no schedule (a person's, an LLM's, an edited one) is rewritten as
text. Deterministic given (parent, strategy, draw, context).
"""

from __future__ import annotations

import hashlib
import math
from collections import OrderedDict
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import fields, replace
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ke_gym import strategies
from ke_gym.candidate import Candidate
from ke_gym.codegen import CodegenError, Group, Program, Schedule, rewrites, rewrites_gpu
from ke_gym.codegen.contract import Contraction
from ke_gym.codegen.errors import Illegal
from ke_gym.codegen.features import Features
from ke_gym.codegen.graph import HOPPER
from ke_gym.proposers import text, tuning
from ke_gym.proposers.base import Context, Proposal, Proposer, Refusal, Trial
from ke_gym.proposers.schedules import attach, recover, without
from ke_gym.strategies import FIX, RESTART, STRATEGIES, Strategy
from ke_gym.tasks import Task

_MASKS_KEPT = 512
_WALK = 5  # most rewrites between a seed and a random draft


class Rewriter(Proposer):
    """Candidates for one task from its captured graph, on a GPU of ``arch`` where kernels are for one.

    Raises ``CodegenError`` (a ``UserError``) for a reference that ``torch.export`` refuses.
    """

    name = "rewriter"
    draws = 8

    def __init__(self, task: Task, language: str = "cpp", arch: str = HOPPER) -> None:
        self.language = language
        self.program = Program.for_language(task, language, arch)
        self.seeds = self.program.seeds()
        self.fast_math = task.tolerance is not None or task.precision != "strict"
        self._masks: OrderedDict[str, NDArray[np.bool_]] = OrderedDict()

    def propose(
        self, parent: Candidate | None, strategy: Strategy, draw: int, context: Context
    ) -> Proposal | Refusal:
        if strategy is RESTART:
            return self._draft(draw, context.seed)
        if parent is None:
            return Refusal(f"{strategy.name} needs a kernel to start from")
        schedule = self._schedule(parent.source)
        if strategy is FIX:
            return self._repair(parent, schedule, draw)
        if strategy.name == "param_tune":
            return self._tune(parent, schedule, draw, context)
        if schedule is None:
            return _nth(
                (self._from_text(parent, made, strategy) for made in self._texts(parent, strategy)),
                draw,
                f"{strategy.name} finds nothing to change in this source",
            )
        changed = self._rewritten(schedule, strategy, draw)
        if changed is None:
            return Refusal(f"{strategy.name} does not apply to this schedule")
        return self._printed(parent, strategy, changed)

    @property
    def features(self) -> Features | None:
        return self.program.features

    def _schedule(self, source: str) -> Schedule | None:
        """What the text carries, unless it is of another task, or of a version that knew other nests."""
        schedule = recover(source)
        return schedule if schedule is not None and self.program.legal(schedule) else None

    def _rewritten(self, schedule: Schedule, strategy: Strategy, draw: int) -> Schedule | None:
        if strategy.name not in rewrites.STRATEGIES:
            return None
        return rewrites.apply(self.program, schedule, strategy.name, draw)

    def mask(self, parent: Candidate) -> NDArray[np.bool_]:
        key = hashlib.sha256(parent.source.encode()).hexdigest()
        if key not in self._masks:
            schedule = self._schedule(parent.source)
            applies = self._on_text(parent) if schedule is None else self._on_schedule(schedule)
            self._masks[key] = np.array([applies(strategy) for strategy in STRATEGIES])
            if len(self._masks) > _MASKS_KEPT:
                self._masks.popitem(last=False)
        return self._masks[key].copy()

    def _on_schedule(self, schedule: Schedule) -> Callable[[Strategy], bool]:
        def applies(strategy: Strategy) -> bool:
            if strategy.name == "param_tune":
                return _space(rewrites.knobs(self.program, schedule)) > 1
            return self._rewritten(schedule, strategy, 0) is not None

        return applies

    def _on_text(self, parent: Candidate) -> Callable[[Strategy], bool]:
        def applies(strategy: Strategy) -> bool:
            if strategy.name == "param_tune":
                return _space(text.space(without(parent.source), self.fast_math)) > 1
            return bool(self._texts(parent, strategy))

        return applies

    # Drafts -----------------------------------------------------------------------------------------------

    def _draft(self, draw: int, seed: int) -> Proposal | Refusal:
        """The ``draw``-th seed; beyond them, a seed after a short random walk of rewrites."""
        if draw < len(self.seeds):
            return self._printed(None, RESTART, self.seeds[draw])
        rng = np.random.default_rng((seed, draw))
        schedule = self.seeds[int(rng.integers(len(self.seeds)))]
        known = [strategy for strategy in STRATEGIES if strategy.rewrite]
        for _ in range(int(rng.integers(1, _WALK + 1))):
            strategy = known[int(rng.integers(len(known)))]
            schedule = self._rewritten(schedule, strategy, int(rng.integers(8))) or schedule
        return self._printed(None, RESTART, schedule)

    def _printed(
        self, parent: Candidate | None, strategy: Strategy, schedule: Schedule
    ) -> Proposal | Refusal:
        try:
            source = attach(self.program.emit(schedule, self.language), schedule)
        except CodegenError as error:
            return Refusal(str(error))
        origin = parent.id if parent else None
        return Proposal(Candidate(source, self.language, origin, strategy.name, self.name))

    # Tuning -----------------------------------------------------------------------------------------------

    def _tune(
        self, parent: Candidate, schedule: Schedule | None, draw: int, context: Context
    ) -> Proposal | Refusal:
        base = context.evaluation.log_speedup if context.evaluation else 0.0
        space, current = self._knobs(parent.source, schedule)
        if _space(space) < 2:
            return Refusal("this kernel exposes no knob")
        tried, known = [], {parent.id}
        for trial in (*tuned_from(parent, context.ancestors), *context.siblings):
            known.add(trial.candidate.id)
            _, setting = self._knobs(trial.candidate.source, self._schedule(trial.candidate.source))
            judged = trial.evaluation
            gain = judged.log_speedup - base if judged is not None and judged.correct else None
            tried.append((setting, gain, judged is not None))
        identity = int(parent.id, 16) % (1 << 31)
        seed = int(np.random.default_rng((context.seed, identity, draw)).integers(1 << 31))
        strategy = strategies.get("param_tune")
        if schedule is None:
            values = tuning.suggest(space, current, tried, seed)
            if values is not None:
                return self._from_text(parent, text.turned(without(parent.source), values), strategy)
        else:
            values = tuning.suggest(space, current, tried, seed, partial(self._new, parent, schedule, known))
            if values is not None:
                return self._printed(parent, strategy, rewrites.with_knobs(self.program, schedule, values))
        return Refusal("no setting of the knobs is left to try")

    def _new(
        self, parent: Candidate, schedule: Schedule, known: Collection[str], values: tuning.Values
    ) -> bool:
        """Whether the setting is legal and makes another kernel of the parent than those ``known`` by their ids."""
        try:
            tuned = rewrites.with_knobs(self.program, schedule, dict(values))
        except Illegal:
            return False
        proposal = self._printed(parent, strategies.get("param_tune"), tuned)
        return isinstance(proposal, Proposal) and proposal.candidate.id not in known

    def _knobs(self, source: str, schedule: Schedule | None) -> tuple[tuning.Knobs, tuning.Values]:
        """The space of settings, and the present one."""
        if schedule is None:
            plain = without(source)
            return text.space(plain, self.fast_math), text.setting(plain)
        return rewrites.knobs(self.program, schedule), present(self.program, schedule)

    # Text and repairs -------------------------------------------------------------------------------------

    def _texts(self, parent: Candidate, strategy: Strategy) -> list[str]:
        return text.alternatives(without(parent.source), strategy, self.fast_math)

    def _from_text(self, parent: Candidate, source: str, strategy: Strategy) -> Proposal:
        return Proposal(Candidate(source, parent.language, parent.id, strategy.name, self.name))

    def _repair(self, parent: Candidate, schedule: Schedule | None, draw: int) -> Proposal | Refusal:
        reason = "no simpler version of this kernel is left"
        if schedule is None:
            texts = text.repairs(without(parent.source))
            return _nth((self._from_text(parent, made, FIX) for made in texts), draw, reason)
        legal = (s for s in simpler(schedule) if self.program.legal(s))
        return _nth((self._printed(parent, FIX, s) for s in legal), draw, reason)


def simpler(schedule: Schedule) -> Iterator[Schedule]:
    """Schedules that undo one thing that may have broken a kernel: flags and compiler first, then
    structure."""
    plain = Schedule(schedule.plans)
    if schedule.flags != plain.flags:
        yield replace(schedule, flags=schedule.flags[:-1])
        yield replace(schedule, flags=plain.flags)
    if schedule.compiler != plain.compiler:
        yield replace(schedule, compiler=plain.compiler)
    if schedule.merged:
        yield replace(schedule, merged=False)
    for field in fields(Group):
        if field.name not in ("nodes", "anchor", "outer", "accumulators", "grain") and any(
            getattr(group, field.name) != field.default for plan in schedule.plans for group in plan.groups
        ):
            yield _in_all_groups(schedule, **{field.name: field.default})
    if any(tile > 1 for plan in schedule.plans for group in plan.groups for _, tile in group.outer):
        plans = tuple(
            replace(
                plan,
                groups=tuple(
                    replace(group, outer=tuple((p, max(tile // 2, 1)) for p, tile in group.outer))
                    for group in plan.groups
                ),
            )
            for plan in schedule.plans
        )
        yield replace(schedule, plans=plans)


def present(program: Program, schedule: Schedule) -> dict[str, Any]:
    """Where the schedule stands in the space of ``rewrites.knobs``."""
    if program.device == "cuda":
        return rewrites_gpu.present(program, schedule)
    widths = [flag.split("=")[1] for flag in schedule.flags if flag.startswith("-mprefer-vector-width=")]
    values: dict[str, Any] = {
        "vector_width": int(widths[-1]) if widths else 256,
        "unroll_loops": "-funroll-loops" in schedule.flags,
        "merged": schedule.merged,
    }
    space = rewrites.knobs(program, schedule)
    if "compiler" in space:
        values["compiler"] = schedule.compiler
    for name in space.keys() - values.keys():
        plan, number, knob = name.split(".")
        group = schedule.plans[int(plan)].groups[int(number)]
        nest = rewrites.nest_of(program, schedule, int(plan), int(number))
        if isinstance(nest, Contraction):
            values[name] = getattr(nest.choices, knob)
        elif knob.startswith("tile"):
            values[name] = nest.group.outer[int(knob[4:])][1]
        else:
            values[name] = getattr(group, knob)
    return values


def tuned_from(candidate: Candidate, ancestors: Sequence[Trial]) -> list[Trial]:
    """The nearest ancestors that differ from ``candidate`` in knobs alone."""
    found: list[Trial] = []
    for trial in reversed(ancestors):
        if candidate.strategy != "param_tune":
            break
        found.append(trial)
        candidate = trial.candidate
    return found[::-1]


def _in_all_groups(schedule: Schedule, **changes: Any) -> Schedule:
    plans = tuple(
        replace(plan, groups=tuple(replace(group, **changes) for group in plan.groups))
        for plan in schedule.plans
    )
    return replace(schedule, plans=plans)


def _nth(made: Iterator[Proposal | Refusal], draw: int, otherwise: str) -> Proposal | Refusal:
    """The ``draw``-th proposal."""
    for index, proposal in enumerate(made):
        if index == draw:
            return proposal
    return Refusal(otherwise)


def _space(knobs: tuning.Knobs) -> int:
    return math.prod(len(choices) for choices in knobs.values())

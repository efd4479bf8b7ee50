"""Checking a kernel on a GPU: secret cases on poisoned memory, stray writes, and what it remembers."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor

from ke_gym.evaluation.acceptance import Verdict
from ke_gym.evaluation.gpu_host import HostRunner
from ke_gym.evaluation.gpu_memory import RED_ZONE, Block, Placement, damaged, poison, ring, same_bits
from ke_gym.evaluation.gpu_stage import Runner, ShapeSet, Stage, copy_all, foreign, tensors_of
from ke_gym.evaluation.shared import POISON, nearest
from ke_gym.languages.artifact import Artifact
from ke_gym.languages.plan import Plan
from ke_gym.targets._memory import MemoryPlan, plan_memory
from ke_gym.targets.cuda_executor import ALIGNMENT
from ke_gym.tasks.inputs import touch

Case = tuple[int, str, int]
"""Seed, distribution, and seed of the parameters (0: as they are)."""


def check(
    stage: Stage,
    chosen: ShapeSet,
    artifact: Artifact,
    cases: list[Case],
    touch_seed: int,
    touched: bool,
    patience: float,
) -> dict[str, Any]:
    """Every case; then, if ``touched``, two calls whose contents differ in one element of every tensor.

    The worst errors; or a ``reason``, with the ``case`` it was seen on (``damage``: a stray write), or ``touched``.
    """
    plan = artifact.plans[chosen.name]
    with foreign():
        arena, memory = _apart(stage, plan)
        preparing = _apart(stage, plan.preparation) if plan.preparation else None
        made = Block(Placement.of(plan.preparation.return_specs if plan.preparation else ()), stage.device)
    memories = {"memory": memory, "arena": arena, "prepared": made.tensors, "preparing": preparing}
    with stage.loaded(artifact, chosen, **memories) as runner:
        return _Check(stage, chosen, runner, made, preparing, patience).run(cases, touch_seed, touched)


def check_host(
    stage: Stage,
    chosen: ShapeSet,
    runner: HostRunner,
    cases: list[Case],
    touch_seed: int,
    touched: bool,
    patience: float,
) -> dict[str, Any]:
    """See ``check``; of a module of the host lane, in the process in which it is raced, too."""
    nothing = Block(Placement.of(()), stage.device)
    return _Check(stage, chosen, runner, nothing, None, patience).run(cases, touch_seed, touched)


def _apart(stage: Stage, plan: Plan) -> tuple[Tensor, MemoryPlan]:
    """Memory for a plan's intermediates, each with red zones."""
    memory = plan_memory(plan, reuse=False, red_zone=RED_ZONE, alignment=ALIGNMENT)
    return torch.empty(memory.size, dtype=torch.uint8, device=stage.device), memory


def errors(verdict: Verdict) -> dict[str, float]:
    """What a verdict measured, by the names that evaluations give it."""
    return {key: float(getattr(verdict, key)) for key in ("max_abs", "rel_l2", "ratio")}


class _Damage(Exception):
    """Something was written where nothing may be."""


class _Check:
    def __init__(
        self,
        stage: Stage,
        chosen: ShapeSet,
        runner: Runner,
        made: Block,
        preparing: tuple[Tensor, MemoryPlan] | None,
        patience: float,
    ) -> None:
        self._stage, self._chosen, self._runner, self._patience = stage, chosen, runner, patience
        self._made = made  # where the preparation's results lie
        none = torch.empty(0, dtype=torch.uint8)
        self._preparing, self._between = (
            (none, []) if preparing is None else (preparing[0], preparing[1].used)
        )

    def run(self, cases: list[Case], touch_seed: int, touched: bool) -> dict[str, Any]:
        stage, chosen = self._stage, self._chosen
        worst = {"max_abs": 0.0, "rel_l2": 0.0, "ratio": 0.0}
        for index, case in enumerate(cases):
            try:
                arguments, outputs = self._case(case, index % 2, 0)
                again = partial(self._case, case, index % 2)
                verdict = stage.verdict(chosen, arguments, outputs, case[1], again)
            except _Damage as damage:
                return {"reason": str(damage), "case": index, "damage": True}
            if verdict is None:
                continue  # the reference itself has no answer here
            if not verdict.ok:
                return {
                    "reason": verdict.reason,
                    "pattern": verdict.pattern,
                    "case": index,
                    **errors(verdict),
                }
            worst = {key: max(worst[key], value) for key, value in errors(verdict).items()}
        if touched:
            arguments, outputs = self._touched(cases[0], touch_seed, 0)
            again = partial(self._touched, cases[0], touch_seed)
            verdict = stage.verdict(chosen, arguments, outputs, cases[0][1], again)
            if verdict is not None and not verdict.ok:
                return {"reason": verdict.reason, "touched": True, **errors(verdict)}
        return worst

    def _case(self, case: Case, pattern: int, drawing: int) -> tuple[list[Any], list[Tensor]]:
        """The arguments of a case, and what the candidate makes of them. Raises ``_Damage``."""
        seed, distribution, state_seed = case
        self._set_state(case)
        self._stage.hold(self._chosen)
        computed = self._call((seed + drawing, distribution, state_seed), pattern)
        self._set_state(case)  # again: what belongs to the oracle could have been written to
        return computed

    def _set_state(self, case: Case) -> None:
        if case[2]:
            self._chosen.reference.randomize(case[2])

    def _call(self, case: Case, pattern: int) -> tuple[list[Any], list[Tensor]]:
        """Run on poisoned memory: the arguments, drawn again afterwards, and the outputs. Raises ``_Damage``."""
        stage, chosen, runner = self._stage, self._chosen, self._runner
        seed, distribution, _ = case
        made, held = self._made, chosen.held
        poison(made.bytes, made.placement.used, pattern)
        poison(self._preparing, self._between, pattern)
        stage.prepare(chosen, runner, self._patience)
        prepared = [tensor.clone() for tensor in made.tensors]
        given, out = stage.fill(chosen, seed, distribution), stage.blank(chosen, runner.plan)
        _ring(given)
        poison(out.bytes, out.placement.used, pattern)
        used = runner.memory.used
        poison(runner.arena, used, pattern)
        runner.fill_scratch(POISON[pattern])
        with foreign():
            runner.place(given.tensors, chosen.parameters, out.tensors)
        stage.run(runner, self._patience)
        outputs = stage.settled(out.tensors)
        for what, block, kept in (
            ("output", out.bytes, out.placement.used),
            ("intermediate", runner.arena, used),
            ("input", given.bytes, given.placement.used),
            ("parameter", held.bytes, held.placement.used),
            ("prepared tensor", made.bytes, made.placement.used),
            ("preparation's intermediate", self._preparing, self._between),
        ):
            if (byte := damaged(block, kept)) is not None:
                raise _Damage(f"wrote outside of its {what}s: " + nearest(byte, kept, what))
        arguments = stage.draw(chosen.name, seed, distribution)
        for index, (tensor, drawn) in enumerate(zip(given.tensors, tensors_of(arguments))):
            if not same_bits(tensor, drawn):
                raise _Damage(f"wrote to input {index}, which is read-only")
        for name, tensor in chosen.parameters.items():
            if not same_bits(tensor, chosen.reference.state[name]):
                raise _Damage(f"wrote to parameter {name}, which is read-only")
        for index, (tensor, prior) in enumerate(zip(made.tensors, prepared)):
            if not same_bits(tensor, prior):
                raise _Damage(f"wrote to prepared tensor {index}, which is read-only")
        return arguments, outputs

    def _touched(self, case: Case, touch_seed: int, drawing: int) -> tuple[list[Any], list[Tensor]]:
        """Twice the same contents, but for one element of every floating input and parameter: the second ones, and what the
        candidate makes of them."""
        stage, chosen, runner = self._stage, self._chosen, self._runner
        seed, distribution, _ = case
        self._set_state(case)
        stage.hold(chosen)
        stage.prepare(chosen, runner, self._patience)
        given, out = stage.fill(chosen, seed, distribution), stage.blank(chosen, runner.plan)
        with foreign():
            runner.place(given.tensors, chosen.parameters, out.tensors)
        stage.run(runner, self._patience)
        touch([*given.tensors, *chosen.parameters.values()], touch_seed + drawing)
        stage.prepare(chosen, runner, self._patience)
        stage.run(runner, self._patience)
        outputs = stage.settled(out.tensors)
        arguments = stage.draw(chosen.name, seed, distribution)
        touch([*tensors_of(arguments), *chosen.reference.state.values()], touch_seed + drawing)
        return arguments, outputs


def _ring(block: Block) -> None:
    """Put the red zones around contents that are in place already, and poison into what strides leave out."""
    gaps = any(
        t.numel() * t.element_size() < s.storage_bytes for t, s in zip(block.tensors, block.placement.specs)
    )
    if not gaps:
        ring(block.bytes, block.placement.used)
        return
    kept = [tensor.clone() for tensor in block.tensors]
    poison(block.bytes, block.placement.used, 0)
    copy_all(block.tensors, kept)

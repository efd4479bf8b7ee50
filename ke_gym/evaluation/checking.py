"""What a candidate is checked on, how a refusal is worded, and the checks of one in a process of its own."""

from __future__ import annotations

import random
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Any

from ke_gym.evaluation.acceptance import DRAWINGS
from ke_gym.evaluation.arms import Arm
from ke_gym.evaluation.evaluation import Errors, Outcome
from ke_gym.evaluation.judge_client import JudgeClient

CASES = (
    ("task", False),
    ("task", True),
    ("ties", False),
    ("offset", False),
    ("sparse", True),
    ("lognormal", False),
    ("zeros", True),
    ("special", False),
)


Case = tuple[int, str, int]
"""The seed of the inputs, their distribution, and the seed of the parameters, 0 for the task's own."""


@dataclass
class Entry:
    """One contestant: its artifact, its process, and the number the judge knows its outputs by."""

    arm: Arm
    number: int


def draw_cases(rng: random.Random, refused: Collection[str] = ()) -> list[Case]:
    """Secret cases: what every candidate of a session is checked on, but for distributions that the reference refuses."""
    cases = [(rng.getrandbits(60), d, rng.getrandbits(60) if fresh_state else 0) for d, fresh_state in CASES]
    return [case for case in cases if case[1] not in refused]


def unchecked(refused: Mapping[str, str]) -> str:
    """What is said of the distributions on which the reference itself raises; "" if there are none."""
    return "\n".join(
        f"nothing is checked on {distribution} inputs, on which the reference itself fails: {why}"
        for distribution, why in refused.items()
    )


class Rejected(Exception):
    """A candidate's evaluation ended early with this outcome; ``error`` is what its outputs were wrong by."""

    def __init__(self, outcome: Outcome, log: str, error: Errors | None = None) -> None:
        super().__init__(log)
        self.outcome: Outcome = outcome
        self.log = log
        self.error = error


def errors_of(verdict: dict[str, Any]) -> Errors:
    """What a judge's answer says of how wrong the outputs were."""
    return Errors(verdict["max_abs"], verdict["rel_l2"], verdict["ratio"])


def refusal(verdict: dict[str, Any], distribution: str, hidden: bool) -> str:
    """Why a candidate is refused that was wrong on inputs of ``distribution``, or on touched ones if it is "".

    Of a hidden shape no more is told than that it is one.
    """
    reason = verdict["reason"]
    if not distribution:
        return (
            f"wrong after one element of each input and parameter has changed: {reason}; outputs may depend on "
            "nothing but the inputs and parameters of the call"
        )
    where = "a shape it claims to support (general = True)" if hidden else "the task's shapes"
    inputs = "inputs" if distribution == "task" else f"{distribution} inputs"
    detail = f"; wrong: {verdict['pattern']}" if verdict["pattern"] and not hidden else ""
    return f"wrong on {inputs} of {where}: {reason}{detail}"


def settled(
    judge: JudgeClient, shape_set: str, number: int, verdict: dict[str, Any], again: Callable[[int], object]
) -> dict[str, Any]:
    """``verdict``, or what more contents say of a close call: ``again`` puts others in place and calls the contestant."""
    if verdict["ok"] or not verdict["close"]:
        return verdict
    for drawing in range(1, DRAWINGS):
        again(drawing)
        decided = judge.check_again(shape_set, number)
    return decided


def check_case(
    judge: JudgeClient, entry: Entry, shape_set: str, case: Case, poison: int, patience: float, hidden: bool
) -> Errors:
    """Call ``entry`` once on one case, and on more of its kind if that is a close call, within ``patience`` seconds each;
    raises ``Rejected``.

    Nothing is asked of it where the reference itself has no answer.
    """
    seed, distribution, state_seed = case
    if judge.load(shape_set, seed, distribution, state_seed) < 0.5:
        return Errors(0.0, 0.0, 0.0)

    def again(drawing: int) -> None:
        judge.load(shape_set, seed + drawing, distribution, state_seed)
        call((seed + drawing, distribution, state_seed))

    def call(case: Case) -> None:
        _prepare(judge, entry, shape_set, case, patience)
        entry.arm.call(patience)
        damage = entry.arm.damage()
        if damage:
            raise Rejected("correctness", damage)

    entry.arm.check_mode(poison)
    call(case)
    verdict = settled(judge, shape_set, entry.number, judge.check(shape_set, entry.number), again)
    if not verdict["ok"]:
        raise Rejected("correctness", refusal(verdict, distribution, hidden), errors_of(verdict))
    return errors_of(verdict)


def check_touched(
    judge: JudgeClient, entry: Entry, shape_set: str, case: Case, seed: int, patience: float
) -> None:
    """Two calls whose inputs and parameters differ in one element each: what is remembered shows."""
    entry.arm.check_mode(0)

    def call(drawing: int) -> None:
        judge.load(shape_set, *case)
        _prepare(judge, entry, shape_set, case, patience)
        entry.arm.call(patience)
        judge.touch(shape_set, seed + drawing)
        entry.arm.prepare(patience)
        entry.arm.call(patience)

    call(0)
    verdict = settled(judge, shape_set, entry.number, judge.check(shape_set, entry.number), call)
    if not verdict["ok"]:
        raise Rejected("correctness", refusal(verdict, "", False), errors_of(verdict))


def _prepare(judge: JudgeClient, entry: Entry, shape_set: str, case: Case, patience: float) -> None:
    """Prepare for the parameters of a loaded case, while other inputs lie where its own will."""
    if entry.arm.prepares:
        judge.draw(shape_set, case[0] + 1)
        entry.arm.prepare(patience)
        judge.load(shape_set, *case)

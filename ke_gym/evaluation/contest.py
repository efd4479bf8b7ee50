"""The race of contestants in processes of their own, and what races over all shape sets amount to."""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import numpy as np

from ke_gym.evaluation.arms import ArmDied, RivalFailed
from ke_gym.evaluation.checking import Entry, Rejected, settled
from ke_gym.evaluation.evaluation import Evaluation
from ke_gym.evaluation.judge_client import JudgeClient
from ke_gym.evaluation.race import Race, Rules, pooled, race
from ke_gym.evaluation.record import MachineRecord
from ke_gym.evaluation.stats import confidence_sequence
from ke_gym.languages.base import BuildError

RACE = Rules()
CONFIRM = Rules(futile=1000, max_seconds=2.0, hopeless=math.inf, slow=math.inf)
# The first fresh process goes on for longer: a kernel that is honest only for its first calls shows itself.
SOAK = Rules(40, 1000, 40, max_seconds=6.0, hopeless=math.inf, slow=math.inf)
AA = Rules(min_rounds=48, futile=1000, max_rounds=48, max_seconds=2.0, hopeless=math.inf, slow=math.inf)
# Versions that are level, with as many rounds as tell half a percent apart on a quiet device.
RUNOFF = Rules(min_rounds=96, futile=1000, max_rounds=96, max_seconds=2.0, hopeless=math.inf, slow=math.inf)
WARM_CALLS, WARM_SECONDS = 4, 0.05


@contextmanager
def rivals_fault() -> Iterator[None]:
    """What fails within is the incumbent's doing. Raises ``RivalFailed``."""
    try:
        yield
    except (BuildError, ArmDied) as failure:
        raise RivalFailed(failure.log) from failure


def believe(result: Race) -> None:
    """Raise ``Rejected`` or ``RivalFailed`` for a race in which an output was wrong."""
    if "candidate" in result.suspects:
        raise Rejected("correctness", "right when checked, wrong in a timed call")
    if result.suspects:
        raise RivalFailed("right when checked, wrong in a timed call")


def race_entries(
    judge: JudgeClient,
    shape_set: str,
    own: Entry,
    other: Entry | None,
    rules: Rules,
    record: MachineRecord,
    patience: float,
    rng: random.Random,
    baseline: bool = True,
) -> Race:
    """Race the candidate ``own`` against the incumbent ``other`` and the baseline, or only one of them.

    One call may take ``patience`` seconds; the margin is the machine's ``record``'s. Raises ``Rejected``,
    ``RivalFailed`` or ``ArmDied``. Without the baseline, outputs are not looked at.
    """
    judge.renew(shape_set, rng.getrandbits(60))
    own.arm.prepare(patience)
    if other is not None:
        with rivals_fault():
            other.arm.prepare(patience)
    # One timed output is compared with the oracle in full, and nobody knows which; others at random.
    full = {rng.randrange(rules.min_rounds)}
    rounds = itertools.count()
    contestants: dict[str, Callable[[], float]] = {"candidate": lambda: judge.net(own.arm.call(patience))}
    entries = {own.number: ("candidate", own)}
    if other is not None:

        def call_rival() -> float:
            with rivals_fault():
                return judge.net(other.arm.call(patience))

        contestants["incumbent"] = call_rival
        entries[other.number] = ("incumbent", other)
    if baseline:
        contestants["baseline"] = lambda: judge.call_baseline(shape_set)
    rival = "incumbent" if other is not None else "baseline"
    pace = {contestant: warm(call) for contestant, call in contestants.items()}

    def wrong(entry: Entry, verdict: dict[str, Any]) -> bool:
        def again(_: int) -> None:
            judge.draw(shape_set, rng.getrandbits(60))
            entry.arm.call(patience)

        with nullcontext() if entry is own else rivals_fault():
            return not settled(judge, shape_set, entry.number, verdict, again)["ok"]

    def inspect() -> set[str]:
        if not baseline:
            return set()
        verdicts = {
            number: judge.check(shape_set, number) for number in judge.fingerprint(shape_set, list(entries))
        }
        due = next(rounds) in full or rng.random() < 0.04
        if due and own.number not in verdicts:
            verdicts[own.number] = judge.check(shape_set, own.number)
        return {
            entries[number][0] for number, verdict in verdicts.items() if wrong(entries[number][1], verdict)
        }

    result = race(
        contestants,
        rival,
        draw=lambda: judge.draw(shape_set, rng.getrandbits(60)),
        inspect=inspect,
        rng=rng,
        rules=rules,
        margin=record.margin(pace[rival]),
    )
    believe(result)
    return result


def warm(call: Callable[[], float]) -> float:
    """Call until the heap has its size and the caches are as they will be; a slow contestant only once.

    Returns the seconds of the quickest call.
    """
    times: list[float] = []
    while len(times) < WARM_CALLS and sum(times) <= WARM_SECONDS:
        times.append(call())
    return min(times)


def over_sets(sets: dict[str, list[Race]], over: str) -> tuple[float, tuple[float, float]]:
    """Mean log-ratio of ``over`` to the candidate over shape sets, with an interval.

    Within one process the interval is the e-process's confidence sequence, across fresh processes Student's.
    """
    means, lows, highs = [], [], []
    for races in sets.values():
        if len(races) == 1:
            ratios = races[0].log_ratios(over, "candidate")
            mean = float(np.median(ratios))
            low, high = confidence_sequence(ratios)
        else:
            mean, (low, high) = pooled(races, over, "candidate")
        means.append(mean)
        lows.append(low)
        highs.append(high)
    low, high = float(np.mean(lows)), float(np.mean(highs))
    return float(np.mean(means)), (low, high)


def factors(interval: tuple[float, float]) -> tuple[float, float] | None:
    """A log-interval as factors; None where there were too few rounds for one."""
    low, high = interval
    return (math.exp(low), math.exp(high)) if math.isfinite(low) and math.isfinite(high) else None


def left_out(evaluation: Evaluation, why: str) -> Evaluation:
    """``evaluation`` of a candidate that raced without its incumbent, which failed."""
    first = why.partition("\n")[0]
    said = f"the incumbent failed ({first}): raced against the baseline alone"
    return evaluation.alone().replace(log="\n".join(filter(None, (said, evaluation.log))))


def remark(result: Race, against: str) -> str:
    """How a race that won nothing ended, in words."""
    words = {
        "hopeless": f"dropped after one call: more than three times the {against}'s time",
        "slow": f"dropped after three rounds: slower than the {against}",
        "slower": f"slower than the {against}",
        "no gain": f"no gain over the {against} beyond the machine's margin",
        "rounds": f"no clear gain over the {against} within the race's rounds",
        "time": f"no clear gain over the {against} within the race's time",
        "faster": "",
    }
    return words[result.ended]


def measured(base: Evaluation, sets: dict[str, list[Race]], contract: str, against: str) -> Evaluation:
    """``base`` with the times of ``contract`` and what all shape sets' races say: speedup, and gain over ``against``.

    ``sets`` holds one race of each shape set, or one per fresh process.
    """
    gain, gain_ci = over_sets(sets, against)
    speedup, speedup_ci = over_sets(sets, "baseline")
    times = [s for r in sets[contract] for s in r.seconds["candidate"]]
    reference = [s for r in sets[contract] for s in r.seconds["baseline"]]
    return base.replace(
        time_ms=1e3 * float(np.median(times)),
        reference_ms=1e3 * float(np.median(reference)),
        times_ms=tuple(round(1e3 * t, 6) for t in times),
        reference_times_ms=tuple(round(1e3 * t, 6) for t in reference),
        races=tuple(r.rounds for r in sets[contract]),
        speedup=math.exp(speedup),
        speedup_ci=factors(speedup_ci),
        gain=math.exp(gain),
        gain_ci=factors(gain_ci),
        shapes={n: math.exp(over_sets({n: r}, "baseline")[0]) for n, r in sets.items()},
    )

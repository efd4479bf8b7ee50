"""Races: who is faster, by paired and randomly interleaved calls on fresh inputs.

Each round draws new inputs, then calls every contestant once in random order. A candidate that is clearly
slower leaves early; a gain is tested by the sign e-process, then confirmed in fresh processes on new seeds,
and counts only if the interval of those clears the margin. (ARCHITECTURE.md, "How a verdict is reached".)
"""

from __future__ import annotations

import math
import random
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np

from ke_gym.evaluation.stats import SignTest, mean_interval


@dataclass(frozen=True)
class Rules:
    """When a race ends.

    A candidate leaves when its first timed call takes over ``hopeless`` times the rival's, or when the median
    of three rounds does by ``slow`` times. Otherwise, after ``min_rounds``: as "faster" when the e-process has
    decided and the median clears the margin (whether the *interval* does is for `confirm` to say), as "no gain"
    when the whole interval lies below the margin or the median below half of it after ``futile`` rounds, or
    after ``max_rounds`` or ``max_seconds``. Where ratios scatter by 7 %, as those of a busy millisecond do, this
    sees 19 of 20 leads of 5 %.

    ``unpromising``: also as "no gain" where the candidate cleared the margin in none of its first so many rounds, which
    of leads as small as the margin misses one in two to their power, and of larger ones fewer.
    """

    min_rounds: int = 10
    futile: int = 30
    max_rounds: int = 100
    max_seconds: float = 4.0
    hopeless: float = 3.0
    slow: float = 1.3
    unpromising: int = 0


@dataclass
class Race:
    """What a race showed: seconds per contestant and round, and the test of candidate against rival."""

    seconds: dict[str, list[float]] = field(default_factory=dict)
    test: SignTest = field(default_factory=SignTest)
    ended: str = ""
    suspects: set[str] = field(default_factory=set)

    @property
    def rounds(self) -> int:
        return len(self.test.values)

    def log_ratios(self, over: str, under: str) -> list[float]:
        """Per round, ln(seconds of ``over`` / seconds of ``under``)."""
        return [math.log(a / b) for a, b in zip(self.seconds[over], self.seconds[under])]

    def median(self, name: str) -> float:
        return float(np.median(self.seconds[name]))


def race(
    contestants: dict[str, Callable[[], float]],
    rival: str,
    *,
    draw: Callable[[], None],
    inspect: Callable[[], set[str]],
    rng: random.Random,
    rules: Rules,
    margin: float,
    candidate: str = "candidate",
    usable: Callable[[], bool] = lambda: True,
) -> Race:
    """Run one race.

    Args:
        contestants: name → a call that runs it once on the shared inputs and returns seconds.
        rival: the contestant the candidate is compared with.
        draw: puts fresh inputs into place.
        inspect: compares what was just computed; names the contestants whose outputs look wrong.
        rng: decides the order within each round.
        rules: when to stop.
        margin: log-ratio a gain must clear.
        usable: whether the round just run counts; asked once per round (a throttled GPU's does not).
    """
    result = Race({name: [] for name in contestants})
    order = list(contestants)
    end = time.perf_counter() + rules.max_seconds
    while not result.ended:
        draw()
        rng.shuffle(order)
        round_seconds = {name: contestants[name]() for name in order}
        result.suspects |= inspect()
        if result.suspects:
            result.ended = "suspect"
            break
        if not usable():
            continue
        for name, seconds in round_seconds.items():
            result.seconds[name].append(seconds)
        result.test.add(math.log(round_seconds[rival] / round_seconds[candidate]))
        result.ended = _ended(result, rules, margin, time.perf_counter() >= end)
    return result


def _ended(result: Race, rules: Rules, margin: float, late: bool) -> str:
    test, n = result.test, result.rounds
    if n == 1 and test.values[0] < -math.log(rules.hopeless):
        return "hopeless"
    if n == 3 and test.median < -math.log(rules.slow):
        return "slow"
    if test.decided and test.median < 0:
        return "slower"
    if n == rules.unpromising and max(test.values) < margin:
        return "no gain"
    if n >= rules.min_rounds and test.decided and test.median > margin:
        return "faster"
    if (n >= rules.futile and test.median < margin / 2) or (
        n >= rules.min_rounds and test.interval[1] < margin
    ):
        return "no gain"
    if n >= rules.max_rounds:
        return "rounds"
    if late and n >= 3:
        return "time"
    return ""


# Student's 97.5 % quantile for five processes, times what a median needs over a mean, over sqrt(5); and half as much
# again, so that an average lead is confirmed, not only a lucky one.
_WIDTH = 2.776 * 1.2533 / math.sqrt(5) * 1.5


def planned(first: Race, rival: str, margin: float, candidate: str = "candidate") -> int:
    """Rounds per confirming process, 7 to 40, from the lead and the scatter of the race that was won.

    So many that the interval over five processes is narrower than the lead over ``margin``: a kernel that is twice
    as fast needs few, one that is 5 % faster on a noisy machine many. A race stops at
    a lucky moment, so a standard error is taken off its lead. What confirms is new data throughout.
    """
    ratios = first.log_ratios(rival, candidate)
    spread = float(np.subtract(*np.quantile(ratios, (0.75, 0.25)))) / 1.349
    lead = float(np.median(ratios)) - margin - 1.2533 * spread / math.sqrt(len(ratios))
    return min(40, max(7, math.ceil((_WIDTH * spread / max(lead, 1e-3)) ** 2)))


def confirm(
    fresh: Callable[[int], Race],
    rival: str,
    *,
    margin: float,
    processes: int = 5,
    most: int = 12,
    candidate: str = "candidate",
) -> tuple[list[Race], tuple[float, float], bool]:
    """Repeat a won race in fresh processes on new seeds.

    ``fresh(i)`` runs a short race with new processes. Returns the races, the 95 % interval of the gain (a
    log-ratio) over process medians, and whether it clears the margin. Up to ``most`` processes are spent while
    the interval is undecided; stopping is by count, so a lucky look can't be picked.
    """
    races: list[Race] = []
    medians: list[float] = []
    for index in range(most):
        one = fresh(index)
        races.append(one)
        if one.suspects:
            return races, (-math.inf, -math.inf), False
        medians.append(float(np.median(one.log_ratios(rival, candidate))))
        if index + 1 == processes:
            low, high = mean_interval(medians)
            if low > margin or high < margin or float(np.mean(medians)) < margin:
                break
    interval = mean_interval(medians)
    return races, interval, interval[0] > margin


def pooled(races: Sequence[Race], over: str, under: str) -> tuple[float, tuple[float, float]]:
    """Mean log-ratio over process medians, with its 95 % interval."""
    medians = [float(np.median(r.log_ratios(over, under))) for r in races]
    return float(np.mean(medians)), mean_interval(medians)

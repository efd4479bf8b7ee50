"""A closer look at a GPU's best kernels by NVIDIA's tools, where these are installed."""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import replace

from ke_gym.evaluation.evaluation import Evaluation
from ke_gym.evaluation.gpu_profile import counted, limiter_by_counters
from ke_gym.evaluation.gpu_tools import (
    CHECKS,
    Replayed,
    ToolFailed,
    TooSlow,
    counters,
    sanitized,
    times,
)
from ke_gym.languages.artifact import Artifact

COUNTING_S, COUNTING_SHARE = 10.0, 0.1
"""About what ``ncu`` takes for one kernel, and its share at the most of the time that a search has the device alone."""
PART_BLOCKS = 8
"""What is looked at of a launch that takes too long as a whole: blocks run the same code."""


class Inspector:
    """Looks at artifacts with ``replayed(artifact)``, in the context ``alone()``, which has the device to itself.

    ``held()`` tells for how many seconds it was had so in all.
    """

    def __init__(
        self,
        replayed: Callable[[Artifact], Replayed],
        alone: Callable[[], AbstractContextManager[None]],
        held: Callable[[], float],
    ) -> None:
        self._replayed, self._alone, self._held = replayed, alone, held
        self._spent_s = 0.0
        self._refused = False

    def glance(self, evaluation: Evaluation, artifact: Artifact) -> Evaluation:
        """With counters, if ``ncu`` works here and has had little of the time so far."""
        if self._refused or self._spent_s + COUNTING_S > COUNTING_SHARE * self._held():
            return evaluation
        try:
            return self._counted(evaluation, artifact)
        except ToolFailed:
            return evaluation

    def final(self, evaluation: Evaluation, artifact: Artifact) -> Evaluation:
        """With counters, and refused for what ``compute-sanitizer`` finds; the log says what could not be looked at."""
        said = [evaluation.log]
        for check in CHECKS:
            try:
                found, remark = self._sanitized(artifact, check)
            except ToolFailed as failure:
                said.append(f"not looked at by {check}: {failure}")
                continue
            said.append(remark)
            if found:
                return evaluation.alone().replace(outcome="runtime", log=found, speedup=None, speedup_ci=None)
        try:
            evaluation = self._counted(evaluation, artifact)
        except ToolFailed as failure:
            said.append(f"no counters: {failure}")
        return evaluation.replace(log="\n".join(filter(None, said)))

    def times(self, artifact: Artifact) -> dict[str, float]:
        """``gpu_tools.times`` of the artifact's plan. Raises ``ToolFailed``."""
        with self._alone():
            return times(self._replayed(artifact))

    def _sanitized(self, artifact: Artifact, check: str) -> tuple[str, str]:
        """What a check finds, and what it did not look at, if anything. Raises ``ToolFailed``."""
        replayed = self._replayed(artifact)
        with self._alone():
            try:
                return sanitized(replayed, check), ""
            except TooSlow as failure:
                found = sanitized(replace(replayed, blocks=PART_BLOCKS), check)
                return (
                    found,
                    f"{check} looked at {PART_BLOCKS} blocks of every launch, no more: {failure} for all",
                )

    def _counted(self, evaluation: Evaluation, artifact: Artifact) -> Evaluation:
        """With the device's counters, and what they say limits the kernel. Raises ``ToolFailed``."""
        with self._alone():
            begin = time.perf_counter()
            try:
                found = counters(self._replayed(artifact))
            except ToolFailed as failure:
                self._refused = not isinstance(failure, TooSlow)  # which is said of that plan alone
                raise
            finally:
                self._spent_s += time.perf_counter() - begin
        profile = replace(evaluation.profile, counters=counted(found))
        return evaluation.replace(profile=profile, limiter=limiter_by_counters(profile, evaluation.limiter))

"""The observation as one vector, its named parts, and what the profile says limits a kernel."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

from ke_gym.search.observation import LAYOUT, PROFILE, SPACES_VERSION
from ke_gym.strategies import ACTIONS

__all__ = ["LAYOUT", "PROFILE", "SIZE", "SPACES_VERSION", "irrelevance", "part", "pressures", "vector"]

SIZE = sum(LAYOUT.values())
_START = dict(zip(LAYOUT, np.cumsum([0, *LAYOUT.values()]).tolist()))

Observation = Mapping[str, NDArray[np.float32]] | NDArray[np.float32]

PRESSURES = ("compute", "dram", "l2", "l1")
BUSY = 0.5


def vector(observation: Observation) -> NDArray[np.float64]:
    """All parts in the order of ``LAYOUT``, shape (132,); a flat observation is taken as it is."""
    if not isinstance(observation, Mapping):
        return np.asarray(observation, dtype=np.float64)
    return np.concatenate([observation[name] for name in LAYOUT], dtype=np.float64)


def part(observation: Observation, name: str) -> NDArray[np.float64]:
    """One named part, from a mapping or from the flat vector."""
    if isinstance(observation, Mapping):
        return np.asarray(observation[name], dtype=np.float64)
    return np.asarray(observation[_START[name] : _START[name] + LAYOUT[name]], dtype=np.float64)


def pressures(observation: Observation) -> dict[str, float] | None:
    """Utilization in [0, 1] of compute, DRAM, L2 and L1; None without a profile."""
    profile = dict(zip(PROFILE, part(observation, "profile").tolist()))
    if profile["has_profile"] <= 0:
        return None
    return {resource: profile[resource] for resource in PRESSURES}


def irrelevance(observation: Observation) -> NDArray[np.float64]:
    """Shape (25,): 1 for strategies that relieve what does not limit the parent, fading with the budget.

    The busiest resource limits; if none is half busy, waiting does (latency, occupancy, parallelism). All 0
    without a profile, and from the middle of the budget on: hard or lasting masks hurt long searches.
    """
    result = np.zeros(len(ACTIONS))
    busy = pressures(observation)
    fade = max(0.0, 2.0 * float(part(observation, "history")[0]) - 1.0)
    if busy is None or fade == 0.0:
        return result
    top = max(busy, key=lambda resource: busy[resource])
    limits = (
        {top, "all"} if busy[top] >= BUSY else {"latency", "occupancy", "parallelism", "registers", "all"}
    )
    for action in ACTIONS:
        if not action.control and action.resource not in limits:
            result[action.id] = fade
    return result

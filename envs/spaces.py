"""The spaces both environments share, and the flat form of an observation."""

from __future__ import annotations

from typing import Any

import numpy as np
from gymnasium import spaces

from ke_gym.search.observation import LAYOUT, SPACES_VERSION, flatten
from ke_gym.strategies import ACTIONS, STRATEGIES

__all__ = ["ACTION_COUNT", "EXTENDED_COUNT", "LAYOUT", "PARENT_SLOTS", "SIZE", "SPACES_VERSION", "flatten"]

SIZE = sum(LAYOUT.values())
ACTION_COUNT = len(ACTIONS)
PARENT_SLOTS = 4
"""Parents an extended action can choose from: the rule's own, then the fastest others."""
CONTROLS = ACTION_COUNT - len(STRATEGIES)
EXTENDED_COUNT = PARENT_SLOTS * len(STRATEGIES) + CONTROLS


def observation_space() -> spaces.Space[Any]:
    """A flat ``Dict`` of the parts in ``LAYOUT``: float32 boxes in [-1, 1]."""
    return spaces.Dict({name: spaces.Box(-1.0, 1.0, (size,), np.float32) for name, size in LAYOUT.items()})


def flat_space() -> spaces.Space[Any]:
    """The same as one box of 132 values, for linear policies and ``MlpPolicy``."""
    return spaces.Box(-1.0, 1.0, (SIZE,), np.float32)


def action_space(extended: bool = False) -> spaces.Discrete:
    """``Discrete(25)``, or with ``extended`` one edit per parent slot, then the controls: ``Discrete(91)``."""
    return spaces.Discrete(EXTENDED_COUNT if extended else ACTION_COUNT)


def split(action: int, extended: bool) -> tuple[int, int]:
    """(parent slot, action of the plain space); the plain space and all controls have slot 0."""
    edits = PARENT_SLOTS * len(STRATEGIES)
    if not extended:
        return 0, action
    if action >= edits:
        return 0, len(STRATEGIES) + action - edits
    return action // len(STRATEGIES), action % len(STRATEGIES)

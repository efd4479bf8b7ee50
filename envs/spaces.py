"""The spaces both environments share, and the flat form of an observation."""

from __future__ import annotations

from typing import Any

import numpy as np
from gymnasium import spaces

from ke_gym.proposers.base import EDIT_MODES, EditMode
from ke_gym.search.observation import LAYOUT, SPACES_VERSION, flatten
from ke_gym.strategies import ACTIONS, STRATEGIES

__all__ = ["ACTION_COUNT", "LAYOUT", "PARENT_SLOTS", "SIZE", "SPACES_VERSION", "flatten"]

SIZE = sum(LAYOUT.values())
ACTION_COUNT = len(ACTIONS)
PARENT_SLOTS = 4
"""Parents an extended action can choose from: the rule's own, then the fastest others."""
CONTROLS = ACTION_COUNT - len(STRATEGIES)


def observation_space() -> spaces.Space[Any]:
    """A flat ``Dict`` of the parts in ``LAYOUT``: float32 boxes in [-1, 1]."""
    return spaces.Dict({name: spaces.Box(-1.0, 1.0, (size,), np.float32) for name, size in LAYOUT.items()})


def flat_space() -> spaces.Space[Any]:
    """The same as one box of 132 values, for linear policies and ``MlpPolicy``."""
    return spaces.Box(-1.0, 1.0, (SIZE,), np.float32)


def forms(extended: bool = False, edits: bool = False) -> int:
    """In how many ways each strategy can be asked for."""
    return (PARENT_SLOTS if extended else 1) * (len(EDIT_MODES) if edits else 1)


def action_space(extended: bool = False, edits: bool = False) -> spaces.Discrete:
    """``Discrete(25)``: the strategies, then the controls. Every strategy once per parent slot with ``extended``
    (``Discrete(91)``), once per form of a model's answer with ``edits`` (47), or both (179)."""
    return spaces.Discrete(forms(extended, edits) * len(STRATEGIES) + CONTROLS)


def split(action: int, extended: bool, edits: bool = False) -> tuple[int, int, EditMode | None]:
    """(parent slot, action of the plain space, form of the answer); controls have slot 0 and no form."""
    block, strategy = divmod(action, len(STRATEGIES))
    if block >= forms(extended, edits):
        return 0, action - (forms(extended, edits) - 1) * len(STRATEGIES), None
    if not edits:
        return block, strategy, None
    slot, form = divmod(block, len(EDIT_MODES))
    return slot, strategy, EDIT_MODES[form]

"""Extended actions of N episodes at once: parent slot and strategy, as ``Walk.slots`` has them for one."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from ke_gym.envs.prepared import N_STRATEGIES, PLAIN
from ke_gym.envs.spaces import PARENT_SLOTS

Indices = NDArray[np.int64]
Flags = NDArray[np.bool_]


class Slots:
    """The parents to choose from, of ``n`` episodes with ``size`` places each: the rule's own, then the fastest others."""

    def __init__(self, n: int, size: int) -> None:
        self.chosen = np.zeros((PARENT_SLOTS, n), np.int64)
        """The place of the version in each slot; 0 where there is none."""
        self._by_place = np.arange(n) * size
        self._values = np.full((n, size), -np.inf)
        """Log-speedups of the correct versions."""

    def begin(self, which: Indices) -> None:
        """New episodes have no versions."""
        self._values[which] = -np.inf

    def add(self, made: Indices, value: NDArray[np.float64], correct: Flags) -> None:
        """What was made at these places (of all episodes together), one an episode."""
        self._values.reshape(-1)[made] = np.where(correct, value, -np.inf)

    def settle(self, parent: Indices, left: Indices, controls: Flags) -> Flags:
        """Fill the slots; returns the legal actions, shape (n, 88 + columns of ``controls``).

        ``parent`` is the rule's own, shape (n,); ``left`` the actions left at every place, as bits; ``controls`` says
        which of FIX, RESTART and STOP are legal.
        """
        everyone = np.arange(len(parent))
        others = self._values.copy()
        others[everyone, parent] = -np.inf
        self.chosen[0] = parent
        for slot in range(1, PARENT_SLOTS):
            fastest = others.argmax(axis=1)  # the first told among equals
            self.chosen[slot] = np.where(others[everyone, fastest] > -np.inf, fastest, 0)
            others[everyone, fastest] = -np.inf
        bits = left.take(self._by_place + self.chosen) & PLAIN
        strategies = np.unpackbits(bits.T.astype("<u4")[..., None].view(np.uint8), axis=2, bitorder="little")
        blocks = strategies[..., :N_STRATEGIES].reshape(len(parent), -1).view(np.bool_)
        return np.concatenate([blocks, controls], axis=1)

    def split(self, actions: Indices) -> tuple[Indices, Indices]:
        """The plain action of each extended one, and the parent that it chooses."""
        controls = actions >= PARENT_SLOTS * N_STRATEGIES
        slot, strategy = np.divmod(actions, N_STRATEGIES)
        plain = np.where(controls, actions - (PARENT_SLOTS - 1) * N_STRATEGIES, strategy)
        return plain, self.chosen[np.where(controls, 0, slot), np.arange(len(actions))]

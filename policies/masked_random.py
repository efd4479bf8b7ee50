"""Masked random: a uniformly drawn legal action. The other baseline every policy has to beat."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from ke_gym.policies.base import Observation, Policy, transformations


class MaskedRandom(Policy):
    """Uniform over the legal actions except STOP; never gives up its budget early."""

    name = "masked_random"

    def choose(self, observation: Observation, mask: NDArray[np.bool_], deterministic: bool) -> int:
        return int(self.rng.choice(transformations(mask)))

"""Best-of-N: independent drafts, no strategy named. One of the two baselines every policy has to beat."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from ke_gym.policies.base import Observation, Policy, transformations
from ke_gym.strategies import RESTART


class BestOfN(Policy):
    """Draws a fresh draft each time (Kapoor et al., arXiv 2602.16805, argue for this baseline)."""

    name = "best_of_n"
    parent_rule = "root"

    def choose(self, observation: Observation, mask: NDArray[np.bool_], deterministic: bool) -> int:
        return RESTART.id if mask[RESTART.id] else int(transformations(mask)[0])

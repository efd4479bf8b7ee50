"""An ensemble of boosted trees that predicts gains, sampled as in Thompson sampling (Ansor-style model)."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from ke_gym.errors import UserError
from ke_gym.policies.bandit import Scores, ScoringPolicy
from ke_gym.policies.base import Observation, forced
from ke_gym.policies.features import SIZE, vector
from ke_gym.search.run import Transition
from ke_gym.strategies import ACTIONS, FAMILIES

MEMBERS = 4
MEMORY = 4096  # latest steps that are fitted
ENOUGH = 12  # steps before the first fit
GROWTH = 1.5  # refit when the data has grown by this factor
_FAMILY = np.array([[float(a.family == family) for family in FAMILIES] for a in ACTIONS])
_ACTION = np.hstack([np.eye(len(ACTIONS)), _FAMILY])


class BoostedTrees(ScoringPolicy):
    """Each member is fitted on a bootstrap sample of (observation, action) -> gain; a random one decides.

    The file holds the data, not the trees: loading fits them again, exactly, and nothing has to be unpickled.
    """

    name = "boosted_trees"
    learned = ("inputs", "gains", "fitted")

    def __init__(self, seed: int = 0) -> None:
        super().__init__(seed)
        self.inputs = np.zeros((0, SIZE + 1))
        """Observations, and the action in the last column."""
        self.gains = np.zeros(0)
        self.fitted = 0
        """How many of the steps, from the first, the trees were fitted on."""
        self.members: list[Any] = []
        _regressor()

    def scores(self, observation: Observation, mask: NDArray[np.bool_], deterministic: bool) -> Scores:
        scores = np.zeros(len(ACTIONS))
        if not self.members:
            return scores
        legal = np.flatnonzero(mask)
        x = vector(observation)
        rows = _rows(np.hstack([np.tile(x, (len(legal), 1)), legal[:, None]]))
        members = self.members if deterministic else [self.members[self.rng.integers(MEMBERS)]]
        scores[legal] = np.mean([member.predict(rows) for member in members], axis=0)
        return scores

    def update(self, transition: Transition) -> None:
        if forced(transition):
            return
        row = np.append(vector(transition.observation), float(transition.action))
        self.inputs = np.vstack([self.inputs, row])
        self.gains = np.append(self.gains, transition.reward)
        if len(self.gains) >= max(ENOUGH, GROWTH * self.fitted):
            # Forget only here: what the trees were fitted on has to stay, so that a file can hold it.
            self.inputs, self.gains = self.inputs[-MEMORY:], self.gains[-MEMORY:]
            self.fitted = len(self.gains)
            self._fit()

    def _fit(self) -> None:
        rows = self.fitted
        inputs, gains = _rows(self.inputs[:rows]), self.gains[:rows]
        self.members = []
        for member in range(MEMBERS):
            sample = np.random.default_rng((member, rows)).integers(0, rows, rows)
            model = _regressor()(n_estimators=30, max_features=0.3, random_state=member)
            self.members.append(model.fit(inputs[sample], gains[sample]))

    def load_state_dict(self, state: dict[str, Any]) -> None:
        super().load_state_dict(state)
        if self.fitted:
            self._fit()


def _rows(inputs: NDArray[np.float64]) -> NDArray[np.float64]:
    return np.hstack([inputs[:, :SIZE], _ACTION[inputs[:, SIZE].astype(np.int64)]])


def _regressor() -> Any:
    try:
        from sklearn.ensemble import GradientBoostingRegressor
    except ImportError as error:
        raise UserError("the policy boosted_trees needs scikit-learn: pip install 'ke-gym[trees]'") from error
    return GradientBoostingRegressor

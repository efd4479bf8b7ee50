"""Islands with MAP-Elites archives (AlphaEvolve, arXiv 2506.13131; KernelFoundry, arXiv 2603.12440).

The archive is ribs' ``GridArchive``; its emitters want vectors to perturb, so only the archive is used.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from ke_gym.errors import UserError
from ke_gym.policies.base import Observation, Policy, transformations
from ke_gym.policies.features import part
from ke_gym.search.run import Transition
from ke_gym.strategies import ACTIONS, FAMILIES, RESTART

ISLANDS = 5
EXPLORE, EXPLOIT = 0.2, 0.7  # OpenEvolve's defaults; the rest is uniform
MIGRATION = 10  # steps between two migrations
LEVELS = ("registers", "compute", "l1", "l2", "dram", "latency", "occupancy", "parallelism", "all")
SIZES = 8  # cells of log lines of code
_CELL = {a.id: (FAMILIES.index(a.family), LEVELS.index(a.resource)) for a in ACTIONS if not a.control}


class IslandsMapElites(Policy):
    """Archives of elites by family, memory level and log lines of code; one archive per island.

    The cell of a kernel: the family and the resource of the strategy that made it, and its size; its
    objective is the gain. Islands take turns. A step explores (a strategy whose cells are still empty),
    exploits (the strategy of an elite that gained, better ones more often) or draws uniformly; every ``MIGRATION`` steps
    an island's best elite is copied to the next one. The parent rule ``elites`` chooses among the best kernels
    of each family.
    """

    name = "islands_map_elites"
    parent_rule = "elites"
    learned = ("step",)

    def __init__(self, seed: int = 0) -> None:
        super().__init__(seed)
        self.begin()

    def begin(self) -> None:
        self.step = 0
        self.islands = [_archive() for _ in range(ISLANDS)]

    def choose(self, observation: Observation, mask: NDArray[np.bool_], deterministic: bool) -> int:
        legal = transformations(mask)
        strategies: list[int] = [a for a in legal.tolist() if a in _CELL]
        if not strategies:
            return int(legal[0])
        if mask[RESTART.id] and self.step < ISLANDS:
            return RESTART.id
        island = self.islands[self.step % ISLANDS]
        data = island.data(["solution", "objective"], return_type="dict")
        elites = {int(s[0]): float(o) for s, o in zip(data["solution"], data["objective"])}
        known = sorted((a for a in strategies if elites.get(a, 0.0) > 0), key=lambda a: -elites[a])
        taken = {_CELL[a] for a in elites}
        empty = [a for a in strategies if _CELL[a] not in taken]
        draw = EXPLORE if deterministic else self.rng.random()
        if known and EXPLORE <= draw < EXPLORE + EXPLOIT:
            # Linear ranking: the best of n elites is n times as likely as the last.
            ranks = np.arange(len(known), 0, -1, dtype=np.float64)
            pick = 0 if deterministic else int(self.rng.choice(len(known), p=ranks / ranks.sum()))
            return int(known[pick])
        pool = empty if empty and draw < EXPLORE + EXPLOIT else strategies
        return int(pool[0] if deterministic else self.rng.choice(pool))

    def update(self, transition: Transition) -> None:
        island = self.step % ISLANDS
        if transition.action in _CELL:
            family, level = _CELL[transition.action]
            lines = float(np.clip(part(transition.next_observation, "code")[0], 0.0, 1.0))
            self._add(island, [transition.action], transition.reward, [family, level, lines])
        self.step += 1
        if self.step % MIGRATION == 0:
            best = self.islands[island].best_elite
            if best is not None:
                to = (island + 1) % ISLANDS
                self._add(to, best["solution"], best["objective"], best["measures"])

    def _add(self, island: int, solution: Any, objective: float, measures: Any) -> None:
        self.islands[island].add_single(solution, objective, measures)

    def state_dict(self) -> dict[str, Any]:
        fields = ["solution", "objective", "measures"]
        archives = [island.data(fields, return_type="dict") for island in self.islands]
        return super().state_dict() | {
            "archives": [{name: np.asarray(data[name]) for name in fields} for data in archives]
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        super().load_state_dict(state)
        self.islands = [_archive() for _ in range(ISLANDS)]
        for island, data in enumerate(state["archives"]):
            for solution, objective, measures in zip(data["solution"], data["objective"], data["measures"]):
                self._add(island, solution, float(objective), measures)


def _archive() -> Any:
    try:
        from ribs.archives import GridArchive
    except ImportError as error:
        raise UserError("the policy islands_map_elites needs ribs: pip install 'ke-gym[qd]'") from error
    dims = (len(FAMILIES), len(LEVELS), SIZES)
    ranges = [(-0.5, len(FAMILIES) - 0.5), (-0.5, len(LEVELS) - 0.5), (0.0, 1.0 + 1e-6)]
    return GridArchive(solution_dim=1, dims=dims, ranges=ranges, dtype=np.float64)

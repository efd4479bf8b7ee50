"""The replayed environment: recorded searches, microseconds a step."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, ClassVar, Literal, SupportsInt

import gymnasium
import numpy as np
from gymnasium.utils import EzPickle
from numpy.typing import NDArray

from ke_gym.envs import catalog, render, spaces
from ke_gym.envs.catalog import TableSpec
from ke_gym.envs.episode import Rules
from ke_gym.envs.prepared import prepared_of
from ke_gym.envs.table import Table
from ke_gym.envs.walk import Walk
from ke_gym.errors import UserError
from ke_gym.search import parents
from ke_gym.search.observation import Observation
from ke_gym.search.reward import Kind

ILLEGAL = -1
Noise = Literal["sample", "verdict"]
EPISODES = 32
"""Episodes whose random numbers are drawn at once."""


def check_noise(noise: str) -> None:
    """``UserError`` for a kind of noise that there is not."""
    if noise not in ("sample", "verdict"):
        raise UserError(f"noise {noise!r} is unknown; choose sample (a recorded repeat) or verdict (none)")


def pick(tables: Sequence[Table], options: dict[str, Any] | None, uniform: float) -> int:
    """The number of the table that ``options["task"]`` names, or of one at random."""
    if not options:
        return int(uniform * len(tables))
    for name in options.keys() - {"task"}:
        raise UserError(f"reset knows no option {name!r}; it takes 'task'")
    for i, table in enumerate(tables):
        if table.task == options["task"]:
            return i
    names = ", ".join(table.task for table in tables)
    raise UserError(f"this environment has no table of {options['task']!r}; it has {names}")


class KernelOptReplayEnv(gymnasium.Env[Observation, Any], EzPickle):
    """Optimize one kernel, one strategy at a time, over recorded searches.

    ## Description
    ``ke_gym/KernelOpt-v0`` with recorded answers. A table holds versions of one task's kernel, what every strategy
    made of which, and all times that were measured. Actions that were never recorded are masked, never guessed. The
    observation is the one that the live environment shows after the same history; only where a parent has no
    recorded strategy left does the replay go on with the fastest version that has one, as a live search does when
    nothing applies any more. Deterministic under its seed.

    ## Action Space
    ``Discrete(25)``: the 22 strategies of ``ke_gym.strategies``, FIX, RESTART and STOP. ``action_masks()`` and
    ``info["action_mask"]`` say what is recorded; STOP always is legal. An illegal action is a no-op that costs a step
    and 0.05. With ``extended=True`` ``Discrete(91)``: parent slot and strategy (the rule's own parent, then the three
    fastest others), then the controls.

    ## Observation Space
    A flat ``Dict`` of six float32 boxes in [-1, 1], 132 values in all, named in ``ke_gym.search.observation``:
    task (16), hardware (12), code (14) and profile (12) of the parent, history (12), strategies (66).

    ## Starting State
    No candidate; the reference is the parent, and only RESTART (a first draft) and STOP are legal.

    ## Rewards
    As live: ``best`` (default), ``parent``, ``dense`` or ``milestone``. A version becomes the best as a remembered one does live:
    if its recorded race was against the present best, that race decides; else its whole interval has to lie above.

    ## Episode End
    Terminated by STOP; truncated after ``horizon`` steps.

    ## Information
    ``action_mask`` (int8), ``task``, ``outcome`` (of the evaluation, or ``illegal``, ``refused``, ``stop``),
    ``candidate`` (id), ``source``, ``speedup`` and ``speedup_ci`` as drawn (0 where nothing was measured),
    ``best_speedup``, ``cost_s`` (recorded seconds of this evaluation), ``clock_s`` (of the episode so far),
    ``dollars``, ``evaluations``, ``reason``.

    ## Arguments
    - ``tables``: ``"all"`` that ship, a split (``"train"``, ``"validation"``, ``"test"``), a family, a task, a file
      or folder of ``scripts/record.py``, or a list of these; every episode draws one, and
      ``reset(options={"task": ...})`` chooses.
    - ``horizon``: steps of an episode. ``reward``: ``best``, ``parent``, ``dense`` or ``milestone``.
    - ``parent_rule``: a name from ``ke_gym.search.parents``; ``best`` and ``root`` are fast.
    - ``extended``: the agent chooses the parent too.
    - ``noise``: ``sample`` draws one of the recorded repeats at every evaluation, ``verdict`` takes the verdict.
    - ``render_mode``: ``ansi`` (tree and best kernel) or ``rgb_array`` (speedup curve).

    ## Version History
    - v0: first version.
    """

    metadata: ClassVar[dict[str, Any]] = {"render_modes": ["ansi", "rgb_array"], "render_fps": 30}  # type: ignore[misc]

    def __init__(
        self,
        tables: TableSpec | Sequence[TableSpec] = "all",
        *,
        horizon: int = 20,
        reward: Kind = "best",
        parent_rule: str = "best",
        extended: bool = False,
        noise: Noise = "sample",
        render_mode: str | None = None,
    ) -> None:
        EzPickle.__init__(
            self, tables, horizon=horizon, reward=reward, parent_rule=parent_rule, extended=extended, noise=noise,
            render_mode=render_mode,
        )  # fmt: skip
        if render_mode is not None and render_mode not in self.metadata["render_modes"]:
            raise UserError(f"render mode {render_mode!r} is unknown; choose ansi or rgb_array")
        parents.get(parent_rule)
        check_noise(noise)
        self.tables = catalog.load(tables)
        self.rules = Rules(horizon, reward, parent_rule, extended)
        self.noise = noise
        self.render_mode = render_mode
        self.observation_space = spaces.observation_space()
        self.action_space = spaces.action_space(extended)
        self.walk: Walk | None = None
        self._wide = int(self.action_space.n) if extended else 0
        """The number of extended actions; 0 unless extended."""
        self._uniforms: list[list[float]] = []

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[Observation, dict[str, Any]]:
        """Begin a search; ``options={"task": name}`` chooses the table."""
        super().reset(seed=seed)
        horizon = self.rules.horizon
        if seed is not None or not self._uniforms:
            self._uniforms = self.np_random.random((EPISODES, horizon + 2))[::-1].tolist()
        first, second, *uniforms = self._uniforms.pop()
        number = pick(self.tables, options, first)
        self.walk = Walk(
            prepared_of(self.tables[number]), horizon, self.rules.reward, self.rules.parent_rule,
            uniforms if self.noise == "sample" else None, int(second * 2**31),
        )  # fmt: skip
        info = self.walk.info()
        if self._wide:
            info["action_mask"] = self.walk.extended_mask()
        return self.walk.observation(), info

    def step(self, action: SupportsInt) -> tuple[Observation, float, bool, bool, dict[str, Any]]:
        """One strategy: look up what it made, and what that was measured to be."""
        walk = self.walk or self._running()
        spent = walk.spent_dollars
        paid = self._extended(walk, int(action)) if self._wide else walk.step(int(action))
        info = walk.info()
        if self._wide:
            info["action_mask"] = walk.extended_mask()
        if walk.spent_dollars > spent:
            info["dollars"] = walk.spent_dollars - spent
        stopped = walk.stopped
        return walk.observation(), paid, stopped, not stopped and walk.steps >= walk.horizon, info

    def _extended(self, walk: Walk, action: int) -> float:
        if not 0 <= action < self._wide:
            return walk.step(ILLEGAL)
        slot, plain, _ = spaces.split(action, extended=True)
        if not slot:
            return walk.step(plain)
        slots = walk.slots()
        return walk.step(plain, slots[slot]) if slot < len(slots) else walk.step(ILLEGAL)

    def action_masks(self) -> NDArray[np.bool_]:
        """The recorded actions now: bool, shape (25,), or (91,) if extended."""
        walk = self._running()
        mask: NDArray[np.bool_] = (walk.extended_mask() if self._wide else walk.mask()).view(np.bool_)
        return mask

    def oracle(self) -> float:
        """The best speedup in the episode's table. Uncharged: for regret, never for a policy."""
        return self._running().prepared.oracle

    def verdict(self) -> float:
        """The speedup of the best version so far by its verdict, not by the repeat that was drawn; at least 1.

        The best of several noisy draws flatters itself, so this is what comparisons report. Uncharged, like the
        oracle.
        """
        walk = self._running()
        return max(math.exp(walk.prepared.values[walk.best]), 1.0) if walk.best >= 0 else 1.0

    def _running(self) -> Walk:
        if self.walk is None:
            raise gymnasium.error.ResetNeeded("call reset() before the first step")
        return self.walk

    def render(self) -> Any:
        """The episode so far, as ``render_mode`` says: text, or an RGB picture."""
        if self.render_mode is None:
            gymnasium.logger.warn(
                "render() needs a render_mode: make(..., render_mode='ansi' or 'rgb_array')"
            )
            return None
        walk = self._running()
        tree, task = walk.tree(), walk.prepared.table.task
        if self.render_mode == "ansi":
            return render.ansi(tree, task, walk.steps, walk.horizon)
        return render.rgb_array(tree, task, walk.horizon)

"""The live environment: every step proposes, proves and measures a kernel."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, ClassVar, SupportsInt

import gymnasium
import numpy as np
from gymnasium.utils import EzPickle
from numpy.typing import NDArray

from ke_gym import tasks as library
from ke_gym.envs import render, spaces
from ke_gym.envs.episode import Episode, Rules
from ke_gym.envs.pool import EvaluationPool, LostEvaluation, OpenEvaluator
from ke_gym.errors import UserError
from ke_gym.proposers.base import Proposer
from ke_gym.search import parents
from ke_gym.search.observation import Observation
from ke_gym.search.reward import Kind
from ke_gym.search.session import Ask
from ke_gym.tasks import Task

TaskSpec = str | Path | Task


def resolve(specs: TaskSpec | Sequence[TaskSpec]) -> list[Task]:
    """The tasks of one specification or several; ``UserError`` for an unknown one, or none at all."""
    listed = [specs] if isinstance(specs, (str, Path, Task)) else list(specs)
    found = [
        task for spec in listed for task in ([spec] if isinstance(spec, Task) else library.resolve(spec))
    ]
    if not found:
        raise UserError("an environment needs at least one task")
    return found


def sample(tasks: Sequence[Task], options: dict[str, Any] | None, rng: np.random.Generator) -> Task:
    """The task that ``options["task"]`` names, or one of ``tasks`` at random."""
    options = options or {}
    for name in options.keys() - {"task"}:
        raise UserError(f"reset knows no option {name!r}; it takes 'task'")
    if "task" not in options:
        return tasks[int(rng.integers(len(tasks)))]
    chosen = resolve(options["task"])
    if len(chosen) > 1:
        raise UserError(f"{options['task']!r} names {len(chosen)} tasks; an episode is about one")
    return chosen[0]


class KernelOptEnv(gymnasium.Env[Observation, Any], EzPickle):
    """Optimize one kernel, one strategy at a time, with measured speedups.

    ## Description
    An episode is a search over versions of one task's kernel. An action names a strategy; the proposer applies
    it to the present parent; the evaluation compiles the result, proves it against the reference and races it
    against the best so far. Times are measured, so the environment is not deterministic.

    ## Action Space
    ``Discrete(25)``: the 22 strategies of ``ke_gym.strategies``, FIX (repair the parent's latest failure),
    RESTART (a fresh draft) and STOP. ``action_masks()`` and ``info["action_mask"]`` say what is legal; STOP
    always is. An illegal action is a no-op that costs a step and 0.05.
    With ``extended`` also the parent is chosen: ``Discrete(91)``, action ``22 * slot + strategy`` for the
    rule's parent (slot 0) and the three fastest others, then FIX, RESTART and STOP. With ``edits`` also the form
    of a language model's answer: every strategy first as edits, then as a whole module (``Discrete(47)``; with
    ``extended`` 179, slot by slot).

    ## Observation Space
    A flat ``Dict`` of six float32 boxes in [-1, 1], 132 values in all, named in ``ke_gym.search.observation``:
    task (16), hardware (12), code (14) and profile (12) of the parent, history (12), strategies (66).

    ## Starting State
    No candidate; the reference is the parent, and only RESTART (a first draft) and STOP are legal.

    ## Rewards
    ``best`` (default): the clipped log-gain of a verified new best, which sums to the final log-speedup.
    ``parent``: the clipped log-gain over the parent, of a fresh draft over the best so far. ``dense``: ``best`` and a
    fifth of ``parent``. ``milestone``: -1 wrong, 1 correct, 2 beyond 5 % faster,
    3 and a new best. All but the last charge 0.05 for what does not compile, 0.10 for what fails otherwise and
    0.05 for what is refused or illegal, a model's unusable answer included. A lost evaluation and an endpoint
    that failed are worth 0.

    ## Episode End
    Terminated by STOP; truncated after ``horizon`` steps.

    ## Information
    ``action_mask`` (int8), ``task``, ``outcome`` (of the evaluation, or ``illegal``, ``refused``, ``stop``,
    ``lost``, or why a model's answer was no candidate: ``truncated``, ``prose``, …), ``candidate`` (id),
    ``source``, ``speedup`` and ``speedup_ci`` over the baseline (0 where nothing was measured; the interval is
    (0, 0) also where a slow candidate left its race before there was one),
    ``best_speedup``, ``cost_s``, ``dollars``, ``evaluations``, ``reason``.

    ## Arguments
    - ``tasks``: a task, a suite or family name, a file, or a list of them, sampled anew every episode;
      ``reset(options={"task": ...})`` chooses.
    - ``proposer``, ``target``, ``baseline``, ``threads``: who proposes and where it is measured. ``language``: what
      kernels for a GPU are generated in, ``triton`` or ``cuda``.
    - ``horizon``: steps of an episode. ``reward``: ``best``, ``parent``, ``dense`` or ``milestone``.
    - ``parent_rule``: a name from ``ke_gym.search.parents``. ``extended``, ``edits``: see
      Action Space.
    - ``store``: a file in which evaluations are kept; otherwise they are remembered while the environment lives.
    - ``open_evaluator``: opens another kind of evaluator for a task.
    - ``render_mode``: ``ansi`` (tree and best kernel) or ``rgb_array`` (speedup curve).

    ## Version History
    - v0: first version.
    """

    metadata: ClassVar[dict[str, Any]] = {"render_modes": ["ansi", "rgb_array"], "render_fps": 1}  # type: ignore[misc]

    def __init__(
        self,
        tasks: TaskSpec | Sequence[TaskSpec] = "softmax",
        *,
        proposer: str | Callable[[Task], Proposer] = "rewriter",
        target: str = "cpu",
        baseline: str = "eager",
        threads: int | None = None,
        horizon: int = 20,
        reward: Kind = "best",
        parent_rule: str = "best",
        extended: bool = False,
        edits: bool = False,
        store: str | Path | None = None,
        open_evaluator: OpenEvaluator | None = None,
        render_mode: str | None = None,
        language: str = "",
    ) -> None:
        EzPickle.__init__(
            self, tasks, proposer=proposer, target=target, baseline=baseline, threads=threads, horizon=horizon,
            reward=reward, parent_rule=parent_rule, extended=extended, edits=edits, store=store,
            open_evaluator=open_evaluator, render_mode=render_mode, language=language,
        )  # fmt: skip
        if render_mode is not None and render_mode not in self.metadata["render_modes"]:
            raise UserError(f"render mode {render_mode!r} is unknown; choose ansi or rgb_array")
        parents.get(parent_rule)
        self.tasks = resolve(tasks)
        self.rules = Rules(horizon, reward, parent_rule, extended, edits)
        self.render_mode = render_mode
        self.observation_space = spaces.observation_space()
        self.action_space = spaces.action_space(extended, edits)
        self.episode: Episode | None = None
        self._pool: EvaluationPool | None = None
        self._pool_arguments: dict[str, Any] = {
            "target": target, "baseline": baseline, "threads": threads, "proposer": proposer, "store": store,
            "open_evaluator": open_evaluator, "language": language,
        }  # fmt: skip

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[Observation, dict[str, Any]]:
        """Begin a search; ``options={"task": name}`` chooses the task. ``UserError`` for one that cannot be."""
        super().reset(seed=seed)
        task = sample(self.tasks, options, self.np_random)
        search_seed = int(self.np_random.integers(2**31))
        if self._pool is None:
            self._pool = EvaluationPool(workers=1, **self._pool_arguments)
        self.episode = Episode(self._pool.case(task), self.rules, self._pool.store, search_seed)
        return self.episode.observation(), self.episode.info()

    def step(self, action: SupportsInt) -> tuple[Observation, float, bool, bool, dict[str, Any]]:
        """One strategy: propose, evaluate, reward. Seconds go by."""
        episode = self._running()
        asked = episode.begin(int(action))
        if not isinstance(asked, Ask):
            return asked
        assert self._pool is not None
        try:
            evaluation = self._pool.submit(episode.case, asked).result()
        except LostEvaluation as error:
            return episode.lost(str(error))
        return episode.finish(evaluation)

    def action_masks(self) -> NDArray[np.bool_]:
        """The legal actions now: bool, shape (25,), or that of the larger action space."""
        return self._running().mask()

    def _running(self) -> Episode:
        if self.episode is None:
            raise gymnasium.error.ResetNeeded("call reset() before the first step")
        return self.episode

    def render(self) -> Any:
        """The episode so far, as ``render_mode`` says: text, or an RGB picture."""
        if self.render_mode is None:
            gymnasium.logger.warn(
                "render() needs a render_mode: make(..., render_mode='ansi' or 'rgb_array')"
            )
            return None
        episode = self._running()
        tree, task = episode.session.tree, episode.case.task.name
        if self.render_mode == "ansi":
            return render.ansi(tree, task, episode.steps, self.rules.horizon)
        return render.rgb_array(tree, task, self.rules.horizon)

    def close(self) -> None:
        """Stop the evaluator's processes; harmless when repeated. ``reset`` starts them again."""
        self.episode = None
        if self._pool is not None:
            self._pool.close()
            self._pool = None

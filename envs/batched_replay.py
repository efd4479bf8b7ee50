"""N replayed episodes in lockstep, as arrays: a million steps a second without a process per environment."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from stable_baselines3.common.vec_env import VecEnv
from stable_baselines3.common.vec_env.base_vec_env import VecEnvObs, VecEnvStepReturn

from ke_gym.envs import catalog, spaces
from ke_gym.envs.bank import bank_of
from ke_gym.envs.catalog import TableSpec
from ke_gym.envs.episode import Rules
from ke_gym.envs.prepared import DESCRIBED, HISTORY, N_ACTIONS, N_STRATEGIES, PER_STRATEGY, SLICES
from ke_gym.envs.replay import EPISODES, Noise, check_noise, pick
from ke_gym.envs.walk import COMPILED, DULL, FAST_RULES
from ke_gym.errors import UserError
from ke_gym.search import reward
from ke_gym.search.observation import RECENT
from ke_gym.search.reward import Kind
from ke_gym.strategies import FIX, RESTART, STOP

Indices = NDArray[np.int64]
Flags = NDArray[np.bool_]
Values = NDArray[np.float64]
_LOG_10, _LOG_MILESTONE = math.log(10), math.log(reward.MILESTONE)
_KINDS = 4
_PARTS = tuple(SLICES.items())
_MARGIN = 3 * (N_ACTIONS - N_STRATEGIES)
"""Columns behind the observation, where statistics of the controls go, which nobody sees."""
_THREE = np.arange(3)


class BatchedReplayVecEnv(VecEnv):
    """``KernelOptReplayEnv`` N times as one of stable-baselines3's vector environments.

    Arguments are those of ``KernelOptReplayEnv``; parent rules are ``best`` and ``root``, and of several horizons
    each environment has one, in turn. Episodes begin anew by
    themselves; the last observation is then in ``info["terminal_observation"]``, beside ``task``, ``best_speedup``,
    ``evaluations``, ``clock_s`` and ``TimeLimit.truncated``. Other infos are empty. Episode i is the one that the
    single environment makes of seed + i.

    A step is the same hundred array operations for all episodes, whatever each of them does: one that evaluates nothing
    writes to places that nobody reads. State of a version in an episode lies at ``lane + version`` of flat arrays.
    """

    def __init__(
        self,
        n_envs: int,
        tables: TableSpec | Sequence[TableSpec] = "all",
        *,
        horizon: int | Sequence[int] = 20,
        reward: Kind = "best",
        parent_rule: str = "best",
        noise: Noise = "sample",
    ) -> None:
        if parent_rule not in FAST_RULES:
            raise UserError(
                f"batched replay knows the parent rules {' and '.join(FAST_RULES)}, not {parent_rule!r}"
            )
        check_noise(noise)
        self.render_mode = None
        self.tables = catalog.load(tables)
        self.bank = bank_of(tuple(self.tables))
        listed = (horizon,) if isinstance(horizon, int) else tuple(horizon)
        if not listed:
            raise UserError("a replay needs a horizon")
        self.rules = Rules(min(listed), reward, parent_rule)  # checks all three
        self.horizons = np.resize(np.array(listed, dtype=np.int64), n_envs)
        self.noise = noise
        super().__init__(n_envs, spaces.observation_space(), spaces.action_space())
        n, width, longest = n_envs, self.bank.width, max(listed)
        self._all = np.arange(n)
        self._rngs = [np.random.default_rng() for _ in range(n)]
        self._uniforms = np.zeros((n, EPISODES, longest + 2))
        self._episode = np.full(n, EPISODES)
        self._drawn = np.zeros((n, longest))
        self._actions = np.zeros(n, np.int64)
        # Where each episode's values begin in the flat arrays.
        self._lane, self._nowhere = self._all * width, self._all * width + width - 1
        self._by_step, self._by_action, self._by_kind, self._by_recent = (
            self._all * size for size in (longest, N_ACTIONS, _KINDS, RECENT)
        )
        self.table, self._offset, self._reference, self._parent, self._failed = (
            np.zeros(n, np.int64) for _ in range(5)
        )
        """``_failed``: the version that FIX would repair; -1 if there is none."""
        self._steps, self._evaluations, self._duplicates, self._drafts, self._covered = (
            np.zeros(n, np.int64) for _ in range(5)
        )
        self._best, self._best_at, self._open = (np.full(n, -1) for _ in range(3))
        """``_open``: the fastest visited version that has a recorded strategy left; -1 if none has."""
        self._best_value, self._best_depth, self.clock, self._last_outcome = (np.zeros(n) for _ in range(4))
        self._best_dull, self._drafts_left = np.zeros(n, np.bool_), np.zeros(n, np.bool_)
        """Whether the best became that by default, as the first correct version, and won nothing either."""
        self._recent = np.zeros(n * RECENT, np.int64)
        """Kinds of the latest evaluations, and how many there are of each."""
        self._kinds = np.zeros((n, _KINDS), np.int64)
        self._worked = np.zeros(n * N_ACTIONS, np.bool_)
        self._told = np.zeros((n, longest + 1), np.int64)
        """The versions of an episode, in order."""
        self._visited = np.zeros(n * width, np.bool_)
        self._state = np.zeros((n * width, 3))
        """Of every version visited: log-speedup as drawn, depth, first draft."""
        self._left = np.zeros(n * width, np.int64)
        """Strategies that can still be taken."""
        self._used = np.zeros((n * width, N_ACTIONS), np.int16)
        self._spent = np.zeros((n * width, N_STRATEGIES), np.bool_)
        self._fixable = np.full(n * width, -1)
        """The failed version that FIX would repair, for each parent; -1 where none is recorded."""
        self._broken: list[dict[int, list[tuple[int, int]]]] = [{} for _ in range(n)]
        self._stats = np.zeros((n * N_ACTIONS, 4))
        """Tries, failures, sums and counts of gains."""
        self._mask = np.zeros((n, N_ACTIONS), np.bool_)
        self._mask[:, STOP.id] = True
        self._flat = np.zeros((n, spaces.SIZE + _MARGIN), np.float32)
        self._columns = (self._all * self._flat.shape[1] + PER_STRATEGY)[:, None] + _THREE

    # Episodes ---------------------------------------------------------------------------------------------

    def reset(self) -> VecEnvObs:
        """Begin all episodes, with the seeds and options set by ``seed`` and ``set_options``."""
        for i, seed in enumerate(self._seeds):
            if seed is not None:
                self._rngs[i] = np.random.default_rng(seed)
                self._episode[i] = EPISODES
        self._begin(self._all, self._options)
        self._settle()
        self.reset_infos = [{} for _ in range(self.num_envs)]
        self._reset_seeds()
        self._reset_options()
        return self._observation()

    def _begin(self, which: Indices, options: Sequence[dict[str, Any]] = ()) -> None:
        bank = self.bank
        for i in which[self._episode[which] >= EPISODES].tolist():
            size = int(self.horizons[i]) + 2
            self._uniforms[i, :, :size] = self._rngs[i].random((EPISODES, size))
            self._episode[i] = 0
        uniforms = self._uniforms[which, self._episode[which]]
        self._episode[which] += 1
        table = (uniforms[:, 0] * len(self.tables)).astype(np.int64)
        for i, option in zip(which, options):
            if option:
                table[i] = pick(self.tables, option, 0.0)
        # Of the last episode, only what was visited has to be forgotten.
        longest = int(self._evaluations[which].max(initial=0))
        nodes = np.column_stack((self._told[which, :longest], self._reference[which]))
        touched = (nodes + self._lane[which, None]).ravel()
        self._used[touched], self._spent[touched], self._visited[touched] = 0, False, False
        self._fixable[touched] = -1
        self.table[which], self._drawn[which] = table, uniforms[:, 2:]
        self._offset[which], self._reference[which] = bank.offsets[table], bank.references[table]
        self._state[self._lane[which] + bank.references[table]] = 0.0
        for counter in (
            self._steps, self._evaluations, self._duplicates, self._drafts, self._covered, self._best_value,
            self._best_depth, self.clock, self._last_outcome, self._best_dull, self._kinds,
        ):  # fmt: skip
            counter[which] = 0
        for unknown in (self._best, self._best_at, self._open):
            unknown[which] = -1
        self._drafts_left[which] = bank.has_drafts[table]
        for lanes in (
            self._recent.reshape(-1, RECENT), self._worked.reshape(-1, N_ACTIONS),
            self._stats.reshape(-1, N_ACTIONS, 4),
        ):  # fmt: skip
            lanes[which] = 0
        self._flat[which, : spaces.SIZE] = bank.starts[table]
        for i in which.tolist():
            if self._broken[i]:
                self._broken[i] = {}

    def step_async(self, actions: NDArray[np.int64]) -> None:
        self._actions = np.asarray(actions, dtype=np.int64).reshape(-1)

    def step_wait(self) -> VecEnvStepReturn:
        """Step all episodes."""
        actions = self._actions
        self._steps += 1
        known = np.where((actions >= 0) & (actions < N_ACTIONS), actions, 0)
        legal = self._mask.ravel().take(self._by_action + known) & (known == actions)
        stopped = legal & (actions == STOP.id)
        rewards = self._act(legal & ~stopped, actions)
        rewards[stopped] = 0.0
        self._settle()
        ended = stopped | (self._steps >= self.horizons)
        infos: list[dict[str, Any]] = [{} for _ in range(self.num_envs)]
        if ended.any():
            which = np.flatnonzero(ended)
            for i, last in zip(which.tolist(), self._flat[which]):
                infos[i] = {
                    "terminal_observation": {name: last[part] for name, part in _PARTS},
                    "TimeLimit.truncated": not stopped[i],
                    "task": self.tables[self.table[i]].task,
                    "best_speedup": math.exp(self._best_value[i]),
                    "evaluations": int(self._evaluations[i]),
                    "clock_s": float(self.clock[i]),
                }
            self._begin(which)
            self._settle()
        return self._observation(), rewards.astype(np.float32), ended, infos

    def _act(self, acting: Flags, actions: Indices) -> Values:
        """Take legal actions other than STOP in the episodes ``acting``; returns all rewards."""
        bank = self.bank
        actions = np.where(acting, actions, STOP.id)
        base, repairs = actions == RESTART.id, actions == FIX.id
        origin = np.where(base, self._reference, self._parent)
        origin = np.where(repairs, self._failed, origin)
        at = self._lane + origin
        first, count, total, repeating = bank.edges.take(
            (self._offset + origin) * N_ACTIONS + actions, axis=0
        ).T
        used = self._used.ravel()
        place = at * N_ACTIONS + actions
        taken = used.take(place).astype(np.int64)
        child = bank.children.take(first + taken)
        again = (taken < count) & self._visited.take(self._lane + child)
        while again.any():
            taken += again
            child = bank.children.take(first + taken)
            again = (taken < count) & self._visited.take(self._lane + child)
        told = taken < count
        taken = np.where(told, taken + 1, total)
        used[place] = taken
        exhausted = acting & (taken >= total)
        self._drafts_left &= ~(exhausted & base)
        spent = np.flatnonzero(exhausted & (actions < N_STRATEGIES))
        if len(spent):
            self._exhaust(spent, at[spent], actions[spent], origin[spent])
        refused = acting & ~told
        if refused.any():
            self._duplicates += refused * repeating
            dead = np.flatnonzero(refused & repairs)
            self._fixable[self._lane[dead] + self._parent[dead]] = -1
        if not told.any():
            return np.full(self.num_envs, reward.DUPLICATE_PENALTY)
        return self._tell(told, np.where(told, actions, STOP.id), origin, at, child, base & told)

    def _exhaust(self, who: Indices, at: Indices, actions: Indices, origin: Indices) -> None:
        """One more strategy of ``origin`` is used up; find the next open version where it was the last."""
        self._spent[at, actions] = True
        left = self._left[at] - 1
        self._left[at] = left
        who = who[(left == 0) & (origin == self._open[who])]
        if len(who):
            told = self._told[who, : int(self._evaluations[who].max())]
            places = told + self._lane[who, None]
            late = np.arange(told.shape[1]) >= self._evaluations[who, None]
            values = np.where((self._left[places] > 0) & ~late, self._state[places, 0], -np.inf)
            fastest = values.argmax(axis=1)  # the first told among equals
            every = np.arange(len(who))
            self._open[who] = np.where(values[every, fastest] > -np.inf, told[every, fastest], -1)

    def _tell(
        self, told: Flags, actions: Indices, origin: Indices, at: Indices, child: Indices, base: Flags
    ) -> Values:
        """Add versions ``child``, made from ``origin`` (at place ``at``), in the episodes ``told``; returns the rewards."""
        bank, every = self.bank, self._all
        (
            found, value, gap, rival, improved, cost, penalty, outcome, kind, fanout, draft, noise_first, noise_count,
        ) = bank.facts.take(np.where(told, self._offset + child, 0), axis=0).T  # fmt: skip
        correct = told & (found > 0)
        if self.noise == "sample":
            drawn = self._drawn.ravel().take(self._by_step + self._steps - 1)
            value = value + bank.noise.take((noise_first + np.trunc(drawn * noise_count)).astype(np.int64))
        best, before, number = self._best, self._best_value, self._evaluations
        above, depth, root = self._state.take(at, axis=0).T
        # A fresh draft has no parent: it is compared with the best so far.
        against = np.where(base, before, above)
        place = np.where(told, self._lane + child, self._nowhere)
        made = np.empty((self.num_envs, 3))
        made[:, 0], made[:, 1], made[:, 2] = (
            value,
            np.where(base, 1.0, depth + 1),
            np.where(base, draft, root),
        )
        self._state[place] = made
        self._visited[place] = told
        self._left[place] = fanout
        self._told[every, number] = child
        self.clock += cost * told
        self._drafts += base
        open_ = self._open
        further = told & (fanout > 0) & ((open_ < 0) | (value > self._state[self._lane + open_, 0]))
        self._open = np.where(further, child, open_)
        # No best and the reference are both -1.
        wins = correct & np.where(rival == best, improved > 0, value + gap > before)
        became = wins | (correct & (best < 0))
        dull = correct & ~wins
        self._best = np.where(became, child, best)
        self._best_value = np.where(became, value, before)
        self._best_depth = np.where(became, made[:, 1], self._best_depth)
        self._best_at = np.where(became, number, self._best_at)
        self._best_dull = np.where(became, dull, self._best_dull)
        doing = self._by_action + actions
        worked = self._worked.take(doing)
        self._covered += correct & ~worked
        self._worked[doing] = worked | correct
        self._last_outcome = np.where(told, outcome, self._last_outcome)
        slot = self._by_recent + number % RECENT
        old = self._recent.take(slot)
        new = np.where(told, np.where(dull, DULL, kind.astype(np.int64)), old)
        self._recent[slot] = new
        kinds = self._kinds.ravel()
        kinds[self._by_kind + old] -= 1
        kinds[self._by_kind + new] += 1
        self._evaluations = number + told
        self._count(doing, actions, told, correct, np.where(correct & ~base, value - against, 0.0))
        for i in np.flatnonzero(told & (~correct | (actions == FIX.id))).tolist():
            self._repair(i, int(origin[i]), int(actions[i]), int(child[i]), bool(correct[i]))
        kind_paid = self.rules.reward
        if kind_paid == "milestone":
            gained = np.where(value <= _LOG_MILESTONE, 1.0, np.where(became, 3.0, 2.0))
            penalty = np.full(self.num_envs, -1.0)
        else:
            gained = np.where(became, np.minimum(np.maximum(value - before, 0.0), reward.CLIP), 0.0)
            if kind_paid != "best":
                over = np.minimum(np.maximum(value - against, -0.2), reward.CLIP)
                over = np.where(actions == FIX.id, reward.REPAIR_BONUS, over)
                gained = over if kind_paid == "parent" else gained + reward.DENSITY * over
        return np.where(correct, gained, np.where(told, penalty, reward.DUPLICATE_PENALTY))

    def _count(self, doing: Indices, actions: Indices, told: Flags, correct: Flags, gain: Values) -> None:
        """The statistics of each strategy, and what the observation says of them."""
        stats = self._stats.take(doing, axis=0)
        stats[:, 0] += told
        stats[:, 1] += told & ~correct
        stats[:, 2] += gain
        stats[:, 3] += correct
        self._stats[doing] = stats
        tries, failures, gains, known = stats.T
        seen = np.empty((self.num_envs, 3))
        seen[:, 0] = np.minimum(tries / 5, 1.0)
        seen[:, 1] = np.minimum(np.maximum(gains / np.maximum(known, 1), -1.0), 1.0)
        seen[:, 2] = failures / np.maximum(tries, 1)
        self._flat.ravel()[self._columns + 3 * actions[:, None]] = seen

    def _repair(self, i: int, origin: int, action: int, child: int, correct: bool) -> None:
        """Failures are rare, so they are kept track of one by one, as ``Walk`` does."""
        parent = origin
        if action == FIX.id:
            parent = int(self._parent[i])
            _, repairs = self._broken[i][parent].pop()
            if not correct and repairs == 0:
                self._broken[i][parent].append((child, 1))
        else:
            self._broken[i].setdefault(parent, []).append((child, 0))
        waiting = self._broken[i][parent]
        failed = waiting[-1][0] if waiting else -1
        if failed >= 0:
            total = self.bank.edges[(self._offset[i] + failed) * N_ACTIONS + FIX.id, 2]
            failed = failed if self._used[self._lane[i] + failed, FIX.id] < total else -1
        self._fixable[self._lane[i] + parent] = failed

    def _settle(self) -> None:
        """Choose all parents and write down what is seen of them, and what is legal."""
        bank, best, reference, lane = self.bank, self._best, self._reference, self._lane
        found = best >= 0
        parent = np.where(found, best, reference) if self.rules.parent_rule == "best" else reference
        stuck = (self._left.take(lane + parent) == 0) & (parent != reference) & (self._open >= 0)
        parent = np.where(stuck, self._open, parent)
        self._parent = parent
        row, at = self._offset + parent, lane + parent
        self._failed = self._fixable.take(at)
        mask = self._mask
        np.greater(bank.recorded.take(row, axis=0), self._spent.take(at, axis=0), out=mask[:, :N_STRATEGIES])
        mask[:, FIX.id] = self._failed >= 0
        mask[:, RESTART.id] = self._drafts_left
        state = self._state.take(at, axis=0)
        flat = self._flat
        flat[:, DESCRIBED] = bank.described.take(
            bank.described_first.take(row) + state[:, 2].astype(np.int64), axis=0
        )
        evaluations = self._evaluations
        count = np.minimum(np.maximum(evaluations, 1), RECENT)
        since = evaluations - self._best_at - 1
        seen = np.empty((12, self.num_envs))
        seen[0] = 1.0 - self._steps / self.horizons
        seen[1] = since / 10
        seen[2] = self._best_value / _LOG_10
        seen[3] = np.where(found & (parent != reference), self._best_value - state[:, 0], 0.0)
        seen[4:7] = self._kinds.T[COMPILED:]
        seen[6] -= self._best_dull & (since < RECENT)  # the best itself is not slow
        seen[4:7] /= count
        seen[7] = self._duplicates / np.maximum(evaluations + self._duplicates, 1)
        seen[8] = self._covered / N_STRATEGIES
        seen[9] = self._best_depth / 10
        seen[10] = self._last_outcome
        seen[11] = self._drafts / 5
        flat[:, HISTORY] = np.minimum(np.maximum(seen, -1.0, out=seen), 1.0, out=seen).T

    def _observation(self) -> VecEnvObs:
        flat = self._flat[:, : spaces.SIZE].copy()
        return {name: flat[:, part] for name, part in _PARTS}

    # What stable-baselines3 asks of the single environments ------------------------------------------------

    def action_masks(self) -> NDArray[np.bool_]:
        """The recorded actions of all episodes: bool, shape (n_envs, 25)."""
        return self._mask.copy()

    def oracle(self) -> NDArray[np.float64]:
        """The best speedup in each episode's table. Uncharged: for regret, never for a policy."""
        return np.array([self.tables[t].optimum for t in self.table])

    def close(self) -> None:
        """Nothing is open."""

    def env_method(self, method_name: str, *args: Any, indices: Any = None, **kwargs: Any) -> list[Any]:
        if method_name != "action_masks":
            raise AttributeError(f"the episodes have no method {method_name!r}, only action_masks")
        masks = self.action_masks()
        return [masks[i] for i in self._get_indices(indices)]

    def has_attr(self, attr_name: str) -> bool:
        return attr_name == "action_masks" or hasattr(self, attr_name)

    def get_attr(self, attr_name: str, indices: Any = None) -> list[Any]:
        return [getattr(self, attr_name) for _ in self._get_indices(indices)]

    def set_attr(self, attr_name: str, value: Any, indices: Any = None) -> None:
        raise AttributeError(f"{attr_name} is the same for all episodes; set it on the vector environment")

    def env_is_wrapped(self, wrapper_class: type[Any], indices: Any = None) -> list[bool]:
        return [False for _ in self._get_indices(indices)]

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
from ke_gym.envs.prepared import DESCRIBED, HISTORY, N_STRATEGIES, PER_STRATEGY, SLICES
from ke_gym.envs.replay import EPISODES, Noise, check_noise, pick
from ke_gym.envs.walk import FAST_RULES
from ke_gym.errors import UserError
from ke_gym.evaluation.evaluation import OUTCOMES
from ke_gym.search import reward
from ke_gym.search.observation import RECENT
from ke_gym.search.reward import Kind
from ke_gym.strategies import FIX, RESTART, STOP

Indices = NDArray[np.int64]
_COMPILE, _WRONG = OUTCOMES.index("compile"), OUTCOMES.index("correctness")
_NEVER = np.iinfo(np.int64).max
_LOG_10, _LOG_MILESTONE = math.log(10), math.log(reward.MILESTONE)


class BatchedReplayVecEnv(VecEnv):
    """``KernelOptReplayEnv`` N times as one of stable-baselines3's vector environments.

    Arguments are those of ``KernelOptReplayEnv``; parent rules are ``best`` and ``root``, and of several horizons
    each environment has one, in turn. Episodes begin anew by
    themselves; the last observation is then in ``info["terminal_observation"]``, beside ``task``, ``best_speedup``,
    ``evaluations``, ``clock_s`` and ``TimeLimit.truncated``. Other infos are empty. Episode i is the one that the
    single environment makes of seed + i.
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
        n, width = n_envs, self.bank.width
        self._all = np.arange(n)
        self._rngs = [np.random.default_rng() for _ in range(n)]
        longest = max(listed)
        self._uniforms = np.zeros((n, EPISODES, longest + 2))
        self._episode = np.full(n, EPISODES)
        self._drawn = np.zeros((n, longest))
        self._actions = np.zeros(n, np.int64)
        self.table = np.zeros(n, np.int64)
        self._offset = np.zeros(n, np.int64)
        self._reference = np.zeros(n, np.int64)
        self._parent = np.zeros(n, np.int64)
        self._steps, self._evaluations, self._duplicates, self._drafts, self._covered, self._best_at = (
            np.zeros(n, np.int64) for _ in range(6)
        )
        self._best = np.full(n, -1)
        self._best_value, self.clock = np.zeros(n), np.zeros(n)
        self._last_outcome = np.zeros(n, np.int64)
        self._recent = np.zeros((n, RECENT, 3), np.int64)
        """Of the latest evaluations: did not compile, was wrong, was correct but won nothing."""
        self._recent_sums = np.zeros((n, 3), np.int64)
        self._best_dull = np.zeros(n, np.bool_)
        """Whether the best became that by default, as the first correct version, and won nothing either."""
        self._worked = np.zeros((n, 25), np.bool_)
        self._visited = np.zeros((n, width), np.bool_)
        self._value = np.zeros((n, width))
        self._order, self._depth, self._root, self._left = (np.zeros((n, width), np.int64) for _ in range(4))
        self._used = np.zeros((n, width, 25), np.int16)
        self._open = np.full(n, -1)
        """The fastest visited version that has a recorded strategy left; -1 if none has."""
        self._fixable = np.full((n, width), -1)
        """The failed version that FIX would repair, for each parent; -1 where none is recorded."""
        self._broken: list[dict[int, list[tuple[int, int]]]] = [{} for _ in range(n)]
        self._stats = np.zeros((4, n, N_STRATEGIES))
        """Tries, failures, sums and counts of gains."""
        self._mask = np.zeros((n, 25), np.bool_)
        self._mask[:, STOP.id] = True
        self._flat = np.zeros((n, spaces.SIZE), np.float32)

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
        self.table[which] = table
        self._drawn[which] = uniforms[:, 2:]
        self._offset[which] = bank.offsets[table]
        self._reference[which] = bank.references[table]
        for counter in (
            self._steps, self._evaluations, self._duplicates, self._drafts, self._covered, self._best_value,
            self.clock, self._last_outcome, self._recent, self._recent_sums, self._best_dull, self._worked,
            self._visited, self._used,
        ):  # fmt: skip
            counter[which] = 0
        for unknown in (self._best, self._best_at, self._open, self._fixable):
            unknown[which] = -1
        self._stats[:, which] = 0.0
        self._left[which] = bank.fanout[table]
        self._flat[which] = bank.starts[table]
        for i in which.tolist():
            if self._broken[i]:
                self._broken[i] = {}

    def step_async(self, actions: NDArray[np.int64]) -> None:
        self._actions = np.asarray(actions, dtype=np.int64).reshape(-1)

    def step_wait(self) -> VecEnvStepReturn:
        """Step all episodes."""
        actions, every = self._actions, self._all
        self._steps += 1
        known = np.where((actions >= 0) & (actions < 25), actions, 0)
        legal = self._mask[every, known] & (known == actions)
        stopped = legal & (actions == STOP.id)
        rewards = np.where(legal, 0.0, reward.DUPLICATE_PENALTY)
        acting = np.flatnonzero(legal & ~stopped)
        if len(acting):
            rewards[acting] = self._act(acting, actions[acting])
        self._settle()
        ended = stopped | (self._steps >= self.horizons)
        infos: list[dict[str, Any]] = [{} for _ in range(self.num_envs)]
        if ended.any():
            which = np.flatnonzero(ended)
            last = self._flat[which]
            for row, i in enumerate(which.tolist()):
                infos[i] = {
                    "terminal_observation": {name: last[row, part] for name, part in SLICES.items()},
                    "TimeLimit.truncated": not stopped[i],
                    "task": self.tables[self.table[i]].task,
                    "best_speedup": math.exp(self._best_value[i]),
                    "evaluations": int(self._evaluations[i]),
                    "clock_s": float(self.clock[i]),
                }
            self._begin(which)
            self._settle()
        return self._observation(), rewards.astype(np.float32), ended, infos

    def _act(self, who: Indices, actions: Indices) -> NDArray[np.float64]:
        """Take legal actions other than STOP in episodes ``who``; returns their rewards."""
        bank = self.bank
        base = actions == RESTART.id
        origin = np.where(base, self._reference[who], self._parent[who])
        repairs = actions == FIX.id
        if repairs.any():
            origin[repairs] = self._fixable[who[repairs], origin[repairs]]
        row = self._offset[who] + origin
        count, first = bank.counts[row, actions], bank.first[row, actions]
        taken = self._used[who, origin, actions].astype(np.int64)
        child = bank.children[first + taken]
        again = (taken < count) & self._visited[who, child]
        while again.any():
            taken += again
            child = bank.children[first + taken]
            again = (taken < count) & self._visited[who, child]
        told = taken < count
        totals = bank.totals[row, actions]
        used = np.where(told, taken + 1, totals)
        self._used[who, origin, actions] = used
        spent = (used >= totals) & (actions < N_STRATEGIES)
        if spent.any():
            self._spend(who[spent], origin[spent])
        if told.all():
            return self._tell(who, actions, origin, row, child, base)
        refused = ~told
        self._duplicates[who[refused]] += bank.repeating[row[refused], actions[refused]]
        for i in who[refused & repairs].tolist():
            self._fixable[i, self._parent[i]] = -1
        rewards = np.full(len(who), reward.DUPLICATE_PENALTY)
        if told.any():
            rewards[told] = self._tell(
                who[told], actions[told], origin[told], row[told], child[told], base[told]
            )
        return rewards

    def _spend(self, who: Indices, origin: Indices) -> None:
        """One more strategy of ``origin`` is used up; find the next open version where it was the last."""
        left = self._left[who, origin] - 1
        self._left[who, origin] = left
        who = who[(left == 0) & (origin == self._open[who])]
        if len(who):
            open_ = self._visited[who] & (self._left[who] > 0)
            values = np.where(open_, self._value[who], -np.inf)
            # The first told among equals.
            ties = values == values.max(axis=1, keepdims=True)
            found = np.where(ties, self._order[who], _NEVER).argmin(axis=1)
            self._open[who] = np.where(open_.any(axis=1), found, -1)

    def _tell(
        self,
        who: Indices,
        actions: Indices,
        origin: Indices,
        row: Indices,
        child: Indices,
        base: NDArray[np.bool_],
    ) -> NDArray[np.float64]:
        """Add versions ``child``, made from ``origin`` (at ``row`` of the bank); returns the rewards."""
        bank = self.bank
        made = self._offset[who] + child
        correct, value = bank.correct[made], bank.values[made]
        if self.noise == "sample":
            drawn = self._drawn[who, self._steps[who] - 1] * bank.noise_count[made]
            value = value + bank.noise[bank.noise_first[made] + drawn.astype(np.int64)]
        best, before = self._best[who], self._best_value[who]
        # A fresh draft has no parent: it is compared with the best so far.
        against = np.where(base, np.where(best >= 0, before, 0.0), self._value[who, origin])
        self._value[who, child] = value
        self._visited[who, child] = True
        number = self._evaluations[who]
        self._order[who, child] = number
        self._evaluations[who] = number + 1
        self.clock[who] += bank.costs[made]
        self._depth[who, child] = np.where(base, 1, self._depth[who, origin] + 1)
        self._root[who, child] = np.where(base, bank.draft[made], self._root[who, origin])
        self._drafts[who] += base
        open_ = self._open[who]
        further = (bank.fanout[self.table[who], child] > 0) & (
            (open_ < 0) | (value > self._value[who, open_])
        )
        self._open[who] = np.where(further, child, open_)
        matched = bank.rivals[made] == best  # no best and the reference are both -1
        wins = correct & np.where(matched, bank.improved[made], value + bank.gaps[made] > before)
        became = wins | (correct & (best < 0))
        self._best[who] = np.where(became, child, best)
        self._best_value[who] = np.where(became, value, before)
        self._best_at[who] = np.where(became, number, self._best_at[who])
        self._covered[who] += correct & ~self._worked[who, actions]
        self._worked[who, actions] |= correct
        outcome = bank.outcomes[made]
        dull = correct & ~wins
        self._best_dull[who] = np.where(became, dull, self._best_dull[who])
        kinds = np.stack((outcome == _COMPILE, outcome == _WRONG, dull), axis=1)
        slot = number % RECENT
        self._recent_sums[who] += kinds - self._recent[who, slot]
        self._recent[who, slot] = kinds
        self._last_outcome[who] = outcome
        self._count(who, actions, correct, value - against, ~base & bank.correct[row])
        for at in np.flatnonzero(~correct | (actions == FIX.id)).tolist():
            self._repair(int(who[at]), int(origin[at]), int(actions[at]), int(child[at]), bool(correct[at]))
        kind = self.rules.reward
        if kind != "milestone":
            new = np.where(became, np.clip(value - before * (best >= 0), 0.0, reward.CLIP), 0.0)
            over = np.where(
                actions == FIX.id, reward.REPAIR_BONUS, np.clip(value - against, -0.2, reward.CLIP)
            )
            gained = new if kind == "best" else over if kind == "parent" else new + reward.DENSITY * over
        else:
            gained = np.where(value <= _LOG_MILESTONE, 1.0, np.where(became, 3.0, 2.0))
        failed = -1.0 if kind == "milestone" else bank.penalties[made]
        return np.where(correct, gained, failed)

    def _count(
        self, who: Indices, actions: Indices, correct: NDArray[np.bool_], gain: NDArray[np.float64],
        known: NDArray[np.bool_],
    ) -> None:  # fmt: skip
        """The statistics of each strategy, and what the observation says of them."""
        plain = actions < N_STRATEGIES
        if not plain.all():
            who, actions, correct = who[plain], actions[plain], correct[plain]
            gain, known = gain[plain], known[plain]
        stats = self._stats[:, who, actions]
        known = known & correct
        stats[0] += 1
        stats[1] += ~correct
        stats[2] += np.where(known, gain, 0.0)
        stats[3] += known
        self._stats[:, who, actions] = stats
        at = PER_STRATEGY + 3 * actions
        self._flat[who, at] = np.minimum(stats[0] / 5, 1.0)
        self._flat[who, at + 1] = np.clip(stats[2] / np.maximum(stats[3], 1), -1.0, 1.0)
        self._flat[who, at + 2] = stats[1] / stats[0]

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
            left = self.bank.totals[self._offset[i] + failed, FIX.id] - self._used[i, failed, FIX.id]
            failed = failed if left > 0 else -1
        self._fixable[i, parent] = failed

    def _settle(self) -> None:
        """Choose all parents and write down what is seen of them, and what is legal."""
        bank, every, best, reference = self.bank, self._all, self._best, self._reference
        found = best >= 0
        parent = np.where(found, best, reference) if self.rules.parent_rule == "best" else reference
        stuck = (self._left[every, parent] == 0) & (parent != reference) & (self._open >= 0)
        parent = np.where(stuck, self._open, parent)
        self._parent = parent
        row = self._offset + parent
        mask = self._mask
        mask[:, :N_STRATEGIES] = bank.recorded[row] > self._used[every, parent, :N_STRATEGIES]
        mask[:, FIX.id] = self._fixable[every, parent] >= 0
        drafts = bank.totals[self._offset + reference, RESTART.id]
        mask[:, RESTART.id] = drafts > self._used[every, reference, RESTART.id]
        flat = self._flat
        flat[:, DESCRIBED] = bank.described[
            bank.described_first[row] + self._root[every, parent] * (parent != reference)
        ]
        count = np.minimum(np.maximum(self._evaluations, 1), RECENT)
        since = self._evaluations - self._best_at - 1
        seen = np.empty((self.num_envs, 12))
        seen[:, 0] = 1.0 - self._steps / self.horizons
        seen[:, 1] = since / 10
        seen[:, 2] = self._best_value / _LOG_10
        seen[:, 3] = np.where(
            found & (parent != reference), self._best_value - self._value[every, parent], 0.0
        )
        seen[:, 4:7] = self._recent_sums
        seen[:, 6] -= self._best_dull & (since < RECENT)  # the best itself is not slow
        seen[:, 4:7] /= count[:, None]
        seen[:, 7] = self._duplicates / np.maximum(self._evaluations + self._duplicates, 1)
        seen[:, 8] = self._covered / N_STRATEGIES
        seen[:, 9] = np.where(found, self._depth[every, best] / 10, 0.0)
        seen[:, 10] = self._last_outcome / (len(OUTCOMES) - 1)
        seen[:, 11] = self._drafts / 5
        np.minimum(np.maximum(seen, -1.0, out=seen), 1.0, out=flat[:, HISTORY], casting="same_kind")

    def _observation(self) -> VecEnvObs:
        flat = self._flat.copy()
        return {name: flat[:, part] for name, part in SLICES.items()}

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

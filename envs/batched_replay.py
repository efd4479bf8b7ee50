"""N replayed episodes in lockstep, as arrays: a million steps a second without a process per environment."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from stable_baselines3.common.vec_env.base_vec_env import VecEnvObs, VecEnvStepReturn

from ke_gym.envs import catalog, spaces
from ke_gym.envs.bank import COLUMNS, ILLEGAL, REAL, WIDTH, bank_of
from ke_gym.envs.batched import BatchedVecEnv
from ke_gym.envs.catalog import TableSpec
from ke_gym.envs.episode import Rules
from ke_gym.envs.prepared import (
    DESCRIBED,
    DISTANCE,
    HISTORY,
    N_STRATEGIES,
    PER_STRATEGY,
    PLAIN,
    SLICES,
    SLOW,
    SLOW_BEST,
    WINDOW,
    WINDOWS,
)
from ke_gym.envs.replay import EPISODES, Noise, check_noise, pick
from ke_gym.envs.slots import Slots
from ke_gym.envs.walk import FAST_RULES
from ke_gym.errors import UserError
from ke_gym.search import reward
from ke_gym.search.observation import RECENT
from ke_gym.search.reward import Kind
from ke_gym.strategies import FIX, RESTART, STOP

Indices = NDArray[np.int64]
Flags = NDArray[np.bool_]
Values = NDArray[np.float64]
_LOG_MILESTONE = math.log(reward.MILESTONE)
_MARGIN = 3 * (WIDTH - N_STRATEGIES)
"""Columns behind the observation, for the statistics of actions that are no strategies."""
_BITS = np.array([i.bit_count() for i in range(WINDOW + 1)], np.float32)
# Of the history's features, as they are counted here.
_SCALES = 1 / np.array([[1, 10, math.log(10), 1, 1, 1, 1, 1, N_STRATEGIES, 10, 1, 5]], np.float32).T


class BatchedReplayVecEnv(BatchedVecEnv):
    """``KernelOptReplayEnv`` N times as one of stable-baselines3's vector environments.

    Arguments are those of ``KernelOptReplayEnv``; parent rules are ``best`` and ``root``, and of several horizons
    each environment has one, in turn. Episodes begin anew by themselves; the last observation is then in
    ``info["terminal_observation"]``, beside ``task``, ``best_speedup``, ``evaluations``, ``clock_s`` and
    ``TimeLimit.truncated``. All other infos are one empty dictionary. Episode i is the one that the single
    environment makes of seed + i.

    A step is the same hundred array operations for all episodes, whatever each of them does. A version has a place
    of its own in its episode: 0 is the reference, k the version of the k-th evaluation; one that evaluates nothing
    writes to the next one's, where nobody reads. So what an episode keeps of its versions is as short as the episode.
    """

    def __init__(
        self,
        n_envs: int,
        tables: TableSpec | Sequence[TableSpec] = "all",
        *,
        horizon: int | Sequence[int] = 20,
        reward: Kind = "best",
        parent_rule: str = "best",
        extended: bool = False,
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
        self.rules = Rules(min(listed), reward, parent_rule, extended)  # checks the first three
        self.horizons = np.resize(np.array(listed, dtype=np.int64), n_envs)
        self.noise = noise
        choices = spaces.action_space(extended)
        super().__init__(n_envs, spaces.observation_space(), choices)
        self._choices = int(choices.n)
        n, longest = n_envs, max(listed)
        self._size = longest + 2
        self._slots = Slots(n, self._size) if extended else None
        self._all = np.arange(n)
        self._rngs = [np.random.default_rng() for _ in range(n)]
        self._uniforms = np.zeros((n, EPISODES, longest + 2))
        self._episode = np.full(n, EPISODES)
        self._drawn = np.zeros((n, longest))
        self._actions = np.zeros(n, np.int64)
        # Where each episode's values begin in flat arrays.
        self._by_place, self._by_version, self._by_action, self._by_draw = (
            self._all * size for size in (self._size, self.bank.width, WIDTH, longest)
        )
        self.table, self._offset, self._steps, self._evaluations, self._duplicates, self._covered = (
            np.zeros(n, np.int64) for _ in range(6)
        )
        self._best, self._open, self._parent, self._failed, self._shown = (
            np.zeros(n, np.int64) for _ in range(5)
        )
        """Places: of the best version (0: none); of the fastest that has a recorded strategy left (0: none); of the
        parent; of the version that FIX would repair (0: none); of what the observation shows."""
        self._recent = np.zeros(n, "<i8")
        """The latest evaluations, as fields of bits."""
        self._open_value, self._best_value, self.clock, self._last_outcome = (np.zeros(n) for _ in range(4))
        self._tries, self._failures, self._gains = (np.zeros(n * WIDTH) for _ in range(3))
        """Of each action: how often it was tried, how often it failed, the sum of its gains."""
        self._visited = np.zeros(n * self.bank.width, np.bool_)
        places = n * self._size
        # Arrays of one value each: what is written row by row takes NumPy ten times as long.
        self._value = np.zeros(places)
        """Log-speedup as drawn."""
        self._depth, self._draft, self._version = (np.zeros(places, np.int64) for _ in range(3))
        """``_draft``: the first one above it; ``_version``: where the table has it."""
        self._left = np.zeros(places, np.int64)
        """The actions that can still be taken, as bits."""
        self._used = np.zeros(places * WIDTH, np.int16)
        """How far each action has come."""
        self._broken, self._below, self._repairs = (np.zeros(places, np.int64) for _ in range(3))
        """The latest failure worth a repair, below a parent; below a failure, the one before; and whether a failure
        is a repair itself. 0 is none."""
        self._mask = np.zeros((n, 0), np.bool_)
        """The legal actions, and behind them columns for what is no action."""
        self._flat = np.zeros((n, spaces.SIZE + _MARGIN), np.float32)
        self._counted = 1 / np.minimum(np.maximum(np.arange(self._size), 1), RECENT)
        """By the number of evaluations, one over that of the latest."""
        self._by_column = self._all * self._flat.shape[1] + PER_STRATEGY

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
        places, reference = self._by_place[which], bank.references[table]
        self.table[which], self._drawn[which] = table, uniforms[:, 2:]
        self._offset[which] = bank.offsets[table]
        for counter in (
            self._steps, self._evaluations, self._duplicates, self._covered, self._best, self._open, self._shown,
            self._recent, self.clock, self._last_outcome,
        ):  # fmt: skip
            counter[which] = 0
        for each in (
            self._tries, self._failures, self._gains, self._visited, self._used, self._left, self._broken,
        ):  # fmt: skip
            each.reshape(self.num_envs, -1)[which] = 0
        self._open_value[which] = -np.inf
        if self._slots is not None:
            self._slots.begin(which)
        self._version[places] = reference
        self._left[places] = bank.facts.take(bank.offsets[table] + reference, axis=0)[:, COLUMNS["actions"]]
        self._flat[which, : spaces.SIZE] = bank.starts.take(table, axis=0)

    def step_async(self, actions: NDArray[np.int64]) -> None:
        self._actions = np.asarray(actions, dtype=np.int64).reshape(-1)

    def step_wait(self) -> VecEnvStepReturn:
        """Step all episodes."""
        # As unsigned numbers, negative ones are large.
        width = self._mask.shape[1]
        known = np.minimum(self._actions.view(np.uint64), width - 1).view(np.int64)
        legal = self._mask.ravel().take(self._all * width + known)
        plain, parent = self._slots.split(known) if self._slots is not None else (known, self._parent)
        actions = np.where(legal, plain, ILLEGAL)
        rewards = self._act(actions, parent)
        self._steps += 1
        self._settle()
        stopped = actions == STOP.id
        ended = stopped | (self._steps >= self.horizons)
        # One for all that go on: learners read the infos of episodes that ended.
        infos: list[dict[str, Any]] = [{}] * self.num_envs
        which = ended.nonzero()[0]
        if len(which):
            for i, info in zip(which.tolist(), self._last_infos(which, ~stopped[which])):
                infos[i] = info
            self._begin(which)
            self._settle()
        return self._observation(), rewards.astype(np.float32), ended, infos

    def _last_infos(self, which: Indices, truncated: Flags) -> Iterator[dict[str, Any]]:
        """What is told of episodes that ended."""
        flat = self._flat[which]
        shown = zip(*(flat[:, part] for part in SLICES.values()))
        told = (self.table, np.exp(self._best_value), self._evaluations, self.clock)
        for seen, cut, table, best, evaluations, clock in zip(
            shown, truncated.tolist(), *(values[which].tolist() for values in told)
        ):
            yield {
                "terminal_observation": dict(zip(SLICES, seen)),
                "TimeLimit.truncated": cut,
                "task": self.tables[table].task,
                "best_speedup": best,
                "evaluations": evaluations,
                "clock_s": clock,
            }

    def _act(self, actions: Indices, parent: Indices) -> Values:
        """Take the actions, strategies on these parents; returns the rewards."""
        bank = self.bank
        fixing = actions == FIX.id
        parent = parent * (actions != RESTART.id)
        origin = np.where(fixing, self._failed, parent)
        place = self._by_place + origin
        edge = bank.first.take((self._offset + self._version.take(place)) * WIDTH + actions)
        taking = place * WIDTH + actions
        at = edge + self._used.take(taking)
        child = bank.children.take(at)
        again = self._visited.take(self._by_version + (child >> 1))
        while again.any():
            at += again
            child = bank.children.take(at)
            again = self._visited.take(self._by_version + (child >> 1))
        version, last = child >> 1, child & 1
        self._used[taking] = at - edge + 1 - last
        left = self._left.take(place) & ~(last << actions)
        self._left[place] = left
        closed = (left == 0) & (origin == self._open)
        if closed.any():
            self._reopen(closed.nonzero()[0])
        return self._tell(actions, version, place, parent, fixing)

    def _reopen(self, who: Indices) -> None:
        """Find the fastest version that has a strategy left; the first told among equals."""
        plain = self._left.reshape(-1, self._size).take(who, axis=0) & PLAIN
        values = np.where(plain > 0, self._value.reshape(-1, self._size).take(who, axis=0), -np.inf)
        self._open[who], self._open_value[who] = values.argmax(axis=1), values.max(axis=1)

    def _tell(
        self, actions: Indices, version: Indices, above: Indices, parent: Indices, fixing: Flags
    ) -> Values:
        """Add ``version``, or what stands for one, made by ``actions`` of the one at ``above``; returns the rewards."""
        bank = self.bank
        facts = bank.facts.take(self._offset + version, axis=0)
        real = facts.view(np.float64)
        value, gap, margin, lift, first_repeat, repeats, cost, paid, outcome = real.T[: len(REAL)]
        told, correct, repeated, rival, left, sign, draft = facts.T[len(REAL) :]
        failed = told - correct
        if self.noise == "sample":
            drawn = self._drawn.ravel().take(self._by_draw + self._steps)
            value = value + bank.noise.take((first_repeat + drawn * repeats).astype(np.int64))
        before = self._best_value
        base = actions == RESTART.id
        # A fresh draft has no parent: it is compared with the best so far.
        against = np.where(base, before, self._value.take(above))
        number = self._evaluations + 1
        self._evaluations += told
        self._duplicates += repeated
        self.clock += cost
        made = self._by_place + number
        self._value[made] = value
        if self._slots is not None:
            self._slots.add(made, value, correct > 0)
        self._depth[made] = self._depth.take(above) + 1
        self._draft[made] = np.where(base, draft, self._draft.take(above))
        self._version[made] = version
        self._left[made] = left
        self._visited[self._by_version + version] = told
        further = value + lift > self._open_value
        self._open = np.where(further, number, self._open)
        self._open_value = np.where(further, value, self._open_value)
        # A recorded race speaks of the rival it was run against; else the interval has to do.
        raced = rival == self._version.take(self._by_place + self._best)
        wins = np.where(raced, margin, value + gap - before) > 0
        became = wins | (correct > self._best)  # also the first correct one
        self._best = np.where(became, number, self._best)
        recent = (self._recent << told & WINDOWS) + sign + (correct > became) * SLOW
        won = became.nonzero()[0]
        if len(won):
            others, replaced = recent[won] % SLOW_BEST, recent[won] // SLOW_BEST
            recent[won] = others + replaced + (correct > wins)[won] * SLOW_BEST
        self._recent = recent
        self._last_outcome = np.where(told, outcome, self._last_outcome)
        self._count(actions, told, failed, correct * (value - against))
        broken = (failed | (fixing & told)).nonzero()[0]
        if len(broken):
            parent = self._by_place[broken] + parent[broken]
            self._break(broken, parent, number[broken], failed[broken] > 0, fixing[broken])
        return self._paid(value, before, against, paid, told > 0, correct > 0, became, fixing)

    def _paid(
        self, value: Values, before: Values, against: Values, paid: Values, told: Flags, correct: Flags, became: Flags,
        fixing: Flags,
    ) -> Values:  # fmt: skip
        """The rewards; ``paid`` is what there is for those that gain nothing."""
        kind = self.rules.reward
        if kind == "milestone":
            stage = np.where(value <= _LOG_MILESTONE, 1.0, np.where(became, 3.0, 2.0))
            return np.where(told, np.where(correct, stage, -1.0), paid)
        gain = np.where(became, np.minimum(np.maximum(value - before, 0.0), reward.CLIP), paid)
        if kind == "best":
            return gain
        over = np.minimum(np.maximum(value - against, -0.2), reward.CLIP)
        over = np.where(fixing, reward.REPAIR_BONUS, over)
        return np.where(correct, over if kind == "parent" else gain + reward.DENSITY * over, paid)

    def _count(self, actions: Indices, told: Indices, failed: Indices, gain: Values) -> None:
        """The statistics of each action, and what the observation says of them."""
        doing = self._by_action + actions
        tries, failures = self._tries.take(doing), self._failures.take(doing)
        self._covered += (told > failed) & (tries == failures)
        tries += told
        failures += failed
        gains = self._gains.take(doing) + gain
        self._tries[doing], self._failures[doing], self._gains[doing] = tries, failures, gains
        seen, column = self._flat.ravel(), self._by_column + 3 * actions
        seen[column] = np.minimum(tries / 5, 1.0)
        seen[column + 1] = np.minimum(np.maximum(gains / np.maximum(tries - failures, 1.0), -1.0), 1.0)
        seen[column + 2] = failures / np.maximum(tries, 1.0)

    def _break(self, who: Indices, parent: Indices, number: Indices, failed: Flags, fixing: Flags) -> None:
        """Keep track of failures worth a repair, as ``Walk`` does: the latest of a parent, at most twice in a row."""
        repaired = self._by_place[who] + self._failed[who]
        rest = np.where(fixing, self._below[repaired], self._broken[parent])
        again = failed & ~(fixing & (self._repairs[repaired] > 0))
        self._broken[parent] = np.where(again, number, rest)
        made = self._by_place[who] + number
        self._below[made], self._repairs[made] = rest, fixing

    def _settle(self) -> None:
        """Choose all parents and write down what is seen of them, and what is legal."""
        by_place, best = self._by_place, self._best
        self._best_value = self._value.take(by_place + best)
        parent = best if self.rules.parent_rule == "best" else np.zeros_like(best)
        parent = np.where((self._left.take(by_place + parent) == 0) & (self._open > 0), self._open, parent)
        place = by_place + parent
        self._parent, self._failed = parent, self._broken.take(place)
        left = self._left.take(place) | self._left.take(by_place) | self._left.take(by_place + self._failed)
        bits = np.unpackbits(left.astype("<u4").view(np.uint8).reshape(-1, 4), axis=1, bitorder="little")
        self._mask = bits.view(np.bool_)
        if self._slots is not None:
            self._mask = self._slots.settle(parent, self._left, self._mask[:, N_STRATEGIES:])
        changed = (parent != self._shown).nonzero()[0]
        if len(changed):
            self._show(changed)
        evaluations = self._evaluations
        seen = np.empty((len(_SCALES), self.num_envs), np.float32)
        seen[0] = 1.0 - self._steps / self.horizons
        seen[1] = evaluations - best
        seen[2] = self._best_value
        seen[3] = np.where(parent > 0, self._best_value - self._value.take(place), 0.0)
        slow, *failed, _ = _BITS.take(self._recent.view("<u2").reshape(-1, 4)).T * self._counted.take(
            evaluations
        )
        seen[4:6] = failed
        seen[6] = slow
        seen[7] = self._duplicates / np.maximum(evaluations + self._duplicates, 1)
        seen[8] = self._covered
        seen[9] = self._depth.take(by_place + best)
        seen[10] = self._last_outcome
        seen[11] = self._tries.take(self._by_action + RESTART.id)
        seen *= _SCALES
        self._flat[:, HISTORY] = np.minimum(np.maximum(seen, -1.0, out=seen), 1.0, out=seen).T

    def _show(self, who: Indices) -> None:
        """Write down code and profile of the parents."""
        parent = self._parent[who]
        place = self._by_place[who] + parent
        row = self._offset[who] + self._version[place]
        self._flat[who, DESCRIBED] = self.bank.described.take(row, axis=0)
        self._flat[who, DISTANCE] = self.bank.distances[row, self._draft[place]]
        self._shown[who] = parent

    def _observation(self) -> VecEnvObs:
        flat = self._flat.copy()
        return {name: flat[:, part] for name, part in SLICES.items()}

    # What stable-baselines3 asks of the single environments ------------------------------------------------

    def action_masks(self) -> NDArray[np.bool_]:
        """The recorded actions of all episodes: bool, shape (n_envs, 25), or (n_envs, 91) if extended."""
        return self._mask[:, : self._choices].copy()

    def oracle(self) -> NDArray[np.float64]:
        """The best speedup in each episode's table. Uncharged: for regret, never for a policy."""
        return np.array([self.tables[t].optimum for t in self.table])

    def close(self) -> None:
        """Nothing is open."""

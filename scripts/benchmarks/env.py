"""How many steps a second do the environments make, and what do they add to an evaluation."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from statistics import median
from typing import Any

import numpy as np

from benchmarks.figures import Figure, Figures, console
from ke_gym import tasks
from ke_gym.envs import LIVE, REPLAY, catalog, make
from ke_gym.evaluation.evaluation import Evaluation
from ke_gym.evaluation.evaluator import Evaluator
from ke_gym.policies.learning import BATCH as LEARNED
from ke_gym.policies.learning import PPO, minibatch, training_envs
from ke_gym.strategies import STOP

BATCH = 256
EPISODES = 1000
"""Of one search after the other, which are repeated."""


@dataclass
class Env:
    """Steps a second, recorded and live."""

    tables: tuple[str, ...] = ("all",)
    """Replay tables."""
    seconds: float = 4.0
    """How long each figure is measured."""
    live: str = "softmax"
    """The task of the live environment; "" leaves it out."""

    def run(self) -> None:
        figures = Figures("env")
        loaded = catalog.load(self.tables)
        console.print(f"{len(loaded)} tables, {sum(map(len, loaded))} versions", highlight=False)
        largest = [max(loaded, key=len)]
        for name, rate, target in (
            (f"replay, {BATCH} searches at once", lambda: self.batched(loaded), 1_000_000),
            ("replay, one search", lambda: self.single(loaded), 200_000),
            # Of a single table more stays in the processor's caches.
            ("replay, one search, the largest table only", lambda: self.single(largest), 200_000),
            ("replay, one search, as wrapped by gymnasium.make", lambda: self.single(loaded, True), None),
            ("MaskablePPO on replay, end to end", lambda: self.learning(loaded), 20_000),
        ):
            reached = rate()
            aim = f"≥ {target:,}" if target else "none"
            figures.add(Figure(name, f"{reached:,.0f} steps/s", aim, reached >= (target or 0)))
        if self.live:
            added = 1e3 * self.overhead()
            figures.add(Figure("live: a step beyond its evaluation", f"{added:.2f} ms", "≤ 5 ms", added <= 5))
        figures.print()

    def batched(self, loaded: list[Any]) -> float:
        """Random recorded actions; choosing them is not counted."""
        from ke_gym.envs.batched_replay import BatchedReplayVecEnv

        envs = BatchedReplayVecEnv(BATCH, loaded)
        envs.seed(0)
        envs.reset()
        rng = np.random.default_rng(0)

        def step() -> float:
            chances = np.where(envs.action_masks(), rng.random((BATCH, 25)), -1.0)
            chances[:, -1] = -0.5  # STOP only where nothing else is recorded
            actions = chances.argmax(axis=1)
            start = time.perf_counter()
            envs.step(actions)
            return time.perf_counter() - start

        return BATCH / self.per_call(step)

    def single(self, loaded: list[Any], wrapped: bool = False) -> float:
        """Resets included, in a loop that does nothing else: the random recorded actions are chosen beforehand.

        ``wrapped``: in the wrappers that ``gymnasium.make`` adds, else plain.
        """
        made = make(REPLAY, tables=loaded)
        env = made if wrapped else made.unwrapped
        rng = np.random.default_rng(0)
        _, info = env.reset(seed=0)
        episodes: list[list[int]] = []
        for _ in range(EPISODES):
            actions: list[int] = []
            ended = False
            while not ended:
                legal = np.flatnonzero(info["action_mask"][:-1])
                actions.append(int(legal[int(rng.random() * len(legal))]) if len(legal) else STOP.id)
                _, _, terminated, truncated, info = env.step(actions[-1])
                ended = terminated or truncated
            episodes.append(actions)
            _, info = env.reset()

        def play() -> float:
            env.reset(seed=0)
            start = time.perf_counter()
            for actions in episodes:
                for action in actions:
                    env.step(action)
                env.reset()
            return time.perf_counter() - start

        return sum(map(len, episodes)) / self.per_call(play)

    def per_call(self, step: Callable[[], float]) -> float:
        """Mean seconds of a call (resets fall into single calls, and count), after a quarter of the time to warm up:
        a table is prepared when it is first drawn."""
        times: list[float] = []
        start = time.perf_counter()
        while (now := time.perf_counter()) < start + 1.25 * self.seconds:
            took = step()
            if now > start + 0.25 * self.seconds:
                times.append(took)
        return float(np.mean(times))

    def learning(self, loaded: list[Any]) -> float:
        """Steps a second of MaskablePPO's learning as scripts/train.py does it, validation left out."""
        import torch
        from sb3_contrib import MaskablePPO

        envs = training_envs("maskable_ppo", REPLAY, BATCH, seed=0, tables=loaded, horizon=(20, 50, 100))
        shape = {"n_steps": LEARNED // BATCH, "batch_size": minibatch(LEARNED)}
        model: Any = MaskablePPO("MlpPolicy", envs, device="cpu", seed=0, **shape, **PPO)
        threads = torch.get_num_threads()
        torch.set_num_threads(1)  # as the trainer does
        try:
            model.learn(LEARNED)
            start = time.perf_counter()
            model.learn(12 * LEARNED)
            return 12 * LEARNED / (time.perf_counter() - start)
        finally:
            torch.set_num_threads(threads)

    def overhead(self) -> float:
        """Seconds of a live step beyond the evaluation (and the proposal) itself."""
        (task,) = tasks.resolve(self.live)
        spent: list[float] = []

        class Timed(Evaluator):
            def build(self, candidate: Any) -> Any:
                start = time.perf_counter()
                try:
                    return super().build(candidate)
                finally:
                    spent[-1] += time.perf_counter() - start

            def evaluate(self, candidate: Any, incumbent: Any = None) -> Evaluation:
                before = spent[-1]
                start = time.perf_counter()
                judged = super().evaluate(candidate, incumbent)
                # What it built meanwhile is part of it.
                spent[-1] = before + time.perf_counter() - start
                return judged

        env = make(LIVE, tasks=task, horizon=12, open_evaluator=Timed)
        _, info = env.reset(seed=0)
        inner: Any = env.unwrapped
        propose = inner.episode.case.proposer
        plain, plain_mask = propose.propose, propose.mask

        def timed(call: Callable[..., Any]) -> Callable[..., Any]:
            def wrapped(*arguments: Any) -> Any:
                start = time.perf_counter()
                try:
                    return call(*arguments)
                finally:
                    spent[-1] += time.perf_counter() - start

            return wrapped

        propose.propose, propose.mask = timed(plain), timed(plain_mask)
        rng = np.random.default_rng(0)
        added: list[float] = []
        for _ in range(12):
            legal = np.flatnonzero(info["action_mask"][:-1])
            spent.append(0.0)
            start = time.perf_counter()
            _, _, _, _, info = env.step(int(rng.choice(legal)))
            added.append(time.perf_counter() - start - spent[-1])
        env.close()
        return median(added)

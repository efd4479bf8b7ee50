"""The one class every search policy implements.

``predict`` has the signature of stable-baselines3, with the action mask added as in sb3-contrib, so that
their evaluators work on a bandit and this project's search loop works on a PPO network. ``update`` lets a
policy learn while it searches; policies that don't, inherit the default that does nothing.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar, Self

import numpy as np
from numpy.typing import NDArray

from ke_gym.policies import files
from ke_gym.search.run import Transition
from ke_gym.strategies import ACTIONS, STOP

Observation = Mapping[str, NDArray[np.float32]] | NDArray[np.float32]


class Policy(ABC):
    """Chooses actions (``ke_gym.strategies.ACTIONS``) from an observation and a mask of legal ones.

    Subclasses implement ``choose`` for one environment; ``predict`` also takes a batch of them. Whatever they
    learn lives in attributes named in ``learned``, which is what ``save`` and ``load`` carry (JSON values and
    NumPy arrays). Randomness comes from ``self.rng`` alone. Keyword arguments of the constructor after
    ``seed`` are options: ``ke_gym.policies.make("ucb1:c=0.5")`` sets them by name.
    """

    name: ClassVar[str]
    parent_rule: ClassVar[str] = "best"
    """The rule of ``ke_gym.search.parents`` that this policy is meant to run with."""
    reward: ClassVar[str] = "parent"
    """The reward it learns from: ``"parent"`` (gain over the parent) or ``"best"`` (over the best so far)."""
    pretrained: ClassVar[str | None] = None
    """The shipped file without which it is useless; ``make`` wants that or another trained file."""
    learned: ClassVar[tuple[str, ...]] = ()
    positive: ClassVar[tuple[str, ...]] = ()
    """Options that have to be above 0."""
    unsigned: ClassVar[tuple[str, ...]] = ()
    """Options that have to be at least 0."""

    def __init__(self, seed: int = 0) -> None:
        self.rng = np.random.default_rng(seed)
        self.training = False
        """Set by the trainer: what a search teaches is then kept for the next ones."""
        self.pending = np.zeros(len(ACTIONS), dtype=np.int64)
        """How often each action is under way: chosen, and not yet told of by ``update``."""
        self.trained_on: dict[str, Any] = {}
        """What the trainer says of the training: tables' hashes, steps, environment."""

    @abstractmethod
    def choose(self, observation: Observation, mask: NDArray[np.bool_], deterministic: bool) -> int:
        """One legal action; ``mask`` has shape (25,), and at least STOP is legal."""

    def begin(self) -> None:  # noqa: B027 (optional to override)
        """A new search begins: forget what belongs to the last one."""

    def update(self, transition: Transition) -> None:  # noqa: B027 (optional to override)
        """Learn from one completed step."""

    def launched(self, action: int) -> None:
        """``action`` was chosen and is under way; there may be further choices before it has ``landed``.

        Only loops with several evaluations in flight say so. Policies may count what is pending as a virtual loss, so that
        they don't choose the same again and again before the first answer.
        """
        self.pending[action] += 1

    def landed(self, action: int) -> None:
        """``action`` is no longer under way; its ``update`` follows."""
        self.pending[action] = max(self.pending[action] - 1, 0)

    def reseed(self, seed: int) -> None:
        """Start the random stream anew; everything learned stays."""
        self.rng = np.random.default_rng(seed)

    def predict(
        self,
        observation: Observation,
        state: Any = None,
        episode_start: NDArray[np.bool_] | None = None,
        deterministic: bool = False,
        action_masks: NDArray[np.bool_] | None = None,
    ) -> tuple[NDArray[np.int64], Any]:
        """Actions for one environment (scalar array) or for a batch of N (shape (N,)), and ``state``
        unchanged.

        Without ``action_masks`` every action is legal. What a policy remembers, it keeps in itself:
        evaluators differ in how faithfully they pass ``state`` on.
        """
        if episode_start is not None and np.any(episode_start):
            self.pending[:] = 0
            self.begin()
        if action_masks is None:
            action_masks = np.ones(len(ACTIONS), dtype=np.bool_)
            batch = _batch_size(observation)
            if batch is not None:
                action_masks = np.tile(action_masks, (batch, 1))
        masks = np.asarray(action_masks, dtype=np.bool_)
        if masks.ndim == 1:
            return np.asarray(self._choose(observation, masks, deterministic), dtype=np.int64), state
        actions = [self._choose(_row(observation, i), mask, deterministic) for i, mask in enumerate(masks)]
        return np.asarray(actions, dtype=np.int64), state

    def _choose(self, observation: Observation, mask: NDArray[np.bool_], deterministic: bool) -> int:
        action = int(self.choose(observation, mask, deterministic))
        if not mask[action]:
            raise RuntimeError(f"{self.name} chose {ACTIONS[action].name}, which is masked")
        return action

    def state_dict(self) -> dict[str, Any]:
        """What was learned, and the random state, as JSON values and arrays."""
        return {key: getattr(self, key) for key in self.learned} | {"rng": self.rng.bit_generator.state}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take on what ``state_dict`` gave."""
        for key in self.learned:
            setattr(self, key, state[key])
        self.rng.bit_generator.state = state["rng"]

    @classmethod
    def fault(cls, option: str, value: Any) -> str:
        """What an option has to be and is not; "" if nothing is wrong."""
        if isinstance(value, float) and not math.isfinite(value):
            return "a finite number"
        if option in cls.positive and not value > 0:
            return "above 0"
        return "at least 0" if option in cls.unsigned and not value >= 0 else ""

    def save(self, path: str | Path) -> None:
        """Write the policy to a JSON file that ``ke_gym.policies.load`` reads."""
        files.write(path, self.name, self.trained_on, self.state_dict())

    @classmethod
    def from_file(cls, data: files.PolicyFile) -> Self:
        """The policy that ``save`` wrote; ``UserError`` for one of another version or a damaged one.

        What it learned is of the types and shapes that a new policy has; axes of length 0, and lists, may grow.
        """
        files.check(data)
        policy = cls()
        with files.damage(data):
            files.check_kinds(data.state, policy.state_dict())
            for option in (*cls.positive, *cls.unsigned):
                if fault := option in data.state and cls.fault(option, data.state[option]):
                    raise ValueError(f"{option} is not {fault}")
            policy.load_state_dict(data.state)
        policy.trained_on = data.trained_on
        return policy


def transformations(mask: NDArray[np.bool_]) -> NDArray[np.int64]:
    """The legal actions except STOP, which a policy that never stops early ignores; STOP if it is alone."""
    legal = np.flatnonzero(mask)
    others = legal[legal != STOP.id]
    return others if len(others) else legal


def forced(transition: Transition) -> bool:
    """Whether there was no choice, as with a search's first draft: that says nothing about what to choose."""
    return len(transformations(np.asarray(transition.mask, dtype=np.bool_))) < 2


def _batch_size(observation: Observation) -> int | None:
    """How many environments an observation holds; None for one."""
    first = next(iter(observation.values())) if isinstance(observation, Mapping) else observation
    return first.shape[0] if first.ndim > 1 else None


def _row(observation: Observation, index: int) -> Observation:
    if isinstance(observation, Mapping):
        return {key: value[index] for key, value in observation.items()}
    row: NDArray[np.float32] = observation[index]
    return row

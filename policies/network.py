"""Policies that are trained networks: a multilayer perceptron over the flat observation, run in NumPy.

Stable-baselines3 trains them (``ke_gym.policies.learning``); what is kept is the weights alone. Running one
needs neither torch nor SB3, and its file holds numbers only, so it can be read without trusting its author.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from ke_gym.errors import UserError
from ke_gym.policies import files
from ke_gym.policies.bandit import Scores
from ke_gym.policies.base import Observation, Policy, transformations
from ke_gym.policies.features import SIZE, irrelevance, vector
from ke_gym.strategies import ACTIONS

HIDDEN = (64, 64)
ACTIVATIONS: dict[str, Callable[[Any], Any]] = {"tanh": np.tanh, "relu": lambda x: np.maximum(x, 0.0)}

Layer = list[NDArray[np.float32]]


class NetworkPolicy(Policy):
    """``layers``: [weight (out, in), bias (out,)] of every linear layer, with ``activation`` between them.

    ``weights`` names a policy file to take the network from: this class's own or a kindred one
    (``kindred``). Without it the network is untrained, and nearly uniform.
    """

    reward = "dense"
    kindred: ClassVar[tuple[str, ...]]
    activation: str = "tanh"
    learned = ("layers", "activation", "soft_mask")

    def __init__(self, seed: int = 0, weights: str = "", soft_mask: float = 0.0) -> None:
        super().__init__(seed)
        self.soft_mask = soft_mask
        self.layers: list[Layer] = []
        if weights:
            self._adopt(files.read(weights))
            return
        sizes = (SIZE, *HIDDEN, len(ACTIONS))
        draw = np.random.default_rng(seed)
        for inputs, outputs in zip(sizes, sizes[1:]):
            scale = 0.01 if outputs == len(ACTIONS) else 1.0 / np.sqrt(inputs)
            weight = draw.normal(scale=scale, size=(outputs, inputs)).astype(np.float32)
            self.layers.append([weight, np.zeros(outputs, dtype=np.float32)])

    def _adopt(self, file: files.PolicyFile) -> None:
        if file.policy not in self.kindred:
            raise UserError(
                f"{file.path} holds a {file.policy} policy; {self.name} takes the weights of"
                f" {' or '.join(self.kindred)}"
            )
        with files.damage(file):
            self.layers, self.activation = file.state["layers"], file.state["activation"]
            self._check()
        self.trained_on = file.trained_on

    def _check(self) -> None:
        """``ValueError`` unless the layers map an observation to one value per action."""
        if self.activation not in ACTIVATIONS:
            raise ValueError(f"unknown activation {self.activation!r}")
        size = SIZE
        for weight, bias in self.layers:
            if weight.shape != (len(bias), size):
                raise ValueError(f"a layer of shape {weight.shape} follows one of size {size}")
            size = len(bias)
        if size != len(ACTIONS):
            raise ValueError(f"the network has {size} outputs")

    def outputs(self, observation: Observation) -> Scores:
        """One value per action, shape (25,): logits, or Q-values."""
        x: Any = vector(observation)
        for weight, bias in self.layers[:-1]:
            x = ACTIVATIONS[self.activation](weight @ x + bias)
        weight, bias = self.layers[-1]
        result: Scores = weight @ x + bias
        return result - self.soft_mask * irrelevance(observation) if self.soft_mask else result

    def choose(self, observation: Observation, mask: NDArray[np.bool_], deterministic: bool) -> int:
        return self.pick(self.outputs(observation), transformations(mask), deterministic)

    @abstractmethod
    def pick(self, outputs: Scores, legal: NDArray[np.int64], deterministic: bool) -> int:
        """One of the ``legal`` actions, given the network's outputs."""

    def load_state_dict(self, state: dict[str, Any]) -> None:
        super().load_state_dict(state)
        self._check()


class ActorPolicy(NetworkPolicy):
    """Samples from the softmax of the legal actions' logits (deterministic: the largest)."""

    kindred = ("ppo", "maskable_ppo", "ppo_guided")

    def pick(self, outputs: Scores, legal: NDArray[np.int64], deterministic: bool) -> int:
        logits = outputs[legal]
        if deterministic:
            return int(legal[np.argmax(logits)])
        # Gumbel's trick: one draw per action, no normalization.
        return int(legal[np.argmax(logits + self.rng.gumbel(size=len(legal)))])

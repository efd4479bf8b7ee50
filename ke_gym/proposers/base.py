"""What every proposer implements: (parent, strategy, draw) to a candidate, or a refusal that says why."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray

from ke_gym.candidate import Candidate
from ke_gym.evaluation.evaluation import Evaluation
from ke_gym.strategies import STRATEGIES, Strategy


@dataclass(frozen=True)
class Trial:
    """A child already asked for; ``evaluation`` is None while it is in flight."""

    candidate: Candidate
    evaluation: Evaluation | None


@dataclass(frozen=True)
class Context:
    """What a proposer may know besides the parent: the session's seed, the parent's evaluation, and the
    parent's children by the same strategy, in the order they were asked for."""

    seed: int = 0
    evaluation: Evaluation | None = None
    siblings: tuple[Trial, ...] = ()


@dataclass(frozen=True)
class Proposal:
    """A new candidate and the dollars it cost."""

    candidate: Candidate
    dollars: float = 0.0


@dataclass(frozen=True)
class Refusal:
    """No candidate, and why: the strategy does not apply to this parent, or has nothing new to offer."""

    reason: str
    dollars: float = 0.0


class Proposer(ABC):
    """Turns (parent, strategy, draw) into candidates for one task.

    Deterministic proposers return the same answer for the same arguments; draws number the alternatives of
    one strategy on one parent from 0.
    """

    name: ClassVar[str]
    draws: ClassVar[int] = 1
    """How many draws a session may ask for in a row, when the earlier ones were duplicates."""

    @abstractmethod
    def propose(
        self, parent: Candidate | None, strategy: Strategy, draw: int, context: Context
    ) -> Proposal | Refusal:
        """A candidate made from ``parent`` (None: the reference, with RESTART) by ``strategy``."""

    def mask(self, parent: Candidate) -> NDArray[np.bool_]:
        """Which of the 22 transformations apply to ``parent``, shape (22,); all, unless known better."""
        return np.ones(len(STRATEGIES), dtype=np.bool_)

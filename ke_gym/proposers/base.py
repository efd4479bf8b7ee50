"""What every proposer implements: (parent, strategy, draw) to a candidate, or a refusal that says why."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from numpy.typing import NDArray

from ke_gym.candidate import Candidate
from ke_gym.errors import UserError
from ke_gym.evaluation.evaluation import Evaluation
from ke_gym.proposers.prices import Purse
from ke_gym.strategies import STRATEGIES, Strategy

if TYPE_CHECKING:
    from ke_gym.codegen.features import Features

EditMode = Literal["edit", "rewrite"]
"""How a model may answer: with search/replace edits of the parent, or with a whole module."""
EDIT_MODES: tuple[EditMode, ...] = ("edit", "rewrite")

Kind = Literal[
    "inapplicable", "duplicate",
    "truncated", "declined", "empty", "prose", "edit", "syntax", "contract",
    "rate_limited", "timeout", "unavailable", "rejected", "malformed", "dollars", "cancelled",
]  # fmt: skip
"""Why there is no candidate. The first two need no model; then what is wrong with a model's answer; then what
is wrong with its endpoint, or with the money, or that the search ended first."""
ANSWER_KINDS: tuple[Kind, ...] = ("truncated", "declined", "empty", "prose", "edit", "syntax", "contract")
ENDPOINT_KINDS: tuple[Kind, ...] = ("rate_limited", "timeout", "unavailable", "rejected", "malformed")


@dataclass(frozen=True)
class Trial:
    """A child already asked for; ``evaluation`` is None while it is in flight."""

    candidate: Candidate
    evaluation: Evaluation | None


@dataclass(frozen=True)
class Context:
    """What a proposer may know besides the parent.

    ``siblings`` are the parent's children by the same strategy, in the order they were asked for;
    ``ancestors`` lead from a draft to the parent, which is left out; ``children`` are all that was made from
    the parent and judged; ``leaders`` were the verified best one after the other. ``number`` counts the
    requests of the session; ``edit`` asks for one form of answer, ``model`` for what ``assign`` chose.
    """

    seed: int = 0
    evaluation: Evaluation | None = None
    siblings: tuple[Trial, ...] = ()
    ancestors: tuple[Trial, ...] = ()
    children: tuple[Trial, ...] = ()
    leaders: tuple[Trial, ...] = ()
    number: int = 0
    edit: EditMode | None = None
    model: str = ""


@dataclass(frozen=True)
class Usage:
    """What asking a model took: tokens as its endpoint counts them, seconds from question to answer, which
    knowledge documents the prompt quoted, and how many of the dollars are ``unconfirmed``: an upper bound (prompt and
    longest answer) for calls that ended without an answer, but may be charged."""

    model: str = ""
    calls: int = 0
    prompt_tokens: int = 0
    completion_tokens: int = 0
    seconds: float = 0.0
    documents: tuple[str, ...] = ()
    unconfirmed: float = 0.0

    def plus(self, other: Usage) -> Usage:
        """Both together; the names are the later one's, where it has any."""
        return Usage(
            other.model or self.model,
            self.calls + other.calls,
            self.prompt_tokens + other.prompt_tokens,
            self.completion_tokens + other.completion_tokens,
            self.seconds + other.seconds,
            tuple(dict.fromkeys(self.documents + other.documents)),
            self.unconfirmed + other.unconfirmed,
        )

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> Usage:
        return cls(**{**data, "documents": tuple(data["documents"])})


NOTHING = Usage()


@dataclass(frozen=True)
class Proposal:
    """A new candidate, the dollars it cost, and what a model was asked for it."""

    candidate: Candidate
    dollars: float = 0.0
    usage: Usage = NOTHING


@dataclass(frozen=True)
class Refusal:
    """No candidate, and why: the strategy does not apply to this parent, or has nothing new to offer, or a
    model's answer was no kernel."""

    reason: str
    dollars: float = 0.0
    kind: Kind = "inapplicable"
    usage: Usage = NOTHING

    @property
    def attempt(self) -> bool:
        """Whether a model was asked in vain: it counts against the budget, and may be tried again."""
        return self.kind in ANSWER_KINDS + ENDPOINT_KINDS


class ProposerLost(UserError):
    """The proposer can't go on (its endpoint is gone, its key was refused): a search ends with what it has.

    ``dollars`` and ``usage`` are what the last request cost until then.
    """

    dollars: float = 0.0
    usage: Usage = NOTHING


class OutOfDollars(Exception):
    """What is left of the budget pays for no further question to a model."""


class Proposer(ABC):
    """Turns (parent, strategy, draw) into candidates for one task.

    Deterministic proposers return the same answer for the same arguments; draws number the alternatives of
    one strategy on one parent from 0.
    """

    name: str
    draws: int = 1
    """How many draws a session may ask for in a row, when the earlier ones were duplicates."""
    stochastic: bool = False
    """Whether asking again may bring something else, so that a duplicate or a failure rules nothing out."""

    @abstractmethod
    def propose(
        self, parent: Candidate | None, strategy: Strategy, draw: int, context: Context
    ) -> Proposal | Refusal:
        """A candidate made from ``parent`` (None: the reference, with RESTART) by ``strategy``.

        Called from several threads at once where ``in_flight`` is above 1.
        """

    def mask(self, parent: Candidate) -> NDArray[np.bool_]:
        """Which of the 22 transformations apply to ``parent``, shape (22,); all, unless known better."""
        return np.ones(len(STRATEGIES), dtype=np.bool_)

    @property
    def in_flight(self) -> int:
        """How many proposals may be written side by side; 1 for a proposer that answers at once."""
        return 1

    @property
    def ordered(self) -> bool:
        """Whether proposals are to be taken in the order they were asked for, so that a search repeats."""
        return True

    @property
    def features(self) -> Features | None:
        """The task's graph, where the proposer has captured it anyway."""
        return None

    def fund(self, purse: Purse) -> None:  # noqa: B027
        """A session starts: all that it pays for comes from ``purse``; ``UserError`` if that pays for nothing."""

    def assign(self) -> str:
        """Which model the next request goes to ("": it makes no difference); asked in the search's thread."""
        return ""

    def release(self, model: str) -> None:  # noqa: B027
        """A request for which ``assign`` named ``model`` is written or given up; once for each ``assign``."""

    def learn(self, gain: float, dollars: float, usage: Usage) -> None:  # noqa: B027
        """What became of a request: the log-speedup over the parent, 0 for a failure."""

    def close(self) -> None:  # noqa: B027
        """Give up what is being written, and everything held; harmless when repeated."""

"""Several proposers in one search, each improving on what the others wrote."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from ke_gym.candidate import Candidate
from ke_gym.proposers.base import NOTHING, Context, Proposal, Proposer, Refusal, Usage
from ke_gym.proposers.prices import Purse
from ke_gym.strategies import RESTART, STRATEGIES, Strategy

if TYPE_CHECKING:
    from ke_gym.codegen.features import Features


class Mixed(Proposer):
    """Asks one of ``members`` at random (by the session's seed), of those to which the strategy applies; the next
    one where it has nothing to offer. The first draft is the first member's.
    """

    def __init__(self, members: Sequence[Proposer]) -> None:
        self.members = tuple(members)
        self.name = ",".join(member.name for member in members)
        self.draws = max(member.draws for member in members)
        self.stochastic = any(member.stochastic for member in members)
        self._alone = threading.RLock()
        self._closed = False

    @property
    def in_flight(self) -> int:
        return max(member.in_flight for member in self.members)

    @property
    def ordered(self) -> bool:
        return all(member.ordered for member in self.members)

    def mask(self, parent: Candidate) -> NDArray[np.bool_]:
        mask = np.zeros(len(STRATEGIES), dtype=np.bool_)
        for member in self.members:
            mask |= self._mask(member, parent)
        return mask

    def _mask(self, member: Proposer, parent: Candidate) -> NDArray[np.bool_]:
        if member.in_flight > 1:
            return member.mask(parent)
        with self._alone:
            return member.mask(parent)

    def propose(
        self, parent: Candidate | None, strategy: Strategy, draw: int, context: Context
    ) -> Proposal | Refusal:
        rng = np.random.default_rng((context.seed, context.number, draw))
        order = [self.members[i] for i in rng.permutation(len(self.members))]
        if strategy is RESTART and draw == 0:
            order = list(self.members)
        if parent is not None and not strategy.control:
            order = [m for m in order if self._mask(m, parent)[strategy.id]]
        dollars, usage = 0.0, NOTHING
        refusal = Refusal(f"{strategy.name} does not apply to this kernel")
        for member in order:
            if member.in_flight > 1:
                made = member.propose(parent, strategy, draw, context)
            else:
                with self._alone:
                    if self._closed:  # those that stand in line have no time any more
                        return Refusal("the search ended", dollars, "cancelled", usage)
                    made = member.propose(parent, strategy, draw, context)
            dollars, usage = dollars + made.dollars, usage.plus(made.usage)
            if isinstance(made, Proposal):
                return Proposal(made.candidate, dollars, usage)
            refusal = Refusal(made.reason, dollars, made.kind, usage)
            if made.kind != "inapplicable":
                break
        return refusal

    @property
    def features(self) -> Features | None:
        return next((known for member in self.members if (known := member.features)), None)

    def fund(self, purse: Purse) -> None:
        for member in self.members:
            member.fund(purse)

    def assign(self) -> str:
        return next((model for member in self.members if (model := member.assign())), "")

    def release(self, model: str) -> None:
        for member in self.members:
            member.release(model)

    def learn(self, gain: float, dollars: float, usage: Usage) -> None:
        for member in self.members:
            member.learn(gain, dollars, usage)

    def close(self) -> None:
        self._closed = True
        for member in self.members:
            member.close()

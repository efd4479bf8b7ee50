"""One episode: a search of bounded length, advanced step by step, whoever evaluates."""

from __future__ import annotations

import uuid
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ke_gym.envs.spaces import PARENT_SLOTS, forms, split
from ke_gym.errors import UserError
from ke_gym.evaluation.evaluation import Evaluation
from ke_gym.proposers.base import Proposer, Refusal
from ke_gym.search import reward
from ke_gym.search.budget import Budget
from ke_gym.search.observation import Observation, Surroundings
from ke_gym.search.session import Ask, Session
from ke_gym.search.store import Setting, Store
from ke_gym.search.tree import Node
from ke_gym.strategies import FIX, STOP, STRATEGIES
from ke_gym.tasks import Task

Step = tuple[Observation, float, bool, bool, dict[str, Any]]


@dataclass(frozen=True)
class Case:
    """A task as it can be searched here: where it is evaluated, what a policy sees of that, who proposes."""

    task: Task
    setting: Setting
    surroundings: Surroundings
    proposer: Proposer


@dataclass(frozen=True)
class Rules:
    """What an episode is like: its length in steps, its reward, the parent rule, the action space."""

    horizon: int = 20
    reward: reward.Kind = "best"
    parent_rule: str = "best"
    extended: bool = False
    edits: bool = False

    def __post_init__(self) -> None:
        if self.horizon < 1:
            raise UserError(f"a horizon of {self.horizon} steps is none; give a positive number")
        if self.reward not in reward.KINDS:
            raise UserError(f"reward {self.reward!r} is unknown; choose {', '.join(reward.KINDS)}")


class Episode:
    """``begin`` an action; if that gives an ``Ask``, evaluate it and ``finish`` (or report it ``lost``).

    Every step counts towards the horizon, also one that bought nothing: a policy cannot stall.
    """

    def __init__(self, case: Case, rules: Rules, store: Store, seed: int) -> None:
        self.case, self.rules = case, rules
        self.session = Session(
            store,
            uuid.uuid4().hex[:16],
            case.setting,
            case.proposer,
            budget=Budget(evaluations=rules.horizon),
            seed=seed,
            parent_rule=rules.parent_rule,
            surroundings=case.surroundings,
        )
        self.steps = 0
        self._asked: Ask | None = None
        self._parents: list[Node | None] | None = None
        self.check()

    def observation(self) -> Observation:
        """What a policy sees, in arrays of its own; the budget that is left counts steps, as the horizon does."""
        seen = {name: values.copy() for name, values in self.session.situation().observation.items()}
        seen["history"][0] = 1.0 - self.steps / self.rules.horizon
        return seen

    def mask(self) -> NDArray[np.bool_]:
        """The legal actions of this episode's action space; STOP always is."""
        situation = self.session.situation()
        per_slot = forms(edits=self.rules.edits)
        blocks = np.zeros((forms(self.rules.extended, self.rules.edits), len(STRATEGIES)), dtype=np.bool_)
        for slot, parent in enumerate(self._slots() if self.rules.extended else [situation.parent]):
            legal = situation.mask if slot == 0 else self.session.mask(parent)
            blocks[slot * per_slot : (slot + 1) * per_slot] = legal[: len(STRATEGIES)]
        return np.concatenate([blocks.ravel(), situation.mask[len(STRATEGIES) :]])

    def _slots(self) -> list[Node | None]:
        if self._parents is None:
            own = self.session.situation().parent
            others = [node for node in self.session.tree.correct() if node is not own]
            others.sort(key=lambda node: -node.speedup)
            self._parents = [own, *others[: PARENT_SLOTS - 1]]
        return self._parents

    def begin(self, action: int) -> Ask | Step:
        """Take one step: what is to be evaluated, or the completed step if nothing is."""
        legal = 0 <= action < len(self.mask()) and bool(self.mask()[action])
        slot, plain, edit = split(action, self.rules.extended, self.rules.edits)
        parent = self._slots()[slot] if legal and slot else None
        self.steps += 1
        if not legal:
            return self._step(reward.DUPLICATE_PENALTY, "illegal", reason=f"action {action} is illegal here")
        ask = self.session.ask(plain, parent, edit)
        self._parents = None
        if isinstance(ask, Refusal):
            if plain == STOP.id:
                return self._step(0.0, "stop")
            self.check(ask.reason)
            outcome = ask.kind if ask.attempt else "refused"
            return self._step(reward.refusal(ask.kind), outcome, reason=ask.reason, dollars=ask.dollars)
        self._asked = ask
        if ask.known is None:
            return ask
        # Known from another episode, where it raced another incumbent: only its interval counts here.
        return self.finish(ask.known.replace(gain=None, gain_ci=None, improved=False))

    def finish(self, evaluation: Evaluation) -> Step:
        """Complete the step that asked."""
        ask, self._asked = self._take(), None
        best = self.session.tree.best
        node = self.session.tell(ask, evaluation)
        gain = reward.reward(
            self.rules.reward,
            evaluation,
            parent_speedup=ask.baseline(best),
            best_speedup=best.speedup if best else 1.0,
            became_best=self.session.tree.best is node,
            repair=ask.strategy is FIX,
        )
        return self._step(
            gain,
            evaluation.outcome,
            candidate=node.candidate.id,
            source=node.candidate.source,
            speedup=node.speedup,
            speedup_ci=evaluation.speedup_ci or (0.0, 0.0),
            # One that was known already costs nothing again.
            cost_s=0.0 if ask.known is not None else evaluation.cost.total,
            dollars=ask.dollars,
            reason=evaluation.log,
        )

    def lost(self, reason: str) -> Step:
        """Complete the step whose evaluation was lost: it costs a step and is not recorded as a verdict."""
        ask, self._asked = self._take(), None
        self.session.abandon(ask)
        return self._step(
            0.0, "lost", candidate=ask.candidate.id, source=ask.candidate.source, reason=reason,
            dollars=ask.dollars,
        )  # fmt: skip

    def _take(self) -> Ask:
        if self._asked is None:
            raise RuntimeError("no evaluation was asked for")
        return self._asked

    def check(self, reason: str = "") -> None:
        """``UserError`` if nothing was ever evaluated and nothing but STOP is legal."""
        if not self.session.tree.nodes and np.flatnonzero(self.session.situation().mask).tolist() == [
            STOP.id
        ]:
            why = f": {reason}" if reason else ""
            raise UserError(
                f"task {self.case.task.name}: {self.case.proposer.name} has no legal strategy for it{why}; choose"
                " another task or proposer"
            )

    def info(self, outcome: str = "", **known: Any) -> dict[str, Any]:
        """What a step says besides its observation; the same keys always."""
        best = self.session.tree.best
        return {
            "action_mask": self.mask().astype(np.int8),
            "task": self.case.task.name,
            "outcome": outcome,
            "candidate": "",
            "source": "",
            "speedup": 0.0,
            "speedup_ci": (0.0, 0.0),
            "best_speedup": best.speedup if best else 1.0,
            "cost_s": 0.0,
            "dollars": 0.0,
            "evaluations": len(self.session.tree),
            "reason": "",
            **known,
        }

    def _step(self, value: float, outcome: str, **known: Any) -> Step:
        self._parents = None
        terminated = outcome == "stop"
        truncated = not terminated and self.steps >= self.rules.horizon
        return self.observation(), float(value), terminated, truncated, self.info(outcome, **known)

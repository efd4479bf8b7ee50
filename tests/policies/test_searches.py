"""Policies in real searches of the synthetic problem: their parent rules, budgets and repeatability."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from ke_gym import policies
from ke_gym.candidate import Candidate
from ke_gym.policies import Transition
from ke_gym.policies.ucb1 import UCB1
from ke_gym.proposers.base import Context, Proposal, Refusal
from ke_gym.search import parents
from ke_gym.search.budget import Budget
from ke_gym.search.run import run
from ke_gym.search.session import Session
from ke_gym.search.store import Store
from ke_gym.search.tree import Node, Tree
from ke_gym.strategies import ACTIONS, RESTART, Strategy, get
from ke_gym.testing.policies import observation
from tests.search.fakes import SETTING, FakeProposer, Judge, evaluation, kernel

BUDGET = 30


def search(store: Store, spec: str, session: str) -> Session:
    policy = policies.make(spec, seed=1)
    searching = Session(
        store, session, SETTING, FakeProposer(), budget=Budget(BUDGET), seed=1, parent_rule=policy.parent_rule
    )
    run(searching, policy, Judge(), workers=1)
    return searching


@pytest.mark.parametrize(
    "spec", ["uct", "puct", "islands_map_elites", "kernelband", "linucb:untrained", "maskable_ppo:untrained"]
)
def test_a_search_spends_its_budget_and_repeats_exactly(spec: str, tmp_path: Path) -> None:
    first, second = (
        search(Store(tmp_path / f"{name}.db"), spec, name).tree.nodes.values() for name in ("a", "b")
    )
    assert len(first) == BUDGET
    assert [node.candidate.id for node in first] == [node.candidate.id for node in second]
    assert max(node.speedup for node in first) > 1.0


class Few(FakeProposer):
    """Three drafts, and no more."""

    def propose(
        self, parent: Candidate | None, strategy: Strategy, draw: int, context: Context
    ) -> Proposal | Refusal:
        if strategy is RESTART and draw > 2:
            return Refusal("no draft is left")
        return super().propose(parent, strategy, draw, context)


@pytest.mark.parametrize("seed", range(4))
def test_a_search_goes_on_when_its_rule_wants_a_draft_and_none_is_left(seed: int) -> None:
    policy = policies.make("epsilon_greedy", seed)
    searching = Session(
        Store(":memory:"), "s", SETTING, Few(), budget=Budget(60), seed=seed, parent_rule=policy.parent_rule
    )
    assert run(searching, policy, Judge(), workers=1) == "evaluations"
    assert len(searching.tree) == 60


def grown(*speedups: tuple[int | None, float | None]) -> Tree:
    """A tree of nodes (parent, speedup; None for a failure)."""
    tree = Tree()
    for number, (parent, speedup) in enumerate(speedups):
        candidate = kernel((number, 0, 0, 0), None, get("fuse" if number % 2 else "vectorize"))
        result = evaluation(candidate, speedup, "correct" if speedup else "compile")
        tree.add(Node(number, parent, "fuse" if number % 2 else "vectorize", 0, candidate, result), None)
    return tree


def test_uct_follows_the_best_kernel_below_and_widens_where_it_was_visited() -> None:
    rng = np.random.default_rng(0)
    assert parents.uct(Tree(), {}, rng) is None
    drafts = [(None, 1.0), (None, 1.1), (None, 1.2), (None, 1.05), (None, 1.0)]
    # Draft 1 has a child far ahead of all drafts: max backup leads below it, though 2 is the better draft.
    deep = grown(*drafts, (1, 3.0), (1, 0.9), (5, 3.1))
    chosen = parents.uct(deep, {}, rng)
    assert chosen is deep.nodes[1]  # two children of four visits: fewer than 1.5 sqrt(4)
    below = parents.uct(deep, {1: 2}, rng)
    assert below is not None and below.number in (5, 7)


def test_uct_leaves_failures_alone() -> None:
    rng = np.random.default_rng(0)
    tree = grown((None, 1.5), (None, None), (None, None))
    assert parents.uct(tree, {}, rng) is tree.nodes[0]
    assert parents.uct(grown((None, None), (None, None)), {}, rng) is None


def test_elites_are_the_best_of_each_family_and_size() -> None:
    rng = np.random.default_rng(0)
    assert parents.elites(Tree(), {}, rng) is None
    tree = grown((None, 1.0), (None, 2.0), (None, 1.4), (None, 1.5), (None, None))
    chosen = {parents.elites(tree, {}, rng).number for _ in range(40)}  # type: ignore[union-attr]
    assert chosen == {1, 2}  # the best of fusion, and of vectorization


@pytest.mark.parametrize(
    "spec",
    ["ucb1", "discounted_ucb", "uct", "puct:untrained", "thompson", "beta_thompson", "auc_bandit", "kernelband",
     "linucb:untrained", "lints:untrained"],
)  # fmt: skip
def test_what_is_under_way_is_not_chosen_again_and_again(spec: str) -> None:
    policy, seen = policies.make(spec, 0), observation(np.random.default_rng(0))
    mask = np.zeros(len(ACTIONS), dtype=np.bool_)
    mask[:6] = mask[-1] = True
    for action, gain in enumerate((0.0, 0.0, 0.3, 0.0, 0.0, 0.0)):
        policy.update(Transition(seen, action, gain, seen, False, mask, {"best_gain": gain}))

    def choices() -> list[int]:
        """What is chosen eight times in a row."""
        policy.reseed(1)
        return [int(policy.predict(seen, action_masks=mask)[0]) for _ in range(8)]

    alone, chosen = choices(), []
    policy.reseed(1)
    for _ in range(8):
        chosen.append(int(policy.predict(seen, action_masks=mask)[0]))
        policy.launched(chosen[-1])
    assert chosen.count(2) < alone.count(2)
    for action in chosen:
        policy.landed(action)
    assert not policy.pending.any() and choices() == alone


def test_a_search_says_what_is_under_way(tmp_path: Path) -> None:
    under_way = []

    class Counting(UCB1):
        def launched(self, action: int) -> None:
            super().launched(action)
            under_way.append(int(self.pending.sum()))

    policy = Counting(0)
    searching = Session(Store(tmp_path / "s.db"), "s", SETTING, FakeProposer(), budget=Budget(20), seed=0)
    run(searching, policy, Judge(), workers=3)
    assert max(under_way) == 3 and not policy.pending.any()

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ke_gym import policies
from ke_gym.candidate import Candidate
from ke_gym.errors import UserError
from ke_gym.evaluation.evaluation import Evaluation
from ke_gym.policies.epsilon_greedy import EpsilonGreedy
from ke_gym.proposers.base import Refusal
from ke_gym.search.budget import Budget
from ke_gym.search.parents import ROOT_CAP
from ke_gym.search.run import Transition, Watch, run
from ke_gym.search.session import Ask, Session
from ke_gym.search.store import Store
from ke_gym.search.tree import Node
from ke_gym.strategies import FIX, RESTART, STOP, STRATEGIES, get
from tests.search.fakes import SETTING, FakeProposer, Judge, evaluation, judge


def session(store: Store, name: str = "s", budget: int = 40, seed: int = 0, rule: str = "best") -> Session:
    return Session(
        store,
        name,
        SETTING,
        FakeProposer(),
        budget=Budget(evaluations=budget),
        seed=seed,
        parent_rule=rule,
    )


def trace(searched: Session) -> list[tuple[int, int | None, str, int, str]]:
    return [(n.number, n.parent, n.strategy, n.draw, n.candidate.id) for n in searched.tree]


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path / "store.db")


def search(
    store: Store, policy: str = "epsilon_greedy", workers: int = 2, jitter: float = 0.0, **options: int
) -> Session:
    made = policies.make(policy, seed=3)
    searched = session(store, rule=made.parent_rule, **options)  # type: ignore[arg-type]
    run(searched, made, Judge(jitter), workers=workers)
    return searched


def test_only_drafts_are_legal_before_anything_is_known(store: Store) -> None:
    situation = session(store).situation()
    assert situation.parent is None
    assert np.flatnonzero(situation.mask).tolist() == [RESTART.id, STOP.id]


def test_illegal_actions_and_stop_are_refused_without_cost(store: Store) -> None:
    searched = session(store)
    assert isinstance(searched.ask(get("fuse").id), Refusal)
    assert searched.stopped() is None and searched.spent.evaluations == 0
    assert isinstance(searched.ask(STOP.id), Refusal)
    assert searched.stopped() == "STOP"


@pytest.mark.parametrize(
    ("limiter", "share", "left"),
    [
        ("dram", 0.97, {"dram", "all"}),
        ("compute", 0.97, {"compute", "all"}),
        ("dram", 0.90, None),
        ("l2", 0.97, None),
        ("", 0.0, None),
    ],
)
def test_only_what_relieves_a_unit_at_its_peak_is_legal(
    store: Store, limiter: str, share: float, left: set[str] | None
) -> None:
    searched = session(store)
    ask = searched.ask(RESTART.id)
    assert isinstance(ask, Ask)
    judged = judge(ask.candidate)
    profile = replace(judged.profile, bandwidth_share=share, flops_share=share)
    searched.tell(ask, judged.replace(limiter=limiter, profile=profile))
    situation = searched.situation()
    assert situation.parent is not None
    offered = [s for s in STRATEGIES if searched.proposer.mask(ask.candidate)[s.id]]
    assert [s for s in STRATEGIES if situation.mask[s.id]] == [
        s for s in offered if not left or s.resource in left
    ]
    for strategy in offered:
        if left and strategy.resource not in left:
            assert isinstance(searched.ask(strategy.id), Refusal)
            break
    else:
        assert left is None


def test_a_node_is_durable_the_moment_it_is_told(store: Store) -> None:
    searched = session(store)
    ask = searched.ask(RESTART.id)
    assert isinstance(ask, Ask)
    searched.tell(ask, judge(ask.candidate))
    with Store(store.path) as reader:
        (record,) = reader.nodes("s")
    assert record.candidate == ask.candidate and record.evaluation == judge(ask.candidate)
    assert searched.spent.dollars == pytest.approx(0.01)


def test_duplicates_are_never_asked_twice(store: Store) -> None:
    searched = search(store, "masked_random", budget=120)
    ids = [node.candidate.id for node in searched.tree]
    assert len(ids) == len(set(ids)) == 120


def test_drafts_run_out_instead_of_repeating(store: Store) -> None:
    searched = search(store, "best_of_n", budget=100)
    assert len(searched.tree) == 6
    assert not searched.situation().mask[RESTART.id]


def test_the_same_search_repeats_exactly_whatever_the_threads_do(tmp_path: Path) -> None:
    traces = []
    for jitter in (0.0, 0.004):
        with Store(tmp_path / f"{jitter}.db") as store:
            traces.append(trace(search(store, workers=3, jitter=jitter, budget=50)))
    assert traces[0] == traces[1]


def test_another_seed_searches_differently(tmp_path: Path) -> None:
    with Store(tmp_path / "a.db") as a, Store(tmp_path / "b.db") as b:
        assert trace(search(a, seed=0)) != trace(search(b, seed=1))


def test_a_search_drafts_at_most_as_often_as_the_root_has_room(tmp_path: Path) -> None:
    for seed in range(4):
        with Store(tmp_path / f"{seed}.db") as store:
            made = policies.make("epsilon_greedy", seed=seed)
            searched = session(store, rule=made.parent_rule, budget=60, seed=seed)
            run(searched, made, Judge())
            drafts = [node for node in searched.tree if node.strategy == "RESTART"]
            assert len(searched.tree) == 60 and 1 < len(drafts) <= ROOT_CAP


def test_a_draft_is_paid_for_what_it_adds_to_the_best_so_far(store: Store) -> None:
    class Drafts(EpsilonGreedy):
        def begin(self) -> None:
            super().begin()
            self.rewards: list[float] = []

        def update(self, transition: Transition) -> None:
            self.rewards.append(transition.reward)

    races = iter(((2.0, 1.0), (1.8, 2.0), (2.2, 2.0)))  # speedups of the draft and of its rival
    made, searched = Drafts(), session(store, budget=3)
    learned: list[float] = []
    searched.proposer.learn = lambda gain, dollars, usage: learned.append(gain)  # type: ignore[method-assign]

    def evaluate(candidate: Candidate, rival: Candidate | None) -> Evaluation:
        speedup, other = next(races)
        return evaluation(candidate, speedup, rival=other)

    run(searched, made, evaluate, workers=1)
    assert [node.strategy for node in searched.tree] == ["RESTART"] * 3
    first, slower, faster = made.rewards
    assert first == pytest.approx(np.log(2.0))
    assert slower == pytest.approx(np.log(1.8 / 2.0)) and slower < 0.0
    assert faster == pytest.approx(np.log(2.2 / 2.0))
    assert learned == pytest.approx([first, 0.0, faster])  # and what writes them learns the same


class StopAfter(Watch):
    def __init__(self, count: int) -> None:
        self.count = count

    def told(self, session: Session, node: Node, improved: bool) -> None:
        self.count -= 1
        if self.count == 0:
            raise KeyboardInterrupt


@pytest.mark.parametrize("policy", ["epsilon_greedy", "masked_random"])
def test_an_interrupted_search_continues_as_if_nothing_had_happened(tmp_path: Path, policy: str) -> None:
    with Store(tmp_path / "whole.db") as store:
        whole = trace(search(store, policy, budget=50))
    with Store(tmp_path / "parts.db") as store:
        for stop in (7, 23):
            made = policies.make(policy, seed=3)
            part = session(store, rule=made.parent_rule, budget=50)
            assert run(part, made, Judge(), watch=StopAfter(stop)) == "interrupted"
            assert len(part.tree) == stop
        made = policies.make(policy, seed=3)
        rest, judged = session(store, rule=made.parent_rule, budget=50), Judge()
        assert rest.recorded == 23
        run(rest, made, judged)
        assert trace(rest) == whole
        assert len(judged.judged) == 50 - 23
        assert isinstance(rest.proposer, FakeProposer) and rest.proposer.calls < 60


def test_a_larger_budget_continues_a_finished_search(store: Store) -> None:
    first = trace(search(store, budget=20))
    assert trace(search(store, budget=35))[:20] == first


def test_what_was_searched_in_time_is_there_when_the_time_is_over(store: Store) -> None:
    """Replaying takes none of it: what was found is told again, and nothing more is asked."""
    first = trace(search(store, budget=20))
    made = policies.make("epsilon_greedy", seed=3)
    again = session(store, rule=made.parent_rule, budget=50)
    again.budget = Budget(50, seconds=1e-6)
    judged = Judge()
    assert run(again, made, judged, workers=2) == "seconds"
    assert trace(again) == first and not judged.judged


@pytest.mark.parametrize("kind", ["parent", "best", "dense"])
def test_a_policy_is_paid_as_it_was_trained(store: Store, kind: str) -> None:
    paid: list[tuple[float, float]] = []

    class Paid(EpsilonGreedy):
        reward = kind

        def update(self, transition: Transition) -> None:
            if "best_gain" in transition.info:
                paid.append((transition.reward, transition.info["best_gain"]))

    run(session(store, budget=40), Paid(), Judge())
    assert any(reward != best for reward, best in paid) == (kind != "best")


def test_two_processes_on_one_search_do_not_mix(store: Store) -> None:
    one, other = session(store), session(store)
    mine, theirs = one.ask(RESTART.id), other.ask(RESTART.id)
    assert isinstance(mine, Ask) and isinstance(theirs, Ask)
    theirs = replace(theirs, candidate=Candidate(theirs.candidate.source + "\nother = 1\n"))
    one.tell(mine, judge(mine.candidate))
    with pytest.raises(UserError, match="another process"):
        other.tell(theirs, judge(theirs.candidate))
    (kept,) = store.nodes("s")
    assert kept.evaluation == judge(mine.candidate)


def test_what_was_lost_may_be_made_again(store: Store) -> None:
    searched = session(store)
    ask = searched.ask(RESTART.id)
    assert isinstance(ask, Ask)
    searched.abandon(ask)
    assert ask.candidate.id not in searched._seen


def test_other_settings_do_not_continue_a_recorded_search(store: Store) -> None:
    search(store, "masked_random", budget=5)
    with pytest.raises(UserError, match="seed = 0 and cannot continue with 1"):
        session(store, seed=1)


def test_an_evaluation_is_not_paid_for_again_by_another_search(store: Store) -> None:
    first = search(store, "masked_random", budget=30)
    made, judged = policies.make("masked_random", seed=3), Judge()
    again = session(store, name="other", budget=30)
    run(again, made, judged)
    known = {node.candidate.id for node in first.tree}
    assert not known & set(judged.judged)
    assert len(judged.judged) < len(again.tree) == 30


def test_what_another_search_gained_over_its_rival_is_not_believed(store: Store) -> None:
    first = session(store)
    drafts = [first.ask(RESTART.id) for _ in range(3)]
    told = [ask.candidate for ask in drafts if isinstance(ask, Ask)]
    for candidate, speedup in zip(told[1:], (0.7, 3.0)):
        store.add_evaluation(SETTING, evaluation(candidate, speedup, rival=0.5))

    again = session(store, name="other")
    leader, slower, faster = (again.ask(RESTART.id) for _ in range(3))
    assert isinstance(leader, Ask) and isinstance(slower, Ask) and isinstance(faster, Ask)
    again.tell(leader, evaluation(leader.candidate, 2.0))
    for ask, leads in ((slower, False), (faster, True)):
        assert ask.known is not None
        assert (ask.known.gain, ask.known.gain_ci, ask.known.improved) == (None, None, False)
        assert (again.tell(ask, ask.known) is again.tree.best) is leads


def test_an_outdated_rival_is_the_best_at_the_time_of_asking(store: Store) -> None:
    searched = session(store)
    first, second = searched.ask(RESTART.id), searched.ask(RESTART.id)
    assert isinstance(first, Ask) and isinstance(second, Ask)
    assert first.rival is None and second.rival is None
    assert first.candidate.id != second.candidate.id


def test_a_failed_draft_can_be_repaired_once_at_a_time(store: Store) -> None:
    searched = session(store)
    ask = searched.ask(RESTART.id)
    assert isinstance(ask, Ask)
    failed = Evaluation("fake", "cpu", "cpp", ask.candidate.id, "compile")
    searched.tell(ask, failed)
    assert searched.situation().mask[FIX.id]
    repair = searched.ask(FIX.id)
    assert isinstance(repair, Ask) and repair.parent is not None and repair.parent.number == 0
    assert not searched.situation().mask[FIX.id]


@pytest.mark.parametrize("rule", ["best", "weighted", "root", "epsilon_greedy"])
def test_every_parent_rule_fills_its_budget_or_runs_out(store: Store, rule: str) -> None:
    made = policies.make("masked_random", seed=1)
    searched = session(store, rule=rule, budget=60)
    reason = run(searched, made, Judge())
    assert (reason, len(searched.tree)) == ("evaluations", 60) or reason == "nothing left to try"


class Late(Future[Any]):
    """Is done from when somebody, who has waited in vain, asks whether it is."""

    def __init__(self, result: Any) -> None:
        super().__init__()
        self._later = [result]

    def done(self) -> bool:
        if self._later:
            self.set_result(self._later.pop())
        return super().done()


def test_an_evaluation_may_be_over_just_when_the_patience_is(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[Late] = []

    class Pool(ThreadPoolExecutor):
        def submit(self, do: Callable[..., Any], /, *arguments: Any, **_: Any) -> Late:
            made.append(Late(do(*arguments)))
            return made[-1]

    class Asking(Watch):
        def tick(self, session: Session) -> None:
            made[-1].done()

    monkeypatch.setitem(run.__globals__, "ThreadPoolExecutor", Pool)
    searched = session(store, budget=2)
    assert run(searched, policies.make("masked_random"), Judge(), workers=1, watch=Asking()) == "evaluations"
    assert len(searched.tree) == len(made) == 2


def test_a_lost_evaluator_ends_the_search_but_keeps_what_was_told(store: Store) -> None:
    def lost(candidate: object, rival: object) -> Evaluation:
        raise RuntimeError("the machine is gone")

    searched = session(store)
    ask = searched.ask(RESTART.id)
    assert isinstance(ask, Ask)
    searched.tell(ask, judge(ask.candidate))
    with pytest.raises(RuntimeError, match="gone"):
        run(searched, policies.make("masked_random"), lost)
    assert len(store.nodes("s")) >= 1 and store.nodes("s")[0].evaluation is not None

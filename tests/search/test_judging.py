"""What the main job adds to a search: no binary is judged twice, and the winner is measured once more."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from ke_gym import policies
from ke_gym.candidate import Candidate
from ke_gym.evaluation.evaluation import Evaluation
from ke_gym.evaluation.evaluator import Evaluator
from ke_gym.job import FINALISTS, confirm_best, remembering
from ke_gym.report import svg, words
from ke_gym.search.budget import Budget
from ke_gym.search.run import Watch, run
from ke_gym.search.session import Session
from ke_gym.search.store import Store
from ke_gym.search.tree import Node
from tests.search.fakes import SETTING, FakeProposer, Judge, evaluation


def searched(tmp_path: Path) -> Session:
    session = Session(
        Store(tmp_path / "store.db"), "s", SETTING, FakeProposer(), budget=Budget(evaluations=30)
    )
    run(session, policies.make("masked_random", seed=1), Judge())
    assert len(session.tree.correct()) > FINALISTS + 2
    return session


@dataclass
class Remeasurer:
    """An evaluator for finished searches: the first ``failing`` measurements fail, later ones say 1.5x."""

    failing: int
    measured: list[str] = field(default_factory=list)
    fastest: str = ""
    """The candidate that is ahead of any other in a race of two."""

    raced: list[str] = field(default_factory=list)
    """The rivals in such races."""

    def ahead(self, candidate: Candidate, rival: Candidate) -> bool:
        self.raced.append(rival.id)
        return candidate.id == self.fastest

    def evaluate(self, candidate: Candidate, rival: Candidate | None = None) -> Evaluation:
        assert rival is None
        self.measured.append(candidate.id)
        if len(self.measured) <= self.failing:
            return evaluation(candidate, None, "correctness")
        return evaluation(candidate, 1.5)

    final = evaluate


def confirm(session: Session, evaluator: Any, watch: Watch | None = None) -> None:
    confirm_best(session, cast(Evaluator, evaluator), watch or Watch())


def test_the_winner_carries_its_last_measurement(tmp_path: Path) -> None:
    session, evaluator = searched(tmp_path), Remeasurer(failing=0)
    champion = session.tree.best
    confirm(session, evaluator)
    best = session.tree.best
    assert champion is not None and best is not None
    assert (best.number, best.speedup) == (champion.number, 1.5)
    assert evaluator.measured == [champion.candidate.id]


def test_of_versions_that_are_level_the_one_ahead_in_a_longer_race_is_reported_as_measured_then(
    tmp_path: Path,
) -> None:
    session = searched(tmp_path)
    champion = session.tree.best
    assert champion is not None
    # A version whose short race showed a lead, but none beyond the margin.
    other = max((n for n in session.tree.correct() if n is not champion), key=lambda node: node.speedup)
    level = replace(other, evaluation=evaluation(other.candidate, 1.005 * champion.speedup))
    session.tree.nodes[level.number] = level
    behind = Remeasurer(failing=0)
    confirm(session, behind)
    assert session.tree.best is not None and session.tree.best.number == champion.number
    evaluator = Remeasurer(failing=0, fastest=level.candidate.id)
    session.tree.best = champion
    confirm(session, evaluator)
    assert (session.tree.best.number, session.tree.best.speedup) == (level.number, 1.5)
    assert evaluator.measured == [level.candidate.id]


def test_who_loses_its_place_to_a_version_that_fails_then_gets_it_back(tmp_path: Path) -> None:
    session = searched(tmp_path)
    champion = session.tree.best
    assert champion is not None
    lucky = sorted((n for n in session.tree.correct() if n is not champion), key=lambda node: -node.speedup)
    for k, node in enumerate(lucky[:4]):  # faster by single measurements, all four
        flattered = evaluation(node.candidate, (1.04 - 0.01 * k) * champion.speedup)
        session.tree.nodes[node.number] = replace(node, evaluation=flattered)
    evaluator = Remeasurer(failing=1, fastest=lucky[0].candidate.id)
    confirm(session, evaluator)
    assert evaluator.measured == [lucky[0].candidate.id, champion.candidate.id]
    assert session.tree.best is not None and session.tree.best.number == champion.number
    assert evaluator.raced.count(champion.candidate.id) == 1  # the others raced who had its place


def test_versions_of_one_binary_race_once(tmp_path: Path) -> None:
    session = searched(tmp_path)
    champion = session.tree.best
    assert champion is not None
    twins = [node for node in session.tree.correct() if node is not champion][:2]
    for node in twins:
        same = evaluation(node.candidate, 1.02 * champion.speedup).replace(binary="same")
        session.tree.nodes[node.number] = replace(node, evaluation=same)
    evaluator = Remeasurer(failing=0)
    confirm(session, evaluator)
    assert evaluator.raced == [champion.candidate.id]


def test_a_winner_that_fails_gives_way_to_the_next_fastest(tmp_path: Path) -> None:
    session, evaluator = searched(tmp_path), Remeasurer(failing=1)
    champion = session.tree.best
    assert champion is not None
    others = [node for node in session.tree.correct() if node is not champion]
    confirm(session, evaluator)
    best = session.tree.best
    assert best is not None and best.number == max(others, key=lambda node: node.speedup).number
    assert not session.tree.nodes[champion.number].correct
    assert champion.number not in [leader.number for leader in session.tree.leaders]


def test_when_no_finalist_is_confirmed_nothing_is_best(tmp_path: Path) -> None:
    session, evaluator = searched(tmp_path), Remeasurer(failing=1000)
    confirm(session, evaluator)
    assert len(evaluator.measured) == FINALISTS
    assert session.tree.best is None
    assert words.why(session.tree) == [] and "svg" in svg.progress(session.tree) + svg.search_tree(
        session.tree
    )


def test_a_failed_winner_is_not_reported_when_the_next_measurement_is_interrupted(tmp_path: Path) -> None:
    class Interrupt(Watch):
        def confirming(self, session: Session, node: Node) -> None:
            if evaluator.measured:
                raise KeyboardInterrupt

    session, evaluator = searched(tmp_path), Remeasurer(failing=1)
    with pytest.raises(KeyboardInterrupt):
        confirm(session, evaluator, Interrupt())
    assert session.tree.best is None


class Twins:
    """An evaluator to which all sources are one binary; the first evaluation waits for the second build."""

    def __init__(self, broken: bool = False) -> None:
        self.broken = broken
        self.evaluated: list[str] = []
        self._builds = 0
        self._both = threading.Event()
        self._lock = threading.Lock()

    def build(self, candidate: Candidate) -> SimpleNamespace:
        with self._lock:
            self._builds += 1
            if self._builds == 2:
                self._both.set()
        return SimpleNamespace(binary_id="same")

    def evaluate(self, candidate: Candidate, rival: Candidate | None = None) -> Evaluation:
        assert self._both.wait(300)
        self.evaluated.append(candidate.id)
        if self.broken:
            raise RuntimeError("the machine is gone")
        return evaluation(candidate, 2.0)


def test_twins_in_flight_are_judged_once(tmp_path: Path) -> None:
    twins = Twins()
    candidates = [Candidate("GENES = [1]"), Candidate("GENES = [2]")]
    with Store(tmp_path / "store.db") as store, ThreadPoolExecutor(2) as pool:
        evaluate = remembering(store, SETTING, cast(Evaluator, twins))
        judged = list(pool.map(lambda candidate: evaluate(candidate, None), candidates))
    assert len(twins.evaluated) == 1
    assert [each.candidate for each in judged] == [candidate.id for candidate in candidates]
    assert [each.speedup for each in judged] == [2.0, 2.0]
    (twin,) = (each for each in judged if each.candidate not in twins.evaluated)
    assert twin.gain is None and not twin.improved  # the same binary is no gain over itself


def test_a_lost_evaluator_is_lost_to_both_twins(tmp_path: Path) -> None:
    candidates = [Candidate("GENES = [1]"), Candidate("GENES = [2]")]
    with Store(tmp_path / "store.db") as store, ThreadPoolExecutor(2) as pool:
        evaluate = remembering(store, SETTING, cast(Evaluator, Twins(broken=True)))
        futures = [pool.submit(evaluate, candidate, None) for candidate in candidates]
        for future in futures:
            with pytest.raises(RuntimeError, match="gone"):
                future.result(timeout=300)


def test_the_first_candidate_is_judged_alone_so_that_the_others_have_something_to_beat(
    tmp_path: Path,
) -> None:
    session = Session(
        Store(tmp_path / "store.db"), "s", SETTING, FakeProposer(), budget=Budget(evaluations=12)
    )
    judge, known = Judge(), []

    def evaluate(candidate: Candidate, rival: Candidate | None) -> Evaluation:
        known.append((len(session.tree), rival))
        return judge(candidate, rival)

    run(session, policies.make("masked_random", seed=1), evaluate, workers=4)
    (told, first), *rest = known
    assert (told, first) == (0, None) and len(known) == 12
    assert all(told > 0 for told, _ in rest)


def test_no_evaluation_begins_once_the_seconds_are_said_to_be_over(tmp_path: Path) -> None:
    session = Session(
        Store(tmp_path / "store.db"), "s", SETTING, FakeProposer(), budget=Budget(evaluations=12)
    )
    judge = Judge()

    class Over(Watch):
        def told(self, session: Session, node: Node, improved: bool) -> None:
            if len(session.tree) == 3:
                session.stop_reason = "seconds"

    assert run(session, policies.make("masked_random", seed=1), judge, workers=1, watch=Over()) == "seconds"
    assert len(session.tree) == 3

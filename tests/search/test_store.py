from __future__ import annotations

import os
import signal
import sqlite3
import subprocess
import sys
import textwrap
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from ke_gym.candidate import Candidate
from ke_gym.errors import UserError
from ke_gym.search import store as store_module
from ke_gym.search.store import SCHEMA_VERSION, NodeRecord, Setting, Store
from tests.search.fakes import SETTING, evaluation

FIXTURES = Path(__file__).parent / "fixtures"


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path / "store.db")


def test_a_candidate_comes_back_as_it_was(store: Store) -> None:
    candidate = Candidate("GENES = [1]  # note", "cpp", "p" * 16, "fuse", "rewriter")
    store.add_candidate(candidate)
    store.add_candidate(replace(candidate, proposer="someone else"))
    assert store.candidate(candidate.id) == candidate
    assert store.candidate("unknown") is None


class Interrupted(sqlite3.Connection):
    """A connection on which Ctrl-C comes right after a statement that begins so."""

    after = ""

    def execute(self, statement: str, *values: Any) -> sqlite3.Cursor:
        done = super().execute(statement, *values)
        if self.after and statement.startswith(self.after):
            self.after = ""
            raise KeyboardInterrupt
        return done


@pytest.mark.parametrize(("after", "kept"), [("BEGIN", False), ("INSERT", False), ("COMMIT", True)])
def test_ctrl_c_in_a_transaction_leaves_none_open(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, after: str, kept: bool
) -> None:
    connect = sqlite3.connect
    monkeypatch.setattr(sqlite3, "connect", lambda *a, **k: connect(*a, **k, factory=Interrupted))
    candidate, other = Candidate("GENES = [1]"), Candidate("GENES = [2]")
    with Store(tmp_path / "store.db") as store:
        monkeypatch.setattr(store._db, "after", after)
        with pytest.raises(KeyboardInterrupt):
            store.add_candidate(candidate)
        store.add_candidate(other)
        assert store.candidate(other.id) == other
        assert (store.candidate(candidate.id) == candidate) == kept


def test_an_evaluation_is_found_by_candidate_and_by_binary(store: Store) -> None:
    judged = evaluation(Candidate("GENES = [1]"), 1.5)
    store.add_evaluation(SETTING, judged)
    assert store.evaluation(SETTING, judged.candidate) == judged
    assert store.evaluation_of_binary(SETTING, judged.binary) == judged
    assert store.evaluation_of_binary(SETTING, "") is None
    assert store.evaluations(SETTING.task) == [judged]


@pytest.mark.parametrize(
    "change",
    [
        {"task": "u" * 16},
        {"target": "cuda"},
        {"machine": "another"},
        {"baseline": "compile"},
        {"threads": 2},
        {"harness": 99},
    ],
)
def test_an_evaluation_of_another_setting_is_not_reused(store: Store, change: dict[str, object]) -> None:
    judged = evaluation(Candidate("GENES = [1]"), 1.5)
    store.add_evaluation(SETTING, judged)
    other: Setting = replace(SETTING, **change)  # type: ignore[arg-type]
    assert store.evaluation(other, judged.candidate) is None


def test_the_first_evaluation_stays(store: Store) -> None:
    first = evaluation(Candidate("GENES = [1]"), 1.5)
    store.add_evaluation(SETTING, first)
    store.add_evaluation(SETTING, replace(first, speedup=9.0))
    assert store.evaluation(SETTING, first.candidate) == first


def test_an_evaluation_made_again_takes_the_place_of_the_first(store: Store) -> None:
    first = evaluation(Candidate("GENES = [1]"), 1.5)
    store.add_evaluation(SETTING, first)
    store.add_evaluation(SETTING, replace(first, speedup=9.0), replace=True)
    assert [one.speedup for one in store.evaluations(SETTING.task)] == [9.0]


def test_artifacts_come_back_byte_for_byte(store: Store) -> None:
    data = bytes(range(256)) * 100
    store.add_artifact("a1", data)
    assert store.artifact("a1") == data
    assert store.artifact("a2") is None


def test_a_recorded_search_keeps_the_exact_text_of_its_candidates(store: Store) -> None:
    one, two = Candidate("GENES = [1]  # plan a"), Candidate("GENES = [1]  # plan b")
    assert one.id == two.id
    for name, candidate in [("s1", one), ("s2", two)]:
        store.open_session(name, SETTING.task, {})
        store.asked(name, NodeRecord(0, None, "fuse", 0, candidate, "", 0.0, None))
    records = [record for name in ("s1", "s2") for record in store.nodes(name)]
    texts = [record.candidate.source for record in records if record.candidate]
    assert texts == [one.source, two.source]


OLD = replace(SETTING, harness=1)  # as in the fixture


def test_an_older_store_is_brought_forward_with_everything_in_it(tmp_path: Path) -> None:
    path = tmp_path / "old.db"
    with sqlite3.connect(path) as db:
        db.executescript((FIXTURES / "store_v1.sql").read_text())
    for _ in range(2):
        with Store(path) as store:
            kept = store.evaluation(OLD, "c1")
            assert kept is not None and kept.speedup == 1.5
            store.open_session("s", SETTING.task, {"seed": 1})
            assert store.session_settings("s") == {"seed": 1}
    with sqlite3.connect(path) as db:
        assert db.execute("PRAGMA user_version").fetchone() == (SCHEMA_VERSION,)


def test_a_migration_that_dies_half_way_leaves_the_old_store(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "old.db"
    with sqlite3.connect(path) as db:
        db.executescript((FIXTURES / "store_v1.sql").read_text())
    broken = (*store_module.MIGRATIONS[:-1], store_module.MIGRATIONS[-1] + "; THIS IS NO SQL")
    with monkeypatch.context() as patch:
        patch.setattr(store_module, "MIGRATIONS", broken)
        with pytest.raises(UserError):
            Store(path)
    with Store(path) as store:
        assert store.evaluation(OLD, "c1") is not None
        store.open_session("s", SETTING.task, {})


def test_a_store_of_a_newer_version_is_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "new.db"
    with sqlite3.connect(path) as db:
        db.execute(f"PRAGMA user_version = {SCHEMA_VERSION + 1}")
    with pytest.raises(UserError, match="upgrade ke-gym"):
        Store(path)


def test_what_is_no_store_is_refused_and_left_as_it_was(tmp_path: Path) -> None:
    path = tmp_path / "notes.db"
    path.write_text("these are my notes, not a database" * 50)
    with pytest.raises(UserError, match="not a store"):
        Store(path)
    assert path.read_text().startswith("these are my notes")


def test_the_home_folder_can_be_chosen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KE_GYM_HOME", str(tmp_path / "here"))
    with Store() as store:
        assert store.path == tmp_path / "here" / "store.db" and store.path.exists()


def test_a_home_that_cannot_be_written_is_said_so(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="KE_GYM_HOME"):
        Store(tmp_path / "file" / "store.db")


WRITER = """
    import sys
    from ke_gym.search.budget import Budget
    from ke_gym.search.session import Session
    from ke_gym.search.store import Store
    from tests.search.fakes import SETTING, FakeProposer, judge
    from ke_gym.strategies import RESTART

    session = Session(Store(sys.argv[1]), "s", SETTING, FakeProposer(), budget=Budget(evaluations=10_000))
    number = 0
    while True:
        mask = session.situation().mask
        action = RESTART.id if number < 4 else [a for a in mask.nonzero()[0] if a < 24][number % 3]
        ask = session.ask(action)
        if hasattr(ask, "candidate"):
            session.tell(ask, judge(ask.candidate))
            print(ask.number, ask.candidate.id, flush=True)
            number += 1
"""


def test_kill_9_loses_at_most_the_evaluation_in_flight(tmp_path: Path) -> None:
    path, told = tmp_path / "store.db", []
    root = Path(__file__).parents[2]
    child = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(WRITER), str(path)],
        stdout=subprocess.PIPE,
        text=True,
        cwd=root,
        env=os.environ | {"PYTHONPATH": str(root)},
    )
    assert child.stdout is not None
    for line in child.stdout:
        told.append(tuple(line.split()))
        if len(told) == 40:
            os.kill(child.pid, signal.SIGKILL)
    child.wait()
    # What was printed before the signal arrived had been told before it was printed.
    assert len(told) >= 40
    with Store(path) as store:
        nodes = {str(node.number): node for node in store.nodes("s")}
    for number, candidate_id in told:
        node = nodes[number]
        assert node.evaluation is not None and node.candidate is not None
        assert node.candidate.id == candidate_id
    unfinished = [n for n in nodes.values() if n.candidate is not None and n.evaluation is None]
    assert len(unfinished) <= 1
    with sqlite3.connect(path) as db:
        assert db.execute("PRAGMA integrity_check").fetchone() == ("ok",)

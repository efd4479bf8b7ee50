"""The Store: one SQLite file that remembers tasks, candidates, artifacts, evaluations and searches.

Everything is content-addressed, so recording the same thing twice changes nothing, and an evaluation is paid
once per machine. Write-ahead logging makes every committed transaction survive ``kill -9``; SQLite recovers
by itself when the file is next opened. Only the trusted process writes here: candidates never see the file.
"""

from __future__ import annotations

import json
import sqlite3
import threading
import time
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Literal, Self

from ke_gym.candidate import Candidate
from ke_gym.errors import UserError
from ke_gym.evaluation.evaluation import HARNESS_VERSION, Evaluation
from ke_gym.evaluation.record import home
from ke_gym.evaluation.selfcheck import Proof
from ke_gym.proposers.base import NOTHING, Usage
from ke_gym.proposers.warm import Record
from ke_gym.tasks import Task

if TYPE_CHECKING:
    from ke_gym.codegen.features import Features

# One script per schema version; a database at version v is brought forward by MIGRATIONS[v:].
MIGRATIONS = (
    """
    CREATE TABLE tasks (
        id TEXT PRIMARY KEY, name TEXT NOT NULL, family TEXT NOT NULL, source TEXT NOT NULL, created REAL NOT
        NULL
    ) WITHOUT ROWID;
    CREATE TABLE candidates (
        id TEXT PRIMARY KEY, language TEXT NOT NULL, source TEXT NOT NULL, parent TEXT, strategy TEXT,
        proposer TEXT, created REAL NOT NULL
    ) WITHOUT ROWID;
    CREATE TABLE artifacts (id TEXT PRIMARY KEY, data BLOB NOT NULL);
    CREATE TABLE evaluations (
        id INTEGER PRIMARY KEY,
        task TEXT NOT NULL, candidate TEXT NOT NULL, binary TEXT NOT NULL,
        target TEXT NOT NULL, machine TEXT NOT NULL, baseline TEXT NOT NULL, threads INTEGER NOT NULL,
        harness INTEGER NOT NULL,
        outcome TEXT NOT NULL, speedup REAL, data TEXT NOT NULL, created REAL NOT NULL,
        UNIQUE (task, candidate, target, machine, baseline, threads, harness)
    );
    CREATE INDEX evaluations_by_binary ON evaluations (binary, task) WHERE binary != '';
    """,
    """
    CREATE TABLE sessions (
        id TEXT PRIMARY KEY, task TEXT NOT NULL, settings TEXT NOT NULL, seconds REAL NOT NULL DEFAULT 0,
        created REAL NOT NULL
    ) WITHOUT ROWID;
    CREATE TABLE nodes (
        session TEXT NOT NULL REFERENCES sessions (id), number INTEGER NOT NULL,
        parent INTEGER, strategy TEXT NOT NULL, draw INTEGER NOT NULL,
        candidate TEXT, source BLOB, refusal TEXT NOT NULL, dollars REAL NOT NULL, evaluation TEXT,
        PRIMARY KEY (session, number)
    ) WITHOUT ROWID;
    """,
    # What a language model was asked: why it brought nothing (a proposer's ``Kind``), and its ``Usage`` as JSON.
    """
    ALTER TABLE nodes ADD COLUMN kind TEXT NOT NULL DEFAULT '';
    ALTER TABLE nodes ADD COLUMN usage TEXT;
    """,
    # What came of the self-check of a user's own task.
    """
    CREATE TABLE proofs (
        task TEXT NOT NULL, machine TEXT NOT NULL, harness INTEGER NOT NULL, data TEXT NOT NULL, created REAL NOT
        NULL, PRIMARY KEY (task, machine, harness)
    ) WITHOUT ROWID;
    """,
    # A task's captured graph on one kind of target (``codegen.features.Features`` as JSON).
    """
    CREATE TABLE features (
        task TEXT NOT NULL, target TEXT NOT NULL, data TEXT NOT NULL, PRIMARY KEY (task, target)
    ) WITHOUT ROWID;
    """,
    # What models were paid for besides the proposals in nodes; ``usage`` as there.
    """
    CREATE TABLE expenses (
        id INTEGER PRIMARY KEY, session TEXT NOT NULL REFERENCES sessions (id), purpose TEXT NOT NULL,
        dollars REAL NOT NULL, usage TEXT NOT NULL, created REAL NOT NULL
    );
    CREATE INDEX expenses_by_session ON expenses (session);
    """,
)
SCHEMA_VERSION = len(MIGRATIONS)


@dataclass(frozen=True)
class Setting:
    """What an evaluation depends on besides the candidate: two evaluations in one setting are comparable."""

    task: str
    target: str
    machine: str
    baseline: str
    threads: int
    harness: int = HARNESS_VERSION


Purpose = Literal["choices", "unused", "lessons"]


@dataclass(frozen=True)
class NodeRecord:
    """One row of a recorded search: an ask, and what it was told (None: it was in flight at the end)."""

    number: int
    parent: int | None
    strategy: str
    draw: int
    candidate: Candidate | None
    refusal: str
    dollars: float
    evaluation: Evaluation | None
    kind: str = ""
    usage: Usage = NOTHING


@dataclass(frozen=True)
class Expense:
    """Dollars of a search that brought no proposal: ``purpose`` is "choices" (a model was asked for strategies),
    "unused" (it was still writing when the search ended) or "lessons"."""

    purpose: Purpose
    dollars: float
    usage: Usage


class Store:
    """The database at ``path`` (default: ``home()/store.db``), created or migrated when opened.

    Thread-safe; several processes may share one file. Raises ``UserError`` for a file that cannot be written,
    is no database, or was written by a newer version.
    """

    def __init__(self, path: str | Path | None = None) -> None:
        self.path = Path(path) if path is not None else home() / "store.db"
        self._lock = threading.RLock()
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._db = sqlite3.connect(
                self.path, timeout=60, isolation_level=None, check_same_thread=False, cached_statements=256
            )
            self._db.execute("PRAGMA journal_mode = WAL")
            self._db.execute("PRAGMA synchronous = NORMAL")
            self._migrate()
        except (OSError, sqlite3.OperationalError) as error:
            raise UserError(
                f"the store {self.path} cannot be opened for writing ({error}); set KE_GYM_HOME to a folder"
                " that can be written"
            ) from error
        except sqlite3.DatabaseError as error:
            raise UserError(
                f"{self.path} is not a store ({error}); move it away to start a new one"
            ) from error

    def _migrate(self) -> None:
        with self._transaction() as db:
            (version,) = db.execute("PRAGMA user_version").fetchone()
            if version > SCHEMA_VERSION:
                raise UserError(
                    f"the store {self.path} has schema version {version} and this program knows"
                    f" {SCHEMA_VERSION}; upgrade ke-gym or set KE_GYM_HOME to another folder"
                )
            for script in MIGRATIONS[version:]:
                # Not executescript: it would commit, and a crash could leave half a migration.
                for statement in script.split(";"):
                    if statement.strip():
                        db.execute(statement)
            db.execute(f"PRAGMA user_version = {SCHEMA_VERSION}")

    @contextmanager
    def _transaction(self) -> Iterator[sqlite3.Connection]:
        with self._lock:
            try:
                self._db.execute("BEGIN IMMEDIATE")
                yield self._db
                self._db.execute("COMMIT")
            except BaseException:
                if self._db.in_transaction:  # Ctrl-C may come before it began, or once it has ended
                    self._db.execute("ROLLBACK")
                raise

    def _rows(self, query: str, *values: Any) -> list[tuple[Any, ...]]:
        with self._lock:
            return self._db.execute(query, values).fetchall()

    # Tasks, candidates, artifacts -------------------------------------------------------------------------

    def add_task(self, task: Task) -> None:
        """Remember the task; its ``id`` is the hash of what it is."""
        with self._transaction() as db:
            db.execute(
                "INSERT OR IGNORE INTO tasks VALUES (?, ?, ?, ?, ?)",
                (task.id, task.name, task.family, task.source, time.time()),
            )

    def add_features(self, task_id: str, target: str, features: Features) -> None:
        """Remember what the task's graph is made of on this kind of target."""
        with self._transaction() as db:
            db.execute(
                "INSERT OR REPLACE INTO features VALUES (?, ?, ?)", (task_id, target, features.to_json())
            )

    def features(self, task_id: str, target: str) -> Features | None:
        """What ``add_features`` was given; None if nothing was, or by another version."""
        rows = self._rows("SELECT data FROM features WHERE task = ? AND target = ?", task_id, target)
        return _features(rows[0][0]) if rows else None

    def add_candidate(self, candidate: Candidate) -> None:
        """Remember the candidate; the first parent and strategy that led to it are the ones kept."""
        with self._transaction() as db:
            _insert_candidate(db, candidate)

    def candidate(self, candidate_id: str) -> Candidate | None:
        rows = self._rows(
            "SELECT source, language, parent, strategy, proposer FROM candidates WHERE id = ?", candidate_id
        )
        if not rows:
            return None
        source, language, parent, strategy, proposer = rows[0]
        return Candidate(source, language=language, parent=parent, strategy=strategy, proposer=proposer)

    def add_artifact(self, artifact_id: str, data: bytes) -> None:
        """Remember the bytes of an artifact (binaries and plans), compressed."""
        with self._transaction() as db:
            db.execute("INSERT OR IGNORE INTO artifacts VALUES (?, ?)", (artifact_id, zlib.compress(data, 1)))

    def artifact(self, artifact_id: str) -> bytes | None:
        rows = self._rows("SELECT data FROM artifacts WHERE id = ?", artifact_id)
        return zlib.decompress(rows[0][0]) if rows else None

    # Evaluations ------------------------------------------------------------------------------------------

    def add_evaluation(self, setting: Setting, evaluation: Evaluation, replace: bool = False) -> None:
        """Remember an evaluation; the first one of a candidate in a setting stays, unless told to ``replace`` it."""
        with self._transaction() as db:
            _insert_evaluation(db, setting, evaluation, "REPLACE" if replace else "IGNORE")

    def evaluation(self, setting: Setting, candidate_id: str) -> Evaluation | None:
        """The recorded evaluation of this candidate in this setting."""
        return self._evaluation("candidate = ?", setting, candidate_id)

    def evaluation_of_binary(self, setting: Setting, binary: str) -> Evaluation | None:
        """The recorded evaluation of any candidate that compiled to this very binary."""
        return self._evaluation("binary = ?", setting, binary) if binary else None

    def _evaluation(self, condition: str, setting: Setting, value: str) -> Evaluation | None:
        rows = self._rows(
            f"SELECT data FROM evaluations WHERE {condition} AND task = ? AND target = ? AND machine = ?"
            " AND baseline = ? AND threads = ? AND harness = ? ORDER BY id LIMIT 1",
            value, setting.task, setting.target, setting.machine, setting.baseline, setting.threads,
            setting.harness,
        )  # fmt: skip
        return Evaluation.from_json(rows[0][0]) if rows else None

    def evaluations(self, task_id: str) -> list[Evaluation]:
        """Every evaluation of the task, in the order recorded."""
        rows = self._rows("SELECT data FROM evaluations WHERE task = ? ORDER BY id", task_id)
        return [Evaluation.from_json(data) for (data,) in rows]

    def leaders(self, target: str, per_task: int = 2) -> list[Record]:
        """The fastest correct kernels of every task on this kind of target, whatever the machine."""
        rows = self._rows(
            "SELECT t.id, t.source, c.source, c.language, ranked.speedup, f.data FROM ("
            "  SELECT task, candidate, max(speedup) AS speedup,"
            "    row_number() OVER (PARTITION BY task ORDER BY max(speedup) DESC) AS place"
            "  FROM evaluations WHERE target = ? AND outcome = 'correct' AND speedup > 1 GROUP BY task, candidate"
            ") AS ranked JOIN tasks t ON t.id = ranked.task JOIN candidates c ON c.id = ranked.candidate"
            " LEFT JOIN features f ON f.task = t.id AND f.target = ?"
            " WHERE place <= ? ORDER BY t.created, place",
            target,
            target,
            per_task,
        )
        return [
            Record(task, source, Candidate(kernel, language), speedup, _features(data) if data else None)
            for task, source, kernel, language, speedup, data in rows
        ]

    def add_proof(self, setting: Setting, proof: Proof) -> None:
        """Remember how far the setting's task can be trusted on its machine."""
        with self._transaction() as db:
            db.execute(
                "INSERT OR REPLACE INTO proofs VALUES (?, ?, ?, ?, ?)",
                (setting.task, setting.machine, setting.harness, proof.to_json(), time.time()),
            )

    def proof(self, setting: Setting) -> Proof | None:
        """What is remembered of the setting's task on its machine."""
        rows = self._rows(
            "SELECT data FROM proofs WHERE task = ? AND machine = ? AND harness = ?",
            setting.task, setting.machine, setting.harness,
        )  # fmt: skip
        return Proof.from_json(rows[0][0]) if rows else None

    # Searches ---------------------------------------------------------------------------------------------

    def open_session(self, session_id: str, task_id: str, settings: dict[str, Any]) -> None:
        """Create the session if it is new."""
        with self._transaction() as db:
            db.execute(
                "INSERT OR IGNORE INTO sessions (id, task, settings, created) VALUES (?, ?, ?, ?)",
                (session_id, task_id, json.dumps(settings, sort_keys=True), time.time()),
            )

    def sessions(self) -> list[tuple[str, str, str, str]]:
        """(session, task id, task name, family) of every search, the oldest first."""
        rows = self._rows(
            "SELECT s.id, t.id, t.name, t.family FROM sessions s JOIN tasks t ON t.id = s.task ORDER BY s.created"
        )
        return [(session, task, name, family) for session, task, name, family in rows]

    def session_settings(self, session_id: str) -> dict[str, Any] | None:
        rows = self._rows("SELECT settings FROM sessions WHERE id = ?", session_id)
        return dict(json.loads(rows[0][0])) if rows else None

    def session_seconds(self, session_id: str) -> float:
        """Wall-clock seconds spent on the session so far, over all its processes."""
        rows = self._rows("SELECT seconds FROM sessions WHERE id = ?", session_id)
        return float(rows[0][0]) if rows else 0.0

    def nodes(self, session_id: str) -> list[NodeRecord]:
        """The session's asks in order."""
        rows = self._rows(
            "SELECT n.number, n.parent, n.strategy, n.draw, n.refusal, n.dollars, n.evaluation, n.source,"
            " n.kind, n.usage, c.language, c.parent, c.proposer FROM nodes n LEFT JOIN candidates c ON c.id = n.candidate"
            " WHERE n.session = ? ORDER BY n.number",
            session_id,
        )
        records = []
        for number, parent, strategy, draw, refusal, dollars, data, source, kind, used, *made in rows:
            evaluation = Evaluation.from_json(data) if data else None
            candidate = None
            if source is not None:
                # The exact text: candidates of one id may differ in comments, which can carry a schedule.
                language, origin, proposer = made
                candidate = Candidate(zlib.decompress(source).decode(), language, origin, strategy, proposer)
            usage = Usage.from_dict(json.loads(used)) if used else NOTHING
            record = NodeRecord(
                number, parent, strategy, draw, candidate, refusal, dollars, evaluation, kind, usage
            )
            records.append(record)
        return records

    def add_expense(self, session_id: str, expense: Expense) -> None:
        """Record what the session paid for besides its proposals."""
        with self._transaction() as db:
            db.execute(
                "INSERT INTO expenses (session, purpose, dollars, usage, created) VALUES (?, ?, ?, ?, ?)",
                (
                    session_id,
                    expense.purpose,
                    expense.dollars,
                    json.dumps(expense.usage.to_dict()),
                    time.time(),
                ),
            )

    def expenses(self, session_id: str) -> list[Expense]:
        """What ``add_expense`` was given, in that order."""
        rows = self._rows(
            "SELECT purpose, dollars, usage FROM expenses WHERE session = ? ORDER BY id", session_id
        )
        return [
            Expense(purpose, dollars, Usage.from_dict(json.loads(used))) for purpose, dollars, used in rows
        ]

    def asked(self, session_id: str, node: NodeRecord) -> None:
        """Record an ask before it is evaluated: a proposal may have cost money."""
        candidate = node.candidate
        with self._transaction() as db:
            if candidate is not None:
                _insert_candidate(db, candidate)
            db.execute(
                "INSERT OR IGNORE INTO nodes VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, NULL, ?, ?)",
                (session_id, node.number, node.parent, node.strategy, node.draw,
                 candidate.id if candidate else None,
                 zlib.compress(candidate.source.encode()) if candidate else None,
                 node.refusal, node.dollars, node.kind,
                 json.dumps(node.usage.to_dict()) if node.usage.calls else None),
            )  # fmt: skip

    def told(
        self, session_id: str, number: int, setting: Setting, evaluation: Evaluation, seconds: float
    ) -> None:
        """Record what an ask was told, the evaluation, and the session's clock, in one transaction.

        Raises ``UserError`` where that ask is another's: two processes go on with one search.
        """
        with self._transaction() as db:
            _insert_evaluation(db, setting, evaluation)
            told = db.execute(
                "UPDATE nodes SET evaluation = ? WHERE session = ? AND number = ? AND candidate = ?",
                (evaluation.to_json(), session_id, number, evaluation.candidate),
            )
            if not told.rowcount:
                raise UserError(
                    f"step {number} of this search has been recorded by another process, which goes on with it too: let one of"
                    " the two end, and resume it then"
                )
            db.execute("UPDATE sessions SET seconds = max(seconds, ?) WHERE id = ?", (seconds, session_id))

    def close(self) -> None:
        """Close the file; harmless when repeated."""
        with self._lock:
            self._db.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _features(data: str) -> Features | None:
    from ke_gym.codegen.features import Features  # the code generator is loaded only where tasks are compared

    return Features.from_json(data)


def _insert_candidate(db: sqlite3.Connection, candidate: Candidate) -> None:
    db.execute(
        "INSERT OR IGNORE INTO candidates VALUES (?, ?, ?, ?, ?, ?, ?)",
        (candidate.id, candidate.language, candidate.source, candidate.parent, candidate.strategy,
         candidate.proposer, time.time()),
    )  # fmt: skip


def _insert_evaluation(
    db: sqlite3.Connection, setting: Setting, evaluation: Evaluation, otherwise: str = "IGNORE"
) -> None:
    """``otherwise``: what becomes of it where there is one already ("IGNORE" or "REPLACE")."""
    db.execute(
        f"INSERT OR {otherwise} INTO evaluations (task, candidate, binary, target, machine, baseline, threads,"
        " harness, outcome, speedup, data, created) VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)",
        (setting.task, evaluation.candidate, evaluation.binary, setting.target, setting.machine,
         setting.baseline, setting.threads, setting.harness, evaluation.outcome, evaluation.speedup,
         evaluation.to_json(), time.time()),
    )  # fmt: skip

"""Compiles stores of finished (or still growing) searches, and other tables, into replay tables.

The store is the record: durable, append-only, complete. A table is made from it, and may be made again or
extended by further stores at any time.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from ke_gym import strategies
from ke_gym.candidate import Candidate
from ke_gym.envs.prepared import Prepared
from ke_gym.envs.table import NO_RACE, REFERENCE, REFUSED, REPEATED, Table
from ke_gym.errors import UserError
from ke_gym.evaluation.evaluation import HARNESS_VERSION, OUTCOMES, Evaluation
from ke_gym.search import observation
from ke_gym.search.observation import Surroundings
from ke_gym.search.store import NodeRecord, Setting, Store

BLOCK = 10
"""Rounds of a repeat: the fewest that a race takes before it may end."""
BUILT_UPON = 2
"""Strategies recorded on a version from which on it counts as one that was built upon."""
Alternative = Callable[[Candidate, strategies.Strategy, int], Candidate | None]
"""(parent, strategy, draw) to what the proposer makes of it again at any time; None if there is no such draw."""


@dataclass(frozen=True)
class Identity:
    """What must be the same for all searches of one table."""

    task: str
    task_id: str
    family: str
    target: str
    baseline: str
    machine: str
    threads: int
    harness: int = HARNESS_VERSION


@dataclass
class _Version:
    candidate: str
    source: str
    language: str
    outcome: int
    log_speedup: float
    log_interval: tuple[float, float]
    rival: str
    raced: bool
    improved: bool
    cost: tuple[float, float, float]
    profile: NDArray[np.float32]
    races: list[NDArray[np.int64]] = field(default_factory=list)


class Builder:
    """Collects versions and edges of one task, from a table, sessions, or both; ``table()`` makes the arrays."""

    def __init__(self, identity: Identity, surroundings: Surroundings) -> None:
        self.identity, self.surroundings = identity, surroundings
        self.versions: dict[str, _Version] = {}
        self.children: dict[tuple[str, int], dict[str, tuple[int, float]]] = {}
        """(parent's id or "", action) to child's id to (draw, dollars), in the order recorded."""
        self.refusals: dict[tuple[str, int], tuple[int, int, float]] = {}
        """(parent's id, action) to (draw, kind, dollars) of the refusal that ends it."""

    @classmethod
    def of(cls, table: Table) -> Builder:
        """Everything the table holds, to be added to."""
        made = cls(
            Identity(table.task, table.task_id, table.family, table.target, table.baseline, table.machine,
                     table.threads, table.harness),
            table.surroundings,
        )  # fmt: skip
        rounds = np.split(table.times, np.cumsum(table.repeats[:, 1])[:-1]) if len(table.repeats) else []
        ids = table.candidates
        for i, name in enumerate(ids):
            rival = int(table.rivals[i])
            made.versions[name] = _Version(
                name, table.sources[i], table.languages[i], int(table.outcomes[i]), float(table.log_speedup[i]),
                (float(table.log_interval[i, 0]), float(table.log_interval[i, 1])),
                ids[rival] if rival >= 0 else "", rival != NO_RACE, bool(table.improved[i]),
                tuple(table.costs[i].tolist()), table.profile[i],
            )  # fmt: skip
        for (node, _), block in zip(table.repeats.tolist(), rounds):
            made.versions[ids[node]].races.append(block)
        for (parent, action, draw, child), dollars in zip(table.edges.tolist(), table.dollars.tolist()):
            key = (ids[parent] if parent >= 0 else "", action)
            if child >= 0:
                made.children.setdefault(key, {})[ids[child]] = (draw, dollars)
            else:
                made.refusals[key] = (draw, child, dollars)
        return made

    def join(self, other: Builder) -> None:
        """Add what another one holds; where both know a version, the verdict stays and races are added."""
        for name, theirs in other.versions.items():
            known = self.versions.setdefault(name, theirs)
            if known is not theirs:
                _extend(known.races, theirs.races)
        for key, children in other.children.items():
            mine = self.children.setdefault(key, {})
            for child, edge in children.items():
                mine.setdefault(child, edge)
        self.refusals = other.refusals | self.refusals

    def add(self, records: Sequence[NodeRecord]) -> None:
        """Add one recorded search; what was in flight when it ended is left out."""
        names: dict[int, str] = {}
        for record in records:
            parent = "" if record.parent is None else names.get(record.parent)
            if parent is None or (record.candidate is not None and record.evaluation is None):
                continue
            key = (parent, strategies.get(record.strategy).id)
            if record.candidate is None:
                if record.kind not in ("duplicate", "inapplicable"):
                    continue  # a model's failed answer rules nothing out
                kind = REPEATED if record.kind == "duplicate" else REFUSED
                self.refusals.setdefault(key, (record.draw, kind, record.dollars))
                continue
            assert record.evaluation is not None
            name = names[record.number] = record.candidate.id
            self._judged(record.candidate, record.evaluation)
            self.children.setdefault(key, {}).setdefault(name, (record.draw, record.dollars))

    def close(self, made: Alternative, draws: int) -> int:
        """Add the edges between recorded versions that are not recorded themselves; returns how many.

        A search makes nothing twice. Where two strategies commute, or a draft is one strategy away from another, it
        records one of the ways; a search that came the other way would find it as well. Of every version that was
        built upon, the first ``draws`` alternatives of every strategy are followed.
        """
        tried: dict[str, set[int]] = {}
        for parent, action in self.children:
            if parent:
                tried.setdefault(parent, set()).add(action)
        added = 0
        for parent in [parent for parent, actions in tried.items() if len(actions) >= BUILT_UPON]:
            version = self.versions[parent]
            origin = Candidate(version.source, version.language)
            for strategy in strategies.STRATEGIES:
                for draw in range(draws):
                    child = made(origin, strategy, draw)
                    if child is None:
                        break
                    known = self.children.setdefault((parent, strategy.id), {})
                    if child.id in self.versions and child.id != parent and child.id not in known:
                        known[child.id] = (draw, 0.0)
                        added += 1
        return added

    def _judged(self, candidate: Candidate, evaluation: Evaluation) -> None:
        blocks = _blocks(evaluation)
        known = self.versions.get(candidate.id)
        if known is not None:
            _extend(known.races, blocks)
            return
        low, high = evaluation.speedup_ci or (0.0, 0.0)
        self.versions[candidate.id] = _Version(
            candidate.id, candidate.source, candidate.language, OUTCOMES.index(evaluation.outcome),
            evaluation.log_speedup if evaluation.correct else 0.0, (_log(low), _log(high)), evaluation.rival,
            evaluation.gain is not None, evaluation.improved,
            (evaluation.cost.compile_s, evaluation.cost.check_s, evaluation.cost.race_s),
            observation.profile_features(evaluation), blocks if evaluation.correct else [],
        )  # fmt: skip

    def table(self) -> Table:
        """All of it as arrays. ``UserError`` where nothing was evaluated."""
        versions = list(self.versions.values())
        if not versions:
            raise UserError(f"task {self.identity.task}: no evaluation was recorded")
        index = {version.candidate: i for i, version in enumerate(versions)}
        edges, dollars = self._edges(index)
        drafts = sorted({child for parent, _, _, child in edges if parent == REFERENCE and child >= 0})
        lines = [observation.code_lines(v.source, v.language) for v in versions]
        races = [(i, block) for i, version in enumerate(versions) for block in version.races]
        ratios = np.array([float(np.median(np.log(b[:, 1] / b[:, 0]))) for _, b in races])
        nodes = np.array([i for i, _ in races], dtype=np.int32)
        for i in set(nodes.tolist()):
            ratios[nodes == i] -= ratios[nodes == i].mean()
        rivals = [
            NO_RACE if not v.raced else index.get(v.rival, NO_RACE) if v.rival else REFERENCE
            for v in versions
        ]
        return Table(
            **vars(self.identity),
            surroundings=self.surroundings,
            candidates=tuple(v.candidate for v in versions),
            sources=tuple(v.source for v in versions),
            languages=tuple(v.language for v in versions),
            outcomes=np.array([v.outcome for v in versions], np.int8),
            log_speedup=np.array([v.log_speedup for v in versions], np.float64),
            log_interval=np.array([v.log_interval for v in versions], np.float64).reshape(-1, 2),
            rivals=np.array(rivals, np.int32),
            improved=np.array([v.improved for v in versions], np.bool_),
            costs=np.array([v.cost for v in versions], np.float32).reshape(-1, 3),
            code=np.stack([observation.code_features(v.source, v.language) for v in versions]),
            drafts=np.array(drafts, np.int32),
            distances=np.array(
                [[observation.distance(own, lines[d]) for d in drafts] for own in lines], np.float32
            ).reshape(len(versions), len(drafts)),
            profile=np.stack([v.profile for v in versions]),
            edges=np.array(edges, np.int32).reshape(-1, 4),
            dollars=np.array(dollars, np.float32),
            repeats=np.array([(i, len(block)) for i, block in races], np.int32).reshape(-1, 2),
            noise=ratios.astype(np.float32),
            times=np.concatenate([block for _, block in races] or [np.zeros((0, 2), np.int64)]),
        )

    def _edges(self, index: dict[str, int]) -> tuple[list[tuple[int, int, int, int]], list[float]]:
        rows = []
        for (parent, action), made in self.children.items():
            origin = index[parent] if parent else REFERENCE
            rows += [(origin, action, draw, index[child], cost) for child, (draw, cost) in made.items()]
        for (parent, action), (draw, kind, cost) in self.refusals.items():
            rows.append((index[parent] if parent else REFERENCE, action, draw, kind, cost))
        rows.sort(key=lambda row: (row[0], row[1], row[3] < 0, row[2]))
        return [row[:4] for row in rows], [row[4] for row in rows]


def _extend(races: list[NDArray[np.int64]], more: Iterable[NDArray[np.int64]]) -> None:
    """The same races may come in twice: a store hands a known verdict to later searches."""
    known = {block.tobytes() for block in races}
    races += [block for block in more if block.tobytes() not in known]


def _blocks(evaluation: Evaluation) -> list[NDArray[np.int64]]:
    """Nanoseconds of (candidate, baseline) per round, in blocks of ``BLOCK`` rounds or a whole short race."""
    pairs = np.array([evaluation.times_ms, evaluation.reference_times_ms]).T
    if len(pairs) != len(evaluation.times_ms) or sum(evaluation.races) != len(pairs):
        return []  # recorded before raw times of the baseline were kept
    blocks, start = [], 0
    rounds = np.round(pairs * 1e6).astype(np.int64).reshape(-1, 2)
    for length in evaluation.races:
        blocks += np.array_split(rounds[start : start + length], max(length // BLOCK, 1))
        start += length
    return [block for block in blocks if len(block)]


def _log(value: float) -> float:
    return math.log(value) if value > 0 else -math.inf


# Stores -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Recorded:
    """One search in a store, and what it was made of."""

    identity: Identity
    surroundings: Surroundings
    records: list[NodeRecord]


def searches(store: Store, named: Iterable[str] = ()) -> list[Recorded]:
    """The searches of this harness version in the store: of the named tasks, or of all.

    Searches that say nothing of their surroundings (recorded by earlier versions) are left out.
    """
    wanted, found = set(named), []
    for session, task_id, name, family in store.sessions():
        settings = store.session_settings(session) or {}
        if (wanted and name not in wanted) or settings.get("harness") != HARNESS_VERSION:
            continue
        seen = settings.get("surroundings")
        records = store.nodes(session)
        judged = next((r.evaluation for r in records if r.evaluation is not None), None)
        if seen is None or judged is None:
            continue
        surroundings = Surroundings(
            np.array(seen["task"], np.float32), np.array(seen["hardware"], np.float32)
        )
        identity = Identity(
            name, task_id, family, judged.target, judged.baseline, judged.machine, judged.threads
        )
        found.append(Recorded(identity, surroundings, records))
    return found


def build(found: Sequence[Recorded | Table]) -> Table:
    """One table of searches of one task, or of tables of it.

    ``UserError`` if they are not of the same task, machine, threads and baseline.
    """
    whole: Builder | None = None
    for one in found:
        made = Builder.of(one) if isinstance(one, Table) else Builder(one.identity, one.surroundings)
        if isinstance(one, Recorded):
            made.add(one.records)
        whole = whole or made
        for key, value in vars(made.identity).items():
            mine = getattr(whole.identity, key)
            if value != mine:
                raise UserError(
                    f"task {made.identity.task}: searches with {key} {mine!r} and {value!r} cannot share a table;"
                    " choose another --out"
                )
        if whole is not made:
            whole.join(made)
    if whole is None:
        raise UserError("a replay table needs at least one search")
    return whole.table()


def remember(store: Store, setting: Setting, table: Table) -> None:
    """Let searches in ``store`` know the table's verdicts, so that nothing is measured twice.

    ``UserError`` if it is of another task, machine, baseline, number of threads or version of the harness.
    """
    theirs = {"task": table.task_id, "target": table.target, "machine": table.machine,
              "baseline": table.baseline, "threads": table.threads, "harness": table.harness}  # fmt: skip
    for key, value in theirs.items():
        mine = getattr(setting, key)
        if value != mine:
            raise UserError(
                f"task {table.task}: there is a table with {key} {value!r}, and here it is {mine!r}; choose another --out"
            )
    prepared = Prepared(table)
    for candidate, evaluation in zip(prepared.candidates, prepared.evaluations):
        store.add_candidate(candidate)
        store.add_evaluation(setting, evaluation)


def closed(table: Table, made: Alternative, draws: int) -> Table:
    """The table with the edges that ``Builder.close`` adds."""
    builder = Builder.of(table)
    builder.close(made, draws)
    return builder.table()


def from_files(files: Sequence[Path], named: Sequence[str], out: Path) -> list[Table]:
    """A table in ``out`` for every task (or the named ones) of these stores and tables, extending what is there.

    ``UserError`` for a missing file, a task that none of them has, or none at all.
    """
    found: dict[str, list[Recorded | Table]] = {}
    for path in files:
        if not path.exists():
            raise UserError(f"there is no store {path}")
        if path.suffix == ".npz":
            table = Table.load(path)
            if not named or table.task in named:
                found.setdefault(table.task, []).append(table)
            continue
        with Store(path) as store:
            for one in searches(store, named):
                found.setdefault(one.identity.task, []).append(one)
    missing = [name for name in named if name not in found]
    if missing or not found:
        what = ", ".join(missing) or "any task"
        raise UserError(
            f"no search of {what} in {', '.join(map(str, files))} can be replayed: none was recorded by this version"
        )
    tables = []
    for name, recorded in sorted(found.items()):
        path = out / f"{name}.npz"
        table = build([Table.load(path), *recorded] if path.exists() else recorded)
        table.save(path)
        tables.append(table)
    return tables

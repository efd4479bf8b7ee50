"""Breadth-first recording: every strategy on the fastest versions of each depth, for replay tables.

The first correct draft is extended too, fast or not: it is where an episode begins. So is what a search would hold for
its best on the way from each of these: of all that was built upon, the fastest child that is faster than it.

A search follows its policy, so what it leaves behind says little about the choices it did not make. A recording
makes all of them, level by level, and keeps everything in a store, from which ``ke_gym.envs.table`` compiles.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from ke_gym.candidate import Candidate
from ke_gym.errors import UserError
from ke_gym.evaluation.evaluation import Evaluation
from ke_gym.search.run import Evaluate, Watch
from ke_gym.search.session import Ask, Session
from ke_gym.search.tree import Node
from ke_gym.strategies import FIX, RESTART, STRATEGIES


@dataclass(frozen=True)
class Breadth:
    """How widely a task is recorded."""

    drafts: int = 5
    """Drafts made from the reference: depth 1."""
    depth: int = 5
    """Edges from the reference to the deepest versions."""
    width: int = 2
    """How many versions of each depth are extended, the fastest first; besides, at depth 1 the first draft, and below
    each version that was extended its fastest child, if that is faster."""
    draws: int = 1
    """Alternatives of each strategy on each of them."""
    repeats: int = 1
    """Measurements of each correct version."""

    def __post_init__(self) -> None:
        for name in ("drafts", "depth", "width", "draws", "repeats"):
            if getattr(self, name) < 1:
                raise UserError(f"--{name} {getattr(self, name)} records nothing; give a positive number")


def repeated(evaluate: Evaluate, again: Evaluate, times: int) -> Evaluate:
    """``evaluate``, and where that measured a correct candidate, its raw times from ``times - 1`` runs of ``again``.

    The verdict is the first one's. What was only remembered (``gain`` is None then) is not measured again.
    """

    def measure(candidate: Candidate, rival: Candidate | None) -> Evaluation:
        first = evaluate(candidate, rival)
        if not first.correct or first.gain is None:
            return first
        more = [again(candidate, rival) for _ in range(times - 1)]
        all_of = [first, *(one for one in more if one.correct)]
        return first.replace(
            times_ms=tuple(t for one in all_of for t in one.times_ms),
            reference_times_ms=tuple(t for one in all_of for t in one.reference_times_ms),
            races=tuple(n for one in all_of for n in one.races),
        )

    return measure


def record(
    session: Session, evaluate: Evaluate, breadth: Breadth, *, workers: int = 2, watch: Watch | None = None
) -> str:
    """Record until the session's budget is spent or every level is complete; returns which.

    A session that was recorded before goes on where it stopped. ``KeyboardInterrupt`` ends it with
    ``"interrupted"``; what was told by then stays.
    """
    recorder = _Recorder(session, evaluate, workers, watch or Watch())
    try:
        recorder.told([(None, RESTART.id)] * breadth.drafts)
        level: list[Node] = list(session.tree)
        for depth in range(1, breadth.depth):
            parents = _extended(level, breadth.width, session, first=depth == 1)
            known = len(session.tree)
            recorder.told([(p, s.id) for p in parents for s in STRATEGIES for _ in range(breadth.draws)])
            recorder.told([(p, FIX.id) for p in parents])
            level = list(session.tree)[known:]
        return session.stopped() or "complete"
    except KeyboardInterrupt:
        return "interrupted"
    finally:
        recorder.close()


def _extended(level: Sequence[Node], width: int, session: Session, first: bool) -> list[Node]:
    """The correct versions of a level that are built upon: the fastest, the ``first`` one if asked, and the best next
    step from each parent."""
    correct = sorted((node for node in level if node.correct), key=lambda node: -node.speedup)
    chosen = {node.number: node for node in correct[:width]}
    if first and correct:
        draft = min(correct, key=lambda node: node.number)
        chosen[draft.number] = draft
    led: set[int] = set()
    for node in correct:
        if node.parent is not None and node.parent not in led:
            led.add(node.parent)
            if node.speedup > session.tree.nodes[node.parent].speedup:
                chosen[node.number] = node
    return list(chosen.values())


class _Recorder:
    def __init__(self, session: Session, evaluate: Evaluate, workers: int, watch: Watch) -> None:
        self.session, self.evaluate, self.watch = session, evaluate, watch
        self.workers = workers
        self.pool = ThreadPoolExecutor(workers, thread_name_prefix="evaluate")
        self._flying: list[Ask] = []

    def told(self, wanted: list[tuple[Node | None, int]]) -> None:
        """Ask for all of these, ``workers`` at once, and tell them in order."""
        asks = self._asks(wanted)
        waiting: list[tuple[Ask, Callable[[], Evaluation]]] = []
        while True:
            while len(waiting) < self.workers and (ask := next(asks, None)) is not None:
                self._flying.append(ask)
                self.watch.asked(self.session, ask)
                waiting.append((ask, self._result(ask)))
            if not waiting:
                return
            ask, result = waiting.pop(0)
            best = self.session.tree.best
            node = self.session.tell(ask, result())
            self._flying.remove(ask)
            self.watch.told(self.session, node, self.session.tree.best is not best)

    def _asks(self, wanted: list[tuple[Node | None, int]]) -> Iterator[Ask]:
        for parent, action in wanted:
            if self.session.stopped() is not None:
                return
            if not self.session.mask(parent)[action]:
                continue
            ask = self.session.ask(action, parent)
            if isinstance(ask, Ask):
                yield ask

    def _result(self, ask: Ask) -> Callable[[], Evaluation]:
        known = ask.known
        if known is not None:
            return lambda: known
        return self.pool.submit(self.evaluate, ask.candidate, ask.rival_candidate).result

    def close(self) -> None:
        for ask in self._flying:
            self.session.abandon(ask)
        self.pool.shutdown(wait=False, cancel_futures=True)

"""Where live episodes are evaluated: evaluators kept by task, and futures that survive a lost worker."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from ke_gym import proposers
from ke_gym.envs.episode import Case
from ke_gym.errors import UserError
from ke_gym.evaluation import opening
from ke_gym.evaluation.evaluation import Evaluation
from ke_gym.evaluation.evaluator import Evaluator
from ke_gym.job import remembering
from ke_gym.proposers.base import Proposer
from ke_gym.search.observation import Surroundings
from ke_gym.search.run import Evaluate
from ke_gym.search.session import Ask
from ke_gym.search.store import Setting, Store
from ke_gym.tasks import Task

OpenEvaluator = Callable[[Task], Evaluator]
PATIENCE = 3


class LostEvaluation(Exception):
    """The processes that judged a candidate failed, for no fault of the candidate."""


@dataclass(frozen=True, eq=False)
class _Open:
    """An open evaluator, and its ``evaluate`` that judges no binary twice, nor at once."""

    evaluator: Evaluator
    evaluate: Evaluate


class EvaluationPool:
    """Evaluates for any number of episodes: builds side by side, one race at a time on the machine.

    Args:
        target, baseline, threads: as for ``Evaluator``.
        language: what kernels are generated in, as for ``optimize``.
        proposer: a name from ``ke_gym.proposers``, or a function from task to proposer.
        store: a file to share and keep evaluations in; by default they are remembered only as long as the pool.
        workers: evaluations in flight at once.
        keep: evaluators that stay open, one per task, the least recently used closed first.
        open_evaluator: opens another kind of evaluator for a task.
    """

    def __init__(
        self,
        target: str = "cpu",
        baseline: str = "eager",
        threads: int | None = None,
        proposer: str | Callable[[Task], Proposer] = "rewriter",
        store: str | Path | None = None,
        workers: int = 2,
        keep: int = 1,
        open_evaluator: OpenEvaluator | None = None,
        language: str = "",
    ) -> None:
        if isinstance(proposer, str):
            proposers.check(proposer)
        self.target, self.baseline, self.proposer, self.keep = target, baseline, proposer, keep
        self.language = opening.kernel_language(target, language)
        self.store = Store(store if store is not None else ":memory:")
        self._open = open_evaluator or (lambda task: opening.open_evaluator(task, target, baseline, threads))
        self._threads = ThreadPoolExecutor(workers, thread_name_prefix="evaluate")
        self._cases: dict[str, Case] = {}
        self._opened: OrderedDict[str, _Open] = OrderedDict()
        self._retired: list[Evaluator] = []
        self._turn = threading.Condition()
        self._judging = ""
        self._judges = 0
        self._lost = 0
        self._closed = False

    def case(self, task: Task) -> Case:
        """The task, ready to be searched; its evaluator is open from now on."""
        evaluator = self._open_for(task).evaluator
        if task.id not in self._cases:
            if isinstance(self.proposer, str):
                proposer = proposers.make(self.proposer, task, self.language, evaluator=evaluator)
            else:
                proposer = self.proposer(task)
            self._cases[task.id] = Case(
                task, self._setting(task, evaluator), Surroundings.of(evaluator), proposer
            )
            self.store.add_task(task)
        return self._cases[task.id]

    def _setting(self, task: Task, evaluator: Evaluator) -> Setting:
        return Setting(task.id, self.target, evaluator.facts.fingerprint, self.baseline, evaluator.threads)

    def _open_for(self, task: Task) -> _Open:
        with self._turn:
            if task.id not in self._opened:
                # The old ones first: two tasks' inputs need not fit into memory side by side.
                while len(self._opened) >= self.keep:
                    self._retired.append(self._opened.popitem(last=False)[1].evaluator)
                self._bury()
                evaluator = self._open(task)
                evaluate = remembering(self.store, self._setting(task, evaluator), evaluator)
                self._opened[task.id] = _Open(evaluator, evaluate)
            self._opened.move_to_end(task.id)
            return self._opened[task.id]

    def _bury(self) -> None:
        """Close retired evaluators once nobody judges with them."""
        if not self._judges:
            while self._retired:
                self._retired.pop().close()

    @contextmanager
    def _judge(self, task: Task) -> Iterator[_Open]:
        # An evaluator keeps its own races apart; those of different tasks are kept apart here.
        with self._turn:
            self._turn.wait_for(lambda: self._judging in ("", task.id))
            opened = self._open_for(task)
            self._judging = task.id
            self._judges += 1
        try:
            yield opened
        finally:
            with self._turn:
                self._judges -= 1
                if not self._judges:
                    self._judging = ""
                self._bury()
                self._turn.notify_all()

    def submit(self, case: Case, ask: Ask) -> Future[Evaluation]:
        """The evaluation to come; raises ``LostEvaluation`` in place of one that could not be made.

        After ``PATIENCE`` losses in a row ``UserError``: then it is the task or the machine.
        """
        return self._threads.submit(self._evaluate, case, ask)

    def _evaluate(self, case: Case, ask: Ask) -> Evaluation:
        with self._judge(case.task) as opened:
            try:
                judged = opened.evaluate(ask.candidate, ask.rival_candidate)
            except Exception as error:
                with self._turn:
                    if self._opened.get(case.task.id) is opened:  # whoever shares the loss finds it counted
                        self._retired.append(self._opened.pop(case.task.id).evaluator)
                        self._lost += 1
                    if self._lost >= PATIENCE:
                        raise UserError(
                            f"task {case.task.name}: {self._lost} evaluations in a row were lost, the last to"
                            f" {type(error).__name__}: {error}; check the task with scripts/tasks.py"
                        ) from error
                raise LostEvaluation(f"{type(error).__name__}: {error}") from error
            self._lost = 0
            return judged

    def close(self) -> None:
        """Close all evaluators and the store; harmless when repeated."""
        if self._closed:
            return
        self._closed = True
        self._threads.shutdown(wait=True, cancel_futures=True)
        for case in self._cases.values():
            case.proposer.close()
        self._retired += [opened.evaluator for opened in self._opened.values()]
        self._opened.clear()
        self._bury()
        self.store.close()

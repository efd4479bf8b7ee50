"""A search where there is no GPU, judged where there is one: they meet in a folder that both can see.

The searching side compiles and leaves a bundle, ``<name>.keb``; the side with the GPU, ``serve``, judges it and
leaves ``<name>.json`` beside it. How the folder is shared (a network file system, rsync) is no matter of theirs:
files appear whole, and names are never used again. Who has read its answer, or waits for none any more, removes
the order first and then the answer: an order without one is judged.
"""

from __future__ import annotations

import json
import os
import threading
import time
import traceback
import uuid
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import ExitStack, suppress
from pathlib import Path
from types import SimpleNamespace
from typing import Any, TypeVar

from ke_gym.candidate import Candidate
from ke_gym.errors import UserError
from ke_gym.evaluation import gpu_signature
from ke_gym.evaluation.account import Account
from ke_gym.evaluation.builder import BUILD_SECONDS, Builder
from ke_gym.evaluation.builds import Builds, Cores
from ke_gym.evaluation.bundle import (
    Bundle,
    Packed,
    judge,
    read_results,
    results,
    write_file,
)
from ke_gym.evaluation.contest import left_out
from ke_gym.evaluation.evaluation import Cost, Evaluation
from ke_gym.evaluation.evaluator import Evaluator
from ke_gym.evaluation.gpu_client import GpuShape, described_shapes
from ke_gym.evaluation.gpu_setting import arch_of
from ke_gym.evaluation.record import MachineRecord, home
from ke_gym.evaluation.selfcheck import Proof
from ke_gym.evaluation.zygote import Zygote
from ke_gym.languages.artifact import Artifact
from ke_gym.languages.base import BuildError
from ke_gym.targets import cuda
from ke_gym.tasks.task import Task

T = TypeVar("T")
ORDER, ANSWER, STOP = ".keb", ".json", "stop"
POLL_SECONDS = 0.1
PATIENCE = 3600.0
"""Seconds that an order may stay without answer."""


class ExchangeEvaluator(Evaluator):
    """Judges candidates for one task on the GPU behind ``exchange``; see ``Evaluator`` for the rest.

    Raises ``UserError`` if nobody answers within ``patience`` seconds or until it is closed, or for what the other
    side says.
    """

    judge: SimpleNamespace  # type: ignore[assignment]
    facts: cuda.Facts  # type: ignore[assignment]
    peaks: cuda.Peaks  # type: ignore[assignment]

    def __init__(
        self,
        task: Task,
        exchange: Path,
        baseline: str = "eager",
        folder: Path | None = None,
        patience: float = PATIENCE,
    ) -> None:
        if not exchange.is_dir():
            raise UserError(
                f"{exchange} is no folder; make it, and run scripts/evaluate.py --serve on it elsewhere"
            )
        self.task, self.target, self.baseline = task, "cuda", baseline
        self.threads = 1
        self.folder = folder or home()
        self._exchange, self._wait_s = exchange, patience
        self._name = f"{task.name}-{uuid.uuid4().hex[:12]}"
        self._orders = 0
        self.build_timeout = BUILD_SECONDS
        self._cores = Cores(len(os.sched_getaffinity(0)))
        self._builds = Builds(self._cores)
        self.account = Account()
        self._lock = threading.Lock()
        self._closed = threading.Event()
        self._state = ExitStack()
        try:
            shapes = self._order(Bundle("", (task,), (), baseline), self._introduced)
            self.record = MachineRecord(self.facts.fingerprint, self.folder)
            self.zygote = self._state.enter_context(Zygote(1))
            self.builder = Builder(self.zygote, self.folder / "builds")
            signature = gpu_signature.found(self.zygote, task, [*self.shape_sets, *self.hidden])
            self.judge = SimpleNamespace(shapes=shapes, signature=signature)
        except BaseException:
            self._state.close()
            raise

    def _introduced(self, about: dict[str, Any]) -> dict[str, GpuShape]:
        """Take what the other side says of itself; the task's shape sets."""
        self.facts = cuda.Facts(**about["facts"])
        self.peaks = cuda.Peaks.from_dict(about["peaks"])
        self.shape_sets, self.hidden = list(about["shape_sets"]), list(about["hidden"])
        self.contract = self.shape_sets[0]
        self.devices = int(about["devices"])
        self.sandbox = str(about["sandbox"])
        return described_shapes(about["shapes"])

    def evaluate(self, candidate: Candidate, incumbent: Candidate | None = None) -> Evaluation:
        """See ``Evaluator.evaluate``; many may be under way."""
        return self._order_one(candidate, incumbent)

    def ahead(self, candidate: Candidate, rival: Candidate) -> bool:
        """See ``Evaluator.ahead``; here by what clears the margin of a gain."""
        return self._order_one(candidate, rival).improved

    def final(self, candidate: Candidate) -> Evaluation:
        """See ``Evaluator.final``."""
        return self._order_one(candidate, None, final=True)

    def prove(self) -> Proof | None:
        """See ``Evaluator.prove``: not from here."""
        return None

    def _order_one(
        self, candidate: Candidate, incumbent: Candidate | None, final: bool = False
    ) -> Evaluation:
        start = time.perf_counter()
        try:
            artifact = self.build(candidate)
        except BuildError as error:
            cost = Cost(compile_s=time.perf_counter() - start)
            base = Evaluation(self.task.name, self.target, candidate.language, candidate.id, "compile")
            return base.replace(
                outcome=error.outcome, log=error.log, baseline=self.baseline, machine=self.facts.fingerprint,
                sandbox=self.sandbox, cost=cost,
            )  # fmt: skip
        rival, failure = None, None
        if incumbent is not None and incumbent.id != candidate.id:
            try:
                rival = incumbent, self.build(incumbent)
            except BuildError as error:
                failure = error
        packed = Packed(candidate.id, 0, candidate, artifact, rival=rival, final=final)
        order = Bundle(artifact.arch, (self.task,), (packed,), self.baseline)
        (judged,) = self._order(order, lambda answer: read_results(json.dumps(answer)))
        spent = Cost(
            self._builds.seconds(candidate.id),
            judged.evaluation.cost.check_s,
            judged.evaluation.cost.race_s,
        )
        evaluation = judged.evaluation.replace(cost=spent)
        return evaluation if failure is None else left_out(evaluation, failure.log)

    def _compile(self, candidate: Candidate) -> Artifact:
        return self.builder.build(
            candidate.source, self.judge.signature, candidate.language, target="cuda", arch=arch_of(self.facts),
            multiprocessors=self.facts.cores, timeout=self.build_timeout,
        )  # fmt: skip

    def _order(self, order: Bundle, read: Callable[[dict[str, Any]], T]) -> T:
        """Leave a bundle, wait for its answer, ``read`` it and tidy up."""
        with self._lock:
            self._orders += 1
            path = self._exchange / f"{self._name}-{self._orders:05d}{ORDER}"
        order.write(path)
        answer = path.with_suffix(ANSWER)
        try:
            self._await(answer)
        except BaseException:
            path.unlink(missing_ok=True)
            raise
        try:
            data: dict[str, Any] = json.loads(answer.read_text())
            found = read(data) if "error" not in data else None
        except (OSError, ValueError, TypeError, LookupError, AttributeError) as error:
            raise UserError(
                f"{answer} is no answer that can be read here ({type(error).__name__}: {error}); "
                "have the same version on both sides"
            ) from error
        with suppress(OSError):  # where files can't be removed, they stay
            path.unlink(missing_ok=True)
            answer.unlink(missing_ok=True)
        if found is None:
            raise UserError(str(data["error"]))
        return found

    def _await(self, answer: Path) -> None:
        end = time.monotonic() + self._wait_s
        while not answer.exists():
            if time.monotonic() > end:
                raise UserError(
                    f"nobody answered with {answer} within {self._wait_s:g} s; run scripts/evaluate.py --serve "
                    f"{self._exchange} on a machine with a GPU"
                )
            if self._closed.wait(POLL_SECONDS):
                raise UserError(f"the search ended before {answer} was there")

    def close(self) -> None:
        """Whoever still waits for an answer gets none."""
        self._closed.set()
        super().close()


def serve(
    folder: Path,
    open_evaluator: Callable[[Task, str], Evaluator],
    tell: Callable[[str], None] = lambda said: None,
) -> None:
    """Judge the bundles that appear in ``folder`` until a file called ``stop`` does, one at a time for each GPU.

    ``open_evaluator(task, baseline)``; the last one stays open for the orders to come.
    """
    opened: dict[tuple[str, str], Evaluator] = {}
    under_way: set[Future[None]] = set()
    taken: set[str] = set()
    with ExitStack() as state:
        state.callback(_close, opened)
        pool = state.enter_context(ThreadPoolExecutor(thread_name_prefix="serve"))
        while not (folder / STOP).exists():
            for ended in [future for future in under_way if future.done()]:
                under_way.remove(ended)
                ended.result()
            full = len(under_way) >= max((e.devices for e in opened.values()), default=1)
            order = None if full else _oldest(folder, taken)
            if order is None:
                time.sleep(POLL_SECONDS)
                continue
            taken.add(order.name)
            try:
                bundle = Bundle.read(order)
                if not bundle.tasks:
                    raise UserError(
                        f"{order.name} is for no task; leave what scripts/optimize.py --exchange makes"
                    )
                key = (bundle.tasks[0].id, bundle.baseline)
                if key not in opened:  # two tasks need not fit onto the device
                    wait(under_way)
                    _close(opened)
                    opened[key] = open_evaluator(bundle.tasks[0], bundle.baseline)
            except Exception as error:
                _reply(order, _refused(error), tell)
                continue
            under_way.add(pool.submit(_serve, order, bundle, opened[key], tell))


def _oldest(folder: Path, taken: set[str]) -> Path | None:
    """The order that waits longest, but for those ``taken``; None if none does."""
    waiting = []
    for order in folder.glob(f"*{ORDER}"):
        if order.name not in taken and not order.with_suffix(ANSWER).exists():
            with suppress(OSError):  # whoever left it has removed it since
                waiting.append((order.stat().st_mtime_ns, order.name, order))
    return min(waiting)[2] if waiting else None


def _close(opened: dict[tuple[str, str], Evaluator]) -> None:
    while opened:
        opened.popitem()[1].close()


def _reply(order: Path, answer: str, tell: Callable[[str], None]) -> None:
    """Answer an order, unless whoever left it has removed it."""
    if order.exists():
        write_file(order.with_suffix(ANSWER), answer.encode())
        tell(order.name)


def _serve(order: Path, bundle: Bundle, evaluator: Evaluator, tell: Callable[[str], None]) -> None:
    try:
        answer = _answer(bundle, evaluator)
    except Exception as error:
        answer = _refused(error)
    _reply(order, answer, tell)


def _refused(error: Exception) -> str:
    """The answer that tells of an error: whoever ordered it needs to know, and others go on being served."""
    if isinstance(error, UserError):
        return json.dumps({"error": str(error)})
    traceback.print_exception(error)
    return json.dumps({"error": f"the serving side failed: {type(error).__name__}: {error}"})


def _answer(order: Bundle, evaluator: Any) -> str:
    if order.packed:
        return results(
            (judge(evaluator, order, packed) for packed in order.packed), evaluator.facts.to_dict()
        )
    about = {
        "facts": evaluator.facts.to_dict(),
        "peaks": evaluator.peaks.to_dict(),
        "devices": evaluator.devices,
        "shape_sets": evaluator.shape_sets,
        "hidden": evaluator.hidden,
        "sandbox": evaluator.sandbox,
        "shapes": {name: shape.to_dict() for name, shape in evaluator.judge.shapes.items()},
    }
    return json.dumps(about)

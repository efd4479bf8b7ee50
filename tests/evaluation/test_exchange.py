"""A search here, a GPU there, a folder between them."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from ke_gym.candidate import Candidate
from ke_gym.errors import UserError
from ke_gym.evaluation import exchange
from ke_gym.evaluation.bundle import Bundle, Packed
from ke_gym.evaluation.evaluation import Evaluation
from ke_gym.evaluation.exchange import ExchangeEvaluator
from ke_gym.evaluation.gpu_client import GpuShape
from ke_gym.evaluation.opening import open_evaluator
from ke_gym.evaluation.work import Work
from ke_gym.job import optimize, read_run
from ke_gym.languages.artifact import Artifact
from ke_gym.languages.plan import TensorSpec
from ke_gym.search.store import Store
from ke_gym.targets.cuda import Peaks
from ke_gym.tasks.task import Task
from ke_gym.testing.fake_gpu import FACTS

SPEC = TensorSpec((16384, 32768), (32768, 1), "float32")
PEAKS = Peaks(((1 << 30, 4e12),), 5e13, 6e13, 4e14, 8e14, 8e14, 2e-6)


class Device:
    """Stands for the evaluator of a machine with a GPU: every kernel takes a millisecond."""

    facts, peaks, sandbox, hidden, shape_sets = FACTS, PEAKS, "full", ["ragged"], ["gpu"]
    devices = 2
    both = threading.Barrier(2)

    def __init__(self, task: Task, baseline: str) -> None:
        if baseline == "compile":
            raise UserError("it has no compiler")
        self.task, self.target, self.baseline = task, "cuda", baseline
        self.judge = SimpleNamespace(
            shapes={"gpu": GpuShape("gpu", (SPEC,), {}, (SPEC,), Work(4e9, 0, 0, 1))}
        )
        self.adopted: dict[str, Artifact] = {}
        self.closed = False

    def adopt(self, candidate: Candidate, artifact: Artifact) -> None:
        self.adopted[candidate.id] = artifact

    def evaluate(self, candidate: Candidate, incumbent: Candidate | None = None) -> Evaluation:
        assert candidate.id in self.adopted and (incumbent is None or incumbent.id in self.adopted)
        if candidate.language == "triton" and "together" in candidate.source:
            self.both.wait(300)
        gain = None if incumbent is None else 1.5
        return Evaluation(
            self.task.name, "cuda", candidate.language, candidate.id, "correct", time_ms=1.0, reference_ms=2.0,
            speedup=2.0, speedup_ci=(1.9, 2.1), gain=gain,
        )  # fmt: skip

    def final(self, candidate: Candidate) -> Evaluation:
        return self.evaluate(candidate).replace(log="looked at by memcheck")

    def close(self) -> None:
        self.closed = True


@contextmanager
def served(folder: Path) -> Iterator[None]:
    server = threading.Thread(target=exchange.serve, args=(folder, Device))
    server.start()
    try:
        yield
    finally:
        (folder / exchange.STOP).touch()
        server.join(300)
        assert not server.is_alive()


@pytest.fixture
def shared(tmp_path: Path) -> Iterator[Path]:
    folder = tmp_path / "shared"
    folder.mkdir()
    with served(folder):
        yield folder


def kernel(name: str) -> Candidate:
    return Candidate(
        f"import torch\n\ndef forward(x):\n    {name} = torch.softmax(x, -1)\n    return {name}\n", "triton"
    )


def test_candidates_are_built_here_and_judged_there(shared: Path, tmp_path: Path) -> None:
    pytest.importorskip("triton")
    with ExchangeEvaluator(Task.load("softmax"), shared, folder=tmp_path) as evaluator:
        assert evaluator.facts == FACTS and evaluator.peaks == PEAKS and evaluator.contract == "gpu"
        assert evaluator.judge.shapes["gpu"].inputs == (SPEC,)
        first = evaluator.evaluate(kernel("a"))
        assert (first.outcome, first.time_ms, first.gain) == ("correct", 1.0, None)
        assert evaluator.evaluate(kernel("b"), kernel("a")).gain == 1.5
        assert evaluator.final(kernel("a")).log == "looked at by memcheck"
        broken = evaluator.evaluate(Candidate("def forward(x:", "triton"))
        assert broken.outcome == "compile" and broken.log
    assert not list(shared.iterdir())  # what is answered and read is removed


def test_an_incumbent_that_does_not_build_is_left_out(shared: Path, tmp_path: Path) -> None:
    pytest.importorskip("triton")
    with ExchangeEvaluator(Task.load("softmax"), shared, folder=tmp_path) as evaluator:
        broken = Candidate("def forward(x:", "triton")
        judged = evaluator.evaluate(kernel("a"), broken)
        assert judged.correct and judged.time_ms == 1.0 and judged.gain is None and not judged.improved
        assert judged.log.startswith("the incumbent failed (")
        assert judged.log.endswith("): raced against the baseline alone")
        assert not evaluator.ahead(kernel("a"), broken)


def test_whoever_waits_when_the_search_ends_is_let_go(tmp_path: Path) -> None:
    pytest.importorskip("triton")
    folder, waiting = tmp_path / "shared", Future[Evaluation]()
    folder.mkdir()
    with served(folder):
        evaluator = ExchangeEvaluator(Task.load("softmax"), folder, folder=tmp_path)

    def evaluate() -> None:
        try:
            waiting.set_result(evaluator.evaluate(kernel("a")))
        except BaseException as error:
            waiting.set_exception(error)

    threading.Thread(target=evaluate, daemon=True).start()
    while not list(folder.glob(f"*{exchange.ORDER}")):
        time.sleep(0.01)
    evaluator.close()
    with pytest.raises(UserError, match="the search ended before"):
        waiting.result(300)
    assert [path.name for path in folder.iterdir()] == [exchange.STOP]


def test_orders_that_others_have_removed_or_left_do_no_harm(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("triton")
    folder = tmp_path / "shared"
    folder.mkdir()
    (folder / f"gone{exchange.ORDER}").symlink_to("nowhere")  # listed, and not there
    for name in ("old", "orphan"):  # of searches that were killed
        (folder / f"{name}{exchange.ANSWER}").write_text("as it was")
    (folder / f"old{exchange.ORDER}").write_text("read long ago")
    with served(folder):
        with ExchangeEvaluator(Task.load("softmax"), folder, folder=tmp_path, patience=300) as evaluator:
            artifact = evaluator.build(kernel("a"))
            assert evaluator.evaluate(kernel("a")).correct
        packed = Packed("a", 0, kernel("a"), artifact)
        order = folder / f"dropped{exchange.ORDER}"
        judge, judged = Device.evaluate, threading.Event()

        def evaluate(self: Device, *candidates: Candidate) -> Evaluation:
            order.unlink()  # its search has ended
            judged.set()
            return judge(self, *candidates)

        monkeypatch.setattr(Device, "evaluate", evaluate)
        Bundle(artifact.arch, (evaluator.task,), (packed,)).write(order)
        assert judged.wait(300)
    left = {"gone.keb", "old.keb", "old.json", "orphan.json", exchange.STOP}
    assert {path.name for path in folder.iterdir()} == left
    assert (folder / "old.json").read_text() == "as it was"


def test_two_devices_there_judge_at_once(shared: Path, tmp_path: Path) -> None:
    pytest.importorskip("triton")
    with ExchangeEvaluator(Task.load("softmax"), shared, folder=tmp_path) as evaluator:
        assert evaluator.devices == 2
        with ThreadPoolExecutor(2) as pool:
            found = list(pool.map(evaluator.evaluate, map(kernel, ("together_a", "together_b"))))
    assert [e.outcome for e in found] == ["correct", "correct"]


def test_who_serves_outlives_what_it_cannot_answer(
    shared: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("triton")
    Bundle("", (), ()).write(shared / f"empty{exchange.ORDER}")
    (shared / f"torn{exchange.ORDER}").write_bytes(b"no bundle")

    def answer(name: str) -> str:
        path, end = shared / f"{name}{exchange.ANSWER}", time.monotonic() + 300
        while not path.exists() and time.monotonic() < end:
            time.sleep(0.05)
        return str(json.loads(path.read_text())["error"])

    assert "empty.keb is for no task" in answer("empty") and "is no bundle" in answer("torn")
    with ExchangeEvaluator(Task.load("softmax"), shared, folder=tmp_path) as evaluator:
        monkeypatch.setattr(Device, "evaluate", lambda *_: 1 / 0)
        with pytest.raises(UserError, match="the serving side failed: ZeroDivisionError"):
            evaluator.evaluate(kernel("a"))
        monkeypatch.undo()
        assert evaluator.evaluate(kernel("b")).correct
    assert "ZeroDivisionError" in capfd.readouterr().err  # with where it happened


@pytest.mark.parametrize("said", ['{"facts": {}}', "[]", "{", '{"facts": {"unknown": 1}, "peaks": 3}'])
def test_an_answer_of_another_version_is_told_in_a_sentence(tmp_path: Path, said: str) -> None:
    stop = threading.Event()

    def answer() -> None:
        while not stop.wait(0.01):
            for order in tmp_path.glob(f"*{exchange.ORDER}"):
                order.with_suffix(exchange.ANSWER).write_text(said)

    other = threading.Thread(target=answer)
    other.start()
    try:
        with pytest.raises(UserError, match="have the same version on both sides"):
            ExchangeEvaluator(Task.load("softmax"), tmp_path, folder=tmp_path / "home", patience=300)
    finally:
        stop.set()
        other.join()


def test_what_the_other_side_says_is_said_here(shared: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no compiler"):
        ExchangeEvaluator(Task.load("softmax"), shared, "compile", tmp_path)


def test_a_folder_that_nobody_serves_says_so(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="--serve"):
        ExchangeEvaluator(Task.load("softmax"), tmp_path, folder=tmp_path, patience=0.3)
    with pytest.raises(UserError, match="no folder"):
        ExchangeEvaluator(Task.load("softmax"), tmp_path / "nowhere", folder=tmp_path)


def test_garbage_in_the_folder_is_answered_and_does_no_harm(shared: Path) -> None:
    (shared / f"garbage{exchange.ORDER}").write_bytes(b"garbage")
    answer = shared / f"garbage{exchange.ANSWER}"
    while not answer.exists():
        threading.Event().wait(0.05)
    data: dict[str, Any] = json.loads(answer.read_text())
    assert "no bundle" in data["error"]


def test_a_search_is_in_the_language_it_was_asked_for(
    shared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("KE_GYM_HOME", str(tmp_path))
    result = optimize(
        "softmax",
        target="cuda",
        language="cuda",
        exchange=shared,
        budget=2,
        out=tmp_path / "runs",
        learned=False,
    )
    _, settings = read_run(result.run_dir)
    with Store(settings.store) as store:
        nodes = store.nodes(settings.session)
    assert settings.language == "cuda" and len(nodes) == 2 and result.speedup == 2.0
    assert all(node.candidate.language == "cuda" for node in nodes)


def test_the_gpu_of_an_exchange_is_the_servers_choice(tmp_path: Path) -> None:
    for target in ("cpu", "cuda:1", "cuda:sm_90"):
        with pytest.raises(UserError, match=f"not {target}; who serves it"):
            open_evaluator(Task.load("softmax"), target, exchange=tmp_path)

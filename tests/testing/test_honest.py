from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest

from ke_gym.evaluation.evaluator import Evaluator
from ke_gym.testing import honest
from ke_gym.testing.exploits import evaluators

pytestmark = pytest.mark.usefixtures("even_clock")


@pytest.mark.parametrize("name", ["softmax", "instance_norm", "bucketize", "embedding_bag", "matmul_row_max"])
def test_no_honest_kernel_is_rejected(name: str) -> None:
    results = honest.run([name])
    assert len(results) >= 2
    assert all(r.ok for r in results), [(r.kernel.name, r.evaluation.log) for r in results if not r.ok]


@pytest.fixture(scope="module")
def get(even_clock: None, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[[str], Evaluator]]:
    folder = tmp_path_factory.mktemp("home")
    with evaluators(lambda task: Evaluator(task, threads=1, folder=folder)) as open_for:
        yield open_for  # type: ignore[misc]


@pytest.mark.parametrize("kernel", honest.handwritten(), ids=lambda kernel: kernel.name)
def test_no_handwritten_kernel_is_rejected(kernel: honest.Honest, get: Callable[[str], Evaluator]) -> None:
    evaluation = get(kernel.task).evaluate(kernel.candidate)
    assert evaluation.correct, evaluation.log
    assert evaluation.trust == ("host" if kernel.name == "poly__untraceable" else "plan")

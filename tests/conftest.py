"""What all tests share: nothing of theirs goes into the user's own caches and records."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import ExitStack, nullcontext
from dataclasses import replace
from functools import cache, partial
from pathlib import Path

import pytest

from ke_gym.evaluation import evaluator, race
from ke_gym.evaluation.zygote import Zygote
from tests.machine import share_peaks

# Files that take longest, the longest first: no worker is to begin one of them when the others are done.
LONGEST = (
    "scripts/test_optimize.py", "testing/test_exploits.py", "testing/test_honest.py",
    "codegen/test_triton_modules.py", "codegen/test_program.py", "test_job.py",
    "evaluation/test_selfcheck.py", "codegen/test_heldout.py", "scripts/test_evaluate.py",
    "tasks/test_library.py", "codegen/test_rows.py", "codegen/test_cuda_modules.py",
    "evaluation/test_evaluator.py", "codegen/test_gathers.py", "scripts/test_llm_scripts.py",
    "test_package.py", "evaluation/test_zygote.py", "evaluation/test_gpu_rules.py",
    "codegen/test_contraction_templates.py", "proposers/test_llm_lessons.py", "scripts/test_training.py",
    "envs/test_live.py",
)  # fmt: skip


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The longest files first (with pytest-xdist: and ``--no-loadscope-reorder``)."""
    ranks = {Path(__file__).parent / name: rank for rank, name in enumerate(LONGEST)}
    items.sort(key=lambda item: ranks.get(item.path, len(ranks)))


@pytest.fixture(scope="session", autouse=True)
def _home(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """``KE_GYM_HOME`` is a folder of this session (with pytest-xdist: of this worker)."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("KE_GYM_HOME", str(tmp_path_factory.mktemp("ke_gym_home")))
        yield


@pytest.fixture(scope="session")
def measured(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of the machine's peaks, the same for all of pytest-xdist's workers."""
    own = tmp_path_factory.getbasetemp()
    folder = (own.parent if "PYTEST_XDIST_WORKER" in os.environ else own) / "measured"
    folder.mkdir(exist_ok=True)
    return folder


@pytest.fixture(scope="session", autouse=True)
def _peaks(measured: Path) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        share_peaks(patch, measured)
        yield


@pytest.fixture(scope="module")
def brief_races() -> Iterator[None]:
    """Races of a dozen rounds, and two processes confirm what is won: for tests of what comes before and after."""
    with pytest.MonkeyPatch.context() as patch:
        for name in ("RACE", "CONFIRM", "SOAK", "AA"):
            rules = replace(getattr(evaluator, name), min_rounds=10, max_rounds=12, max_seconds=0.5)
            patch.setattr(evaluator, name, rules)
        patch.setattr(evaluator, "planned", lambda *_: 5)
        patch.setattr(evaluator, "confirm", partial(race.confirm, processes=2, most=2))
        yield


@pytest.fixture(scope="module")
def one_zygote() -> Iterator[None]:
    """Evaluators of this module fork from one process (for each number of threads), which takes seconds to start."""
    with pytest.MonkeyPatch.context() as patch, ExitStack() as stack:
        started = cache(lambda threads: stack.enter_context(Zygote(threads)))
        patch.setattr(evaluator, "Zygote", lambda threads: nullcontext(started(threads)))
        yield

"""What all tests share.

Nothing of theirs goes into the user's own caches and records, and nothing of them hangs on how busy the machine is:
limits in seconds are far away, random numbers are the same in every run, and where times are not the subject
(`steady_clock`) none are measured.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import replace
from functools import cache, partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, settings

from ke_gym.evaluation import (
    arms,
    builder,
    bundle,
    evaluator,
    exchange,
    gpu_evaluator,
    gpu_stage,
    judge_client,
    race,
    zygote,
)
from ke_gym.evaluation.evaluator import Evaluator
from ke_gym.evaluation.judge_client import JudgeClient
from ke_gym.evaluation.zygote import Zygote
from tests.machine import PEAKS

# Files that take longest, the longest first: no worker is to begin one of them when the others are done.
LONGEST = (
    "testing/test_exploits.py", "scripts/test_optimize.py", "codegen/test_triton_modules.py",
    "testing/test_honest.py", "codegen/test_heldout.py", "codegen/test_program.py",
    "codegen/test_rows.py", "tasks/test_library.py", "codegen/test_gathers.py",
    "evaluation/test_selfcheck.py", "test_job.py", "scripts/test_llm_scripts.py", "scripts/test_evaluate.py",
    "test_package.py", "codegen/test_rewrites.py", "codegen/test_ops.py", "evaluation/test_evaluator.py",
    "evaluation/test_zygote.py", "codegen/test_cuda_modules.py", "codegen/test_contraction_templates.py",
    "codegen/test_contraction.py", "codegen/test_one_pass.py", "proposers/test_llm_lessons.py",
    "proposers/test_llm_search.py", "proposers/test_warm.py", "scripts/test_training.py", "envs/test_live.py",
    "evaluation/test_gpu_rules.py",
)  # fmt: skip


# The same examples in every run, however long they take.
settings.register_profile(
    "steady", deadline=None, derandomize=True, database=None, suppress_health_check=[HealthCheck.too_slow]
)
settings.load_profile("steady")


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


@pytest.fixture(scope="session", autouse=True)
def _patience() -> Iterator[None]:
    """Limits in seconds are there to end what hangs. What waits for one in a test sets one of its own."""
    with pytest.MonkeyPatch.context() as patch:
        for module, names in {
            arms: ("OPEN_TIMEOUT", "END_SECONDS"),
            builder: ("END_SECONDS",),
            evaluator: ("CALL_SECONDS",),
            zygote: ("START_TIMEOUT", "SPAWN_TIMEOUT"),
        }.items():
            for name in names:
                patch.setattr(module, name, 300.0)
        yield


@pytest.fixture(scope="session", autouse=True)
def _peaks() -> Iterator[None]:
    """The machine's peaks are given: measured while others work, they would be too low to believe a fast kernel."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Evaluator, "_measure_peaks", lambda self, threads: replace(PEAKS, threads=threads))
        yield


@pytest.fixture(scope="session", autouse=True)
def _same_draws() -> Iterator[None]:
    """What evaluators and judges draw in secret is the same in every run."""
    with pytest.MonkeyPatch.context() as patch:
        for module in (evaluator, judge_client, gpu_evaluator, gpu_stage):
            patch.setattr(module, "secrets", SimpleNamespace(randbits=lambda bits: 20_011 % (1 << bits)))
        yield


def _seed() -> None:
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)


_seed()  # for what modules draw when they are imported


@pytest.fixture(scope="module", autouse=True)
def _seeded_module() -> None:
    """Random numbers of a module's fixtures do not hang on what ran before them ..."""
    _seed()


@pytest.fixture(autouse=True)
def _seeded(_seeded_module: None) -> None:
    """... nor those of a test."""
    _seed()


@pytest.fixture(scope="module")
def brief_races() -> Iterator[None]:
    """Races of a dozen rounds, and two processes confirm what is won: for tests of what comes before and after."""
    with pytest.MonkeyPatch.context() as patch:
        for name in ("RACE", "CONFIRM", "SOAK", "AA", "RUNOFF"):
            rules = replace(getattr(evaluator, name), min_rounds=10, max_rounds=12, max_seconds=600.0)
            patch.setattr(evaluator, name, rules)
        patch.setattr(evaluator, "planned", lambda *_: 5)
        patch.setattr(evaluator, "confirm", partial(race.confirm, processes=2, most=2))
        yield


@contextmanager
def _clock(candidate_s: float, baseline_s: float) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(arms, "elapsed", lambda *_: candidate_s)
        patch.setattr(judge_client, "elapsed", lambda *_: baseline_s)
        patch.setattr(JudgeClient, "_null_latency", lambda self: 0.0)
        yield


@pytest.fixture(scope="module")
def steady_clock(brief_races: None) -> Iterator[None]:
    """By the clock every call of a candidate takes 1 ms and of the baseline 2 ms: for tests of what is made of times.

    What is built, called and checked is real, races are brief, and each is won in the same way however busy the
    machine is.
    """
    with _clock(1e-3, 2e-3):
        yield


@pytest.fixture(scope="module")
def even_clock(brief_races: None) -> Iterator[None]:
    """Or the same for everybody, so that no race is won and nothing is confirmed: for tests of verdicts."""
    with _clock(2e-3, 2e-3):
        yield


@pytest.fixture(scope="session")
def zygotes() -> Iterator[Callable[[int], Zygote]]:
    """The process that all of this session fork from, for each number of threads: it takes seconds to start."""
    with ExitStack() as stack:
        yield cache(lambda threads: stack.enter_context(Zygote(threads)))


@pytest.fixture(scope="session", autouse=True)
def _one_zygote(zygotes: Callable[[int], Zygote]) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        for module in (evaluator, exchange, bundle):
            patch.setattr(module, "Zygote", lambda threads: nullcontext(zygotes(threads)))
        yield


@pytest.fixture(scope="module")
def own_zygote() -> Iterator[None]:
    """Evaluators of this module fork from a process that has seen this module's environment."""
    with pytest.MonkeyPatch.context() as patch, ExitStack() as stack:
        started = cache(lambda threads: stack.enter_context(Zygote(threads)))
        patch.setattr(evaluator, "Zygote", lambda threads: nullcontext(started(threads)))
        yield

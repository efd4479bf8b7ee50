"""Driven by the registry: every environment of this project passes both checkers without a warning."""

from __future__ import annotations

import json
import subprocess
import sys
import warnings
from typing import Any

import gymnasium
import pytest
from gymnasium.envs.registration import EnvSpec
from gymnasium.utils.env_checker import check_env

from ke_gym.envs import LIVE, REPLAY
from tests.envs.live import FAKE
from tests.envs.recorded import tables

# What an environment is made with here, so that a step takes no seconds; others have to do as they are.
ARGUMENTS: dict[str, dict[str, Any]] = {LIVE: FAKE, REPLAY: {"tables": tables()}}
IDS = sorted(name for name in gymnasium.registry if name.startswith("ke_gym/"))


def test_only_what_is_measured_live_is_called_nondeterministic() -> None:
    assert gymnasium.spec(LIVE).nondeterministic and not gymnasium.spec(REPLAY).nondeterministic


@pytest.mark.parametrize("name", IDS)
def test_gymnasiums_checker_has_no_complaint(name: str) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        env = gymnasium.make(name, render_mode="ansi", **ARGUMENTS.get(name, {}))
        check_env(env.unwrapped)
        env.close()


@pytest.mark.parametrize("name", IDS)
def test_stable_baselines3s_checker_has_no_complaint(name: str) -> None:
    checker = pytest.importorskip("stable_baselines3.common.env_checker")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        env = gymnasium.make(name, **ARGUMENTS.get(name, {})).unwrapped
        checker.check_env(env)
        env.close()


@pytest.mark.parametrize("name", IDS)
def test_specifications_survive_json(name: str) -> None:
    env = gymnasium.make(name, horizon=7)
    assert env.spec is not None
    text = env.spec.to_json()
    assert json.loads(text)["kwargs"] == {"horizon": 7}
    again = gymnasium.make(EnvSpec.from_json(text))
    assert again.spec is not None and again.spec.id == name and again.spec.kwargs == {"horizon": 7}
    assert again.unwrapped.__class__ is env.unwrapped.__class__


@pytest.mark.parametrize("name", IDS)
def test_docstrings_have_gymnasiums_headings(name: str) -> None:
    text = gymnasium.make(name, **ARGUMENTS.get(name, {})).unwrapped.__doc__ or ""
    for heading in (
        "Description", "Action Space", "Observation Space", "Starting State", "Rewards", "Episode End",
        "Information", "Arguments", "Version History",
    ):  # fmt: skip
        assert f"## {heading}\n" in text


def test_importing_the_environments_imports_no_learning_library() -> None:
    script = (
        "import sys, ke_gym.envs; print([m for m in ('stable_baselines3', 'sb3_contrib', 'matplotlib')"
        " if m in sys.modules])"
    )
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "[]"

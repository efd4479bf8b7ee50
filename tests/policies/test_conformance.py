"""Every built-in policy against the suite that third parties subclass."""

from __future__ import annotations

from collections.abc import Iterator
from typing import cast

import numpy as np
import pytest

from ke_gym import policies
from ke_gym.envs import catalog
from ke_gym.envs.replay import KernelOptReplayEnv
from ke_gym.errors import UserError
from ke_gym.policies import Policy
from ke_gym.policies.linucb import LinUCB
from ke_gym.policies.playing import play
from ke_gym.testing.policies import PolicyConformance
from tests.policies.endpoint import Endpoint

SLOW = {"boosted_trees": 27}  # refits take their time


def suite(kind: str) -> type[PolicyConformance]:
    class Suite(PolicyConformance):
        learning_steps = SLOW.get(kind, 60)

        def make(self, seed: int = 0) -> Policy:
            return policies.find(kind)(seed)

    return Suite


class TestAUCBandit(suite("auc_bandit")): ...  # type: ignore[misc]


class TestBestOfN(suite("best_of_n")): ...  # type: ignore[misc]


class TestBetaThompson(suite("beta_thompson")): ...  # type: ignore[misc]


class TestBoostedTrees(suite("boosted_trees")): ...  # type: ignore[misc]


class TestDQN(suite("dqn")): ...  # type: ignore[misc]


class TestDiscountedUCB(suite("discounted_ucb")): ...  # type: ignore[misc]


class TestEpsilonGreedy(suite("epsilon_greedy")): ...  # type: ignore[misc]


class TestHillClimb(suite("hill_climb")): ...  # type: ignore[misc]


class TestIslandsMapElites(suite("islands_map_elites")): ...  # type: ignore[misc]


class TestKernelBand(suite("kernelband")): ...  # type: ignore[misc]


class TestLinTS(suite("lints")): ...  # type: ignore[misc]


class TestLinUCB(suite("linucb")): ...  # type: ignore[misc]


class TestMaskablePPO(suite("maskable_ppo")): ...  # type: ignore[misc]


class TestPUCT(suite("puct")): ...  # type: ignore[misc]


class TestPPO(suite("ppo")): ...  # type: ignore[misc]


class TestPPOGuided(suite("ppo_guided")): ...  # type: ignore[misc]


class TestRotting(suite("rotting")): ...  # type: ignore[misc]


class TestRoundRobin(suite("round_robin")): ...  # type: ignore[misc]


class TestThompson(suite("thompson")): ...  # type: ignore[misc]


class TestUCB1(suite("ucb1")): ...  # type: ignore[misc]


class TestUCT(suite("uct")): ...  # type: ignore[misc]


class TestMaskedRandom(suite("masked_random")):  # type: ignore[misc]
    def test_decisions_without_chance_repeat(self) -> None:
        """It has no other decisions: "deterministic" leaves it random, but seeded."""


class TestLLMChooser(PolicyConformance):
    @pytest.fixture(autouse=True)
    def endpoint(self, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
        with Endpoint() as endpoint:
            monkeypatch.setenv("OPENAI_BASE_URL", endpoint.url)
            monkeypatch.setenv("OPENAI_MODEL", "test")
            yield

    def make(self, seed: int = 0) -> Policy:
        return policies.find("llm_chooser")(seed)


SHIPPED = sorted(path.stem for path in policies.PRETRAINED.glob("*.json"))


@pytest.mark.parametrize("name", [*SHIPPED, "ppo_guided"])
def test_the_shipped_files_load_and_play(name: str) -> None:
    policy = policies.make(name, seed=1)
    assert policy.trained_on["tables"] and policy.trained_on["harness"]
    table = catalog.load("validation")[0]
    env = KernelOptReplayEnv(table, horizon=8, parent_rule=policy.parent_rule, reward=policy.reward)  # type: ignore[arg-type]
    episode = play(policy, env, seed=1)
    assert episode.evaluations + episode.vain == 8 and episode.correct
    catalogued = {table.task: table.hash for table in catalog.load("train")}
    assert policy.trained_on["tables"] == catalogued, "trained on the tables that ship"


def test_a_policy_and_the_baselines_ship() -> None:
    assert {"linucb", "maskable_ppo"} <= {*SHIPPED}


def test_options_change_a_shipped_policy_and_leave_it_trained() -> None:
    plain, bold = policies.make("linucb"), policies.make("linucb:alpha=0.7")
    assert isinstance(plain, LinUCB) and isinstance(bold, LinUCB) and bold.alpha == 0.7 != plain.alpha
    assert np.array_equal(plain.moments, bold.moments) and bold.moments.any()
    assert bold.trained_on == plain.trained_on
    with pytest.raises(UserError, match="ridge of linucb is for training"):
        policies.make("linucb:ridge=2")


def test_every_policy_of_the_registry_is_covered() -> None:
    covered = {
        value().make().name if key != "TestLLMChooser" else "llm_chooser"
        for key, value in globals().items()
        if key.startswith("Test")
    }
    assert covered == {*cast(list[str], policies.names())}

"""Every built-in policy against the suite that third parties subclass."""

from __future__ import annotations

from collections.abc import Iterator
from typing import cast

import pytest

from ke_gym import policies
from ke_gym.policies import Policy
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


def test_every_policy_of_the_registry_is_covered() -> None:
    covered = {
        value().make().name if key != "TestLLMChooser" else "llm_chooser"
        for key, value in globals().items()
        if key.startswith("Test")
    }
    assert covered == {*cast(list[str], policies.names())}

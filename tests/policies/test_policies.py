from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from ke_gym.policies import Transition

from ke_gym import policies
from ke_gym.errors import UserError
from ke_gym.search.history import HISTORY, PER_STRATEGY
from ke_gym.strategies import RESTART, STOP, STRATEGIES

OBSERVATION = {
    "history": np.zeros(len(HISTORY), dtype=np.float32),
    "strategies": np.zeros(len(PER_STRATEGY) * len(STRATEGIES), dtype=np.float32),
}
masks = st.lists(st.booleans(), min_size=25, max_size=25).map(lambda bits: np.array([*bits[:24], True]))


def transition(action: int, reward: float, mask: np.ndarray) -> Transition:
    return Transition(OBSERVATION, action, reward, OBSERVATION, False, mask, {})


@pytest.mark.parametrize("name", policies.names())
@given(legal=masks, seed=st.integers(0, 5), deterministic=st.booleans())
def test_only_legal_actions_are_chosen_and_stop_only_if_it_is_alone(
    name: str, legal: np.ndarray, seed: int, deterministic: bool
) -> None:
    policy = policies.make(name, seed)
    for _ in range(8):
        action, _ = policy.predict(OBSERVATION, deterministic=deterministic, action_masks=legal)
        assert action.shape == () and legal[action]
        assert action != STOP.id or not legal[:24].any()
        policy.update(transition(int(action), 0.1, legal))


@pytest.mark.parametrize("name", policies.names())
def test_a_batch_of_environments_gets_a_batch_of_actions(name: str) -> None:
    batch = {key: np.stack([value] * 3) for key, value in OBSERVATION.items()}
    legal = np.zeros((3, 25), dtype=bool)
    legal[:, STOP.id] = legal[0, 3] = legal[1, 7] = True
    actions, _ = policies.make(name).predict(batch, action_masks=legal, episode_start=np.ones(3, dtype=bool))
    assert actions.tolist() == [3, 7, STOP.id]
    assert policies.make(name).predict(batch)[0].shape == (3,)


@pytest.mark.parametrize("name", policies.names())
def test_a_saved_policy_goes_on_as_the_original_would(name: str, tmp_path: Path) -> None:
    rng, legal = np.random.default_rng(0), np.ones(25, dtype=bool)
    policy = policies.make(name, seed=4)

    def step(p: policies.Policy, reward: float) -> int:
        action = int(p.predict(OBSERVATION, action_masks=legal)[0])
        p.update(transition(action, reward, legal))
        return action

    for _ in range(20):
        step(policy, rng.normal())
    policy.save(tmp_path / "policy.json")
    copy = policies.make(str(tmp_path / "policy.json"))
    rewards = rng.normal(size=20)
    assert [step(policy, r) for r in rewards] == [step(copy, r) for r in rewards]


def test_epsilon_greedy_comes_to_prefer_what_pays() -> None:
    policy, legal = policies.make("epsilon_greedy", seed=0), np.ones(25, dtype=bool)
    chosen = []
    for _ in range(200):
        action = int(policy.predict(OBSERVATION, action_masks=legal)[0])
        chosen.append(action)
        policy.update(transition(action, 0.5 if action == 11 else -0.1, legal))
    assert chosen[:4] == [RESTART.id] * 4
    assert chosen[100:].count(11) > 50


def test_unknown_policies_and_unreadable_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="epsilon_greedy"):
        policies.make("epsilon_gredy")
    with pytest.raises(UserError, match="cannot be read"):
        policies.make(str(tmp_path / "missing.json"))
    (tmp_path / "notes.json").write_text("[]")
    with pytest.raises(UserError, match="not a saved policy"):
        policies.make(str(tmp_path / "notes.json"))
    policy = tmp_path / "old.json"
    policy.write_text('{"policy": "masked_random", "format": 1, "actions": 12, "state": {}}')
    with pytest.raises(UserError, match="train it again"):
        policies.make(str(policy))

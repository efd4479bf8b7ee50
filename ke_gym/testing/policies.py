"""The conformance suite of search policies: subclass it, give it a factory, and pytest runs it.

    from ke_gym.testing.policies import PolicyConformance

    class TestMyPolicy(PolicyConformance):
        def make(self, seed: int = 0) -> Policy:
            return MyPolicy(seed)

What a policy does between these rules is its own affair.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from ke_gym import policies
from ke_gym.policies import Policy, Transition
from ke_gym.policies.features import LAYOUT, SPACES_VERSION
from ke_gym.search import parents
from ke_gym.strategies import ACTIONS, STOP

Observation = dict[str, NDArray[np.float32]]


def observation(rng: np.random.Generator) -> Observation:
    """A random observation of the environments' form: named float32 parts in [-1, 1]."""
    return {name: rng.uniform(-1, 1, size).astype(np.float32) for name, size in LAYOUT.items()}


def legal(rng: np.random.Generator) -> NDArray[np.bool_]:
    """A random mask, sometimes with very few actions; STOP is always legal."""
    mask: NDArray[np.bool_] = rng.random(len(ACTIONS)) < rng.choice([0.05, 0.3, 0.9])
    mask[STOP.id] = True
    return mask


def searches(policy: Policy, steps: int, seed: int = 0, length: int = 20) -> list[int]:
    """The actions of ``steps`` steps through searches of ``length`` steps with random outcomes.

    The outcomes depend on ``seed`` and the actions alone, so equal policies make equal lists.
    """
    rng = np.random.default_rng(seed)
    actions = []
    before = observation(rng)
    for step in range(steps):
        mask, after, noise = legal(rng), observation(rng), rng.normal(scale=0.05)
        start = np.array([step % length == 0])
        chosen, _ = policy.predict(before, episode_start=start, action_masks=mask)
        action = int(chosen)
        reward = float(np.clip((action % 5) * 0.05 - 0.1 + noise, -0.2, np.log(3)))
        info = {"outcome": "correct", "best_gain": max(reward, 0.0)}
        done = step % length == length - 1
        policy.update(Transition(before, action, reward, after, done, mask, info))
        actions.append(action)
        before = after
    return actions


class PolicyConformance:
    """Subclass with ``make``; ``learning_steps`` is how many steps the slower tests take."""

    learning_steps = 60

    def make(self, seed: int = 0) -> Policy:
        """A fresh policy with this seed."""
        raise NotImplementedError

    def test_names_itself_and_a_parent_rule(self) -> None:
        policy = self.make()
        assert policy.name.isidentifier()
        assert policy.parent_rule in parents.RULES
        assert policy.reward in ("parent", "best", "dense")

    def test_chooses_legal_actions_only_and_stops_only_when_nothing_else_is_left(self) -> None:
        policy, rng = self.make(), np.random.default_rng(1)
        for step in range(self.learning_steps):
            mask, now = legal(rng), observation(rng)
            action, _ = policy.predict(now, deterministic=step % 3 == 0, action_masks=mask)
            assert action.shape == () and action.dtype == np.int64
            assert mask[action]
            assert action != STOP.id or mask.sum() == 1
            policy.update(Transition(now, int(action), 0.1, observation(rng), False, mask, {}))

    def test_stops_where_nothing_else_is_legal(self) -> None:
        mask = np.zeros(len(ACTIONS), dtype=np.bool_)
        mask[STOP.id] = True
        action, _ = self.make().predict(observation(np.random.default_rng(0)), action_masks=mask)
        assert action == STOP.id

    def test_takes_batches_and_flat_observations(self) -> None:
        rng = np.random.default_rng(2)
        rows = [observation(rng) for _ in range(3)]
        masks = np.zeros((3, len(ACTIONS)), dtype=np.bool_)
        masks[:, STOP.id] = masks[0, 3] = masks[1, 7] = True
        start = np.ones(3, dtype=np.bool_)
        batch = {name: np.stack([row[name] for row in rows]) for name in LAYOUT}
        actions, _ = self.make().predict(batch, episode_start=start, action_masks=masks)
        assert actions.tolist() == [3, 7, STOP.id]
        flat = np.stack([np.concatenate([row[name] for name in LAYOUT]) for row in rows])
        actions, _ = self.make().predict(flat, episode_start=start, action_masks=masks)
        assert actions.tolist() == [3, 7, STOP.id]

    def test_named_parts_and_the_flat_vector_are_the_same_to_it(self) -> None:
        rng = np.random.default_rng(3)
        named, flat = self.make(5), self.make(5)
        for _ in range(10):
            now, mask = observation(rng), legal(rng)
            vector = np.concatenate([now[name] for name in LAYOUT])
            assert named.predict(now, action_masks=mask)[0] == flat.predict(vector, action_masks=mask)[0]

    def test_equal_seeds_repeat_a_search(self) -> None:
        steps = self.learning_steps
        assert searches(self.make(3), steps) == searches(self.make(3), steps)

    def test_a_saved_policy_goes_on_exactly_as_the_original(self, tmp_path: Path) -> None:
        policy = self.make(4)
        searches(policy, self.learning_steps - 7)
        policy.trained_on = {"tables": {"softmax": "0" * 16}}
        policy.save(tmp_path / "policy.json")
        copy = type(policy).from_file(policies.files.read(tmp_path / "policy.json"))
        assert copy.trained_on == policy.trained_on
        self.prepare(copy)
        # Without an episode start: the search in progress goes on.
        rng = np.random.default_rng(9)
        for _ in range(30):
            now, mask, reward = observation(rng), legal(rng), float(rng.normal())
            action = int(policy.predict(now, action_masks=mask)[0])
            assert int(copy.predict(now, action_masks=mask)[0]) == action
            for p in (policy, copy):
                p.update(Transition(now, action, reward, now, False, mask, {"outcome": "correct"}))

    def prepare(self, copy: Policy) -> None:
        """Give a loaded policy what no file holds (an endpoint, a licence); most need nothing."""

    def test_reseeding_keeps_what_was_learned(self) -> None:
        policy = self.make(1)
        searches(policy, self.learning_steps)
        before = policies.files.encode({k: v for k, v in policy.state_dict().items() if k != "rng"})
        policy.reseed(2)
        after = policies.files.encode({k: v for k, v in policy.state_dict().items() if k != "rng"})
        assert before == after

    def test_decisions_without_chance_repeat(self) -> None:
        policy = self.make()
        searches(policy, self.learning_steps)
        rng = np.random.default_rng(6)
        now, mask = observation(rng), np.ones(len(ACTIONS), dtype=np.bool_)
        copies = [type(policy).from_file(_as_file(policy)) for _ in range(2)]
        for copy, seed in zip(copies, (10, 11)):
            self.prepare(copy)
            copy.reseed(seed)
        first, second = (c.predict(now, deterministic=True, action_masks=mask)[0] for c in copies)
        assert first == second


def _as_file(policy: Policy) -> policies.files.PolicyFile:
    actions = [action.name for action in ACTIONS]
    state = policies.files.decode(policies.files.encode(policy.state_dict()))
    return policies.files.PolicyFile(
        "memory", policies.files.FORMAT, policy.name, actions, SPACES_VERSION, {}, state
    )

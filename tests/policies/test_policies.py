"""The registry, policy files, and what single policies are there for."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from ke_gym import policies
from ke_gym.errors import UserError
from ke_gym.policies import Policy, Transition, files
from ke_gym.policies.features import LAYOUT, PROFILE, irrelevance, vector
from ke_gym.policies.islands_map_elites import IslandsMapElites
from ke_gym.policies.kernelband import KernelBand, k_means
from ke_gym.policies.network import NetworkPolicy
from ke_gym.policies.rotting import Rotting
from ke_gym.strategies import ACTIONS, FIX, RESTART, STOP, STRATEGIES, get
from ke_gym.testing.policies import legal, observation, searches

ALL = np.ones(25, dtype=bool)
ZERO = {name: np.zeros(size, dtype=np.float32) for name, size in LAYOUT.items()}


def paid(policy: Policy, steps: int, pays: int, mask: np.ndarray = ALL) -> list[int]:
    """The actions of one search in which a single action pays."""
    chosen = []
    for step in range(steps):
        start = np.array([step == 0])
        action = int(policy.predict(ZERO, episode_start=start, action_masks=mask)[0])
        chosen.append(action)
        reward = 0.5 if action == pays else -0.05
        policy.update(Transition(ZERO, action, reward, ZERO, False, mask, {"best_gain": max(reward, 0.0)}))
    return chosen


LEARNERS = (
    "auc_bandit", "beta_thompson", "boosted_trees", "discounted_ucb", "epsilon_greedy", "islands_map_elites",
    "kernelband:c=0.2", "linucb:untrained", "lints:untrained", "puct:untrained", "thompson", "ucb1", "uct",
    "ppo_guided:untrained", "rotting:untrained",
)  # fmt: skip


@pytest.mark.parametrize("spec", LEARNERS)
def test_learners_come_to_prefer_what_pays(spec: str) -> None:
    chosen = paid(policies.make(spec, seed=0), 120, pays=11)
    assert chosen[60:].count(11) > 12  # chance: 2.5


def test_epsilon_greedy_drafts_first() -> None:
    assert paid(policies.make("epsilon_greedy"), 4, pays=11) == [RESTART.id] * 4


def test_a_rotting_bandit_learns_what_is_left_of_a_strategy_after_each_use() -> None:
    """Action 3 pays in its first two uses of a search, action 7 a little in every one."""

    def search(policy: Policy, steps: int) -> list[int]:
        chosen: list[int] = []
        for step in range(steps):
            start = np.array([step == 0])
            action = int(policy.predict(ZERO, episode_start=start, action_masks=ALL)[0])
            reward = 0.4 if action == 3 and chosen.count(3) < 2 else 0.05 if action == 7 else 0.0
            policy.update(Transition(ZERO, action, reward, ZERO, False, ALL, {"best_gain": reward}))
            chosen.append(action)
        return chosen

    policy = Rotting()
    policy.training = True
    for _ in range(200):
        search(policy, 40)
    curves = policy.curves()
    assert curves[3, 0] > 0.15 and curves[3, 4] < 0.05 and 0.02 < curves[7, 4] <= curves[7, 0] < 0.04
    assert (np.diff(curves, axis=1) <= 0).all()
    policy.training = False
    chosen = search(policy, 30)
    assert chosen[:2] == [3, 3] and chosen[2:].count(7) > 20
    tried = paid(policy, 40, pays=STOP.id)
    assert tried[0] == 3 and {*tried} == {*range(24)}, (
        "where nothing pays, what never paid elsewhere is tried too"
    )


def test_round_robin_takes_every_action_in_turn() -> None:
    assert paid(policies.make("round_robin"), 26, pays=0) == [*range(24), 0, 1]


def test_hill_climb_tries_every_neighbour_once_before_it_repeats_one() -> None:
    assert sorted(paid(policies.make("hill_climb"), 24, pays=24)) == [*range(24)]


@pytest.mark.parametrize("spec", ["ucb1", "thompson", "puct:untrained", "linucb:untrained", "boosted_trees"])
def test_training_carries_over_to_the_next_search(spec: str) -> None:
    policy = policies.make(spec, seed=0)
    policy.training = True
    for _ in range(6):
        paid(policy, 30, pays=7)
    policy.training = False
    assert paid(policy, 10, pays=7).count(7) >= 3


def test_without_training_a_bandit_forgets_between_searches() -> None:
    policy = policies.make("ucb1", seed=0)
    paid(policy, 60, pays=7)
    policy.begin()
    assert not policy.state_dict()["counts"].any()


# The registry --------------------------------------------------------------------------------------------


def test_unknown_policies_and_options_are_named_with_the_nearest() -> None:
    with pytest.raises(UserError, match="epsilon_greedy"):
        policies.make("epsilon_gredy")
    with pytest.raises(UserError, match="its options are c, soft_mask"):
        policies.make("ucb1:d=1")
    with pytest.raises(UserError, match="is a float, not 'high'"):
        policies.make("ucb1:c=high")
    with pytest.raises(UserError, match="it has no options"):
        policies.make("round_robin:c=1")
    for spec in ("ucb1:c=nan", "ucb1:c=inf", "linucb:alpha=nan"):
        with pytest.raises(UserError, match="has to be a finite number"):
            policies.make(spec)
    for spec in ("rotting:trust=0", "ppo_guided:temperature=0", "lints:ridge=0", "auc_bandit:size=0"):
        with pytest.raises(UserError, match="has to be above 0"):
            policies.make(spec)
    with pytest.raises(UserError, match="alpha of lints has to be at least 0"):
        policies.make("lints:alpha=-1")
    assert policies.make("ucb1:c=0.7,soft_mask=0.1").state_dict()["c"] == 0.7


def test_networks_want_training_and_weights_of_a_kindred_policy(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"train\.py --policy dqn"):
        policies.make("dqn")
    trained = policies.make("maskable_ppo:untrained", seed=3)
    trained.trained_on = {"tables": {"softmax": "ab"}}
    trained.save(tmp_path / "m.json")
    guided = policies.make(f"ppo_guided:weights={tmp_path / 'm.json'}")
    assert guided.trained_on == trained.trained_on
    policies.make("dqn:untrained").save(tmp_path / "q.json")
    with pytest.raises(UserError, match="holds a dqn policy"):
        policies.make(f"ppo:weights={tmp_path / 'q.json'}")


def test_a_file_is_a_policy_with_a_fresh_random_stream(tmp_path: Path) -> None:
    policies.make("masked_random", seed=1).save(tmp_path / "p.json")
    copies = [policies.make(str(tmp_path / "p.json"), seed) for seed in (5, 5, 6)]
    first, second, third = (searches(copy, 20) for copy in copies)
    assert first == second != third


# Files ---------------------------------------------------------------------------------------------------


def edit(path: Path, **changes: object) -> Path:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    return path


def test_unfit_files_are_refused_by_what_differs(tmp_path: Path) -> None:
    path = tmp_path / "policy.json"

    def saved() -> Path:
        policies.make("linucb:untrained").save(path)
        return path

    with pytest.raises(UserError, match="cannot be read"):
        policies.load(tmp_path / "missing.json")
    (tmp_path / "notes.json").write_text("[]")
    with pytest.raises(UserError, match="not a saved policy"):
        policies.load(tmp_path / "notes.json")
    (tmp_path / "text.json").write_text("linucb")
    with pytest.raises(UserError, match="not JSON"):
        policies.load(tmp_path / "text.json")
    with pytest.raises(UserError, match="observation version 0 instead of"):
        policies.load(edit(saved(), spaces=0))
    with pytest.raises(UserError, match=r"other actions \(fuse, melt\)"):
        names = ["melt" if a.name == "fuse" else a.name for a in ACTIONS]
        policies.load(edit(saved(), actions=names))
    with pytest.raises(UserError, match="in another order"):
        policies.load(edit(saved(), actions=[a.name for a in ACTIONS][::-1]))
    with pytest.raises(UserError, match="format 1 instead of"):
        policies.load(edit(saved(), format=1))
    with pytest.raises(UserError, match="damaged"):
        policies.load(edit(saved(), state={"rng": None}))
    with pytest.raises(UserError, match="cannot be written"):
        policies.make("ucb1").save(tmp_path / "no" / "where.json")


@pytest.mark.parametrize(
    ("spec", "key", "value", "words"),
    [
        ("linucb:untrained", "moments", np.zeros((25, 7)), "moments has the shape"),
        (
            "linucb:untrained",
            "moments",
            np.zeros((25, 133), dtype=np.int64),
            "moments is no array of float64",
        ),
        ("ucb1", "c", "x", "c is no number"),
        ("ucb1", "counts", np.full(25, np.nan), "counts holds what is no number"),
        ("rotting:untrained", "trust", 0.0, "trust is not above 0"),
        ("ppo_guided:untrained", "network", 3, "network is no object"),
        ("epsilon_greedy", "gains", [0.1], "for each action"),
        ("hill_climb", "tried", "ab", "tried is no list"),
    ],
)
def test_what_was_learned_has_to_be_of_the_right_kind(
    spec: str, key: str, value: object, words: str, tmp_path: Path
) -> None:
    policies.make(spec).save(tmp_path / "p.json")
    state = json.loads((tmp_path / "p.json").read_text())["state"]
    with pytest.raises(UserError, match=f"damaged.*{words}"):
        policies.load(edit(tmp_path / "p.json", state=state | {key: files.encode(value)}))


def test_a_rotting_bandit_saved_in_mid_search_goes_on_with_the_curves_of_its_beginning(
    tmp_path: Path,
) -> None:
    policy = Rotting()
    policy.training = True
    paid(policy, 20, pays=3)
    policy.save(tmp_path / "p.json")
    again = policies.load(tmp_path / "p.json")
    assert isinstance(again, Rotting) and not np.array_equal(policy.curves(), policy._curves)
    np.testing.assert_array_equal(again._curves, policy._curves)


def test_epsilon_greedy_repairs_twice_and_counts_each_repair_once() -> None:
    policy = policies.make("epsilon_greedy:untrained", seed=0)
    mask = np.zeros(25, dtype=bool)
    mask[[3, FIX.id, STOP.id]] = True
    chosen = [int(policy.predict(ZERO, deterministic=True, action_masks=mask)[0]) for _ in range(2)]
    assert chosen == [FIX.id] * 2 and not policy.state_dict()["tries"][FIX.id]
    for _ in range(2):
        policy.launched(FIX.id)
    assert policy.predict(ZERO, deterministic=True, action_masks=mask)[0] == 3
    for _ in range(2):
        policy.landed(FIX.id)
        policy.update(Transition(ZERO, FIX.id, 0.0, ZERO, False, mask, {}))
    assert policy.state_dict()["tries"][FIX.id] == 2


def test_networks_of_other_shapes_are_refused(tmp_path: Path) -> None:
    policy = policies.make("maskable_ppo:untrained")
    assert isinstance(policy, NetworkPolicy)
    policy.layers[0][0] = policy.layers[0][0][:, :100].copy()
    policy.save(tmp_path / "m.json")
    with pytest.raises(UserError, match="damaged"):
        policies.load(tmp_path / "m.json")


def test_tables_that_changed_since_training_are_named() -> None:
    trained = {"tables": {"softmax": "a", "matmul": "b"}}
    files.check_tables("p.json", trained, {"softmax": "a", "matmul": "b", "row_sum": "c"})
    with pytest.raises(UserError, match="softmax changed since"):
        files.check_tables("p.json", trained, {"softmax": "x", "matmul": "b"})
    with pytest.raises(UserError, match="matmul not among the tables now"):
        files.check_tables("p.json", trained, {"softmax": "a"})


arrays = st.sampled_from(["float32", "float64", "int64", "bool"]).flatmap(
    lambda dtype: hnp.arrays(dtype, hnp.array_shapes(min_dims=0, max_dims=3, min_side=0, max_side=4))
)


@settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])  # on a busy machine drawing takes long
@given(st.dictionaries(st.text(max_size=5), arrays | st.integers() | st.lists(arrays, max_size=2)))
def test_arrays_survive_a_file_exactly(state: dict[str, object]) -> None:
    back = files.decode(json.loads(json.dumps(files.encode(state))))
    np.testing.assert_equal(back, state)


def test_an_array_cannot_inflate_beyond_its_shape() -> None:
    bomb = files.encode(np.zeros(1_000_000)) | {"shape": [2]}
    with pytest.raises(ValueError, match="does not fit its shape"):
        files.decode(bomb)


# What the observation says -------------------------------------------------------------------------------


def profiled(budget_left: float = 1.0, **pressures: float) -> dict[str, np.ndarray]:
    profile = np.zeros(len(PROFILE), dtype=np.float32)
    for name, value in {"has_profile": 1.0, **pressures}.items():
        profile[PROFILE.index(name)] = value
    history = np.zeros(LAYOUT["history"], dtype=np.float32)
    history[0] = budget_left
    return ZERO | {"profile": profile, "history": history}


def test_the_soft_mask_prefers_what_limits_the_parent_and_fades_by_half_of_the_budget() -> None:
    full = irrelevance(profiled(dram=0.9))
    for strategy in STRATEGIES:
        assert full[strategy.id] == float(strategy.resource not in ("dram", "all"))
    assert not full[22:].any()
    assert irrelevance(profiled(0.75, dram=0.9)).max() == pytest.approx(0.5)
    assert not irrelevance(profiled(0.5, dram=0.9)).any()
    assert not irrelevance(ZERO).any()
    assert irrelevance(profiled(dram=0.1))[get("vectorize").id] == 1.0
    assert irrelevance(profiled(dram=0.1))[get("sync_launch").id] == 0.0


@pytest.mark.parametrize(
    "spec", ["ucb1:soft_mask=1", "thompson:soft_mask=5", "puct:untrained", "linucb:soft_mask=1"]
)
def test_policies_take_the_soft_mask(spec: str) -> None:
    policy, seen = policies.make(spec), profiled(dram=0.9)
    for _ in range(5):
        action = ACTIONS[int(policy.predict(seen, action_masks=ALL)[0])]
        assert action.control or action.resource in ("dram", "all")


def test_kernelband_masks_saturated_resources_unless_nothing_else_is_left() -> None:
    policy = KernelBand()
    for _ in range(30):
        action = ACTIONS[int(policy.predict(profiled(dram=0.9), action_masks=ALL)[0])]
        assert action.resource != "dram" or action.family == "fusion"
        policy.update(Transition(ZERO, action.id, 0.0, ZERO, False, ALL, {}))
    only = np.zeros(25, dtype=bool)
    only[[get("vectorize").id, 24]] = True
    assert int(policy.predict(profiled(dram=0.9), action_masks=only)[0]) == get("vectorize").id


def test_kernelband_learns_per_cluster() -> None:
    policy = KernelBand(c=0.0)
    kinds = [ZERO | {"code": np.full(14, value, dtype=np.float32)} for value in (-1.0, 1.0)]
    for _ in range(40):
        for kind, pays in zip(kinds, (3, 8)):
            action = int(policy.predict(kind, action_masks=ALL)[0])
            policy.update(Transition(kind, action, 0.5 if action == pays else 0.0, kind, False, ALL, {}))
    assert [int(policy.predict(k, deterministic=True, action_masks=ALL)[0]) for k in kinds] == [3, 8]


def test_k_means_finds_separate_heaps_and_needs_no_more_centers_than_points() -> None:
    rng = np.random.default_rng(0)
    heaps = [rng.normal(center, 0.1, (20, 2)) for center in (0.0, 5.0, 9.0)]
    centers = np.sort(k_means(np.concatenate(heaps), 3)[:, 0])
    assert np.allclose(centers, [heap[:, 0].mean() for heap in heaps])
    assert len(k_means(np.zeros((4, 2)), 3)) == 1


def test_map_elites_keeps_the_best_of_each_cell_and_migrates() -> None:
    policy = IslandsMapElites()
    searches(policy, 200, length=200)
    assert sum(len(island.data("objective")) > 3 for island in policy.islands) == 5
    policy.begin()
    for reward in (0.1, 0.3, 0.2):
        policy.step = 0
        policy.update(Transition(ZERO, 3, reward, ZERO, False, ALL, {}))
    assert policy.islands[0].data("objective").tolist() == [pytest.approx(0.3)]
    policy.step = 9
    policy.update(Transition(ZERO, 4, 0.7, ZERO, False, ALL, {}))
    assert 0.7 in policy.islands[0].data("objective").round(3)  # island 4 sent its best round to island 0


def test_a_networks_probabilities_are_a_softmax_over_the_legal_actions() -> None:
    policy = policies.make("maskable_ppo:untrained", seed=0)
    assert isinstance(policy, NetworkPolicy)
    policy.layers[-1][1][:] = np.linspace(0, 2, 25)
    mask = np.zeros(25, dtype=bool)
    mask[[1, 12, 23, 24]] = True
    counts = np.bincount([int(policy.predict(ZERO, action_masks=mask)[0]) for _ in range(4000)], minlength=25)
    weights = np.exp(policy.outputs(ZERO)[[1, 12, 23]])
    assert np.allclose(counts[[1, 12, 23]] / 4000, weights / weights.sum(), atol=0.04)
    assert policy.predict(ZERO, deterministic=True, action_masks=mask)[0] == 23


def test_guided_search_follows_the_network_until_the_search_knows_better() -> None:
    policy = policies.make("ppo_guided:untrained", seed=0)
    policy.network.layers[-1][1][5] = 6.0  # type: ignore[attr-defined]
    chosen = paid(policy, 100, pays=9)
    assert chosen[0] == 5
    assert chosen[60:].count(9) > chosen[60:].count(5)


def test_flat_and_named_observations_agree() -> None:
    now = observation(np.random.default_rng(0))
    flat = vector(now)
    assert flat.shape == (132,)
    assert np.array_equal(vector(flat.astype(np.float32)), flat)
    assert legal(np.random.default_rng(0)).shape == (25,)

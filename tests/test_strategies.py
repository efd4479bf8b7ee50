from __future__ import annotations

import pytest

from ke_gym import strategies
from ke_gym.errors import UserError
from ke_gym.strategies import ACTIONS, CONTROLS, FAMILIES, STRATEGIES

ORDER = [
    "tile_block",
    "stage_local",
    "layout_coalesce",
    "vectorize",
    "loop_order",
    "traversal_swizzle",
    "cache_hint",
    "prefetch_pipeline",
    "fuse",
    "fission",
    "recompute",
    "unroll_ilp",
    "matrix_unit",
    "precision_math",
    "algebra_hoist",
    "algorithm_swap",
    "predicate_peel",
    "work_partition",
    "split_reduce",
    "sync_launch",
    "specialize",
    "param_tune",
    "FIX",
    "RESTART",
    "STOP",
]


def test_the_order_of_actions_is_fixed() -> None:
    assert [action.name for action in ACTIONS] == ORDER
    assert [action.id for action in ACTIONS] == list(range(25))


def test_every_family_is_used_and_controls_are_apart() -> None:
    assert {strategy.family for strategy in STRATEGIES} == set(FAMILIES)
    assert [control.name for control in CONTROLS] == ["FIX", "RESTART", "STOP"]
    assert all(action.control == (action in CONTROLS) for action in ACTIONS)


@pytest.mark.parametrize("action", ACTIONS, ids=lambda a: a.name)
def test_every_language_has_a_paragraph_of_its_own(action: strategies.Strategy) -> None:
    paragraphs = [action.prompt(language) for language in ("cpp", "triton", "cuda")]
    for paragraph in paragraphs:
        assert 60 <= len(paragraph) <= 500 and paragraph.endswith(".") and "  " not in paragraph
    assert len(set(paragraphs)) == (1 if action.control else 3)
    assert action.prompt("hip") == action.prompt("cuda")


def test_the_nearest_name_is_suggested() -> None:
    assert strategies.get("fuse") is STRATEGIES[8]
    with pytest.raises(UserError, match="vectorize"):
        strategies.get("vectorise")


def test_rewrites_carry_the_names_of_strategies() -> None:
    from ke_gym.codegen import rewrites

    assert set(rewrites.STRATEGIES) <= {strategy.name for strategy in STRATEGIES}
    assert any(strategy.rewrite for strategy in STRATEGIES)

"""What generated modules for a GPU prepare, and where they keep channels innermost."""

from __future__ import annotations

from dataclasses import replace

import pytest

from ke_gym.codegen import rewrites
from tests.codegen.interpret import FOLDER, program

CHAIN, WEIGHTED = (str(FOLDER / "products" / f"{name}.py") for name in ("conv_chain", "weighted"))


def test_weights_are_prepared_and_no_longer() -> None:
    made = program(WEIGHTED)
    seed = made.seeds()[0]
    hoisted = rewrites.apply(made, replace(seed, prepared=False), "algebra_hoist", 0)
    assert hoisted is not None and hoisted.prepared
    text = made.emit(hoisted)
    assert "def prepare(weight):" in text and "def forward(x, weight, spread, mm_right):" in text
    undone = rewrites.apply(made, hoisted, "algebra_hoist", 0)
    assert undone is not None and not undone.prepared
    assert "def prepare" not in made.emit(undone)


@pytest.mark.parametrize("name", ["softmax", "rms_norm_backward"])
def test_nothing_is_prepared_without_weights_or_where_they_change(name: str) -> None:
    made = program(name)
    assert all(not seed.prepared for seed in made.seeds())
    changed = (rewrites.apply(made, made.seeds()[0], "algebra_hoist", draw) for draw in range(4))
    assert not any(schedule.prepared for schedule in changed if schedule is not None)


def test_convolutions_that_follow_each_other_keep_channels_innermost() -> None:
    made = program(CHAIN)
    draft = made.seeds()[1]
    text = made.emit(draft)
    assert "def prepare(first_weight, second_weight):" in text
    assert text.count("_right[(") == 1, "only the first one's input is copied"
    first = made.seeds()[0]
    turned = [rewrites.apply(made, first, "layout_coalesce", draw) for draw in range(4)]
    assert replace(draft, prepared=False) in turned

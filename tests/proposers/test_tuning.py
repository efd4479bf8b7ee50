from __future__ import annotations

from typing import Any

import optuna
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ke_gym.proposers.tuning import STARTUP, suggest

KNOBS = {"tile": [8, 16, 32], "unroll": [False, True], "form": ["a", "b", "c"]}
CURRENT = {"tile": 8, "unroll": False, "form": "a"}


@settings(deadline=None, max_examples=10)
@given(seed=st.integers(0, 1000))
def test_every_setting_is_offered_once_until_none_is_left(seed: int) -> None:
    tried: list[tuple[dict[str, Any], float | None, bool]] = []
    while (values := suggest(KNOBS, CURRENT, tried, seed + len(tried))) is not None:
        assert values != CURRENT and all(values[name] in KNOBS[name] for name in KNOBS)
        assert values not in [old for old, *_ in tried]
        tried.append((values, 0.1, True))
    assert 8 <= len(tried) <= 17


def test_the_model_goes_where_the_gain_is() -> None:
    knobs = {name: list(range(8)) for name in "abcd"}
    current = dict.fromkeys("abcd", 0)
    tried: list[tuple[dict[str, Any], float | None, bool]] = []
    for draw in range(40):
        values = suggest(knobs, current, tried, draw)
        assert values is not None
        tried.append((values, float(values["a"]), True))
    late = [values["a"] for values, *_ in tried[25:]]
    assert sum(late) / len(late) > 4.5


def test_the_model_is_asked_early_also_for_values_that_are_no_scalars(
    monkeypatch: pytest.MonkeyPatch, recwarn: pytest.WarningsRecorder
) -> None:
    asked = []
    study = optuna.study.Study
    ask = study.ask

    def counted(self: optuna.Study, space: Any) -> optuna.Trial:
        asked.append(space)
        return ask(self, space)

    monkeypatch.setattr(study, "ask", counted)
    knobs = {"shape": [(4, 16), (8, 8), (16, 4)], "flags": [("-O3",), ()], "unroll": [False, True]}
    current = {"shape": (4, 16), "flags": (), "unroll": False}
    tried: list[tuple[dict[str, Any], float | None, bool]] = []
    for draw in range(STARTUP + 2):
        values = suggest(knobs, current, tried, draw)
        assert values is not None and all(values[name] in knobs[name] for name in knobs)
        tried.append((values, 0.1 * draw, True))
    assert len(asked) >= 2
    assert not recwarn.list


def test_illegal_settings_are_passed_over() -> None:
    for draw in range(20):
        values = suggest(KNOBS, CURRENT, [], draw, legal=lambda v: v["tile"] != 16)
        assert values is not None and values["tile"] != 16

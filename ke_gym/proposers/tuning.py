"""``param_tune``: one step of a TPE search over knobs, rebuilt from what its earlier steps measured.

The study lives nowhere but in the recorded children of a parent, so it resumes with the search, and every
inner evaluation is an ordinary one, charged to the budget. (Optuna; TPE does best at 25-100 evaluations.)
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from typing import Any

Knobs = Mapping[str, Sequence[Any]]
"""Name -> the values it may take."""
Values = Mapping[str, Any]

STARTUP = 6  # random settings before the model is asked
TRIES = 16


def suggest(
    knobs: Knobs, current: Values, tried: Sequence[tuple[Values, float | None, bool]], seed: int
) -> dict[str, Any] | None:
    """A setting not tried yet, or None when the space seems exhausted.

    ``tried`` holds (setting, gain over the parent in log-speedup, told): a gain of None means that it failed,
    or, if not told, that it is still in flight. ``current`` is the parent's own setting.
    """
    import optuna
    from optuna.distributions import CategoricalDistribution
    from optuna.trial import TrialState, create_trial

    optuna.logging.set_verbosity(optuna.logging.ERROR)
    space = {name: CategoricalDistribution(list(choices)) for name, choices in knobs.items()}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        sampler = optuna.samplers.TPESampler(
            seed=seed, n_startup_trials=STARTUP, multivariate=True, constant_liar=True
        )
    study = optuna.create_study(direction="maximize", sampler=sampler)
    seen = {_key(current)}

    def add(values: Values, state: TrialState, gain: float | None) -> None:
        if values.keys() == space.keys() and all(values[name] in space[name].choices for name in space):
            study.add_trial(create_trial(state=state, params=dict(values), distributions=space, value=gain))

    add(current, TrialState.COMPLETE, 0.0)
    for values, gain, told in tried:
        seen.add(_key(values))
        if not told:
            add(values, TrialState.RUNNING, None)
        elif gain is None:
            add(values, TrialState.FAIL, None)
        else:
            add(values, TrialState.COMPLETE, gain)
    for _ in range(TRIES):
        trial = study.ask(space)
        if _key(trial.params) not in seen:
            return dict(trial.params)
        study.tell(trial, state=TrialState.FAIL)
    return None


def _key(values: Values) -> tuple[tuple[str, str], ...]:
    return tuple(sorted((name, repr(value)) for name, value in values.items()))

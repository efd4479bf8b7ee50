"""``param_tune``: one step of a TPE search over knobs, rebuilt from what its earlier steps measured.

The study lives nowhere but in the recorded children of a parent (and in the nodes that tuning led through to
it), so it resumes with the search, and every
inner evaluation is an ordinary one, charged to the budget. (Optuna; TPE does best at 25-100 evaluations.)
"""

from __future__ import annotations

import random
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

Knobs = Mapping[str, Sequence[Any]]
"""Name -> the values it may take."""
Values = Mapping[str, Any]

STARTUP = 3  # settings near the parent's before the model is asked
TRIES = 16


def suggest(
    knobs: Knobs,
    current: Values,
    tried: Sequence[tuple[Values, float | None, bool]],
    seed: int,
    legal: Callable[[Values], bool] = lambda values: True,
) -> dict[str, Any] | None:
    """A legal setting not tried yet, or None when none is found.

    ``tried`` holds (setting, gain over the parent in log-speedup, told): a gain of None means that it failed,
    or, if not told, that it is still in flight. ``current`` is the parent's own setting. The first settings
    turn a few knobs of ``current``; later ones follow the TPE model.
    """
    seen = {_key(current), *(_key(values) for values, *_ in tried)}
    rng = random.Random(seed)

    def new(values: Values) -> bool:
        return _key(values) not in seen and legal(values)

    if len(tried) < STARTUP:
        return _neighbour(knobs, current, rng, new)
    import optuna
    from optuna.distributions import BaseDistribution, CategoricalDistribution
    from optuna.trial import TrialState, create_trial

    optuna.logging.set_verbosity(optuna.logging.ERROR)
    # Optuna wants plain values and ours may be tuples: it is told their places.
    space: dict[str, BaseDistribution] = {
        name: CategoricalDistribution(range(len(choices))) for name, choices in knobs.items()
    }
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        sampler = optuna.samplers.TPESampler(
            seed=seed, n_startup_trials=1, multivariate=True, constant_liar=True
        )
    study = optuna.create_study(direction="maximize", sampler=sampler)

    def add(values: Values, state: TrialState, gain: float | None) -> None:
        if values.keys() == space.keys() and all(values[name] in knobs[name] for name in space):
            places = {name: list(knobs[name]).index(values[name]) for name in space}
            study.add_trial(create_trial(state=state, params=places, distributions=space, value=gain))

    add(current, TrialState.COMPLETE, 0.0)
    for values, gain, told in tried:
        if not told:
            add(values, TrialState.RUNNING, None)
        elif gain is None:
            add(values, TrialState.FAIL, None)
        else:
            add(values, TrialState.COMPLETE, gain)
    for _ in range(TRIES):
        trial = study.ask(space)
        values = {name: knobs[name][place] for name, place in trial.params.items()}
        if new(values):
            return values
        # It stays open, which the model takes for a bad one (the constant liar): the next is another.
    # The model insists on what is known: look beside the best.
    gains = [
        (gain, values) for values, gain, _ in tried if gain is not None and values.keys() == knobs.keys()
    ]
    _, best = max(gains, key=lambda pair: pair[0], default=(0.0, current))
    return _neighbour(knobs, best, rng, new) or _neighbour(knobs, current, rng, new)


def _neighbour(
    knobs: Knobs, current: Values, rng: random.Random, acceptable: Callable[[Values], bool]
) -> dict[str, Any] | None:
    """``current`` with one to three knobs turned."""
    free = [name for name in sorted(knobs) if len(knobs[name]) > 1]
    for _ in range(4 * TRIES):
        values = dict(current)
        for name in rng.sample(free, min(len(free), rng.randint(1, 3))):
            values[name] = rng.choice([value for value in knobs[name] if value != current[name]])
        if acceptable(values):
            return values
    return None


def _key(values: Values) -> tuple[tuple[str, str], ...]:
    return tuple(sorted((name, repr(value)) for name, value in values.items()))

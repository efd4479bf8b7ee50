"""Search policies: observation and mask to action. One file each, one line in the registry."""

from __future__ import annotations

import difflib
import json
from importlib import import_module
from importlib.metadata import entry_points
from pathlib import Path

from ke_gym.policies.base import Observation, Policy

from ke_gym.errors import UserError
from ke_gym.search.run import Transition

__all__ = ["Observation", "Policy", "Transition", "load", "make", "names"]

_BUILT_IN = {
    "best_of_n": "ke_gym.policies.best_of_n:BestOfN",
    "epsilon_greedy": "ke_gym.policies.epsilon_greedy:EpsilonGreedy",
    "masked_random": "ke_gym.policies.masked_random:MaskedRandom",
}


def names() -> list[str]:
    """The known policies: built in, and registered under the entry point group ``ke_gym.policies``."""
    return sorted({*_BUILT_IN, *(point.name for point in entry_points(group="ke_gym.policies"))})


def _class(name: str) -> type[Policy]:
    if name in _BUILT_IN:
        module, attribute = _BUILT_IN[name].split(":")
        found: type[Policy] = getattr(import_module(module), attribute)
        return found
    for point in entry_points(group="ke_gym.policies"):
        if point.name == name:
            plugin: type[Policy] = point.load()
            return plugin
    near = difflib.get_close_matches(name, names(), n=3, cutoff=0.4) or names()
    raise UserError(f"unknown policy {name!r}; did you mean {', '.join(near)}?")


def make(name: str, seed: int = 0) -> Policy:
    """The policy of this name, or the one saved in this file; ``UserError`` names the nearest otherwise."""
    if Path(name).suffix == ".json":
        return load(name)
    return _class(name)(seed)


def load(path: str | Path) -> Policy:
    """The policy that ``Policy.save`` wrote to ``path``."""
    try:
        data = json.loads(Path(path).read_text())
    except OSError as error:
        raise UserError(f"the policy file {path} cannot be read: {error.strerror}") from error
    except ValueError as error:
        raise UserError(f"the policy file {path} is not JSON: {error}") from error
    if not isinstance(data, dict) or "policy" not in data:
        raise UserError(f"{path} is not a saved policy: it names none")
    return _class(str(data["policy"])).from_file(data)
